"""Which decoder a pipeline's previews get, and what is kept of it."""

import json
import logging
import multiprocessing
import os
import re

import diffusers
import numpy as np
import pytest
import tiny
import torch

from sd_progress import PreviewWarning, cache, calibrate, demo_model_path, factors
from sd_progress.choice import decoder_maker
from sd_progress.decoders import ChannelsDecoder, PCADecoder
from sd_progress.fingerprint import fingerprint
from sd_progress.refit import RefitDecoder


def trained_vae(scaling_factor):
    """The demo model's VAE under another scaling factor, which makes it another VAE."""
    vae = diffusers.AutoencoderKL.from_pretrained(demo_model_path(), subfolder="vae").eval()
    vae.register_to_config(scaling_factor=scaling_factor)
    return vae


def unknown_vae():
    """A trained VAE that no table is for."""
    return trained_vae(0.3)


def chosen(vae, decoder="auto", **options):
    """The decoder of a run."""
    return decoder_maker(decoder, vae, is_colour_known=False, **options)()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and calibration as users have it."""
    monkeypatch.setenv("SD_PROGRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SD_PROGRESS_CALIBRATE")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def calibrated():
    """A calibration of the unknown VAE, made once."""
    return calibrate(unknown_vae())


def test_an_unknown_vae_is_calibrated_once(folder, caplog):
    """The second time the map comes from the cache, and one line says so each time."""
    caplog.set_level(logging.INFO, "sd_progress")
    first = chosen(unknown_vae())
    assert first.name == "linear:calibrated"
    assert [re.sub(r"[\d.]+", "N", line) for line in caplog.messages] == [
        "previews use a calibration of AutoencoderKL made now (N dB), which took N s"
    ]
    caplog.clear()
    second = chosen(unknown_vae())
    assert len(caplog.messages) == 1
    assert f"kept in {folder}" in caplog.text
    np.testing.assert_array_equal(first.factors.weight, second.factors.weight)


def test_a_published_row_is_taken_on_a_cpu(folder, caplog):
    """Calibrating would take up to a minute there, for a VAE that is known already."""
    caplog.set_level(logging.INFO, "sd_progress")
    assert chosen(trained_vae(0.18215)).name == "linear:sd1"
    assert not folder.exists()
    assert "calibrate='always' fits a better one" in caplog.text


def test_always_calibrates_a_known_vae(folder):
    """And what is kept then counts for everybody."""
    assert chosen(trained_vae(0.18215), calibrate="always").name == "linear:sd1-calibrated"
    assert chosen(trained_vae(0.18215)).name == "linear:sd1-calibrated"


def test_never_runs_no_vae(folder):
    """An unknown VAE is explained instead; the environment can say so, too."""
    with pytest.warns(PreviewWarning, match="vae must be one whose latents are known"):
        assert isinstance(chosen(unknown_vae(), calibrate="never"), PCADecoder)
    assert not folder.exists()


def test_the_environment_takes_the_place_of_auto(folder, monkeypatch):
    """But not of what is said in the code."""
    monkeypatch.setenv("SD_PROGRESS_CALIBRATE", "never")
    with pytest.warns(PreviewWarning):
        assert isinstance(chosen(unknown_vae()), PCADecoder)
    monkeypatch.setenv("SD_PROGRESS_CALIBRATE", "sometimes")
    with pytest.raises(ValueError, match="SD_PROGRESS_CALIBRATE must be 'auto', 'always' or"):
        chosen(unknown_vae())
    with pytest.raises(ValueError, match="calibrate must be 'auto', 'always' or 'never', got 'n"):
        chosen(unknown_vae(), calibrate="no")


def test_a_vae_with_random_weights_falls_back_and_says_why(folder):
    """To its published row if its config claims one, else to principal components."""
    vae = tiny.sd().vae  # says that it is Stable Diffusion's
    with pytest.warns(PreviewWarning, match="no preview map was fitted: vae must give back.*'sd1'"):
        assert chosen(vae, calibrate="always").name == "linear:sd1"
    vae.register_to_config(scaling_factor=0.3)
    with pytest.warns(PreviewWarning, match="principal components are shown instead"):
        assert isinstance(chosen(vae), PCADecoder)
    assert not folder.exists()


def test_a_fit_for_other_weights_is_not_taken(folder, calibrated):
    """Two VAEs with one config are told apart by their weights."""
    factors.register(calibrated, unknown_vae())
    try:
        assert chosen(unknown_vae()).factors.vae_hash == calibrated.vae_hash
        other = unknown_vae()
        with torch.no_grad():
            other.quant_conv.weight.copy_(other.quant_conv.weight.flip(0))
        with pytest.warns(PreviewWarning, match="no preview map was fitted"):
            assert isinstance(chosen(other), PCADecoder)
    finally:
        factors.default_registry.cache_clear()


def swapped_channels():
    """A VAE that is as good as the unknown one, with its latent channels in another order."""
    vae = unknown_vae()
    order, channels = [2, 3, 1, 0], vae.config.latent_channels
    both = [*order, *(channels + k for k in order)]  # means and log-variances
    with torch.no_grad():
        vae.quant_conv.weight.copy_(vae.quant_conv.weight[both])
        vae.quant_conv.bias.copy_(vae.quant_conv.bias[both])
        vae.post_quant_conv.weight.copy_(vae.post_quant_conv.weight[:, order])
    return vae


def test_a_map_of_another_vae_is_refused(folder, calibrated):
    """By what it draws, because the channel counts agree."""
    with pytest.raises(
        ValueError, match=r"decoder must be a map of this VAE, got 'calibrated', wh"
    ):
        chosen(swapped_channels(), calibrated)
    assert chosen(swapped_channels(), calibrated, calibrate="never").factors is calibrated
    assert chosen(unknown_vae(), calibrated).factors is calibrated


def test_a_published_name_of_another_vae_is_refused(folder):
    """SDXL's table on the demo's VAE; where nothing can be tried, it is let through."""
    with pytest.raises(ValueError, match=r"decoder must be a map of this VAE, got 'sdxl', which"):
        chosen(unknown_vae(), "sdxl")
    assert chosen(tiny.sd().vae, "sdxl").name == "linear:sdxl"


def test_what_is_drawn_can_be_named(folder, calibrated, tmp_path):
    """Principal components, channels, and a file."""
    assert isinstance(chosen(unknown_vae(), "pca"), PCADecoder)
    assert isinstance(chosen(unknown_vae(), "channels"), ChannelsDecoder)
    factors.save(calibrated, tmp_path / "mine.safetensors")
    assert chosen(unknown_vae(), str(tmp_path / "mine.safetensors")).name == "linear:calibrated"
    with pytest.raises(
        ValueError, match="decoder must be 'auto', 'pca', 'channels', 'tiny:MODEL', a"
    ):
        chosen(unknown_vae(), "sd0")


def test_a_map_that_learns_is_new_for_each_run(folder):
    """Where full decodes are to come."""
    make = decoder_maker("sd1", None, is_colour_known=False, refits=True)
    first, second = make(), make()
    assert isinstance(first, RefitDecoder)
    assert first is not second


# --- the cache


def kept_file(folder, calibrated):
    """The one that holds it."""
    (path,) = folder.glob("*.safetensors")
    assert path.stem.startswith(calibrated.vae_hash[:32])
    return path


def test_what_is_kept_comes_back_whole(folder, calibrated):
    """With its score and its VAE."""
    cache.keep(calibrated)
    kept = cache.load(calibrated.vae_hash)
    np.testing.assert_array_equal(kept.weight, calibrated.weight)
    assert (kept.psnr_db, kept.vae_key) == (calibrated.psnr_db, calibrated.vae_key)
    assert cache.load("0" * 64) is None


def test_a_truncated_file_is_ignored_and_made_anew(folder, calibrated):
    """With a warning that names it."""
    cache.keep(calibrated)
    path = kept_file(folder, calibrated)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(
        PreviewWarning, match=r"safetensors must be a calibration, got .*; it is ign"
    ):
        decoder = chosen(unknown_vae())
    np.testing.assert_array_equal(decoder.factors.weight, calibrated.weight)
    assert cache.load(calibrated.vae_hash) is not None


def test_a_foreign_file_is_ignored(folder, calibrated):
    """One that is whole, but of other weights."""
    cache.keep(calibrated)
    other = calibrated.vae_hash[:32] + "0" * 32
    with pytest.warns(PreviewWarning, match="must be for this VAE, got one for another"):
        assert cache.load(other) is None


def test_a_cache_that_cannot_be_written_to_costs_nothing_but_a_warning(
    tmp_path, monkeypatch, calibrated
):
    """Not even for the superuser, to whom read-only folders are writable."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SD_PROGRESS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("SD_PROGRESS_CALIBRATE")
    with pytest.warns(PreviewWarning, match="must be writable, got .*the calibration is not kept"):
        decoder = chosen(unknown_vae())
    np.testing.assert_array_equal(decoder.factors.weight, calibrated.weight)


def test_a_read_only_cache_costs_nothing_but_a_warning(folder, calibrated, monkeypatch):
    """As on a shared machine; to the superuser only the system's own folders are read-only."""
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0:
        monkeypatch.setenv("SD_PROGRESS_CACHE", "/sys/sd-progress")
    with pytest.warns(PreviewWarning, match="must be writable, got .*the calibration is not kept"):
        assert chosen(unknown_vae()).name == "linear:calibrated"


def test_a_user_without_a_home_has_no_cache(calibrated, monkeypatch):
    """As in containers that run under any number; calibration goes on."""
    for name in ("SD_PROGRESS_CACHE", "XDG_CACHE_HOME", "SD_PROGRESS_CALIBRATE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # whom the system does not know
    with pytest.warns(PreviewWarning, match="the cache must be writable, got .*; the calibration"):
        decoder = chosen(unknown_vae())
    np.testing.assert_array_equal(decoder.factors.weight, calibrated.weight)


def _calibrate_at_once(barrier, results):
    torch.set_num_threads(1)
    vae = unknown_vae()
    barrier.wait()
    results.put(float(np.abs(chosen(vae).factors.weight).sum()))


def test_two_processes_at_once(folder, calibrated):
    """Both have the right map, and the file is whole."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_calibrate_at_once, args=(barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    sums = [results.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    expected = float(np.abs(calibrated.weight).sum())
    assert sums == pytest.approx([expected] * 2, rel=1e-4)
    assert cache.load(fingerprint(unknown_vae())) is not None
    assert len(list(folder.iterdir())) == 1


def test_the_folder_is_where_others_keep_theirs(monkeypatch, tmp_path):
    """`XDG_CACHE_HOME`, or `.cache` at home, unless it is named."""
    monkeypatch.delenv("SD_PROGRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "sd-progress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "sd-progress"


def test_a_kept_calibration_is_a_factors_file(folder, calibrated):
    """That anybody can read."""
    cache.keep(calibrated)
    path = kept_file(folder, calibrated)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert header["__metadata__"]["provenance"].startswith("sd-progress calibrate: 32 synthetic")
