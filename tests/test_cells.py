"""Cells: current, stale and by what, missing, edited; each mode reads and writes where it should."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from c2r_core.artefacts import cells
from c2r_core.artefacts.cells import Cell, EditedCellError, differing, look, read_or_compute, state
from c2r_core.artefacts.results import results_dir, runs_dir
from forks import forked


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    monkeypatch.setenv("C2R_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("C2R_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("C2R_CELLS", raising=False)
    return tmp_path


def no_computation():
    raise AssertionError("computed although a current cell is there")


def make(compute=lambda: {"fvu": 0.5}, **changes) -> Cell:
    cell = Cell(
        study="toy",
        name="relu",
        profile="default",
        settings={"steps": 5, "features": {"d_in": 3}},
        compute=compute,
        modules=("c2r_core.losses",),
        inputs={"model": "abc"},
    )
    return replace(cell, **changes)


def test_a_cell_is_missing_then_current_then_read():
    assert state(make()).kind == "missing"
    assert read_or_compute(make(), "commit") == {"fvu": 0.5}
    assert state(make()).kind == "current"
    assert read_or_compute(make(no_computation)) == {"fvu": 0.5}
    assert not list(runs_dir("default").rglob("*.json"))


def test_kept_cells_are_computed_into_runs_and_anew_leaves_results_alone():
    read_or_compute(make())
    assert state(make()).kind == "missing"
    assert state(make(), runs_dir("default")).kind == "current"
    assert read_or_compute(make(no_computation)) == {"fvu": 0.5}
    read_or_compute(make(lambda: {"fvu": 0.7}), "commit")
    assert read_or_compute(make(no_computation), "anew") == {"fvu": 0.5}
    assert read_or_compute(make(no_computation), "kept") == {"fvu": 0.7}


def test_a_report_shows_what_was_computed_here_where_that_was_asked_for(monkeypatch):
    read_or_compute(make(lambda: {"fvu": 0.7}), "commit")
    assert look(make())[1] == {"fvu": 0.7}
    monkeypatch.setenv("C2R_CELLS", "anew")
    assert look(make())[0].kind == "missing"
    monkeypatch.setenv("C2R_CELLS", "main")
    assert look(make())[1] == {"fvu": 0.7}, "what was not computed here is read"
    read_or_compute(make(), "anew")
    assert look(make())[1] == {"fvu": 0.5}


def test_the_environment_names_the_mode(monkeypatch):
    monkeypatch.setenv("C2R_CELLS", "commit")
    read_or_compute(make())
    assert state(make()).kind == "current"
    monkeypatch.setenv("C2R_CELLS", "comit")
    with pytest.raises(ValueError, match="did you mean 'commit'"):
        read_or_compute(make())


def test_smoke_is_never_committed():
    smoke = make(profile="smoke")
    read_or_compute(smoke, "commit")
    assert state(smoke).kind == "missing"
    assert state(smoke, runs_dir("smoke")).kind == "current"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"settings": {"steps": 6, "features": {"d_in": 3}}}, "setting steps"),
        ({"settings": {"steps": 5, "features": {"d_in": 4}}}, "setting features.d_in"),
        ({"inputs": {"model": "abd"}}, "input model"),
        ({"modules": ("c2r_core.losses", "c2r_core.seeds")}, "module c2r_core.seeds"),
    ],
)
def test_a_stale_cell_says_what_differs(change, why):
    read_or_compute(make(), "commit")
    found = state(make(**change))
    assert found.kind == "stale" and why in found.why
    assert read_or_compute(make(lambda: "new", **change)) == "new"
    assert state(make()).kind == "current", "what is committed is left as it is"


@pytest.mark.parametrize("mode", ["kept", "commit"])
@pytest.mark.parametrize("what", ["values", "modules", "settings", "all"])
def test_an_edited_cell_is_named_and_refused(what, mode):
    read_or_compute(make(), "commit")
    file = make().file(results_dir("default"))
    content = json.loads(file.read_text())
    if what == "all":
        file.write_text("{")
    else:
        content[what] = {"fvu": 0.1}
        file.write_text(json.dumps(content))
    assert state(make()).kind == "edited"
    with pytest.raises(EditedCellError, match=r"toy/relu\.json is not what was computed"):
        read_or_compute(make(), mode)
    read_or_compute(make(), "anew")


@pytest.mark.parametrize("modules", [["c2r_core.losses"], {"c2r_core.losses": ["abc"]}])
def test_a_cell_whose_hashes_are_no_text_is_refused_though_its_digest_fits(modules):
    read_or_compute(make(), "commit")
    file = make().file(results_dir("default"))
    content = json.loads(file.read_text()) | {"modules": modules}
    file.write_text(json.dumps(content | {"digest": cells._digest(content)}))
    assert state(make()).kind == "edited"


def _compute_slowly():
    with open("computed", "a") as file:
        file.write("x")
    time.sleep(0.5)
    return 1


def _read(folder, code):
    import os

    os.chdir(folder)
    assert read_or_compute(make(_compute_slowly)) == 1


def test_two_processes_compute_once(folders):
    processes = [forked(_read, folders, None) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (folders / "computed").read_text() == "x"


def test_what_a_recomputation_may_differ_in():
    kept = {"fvu": 0.5, "l0": 100.0, "text": "a", "rows": [{"seed": 1, "f1": 0.5}] * 2, "n": None}
    near = {"fvu": 0.515, "l0": 104.0, "text": "b", "rows": [{"seed": 2, "f1": 0.51}], "n": None}
    assert differing(kept, near) == []
    assert differing({"fvu": 0.5}, {"fvu": 0.55}) == ["fvu: 0.5 kept, 0.55 computed"]
    assert differing({"l0": 100.0}, {"l0": 110.0}) and differing({"f1": 0.0}, {"f1": 0.03})
    assert differing(kept["rows"], [{"seed": 1, "f1": 0.6}])[0].startswith("f1")
    assert differing({"n": 1}, {"n": 0}) == [] != differing({"n": 9}, {"n": 7})
    assert differing({"a": 1.0}, {"b": 1.0}) == ["values: other fields"]
    assert differing({"a": 1.0}, {"a": None}) == ["a: 1.0 kept, None computed"]
