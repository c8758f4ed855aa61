"""Processes of one group, forked from a process that has read torch once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from conftest import PROJECT


def run_file(file: str, folder: Path) -> None:
    """Run a test's file as a script, on a folder; torch must be alone in the process that forks."""
    done = subprocess.run(
        [sys.executable, file, str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    """That of a process which imports the package and the tests."""
    return os.environ | {"PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'tests'}"}


def in_processes(folder: Path, n: int, work: Callable[[], None]) -> tuple[list[int], float]:
    """Exit statuses of n processes that do the work, and the seconds until all had ended.

    Errors are in folder/error-RANK.
    """
    started, store, children = time.monotonic(), folder / f"store-{time.monotonic_ns()}", []
    for rank in range(n):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=n)
                work()
            except BaseException:
                (folder / f"error-{rank}").write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return statuses, time.monotonic() - started


def errors(folder: Path) -> str:
    """What the processes have left of theirs."""
    return "\n".join(path.read_text() for path in folder.glob("error-*"))
