"""The explorer: what it computes, and its page in a real browser, in both languages."""

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import time
from typing import get_args

import numpy as np
import pytest
import requests
import tiny
import torch
import web
from autoencoders import autoencoder
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from test_cli import command
from test_gradio import ROOT, interpreter
from test_latent_space import without_encoder
from test_page import FLAGS, WAIT_MS, new_tab
from test_tiny_decoder import distilled

from sd_progress import _explorer_words as words
from sd_progress.diagnosis import Fault, Finding
from sd_progress.exploration import (
    DEMO,
    Encoded,
    Knobs,
    Model,
    Models,
    UnusableError,
    Why,
    encoded,
    open_picture,
    sample,
    turned,
    viewed,
)
from sd_progress.lab import Lab, psnr
from sd_progress.pixels import to_uint8

CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def model():
    """The demo model."""
    return Models("cpu", "fp32").load(DEMO)


@pytest.fixture(scope="module")
def seen(model):
    """The sample, as the demo model sees it."""
    return encoded(model, sample())


def test_untouched_knobs_show_the_round_trip(model, seen):
    """Of the very same latents, and nothing is wrong."""
    view = viewed(model, seen, Knobs())
    assert view.trip is seen.trip
    assert seen.findings == ()
    assert np.array_equal(np.asarray(view.picture), np.asarray(sample()))
    assert np.array_equal(np.asarray(view.decoded), to_uint8(seen.trip.decoded)[0])
    drawn = torch.from_numpy(np.array(view.preview)).movedim(-1, 0)[None] / 127.5 - 1
    assert psnr(drawn, seen.trip.picture) > 15
    assert seen.trip.psnr_db > 30


def test_knobs_work_in_sampler_space(model, seen):
    """A channel, then the factor, then the shift, worked out by hand."""
    lab, latents = model.lab, seen.trip.latents
    found = lab.to_sampler(turned(lab, latents, Knobs(2.0, 0.5, channels=(1,), gain=0.25)))
    expected = 2.0 * lab.to_sampler(latents) + 0.5
    expected[:, 1] = 0.5 * lab.to_sampler(latents)[:, 1] + 0.5
    torch.testing.assert_close(found, expected)


def test_normalisation_can_be_left_out_or_done_twice(model, seen):
    """As when a pipeline forgets the scaling factor, or both sides undo it."""
    lab, latents = model.lab, seen.trip.latents
    left_out, twice = (turned(lab, latents, Knobs(normalisation=n)) for n in ("left-out", "twice"))
    torch.testing.assert_close(left_out, lab.to_sampler(latents))
    torch.testing.assert_close(lab.to_sampler(twice), latents)


@pytest.mark.parametrize(
    "knobs",
    [
        Knobs(factor=2),
        Knobs(shift=1),
        Knobs(normalisation="twice"),
        Knobs(channels=(1,)),
    ],
)
def test_every_knob_breaks_something(model, seen, knobs):
    """The picture is farther from the one that was given, and the numbers are of that picture."""
    view = viewed(model, seen, knobs)
    assert view.trip.psnr_db < seen.trip.psnr_db - 3
    drawn = torch.from_numpy(np.array(view.decoded)).movedim(-1, 0)[None] / 127.5 - 1
    assert psnr(drawn, seen.trip.picture) == pytest.approx(view.trip.psnr_db, abs=0.1)


def test_a_silenced_channel_is_flat(model, seen):
    """Its statistics say so; a channel that there is not is left out."""
    view = viewed(model, seen, Knobs(channels=(2, 99)))
    assert view.statistics[2].deviation == pytest.approx(0, abs=1e-5)
    assert view.statistics[1].deviation > 0.5


def test_a_video_vae_shows_its_first_frame():
    """With five axes of latents."""
    model = Model.of("wan", Lab.of(autoencoder("AutoencoderKLWan")))
    view = viewed(model, encoded(model, sample()), Knobs(shift=0.5))
    assert view.trip.latents.ndim == 5
    assert view.decoded.size == view.preview.size == view.picture.size


# --- what will not do


def why(act):
    """Why somebody is told that it will not do."""
    with pytest.raises(UnusableError) as caught:
        act()
    return caught.value.why


def test_files_that_are_no_pictures(tmp_path):
    """Text, a picture that is cut off, one that is too large, and nothing at all."""
    (tmp_path / "text.png").write_text("no picture")
    sample().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    for name in ("text.png", "cut.png", "none.png"):
        assert why(lambda name=name: open_picture(tmp_path / name)) == "no-picture"
    assert why(lambda: open_picture(tmp_path / "huge.png")) == "too-large"


def test_large_pictures_are_reduced_and_turned_upright(tmp_path):
    """As their camera says."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (1200, 600)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_picture(tmp_path / "photo.jpg", 512).size == (256, 512)


def test_a_picture_smaller_than_a_latent(model):
    """It is told, and so is how small is too small."""
    with pytest.raises(UnusableError, match="at least 8 pixels a side") as caught:
        encoded(model, Image.new("RGB", (7, 100)))
    assert caught.value.why == "too-small"


def test_models_that_are_none(tmp_path):
    """No name, no folder, an empty one, and one with nonsense in it."""
    models = Models("cpu", "fp32")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("nonsense")
    for name in (" ", str(tmp_path / "none"), str(tmp_path), str(tmp_path / "bad")):
        assert why(lambda name=name: models.load(name)) == "no-model"


def test_a_model_without_an_encoder():
    """It cannot take a picture."""
    lab = Lab.of(without_encoder(tiny.working_vae()))
    assert why(lambda: Model.of("half", lab)) == "no-encoder"


def test_the_last_models_are_kept(tmp_path):
    """Two of them."""
    models = Models("cpu", "fp32")
    first = models.load(DEMO)
    assert models.load(DEMO) is first
    for name in ("a", "b"):
        tiny.working_vae().save_pretrained(tmp_path / name)
        models.load(str(tmp_path / name))
    assert models.load(DEMO) is not first


def test_a_tiny_decoder_is_shown_where_it_fits(tmp_path):
    """And left out for a VAE of other latents."""
    distilled(4).save_pretrained(tmp_path / "four")
    distilled(16).save_pretrained(tmp_path / "sixteen")
    fits = Models("cpu", "fp32", tiny=str(tmp_path / "four")).load(DEMO)
    other = Models("cpu", "fp32", tiny=str(tmp_path / "sixteen")).load(DEMO)
    assert viewed(fits, encoded(fits, sample()), Knobs()).tiny is not None
    assert viewed(other, encoded(other, sample()), Knobs()).tiny is None


# --- words


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("de,zh-TW;q=0.5,en;q=0.4", "zh"),
        ("fr-FR,fr;q=0.9", "en"),
        ("en;q=0,zh;q=0.1", "zh"),
        ("zh;q=nonsense", "en"),
        ("", "en"),
    ],
)
def test_the_language_is_the_browsers(accepted, language):
    """Of the two, the one that it would rather have."""
    assert words.language_of(accepted) == language


def test_everything_is_said_in_both_languages(seen):
    """Labels, complaints and faults."""
    assert words.WORDS["en"].keys() == words.WORDS["zh"].keys()
    for reason in get_args(Why):
        error = UnusableError(reason, "the detail")
        english, chinese = (words.complaint(error, language) for language in ("en", "zh"))
        assert "the detail" in english
        assert CHINESE.search(chinese)
        assert not CHINESE.search(english)
    for fault in get_args(Fault):
        broken = Encoded(DEMO, seen.trip, (Finding(fault, "the text"),))
        assert CHINESE.search(words.verdict(broken, "zh"))
        assert words.verdict(broken, "en") == f"- `{fault}`: the text"


# --- the command


def test_others_need_a_token(tmp_path):
    """Where they can reach it, and a short one will not do."""
    done = command(tmp_path, "explore", "--host", "0.0.0.0")
    assert (done.code, "--token must be given with --host" in done.err) == (2, True)
    done = command(tmp_path, "explore", "--host", "0.0.0.0", "--token", "short")
    assert (done.code, "--token must be 16 ASCII characters" in done.err) == (2, True)


def test_without_gradio_the_pip_command_is_told(tmp_path, monkeypatch):
    """And nothing else."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "sd_progress.explore", raising=False)
    done = command(tmp_path, "explore")
    assert done.code == 2
    assert 'gradio must be installed to explore, got none; pip install "sd-progress[app]"' in (
        done.err
    )


# --- the page


@contextlib.contextmanager
def running(folder, *words):
    """The explorer's address, while it runs; it says nothing else, and ends as it should."""
    python = interpreter()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [python, "-m", "sd_progress", "explore", "--port", str(port), "--device", "cpu"]
    with (
        log.open("w") as output,
        subprocess.Popen([*command, *words], env=environment, stdout=output, stderr=output) as app,
    ):
        try:
            end_s = time.monotonic() + 60
            while "Exploring at" not in log.read_text():
                assert app.poll() is None, log.read_text()
                assert time.monotonic() < end_s, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()
    assert app.returncode == 0
    assert log.read_text() == f"Exploring at http://127.0.0.1:{port} (Ctrl-C stops)\n\nStopped.\n"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of an explorer with a tiny decoder."""
    folder = tmp_path_factory.mktemp("explorer")
    distilled(4).save_pretrained(folder / "tiny")
    with running(folder, "--tiny", folder / "tiny") as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    """As Debian has it."""
    path = web.program("chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=FLAGS)
        with contextlib.closing(launched):
            yield launched


@contextlib.contextmanager
def visit(chromium, address, locale):
    """A tab of somebody with that language, in which nothing may go wrong."""
    size = {"width": 1280, "height": 1150}
    with contextlib.closing(chromium.new_context(locale=locale, viewport=size)) as context:
        with new_tab(context) as (page, wrong):
            page.goto(address)
            yield page
        assert wrong == []


def changed(page, source):
    """Wait until the decoded picture is another; its address."""
    picture = page.locator("#sd-decoded img")
    picture.wait_for()
    if source is not None:
        expect(picture).not_to_have_attribute("src", source, timeout=WAIT_MS)
    return picture.get_attribute("src")


def pixels(address):
    """Of a picture that the page shows."""
    answer = requests.get(address, timeout=web.WAIT_S)
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(float)


@pytest.mark.parametrize(
    ("locale", "title", "channel", "reset", "is_wrong"),
    [
        ("en-US", "VAE explorer", "knobs untouched", "All knobs back", "is no picture"),
        ("zh-CN", "VAE 探索器", "未调节时", "全部复位", "不是可以读取的图片"),
    ],
)
def test_a_visit(chromium, address, tmp_path, locale, title, channel, reset, is_wrong):
    """A picture is uploaded and decoded; a knob changes it, and back; no picture is refused."""
    sample().save(tmp_path / "sea.png")
    (tmp_path / "notes.txt").write_text("no picture")
    with visit(chromium, address, locale) as page:
        expect(page.get_by_role("heading", name=title)).to_be_visible(timeout=WAIT_MS)
        page.locator("input[type=file]").set_input_files(tmp_path / "sea.png")
        first = changed(page, None)
        expect(page.get_by_text(channel)).to_be_visible()
        expect(page.locator("#sd-tiny img")).to_be_visible()
        before = pixels(first)
        page.get_by_role("checkbox", name="1", exact=True).check()
        second = changed(page, first)
        assert np.abs(pixels(second) - before).mean() > 10
        page.get_by_role("button", name=reset).click()
        third = changed(page, second)
        assert np.array_equal(pixels(third), before)
        page.locator("input[type=file]").set_input_files(tmp_path / "notes.txt")
        expect(page.get_by_role("alert")).to_contain_text(is_wrong, timeout=WAIT_MS)
        assert page.locator("#sd-decoded img").get_attribute("src") == third


def test_the_language_can_be_switched(chromium, address):
    """With all that is shown, and without a new picture."""
    with visit(chromium, address, "en-US") as page:
        page.get_by_role("button", name="Take the sample").click()
        source = changed(page, None)
        page.get_by_text("中文").click()
        expect(page.get_by_role("button", name="使用示例图片")).to_be_visible(timeout=WAIT_MS)
        expect(page.get_by_text("这个 VAE 没有问题。")).to_be_visible(timeout=WAIT_MS)
        assert page.locator("#sd-decoded img").get_attribute("src") == source


def test_a_wrong_model_is_refused_and_a_right_one_taken(chromium, address, tmp_path):
    """The picture that is there is shown anew."""
    tiny.working_vae().save_pretrained(tmp_path / "vae")
    with visit(chromium, address, "en-US") as page:
        page.get_by_role("button", name="Take the sample").click()
        source = changed(page, None)
        box, load = page.get_by_role("textbox"), page.get_by_role("button", name="Load", exact=True)
        box.fill(str(tmp_path / "none"))
        load.click()
        expect(page.get_by_role("alert")).to_contain_text("cannot be loaded", timeout=WAIT_MS)
        box.fill(str(tmp_path / "vae"))
        load.click()
        changed(page, source)
        expect(page.get_by_role("alert")).to_have_count(0)


def test_other_names_for_this_machine_are_refused(address):
    """So that no page elsewhere can ask by a name of its own."""
    answer = requests.get(address, headers={"Host": "example.org"}, timeout=web.WAIT_S)
    assert answer.status_code == 400


def test_with_a_token_only_who_knows_it_gets_in(tmp_path):
    """As a password, with any name."""
    token = "a-secret-of-these-tests"
    with running(tmp_path, "--token", token) as url, requests.Session() as visitor:
        assert visitor.get(f"{url}/config", timeout=web.WAIT_S).status_code == 401
        for password, status in (("wrong", 400), ("wröng", 400), (token, 200)):
            form = {"username": "anybody", "password": password}
            assert visitor.post(f"{url}/login", form, timeout=web.WAIT_S).status_code == status
        assert visitor.get(f"{url}/config", timeout=web.WAIT_S).status_code == 200
