"""The preview flags that scripts take over."""

import argparse
import subprocess
import sys

import imageio.v3 as iio
import pytest
import tiny

from sd_progress.arguments import add_preview_arguments, preview_from_args
from sd_progress.callback import PreviewCallback

ALL = {
    "write_intermediates": "steps",
    "preview_gif": "run.gif",
    "preview_every": "2",
    "preview_vae_every": "3",
    "preview_source": "both",
    "preview_decoder": "sd1",
    "preview_budget": "0.02",
}


def parsed(*words):
    """What a script with the flags, and nothing else, makes of its command line."""
    parser = argparse.ArgumentParser()
    add_preview_arguments(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.mark.parametrize(("name", "value"), ALL.items())
def test_dashes_and_underscores_are_the_same_flag(name, value):
    """`--preview-gif` sets what `--preview_gif` sets."""
    with_underscores = parsed(f"--{name}", value)
    assert parsed(f"--{name.replace('_', '-')}", value) == with_underscores
    assert str(getattr(with_underscores, name)) == value


def test_without_a_target_there_is_no_callback():
    """Neither folder nor animation: None, whatever else was given."""
    assert preview_from_args(tiny.sd(), parsed()) is None
    assert preview_from_args(tiny.sd(), parsed("--preview_every", 2)) is None


def test_the_terminal_can_be_the_only_target():
    """The last of the flags that turn it on and off counts."""
    on, off = "--preview-terminal", "--no-preview_terminal"
    writers = preview_from_args(tiny.sd(), parsed(off, on)).writers
    assert [type(writer).__name__ for writer in writers] == ["TerminalWriter"]
    assert preview_from_args(tiny.sd(), parsed(on, off)) is None


def test_without_a_target_nothing_heavy_is_imported(tmp_path):
    """A script that asks for no preview does not pay for torch."""
    code = (
        "import argparse, sys; from sd_progress.arguments import *; p = argparse.ArgumentParser();"
        "add_preview_arguments(p); assert preview_from_args(None, p.parse_args([])) is None;"
        "print({'torch', 'diffusers', 'PIL.GifImagePlugin'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_flags_reach_the_run(tmp_path):
    """Every second step of five and the last one, noisy beside denoised, as PNGs and as a GIF."""
    folder, gif = tmp_path / "steps", tmp_path / "run.gif"
    flags = ("--preview_every", 2, "--preview_source", "both")
    pipe = tiny.sd()
    callback = preview_from_args(
        pipe, parsed("--write_intermediates", folder, "--preview_gif", gif, *flags)
    )
    pipe(**tiny.sd_call(pipe, steps=5), callback_on_step_end=callback)
    names = ["step_002.png", "step_004.png", "step_005.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert iio.imread(gif).shape[0] == 3
    height, width, _ = iio.imread(folder / "step_002.png").shape
    assert width > 1.5 * height


def test_vae_every_reaches_the_run(tmp_path):
    """`--preview_vae_every 1` has every preview decoded in full size."""
    pipe = tiny.sd()
    args = parsed("--write_intermediates", tmp_path / "steps", "--preview_vae_every", 1)
    pictures = pipe(
        **tiny.sd_call(pipe, steps=2), callback_on_step_end=preview_from_args(pipe, args)
    ).images
    assert iio.imread(tmp_path / "steps" / "step_001.png").shape == pictures[0].shape


def test_budget_reaches_the_run():
    """`--preview_budget` is the callback's `budget`."""
    args = parsed("--write_intermediates", "steps", "--preview_budget", 0.02)
    callback = preview_from_args(tiny.sd(), args)
    assert callback._options.budget == 0.02


def test_a_folder_may_look_like_a_file(tmp_path):
    """What is given as a folder is one, also with a suffix."""
    callback = preview_from_args(tiny.sd(), parsed("--write_intermediates", tmp_path / "a.gif"))
    assert type(callback) is PreviewCallback
    assert [type(writer).__name__ for writer in callback.writers] == ["PngFolderWriter"]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "mp4", "GIF"])
def test_animations_of_the_help_are_taken(suffix):
    """Every suffix that the help names."""
    assert parsed("--preview_gif", f"run.{suffix}").preview_gif.name == f"run.{suffix}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preview_every", "0"), "--preview_every must be a whole number from 1 on, got '0'"),
        (("--preview-every", "two"), "--preview_every must be a whole number from 1 on, got 'two'"),
        (("--preview_vae_every", "-1"), "--preview_vae_every must be a whole number from 1 on"),
        (("--preview_every", "9" * 30), "--preview_every must be a whole number from 1 on"),
        (("--preview_gif", "run.txt"), "--preview_gif must be a path ending in .gif, .webp"),
        (("--preview_gif", "folder"), "for PNGs in a folder use --write_intermediates"),
        (("--preview_source", "x0"), "invalid choice: 'x0'"),
        (("--preview_budget", "2%"), "--preview_budget must be a number above 0 and up to 1"),
    ],
)
def test_wrong_values_are_told(words, message, capsys):
    """A value out of range ends the script with a line that says what would be right."""
    with pytest.raises(SystemExit, match="2"):
        parsed(*words)
    assert message in capsys.readouterr().err


def test_the_decoder_reaches_the_run(tmp_path):
    """`--preview_decoder channels` shows the four latent channels, two by two."""
    pipe = tiny.sd()
    args = parsed("--write_intermediates", tmp_path / "steps", "--preview_decoder", "channels")
    pipe(**tiny.sd_call(pipe, steps=1), callback_on_step_end=preview_from_args(pipe, args))
    plain = parsed("--write_intermediates", tmp_path / "plain", "--preview_decoder", "sd1")
    pipe(**tiny.sd_call(pipe, steps=1), callback_on_step_end=preview_from_args(pipe, plain))
    shapes = [iio.imread(tmp_path / name / "step_001.png").shape for name in ("steps", "plain")]
    assert shapes[0][:2] == tuple(2 * side for side in shapes[1][:2])
