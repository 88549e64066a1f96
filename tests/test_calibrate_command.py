"""`sd-progress calibrate`: a map for a model's VAE, in a file, with a picture of what it does."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import constants
from test_cli import command
from zoo.video import wan_vae

from sd_progress import PreviewCallback, factors
from sd_progress.arguments import UsageError
from sd_progress.calibrate_command import Comparison, load_vae
from sd_progress.calibration import calibrate, score
from sd_progress.fingerprint import fingerprint

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from demo_scenes import draw, random_scene

PICTURES = 16  # of which a quarter is held out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of landscapes."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(PICTURES):
        draw(random_scene(number)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A VAE that says that it is Stable Diffusion's, in a folder of its own."""
    folder = tmp_path_factory.mktemp("model")
    tiny.working_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, model, scenes):
    """One map, with all that is said of it."""
    folder = tmp_path_factory.mktemp("made") / "maps"
    words = ("--model", model, "--images", scenes, "--out", folder / "mine.safetensors")
    return command(folder, "calibrate", *words)


def test_it_leaves_a_map_and_a_picture(made, model):
    """The map knows for which weights it is, and how good."""
    assert made.code == 0, made.err
    names = sorted(path.name for path in made.folder.iterdir())
    assert names == ["mine.png", "mine.safetensors"]
    found = factors.load(made.folder / "mine.safetensors")
    assert (found.name, found.kernel_size, found.upscale) == ("mine", 5, 1)
    assert found.psnr_db > 60
    assert found.vae_hash == fingerprint(tiny.working_vae())


def test_it_says_what_it_did_and_how_to_use_it(made, model):
    """A line for each, and no warning."""
    lines = re.sub(r"\d+\.\d", "N", made.out).splitlines()
    assert lines == [
        f"Calibrating AutoencoderKL of {model} (cpu).",
        "Done in N s.",
        "  fitted on  16 pictures, ridge 1e-06",
        "  draws      1x1 pixels of 5x5 latents, linear, 303 numbers",
        "  held out   N dB on 4 pictures, where one colour each has N dB",
        "  before     N dB with 'sd1'",
        f"  map        {made.folder / 'mine.safetensors'}",
        f"  picture    {made.folder / 'mine.png'}",
        f'To use it: PreviewCallback(pipe, "steps/", decoder="{made.folder}/mine.safetensors")',
    ]
    assert "warning" not in made.err


def test_both_scores_are_of_the_pictures_that_were_held_out(made, scenes):
    """Every fourth one, for the published row as for the map."""
    held_out, flat, before = map(float, re.findall(r"(\d+\.\d) dB", made.out))
    files = sorted(scenes.iterdir())[3::4]
    published = score(factors.by_name("sd1"), tiny.working_vae(), files)
    assert before == pytest.approx(published.psnr_db, abs=0.06)
    assert flat == pytest.approx(published.flat_db, abs=0.06)
    assert held_out == round(factors.load(made.folder / "mine.safetensors").psnr_db, 1)


def test_the_picture_shows_before_and_after(made, scenes):
    """Four in a row: a picture, the published row, the new map, the VAE; each with its decibels."""
    sheet = iio.imread(made.folder / "mine.png").astype(float)
    wanted = np.asarray(draw(random_scene(7)).resize((256, 256)))
    left, top = 8 + 264 * np.arange(4), 8 + (256 + 8 + 2 * 25)
    errors = [np.abs(sheet[top : top + 256, x : x + 256] - wanted).mean() for x in left]
    assert errors[0] == 0
    assert max(errors[2:]) < 10 < 30 < errors[1]
    labels = [sheet[top + 256 : top + 306, x : x + 256] for x in left]
    assert all(label.min() < 150 for label in labels)


def test_previews_use_the_map(made):
    """As `decoder=`, and the frames say so."""
    frames = []
    pipe = tiny.sd(vae=tiny.working_vae())
    preview = PreviewCallback(pipe, frames.append, decoder=str(made.folder / "mine.safetensors"))
    pipe(**tiny.sd_call(pipe, steps=2), callback_on_step_end=preview)
    preview.close()
    assert [frame.decoder for frame in frames] == ["linear:mine"] * 2


def test_nothing_is_overwritten(tmp_path, model, scenes):
    """A second map, and a second picture, get a number, and what is printed has it, too."""
    words = ("--model", model, "--images", scenes, "--out", tmp_path / "a.safetensors")
    command(tmp_path, "calibrate", *words)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = command(tmp_path, "calibrate", *words, "--kernel-size", 1)
    assert {path: path.read_bytes() for path in before} == before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a-2.png", "a-2.safetensors", "a.png", "a.safetensors"]
    assert f'decoder="{tmp_path / "a-2.safetensors"}"' in done.out


def test_only_the_vae_of_a_pipeline_is_loaded(tmp_path, scenes):
    """The rest of it need not even be there; and nothing need be known of such a VAE."""
    tiny.sd(vae=tiny.working_vae(scaling_factor=0.3)).save_pretrained(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "unet")
    places = ("--out", tmp_path / "a.safetensors", "--picture", tmp_path / "sub" / "b.png")
    words = ("--model", tmp_path / "pipe", "--images", scenes, "--upscale", 2, "--degree", 2)
    done = command(tmp_path, "calibrate", *words, *places)
    assert (done.code, (tmp_path / "sub" / "b.png").exists()) == (0, True), done.err
    assert "draws      2x2 pixels of 5x5 latents, quadratic" in done.out
    assert "before     principal components, whose colours mean nothing" in done.out


def test_without_pictures_synthetic_ones_are_made(tmp_path, model):
    """As many are held out, and they are shown; a network that wins nothing is left out."""
    words = ("--model", model, "--kernel_size", 1, "--hidden_units", 4, "--seed", 5)
    done = command(tmp_path, "calibrate", *words, "--out", tmp_path / "a.safetensors")
    assert "fitted on  32 synthetic 192x192 pictures" in done.out, done.err
    assert re.search(r"held out   \d+\.\d dB on 8 pictures", done.out)
    assert "1x1 latents, linear" in done.out
    assert iio.imread(tmp_path / "a.png").shape[0] > 4 * 256
    same = calibrate(tiny.working_vae(), kernel_size=1, hidden_units=4, seed=5)
    np.testing.assert_array_equal(factors.load(tmp_path / "a.safetensors").weight, same.weight)


def test_a_video_vae_is_shown_by_its_first_frame(scenes):
    """Each held-out picture is a clip that stands still, of two latent frames."""
    vae, nothing = wan_vae(), factors.Factors.from_table(np.zeros((4, 3)), name="grey")
    comparison = Comparison.of(nothing, vae, scenes, 0)
    assert (comparison.row, comparison.count) == (None, 8)
    assert [cell.label for cell in comparison.cells[::4]] == ["picture"] * 4
    assert {cell.picture.size for cell in comparison.cells} == {(256, 256)}


@pytest.fixture(scope="module")
def others(tmp_path_factory, model):
    """What cannot be calibrated, each in a folder."""
    folder = tmp_path_factory.mktemp("others")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), **blocks)
    unet.save_pretrained(folder / "unet")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "ddpm")
    tiny.vae().save_pretrained(folder / "random")
    shutil.copytree(model, folder / "torn")
    (folder / "torn" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    for name, count in (("few", 3), ("broken", 4), ("narrow", 4)):
        (folder / name).mkdir()
        for number in range(count):
            draw(random_scene(number)).save(folder / name / f"{number}.png")
    (folder / "broken" / "0.png").write_text("no picture")
    draw(random_scene(0)).resize((128, 3)).save(folder / "narrow" / "0.png")
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model ./no",
            "--model must be a model id of the Hugging Face Hub or a diffusers folder",
        ),
        ("--model ./no", "got './no'; there is no such folder"),
        ("--model {0}/few", "few'; it has no model_index.json and no config.json"),
        ("--model {0}/torn", "torn'; Unable to load weights from checkpoint file"),
        ("--model {0}/ddpm", "ddpm', a DDPMPipeline without vae, movq, vqvae, vqgan; its previews"),
        ("--model {0}/unet", "unet', which is a UNet2DModel; choose another model"),
        ("--model {0}/random", "no map was fitted: vae must give back what it encodes, got "),
        ("--images {0}/file", "--images must be a folder with pictures, got '"),
        ("--images {0}/few", "--images must be at least 4 pictures, got 3; leave it out to fit on"),
        ("--images {0}/broken", "--images must be pictures that can be read, got '"),
        (
            "--images {0}/narrow",
            "--images must be at least 4 pixels a side for this VAE, got (3, 1",
        ),
        ("--kernel_size 4", "--kernel_size must be odd, got 4; pass 3 or 5"),
        ("--kernel-size 0", "--kernel_size must be a whole number from 1 on, got '0'; 1, 3, 5 and"),
        ("--upscale 8", "--upscale must be at most 4 for this VAE, got 8; that is its full reso"),
        ("--degree 4", "argument --degree: invalid choice: "),
        ("--degree 2 --hidden_units 8", "--hidden_units must be at least 0, and 0 for degree 2"),
        (
            "--out a.txt",
            "--out must be a file ending in .safetensors, got 'a.txt'; for example a.s",
        ),
        (
            "--picture a.gif",
            "--picture must be a file ending in .png, got 'a.gif'; for example a.p",
        ),
        ("--out {0}/file/a.safetensors", "/file' is no folder that can be written to"),
        ("--picture {0}/file/a.png", "--picture must be a file that can be made, got '"),
        ("--device warp", "--device must be auto or one of this machine's: "),
    ],
)
def test_bad_input_is_told_in_one_line(words, message, tmp_path, model, others, scenes):
    """Exit code 2, no traceback, and nothing is made."""
    usual = ("--model", model, "--images", scenes, "--out", tmp_path / "a.safetensors")
    done = command(tmp_path, "calibrate", *usual, *words.format(others).split())
    error = done.err.splitlines()[-1]
    assert (done.code, list(tmp_path.iterdir())) == (2, [])
    assert "sd-progress: error: " in error
    assert message in error
    assert "Done" not in done.out


def test_a_full_disk_is_told(tmp_path, model, scenes):
    """It is known only in the end, and no half of a file is left."""
    words = ("--model", model, "--images", scenes, "--out", tmp_path / "a.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        done = command(tmp_path, "calibrate", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (done.code, list(tmp_path.iterdir())) == (2, [])
    assert "error: --out and --picture must be files that can be made, got '" in done.err
    assert "File too large" in done.err


def test_a_network_is_refused_under_torchrun(tmp_path, model, monkeypatch):
    """Before anything is loaded, and before the other processes are waited for."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    words = ("--model", model, "--hidden_units", 8, "--out", tmp_path / "a.safetensors")
    done = command(tmp_path, "calibrate", *words)
    assert (done.code, done.out) == (2, "")
    assert "--hidden_units must be 0 under torchrun, got 8; run the command without it" in done.err


def torchrun(*words):
    """The command in two processes."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    given = (*launch, "-m", "sd_progress", "calibrate", *words)
    return subprocess.run([sys.executable, *map(str, given)], capture_output=True, text=True)


def test_two_processes_make_the_map_of_one(tmp_path, made, model, scenes):
    """Each encodes its share; one of them prints and writes."""
    out = tmp_path / "mine.safetensors"
    result = torchrun("--model", model, "--images", scenes, "--out", out)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"calibrate: .*?/(\d+) ", result.stderr)[0] == str(PICTURES // 2)
    said = [result.stdout.count(line) for line in ("Calibrating", "Done in", "To use it")]
    assert said == [1, 1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.png", "mine.safetensors"]
    alone, together = factors.load(made.folder / "mine.safetensors"), factors.load(out)
    np.testing.assert_allclose(together.weight, alone.weight, atol=1e-3)
    assert (together.provenance, together.psnr_db) == (
        alone.provenance,
        pytest.approx(alone.psnr_db),
    )


def test_two_processes_refuse_with_one_voice(tmp_path, others, scenes):
    """What all of them find is told once."""
    out = tmp_path / "a.safetensors"
    result = torchrun("--model", others / "random", "--images", scenes, "--out", out)
    assert result.returncode != 0
    assert result.stderr.count("sd-progress: error: no map was fitted") == 1
    assert "calibrate_command.py" not in result.stderr  # as in a traceback of ours
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hub(tmp_path, monkeypatch, model):
    """What the Hub's client has downloaded: a VAE alone, and a pipeline with the same one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("vae", "pipe"):
        folder = tmp_path / f"models--owner--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("a" * 40)
    shutil.copytree(model, tmp_path / "models--owner--vae" / "snapshots" / ("a" * 40))
    pipe = tmp_path / "models--owner--pipe" / "snapshots" / ("a" * 40)
    shutil.copytree(model, pipe / "vae")
    parts = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (pipe / "model_index.json").write_text(json.dumps(parts))


@pytest.mark.parametrize("name", ["owner/vae", "owner/pipe"])
@pytest.mark.parametrize("revision", [None, "a" * 40])
def test_a_hub_id_is_one_of_a_vae_or_of_a_pipeline(hub, name, revision):
    """The newest revision, or a given one."""
    vae = load_vae(name, torch.bfloat16, revision=revision)
    assert vae.dtype == torch.bfloat16
    assert not vae.training
    assert fingerprint(vae.float()) == fingerprint(tiny.working_vae().bfloat16().float())


def test_a_hub_id_that_cannot_be_had_is_told(hub):
    """With the Hub's own reason."""
    with pytest.raises(UsageError, match=r"folder, got 'owner/other'; .*config\.json"):
        load_vae("owner/other", torch.float32)
