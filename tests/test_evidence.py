"""The report's data: nothing is computed, and what is stale or missing is never shown unmarked."""

from __future__ import annotations

import json

import pytest

from c2r_core.artefacts import cells as cell_module
from c2r_core.artefacts.cells import EditedCellError, State
from c2r_core.artefacts.profiles import load_profile
from c2r_core.artefacts.results import plain, results_dir, write_json
from c2r_core.experiments import cells
from c2r_core.experiments.evidence import STUDIES, Evidence, committed, gather, marked, worst
from c2r_core.notebook import files
from conftest import NOTEBOOKS, PROJECT

SMOKE = load_profile("smoke")


def keep(cell, values, **changes):
    """Write a committed cell with these values, as if it had been computed."""
    content = plain(cell.about()) | changes | {"values": values}
    content["digest"] = cell_module._digest(content)
    write_json(cell.file(results_dir(cell.profile)), content)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """One current, one stale cell of `blocks`; the others are missing."""
    monkeypatch.setenv("C2R_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("C2R_RUNS", str(tmp_path / "runs"))
    values = {"reconstruction": {"status": "evaluated", "values": {"fvu": 0.5, "l0": 10.0}}}
    current, stale, *_ = cells("blocks", SMOKE)
    keep(current, values)
    keep(stale, values, modules={"c2r_core.metrics.use": "of last year"})
    return gather(SMOKE, ["blocks"])


def test_every_row_knows_its_state(kept):
    assert kept.blocks()["state"].tolist() == ["current", "stale", "missing", "missing"]
    assert kept.blocks()["fvu"].notna().sum() == 2, "stale values are shown, but marked"
    assert "1 current, 1 stale, 2 missing" in kept.summary()


def test_marks_are_in_what_is_shown(kept):
    shown = marked(kept.blocks(), "block")
    assert shown["block"].tolist() == ["0", "0 (STALE)", "1 (MISSING)", "1 (MISSING)"]
    assert "state" not in shown.columns
    assert worst(["current", "stale"]) == "stale" and worst(["current"]) == "current"


def test_a_study_that_no_notebook_computes_is_read_when_it_is_complete(monkeypatch, tmp_path):
    monkeypatch.setenv("C2R_RESULTS", str(tmp_path))
    monkeypatch.setenv("C2R_CELLS", "anew")
    profile = load_profile("default")
    first, *others = cells("scale", profile)
    keep(first, {"n": 1})
    assert others and committed("scale", profile) == {}
    for cell in others:
        keep(cell, {"n": 2})
    assert committed("scale", profile)[first.name] == {"n": 1}


def test_an_edited_cell_stops_the_report(kept):
    file = cells("blocks", SMOKE)[0].file(results_dir("smoke"))
    content = json.loads(file.read_text())
    content["values"] = {}
    file.write_text(json.dumps(content))
    with pytest.raises(EditedCellError, match="is not what was computed"):
        gather(SMOKE, ["blocks"])


def test_the_table_of_arms_has_the_state_of_each_measurement():
    names = {cell.name for cell in cells("language_model", SMOKE)}
    states = {name: State("stale" if "use" in name else "current") for name in names}
    values = {
        name: {metric: {"status": "evaluated", "values": {"fvu": 0.5}}}
        for name in names
        for metric in [name.rpartition("-")[2]]
        if metric == "reconstruction"
    }
    values = {n: {m: {"status": "not evaluable"} for m in v} for n, v in values.items()}
    arms = Evidence(SMOKE, {"language_model": values}, {"language_model": states}).arms()
    assert arms.loc["right answers erased", "state"] == "stale"
    assert arms.loc["FVU", "state"] == "current"


def test_the_committed_report_says_of_each_study_what_is_so_now(monkeypatch):
    """It prints `summary()`; if a cell has grown stale since, the report must be refreshed."""
    monkeypatch.delenv("C2R_RESULTS")
    monkeypatch.delenv("C2R_RUNS")
    (report,) = [path for path in NOTEBOOKS if path.stem.endswith("_report")]
    code = [c["source"] for c in files.read(report)["cells"] if c["cell_type"] == "code"]
    source = "\n".join(code)
    assert "read_json" not in source and "nb.cells" not in source, "the report reads evidence alone"
    assert ".summary()" in source
    if files.awaits_evidence(files.read(report)):
        pytest.skip("the report awaits its evidence; tests/test_hygiene.py says when it may")
    text = json.dumps(json.loads((PROJECT / "notebooks" / report.name).read_text()))
    for line in gather(load_profile("default"), STUDIES).summary().splitlines():
        assert json.dumps(line)[1:-1] in text, (
            f"the report does not say: {line}; run `make refresh`"
        )
