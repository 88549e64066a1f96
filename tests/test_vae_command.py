"""`sd-progress vae`: what it prints, what it leaves, and what it ends with."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import imageio.v3 as iio
import numpy as np
import pytest
import tiny
import torch
from autoencoders import NAMES, autoencoder
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from test_cli import command
from test_latent_space import random_vae, without_encoder

from sd_progress import demo_model_path, factors
from sd_progress.cli import main
from sd_progress.diagnosis import Fault
from sd_progress.lab import Lab, interpolated
from sd_progress.pixels import to_uint8
from sd_progress.vae_command import (
    Task,
    show_channels,
    show_components,
    show_factors,
    show_interpolation,
    show_round_trip,
    show_tokens,
    show_walk,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from demo_scenes import draw, random_scene

DOCS = Path(__file__).parents[1] / "docs"
TOKENS = ("VQModel", "AutoencoderVidTok:fsq")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Three landscapes."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(3):
        draw(random_scene(number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def demo():
    """The demo model's VAE, on the bench."""
    return Task(str(demo_model_path()), "cpu", "fp32", Path()).lab()


def pixels(path):
    """By another reader than what wrote it; of an animation, all frames."""
    return iio.imread(path)


def names(folder):
    """Of all files."""
    return sorted(path.name for path in folder.iterdir())


def lines(done):
    """What was printed, by the first word."""
    rows = (line.split(maxsplit=1) for line in done.out.splitlines() if line.startswith("  "))
    return {row[0]: row[1] if len(row) > 1 else "" for row in rows}


# --- with the demo model


def test_round_trip(tmp_path, scenes, demo):
    """Numbers on the screen, and three pictures that read back as what was computed."""
    done = command(tmp_path, "vae", "roundtrip", scenes / "0.png", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    told = lines(done)
    assert told["latents"] == "(1, 4, 16, 16), 8x8 pixels each"
    assert told["compressed"] == "48 numbers of the picture to 1 latent"
    assert told["verdict"] == "nothing is wrong"
    picture = demo.picture(Image.open(scenes / "0.png"))
    expected = to_uint8(demo.decode(demo.encode(picture)))[0]
    assert np.array_equal(pixels(tmp_path / "out/decoded.png"), expected)
    error = np.square(expected / 255.0 - pixels(scenes / "0.png") / 255.0).mean()
    assert float(told["PSNR"].split()[0]) == pytest.approx(-10 * np.log10(error), abs=0.1)
    assert names(tmp_path / "out") == ["decoded.png", "difference.png", "side-by-side.png"]
    assert pixels(tmp_path / "out/side-by-side.png").shape[1] > 3 * 256


def test_the_difference_is_where_it_is(tmp_path, scenes, demo):
    """Black where nothing was lost, and brightest at the largest error."""
    command(tmp_path, "vae", "roundtrip", scenes / "0.png", "--out", tmp_path / "out")
    difference = pixels(tmp_path / "out/difference.png").astype(int).sum(axis=-1)
    off = np.abs(
        pixels(tmp_path / "out/decoded.png").astype(int) - pixels(scenes / "0.png").astype(int)
    ).max(axis=-1)
    assert difference.shape == off.shape
    assert off.ravel()[difference.argmax()] >= off.max() - 1
    assert difference[off == 0].max() < difference.max() / 10


def test_sizes_are_rounded_down_and_said_to_be(tmp_path, scenes):
    """To whole latents; one side follows from the other."""
    words = ("vae", "roundtrip", scenes / "0.png", "--width", 61, "--out", tmp_path)
    done = command(tmp_path, *words)
    assert lines(done)["note"] == "61x61 rounded down to 56x56, multiples of 8"
    assert pixels(tmp_path / "decoded.png").shape == (56, 56, 3)


def test_sampling(tmp_path, scenes):
    """By its seed, and not the mean."""
    for number, seed in enumerate((1, 1, 2)):
        words = ("--sample", "--seed", seed, "--out", tmp_path / str(number))
        assert command(tmp_path, "vae", "roundtrip", scenes / "0.png", *words).code == 0
    first, again, other = (pixels(tmp_path / f"{n}/decoded.png") for n in range(3))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_channels(tmp_path, scenes):
    """A cell for each."""
    done = command(tmp_path, "vae", "channels", scenes / "0.png", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    sheet = pixels(tmp_path / "out/channels.png")
    assert sheet.shape[0] > 2 * 256
    assert sheet.shape[1] > 2 * 256
    assert sheet.std() > 20


def test_factors(tmp_path, demo):
    """The swatches are the colours that the shipped map has for the latents."""
    done = command(tmp_path, "vae", "factors", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert lines(done)["map"].startswith("demo: ")
    row = factors.by_name("demo").weight[:, 0].sum(axis=(-2, -1)) / 0.7545
    per_pixel = row.reshape(3, -1).mean(axis=1)
    assert [float(x) for x in lines(done)["0"].split()] == pytest.approx(
        [*(per_pixel * 127.5)], abs=0.06
    )
    assert pixels(tmp_path / "out/factors.png").std() > 20


def test_factors_of_a_file(tmp_path):
    """Of `calibrate`; that of another VAE is refused."""
    for channels in (4, 16):
        table = factors.Factors.from_table(np.ones((channels, 3)), name="mine")
        factors.save(table, tmp_path / f"{channels}.safetensors")
    words = ("vae", "factors", "--out", tmp_path / "out", "--factors")
    assert lines(command(tmp_path, *words, tmp_path / "4.safetensors"))["map"].startswith("mine")
    done = command(tmp_path, *words, tmp_path / "16.safetensors")
    assert (done.code, "must be for 4 channels, got 16; calibrate" in done.err) == (2, True)


def test_components_of_a_neighbourhood(tmp_path, scenes):
    """Those of the pictures most like the first, which are named."""
    images = [scenes / f"{n}.png" for n in (0, 1, 0)]
    words = ("--components", 1, "--frames", 2, "--neighbours", 2, "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "pca", *images, *words)
    assert lines(done)["neighbours"] == "0.png, 0.png"


def test_a_token_that_is_not_there_is_told(tmp_path, scenes):
    """Before anything is asked of the Hub."""
    words = ("--token_env", "NO_SUCH_TOKEN", "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "roundtrip", scenes / "0.png", *words)
    assert done.code == 2
    assert "--token_env must name an environment variable" in done.err


def test_components(tmp_path, scenes):
    """Shares that grow to all, and an animation for each of as many as were asked for."""
    images = [scenes / f"{n}.png" for n in range(3)]
    words = ("--components", 2, "--frames", 5, "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "pca", *images, *words)
    assert done.code == 0, done.err
    shares = [float(lines(done)[str(n)].split("%")[0]) for n in range(1, 5)]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    gifs = ["component-1.gif", "component-2.gif"]
    assert names(tmp_path / "out") == [*gifs, "components.png", "explained.png"]
    for gif in gifs:
        assert pixels(tmp_path / "out" / gif).shape == (8, 128, 128, 3)


def test_interpolation_ends_in_the_pictures(tmp_path, scenes, demo):
    """As the VAE decodes them, bit for bit where the format allows it, and goes the way between."""
    images = (scenes / "0.png", scenes / "1.png")
    words = ("--frames", 4, "--format", ".png", "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "interpolate", *images, *words)
    assert done.code == 0, done.err
    ends = [demo.encode(demo.picture(Image.open(image))) for image in images]
    shown = [to_uint8(demo.decode(end))[0] for end in ends]
    for way in ("linear", "spherical"):
        frames = pixels(tmp_path / f"out/{way}.png")
        assert len(frames) == 4 + 2  # forth and back, each end once
        assert np.array_equal(frames[0], shown[0])
        assert np.array_equal(frames[3], shown[1])
        (_, second, *_) = interpolated(demo, *ends, 4, way)
        assert np.array_equal(frames[1], to_uint8(demo.decode(second))[0])


def test_interpolation_of_pictures_of_two_sizes(tmp_path, scenes):
    """The second is cut to the first's."""
    Image.new("RGB", (90, 40), "navy").save(tmp_path / "wide.png")
    words = (tmp_path / "wide.png", scenes / "0.png", "--frames", 2, "--out", tmp_path / "out")
    assert command(tmp_path, "vae", "interpolate", *words).code == 0
    assert pixels(tmp_path / "out/linear.gif").shape == (2, 40, 88, 3)


def test_walk(tmp_path, scenes):
    """An animation and its steps; a channel that is not there is refused."""
    words = ("vae", "walk", scenes / "0.png", "--frames", 3, "--out", tmp_path / "out", "--channel")
    assert command(tmp_path, *words, 2).code == 0
    assert names(tmp_path / "out") == ["channel-2-steps.png", "channel-2.gif"]
    assert pixels(tmp_path / "out/channel-2.gif").shape == (4, 128, 128, 3)
    done = command(tmp_path, *words, 4)
    assert (done.code, "--channel must be from 0 to 3 for this VAE, got 4" in done.err) == (2, True)


def test_webp(tmp_path, scenes):
    """For those who want more colours in fewer bytes."""
    words = ("--channel", 0, "--frames", 3, "--format", ".webp", "--out", tmp_path / "out")
    assert command(tmp_path, "vae", "walk", scenes / "0.png", *words).code == 0
    assert len(list(iio.imiter(tmp_path / "out/channel-0.webp"))) == 4


def test_nothing_is_overwritten(tmp_path, scenes):
    """A second run in the same folder adds numbers; without one, it takes a new folder."""
    words = ("vae", "channels", scenes / "0.png", "--out", tmp_path / "out")
    command(tmp_path, *words)
    command(tmp_path, *words)
    assert names(tmp_path / "out") == ["channels-2.png", "channels.png"]


def test_the_default_folder(tmp_path, scenes, monkeypatch):
    """Where the command was called, with a number from the second on."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        command(tmp_path, "vae", "channels", scenes / "0.png")
    assert names(tmp_path) == ["vae-output", "vae-output-2"]


# --- tokens


@pytest.fixture(scope="module")
def tokens_model(tmp_path_factory):
    """A VQModel in a folder."""
    folder = tmp_path_factory.mktemp("vq")
    random_vae("VQModel").save_pretrained(folder)
    return folder


def test_tokens(tmp_path, scenes, tokens_model):
    """How many entries are used and how often, as counted by hand; and three pictures."""
    words = ("--model", tokens_model, "--keep", 1, 2, 99, "--width", 32, "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "tokens", scenes / "0.png", *words)
    assert done.code == 0, done.err
    lab = Lab.of(random_vae("VQModel"))
    latents = lab.encode(lab.picture(Image.open(scenes / "0.png"), (32, 32)))
    ids = lab.vae.quantize(latents)[2][2].flatten().tolist()
    used = len(set(ids))
    told = lines(done)
    assert told["latents"] == "256 tokens, each one of 16 entries of 4"
    assert told["used"].startswith(f"{used} entries, {used / 16:.1%}; {16 - used} are not in")
    most = max(set(ids), key=ids.count)
    assert f"{most} ({ids.count(most)}x)" in done.out
    assert names(tmp_path / "out") == ["few-entries.png", "tokens.png", "usage.png"]
    shown = pixels(tmp_path / "out/tokens.png")
    assert shown.shape == (256, 256, 3)
    cells = zip(ids, map(tuple, shown[::16, ::16].reshape(-1, 3).tolist()), strict=True)
    assert len(set(cells)) == used  # each entry has one colour, in its place


def test_not_every_model_has_tokens(tmp_path, scenes):
    """The message says what has some."""
    done = command(tmp_path, "vae", "tokens", scenes / "0.png", "--out", tmp_path / "out")
    assert done.code == 2
    assert "--model must have a VAE with a codebook, got" in done.err


# --- what is broken


@pytest.fixture
def broken(tmp_path):
    """A copy of the demo model's VAE, to be changed."""
    return Path(shutil.copytree(demo_model_path() / "vae", tmp_path / "broken"))


def test_a_broken_config(tmp_path, scenes, broken):
    """Exit code 3, the name of the fault, and pictures nevertheless."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.509}))
    words = ("--model", broken, "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "roundtrip", scenes / "0.png", *words)
    assert done.code == 3
    assert lines(done)["verdict"] == "scaling-factor"
    assert re.match(r"sd-progress: scaling-factor: latents must have a deviation", done.err)
    assert len(names(tmp_path / "out")) == 3


def test_broken_weights(tmp_path, scenes, broken):
    """Exit code 3, and the name of the weight."""
    vae = AutoencoderKL.from_pretrained(broken)
    torch.nn.init.constant_(vae.encoder.conv_in.bias, float("nan"))
    vae.save_pretrained(broken)
    words = ("--model", broken, "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "roundtrip", scenes / "0.png", *words)
    assert done.code == 3
    assert "nan-weight: weights must be finite, got NaN or infinity in encoder.conv_in.bias" in (
        done.err
    )


def test_the_other_commands_send_for_the_round_trip(tmp_path, scenes, broken):
    """They show nothing of latents that are NaN."""
    vae = AutoencoderKL.from_pretrained(broken)
    torch.nn.init.constant_(vae.encoder.conv_in.bias, float("nan"))
    vae.save_pretrained(broken)
    words = ("--model", broken, "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "channels", scenes / "0.png", *words)
    assert done.code == 2
    assert "`sd-progress vae roundtrip` says what is wrong with it" in done.err


@pytest.fixture
def latents(scenes, demo):
    """Of a landscape, in the demo model's own space."""
    return demo.encode(demo.picture(Image.open(scenes / "0.png")))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("space", ["vae", "sampler"])
def test_latents_are_decoded(tmp_path, demo, latents, suffix, space):
    """From a file, of a batch or not, as the VAE encoded them or as a sampler has them."""
    given = latents if space == "vae" else demo.to_sampler(latents)[0]
    path = tmp_path / f"latents{suffix}"
    save_file({"x": given.contiguous()}, path) if suffix != ".pt" else torch.save(given, path)
    words = ("--latents", path, "--space", space, "--out", tmp_path / "out")
    done = command(tmp_path, "vae", "roundtrip", *words)
    assert done.code == 0, done.err
    assert lines(done)["verdict"] == "they look like this VAE's own"
    shown = pixels(tmp_path / "out/decoded.png").astype(int)
    assert np.abs(shown - to_uint8(demo.decode(latents))[0]).max() <= 1


def test_latents_of_another_vae(tmp_path, latents):
    """Exit code 3; decoded all the same if that can be done."""
    torch.save(latents[:, [1, 0, 3, 2]], tmp_path / "four.pt")
    torch.save(latents.repeat(1, 4, 1, 1), tmp_path / "sixteen.pt")
    for name, made in {"four": ["decoded.png"], "sixteen": []}.items():
        out = tmp_path / name
        out.mkdir()
        words = ("--latents", tmp_path / f"{name}.pt", "--out", out)
        done = command(tmp_path, "vae", "roundtrip", *words)
        assert done.code == 3
        assert done.err.startswith("sd-progress: other-latents: latents must be")
        assert names(out) == made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["roundtrip"], "IMAGE or --latents must be given, and not both; see --help"),
        (["roundtrip", "a.png", "--latents", "b.pt"], "IMAGE or --latents must be given, and not"),
        (["roundtrip", "none.png"], "IMAGE must be a picture that can be read, got 'none.png'; "),
        (
            ["roundtrip", "--latents", "none.pt"],
            "--latents must be a .safetensors or .pt file that",
        ),
        (["channels", "none.png", "--width", "0"], "--width must be a whole number from 1 on, got"),
        (["walk", "none.png"], "the following arguments are required: --channel"),
        (
            ["walk", "a.png", "--channel", "0", "--frames", "1"],
            "--frames must be a whole number fr",
        ),
        (["channels", "a.png", "--model", "./nowhere"], "--model must be"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, words, message):
    """In a line that says what to do."""
    monkeypatch.chdir(tmp_path)
    done = command(tmp_path, "vae", *words)
    assert done.code == 2
    assert done.err.startswith(f"sd-progress: error: {message}")
    assert done.err.count("\n") == 1


def test_pictures_can_be_too_small(tmp_path):
    """For one latent."""
    Image.new("RGB", (7, 20)).save(tmp_path / "small.png")
    done = command(tmp_path, "vae", "channels", tmp_path / "small.png", "--out", tmp_path)
    assert "IMAGE must be at least 8 pixels a side for this VAE, got 7x20; pass" in done.err


def test_files_with_other_things(tmp_path):
    """More tensors than one, or none."""
    torch.save({"a": torch.zeros(4, 2, 2), "b": torch.zeros(4)}, tmp_path / "two.pt")
    done = command(tmp_path, "vae", "roundtrip", "--latents", tmp_path / "two.pt")
    assert "--latents must hold one tensor of 3 to 5 axes, got" in done.err


def test_the_folder_must_be_writable(tmp_path, scenes):
    """Otherwise it is named."""
    (tmp_path / "file").touch()
    done = command(tmp_path, "vae", "channels", scenes / "0.png", "--out", tmp_path / "file/out")
    assert (done.code, "--out must be a folder that can be written to" in done.err) == (2, True)


def test_help_teaches(tmp_path, capsys):
    """`vae` alone lists its commands, and that of the round trip tells of every fault."""
    done = command(tmp_path, "vae")
    assert done.code == 0
    for kind in ("roundtrip", "channels", "factors", "pca", "interpolate", "walk", "tokens"):
        assert re.search(rf"^ +{kind} ", done.out, re.M)
    with pytest.raises(SystemExit):
        main(["vae", "roundtrip", "--help"])
    told = capsys.readouterr().out
    assert all(re.search(rf"^ +{fault} ", told, re.M) for fault in get_args(Fault))


# --- the page about it


def test_the_page_shows_what_its_commands_make(tmp_path, scenes, monkeypatch):
    """Each of them runs, and leaves the pictures that the page shows."""
    page = (DOCS / "lab.md").read_text(encoding="utf-8")
    tiny.working_vq().save_pretrained(tmp_path / "vq")
    for number, name in enumerate(("sea", "dusk")):
        shutil.copy(scenes / f"{number}.png", tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^sd-progress (vae .*)$", page, re.M)
    assert [command(tmp_path, *line.split()).code for line in commands] == [0] * 7
    shown = re.findall(r"\]\((lab/[^)]*)\)", page)
    assert len(shown) == 12
    for path in shown:
        assert pixels(DOCS / path).shape == pixels(tmp_path / path).shape
    assert sorted(shown) == sorted(f"lab/{name}" for name in names(DOCS / "lab"))


# --- every autoencoder


@dataclass(frozen=True)
class Given(Task):
    """With a VAE that need not be loaded."""

    bench: Lab | None = None

    def lab(self):
        """The same for each command."""
        return self.bench


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_every_autoencoder(name, tmp_path, scenes):
    """Of images, of clips, of tokens; all that it leaves can be read by others."""
    size = (32, 32) if name == "AutoencoderRAE" else (40, 24)  # it draws only squares
    task = Given(name, "cpu", "fp32", tmp_path, size, bench=Lab.of(autoencoder(name)))
    image, other = scenes / "0.png", scenes / "1.png"
    assert not torch.equal(*(task.encoded(task.bench, path)[1] for path in (image, other)))
    assert show_round_trip(task, image, None, "vae", None) in (0, 3)
    show_channels(task, image)
    show_factors(task, None)
    show_components(task, [image, other], 1, 2)
    show_interpolation(task, image, other, 2)
    show_walk(task, image, task.bench.space.channels - 1, 2)
    if name in TOKENS:
        show_tokens(task, image, [2])
    made = {path.name: pixels(path) for path in tmp_path.iterdir()}
    assert len(made) == 13 + 3 * (name in TOKENS)
    for path, read in made.items():
        assert read.ndim == (4 if path.endswith(".gif") else 3), path
    assert made["linear.gif"].shape == (2, *made["decoded.png"].shape)


def test_a_vae_without_an_encoder(tmp_path, scenes):
    """Only what needs none."""
    task = Given("half", "cpu", "fp32", tmp_path, bench=Lab.of(without_encoder(tiny.vae())))
    show_factors(task, None)
    assert names(tmp_path) == ["factors.png"]
