from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from c2r_core.notebook import files as notebook_files
from c2r_core.notebook import runner
from conftest import write_tiny_notebook


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_notebook(tmp_path / "notebooks" / "00_tiny.ipynb")


def test_run_passes_parameters_and_writes_only_the_executed_notebook(tiny, tmp_path):
    source = tiny.read_bytes()
    out = tmp_path / "runs" / "00_tiny.ipynb"
    arguments = ["run", str(tiny), "--profile", "smoke", "--seed", "5", "-p", "DEVICE", "cpu"]
    assert runner.main([*arguments, "--out", str(out)]) == 0
    executed = notebook_files.read(out)
    assert [line.printed for line in notebook_files.verdicts(executed)] == [
        "[check holds] draws stay below one: at most 1",
        "[guard not judged in smoke] the mean is near a half: between 0.4 and 0.6",
        "[claim not judged in smoke] (toy, C²R) it rises: expected at least 0; n = 3 seeds; "
        "because a rise is above 0",
        "[lead] it may rise elsewhere; n = 1 seed",
    ]
    results = json.loads(
        (Path(os.environ["C2R_RUNS"]) / "smoke" / "00_tiny-seed5.json").read_text()
    )
    assert results["provenance"]["seed"] == 5
    assert list(out.parent.iterdir()) == [out]
    assert tiny.read_bytes() == source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "SED", "1"], "unknown parameter 'SED'; did you mean 'SEED'.*PROFILE, SEED, DEVICE"),
        (["--profile", "smok"], "unknown profile 'smok'; did you mean 'smoke'"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(tiny, tmp_path, capsys, arguments, message):
    out = tmp_path / "runs" / "00_tiny.ipynb"
    assert runner.main(["run", str(tiny), "--out", str(out), *arguments]) == 2
    assert not out.parent.exists()
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_notebook_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no notebook .*07_none\.ipynb"):
        runner.run(tmp_path / "07_none.ipynb", tmp_path / "out.ipynb")


def test_a_failure_keeps_its_traceback_and_no_result(tmp_path):
    notebook = write_tiny_notebook(tmp_path / "00_tiny.ipynb", last_code="1 / 0")
    out = tmp_path / "runs" / "00_tiny.ipynb"
    assert runner.main(["run", str(notebook), "--out", str(out)]) == 1
    failed = out.with_suffix(".failed.ipynb")
    assert list(out.parent.iterdir()) == [failed]
    assert "ZeroDivisionError" in failed.read_text()


def test_two_runs_of_one_notebook_share_no_file(tiny, tmp_path, monkeypatch):
    out, texts = tmp_path / "runs" / "00_tiny.ipynb", iter(["first", "second"])

    def execute(_, part, **__):
        text = next(texts)
        Path(part).write_text(text)
        if text == "first":  # another process runs it from its beginning to its end
            runner.run(tiny, out)
            assert out.read_text() == "second"

    monkeypatch.setattr("papermill.execute_notebook", execute)
    runner.run(tiny, out)
    assert out.read_text() == "first"
    assert list(out.parent.iterdir()) == [out]


def test_where_nothing_can_be_written_nothing_runs(tiny, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert runner.main(["run", str(tiny), "--out", str(tmp_path / "file" / "00_tiny.ipynb")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_refreshing_twice_gives_the_same_bytes(refreshed_notebook, tmp_path):
    again = Path(shutil.copy(refreshed_notebook, tmp_path))
    runner.refresh(again, work_folder=tmp_path / "work")
    assert again.read_bytes() == refreshed_notebook.read_bytes()
    assert b"image/png" in again.read_bytes()


def notebook_with(path, *lines):
    """A notebook that printed these lines."""
    output = nbformat.v4.new_output("stream", text="".join(f"{line}\n" for line in lines))
    cell = nbformat.v4.new_code_cell("pass", outputs=[output])
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)


CLAIM = (
    "[claim holds] (toy, C²R) four: measured 0.50 [0.40, 0.60], expected at least 0; n = 3 seeds"
)


def test_summary_prints_every_verdict_counts_claims_and_says_where_to_look(tmp_path, capsys):
    lines = ["[check holds] one", "[guard FAILS] two: measured 3.1, at most 1", "[lead] five"]
    for folder in ("notebooks", "runs"):
        notebook_with(tmp_path / folder / "01_a.ipynb", *lines)
        notebook_with(tmp_path / folder / "02_b.ipynb", CLAIM)
    arguments = ["--committed", str(tmp_path / "notebooks"), "--executed", str(tmp_path / "runs")]
    assert runner.main(["summary", *arguments]) == 0
    printed = capsys.readouterr().out
    for line in ("01_a", "02_b", *lines, CLAIM):
        assert line in printed
    assert re.search(r"toy, about C²R +1 held +0 failed", printed)
    assert re.search(r"language model, about others +0 held +0 failed", printed)
    assert str(tmp_path / "runs" / "02_b.ipynb") in printed
    assert str(tmp_path / "runs" / "02_b.json") in printed


def test_a_run_ends_with_what_the_notebook_found(tiny, tmp_path, capsys):
    notebook_with(tmp_path / "01_a.ipynb", "[check holds] one", CLAIM, "[lead] five")
    assert runner.outcome_text(tmp_path / "01_a.ipynb").splitlines() == [
        f"  {CLAIM}",
        "  [lead] five",
        "1 of 1 claims hold; one that FAILS is a result, no error.",
        f"`make lab` opens the notebooks; this one is {tmp_path / '01_a.ipynb'}",
    ]
    out = tmp_path / "runs" / "00_tiny.ipynb"
    run = ["run", str(tiny), "--profile", "smoke", "--out", str(out)]
    assert runner.main(run) == 0
    assert "[lead] it may rise elsewhere" in capsys.readouterr().out
    assert runner.main([*run, "--brief"]) == 0
    assert "[lead]" not in capsys.readouterr().out


def test_summary_says_how_many_results_this_run_computed(tmp_path):
    for path in ("results/toy/a", "results/toy/b", "runs/toy/b", "runs/toy/of-no-study", "runs/01"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).with_suffix(".json").touch()
    printed = runner.computed_text(tmp_path / "runs", tmp_path / "results")
    assert printed.startswith(f"1 of 2 results were computed here ({tmp_path / 'runs'})")


def test_summary_compares_verdicts_and_no_digits(tmp_path):
    notebook_with(tmp_path / "notebooks" / "01_a.ipynb", CLAIM)
    notebook_with(tmp_path / "runs" / "01_a.ipynb", CLAIM.replace("0.50 [0.40", "0.51 [0.42"))
    assert runner.summary(tmp_path / "notebooks", tmp_path / "runs")[1]


def test_summary_does_not_compare_what_this_run_did_not_measure(tmp_path):
    other = CLAIM.replace("four", "five")
    unmeasured = "[claim not measured] (toy, C²R) four: expected at least 0; n = 0 seeds"
    notebook_with(tmp_path / "notebooks" / "01_a.ipynb", CLAIM, other)
    notebook_with(tmp_path / "runs" / "01_a.ipynb", unmeasured, other)
    text, as_committed = runner.summary(tmp_path / "notebooks", tmp_path / "runs")
    assert as_committed and unmeasured in text
    elsewhere = other.replace("0.50 [0.40, 0.60]", "0.8 [0.7, 0.9]")
    notebook_with(tmp_path / "runs" / "01_a.ipynb", unmeasured, elsewhere)
    assert not runner.summary(tmp_path / "notebooks", tmp_path / "runs")[1]


@pytest.mark.parametrize(
    "executed",
    [
        ["[check FAILS] one", CLAIM],
        ["[check holds] one"],
        ["[check holds] one", CLAIM, "[lead] 3"],
        ["[check holds] one", CLAIM.replace("0.50 [0.40, 0.60]", "−0.50 [−0.60, −0.40]")],
        [CLAIM, "[check holds] one", CLAIM],
    ],
)
def test_summary_fails_where_a_verdict_is_not_as_committed(tmp_path, executed):
    notebook_with(tmp_path / "notebooks" / "01_a.ipynb", "[check holds] one", CLAIM)
    notebook_with(tmp_path / "runs" / "01_a.ipynb", *executed)
    text, as_committed = runner.summary(tmp_path / "notebooks", tmp_path / "runs")
    assert not as_committed
    assert "DIFFERS" in text


def test_a_verdict_that_another_training_changes_is_not_settled(tmp_path):
    """Another processor differs in rounding: an interval that overlaps agrees, whatever the verdict."""
    changed = CLAIM.replace("holds", "FAILS").replace("0.50 [0.40, 0.60]", "0.2 [−0.10, +0.45]")
    notebook_with(tmp_path / "notebooks" / "01_a.ipynb", "[check holds] one", CLAIM)
    notebook_with(tmp_path / "runs" / "01_a.ipynb", "[check holds] one", changed)
    text, agrees = runner.summary(tmp_path / "notebooks", tmp_path / "runs")
    assert agrees and "DIFFERS" not in text
    assert f"  01 committed: {CLAIM}\n     this run: {changed}" in text.partition("not settled.")[2]


def test_summary_fails_where_a_notebook_did_not_run(tmp_path):
    notebook_with(tmp_path / "notebooks" / "01_a.ipynb", "[check holds] one")
    text, as_committed = runner.summary(tmp_path / "notebooks", tmp_path / "runs")
    assert not as_committed
    assert "not run" in text


def test_a_notebook_that_awaits_its_evidence_need_not_run(tmp_path):
    path = tmp_path / "notebooks" / "01_a.ipynb"
    notebook_with(path, "[check holds] one")
    waiting = nbformat.read(path, 4)
    for cell in waiting.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(waiting, path)
    text, as_committed = runner.summary(tmp_path / "notebooks", tmp_path / "runs")
    assert as_committed
    assert "not run: it waits for results that take long" in text
