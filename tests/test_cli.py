"""The `sd-progress` command, with the demo model."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, LatentConsistencyModelPipeline, UNet2DModel

from sd_progress.cli import main
from sd_progress.demo import DEMO_GUIDANCE, DEMO_PROMPT, demo_model_path

STEPS = 3


@dataclass(frozen=True)
class Done:
    """A run of the command: its exit code, what it printed, and the folder it was given."""

    code: int
    out: str
    err: str
    folder: Path


def command(folder, *words):
    """Run the command in this process; warnings go where users see them."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.simplefilter("always")  # until the end of the test
        code = main([str(word) for word in words])
    return Done(code, out.getvalue(), err.getvalue(), folder)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`sd-progress demo`, in few steps."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return command(folder, "demo", "--steps", STEPS, "--out", folder)


@pytest.fixture(scope="module")
def pipe():
    """The demo model."""
    return DiffusionPipeline.from_pretrained(demo_model_path())


def test_demo_leaves_pngs_a_gif_and_a_filmstrip(demo):
    """A frame for each step, and the finished picture as the last."""
    assert demo.code == 0, demo.err
    names = sorted(path.name for path in demo.folder.rglob("*") if path.is_file())
    steps = [f"step_{number:03d}.png" for number in range(1, STEPS + 1)]
    assert names == sorted(["denoise.gif", "filmstrip.png", "picture.png", "final.png", *steps])
    assert len(iio.imread(demo.folder / "denoise.gif")) == STEPS + 1
    height, width, _ = iio.imread(demo.folder / "filmstrip.png").shape
    assert (STEPS + 1) * 192 <= width < (STEPS + 2) * 192
    assert height > 2 * 192  # the noisy row above the denoised one


def test_demo_says_where_everything_is_and_how_long_it_took(demo):
    """Four places, all of which are there."""
    places = re.findall(r"^  (picture|animation|filmstrip|steps) +(\S+)", demo.out, re.MULTILINE)
    assert len(places) == 4
    assert all(Path(place).exists() for _, place in places)
    assert re.search(r"Done in \d+\.\d s\.", demo.out)


def test_demo_warns_of_nothing(demo):
    """Nothing on stderr but the progress bar."""
    assert "warning" not in demo.err
    assert f"{STEPS}/{STEPS}" in demo.err


def test_the_picture_is_what_the_pipeline_makes_alone(demo, pipe):
    """Bit for bit, from the same seed."""
    generator = torch.Generator("cpu").manual_seed(0)
    options = {"guidance_scale": DEMO_GUIDANCE, "num_inference_steps": STEPS}
    alone = pipe(DEMO_PROMPT, **options, generator=generator).images[0]
    assert np.array_equal(iio.imread(demo.folder / "picture.png"), np.asarray(alone))
    both = np.concatenate([alone, alone], axis=1)  # as wide as the frames before it
    assert np.array_equal(iio.imread(demo.folder / "steps" / "final.png"), both)


def test_run_takes_any_model_and_every_flag(tmp_path):
    """Targets of one's own, a source, a scheduler, a size that is not square, with dashes."""
    places = ("--preview-gif", tmp_path / "a.webp", "--write-intermediates", tmp_path / "pngs")
    previews = ("--preview-every", 2, "--preview-vae-every", 1, "--preview-source", "noisy")
    picture = ("--steps", 4, "--size", "96x64", "--scheduler", "euler_a", "--guidance", 5)
    rest = ("--negative-prompt", "a boat", "--dtype", "bf16", "--device", "cpu", "--seed", 7)
    model = ("--model", demo_model_path(), "--prompt", "the sea", "--out", tmp_path / "out")
    done = command(tmp_path, "run", *model, *places, *previews, *picture, *rest)
    assert done.code == 0, done.err
    names = sorted(path.name for path in (tmp_path / "pngs").iterdir())
    assert names == ["final.png", "step_002.png", "step_004.png"]
    assert iio.imread(tmp_path / "pngs" / "step_002.png").shape == (64, 96, 3)
    assert sum(1 for _ in iio.imiter(tmp_path / "a.webp")) == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["filmstrip.png", "picture.png"]


def test_the_seed_and_the_prompt_decide(tmp_path, demo):
    """Another seed is another picture, and so is another caption."""
    first = iio.imread(demo.folder / "picture.png")
    command(tmp_path, "demo", "--steps", STEPS, "--seed", 1, "--out", tmp_path / "seed")
    command(tmp_path, "demo", "a desert by day", "--steps", STEPS, "--out", tmp_path / "prompt")
    seed = iio.imread(tmp_path / "seed" / "picture.png")
    prompt = iio.imread(tmp_path / "prompt" / "picture.png")
    assert not np.array_equal(seed, first)
    assert not np.array_equal(prompt, first)


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    """A second run has a folder of its own; in one given twice, files of their own."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        command(tmp_path, "demo", "--steps", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-output", "demo-output-2"]
    command(tmp_path, "demo", "--steps", 1, "--out", "demo-output")
    pictures = (tmp_path / "demo-output").glob("picture*.png")
    assert sorted(path.name for path in pictures) == ["picture-2.png", "picture.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --steps 0", "--steps must be a whole number from 1 on, got '0'; 20 to 50 are usual"),
        ("demo --steps 2000", "--steps must be at most 1000, got 2000; 20 to 50 are usual"),
        ("demo --size 12y", "--size must be N or WxH in pixels, got '12y'; for example 512"),
        (
            "demo --size 130",
            "--size must be multiples of 8 pixels for this model, got 130x130; try",
        ),
        ("demo --seed -1", "--seed must be a whole number from 0 on, got '-1'; try another"),
        ("demo --guidance much", "argument --guidance: invalid float value: 'much'"),
        ("demo --scheduler eulr", "--scheduler must be a diffusers class or one of ddim"),
        ("demo --device warp", "--device must be auto or one of this machine's: "),
        ("demo --dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
        ("demo --preview_every 0", "--preview_every must be a whole number from 1 on, got '0'"),
        ("demo --preview_gif a.txt", "--preview_gif must be a path ending in .gif"),
        ("demo --preview_decoder x", "--preview_decoder must be 'auto', 'pca', 'channels', "),
        ("demo --out setup.cfg/x", "--out must be a folder that can be made, got 'setup.cfg/x'"),
        ("run --prompt x", "the following arguments are required: --model"),
        ("run --prompt x --model ./no", "diffusers folder, got './no'; there is no such folder"),
        ("run --prompt x --model .", "diffusers folder, got '.'; it has no model_index.json"),
        ("draw", "invalid choice: 'draw'"),
        ("models flux --all", "argument --all: not allowed with argument NAME"),
    ],
)
def test_bad_input_is_told_in_one_line(words, message, tmp_path, monkeypatch):
    """Exit code 2, no traceback, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").touch()
    done = command(tmp_path, *words.split())
    assert done.code == 2
    assert done.err.startswith("sd-progress: error: ")
    assert message in done.err
    assert (done.err.count("\n"), done.out) == (1, "")
    assert [path.name for path in tmp_path.iterdir()] == ["setup.cfg"]


def test_a_message_begins_with_its_flag(tmp_path):
    """Argparse's own introduction would name it twice."""
    done = command(tmp_path, "demo", "--steps", "0")
    assert done.err.startswith("sd-progress: error: --steps must be")


def test_a_model_without_text_is_told(tmp_path, pipe):
    """A pipeline that takes no prompt is none for this command."""
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), **_ONE_BLOCK)
    DDPMPipeline(unet, pipe.scheduler).save_pretrained(tmp_path / "ddpm")
    done = command(tmp_path, "run", "--model", tmp_path / "ddpm", "--prompt", "x")
    assert done.code == 2
    expected = "--model must be a pipeline that makes pictures or videos of a prompt, got a DDPM"
    assert expected in done.err


def test_a_flag_that_the_model_does_not_take_is_told(tmp_path, pipe):
    """Latent consistency models have no negative prompt."""
    parts = {**pipe.components, "requires_safety_checker": False}
    LatentConsistencyModelPipeline(**parts).save_pretrained(tmp_path / "lcm")
    model = ("--model", tmp_path / "lcm", "--prompt", "x", "--negative_prompt", "y")
    done = command(tmp_path, "run", *model)
    assert done.code == 2
    assert "--negative_prompt must be left out for a LatentConsistencyModelPipe" in done.err


def test_ctrl_c_leaves_what_was_made(tmp_path):
    """Exit code 130, a line that says how far it came, and a GIF that can be read."""
    words = [sys.executable, "-m", "sd_progress", "demo", "--steps", "900", "--out", "out"]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "out" / "steps" / "step_003.png").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, "Traceback" in err) == (130, False)
    stopped = re.search(r"Stopped after step (\d+) of 900", out)
    assert stopped is not None
    assert len(iio.imread(tmp_path / "out" / "denoise.gif")) == int(stopped[1])
    assert (tmp_path / "out" / "filmstrip.png").exists()


@pytest.mark.parametrize(
    "words",
    [*(f"{name} --help" for name in ("", "demo", "run", "models", "calibrate", "worker")), ""],
)
def test_help_is_quick(words, tmp_path):
    """It loads neither torch nor diffusers, and shows what can be typed."""
    code = (
        "import sys; from sd_progress.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, *words.split()]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: sd-progress")
    assert result.stdout.endswith("set()\n")


def test_models_lists_what_is_shown(tmp_path):
    """How many first; then the names by what is shown, deprecated ones only on request."""
    some, everything = command(tmp_path, "models"), command(tmp_path, "models", "--all")
    assert (some.code, some.err) == (0, "")
    assert re.match(r"diffusers \S+: \d+ of \d+ current pipelines are shown", some.out)
    assert some.out.index("\nImages") < some.out.index(" FluxPipeline") < some.out.index("\nVideos")
    assert "PNDMPipeline" not in some.out
    assert "PNDMPipeline" in everything.out


def test_models_tells_of_one(tmp_path):
    """What it shows, and how a preview is attached; case does not matter."""
    done = command(tmp_path, "models", "fluxpipeline")
    assert done.out.startswith("FluxPipeline\n")
    assert "pipe(..., callback_on_step_end=preview)" in done.out


def test_models_tells_of_unknown_ones(tmp_path):
    """That is no mistake: they are inferred."""
    done = command(tmp_path, "models", "MyPipeline")
    assert (done.code, done.err) == (0, "")
    assert "is inferred" in done.out


def test_models_does_without_diffusers():
    """It takes torch at most, and so no more than a second or two."""
    code = (
        "import sys; from sd_progress.cli import main\n"
        "main(['models'])\n"
        "print({'diffusers', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("set()\n")


def test_models_can_be_cut_short():
    """As by `| head`: no traceback where nobody reads on."""
    words = [sys.executable, "-m", "sd_progress", "models"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()


def test_version(capsys):
    """The installed package's."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"sd-progress {metadata.version('sd-progress')}\n"


_ONE_BLOCK = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
