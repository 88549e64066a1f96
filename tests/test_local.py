"""Jobs and events in one process."""

import asyncio
import contextlib
import threading

import pytest
import web

from sd_progress.jobs import Event, Job, Load, QueueFullError, UnknownRunError
from sd_progress.local import Limits, LocalHub, position_of

LAST = Event("completed", {"images": ["x" * 1000]})


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, now_s=1000.0):
        self.now_s = now_s

    def __call__(self):
        return self.now_s


def paint(hub, *events):
    """Claim the next job and publish its events."""
    with contextlib.closing(hub.bench()) as bench:
        job = bench.claim(0)
        return job, [bench.publish(job, event) for event in events]


def preview(text="x"):
    return Event("preview", {"b64_json": text})


def names(hub, run_id="a", after="0-0"):
    return [event.name for event in web.events_in(hub, run_id, after)]


# From those who ask to those who paint


def test_a_job_goes_in_and_its_events_come_out():
    """In the order in which they were published, each with an id that grows."""
    hub = LocalHub()
    web.submit(hub)
    job, answers = paint(hub, Event("phase"), preview(), LAST)
    events = web.events_in(hub)
    assert (job.id, job.prompt, answers) == ("a", web.PROMPT, [True, True, True])
    assert [event.name for event in events] == ["queued", "phase", "preview", "completed"]
    positions = [position_of(event.id) for event in events]
    assert positions == sorted(set(positions))


def test_who_waits_longest_is_painted_first():
    """And those behind are told that they move up."""
    hub = LocalHub()
    for name in "abc":
        web.submit(hub, name)
    assert [paint(hub, LAST)[0].id for _ in "abc"] == ["a", "b", "c"]
    positions = [e.data["position"] for e in web.events_in(hub, "c") if e.name == "queued"]
    assert positions == [2, 1, 0]


def test_events_come_as_they_happen():
    """Whoever iterates waits for the next, which is published in another thread."""
    hub = LocalHub()

    async def main():
        seen, first = [], asyncio.Event()
        await hub.submit(Job("a", "x"))

        async def watch():
            async for event in hub.events("a"):
                seen.append(event.name)
                first.set()

        watching = asyncio.create_task(watch())
        await first.wait()
        await asyncio.to_thread(paint, hub, preview(), LAST)
        await watching
        return seen

    assert asyncio.run(main()) == ["queued", "preview", "completed"]


def test_many_watch_one_run_from_several_event_loops():
    """All see all of it."""
    hub, seen, ready = LocalHub(), [], threading.Barrier(5)
    web.submit(hub)

    async def watch():
        events = hub.events("a")
        first = await anext(events)
        ready.wait()
        seen.append([first.name, *[event.name async for event in events]])

    threads = [threading.Thread(target=asyncio.run, args=[watch()]) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    paint(hub, preview(), preview(), LAST)
    for thread in threads:
        thread.join(web.WAIT_S)
    assert seen == [["queued", "preview", "preview", "completed"]] * 4


def test_what_comes_after_an_id_is_given_again():
    """Nothing twice and nothing lost; behind the last event there is nothing."""
    hub = LocalHub()
    web.submit(hub)
    paint(hub, preview("1"), preview("2"), LAST)
    whole = web.events_in(hub)
    for index, event in enumerate(whole):
        assert web.events_in(hub, after=event.id) == whole[index + 1 :]


def test_ids_grow_even_when_the_clock_is_set_back():
    """And when it stands still."""
    clock = Clock()
    hub = LocalHub(wall_clock=clock)
    web.submit(hub)
    with contextlib.closing(hub.bench()) as bench:
        job = bench.claim(0)
        for now_s in (2000.0, 2000.0, 5.0):
            clock.now_s = now_s
            bench.publish(job, preview())
        bench.publish(job, LAST)
    ids = [event.id for event in web.events_in(hub)]
    assert ids == ["1000000-0", "2000000-0", "2000000-1", "2000000-2", "2000000-3"]


def test_each_job_is_claimed_once():
    """However many painters reach for it."""
    hub, claimed = LocalHub(Limits(max_waiting=500, max_per_client=500)), []

    def work():
        with contextlib.closing(hub.bench()) as bench:
            while (job := bench.claim(0)) is not None:
                claimed.append(job.id)
                bench.publish(job, LAST)

    for number in range(400):
        web.submit(hub, f"run-{number}")
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(web.WAIT_S)
    assert sorted(claimed) == sorted(f"run-{number}" for number in range(400))


# Cancelling


def test_a_run_that_waits_is_cancelled_at_once():
    """Nobody claims it any more."""
    hub = LocalHub()
    web.submit(hub)
    asyncio.run(hub.cancel("a"))
    assert names(hub) == ["queued", "cancelled"]
    with contextlib.closing(hub.bench()) as bench:
        assert bench.claim(0) is None


def test_a_run_that_is_painted_is_told_to_stop():
    """By what `publish` and `keep` return; it ends when the painter says so."""
    hub = LocalHub()
    web.submit(hub)
    bench = hub.bench()
    job = bench.claim(0)
    assert bench.keep(job)
    asyncio.run(hub.cancel("a"))
    asyncio.run(hub.cancel("a"))
    assert not bench.keep(job)
    assert not bench.publish(job, preview())
    bench.publish(job, Event("cancelled"))
    asyncio.run(hub.cancel("a"))
    assert names(hub) == ["queued", "preview", "cancelled"]
    bench.close()


def test_after_its_last_event_a_run_gets_no_more():
    """What a painter says then is ignored."""
    hub = LocalHub()
    web.submit(hub)
    job, answers = paint(hub, LAST, preview(), Event("failed"))
    assert answers == [True, False, False]
    assert names(hub) == ["queued", "completed"]
    with contextlib.closing(hub.bench()) as bench:
        assert not bench.keep(job)


def test_unknown_runs_are_told():
    """To whoever wants events, and to whoever cancels."""
    hub = LocalHub()
    with pytest.raises(UnknownRunError, match="run_id must be that of a run, got 'b'"):
        web.events_in(hub, "b")
    with pytest.raises(UnknownRunError, match="may be forgotten"):
        asyncio.run(hub.cancel("b"))


# Limits


def test_only_so_many_may_wait():
    """One that is claimed waits no more."""
    hub = LocalHub(Limits(max_waiting=2))
    web.submit(hub, "a")
    web.submit(hub, "b")
    with pytest.raises(QueueFullError, match="waiting runs must be below 2"):
        web.submit(hub, "c")
    paint(hub)
    web.submit(hub, "c")
    assert asyncio.run(hub.load()) == Load(waiting=2, running=1, workers=0)


def test_only_so_many_may_be_of_one_client():
    """Those that are painted count; those that are over do not."""
    hub = LocalHub(Limits(max_per_client=1))
    web.submit(hub, "a", client="x")
    web.submit(hub, "b", client="y")
    paint(hub)
    with pytest.raises(QueueFullError, match="runs of one client must be below 1"):
        web.submit(hub, "c", client="x")
    asyncio.run(hub.cancel("b"))
    web.submit(hub, "c", client="y")


def test_an_id_is_used_once():
    """Else two runs would be mixed up."""
    hub = LocalHub()
    web.submit(hub)
    with pytest.raises(ValueError, match=r"job\.id must be new, got 'a' again"):
        web.submit(hub)


def test_a_long_run_loses_its_oldest_previews():
    """And nothing else."""
    hub = LocalHub(Limits(max_events=6))
    web.submit(hub)
    paint(hub, Event("phase"), *[preview(str(number)) for number in range(50)], LAST)
    events = web.events_in(hub)
    assert [event.name for event in events] == ["queued", "phase", *["preview"] * 3, "completed"]
    assert [event.data["b64_json"] for event in events[2:5]] == ["47", "48", "49"]


def test_runs_that_are_over_are_forgotten_after_a_while():
    """They can be read until then."""
    clock = Clock()
    hub = LocalHub(Limits(keep_s=60), clock=clock)
    web.submit(hub)
    paint(hub, LAST)
    clock.now_s += 59
    assert names(hub) == ["queued", "completed"]
    clock.now_s += 2
    with pytest.raises(UnknownRunError):
        names(hub)


@pytest.mark.parametrize("limits", [Limits(max_finished=2), Limits(max_bytes=2500)])
def test_of_many_runs_the_oldest_is_forgotten(limits):
    """Beyond a number, and beyond what they hold."""
    hub = LocalHub(limits)
    for name in "abc":
        web.submit(hub, name)
        paint(hub, LAST)
    assert names(hub, "b") == names(hub, "c") == ["queued", "completed"]
    with pytest.raises(UnknownRunError):
        names(hub, "a")


# The end


def test_closing_ends_all_that_waits():
    """Viewers, painters that look for work, and the run that is painted."""
    hub = LocalHub()

    async def main():
        await hub.submit(Job("a", "x"))
        bench = hub.bench()
        job = bench.claim(0)
        claiming = asyncio.create_task(asyncio.to_thread(bench.claim, web.WAIT_S))
        events = hub.events("a")
        assert (await anext(events)).name == "queued"
        watching = asyncio.create_task(anext(events, None))
        await asyncio.sleep(0.05)
        await hub.aclose()
        assert await watching is None
        assert await claiming is None
        assert not bench.keep(job)
        with pytest.raises(QueueFullError, match="hub must be open"):
            await hub.submit(Job("b", "x"))

    asyncio.run(main())


def test_a_bench_that_is_closed_claims_nothing():
    """Nor does it count as a worker."""
    hub = LocalHub()
    web.submit(hub)
    bench = hub.bench()
    assert asyncio.run(hub.load()).workers == 1
    bench.close()
    assert bench.claim(0) is None
    assert asyncio.run(hub.load()) == Load(waiting=1, running=0, workers=0)


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "1-x", "1 -1", "9" * 21, "1-" + "9" * 20])
def test_what_is_no_id_is_told(text):
    """Before anything is compared with it."""
    with pytest.raises(ValueError, match="the id of an event must be milliseconds-count"):
        position_of(text)
