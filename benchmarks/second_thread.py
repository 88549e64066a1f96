"""What a second thread that uses torch costs a run on the CPU, even while it does nothing.

Convolutions are timed in the main thread, in turns: alone, beside a thread that waits, beside one
that has computed something in torch and then waits, and beside one that has done so after
`work_on_one_core`, as the preview's threads do. Then they go to a new thread, as a pipeline does
whose frames are streamed: as it is, and after `release_team` has ended the threads of the one that
it comes from. Printed are medians, and ratios to being alone.

    python benchmarks/second_thread.py
"""

from __future__ import annotations

import argparse
import functools
import threading
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch.nn import functional

from sd_progress.engine import release_team, work_on_one_core


def compute() -> None:
    """What drawing a preview takes."""
    latents, weight = torch.randn(1, 4, 64, 64), torch.randn(3, 4, 1, 1)
    functional.conv2d(latents, weight)


def compute_on_one_core() -> None:
    """The same, as the preview's threads do it."""
    work_on_one_core()
    compute()


def nothing() -> None:
    """Only wait."""


WAYS: dict[str, Callable[[], None] | None] = {
    "alone": None,
    "a thread that waits": nothing,
    "one that has used torch": compute,
    "one that has used torch on one core": compute_on_one_core,
}


def layers_ms(count: int = 150) -> float:
    """Milliseconds of a convolution, an activation and a norm, in the calling thread."""
    images, weight = torch.randn(1, 32, 64, 64), torch.randn(32, 32, 3, 3)
    began_s = time.perf_counter()
    for _ in range(count):
        functional.group_norm(functional.silu(functional.conv2d(images, weight, padding=1)), 8)
    return 1e3 * (time.perf_counter() - began_s) / count


def beside(way: Callable[[], None] | None) -> float:
    """The same beside a thread that has done `way` and waits."""
    if way is None:
        return median(layers_ms() for _ in range(3))
    ready, gate = threading.Event(), threading.Event()

    def body() -> None:
        way()
        ready.set()
        gate.wait()

    thread = threading.Thread(target=body)
    thread.start()
    ready.wait()
    found_ms = median(layers_ms() for _ in range(3))
    gate.set()
    thread.join()
    return found_ms


def moved(prepare: Callable[[], None]) -> float:
    """In a thread of its own, after the calling one has done `prepare`."""
    layers_ms(10)  # else the calling thread might have no threads to release
    prepare()
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(beside(None)))
    thread.start()
    thread.join()
    return found[0]


MOVES: dict[str, Callable[[], None]] = {
    "in a new thread": nothing,
    "in a new thread, the old one's released": release_team,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Time all ways in turns, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="of which medians are taken")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    layers_ms()
    ways = {name: functools.partial(beside, way) for name, way in WAYS.items()}
    ways |= {name: functools.partial(moved, move) for name, move in MOVES.items()}
    rounds = [{name: way() for name, way in ways.items()} for _ in range(args.rounds)]
    print("| beside | ms | ratio |\n|---|---:|---:|")
    for name in ways:
        ratio = median(one[name] / one["alone"] for one in rounds)
        print(f"| {name} | {median(one[name] for one in rounds):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
