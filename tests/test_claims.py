from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from c2r_core.artefacts.results import plain, results_dir
from c2r_core.notebook import start
from c2r_core.notebook.claims import claim_lines, judge


@pytest.fixture
def session(monkeypatch, tmp_path):
    """Opens a session that writes below tmp_path."""
    monkeypatch.setenv("C2R_RESULTS", str(tmp_path))

    def open_session(profile="default", **arguments):
        return start(notebook="00_tiny", profile=profile, device="cpu", **arguments)

    return open_session


def written(tmp_path, name="default/00_tiny.json"):
    return json.loads((tmp_path / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("value", "bound", "line"),
    [
        (0.5, {"at_most": 0.5}, "[holds] ratio: at most 0.5"),
        (0.51, {"at_most": 0.5}, "[FAILS] ratio: at most 0.5"),
        (torch.tensor(3), {"at_least": 3}, "[holds] ratio: at least 3"),
        (np.float32(2), {"between": (0, 1)}, "[FAILS] ratio: between 0 and 1"),
        (1.0001, {"equals": 1, "tolerance": 0.001}, "[holds] ratio: equal to 1 within 0.001"),
        (2, {"equals": 1}, "[FAILS] ratio: equal to 1"),
        ("a", {"equals": "a"}, "[holds] ratio: equal to a"),
        (torch.tensor(True), {}, "[holds] ratio"),
        (False, {}, "[FAILS] ratio"),
    ],
)
def test_line(value, bound, line):
    assert judge("ratio", value, **bound).line == line


@pytest.mark.parametrize("value", [math.nan, None, torch.tensor(math.nan)])
@pytest.mark.parametrize(
    "bound",
    [{"at_least": -math.inf}, {"at_most": math.inf}, {"between": (0, 1)}, {"equals": 0}],
)
def test_what_was_not_measured_never_holds(value, bound):
    assert judge("it is a number", value, **bound).verdict == "FAILS"


@given(value=st.floats(allow_nan=True), bound=st.floats(-1e6, 1e6))
def test_the_line_tells_the_verdict_and_nothing_else_about_the_value(value, bound):
    claim = judge("ratio", value, at_most=bound)
    other = judge("ratio", bound - 1 if claim.verdict == "holds" else math.inf, at_most=bound)
    assert claim.line == other.line


def test_a_number_needs_one_bound():
    with pytest.raises(ValueError, match="no bound"):
        judge("ratio", 0.5)
    with pytest.raises(ValueError, match="more than one bound"):
        judge("ratio", 0.5, at_least=0, at_most=1)


def test_lines_are_found_again_in_outputs(session, capsys):
    nb = session()
    nb.claim("one", 1, equals=1)
    print("noise")
    nb.claim("two", 1, at_least=2)
    outputs = [
        {"output_type": "display_data", "data": {}},
        {"output_type": "stream", "name": "stdout", "text": capsys.readouterr().out},
    ]
    assert claim_lines(outputs) == [("holds", "one: equal to 1"), ("FAILS", "two: at least 2")]


def test_smoke_judges_structure_and_no_effect(session, capsys):
    nb = session("smoke")
    nb.claim("training helps", 0.0, at_least=1)
    nb.claim("shapes agree", 3, equals=4, effect=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[not judged in smoke] training helps")
    assert lines[1].startswith("[FAILS] shapes agree")


@dataclass(frozen=True)
class Measured:
    fvu: float
    per_seed: torch.Tensor


def test_results_hold_claims_numbers_and_where_they_come_from(session, tmp_path, capsys):
    nb = session(seed=0)
    nb.record(core=Measured(0.25, torch.tensor([1.0, math.nan])), words=("a", np.int64(3)))
    nb.claim("small", 0.25, at_most=1)
    capsys.readouterr()
    nb.finish()
    assert capsys.readouterr().out == ""
    result = written(tmp_path)
    assert result["schema"] == 1
    assert result["records"] == {
        "core": {"fvu": 0.25, "per_seed": [1.0, None]},
        "words": ["a", 3],
    }
    assert result["claims"] == [
        {"text": "small", "expectation": "at most 1", "value": 0.25, "verdict": "holds"}
    ]
    provenance = result["provenance"]
    assert provenance["torch_version"] == torch.__version__
    assert provenance["seed"] == 0
    assert provenance["seconds"] >= 0
    assert not list(tmp_path.rglob("*.part"))


def test_another_seed_writes_another_file(session, tmp_path):
    session(seed=3).finish()
    assert written(tmp_path, "default/00_tiny-seed3.json")["provenance"]["seed"] == 3


def test_a_name_is_recorded_once(session):
    nb = session()
    nb.record(fvu=1.0)
    with pytest.raises(ValueError, match="'fvu' is recorded already"):
        nb.record(fvu=2.0)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a set cannot be written as JSON"):
        plain({"a": {1, 2}})


def test_full_computes_only_missing_cells(session, tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"fvu": torch.tensor(0.5), "pair": (1, 2)}

    for _ in range(2):
        nb = session("full")
        values = nb.cell("relu-seed0", compute, settings=nb.profile.toy)
        assert values == {"fvu": 0.5, "pair": [1, 2]}
    assert len(calls) == 1
    kept = written(tmp_path, "full/00_tiny/relu-seed0.json")
    assert kept["provenance"]["profile"] == "full"

    session("full").cell("relu-seed0", compute, settings={"steps": 7})
    assert len(calls) == 2, "other settings are another cell"


def test_default_always_computes(session, tmp_path):
    calls = []
    for _ in range(2):
        session("default").cell("relu", lambda: calls.append(1))
    assert len(calls) == 2


def test_evidence_and_runs_lie_apart(monkeypatch):
    monkeypatch.delenv("C2R_RESULTS", raising=False)
    assert results_dir("full").parts[-2:] == ("results", "full")
    assert results_dir("default").parts[-2:] == ("runs", "default")


def test_start_seeds_every_generator(session):
    draws = []
    for _ in range(2):
        session(seed=11)
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]


def test_start_takes_threads_from_the_environment(session, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    session()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": "0"}, "seed must be a whole number"),
        ({"device": "gpu"}, "unknown device 'gpu'.* cuda"),
        ({"profile": "smok"}, "did you mean 'smoke'"),
    ],
)
def test_start_refuses_wrong_parameters(wrong, message):
    with pytest.raises(ValueError, match=message):
        start(**{"notebook": "00_tiny", "device": "cpu", **wrong})
