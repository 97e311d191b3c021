"""How long work takes on a GPU, with and without the host's part in it. And of what commit."""

import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

COLD_BYTES = 160 * 2**20  # arguments of this size in all, used in turn, leave nothing in the L2 cache (H100: 50 MB)

Calls = Sequence[Callable[[], object]]
"""The same work on different arguments, to be done in turn."""
Timer = Callable[[Calls], float]
"""Calls -> seconds for one of them."""


def commit() -> str:
    """What is measured: the commit in SPARSELEARN_COMMIT, for a copy of a tree whose git is absent or another's; else
    git's, with "-dirty" where files differ from it; else "unknown"."""
    if named := os.environ.get("SPARSELEARN_COMMIT"):
        return named
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def copies(*tensors: Tensor | None, most: int = 48) -> int:
    """How many sets of such arguments to use in turn, so that none is still in the cache when its turn comes."""
    size = sum(t.numel() * t.itemsize for t in tensors if t is not None)
    return max(1, min(most, -(-COLD_BYTES // max(size, 1))))


def graph_seconds(calls: Calls, rounds: int = 5, least: float = 2e-3) -> float:
    """Median seconds of one call, replayed in a CUDA graph for at least `least` seconds a round."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and finds the libraries' algorithms
        for call in [*calls[:1], *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _replay_seconds(graph, 1)
    repeats = max(1, min(1000, int(least / max(once, 1e-6))))
    times = [_replay_seconds(graph, repeats) for _ in range(rounds)]
    del graph
    return statistics.median(times) / len(calls)


def event_seconds(calls: Calls, repeats: int = 20, rounds: int = 3) -> float:
    """Median seconds of one call of many in a row, as a program without CUDA graphs makes them.

    The host's work counts where it takes longer than the device's.
    """
    for call in calls:
        call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()  # work that waits there would hide the host's
        start.record()
        for i in range(repeats):
            calls[i % len(calls)]()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) / 1e3 / repeats)
    return statistics.median(times)


def _replay_seconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats
