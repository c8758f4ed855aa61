"""A change of code that alters no number is shown by computation, recorded and excused; nothing else is."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from c2r_core.artefacts import cells as cell_module
from c2r_core.artefacts import same_code
from c2r_core.artefacts.cells import Cell, read_or_compute, state
from c2r_core.artefacts.fingerprints import fingerprints
from c2r_core.artefacts.profiles import load_profile
from c2r_core.artefacts.results import results_dir, runs_dir
from c2r_core.artefacts.same_code import Commits, SameCode, SameCodeError, add_same_code
from c2r_core.experiments import __main__, cells, one_side, same
from conftest import PROJECT

FILES = {
    "pyproject.toml": "",
    "c2r_core/__init__.py": "",
    "c2r_core/artefacts/__init__.py": "",
    "c2r_core/artefacts/profiles.py": "def load_profile(name):\n    return name\n",
    "c2r_core/artefacts/cells.py": (
        "from dataclasses import dataclass, field\n"
        "from c2r_core.artefacts.fingerprints import fingerprints\n"
        "@dataclass\n"
        "class Cell:\n"
        "    study: str\n    name: str\n    compute: object\n    modules: tuple\n"
        "    settings: dict = field(default_factory=dict)\n"
        "    def about(self):\n"
        "        return {'schema': 1, 'study': self.study, 'name': self.name, 'inputs': {},\n"
        "                'settings': self.settings, 'modules': fingerprints(self.modules)}\n"
        "def compute(cell):\n    return cell.compute()\n"
    ),
    "c2r_core/experiments/__init__.py": (
        "from c2r_core.artefacts.cells import Cell\n"
        "from c2r_core import losses, timing, toy\n"
        "STUDIES = {'toy': '', 'other': ''}\n"
        "SETTINGS = {'steps': 5}\n"
        "def cells(study, profile, seed=0, device='cpu'):\n"
        "    if study == 'other':\n"
        "        return [Cell('other', 'one', losses.loss, ('c2r_core.losses',)),\n"
        "                Cell('other', 'timed', timing.timed, ('c2r_core.toy', 'c2r_core.timing'))]\n"
        "    return [Cell('toy', 'one', toy.measure, ('c2r_core.toy',), SETTINGS)]\n"
    ),
    "c2r_core/losses.py": "def loss():\n    return 0.5\n",
    "c2r_core/timing.py": "def timed():\n    return {'seconds': 1}\n",
    "c2r_core/toy.py": (
        "import time\n"
        "def measure():\n"
        "    return {'fvu': [0.1 + 0.2, None], 'seconds': time.monotonic()}\n"
    ),
}
SAME_NUMBER = FILES["c2r_core/toy.py"].replace("0.1 + 0.2", "0.2 + 0.1")


class Repository:
    """A small project in git, whose package has the parts of this one that `c2r same` runs."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.git("init", "--quiet")
        for name, text in FILES.items():
            self.write(name, text)
        copied = "c2r_core/artefacts/fingerprints.py"
        shutil.copy(PROJECT / copied, folder / copied)
        self.commit()

    def git(self, *arguments):
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run([shutil.which("git"), "-C", str(self.folder), *who, *arguments], check=True)

    def write(self, name, text):
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def commit(self, **changed):
        """Commit all, with new texts of modules of the package."""
        for name, text in changed.items():
            self.write(f"c2r_core/{name}.py", text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "change")


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    monkeypatch.setenv("C2R_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("C2R_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("C2R_CELLS", raising=False)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    made = Repository(tmp_path / "project")
    monkeypatch.setattr(same, "checkout", lambda: made.folder)
    return made


def recorded():
    return {(r.module, r.was is None): r.shown_by for r in same_code.same_code()}


# -- showing it -----------------------------------------------------------------------------------


def test_equal_numbers_are_recorded_and_what_no_cell_reaches_is_named(repository, capfd):
    repository.commit(toy=SAME_NUMBER, losses="def loss():\n    return 1 / 2\n")
    assert same.same("HEAD~1", ["toy/one"], "the sum in another order") == 0
    assert recorded() == {("c2r_core.toy", False): ["toy/one"]}
    assert (
        "Not shown, since none of these cells depends on it: c2r_core.losses"
        in capfd.readouterr().out
    )
    (record,) = same_code.same_code()
    assert record.commits.was != record.commits.now and record.why == "the sum in another order"
    assert record.provenance["torch_version"] and record.provenance["date"]
    assert same.same("HEAD~1", ["other/one"], "a quotient") == 0
    assert len(same_code.same_code()) == 2, "records are added to those that are there"


def test_a_module_that_is_split_is_recorded_with_its_new_part(repository):
    repository.commit(
        toy="from c2r_core.sums import total\ndef measure():\n    return {'fvu': [total(), None]}\n",
        sums="def total():\n    return 0.1 + 0.2\n",
    )
    assert same.same("HEAD~1", ["toy/one"], "split") == 0
    assert recorded() == {
        ("c2r_core.sums", True): ["toy/one"],
        ("c2r_core.toy", False): ["toy/one"],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            SAME_NUMBER.replace("0.2 + 0.1", "0.3"),
            "toy/one: fvu[0] was 0.30000000000000004, is 0.3",
        ),
        (SAME_NUMBER.replace("None", "-0.0"), "toy/one: fvu[1] was null, is -0.0"),
        (
            SAME_NUMBER.replace("'fvu'", "'mse'"),
            "toy/one: fvu[0] was 0.30000000000000004, is nothing",
        ),
    ],
)
def test_a_changed_number_is_named_and_nothing_is_recorded(repository, capfd, text, said):
    repository.commit(toy=text)
    assert same.same("HEAD~1", ["toy/one"], "no change, it was thought") == 1
    assert said in capfd.readouterr().out
    assert not same_code.same_code_file().exists()


def test_numbers_are_compared_to_the_bit():
    assert list(same._unlike("a", {"x": [0.0, 1]}, {"x": [0.0, 1]})) == []
    assert list(same._unlike("a", 0.0, -0.0)) == ["a: its value was 0.0, is -0.0"]
    assert list(same._unlike("a", [1], [1.0])) and list(same._unlike("a", [], {}))
    assert list(same._unlike("a", {"seconds_all": 1, "x": 1}, {"seconds_all": 2, "x": 1})) == []


def test_what_cannot_be_compared_is_refused(repository):
    def refused(message, names=("toy/one",), revision="HEAD~1", why="because"):
        with pytest.raises(SameCodeError, match=message):
            same.same(revision, names, why)

    repository.commit(unused="")
    refused("no module that these cells depend on differs")
    refused("--why is empty", why=" ")
    refused("git rev-parse failed", revision="of last year")
    refused("has no cell toy/two", names=["toy/two"])
    repository.write("c2r_core/toy.py", SAME_NUMBER)
    refused(r"c2r_core differs from what is committed.*\n.*toy\.py")
    repository.commit()
    refused("timed holds times and memory alone", names=["other/timed"])
    repository.commit(toy="def measure():\n    return 1 / 0\n")
    refused("the code of .* failed")
    settings = FILES["c2r_core/experiments/__init__.py"].replace("'steps': 5", "'steps': 6")
    repository.commit(**{"experiments/__init__": settings})
    refused("another measurement in the two revisions: setting steps differs")
    assert not same_code.same_code_file().exists()


def test_without_git_or_with_another_package_it_says_so(repository, monkeypatch):
    monkeypatch.setattr(same.shutil, "which", lambda name: None)
    with pytest.raises(SameCodeError, match="needs git"):
        same.same("HEAD", ["toy/one"], "because")
    side = same._Side("f" * 40, repository.folder, ["toy/one"], "default", "cpu")
    with pytest.raises(SameCodeError, match="Python takes c2r_core from .*, not from fffffff"):
        same._all_there(side, {"package": "/elsewhere/c2r_core", "cells": {}})


def test_one_side_speaks_of_the_cells_of_this_package(monkeypatch):
    monkeypatch.setattr(one_side, "STUDIES", {"toy": ""})
    said = one_side.about("smoke", "cpu", ["toy/relu-baseline", "toy/none"])
    (about,) = said["cells"].values()
    assert about["modules"].items() <= said["modules"].items()
    found = one_side.values("smoke", "cpu", ["toy/relu-baseline"])
    assert list(same._unlike("", found, one_side.values("smoke", "cpu", list(found)))) == []


# -- resting on it --------------------------------------------------------------------------------


def cell(**changes) -> Cell:
    made = Cell(
        study="toy",
        name="relu",
        profile="default",
        settings={"steps": 5},
        compute=lambda: {"fvu": 0.5},
        modules=("c2r_core.seeds", "c2r_core.statistics"),
        inputs={"model": "abc"},
    )
    return replace(made, **changes)


NOW = fingerprints(cell().modules)
OLD, OLDER = "0" * 12, "1" * 12


def keep(modules, values=None):
    """Write the committed cell as computed with modules of these hashes."""
    content = cell().about() | {"modules": modules, "values": values or {"fvu": 0.5}}
    content["digest"] = cell_module._digest(content)
    file = cell().file(results_dir("default"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def record(module, was, now):
    commits = Commits(was="a" * 40, now="b" * 40)
    add_same_code(
        [
            SameCode(
                module=module,
                was=was,
                now=now,
                why="a check more",
                shown_by=["toy/one"],
                commits=commits,
                provenance={"date": "2001-01-01"},
            )
        ]
    )


def test_a_cell_of_code_that_was_shown_to_be_the_same_is_current(capsys):
    keep(NOW | {"c2r_core.seeds": OLD})
    assert state(cell()) == ("stale", "module c2r_core.seeds")
    record("c2r_core.seeds", OLD, NOW["c2r_core.seeds"])
    assert state(cell()) == ("current", "same code c2r_core.seeds")
    unused = cell(compute=lambda: pytest.fail("computed although it is current"))
    assert read_or_compute(unused) == {"fvu": 0.5}


def test_records_make_a_chain_in_their_direction():
    keep(NOW | {"c2r_core.seeds": OLDER})
    record("c2r_core.seeds", OLD, NOW["c2r_core.seeds"])
    assert state(cell()).kind == "stale"
    record("c2r_core.seeds", OLD, OLDER)
    assert state(cell()).kind == "stale", "that the older one follows from the old one says nothing"
    record("c2r_core.seeds", OLDER, OLD)
    assert state(cell()).kind == "current"


def test_a_module_that_was_not_there_needs_a_record_of_its_own():
    keep({"c2r_core.seeds": OLD})
    record("c2r_core.seeds", OLD, NOW["c2r_core.seeds"])
    assert state(cell()) == ("stale", "module c2r_core.statistics")
    record("c2r_core.statistics", None, NOW["c2r_core.statistics"])
    assert state(cell()).kind == "current"


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"settings": {"steps": 6}}, "setting steps"), ({"inputs": {"model": "abd"}}, "input model")],
)
def test_settings_and_inputs_are_never_excused(changes, why):
    keep(NOW | {"c2r_core.seeds": OLD})
    record("c2r_core.seeds", OLD, NOW["c2r_core.seeds"])
    assert state(cell(**changes)) == ("stale", why)


def test_times_are_never_excused_since_they_were_not_compared():
    keep(NOW | {"c2r_core.seeds": OLD}, values=[{"fvu": 0.5, "seconds_ours": 1.0}])
    record("c2r_core.seeds", OLD, NOW["c2r_core.seeds"])
    assert state(cell()) == ("stale", "module c2r_core.seeds")


@pytest.mark.parametrize(
    "change",
    [
        {"now": "2" * 12},
        {"now": "sha512:2"},
        {"shown_by": []},
        {"why": " "},
        {"provenance": {}},
        {"digest": ""},
        {"more": 1},
    ],
)
def test_an_edited_record_is_refused(change, capsys):
    keep(NOW | {"c2r_core.seeds": OLD})
    record("c2r_core.seeds", OLD, NOW["c2r_core.seeds"])
    file = same_code.same_code_file()
    (content,) = json.loads(file.read_text())
    file.write_text(json.dumps([content | change]))
    with pytest.raises(SameCodeError, match=r"same_code\.json is not what c2r same wrote"):
        state(cell())


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 10_000, "\xff"])
def test_a_damaged_file_of_records_is_refused(text):
    file = same_code.same_code_file()
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="latin-1")
    with pytest.raises(SameCodeError, match="is not what c2r same wrote .*restore it from git"):
        same_code.same_code()


@pytest.mark.parametrize(
    "command", [["status", "toy"], ["same", "HEAD", "toy/relu-c2r", "--why", "because"]]
)
def test_a_command_that_meets_a_damaged_file_of_records_says_so(command, capsys):
    same_code.same_code_file().parent.mkdir(parents=True)
    same_code.same_code_file().write_text("{")
    assert __main__.main([*command, "--profile", "smoke"]) == 2
    assert f"c2r {command[0]}: " in (said := capsys.readouterr().err) and "restore it" in said


def test_status_says_how_many_rest_on_records(capsys):
    one = cells("toy", load_profile("smoke"))[0]
    about = one.about()
    module, now = next(iter(about["modules"].items()))
    content = about | {"modules": about["modules"] | {module: OLD}, "values": 1}
    file = one.file(runs_dir("smoke"))
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content | {"digest": cell_module._digest(content)}))
    record(module, OLD, now)
    __main__.main(["status", "toy", "--profile", "smoke"])
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["toy", "1", "0", "5", "0"]
    assert said[-1].startswith("1 of the current ones by same_code.json")
