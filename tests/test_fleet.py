"""Jobs and events through a real Redis server, and what happens when something dies."""

import asyncio
import base64
import contextlib
import json
import threading
import time
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
import redis
import redis_server
import requests
import web

from sd_progress import _redis, fleet
from sd_progress.fleet import RedisBench, RedisHub
from sd_progress.jobs import (
    BEGINNING,
    Event,
    HubAwayError,
    Job,
    Load,
    QueueFullError,
    UnknownRunError,
)

PICTURE = base64.b64encode(bytes(range(256))).decode()
PREVIEW = {"b64_json": PICTURE, "format": "png", "step_index": 0}
DONE = Event("completed", {"images": [PICTURE, PICTURE], "format": "png", "is_whole": True})
JOB = Job("run-1", "a house", stays=True, client="me")


@pytest.fixture(scope="module")
def process():
    """One for all tests here."""
    with redis_server.running() as started:
        yield started


@pytest.fixture
def server(process):
    """It is empty when a test begins."""
    with redis.Redis.from_url(process.url) as client:
        client.flushall()
    return process


@pytest.fixture
def raw(server):
    """What any program can see."""
    with redis.Redis.from_url(server.url, protocol=2) as client:
        yield client


@pytest.fixture
def make_bench(server):
    """Workers that are closed afterwards."""
    with contextlib.ExitStack() as stack:

        def make(name="ann", **options):
            bench = RedisBench(server.url, name, **{"lease_s": 0.2, **options})
            stack.callback(bench.close)
            return bench

        yield make


def die(bench):
    """As the process would, in the middle of whatever it does: nothing is given back."""
    bench.close = lambda: bench._redis.close()


def with_hub(server, body, **options):
    """What the coroutine function returns, of a hub that is closed afterwards."""

    async def main():
        hub = RedisHub(server.url, **options)
        try:
            return await asyncio.wait_for(body(hub), 60)
        finally:
            await hub.aclose()

    return asyncio.run(main())


def submit(server, *jobs, **options):
    """Have a hub take them."""

    async def body(hub):
        for job in jobs:
            await hub.submit(job)

    with_hub(server, body, **options)


async def collect(hub, run_id=JOB.id, after=BEGINNING):
    """All events of a run, to its last."""
    return [event async for event in hub.events(run_id, after)]


def read(server, run_id=JOB.id, after=BEGINNING):
    """The same, with a hub of its own."""
    return with_hub(server, lambda hub: collect(hub, run_id, after))


def names(events):
    return [event.name for event in events]


# The way of a job


def test_a_job_comes_out_as_it_went_in(server, make_bench):
    """Every field of it."""
    job = Job("a-1", "ein Häuschen", "fog", 64, 48, 3, 2.5, 7, 2, "webp", "me", stays=True)
    submit(server, job)
    assert make_bench().claim(0) == job


def test_events_come_out_as_they_went_in(server, make_bench):
    """In order, with the ids of Redis, pictures as base64 again."""
    submit(server, JOB)
    bench = make_bench()
    job = bench.claim(0)
    sent = [Event("phase", {"name": "denoising", "eta_s": None}), Event("preview", PREVIEW), DONE]
    assert all(bench.publish(job, event) for event in sent)
    queued, *found = read(server)
    assert (queued.name, queued.data) == ("queued", {"position": 0})
    assert [replace(event, id="") for event in found] == sent


def test_pictures_are_raw_bytes_in_redis(server, raw, make_bench):
    """Base64 would take a third more."""
    submit(server, JOB)
    bench = make_bench()
    bench.publish(bench.claim(0), Event("preview", PREVIEW))
    _, fields = raw.xrevrange("sd-progress:{run-1}:events", count=1)[0]
    assert fields[b"picture"] == bytes(range(256))
    assert json.loads(fields[b"data"]) == {"format": "png", "step_index": 0}


def test_jobs_come_in_their_order_and_to_one_worker_each(server, make_bench):
    """Whoever asks first."""
    submit(server, *[Job(f"r-{number}", "x", stays=True) for number in range(4)])
    ann, bob = make_bench("ann"), make_bench("bob")
    claimed = [bench.claim(0).id for bench in (ann, bob, ann, bob)]
    assert claimed == ["r-0", "r-1", "r-2", "r-3"]
    assert ann.claim(0) is None


def test_a_worker_that_waits_is_woken(server, make_bench):
    """By the job, not by its next look."""
    threading.Timer(0.3, submit, [server, JOB]).start()
    assert make_bench().claim(30) == JOB


def test_positions_are_counted(server):
    """Each learns how many are before it."""

    async def body(hub):
        await asyncio.gather(*[hub.submit(replace(JOB, id=f"r-{n}")) for n in range(5)])
        newest = [await anext(hub.events(f"r-{n}")) for n in range(5)]
        return sorted(event.data["position"] for event in newest), await hub.load()

    assert with_hub(server, body) == ([0, 1, 2, 3, 4], Load(5, 0, 0))


def test_who_waits_learns_that_it_moves_up(server, make_bench, monkeypatch):
    """Once for each place, however many web processes look after it."""
    monkeypatch.setattr(fleet, "_ATTEND_S", 0.05)

    async def body(hub):
        other = RedisHub(server.url)
        for number in range(3):
            await hub.submit(replace(JOB, id=f"r-{number}"))
        watching = [asyncio.create_task(collect(one, "r-2")) for one in (hub, other)]
        bench = make_bench(lease_s=5)
        for _ in range(2):
            await asyncio.sleep(0.3)
            paint(bench, bench.claim(0), 1)
        await asyncio.sleep(0.3)
        paint(bench, bench.claim(0), 1)
        await other.aclose()
        return await asyncio.gather(*watching)

    for events in with_hub(server, body):
        positions = [event.data["position"] for event in events if event.name == "queued"]
        assert positions == [2, 1, 0]


def test_load_counts_all_there_is(server, make_bench):
    """Waiting, running, workers; a worker that left is not counted."""
    submit(server, JOB, replace(JOB, id="run-2"), replace(JOB, id="run-3"))
    ann, bob = make_bench("ann"), make_bench("bob")
    ann.claim(0)
    bob.claim(0)
    load = with_hub(server, lambda hub: hub.load())
    bob.close()
    assert load == Load(waiting=1, running=2, workers=2)
    assert with_hub(server, lambda hub: hub.load()).workers == 1


def test_nothing_is_left_of_a_run_but_its_events(server, raw, make_bench):
    """And those are forgotten."""
    submit(server, JOB)
    bench = make_bench(keep_s=50)
    bench.publish(bench.claim(0), DONE)
    assert raw.xlen("{sd-progress}:jobs") == 0
    assert raw.xpending("{sd-progress}:jobs", "workers")["pending"] == 0
    kept = sorted(raw.scan_iter("sd-progress:*"))
    assert kept == [b"sd-progress:{run-1}:" + name for name in (b"events", b"run", b"watched")]
    assert all(0 < raw.ttl(key) <= 50 for key in kept)


# Limits


def test_too_many_are_refused(server):
    """And leave nothing behind."""

    async def body(hub):
        await hub.submit(JOB)
        with pytest.raises(QueueFullError, match="waiting runs must be below 1"):
            await hub.submit(replace(JOB, id="run-2"))
        with pytest.raises(UnknownRunError, match="got 'run-2'"):
            await collect(hub, "run-2")

    with_hub(server, body, max_waiting=1)


def test_one_client_can_have_so_many(server, make_bench):
    """Until one of them is over; others have their own."""

    async def body(hub):
        await hub.submit(JOB)
        with pytest.raises(QueueFullError, match="runs of one client must be below 1"):
            await hub.submit(replace(JOB, id="run-2"))
        await hub.submit(replace(JOB, id="run-3", client="you"))
        bench = make_bench()
        bench.publish(bench.claim(0), DONE)
        await hub.submit(replace(JOB, id="run-4"))

    with_hub(server, body, max_per_client=1)


def test_the_limit_holds_between_web_processes(server, raw):
    """Exactly, whoever asks at the same moment."""

    async def body(hub):
        others = [RedisHub(server.url, max_waiting=10) for _ in range(3)]
        jobs = [replace(JOB, id=f"r-{number}") for number in range(40)]
        asked = [hub_.submit(job) for job, hub_ in zip(jobs, [hub, *others] * 10, strict=True)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        waiting = (await hub.load()).waiting
        for other in others:
            await other.aclose()
        return [type(answer) for answer in answers], waiting

    answers, waiting = with_hub(server, body, max_waiting=10, max_per_client=100)
    assert waiting == 10
    assert answers.count(type(None)) == 10
    assert answers.count(QueueFullError) == 30
    assert len(list(raw.scan_iter("sd-progress:*:run"))) == 10


def test_an_id_is_used_once(server):
    """A second run of it would be mixed with the first."""
    submit(server, JOB)
    with pytest.raises(ValueError, match=r"job.id must be new, got 'run-1'"):
        submit(server, JOB)


# Cancelling


def test_a_job_that_nobody_claimed_is_cancelled_without_a_worker(server, make_bench):
    """At once; no worker ever sees it."""

    async def body(hub):
        await hub.submit(JOB)
        await hub.cancel(JOB.id)
        await hub.cancel(JOB.id)
        return names(await collect(hub)), await hub.load()

    assert with_hub(server, body) == (["queued", "cancelled"], Load(0, 0, 0))
    assert make_bench().claim(0) is None


def test_a_worker_sees_that_its_job_is_cancelled(server, make_bench):
    """By `publish` and by `keep`; its last event is the last."""
    submit(server, JOB)
    bench = make_bench()
    job = bench.claim(0)
    assert (bench.keep(job), bench.publish(job, Event("preview", PREVIEW))) == (True, True)
    with_hub(server, lambda hub: hub.cancel(JOB.id))
    assert (bench.keep(job), bench.publish(job, Event("preview", PREVIEW))) == (False, False)
    bench.publish(job, Event("cancelled"))
    assert names(read(server)) == ["queued", "preview", "preview", "cancelled"]


def test_nobody_knows_another_run(server):
    """Neither to watch nor to cancel."""
    with pytest.raises(UnknownRunError, match="run_id must be that of a run, got 'none'"):
        with_hub(server, lambda hub: hub.cancel("none"))
    with pytest.raises(UnknownRunError, match="got 'none'"):
        read(server, "none")


def test_what_nobody_watches_ends(server, make_bench):
    """Unless the job stays; while somebody watches, it goes on."""
    job = replace(JOB, stays=False)

    async def body(hub):
        await hub.submit(job)
        bench = make_bench(lease_s=5)
        claimed = await asyncio.to_thread(bench.claim, 5)
        async with aclosing(hub.events(job.id)) as events:
            await anext(events)
            coming = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.6)
            watched = bench.keep(claimed)
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await asyncio.sleep(0.4)
        return watched, bench.keep(claimed)

    assert with_hub(server, body, unwatched_s=0.3) == (True, False)


def test_what_nobody_waits_for_is_not_begun(server, make_bench):
    """It is cancelled when its turn comes."""
    submit(server, replace(JOB, stays=False), unwatched_s=0.05)
    time.sleep(0.1)
    assert make_bench().claim(0) is None
    assert names(read(server)) == ["queued", "cancelled"]


# Workers that die


def test_the_job_of_a_dead_worker_is_taken_over(server, make_bench):
    """When its lease is over, not before; its stream goes on."""
    submit(server, JOB)
    ann, bob = make_bench("ann"), make_bench("bob")
    ann.publish(ann.claim(0), Event("preview", PREVIEW))
    assert bob.claim(0) is None
    began_s = time.monotonic()
    job = bob.claim(5)
    assert 0.05 < time.monotonic() - began_s < 2
    bob.publish(job, DONE)
    assert names(read(server)) == ["queued", "preview", "completed"]


def test_a_living_worker_keeps_its_job(server, make_bench):
    """By `keep`, for as long as it likes."""
    submit(server, JOB)
    ann, bob = make_bench("ann"), make_bench("bob")
    job = ann.claim(0)
    for _ in range(10):
        time.sleep(0.06)
        assert ann.keep(job)
        assert bob.claim(0) is None


def test_nothing_of_the_old_worker_is_added_any_more(server, make_bench):
    """Not even its last event; and it learns that."""
    submit(server, JOB)
    ann, bob = make_bench("ann"), make_bench("bob")
    job = ann.claim(0)
    assert bob.claim(5) == job
    assert not ann.publish(job, Event("preview", PREVIEW))
    assert not ann.publish(job, DONE)
    assert not ann.keep(job)
    assert bob.publish(job, DONE)
    assert names(read(server)) == ["queued", "completed"]


def test_after_the_last_event_comes_nothing(server, make_bench):
    """Whoever still believes to paint."""
    submit(server, JOB)
    bench = make_bench()
    job = bench.claim(0)
    assert bench.publish(job, DONE)
    assert not bench.publish(job, DONE)
    assert not bench.keep(job)
    assert names(read(server)) == ["queued", "completed"]


def test_a_worker_that_dies_between_its_last_event_and_saying_so(server, make_bench, monkeypatch):
    """The run is over all the same; the job is only cleared away."""
    submit(server, JOB)
    ann, bob = make_bench("ann"), make_bench("bob")
    job = ann.claim(0)
    monkeypatch.setattr(ann, "_remove", lambda entry, job: die(ann))
    ann.publish(job, DONE)
    assert with_hub(server, lambda hub: hub.load()).running == 1
    time.sleep(0.3)
    assert bob.claim(0) is None
    assert with_hub(server, lambda hub: hub.load()).running == 0
    assert names(read(server)) == ["queued", "completed"]


def test_a_job_that_is_there_twice_is_painted_once(server, raw, make_bench):
    """As where a web process lost the answer to its first try."""
    submit(server, JOB)
    (_, fields) = raw.xrange("{sd-progress}:jobs")[0]
    raw.xadd("{sd-progress}:jobs", fields)
    bench = make_bench()
    job = bench.claim(0)
    assert bench.claim(0) is None
    bench.publish(job, DONE)
    assert raw.xlen("{sd-progress}:jobs") == 0


def test_a_job_that_kills_its_workers_fails(server, make_bench):
    """After three; the fourth does not begin it."""
    submit(server, JOB)
    for name in ("ann", "bob", "cem"):
        bench = make_bench(name, lease_s=0.05)
        assert bench.claim(5) == JOB
        die(bench)
    assert make_bench("dan", lease_s=0.05).claim(0.5) is None
    *_, last = read(server)
    assert last.name == "failed"
    assert last.data["message"].startswith("3 workers ended in the middle of it")


def test_a_worker_that_leaves_gives_its_job_back(server, make_bench):
    """Another has it at once, and it is not held against the job."""
    submit(server, JOB)
    for number in range(5):
        bench = make_bench(f"worker-{number}", lease_s=60)
        assert bench.claim(2) == JOB
        bench.close()
        assert not bench.publish(JOB, DONE)
        assert bench.claim(0) is None
    assert names(read_until(server, 6)) == ["queued"] * 6
    with_hub(server, lambda hub: hub.cancel(JOB.id))
    assert names(read(server))[-1] == "cancelled"
    assert make_bench("dan").claim(0.2) is None
    assert with_hub(server, lambda hub: hub.load()).running == 0


def read_until(server, count):
    """The first events of a run that is not over."""

    async def body(hub):
        async with aclosing(hub.events(JOB.id)) as events:
            return [await anext(events) for _ in range(count)]

    return with_hub(server, body)


def test_a_worker_that_leaves_while_it_waits(server, make_bench):
    """`close` from another thread ends the waiting, and no job is lost to it."""
    bench = make_bench(lease_s=60)
    threading.Timer(0.2, bench.close).start()
    began_s = time.monotonic()
    assert bench.claim(30) is None
    assert time.monotonic() - began_s < 5
    submit(server, JOB)
    assert make_bench("bob").claim(0) == JOB


def test_a_job_that_comes_while_a_worker_leaves(server, make_bench, monkeypatch):
    """It is given back as well."""
    submit(server, JOB)
    bench = make_bench(lease_s=60)
    closing, attempt = threading.Thread(target=bench.close), bench._attempt

    def attempt_while_it_closes(*arguments):
        closing.start()
        bench._closing.wait()
        return attempt(*arguments)

    monkeypatch.setattr(bench, "_attempt", attempt_while_it_closes)
    assert bench.claim(5) is None
    closing.join()
    assert make_bench("bob").claim(2) == JOB


# Watching


def paint(bench, job, count, pause_s=0.0):
    """Previews with numbers, and the picture."""
    for number in range(count):
        assert bench.publish(job, Event("preview", {**PREVIEW, "step_index": number}))
        time.sleep(pause_s)
    assert bench.publish(job, DONE)


def painting(bench, count, pause_s=0.0):
    """The same in a thread, of the next job."""
    job = bench.claim(5)
    return asyncio.to_thread(paint, bench, job, count, pause_s)


def test_two_hundred_viewers_are_one_reader(server, raw, make_bench):
    """All get everything, and Redis sees a handful of connections."""

    async def body(hub):
        await hub.submit(JOB)
        viewers = [asyncio.create_task(collect(hub)) for _ in range(200)]
        await asyncio.sleep(0.3)
        connections = len(raw.client_list())
        await painting(make_bench(lease_s=5), 20, 0.01)
        return connections, await asyncio.gather(*viewers)

    connections, found = with_hub(server, body)
    assert connections < 40
    assert {tuple(names(events)) for events in found} == {
        ("queued", *["preview"] * 20, "completed")
    }


def test_a_slow_viewer_misses_previews_but_not_the_end(server, make_bench):
    """It gets the newest, and what is held for it is bounded."""

    async def body(hub):
        await hub.submit(JOB)
        found = []
        async with aclosing(hub.events(JOB.id)) as events:
            found.append(await anext(events))
            coming = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.2)
            await painting(make_bench(lease_s=5), 100)
            await asyncio.sleep(0.2)
            held = sum(len(feed._events) for feed in hub._feeds.values())
            found.append(await coming)
            found += [event async for event in events]
        return held, found

    held, found = with_hub(server, body)
    steps = [event.data["step_index"] for event in found if event.name == "preview"]
    assert held < 12
    assert (len(steps) < 20, steps[-1], found[-1].name) == (True, 99, "completed")


def test_a_viewer_resumes_behind_any_event_at_any_hub(server, make_bench):
    """The rest, the whole rest and nothing but the rest."""
    submit(server, JOB)
    bench = make_bench(lease_s=5)
    paint(bench, bench.claim(0), 20)
    whole = read(server)
    for index in (0, 1, 7, 20, 21):
        assert read(server, after=whole[index].id) == whole[index + 1 :]


@pytest.mark.parametrize("after", ["9999999999999-0", "18446744073709551615-1"])
def test_an_id_from_the_future_does_not_wait_forever(server, make_bench, after):
    """A run that is over is over; one that goes on is watched from here."""
    submit(server, JOB)

    async def body(hub):
        watching = asyncio.create_task(collect(hub, after=after))
        await asyncio.sleep(0.2)
        await painting(make_bench(lease_s=5), 1)
        return await watching, await collect(hub, after=after)

    during, afterwards = with_hub(server, body)
    assert names(during) == ["preview", "completed"]
    assert afterwards == []


@pytest.mark.parametrize("after", ["", "soon", "1-2-3", "-1", "1-x"])
def test_what_is_no_id_is_refused(server, after):
    """Before anything is read."""
    submit(server, replace(JOB, id=f"r{abs(hash(after))}"))
    with pytest.raises(ValueError, match="the id of an event must be"):
        read(server, after=after)


def test_viewers_that_come_and_go(server, make_bench):
    """At every moment of a run, none misses anything behind its beginning."""

    async def body(hub):
        await hub.submit(JOB)
        viewers = []
        work = asyncio.create_task(painting(make_bench(lease_s=5), 40, 0.01))
        rng = np.random.default_rng(0)
        while not work.done():
            viewers.append(asyncio.create_task(collect(hub)))
            if rng.random() < 0.5:
                viewers.pop(rng.integers(len(viewers))).cancel()
            await asyncio.sleep(0.01)
        await work
        return await asyncio.gather(*viewers), dict(hub._feeds)

    found, feeds = with_hub(server, body)
    assert len(found) > 5
    assert {len(events) for events in found} == {42}
    assert feeds == {}


def test_a_viewer_that_pauses_while_others_come(server, make_bench):
    """What it has not seen yet, and the others' reader begins behind, it reads itself."""

    async def body(hub):
        await hub.submit(JOB)
        bench = make_bench(lease_s=5)
        async with aclosing(hub.events(JOB.id)) as events:
            found = [await anext(events)]
            job = bench.claim(5)
            for number in range(6):
                bench.publish(job, Event("preview", {**PREVIEW, "step_index": number}))
            async with aclosing(hub.events(JOB.id)) as others:
                while (await anext(others)).data.get("step_index") != 5:
                    pass
                coming = asyncio.ensure_future(anext(others))
                await asyncio.sleep(0.1)
                found += [await anext(events) for _ in range(6)]
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        return found

    steps = [event.data.get("step_index") for event in with_hub(server, body)]
    assert steps == [None, 0, 1, 2, 3, 4, 5]


def test_closing_a_hub_ends_what_is_watched(server):
    """Whoever iterates gets no more; the run goes on."""

    async def body(hub):
        await hub.submit(JOB)
        watching = asyncio.create_task(collect(hub))
        await asyncio.sleep(0.2)
        await hub.aclose()
        return names(await watching)

    assert with_hub(server, body) == ["queued"]


def test_a_run_that_vanishes_ends_its_viewers(server, raw):
    """As after a restart of a server that keeps nothing."""

    async def body(hub):
        await hub.submit(JOB)
        watching = asyncio.create_task(collect(hub))
        await asyncio.sleep(0.2)
        raw.flushall()
        with pytest.raises(UnknownRunError, match="got 'run-1'"):
            await watching

    with_hub(server, body)


# Memory


def test_a_stream_is_capped_by_count(server, raw, make_bench):
    """The newest stay, the last event among them."""
    submit(server, JOB)
    bench = make_bench(max_events=10, lease_s=5)
    paint(bench, bench.claim(0), 50)
    events = read(server)
    assert raw.xlen("sd-progress:{run-1}:events") == 10
    assert [event.data.get("step_index") for event in events] == [*range(41, 50), None]


def test_a_stream_is_capped_by_bytes(server, raw, make_bench):
    """Large pictures leave room for fewer."""
    submit(server, JOB)
    bench = make_bench(max_bytes=100_000, lease_s=5)
    job = bench.claim(0)
    large = {"b64_json": base64.b64encode(bytes(30_000)).decode()}
    for _ in range(20):
        bench.publish(job, Event("preview", large))
        assert raw.xlen("sd-progress:{run-1}:events") <= 5
    assert raw.xlen("sd-progress:{run-1}:events") == 3


def test_everything_is_forgotten(server, raw, make_bench):
    """A while after the last event."""
    submit(server, JOB, unwatched_s=1)
    bench = make_bench(keep_s=1, lease_s=5)
    paint(bench, bench.claim(0), 3)
    time.sleep(1.2)
    assert not list(raw.scan_iter("sd-progress:*"))
    with pytest.raises(UnknownRunError, match="it may be forgotten"):
        read(server)


# A server that goes away


def test_a_restart_is_survived():
    """Workers and hubs go on with a server that has forgotten everything."""
    with redis_server.running() as own:
        submit(own, JOB)
        bench = RedisBench(own.url, "ann", lease_s=5)
        job = bench.claim(0)
        own.stop()
        assert bench.publish(job, Event("preview", PREVIEW))
        assert bench.keep(job)
        assert bench.claim(0.1) is None
        own.start()
        assert not bench.publish(job, DONE)
        submit(own, replace(JOB, id="run-2"))
        assert bench.claim(5).id == "run-2"
        bench.close()


def test_a_hub_says_that_there_is_no_server():
    """Whatever it is asked; who watches meanwhile goes on when there is one again."""
    with redis_server.running() as own:

        async def body(hub):
            await hub.submit(JOB)
            watching = asyncio.create_task(collect(hub))
            await asyncio.sleep(0.2)
            own.stop()
            for asked in (hub.submit(JOB), hub.load(), hub.cancel("a"), collect(hub)):
                with pytest.raises(HubAwayError, match="Redis must be there"):
                    await asked
            own.start()
            with pytest.raises(UnknownRunError):
                await watching

        with_hub(own, body)


def test_a_service_without_a_server_is_to_be_asked_again():
    """For a proxy's health check as for everyone; it recovers by itself."""
    with redis_server.running() as own, web.served(RedisHub(own.url)) as url:
        run_id = web.begin(url)
        own.stop()
        answers = [requests.get(f"{url}/healthz"), web.post(url)]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert {answer.headers["retry-after"] for answer in answers} == {"2"}
        assert web.told(url, run_id) == []
        own.start()
        assert requests.get(f"{url}/healthz").status_code == 200


def test_a_last_event_waits_for_the_server(server, raw, make_bench):
    """The picture was not painted for nothing."""
    submit(server, JOB)
    bench = make_bench(lease_s=30)
    job = bench.claim(0)
    raw.config_set("maxmemory", 1)
    raw.config_set("maxmemory-policy", "noeviction")
    threading.Timer(0.8, raw.config_set, ["maxmemory", 0]).start()
    assert bench.publish(job, Event("preview", PREVIEW))
    assert bench.publish(job, DONE)
    assert names(read(server)) == ["queued", "completed"]


def test_a_wrong_password_is_told(server, raw):
    """Nobody waits for it to become right."""
    raw.config_set("requirepass", "secret")
    raw.auth("secret")
    try:
        bench = RedisBench(server.url, "ann")
        with pytest.raises(redis.AuthenticationError, match="uthentication"):
            bench.claim(5)
    finally:
        raw.config_set("requirepass", "")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RedisHub("http://host"), "url must begin with redis://.*got 'http://host'"),
        (lambda: RedisHub("redis://me:secret@host", prefix="{a}"), "prefix must be letters"),
        (lambda: RedisHub("redis+sentinel://host"), "url must name the service"),
        (lambda: RedisHub("unix+cluster://host"), "url must begin with redis://"),
        (lambda: RedisBench("redis://host", ""), "name must be that of a worker, got ''"),
        (lambda: RedisBench("redis://host", "a", lease_s=0), "lease_s, max_attempts and"),
    ],
)
def test_wrong_settings_raise_at_once(make, message):
    """Before there is any connection."""
    with pytest.raises(ValueError, match=message):
        make()


# Where else Redis may be


def have_a_run(url):
    """What its viewer gets, and what is then to do; a second one is cancelled, a third left."""

    async def main():
        hub = RedisHub(url)
        for number in range(1, 4):
            await hub.submit(replace(JOB, id=f"run-{number}"))
        await hub.cancel("run-2")
        watching = asyncio.create_task(collect(hub))
        bench = RedisBench(url, "ann", lease_s=5)
        await painting(bench, 3, 0.05)
        bench.claim(5)
        bench.close()
        load = await hub.load()
        await hub.aclose()
        return names(await watching), load

    return asyncio.run(asyncio.wait_for(main(), 30))


RUN = (["queued", *["preview"] * 3, "completed"], Load(waiting=0, running=1, workers=0))


def test_a_cluster():
    """Three nodes: no command needs two of them."""
    with redis_server.cluster() as url:
        assert have_a_run(url) == RUN


def test_a_server_behind_sentinels(tmp_path):
    """They tell where it is."""
    with redis_server.sentinel(tmp_path) as url:
        assert have_a_run(url) == RUN


def test_a_node_of_a_cluster_behind_a_proxy(server):
    """The same keys, through a client that knows nothing of clusters."""
    with redis_server.running("--cluster-enabled", "yes") as node:
        with redis.Redis.from_url(node.url, protocol=2) as raw:
            raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        web.until(lambda: redis_server.is_whole(node))
        assert have_a_run(node.url) == RUN


@pytest.mark.parametrize(
    ("url", "hosts", "login"),
    [
        ("redis+sentinel://a/main", (("a", 26379),), {}),
        ("rediss+sentinel://:p%40ss@a:1,b:2/main/3", (("a", 1), ("b", 2)), {"password": "p@ss"}),
        ("redis+sentinel://me:x@a/main", (("a", 26379),), {"username": "me", "password": "x"}),
    ],
)
def test_urls_of_sentinels(url, hosts, login):
    """Hosts, the service's name, and how to log in."""
    place = _redis._place(url)
    assert (place.kind, place.service, place.hosts, place.login) == (
        "sentinel",
        "main",
        hosts,
        login,
    )
    assert (place.is_tls, place.database) == (("rediss" in url), 3 if url.endswith("3") else 0)
