"""How long a call takes, beside others in turn, and how much memory, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LINUX = sys.platform == "linux"


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each run, and of each but the first how many times as long as the first it takes.

    All are run once to warm up, then in turn: ratios are of the same round.
    """
    for run in runs.values():
        run()
    times = [{name: run() for name, run in runs.items()} for _ in range(rounds)]
    found = {f"seconds_{name}": statistics.median(t[name] for t in times) for name in runs}
    first, *others = runs
    for name in others:
        ratios = [t[name] / t[first] for t in times]
        found[f"seconds_ratio_{name}"] = statistics.median(ratios)
        found[f"seconds_ratio_{name}_least"] = min(ratios)
        found[f"seconds_ratio_{name}_most"] = max(ratios)
    return found


class Clock:
    """Batches that note when each was asked for: a step lasts from one to the next."""

    def __init__(self, batches: Sequence[Tensor], device: str) -> None:
        self.batches, self.device, self.asked = batches, device, []

    def __call__(self, step: int) -> Tensor:
        self.asked.append(now(self.device))
        return self.batches[step % len(self.batches)]

    def last(self, n_steps: int) -> list[float]:
        """Seconds of each of the last steps, the very last of which ends now."""
        bounds = [*self.asked[-n_steps:], now(self.device)]
        return [end - start for start, end in itertools.pairwise(bounds)]


def now(device: str) -> float:
    """The clock, in seconds, when a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], object], device: str) -> float:
    """How long a call takes, once."""
    started = now(device)
    run()
    return now(device) - started


def peak_memory(run: Callable[..., object], *arguments: Any) -> float:
    """Bytes that a process of its own takes at most for a call, beyond what it holds before.

    `run(*arguments)` prepares, and returns the call that is measured; it must be a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured_peak, run, arguments).result()


def _measured_peak(run: Callable[..., Callable[[], object]], arguments: Sequence[Any]) -> float:
    call = run(*arguments)
    gc.collect()
    if _LINUX:
        # What preparing has freed goes back to the system, or the call would take it unseen.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    before = _most_memory()
    call()
    return _most_memory() - before


def _most_memory() -> float:
    """Bytes that this process has held at most."""
    if _LINUX:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
