"""Cells on a cluster: what one process finds, whatever becomes of the workers."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest

from c2r_core.artefacts.cells import compute, state
from c2r_core.artefacts.profiles import load_profile
from c2r_core.artefacts.results import read_json, runs_dir
from c2r_core.experiments import __main__, cells
from c2r_core.experiments.cluster import OtherCodeError, computed_on, connected, local_cluster

NAMES = ("relu-baseline", "relu-c2r", "relu-ortsae")


@pytest.fixture(scope="module")
def toys():
    made = {cell.name: cell for cell in cells("toy", load_profile("smoke"))}
    return [made[name] for name in NAMES]


@pytest.fixture(scope="module")
def client():
    with local_cluster(2) as client:
        yield client


def test_two_workers_find_what_one_process_finds(client, toys):
    assert len(client.nthreads()) == 2 and set(client.nthreads().values()) == {1}
    found = {cell.name: content for cell, content in computed_on(client, toys)}
    assert set(found) == set(NAMES)
    for cell in toys:
        assert found[cell.name]["values"] == compute(cell), cell.name


def test_a_worker_of_other_code_is_refused_and_the_others_are_computed(client, toys):
    other = replace(toys[0], settings={**toys[0].settings, "samples": 7})
    found = {cell.name: content for cell, content in computed_on(client, [other, toys[1]])}
    assert isinstance(found[NAMES[0]], OtherCodeError)
    assert "differs from this process in setting samples" in str(found[NAMES[0]])
    assert found[NAMES[1]]["values"]


def busy_worker(client):
    """The process of a worker, once one computes."""
    while not (busy := [address for address, keys in client.processing().items() if keys]):
        time.sleep(0.05)
    (pid,) = client.run(os.getpid, workers=busy[:1]).values()
    return pid


def test_a_worker_that_dies_costs_nothing_but_time(client):
    made = cells("architectures", load_profile("smoke"))[-3:]  # which no other test has trained
    killed = []

    def waiting():
        for cell in made:
            yield cell
            if not killed:
                killed.append(busy_worker(client))
                os.kill(killed[0], signal.SIGKILL)

    found = {cell.name: content for cell, content in computed_on(client, waiting())}
    assert killed[0] not in client.run(os.getpid).values()
    assert set(found) == {cell.name for cell in made}
    for cell in made:
        assert found[cell.name]["values"] == compute(cell), cell.name


def test_the_command_writes_what_workers_find_and_stops_at_a_limit(
    client, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("C2R_RUNS", str(tmp_path))
    arguments = ["run", "toy", "--profile", "smoke", "--scheduler", client.scheduler.address]
    assert __main__.main([*arguments, "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("toy/relu-") == 2 and "run it again to go on" in said
    assert __main__.main(arguments) == 0
    for cell in cells("toy", load_profile("smoke")):
        assert state(cell, runs_dir("smoke")).kind == "current"
        assert read_json(cell.file(runs_dir("smoke")))["values"] == compute(cell)
    assert __main__.main(["verify", *arguments[1:]]) == 0
    assert capsys.readouterr().out.count("agrees") == len(cells("toy", load_profile("smoke")))


def test_what_is_not_there_is_named(capsys):
    with pytest.raises(ValueError, match="workers is 0; expected at least 1"):
        local_cluster(0).__enter__()
    with pytest.raises(ConnectionError, match="No Dask scheduler answers at 'nonsense'"):
        connected("nonsense").__enter__()
