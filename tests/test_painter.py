"""Jobs that are painted by a pipeline: what becomes of them as events."""

import base64
import contextlib
import io
import logging
import re
import threading

import numpy as np
import pytest
import torch
import web
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image

from sd_progress import demo_model_path
from sd_progress.arguments import UsageError
from sd_progress.jobs import Job
from sd_progress.local import LocalBench, LocalHub
from sd_progress.painter import Painter, load_painter

STEPS = 6


@pytest.fixture(scope="module")
def pipe():
    """The demo model, as everybody loads it."""
    loaded = DiffusionPipeline.from_pretrained(demo_model_path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def hub():
    return LocalHub()


def paint(pipe, hub, **job):
    """One job, painted here; its events."""
    web.submit(hub, **{"steps": STEPS, "seed": 4, **job})
    with contextlib.closing(hub.bench()) as bench:
        Painter(pipe).paint(bench, bench.claim(0))
    return web.events_in(hub)


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def plain(pipe, **arguments):
    """What a plain call of the pipeline returns."""
    generator = torch.Generator().manual_seed(4)
    arguments = {"num_inference_steps": STEPS, "generator": generator, **arguments}
    return pipe(web.PROMPT, **arguments).images


@contextlib.contextmanager
def hooked(module, hook):
    """A function that is called before a module."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# A run


def test_phases_previews_and_the_picture_come_in_order(pipe, hub):
    """From the line to the finished picture."""
    names = [event.name for event in paint(pipe, hub)]
    first, last = names.index("preview"), len(names) - 1 - names[::-1].index("preview")
    assert names[:first] == ["queued", "phase", "phase"]
    assert set(names[first : last + 1]) == {"preview"}
    assert names[last + 1 :] in (["phase", "completed"], ["completed"])


def test_the_picture_is_that_of_a_plain_call(pipe, hub):
    """Bit for bit, in full size."""
    completed = paint(pipe, hub)[-1].data
    picture = decoded(completed["images"][0])
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(plain(pipe)[0]))
    assert (completed["width"], completed["height"], completed["is_whole"]) == (128, 128, True)


def test_everything_that_a_job_asks_for_is_heeded(pipe, hub):
    """Size, number, guidance, and what to keep out."""
    wanted = {"negative_prompt": "trees", "guidance": 2.0, "width": 64, "height": 96, "count": 2}
    images = paint(pipe, hub, **wanted)[-1].data["images"]
    arguments = {"guidance_scale": 2.0, "width": 64, "height": 96, "num_images_per_prompt": 2}
    expected = plain(pipe, negative_prompt="trees", **arguments)
    assert len(images) == 2
    for text, picture in zip(images, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(decoded(text)), np.asarray(picture))


def test_a_preview_tells_where_the_run_is(pipe, hub):
    """Its picture is enlarged, so that it can be seen."""
    previews = [event.data for event in paint(pipe, hub) if event.name == "preview"]
    assert decoded(previews[0]["b64_json"]).size == (256, 256)
    for data in previews:
        assert data["progress"] == (data["step_index"] + 1) / STEPS
        assert (data["num_steps"], data["source"], data["format"]) == (STEPS, "denoised", "png")
    assert [data["step_index"] for data in previews] == sorted(x["step_index"] for x in previews)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_pictures_are_encoded_as_asked(pipe, hub, image_format):
    """Previews as well as the finished one."""
    events = paint(pipe, hub, image_format=image_format)
    texts = [e.data["b64_json"] for e in events if e.name == "preview"]
    for text in (*texts, *events[-1].data["images"]):
        assert decoded(text).format == image_format.upper()


def test_what_a_job_leaves_open_is_the_painters(pipe, hub):
    """Steps and guidance; a demo in 50 steps takes for ever."""
    web.submit(hub, seed=4)
    with contextlib.closing(hub.bench()) as bench:
        Painter(pipe, steps=3, guidance=1.5).paint(bench, bench.claim(0))
    picture = decoded(web.events_in(hub)[-1].data["images"][0])
    expected = plain(pipe, num_inference_steps=3, guidance_scale=1.5)[0]
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


# Leaving a run


def test_a_run_is_left_where_nothing_comes(pipe, hub):
    """Cancelled while the prompt is read, it ends for its viewers before the pipeline does."""
    reading, go_on = threading.Event(), threading.Event()

    def slow(*_):
        reading.set()
        assert go_on.wait(web.WAIT_S)

    web.submit(hub, steps=STEPS)
    bench = hub.bench()
    painting = threading.Thread(target=Painter(pipe).paint, args=[bench, bench.claim(0)])
    with hooked(pipe.text_encoder, slow):
        painting.start()
        assert reading.wait(web.WAIT_S)
        cancel(hub)
        names = [event.name for event in web.events_in(hub)]
        assert painting.is_alive()
        go_on.set()
        painting.join(web.WAIT_S)
    assert names == ["queued", "phase", "cancelled"]
    assert not painting.is_alive()
    bench.close()


def test_signs_of_life_are_given_where_nothing_comes(pipe, hub):
    """Else another would take the job."""
    signs = threading.Semaphore(0)

    class Bench(LocalBench):
        def keep(self, job):
            signs.release()
            return super().keep(job)

    def slow(*_):
        assert all(signs.acquire(timeout=web.WAIT_S) for _ in range(3))

    bench = hub.bench()
    bench.__class__ = Bench
    web.submit(hub, steps=2)
    with hooked(pipe.text_encoder, slow), contextlib.closing(bench):
        Painter(pipe).paint(bench, bench.claim(0))
    assert web.events_in(hub)[-1].name == "completed"


def test_a_cancelled_run_ends_at_its_next_step(pipe, hub):
    """And the pipeline can be used again."""
    steps = []
    web.submit(hub, steps=150)

    def third(*_):
        steps.append(None)
        if len(steps) == 3:
            cancel(hub)

    with hooked(pipe.unet, third), contextlib.closing(hub.bench()) as bench:
        Painter(pipe).paint(bench, bench.claim(0))
    assert web.events_in(hub)[-1].name == "cancelled"
    assert len(steps) < 75
    assert not [t for t in threading.enumerate() if t.name.startswith("sd-progress")]
    web.submit(hub, "b", steps=STEPS, seed=4)
    with contextlib.closing(hub.bench()) as bench:
        Painter(pipe).paint(bench, bench.claim(0))
    picture = decoded(web.events_in(hub, "b")[-1].data["images"][0])
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(plain(pipe)[0]))


def cancel(hub, run_id="a"):
    thread = threading.Thread(target=web.asyncio.run, args=[hub.cancel(run_id)])
    thread.start()
    thread.join()


# Failures


def test_a_failing_run_tells_no_secrets_and_the_next_one_begins(pipe, hub, caplog):
    """What went wrong is in the log."""
    stop = threading.Event()
    with painting(pipe, hub, stop), caplog.at_level(logging.ERROR):
        with hooked(pipe.unet, broken):
            web.submit(hub, steps=STEPS)
            failed = web.events_in(hub)[-1]
        web.submit(hub, "b", steps=STEPS)
        assert web.events_in(hub, "b")[-1].name == "completed"
    assert failed.data["message"] == "the model failed with OSError; its log tells why"
    assert not failed.data["is_client_error"]
    assert "/home/somebody" in caplog.text


def broken(*_):
    raise OSError("/home/somebody/weights.bin is gone")


@contextlib.contextmanager
def painting(pipe, hub, stop):
    bench = hub.bench()
    thread = threading.Thread(target=Painter(pipe).work, args=[bench, stop])
    thread.start()
    yield
    stop.set()
    bench.close()
    thread.join(web.WAIT_S)
    assert not thread.is_alive()


def test_what_cannot_be_passed_on_fails_too(pipe, hub):
    """A seed of more bits than there are."""
    events = paint(pipe, hub, seed=2**70)
    assert [event.name for event in events] == ["queued", "failed"]
    assert re.match(
        "the model failed with [A-Z][A-Za-z]+Error; its log", events[-1].data["message"]
    )


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"steps": 2000}, "steps must be at most 1000, got 2000"),
        ({"width": 100, "height": 64}, "size must be multiples of 8 pixels"),
    ],
)
def test_what_the_model_cannot_do_is_the_clients_error(pipe, hub, job, message):
    """It is told, in the words of the API."""
    events = paint(pipe, hub, **job)
    assert [event.name for event in events] == ["queued", "failed"]
    assert events[-1].data["message"].startswith(message)
    assert events[-1].data["is_client_error"]


def test_a_model_that_paints_nothing_of_a_prompt_is_refused(tmp_path):
    """Before anything is served."""
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="must be a pipeline that makes pictures or videos"):
        load_painter(str(tmp_path), device="cpu")


def test_the_demo_model_comes_with_what_suits_it():
    """Few steps, little guidance."""
    hub = LocalHub()
    web.submit(hub)
    with contextlib.closing(hub.bench()) as bench:
        load_painter(device="cpu").paint(bench, bench.claim(0))
    previews = [event.data for event in web.events_in(hub) if event.name == "preview"]
    assert {data["num_steps"] for data in previews} == {20}


def test_a_job_says_all_that_there_is_to_paint():
    """A new field must be heeded by the painter; this list is to remember it."""
    assert set(Job.__dataclass_fields__) == {
        *("id", "prompt", "negative_prompt", "width", "height", "steps", "guidance", "seed"),
        *("count", "image_format", "client", "stays"),
    }
