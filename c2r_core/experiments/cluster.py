"""Cells on several processes or machines, through Dask.

    with local_cluster(workers=4) as client:  # or connected("tcp://scheduler:8786")
        for cell, found in computed_on(client, cells):
            ...  # in the order in which they are finished

A worker gets the name of a cell, makes the cell from its own installed package and computes it. What it finds
comes back and is written here, so workers need no disk in common. A worker whose code, settings or inputs are
not those of this process is refused. When a worker dies, Dask gives its cell to another one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from c2r_core.artefacts.cells import Cell, content_of, differences
from c2r_core.artefacts.profiles import load_profile
from c2r_core.errors import needs_extra
from c2r_core.experiments import cells

if TYPE_CHECKING:
    from distributed import Client

_OF_THE_ALLOCATOR = "MALLOC_"


class OtherCodeError(RuntimeError):
    """A worker would compute a cell from other code, settings or inputs than this process has."""


@contextmanager
def local_cluster(workers: int) -> Iterator[Client]:
    """As many worker processes on this machine, which share its threads; they end with the context.

    Raises
    ------
    MissingExtra
        If Dask is not installed.
    ValueError
        If there is to be no worker.
    """
    needs_extra("cluster", "distributed")
    from distributed import Client, LocalCluster

    if workers < 1:
        raise ValueError(f"workers is {workers}; expected at least 1.")
    threads = str(max(1, torch.get_num_threads() // workers))
    kept = {name: of for name, of in os.environ.items() if name.startswith(_OF_THE_ALLOCATOR)}
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,  # one cell at a time; torch's threads are of the environment
            env={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | kept,
            memory_limit=0,
            dashboard_address=None,
            scheduler_kwargs={
                "dashboard_address": "127.0.0.1:0"
            },  # any free port, where others cannot reach it
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def connected(scheduler: str) -> Iterator[Client]:
    """A cluster that is there already, by its scheduler's address, such as "tcp://10.0.0.1:8786".

    Start each worker with one thread (`dask worker ADDRESS --nthreads 1`), on a GPU machine one for each GPU.

    Raises
    ------
    MissingExtra
        If Dask is not installed.
    ConnectionError
        If no scheduler answers there within 30 seconds.
    """
    needs_extra("cluster", "distributed")
    from distributed import Client

    try:
        client = Client(scheduler, timeout=30)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"No Dask scheduler answers at {scheduler!r} ({error}). Start one with `dask scheduler`, and "
            "give the address that it prints."
        ) from error
    with client:
        yield client


def computed_on(
    client: Client, waiting: Iterable[Cell]
) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    """Each cell with the content of its file, or with the error that kept it from being computed.

    A cell is taken from `waiting` when a worker is free, so that an iterator may end early.
    """
    from distributed import as_completed

    cells_left, running, done = iter(waiting), {}, as_completed()

    def fill() -> None:
        while len(running) < max(1, sum(client.nthreads().values())):
            cell = next(cells_left, None)
            if cell is None:
                return
            given = (cell.study, cell.name, cell.profile, cell.device)
            future = client.submit(_content, *given, cell.about(), pure=False)
            running[future] = cell
            done.add(future)

    fill()
    for future in done:
        cell = running.pop(future)
        error = future.exception()
        yield cell, future.result() if error is None else error
        fill()


def _content(study: str, name: str, profile: str, device: str, about: dict) -> dict[str, Any]:
    """On a worker: the content of the cell's file."""
    by_name = {cell.name: cell for cell in cells(study, load_profile(profile), device=device)}
    differing = ["the list of cells"]
    if name in by_name:
        differing = differences(about, by_name[name].about())
    if differing:
        raise OtherCodeError(
            f"a worker differs from this process in {', '.join(differing)}. Install the same version of "
            "c2r-core, and the same data, on every worker."
        )
    return content_of(by_name[name])
