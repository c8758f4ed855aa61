"""The committed notebooks, and what no file of the project may hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from c2r_core.artefacts.cells import state
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells
from c2r_core.notebook import files as notebook_files
from conftest import NOTEBOOKS, PROJECT

LOCAL_FOLDERS = ("home", "Users", "root", "tmp", "work")


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 6


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook(notebook):
    assert notebook_files.problems(notebook) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_without_outputs_awaits_evidence(notebook):
    """Only where committed cells of its studies are missing or stale; else it has to be executed."""
    read = notebook_files.read(notebook)
    if not notebook_files.awaits_evidence(read):
        return
    profile = load_profile("default")
    states = {
        name: {state(cell).kind for cell in cells(name, profile)}
        for name in notebook_files.studies(read)
    }
    assert any(kinds != {"current"} for kinds in states.values()), "run make refresh"


def test_a_refreshed_notebook_has_no_problem(refreshed_notebook):
    assert notebook_files.problems(refreshed_notebook) == []


def strip(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def code(position, source):
    def change(notebook):
        notebook.cells[position].source = source

    return change


def output(text):
    def change(notebook):
        notebook.cells[-1].outputs.append(nbformat.v4.new_output("stream", text=text))

    return change


def inject(notebook):
    cell = nbformat.v4.new_code_cell("SEED = 1", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(2, cell)


def fail(notebook):
    error = nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])
    notebook.cells[-1].outputs.append(error)


def drop_outputs_of(kind):
    def change(notebook):
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.output_type != kind]

    return change


def run_out_of_order(notebook):
    notebook.cells[-1].execution_count = 9


def repeat_an_id(notebook):
    notebook.cells[-1].id = notebook.cells[0].id


def untag(notebook):
    notebook.cells[1].metadata = {}


def add_papermill_metadata(notebook):
    notebook.metadata["papermill"] = {"duration": 1.5}


def grow(notebook):
    notebook.cells[0].source += "x" * 300_000


@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (strip, "execution counts are not 1 to"),
        (strip, "prints no verdict"),
        (run_out_of_order, "execution counts are not 1 to"),
        (repeat_an_id, "cell ids"),
        (untag, "0 cells tagged"),
        (inject, "injected"),
        (fail, "error output"),
        (drop_outputs_of("display_data"), "no figure"),
        (drop_outputs_of("stream"), "no verdict"),
        (grow, "larger than 300 kB"),
        (add_papermill_metadata, "not in canonical form"),
        (code(1, 'PROFILE = "default"\nSEED = 0'), r"parameters are \['PROFILE', 'SEED'\]"),
        (code(-1, "%matplotlib inline"), "magic"),
        (code(-1, "\n".join(["pass"] * 26)), "26 lines"),
        (code(-1, f"open('/{LOCAL_FOLDERS[0]}/me/x')"), "local path"),
        (code(0, "[next](01_nowhere.ipynb)"), "01_nowhere.ipynb leads nowhere"),
        (output("12 seconds"), "timing"),
        (output("10/10 [00:01<00:00, 9.5it/s]"), "timing"),
        (output("[guard not judged in smoke] an effect"), "smoke profile"),
    ],
)
def test_the_checker_finds(refreshed_notebook, tmp_path, change, problem):
    notebook = notebook_files.read(refreshed_notebook)
    change(notebook)
    path = tmp_path / "00_tiny.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    found = notebook_files.problems(path)
    assert any(re.search(problem, one) for one in found), found


def test_neighbours_must_be_linked(refreshed_notebook, tmp_path):
    for name in ("00_a.ipynb", "01_b.ipynb"):
        shutil.copy(refreshed_notebook, tmp_path / name)
    found = notebook_files.problems(tmp_path / "00_a.ipynb")
    assert found == ["no link to its neighbour 01_b.ipynb"]


def test_canonical_form_is_a_fixed_point_and_joins_streams(refreshed_notebook, tmp_path):
    text = refreshed_notebook.read_text(encoding="utf-8")
    notebook = notebook_files.read(refreshed_notebook)
    assert notebook_files.canonical(notebook) == text
    stream = notebook.cells[-1].outputs[0]
    cut = [nbformat.v4.new_output("stream", text=part) for part in stream.text.splitlines(True)]
    assert len(cut) > 1
    notebook.cells[-1].outputs = cut
    assert notebook_files.canonical(notebook) == text


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    path = tmp_path / "00_broken.ipynb"
    path.write_text("not JSON")
    with pytest.raises(ValueError, match="00_broken.ipynb is not a valid notebook"):
        notebook_files.read(path)


@pytest.fixture(scope="module")
def nbval(refreshed_notebook, tmp_path_factory):
    """What `make nbval` says of variants of one notebook, executed in one go: cells that fail, by variant."""
    text = refreshed_notebook.read_text(encoding="utf-8")
    address = notebook_files.read(refreshed_notebook)
    address.cells[-1].source = "print(object())"
    address.cells[-1].outputs = [
        nbformat.v4.new_output("stream", text="<object object at 0x7f00aa00bb00>\n")
    ]
    variants = {
        "address": json.dumps(address),
        "number": text.replace("measured 0.25 [0.12, 0.38]", "measured 0.26 [0.13, 0.39]"),
        "verdict": text.replace("[claim holds] ", "[claim FAILS] ", 1),
    }
    assert text not in variants.values()
    folder = tmp_path_factory.mktemp("variants")
    for name, content in variants.items():
        (folder / f"{name}.ipynb").write_text(content, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", str(folder), "--nbval", "--nbval-current-env"]
    command += ["-p", "tests.nbval_plugin", "-p", "no:cacheprovider"]
    command += ["--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    failed = re.findall(r"^FAILED .*?(\w+)\.ipynb::", done.stdout, re.MULTILINE)
    assert done.returncode == bool(failed)
    return {name: failed.count(name) for name in variants}


def test_nbval_passes_what_was_just_run_and_compares_no_address(nbval):
    assert nbval["address"] == 0


def test_nbval_compares_no_measured_number(nbval):
    assert nbval["number"] == 0


def test_one_altered_verdict_makes_nbval_fail(nbval):
    assert nbval["verdict"] == 1


def project_files():
    """Every text file that belongs to the project."""
    rooms = [PROJECT / name for name in (".ci", "c2r_core", "notebooks", "results", "tests")]
    paths = [*PROJECT.iterdir(), *(path for room in rooms for path in room.rglob("*"))]
    binary = (".npz", ".pyc", ".png")
    return [
        path
        for path in paths
        if path.is_file() and path.suffix not in binary and path.name != ".git"  # a worktree's
    ]


def test_no_file_names_a_folder_of_somebodys_machine():
    local = re.compile(rf"(?<![\w./:-])/({'|'.join(LOCAL_FOLDERS)})/[\w.-]+")
    naming = [
        f"{path.relative_to(PROJECT)}: {match[0]}"
        for path in project_files()
        if (match := local.search(path.read_text(encoding="utf-8")))
    ]
    assert naming == []
