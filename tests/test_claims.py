from __future__ import annotations

import configparser
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from c2r_core.artefacts.results import plain
from c2r_core.notebook import start
from c2r_core.notebook.claims import (
    MEASURED,
    MOST_DIGITS,
    claim_lines,
    counted,
    judge,
    judge_interval,
)
from c2r_core.statistics import Interval


@pytest.fixture
def session(monkeypatch, tmp_path):
    """Opens a session that writes below tmp_path."""
    monkeypatch.setenv("C2R_RUNS", str(tmp_path))

    def open_session(profile="default", **arguments):
        return start(notebook="00_tiny", profile=profile, device="cpu", **arguments)

    return open_session


def written(tmp_path, name="default/00_tiny.json"):
    return json.loads((tmp_path / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("value", "bound", "line"),
    [
        (0.5, {"at_most": 0.5}, "[guard holds] ratio: measured 0.50, at most 0.5"),
        (0.501, {"at_most": 0.5}, "[guard FAILS] ratio: measured 0.501, at most 0.5"),
        (torch.tensor(3), {"at_least": 3}, "[guard holds] ratio: measured 3, at least 3"),
        (np.float32(2), {"between": (0, 1)}, "[guard FAILS] ratio: measured 2.0, between 0 and 1"),
        (
            1.0001,
            {"equals": 1, "tolerance": 0.001},
            "[guard holds] ratio: measured 1.0, equal to 1 within 0.001",
        ),
        (-0.00152, {"at_most": 0}, "[guard holds] ratio: measured −0.0015, at most 0"),
        (684102, {"at_least": 1}, "[guard holds] ratio: measured 684102, at least 1"),
        ("a", {"equals": "a"}, "[guard holds] ratio: measured a, equal to a"),
        (torch.tensor(True), {}, "[guard holds] ratio"),
        (False, {}, "[guard FAILS] ratio"),
    ],
)
def test_line(value, bound, line):
    assert judge("guard", "ratio", value, **bound).line == line


def test_a_check_prints_a_number_only_where_it_fails():
    assert judge("check", "loss", 2.24, equals=2.24).line == "[check holds] loss: equal to 2.24"
    assert (
        judge("check", "loss", 2.5, equals=2).line == "[check FAILS] loss: measured 2.5, equal to 2"
    )


@pytest.mark.parametrize(
    ("interval", "bound", "line"),
    [
        ((-0.098, -0.233, 0.038), {"at_most": 0}, "FAILS measured −0.10 [−0.23, +0.04]"),
        (Interval(-0.098, -0.233, -0.038), {"at_most": 0}, "holds measured −0.10 [−0.23, −0.04]"),
        ((0.5, 0.4, 0.6), {"at_least": 0.4}, "holds measured 0.50 [0.40, 0.60]"),
        ((0.5, 0.4, 0.6), {"at_most": 0.5}, "FAILS measured 0.50 [0.40, 0.60]"),
        ((0.0, -0.02, 0.03), {"between": (-0.05, 0.05)}, "holds measured +0.000 [−0.020, +0.030]"),
        ((0.0, -0.06, 0.03), {"between": (-0.05, 0.05)}, "FAILS measured +0.000 [−0.060, +0.030]"),
        ((0.98, 0.978, 0.982), {"at_least": 0.9}, "holds measured 0.980 [0.978, 0.982]"),
        ((-0.1, -0.2, 0.0004), {"at_most": 0}, "FAILS measured −0.1000 [−0.2000, +0.0004]"),
        ((-1e-9, -0.074, 0.075), {"at_most": 0}, "FAILS measured −0.000 [−0.074, +0.075]"),
        ((float("nan"),) * 3, {"at_most": 0}, "FAILS measured nan [nan, nan]"),
        (None, {"at_most": 0}, "not measured measured "),
    ],
)
def test_a_claim_rests_on_the_end_of_its_interval(interval, bound, line):
    claim = judge_interval("difference", interval, **bound)
    assert f"{claim.verdict} measured {claim.measured}" == line


def test_a_claim_that_nothing_was_measured_for_is_not_counted(session, capsys):
    session().claim("it falls", None, at_most=0, n="0 SAEs", reason="0 is no fall", about="toy")
    printed = capsys.readouterr().out
    assert printed.startswith("[claim not measured] (toy, C²R) it falls: expected at most 0")
    (line,) = claim_lines([{"name": "stdout", "text": printed}])
    assert line.about == ("toy", "C²R") and counted([line])[line.about] == (0, 0)


def test_a_claim_says_what_it_is_about_and_rests_on(session, capsys):
    session().claim(
        "C²R lowers absorption",
        (-0.098, -0.233, 0.038),
        at_most=0,
        n="22 letters",
        reason="0 is no change",
        about="language model",
    )
    assert capsys.readouterr().out == (
        "[claim FAILS] (language model, C²R) C²R lowers absorption: measured −0.10 [−0.23, +0.04], "
        "expected at most 0; n = 22 letters; because 0 is no change\n"
    )


@pytest.mark.parametrize("value", [math.nan, None, torch.tensor(math.nan)])
@pytest.mark.parametrize(
    "bound",
    [{"at_least": -math.inf}, {"at_most": math.inf}, {"between": (0, 1)}, {"equals": 0}],
)
def test_what_was_not_measured_never_holds(value, bound):
    assert judge("guard", "it is a number", value, **bound).verdict == "FAILS"


@given(value=st.floats(allow_nan=True), bound=st.floats(-1e6, 1e6))
def test_without_its_number_a_line_tells_the_verdict_and_nothing_else(value, bound):
    def compared(value):
        line = judge("guard", "ratio", value, at_most=bound).line
        (found,) = claim_lines([{"name": "stdout", "text": line}])
        return found.compared

    holds = judge("guard", "ratio", value, at_most=bound).verdict == "holds"
    assert compared(value) == compared(bound - 1 if holds else math.inf)


@given(mean=st.floats(-1e4, 1e4), width=st.floats(0, 1e3), bound=st.floats(-1e4, 1e4, width=16))
def test_rounding_never_contradicts_a_verdict(mean, width, bound):
    claim = judge_interval("x", (mean, mean - width, mean + width), at_most=bound)
    printed = float(claim.measured.split(", ")[1].rstrip("]").replace("−", "-"))
    if claim.verdict == "FAILS":
        assert printed >= round(bound, MOST_DIGITS)
    else:
        assert printed <= round(bound, MOST_DIGITS)


def test_nbval_masks_what_a_comparison_leaves_out():
    masks = configparser.ConfigParser()
    masks.read(Path(__file__).parent / "nbval_sanitize.cfg", encoding="utf-8")
    assert masks["measured"]["regex"] == MEASURED


def test_a_number_needs_one_bound():
    with pytest.raises(ValueError, match="no bound"):
        judge("check", "ratio", 0.5)
    with pytest.raises(ValueError, match="more than one bound"):
        judge("check", "ratio", 0.5, at_least=0, at_most=1)
    with pytest.raises(ValueError, match="exactly one"):
        judge_interval("ratio", (0, -1, 1))
    with pytest.raises(ValueError, match="an interval"):
        judge_interval("ratio", (0, 1), at_most=0)


OF_A_CLAIM = {"n": "3 seeds", "reason": "of x", "about": "toy"}


def test_a_claim_is_about_something_known(session):
    with pytest.raises(ValueError, match="'toys'; did you mean 'toy'"):
        session().claim("x", (0, 0, 0), at_most=0, **OF_A_CLAIM | {"about": "toys"})


def test_lines_are_found_again_in_outputs_and_claims_alone_are_counted(session, capsys):
    nb = session()
    nb.check("one", 1, equals=1)
    print("noise")
    nb.guard("two", 1, at_least=2)
    nb.claim("three", (0.5, 0.4, 0.6), at_least=0, **OF_A_CLAIM)
    nb.claim("four", (0.5, 0.4, 0.6), at_most=0, **OF_A_CLAIM, subject="others")
    nb.lead("five", (0.5, 0.4, 0.6), n="1 seed")
    outputs = [
        {"output_type": "display_data", "data": {}},
        {"output_type": "stream", "name": "stdout", "text": capsys.readouterr().out},
    ]
    lines = claim_lines(outputs)
    assert [line.compared for line in lines] == [
        "[check holds] one: equal to 1",
        "[guard FAILS] two: measured …, at least 2",
        "[claim holds] (toy, C²R) three: measured …, expected at least 0; n = 3 seeds; because of x",
        "[claim FAILS] (toy, others) four: measured …, expected at most 0; n = 3 seeds; because of x",
        "[lead] five: measured …; n = 1 seed",
    ]
    counts = counted(lines)
    assert counts["toy", "C²R"] == (1, 0) and counts["toy", "others"] == (0, 1)
    assert sum(map(sum, counts.values())) == 2


def test_a_single_pair_carries_no_claim(session, capsys):
    nb = session()
    nb.claim("x", (0.5, math.nan, math.nan), at_least=0, **OF_A_CLAIM)
    nb.claim("y", None, at_least=0, **OF_A_CLAIM)
    lead, claim = capsys.readouterr().out.splitlines()
    assert lead == "[lead] x (toy, C²R): measured 0.50; n = 3 seeds"
    assert claim.startswith("[claim not measured] (toy, C²R) y")


def test_smoke_judges_identities_and_nothing_else(session, capsys):
    nb = session("smoke")
    nb.check("shapes agree", 3, equals=4)
    nb.guard("the probe reads letters", 0.0, at_least=1)
    nb.claim("training helps", (0, 0, 0), at_least=1, **OF_A_CLAIM)
    nb.lead("it may", (0, 0, 0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[check FAILS] shapes agree")
    assert lines[1].startswith("[guard not judged in smoke] the probe reads letters: at least 1")
    assert lines[2].startswith("[claim not judged in smoke] (toy, C²R) training helps: expected")
    assert "measured" not in "".join(lines[1:])


@dataclass(frozen=True)
class Measured:
    fvu: float
    per_seed: torch.Tensor


def test_results_hold_claims_numbers_and_where_they_come_from(session, tmp_path, capsys):
    nb = session(seed=0)
    nb.record(core=Measured(0.25, torch.tensor([1.0, math.nan])), words=("a", np.int64(3)))
    nb.guard("small", 0.25, at_most=1)
    nb.claim("rise", (0.5, 0.25, math.nan), at_least=0, **OF_A_CLAIM)
    capsys.readouterr()
    nb.finish()
    assert capsys.readouterr().out == ""
    result = written(tmp_path)
    assert result["schema"] == 1
    assert result["records"] == {
        "core": {"fvu": 0.25, "per_seed": [1.0, None]},
        "words": ["a", 3],
    }
    guard, claim = result["claims"]
    assert guard["kind"] == "guard" and guard["value"] == 0.25 and guard["verdict"] == "holds"
    assert claim["value"] == [0.5, 0.25, None] and claim["about"] == "toy"
    assert claim["n"] == "3 seeds" and claim["expectation"] == "at least 0"
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


def test_a_session_gives_every_cell_of_a_study_by_name(session, monkeypatch):
    from c2r_core.artefacts import cells
    from c2r_core.experiments import CHOSEN_BEFORE, MAIN, STUDIES

    made = SimpleNamespace(
        cells=lambda profile, seed, device: [
            SimpleNamespace(name=f"arm-seed{seed}", kept=profile.name, compute=lambda: "live")
        ]
    )
    monkeypatch.setitem(sys.modules, "a_study", made)
    monkeypatch.setitem(STUDIES, "mine", "a_study")
    monkeypatch.setattr(cells, "read_or_compute", lambda cell, mode: (cell.kept, mode))
    assert session(seed=3).cells("mine") == {"arm-seed3": ("default", "kept")}
    assert session(seed=3).cells("mine", live=True) == {"arm-seed3": "live"}
    # What the settings were chosen by is read where all else is computed again.
    monkeypatch.setenv("C2R_CELLS", "anew")
    assert session().cells("mine") == {"arm-seed0": ("default", "anew")}
    for study in CHOSEN_BEFORE:
        monkeypatch.setitem(STUDIES, study, "a_study")
        assert session().cells(study) == {"arm-seed0": ("default", "kept")}
    # The main results are computed again, the others read.
    monkeypatch.setenv("C2R_CELLS", "main")
    assert session().cells("mine") == {"arm-seed0": ("default", "kept")}
    monkeypatch.setitem(MAIN, "mine", ("seed0",))
    assert session().cells("mine") == {"arm-seed0": ("default", "anew")}
    with pytest.raises(ValueError, match="unknown study 'mien'; did you mean 'mine'"):
        session().cells("mien")


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


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda:1' is not available here"):
        start(notebook="00_tiny", profile="smoke", seed=0, device="cuda:1")
