"""CONTRIBUTING.md: its four changes are short, apply to the present code, and pass their own tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from c2r_core.artefacts import fingerprints as fingerprints_module
from c2r_core.artefacts.fingerprints import fingerprints
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import STUDIES, cells
from c2r_core.notebook import files as notebook_files
from c2r_core.notebook import runner
from conftest import PROJECT

GIT = shutil.which("git")
PAGE = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^### An? (\w+)$.*?^```diff\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
OWN_TESTS = "multi_topk or frame_potential or welchs_bound or linear_error or test_house"
MENDED_BY_EXECUTING = ("not in canonical form", "execution counts", "no figure", "no verdict")

pytestmark = pytest.mark.skipif(GIT is None, reason="git is not installed")


def git_apply(diff: str, folder, *options: str) -> None:
    done = subprocess.run(
        [GIT, "apply", *options, "-"],
        cwd=folder,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
        input=diff,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the project in which all four changes are made."""
    copy = tmp_path_factory.mktemp("changed") / "copy"
    for room in ("c2r_core", "notebooks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(PROJECT / room, copy / room, ignore=ignored)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(PROJECT / name, copy)
    for diff in DIFFS.values():
        git_apply(diff, copy)
    return copy


def run(folder, *command: str) -> str:
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = outer | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_four():
    assert list(DIFFS) == ["architecture", "regulariser", "metric", "notebook"]


@pytest.mark.parametrize("kind", DIFFS)
def test_each_is_short_and_applies_by_itself(kind):
    assert len(DIFFS[kind].splitlines()) < 60
    git_apply(DIFFS[kind], PROJECT, "--check")


def test_they_pass_their_own_tests_and_those_of_the_house(changed):
    names = ("house", "linear_error", "regularisers", "saes")
    paths = [f"tests/test_{name}.py" for name in names]
    said = run(changed, "pytest", "-v", "-p", "no:cacheprovider", *paths, "-k", OWN_TESTS)
    for name in ("test_multi_topk_", "[multi_topk]", "[frame_potential]", "test_three_", "linear"):
        assert re.search(rf"{re.escape(name)}.* PASSED", said), name
    assert "test_no_file_is_long[metrics.linear_error] PASSED" in said
    assert "SKIPPED" not in said


def test_they_pass_the_lint(changed):
    assert "All checks passed!" in run(changed, "ruff", "check", "--no-cache", ".")
    said = run(changed, "ruff", "format", "--no-cache", "--check", "c2r_core", "tests")
    assert "would be reformatted" not in said


def test_they_make_no_cell_stale(changed, monkeypatch):
    smoke = load_profile("smoke")
    made = {f"{study}/{one.name}": one for study in STUDIES for one in cells(study, smoke)}
    before = {name: fingerprints(one.modules) for name, one in made.items()}
    monkeypatch.setattr(fingerprints_module, "PACKAGE", changed / "c2r_core")
    assert "c2r_core.saes.multi_topk" in fingerprints(["c2r_core.saes.multi_topk"])
    assert [name for name, one in made.items() if fingerprints(one.modules) != before[name]] == []


def test_the_notebook_runs_and_lacks_only_what_executing_it_brings(changed, tmp_path):
    (name,) = re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)$", DIFFS["notebook"], re.MULTILINE)
    found = notebook_files.problems(changed / name)
    assert [one for one in found if not re.search("|".join(MENDED_BY_EXECUTING), one)] == []
    runner.run(changed / name, tmp_path / "out.ipynb", {"PROFILE": "smoke"})
    (line,) = notebook_files.verdicts(notebook_files.read(tmp_path / "out.ipynb"))
    assert line.kind == "claim"


def test_every_link_leads_somewhere():
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose)}
    files = {link for link in links if link and "://" not in link}
    assert len(files) > 4 and [name for name in files if not (PROJECT / name).exists()] == []


def test_every_make_target_exists():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for name in set(re.findall(r"`make\s+(\w+)", PAGE)):
        assert re.search(rf"^{name}[:/]", makefile, flags=re.MULTILINE), name
