"""The exercises: every folded solution passes every check, and every stub fails with its own message."""

from __future__ import annotations

import os
import re

import pytest
import torch
from nbclient import NotebookClient
from traitlets.config import Config

from c2r_core import c2r_loss
from c2r_core.notebook import files as notebook_files
from c2r_core.notebook.runner import KERNEL_ENVIRONMENT
from c2r_core.training import REGULARISERS
from conftest import PROJECT

FOLDER = PROJECT / "exercises"
CLASSES = sorted(FOLDER.glob("class_*.ipynb"))
EXERCISES = "1a 1b 1c 2a 2b 2c 2d 2e 3a 3b 3c 3d 4a 4b 4c 5a 5b".split()

SOLUTION = re.compile(
    r"<summary>Solution (\w+)</summary>\n\n```python\n(.*?)```.*?</details>", re.DOTALL
)
STUB = re.compile(r'raise NotImplementedError\("Exercise (\w+): ')
CHECK = re.compile(r"^checks\.check_(\w+)\(")
FILE = re.compile(r"# (\w+\.py)\n")


def solutions(notebook) -> dict[str, str]:
    """The folded solutions by exercise."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return dict(SOLUTION.findall(text))


def cells(notebook, pattern: re.Pattern) -> dict:
    """The code cells in which a pattern is found, by the exercise that it names."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {match[1]: cell for cell in code if (match := pattern.search(cell.source))}


def execute(notebook, folder, monkeypatch, *, allow_errors: bool) -> None:
    """Run all cells in a folder of their own; checks.py is found where it lies."""
    paths = [str(FOLDER), str(PROJECT)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name, value in KERNEL_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    sockets = Config({"KernelManager": {"transport": "ipc", "ip": str(folder / "kernel")}})
    NotebookClient(
        notebook,
        kernel_name="python3",
        allow_errors=allow_errors,
        resources={"metadata": {"path": str(folder)}},
        config=sockets,
        extra_arguments=["--log-level=CRITICAL"],
    ).execute()


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.stem)
def test_the_notebook_is_ready_for_a_student(path):
    notebook = notebook_files.read(path)
    assert path.read_text(encoding="utf-8") == notebook_files.canonical(notebook)
    assert notebook_files.awaits_evidence(notebook), "it is committed without outputs"
    text = "\n".join(cell.source for cell in notebook.cells)
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if not (FOLDER / link).exists()] == []
    labels = set(cells(notebook, CHECK))
    assert labels == set(solutions(notebook)) == set(re.findall(r"<summary>Hint (\w+)<", text))
    assert labels == set(re.findall(r"^### Exercise (\w+): .*\(\d+ minutes\)", text, re.MULTILINE))


def test_every_exercise_is_there():
    found = [label for path in CLASSES for label in cells(notebook_files.read(path), CHECK)]
    assert found == EXERCISES


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.stem)
def test_the_solutions_pass(path, tmp_path, monkeypatch):
    notebook = notebook_files.read(path)
    stubs = cells(notebook, STUB)
    for label, code in solutions(notebook).items():
        if file := FILE.match(code):
            (tmp_path / file[1]).write_text(code, encoding="utf-8")
        else:
            stubs.pop(label).source = code
    assert not stubs, "no solution"
    execute(notebook, tmp_path, monkeypatch, allow_errors=False)
    for label, cell in cells(notebook, CHECK).items():
        assert cell.outputs[0].text.startswith(f"Exercise {label} passes.")


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.stem)
def test_a_stub_fails_with_its_message(path, tmp_path, monkeypatch):
    notebook = notebook_files.read(path)
    imports, *code = (cell for cell in notebook.cells if cell.cell_type == "code")
    asked = [cell for cell in code if STUB.search(cell.source) or CHECK.search(cell.source)]
    notebook.cells = [imports, *asked]  # what is trained in between needs the solutions
    execute(notebook, tmp_path, monkeypatch, allow_errors=True)
    for label, cell in cells(notebook, CHECK).items():
        (error,) = cell.outputs
        assert error.ename == "CheckFailed"
        assert error.evalue.startswith(f"Exercise {label}"), error.evalue
        assert error.traceback == error.evalue.splitlines(), "the message alone is shown"
    stubs = cells(notebook, STUB)
    assert set(stubs) == set(cells(notebook, CHECK)) - {"5b"}, "5b asks for a file"
    assert all(not cell.outputs for cell in stubs.values())


# -- what a check says of a wrong answer -----------------------------------------------------------

WRONG = [
    ("1a", "cosines.fill_diagonal_(-torch.inf)", "pass", "the diagonal"),
    ("1a", "W_dec / W_dec.norm(dim=1, keepdim=True)", "W_dec", "the row lengths"),
    ("1a", "(unit @ unit.T)", "(unit @ unit.T).abs()", "the sign"),
    ("1b", "dim=0", "dim=1", "the axis"),
    ("1b", "return ", "", "does it return"),
    ("1b", ".norm(dim=0)", ".square().mean(dim=0).sqrt()", "not of a mean"),
    ("1c", ".mean()", ".sum()", "the mean"),
    ("1c", ".clamp(min=0)", "", "max(0, cosine)"),
    ("1c", " ** alpha", "", "alpha"),
    ("1c", "sum(dim=1)", "sum(dim=1).detach()", "s_i is computed from W_dec"),
    ("1c", "batch_norms(feature_acts)", "batch_norms(feature_acts).detach()", "n_i is computed"),
    ("2a", "[2, 1, 0]", "[2, 1, 1]", "only renumbers"),
    ("2a", ", [2, 1, 0]", "", "three things"),
    ("2a", "[1.0, 2.0, 3.0]", "[2.0, 2.0, 2.0]", "ties"),
    ("2b", "[0.0, 0.0, 2.0]", "[1.0, 0.0, 2.0]", "the slope of √n"),
    ("2c", "torch.where(active, pair_norms, 1.0)", "pair_norms", "entries that are NaN"),
    ("2c", "pair_norms, 1.0)", "pair_norms + 1e-3, 1.0)", "given"),
    ("2d", "feature_acts.split(1)", "[feature_acts]", "the batch axis"),
    ("2e", " ** 0.5", "", "fourfold"),
    ("3a", " - x[~present].mean(dim=0)", "", "what else is in x"),
    ("3a", " / direction.norm()", "", "normalise"),
    ("3b", "torch.where(live, W_dec @ direction, -1.0)", "(W_dec @ direction)", "the dead"),
    ("3b", "W_dec @ direction", "(W_dec @ direction).abs()", "the sign"),
    ("3c", "parent_on & ~child_on.any(dim=1)", "parent_on", "which samples count"),
    ("3d", "feature_acts[missed]", "feature_acts", "`missed`"),
    ("3d", " * (W_dec @ direction)", "", "the direction"),
    ("4a", "sorted(strengths)", "strengths", "the rule"),
    ("4a", "for seed in seeds) / len(seeds)", "for seed in seeds[:1])", "a look at seeds [0]"),
    ("4b", "score(0.0, seed)", "score(0.1, seed)", "peeking"),
    (
        "4b",
        "score(strength, seed) - score(0.0, seed)",
        "score(0.0, seed) - score(strength, seed)",
        "the pairs",
    ),
    ("4c", "fresh.gather(1, winner)", "fresh.amin(1)", "the winner"),
    (
        "5a",
        "feature_acts * feature_acts[:, index]",
        "feature_acts * feature_acts",
        "sample by sample",
    ),
    ("5a", " ** 2", "", "s_i"),
    (
        "5b",
        "(similarity * together).mean()",
        "(similarity * together).mean().detach()",
        "gradients",
    ),
    ("5b", "(similarity * together).mean()", "(similarity * together).sum() * 0", "gradients"),
]
"""Exercise, a part of its solution, what a student may write instead, and what the check then says."""


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import checks

    known = dict(REGULARISERS)
    yield checks
    REGULARISERS.clear()  # 5b registers the student's
    REGULARISERS.update(known)


@pytest.mark.parametrize(("label", "right", "wrong", "said"), WRONG)
def test_a_mistake_is_named(label, right, wrong, said, checks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = notebook_files.read(CLASSES[label > "3"])
    known = solutions(notebook)
    assert right in known[label]
    known[label] = known[label].replace(right, wrong)
    names = {"torch": torch, "Tensor": torch.Tensor, "c2r_loss": c2r_loss}
    for one, code in known.items():
        if file := FILE.match(code):
            (tmp_path / file[1]).write_text(code, encoding="utf-8")
        elif one <= label:
            exec(code, names)
    check = cells(notebook, CHECK)[label].source
    with pytest.raises(checks.CheckFailed, match=f"Exercise {label} is not right") as failed:
        exec(check, names | {"checks": checks})
    assert said in str(failed.value)
    for word in ("given", "expected", "got", "look at"):
        assert f"\n  {word}" in str(failed.value)


def test_an_error_of_the_students_own_says_what_was_given(checks):
    with pytest.raises(TypeError) as raised:
        checks.check_1b(lambda feature_acts: len(None))
    assert "Exercise 1b: this was raised for feature_acts = " in raised.value.__notes__[0]
