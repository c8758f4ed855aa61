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


NUMBER = r"([\d.]*\d)"
SAID = {
    "class_1_the_loss": [
        (
            f"{NUMBER} with the whole batch, {NUMBER} with",
            f"(?s)costs {NUMBER} .*costs {NUMBER} ",
            0.01,
        ),
    ],
    "class_2_find_absorption": [
        (f"chosen strength, {NUMBER}", f"chosen strength: {NUMBER}", 0),
        (f"lowers absorption by about {NUMBER}", f"absorption -{NUMBER},", 0.02),
        (f"raises FVU by about {NUMBER}", rf"fvu +\+{NUMBER},", 0.002),
        (f"of {NUMBER} and {NUMBER} is left", f"weight 10 +{NUMBER} +{NUMBER}", 0.02),
        (f"FVU is {NUMBER} and {NUMBER}", f"weight 100 +\\S+ +\\S+ +{NUMBER} +{NUMBER}", 0.01),
    ],
}
"""What a class says of its outputs, what they print, and how far apart these numbers may be."""


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
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "\n".join(output.get("text", "") for cell in code for output in cell.outputs)
    for said, measured, apart in SAID[path.stem]:
        numbers = re.search(said, text), re.search(measured, printed)
        for one, other in zip(*(number.groups() for number in numbers), strict=True):
            assert abs(float(one) - float(other)) <= apart, f"{said}: it is {other}"


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
    ("1a", "dim=1, keepdim=True", "dim=0, keepdim=True", "entries differ"),
    ("1a", "(unit @ unit.T)", "(unit @ unit.T).abs()", "the sign"),
    ("1a", "(unit @ unit.T)", "(unit.T @ unit)", "the product"),
    ("1a", "argmax(dim=1)", "argmax(dim=1).float()", "a whole number"),
    ("1a", "argmax(dim=1)", "argmax(dim=1, keepdim=True)", "an axis of length 1"),
    ("1a", "argmax(dim=1)", "argmax(dim=1).tolist()", "the list"),
    ("1a", "argmax(dim=1)", "argmax(dim=1).numpy()", "NumPy"),
    ("1a", "argmax(dim=1)", "max(dim=1)", "argmax gives the index alone"),
    ("1a", "unit = W_dec / ", "unit = W_dec; unit /= ", "in place"),
    ("1b", "dim=0", "dim=1", "the axis"),
    ("1b", "return ", "", "does it return"),
    ("1b", ".norm(dim=0)", ".square().mean(dim=0).sqrt()", "not of a mean"),
    ("1b", ".norm(dim=0)", ".square().sum(dim=0).sqrt()", "whose slope at 0 is infinite"),
    ("1b", ".norm(dim=0)", ".norm(dim=0, keepdim=True)", "an axis of length 1"),
    ("1b", ".norm(dim=0)", ".norm(dim=0).detach()", "detach()"),
    ("1b", "feature_acts.norm", "feature_act.norm", "NameError: name 'feature_act'"),
    ("1c", ".mean()", ".sum()", "the mean"),
    ("1c", " ** 2", "", "the square"),
    ("1c", "W_dec / W_dec.norm(dim=1, keepdim=True)", "W_dec", "the row lengths"),
    ("1c", "norms + norms[index]", "norms * norms[index]", "their product"),
    ("1c", "norms + norms[index]", "norms", "one of the two"),
    ("1c", ".mean()", "", "the axis"),
    ("1c", ".mean()", ".mean().item()", "item() and float()"),
    ("1c", "return ", "", "does it return"),
    ("1c", ".clamp(min=0)", "", "max(0, cosine)"),
    ("1c", " ** alpha", "", "alpha"),
    ("1c", "sum(dim=1)", "sum(dim=1).detach()", "s_i is computed from W_dec"),
    ("1c", "batch_norms(feature_acts)", "batch_norms(feature_acts).detach()", "n_i is computed"),
    (
        "1c",
        "batch_norms(feature_acts)",
        "feature_acts.square().sum(dim=0).sqrt()",
        "√, whose slope",
    ),
    ("2a", "[2, 1, 0]", "[2, 1, 1]", "only renumbers"),
    ("2a", "[2, 1, 0]", "None", "TypeError"),
    ("2a", ", [2, 1, 0]", "", "the return statement"),
    ("2a", "feature_acts, W_dec,", "feature_acts.tolist(), W_dec,", "the list"),
    ("2a", "feature_acts, W_dec,", "feature_acts[:, :2], W_dec,", "your batch"),
    ("2a", "[1.0, 2.0, 3.0]", "[2.0, 2.0, 2.0]", "ties"),
    ("2b", "[0.0, 0.0, 2.0]", "[1.0, 0.0, 2.0]", "the slope of √n"),
    (
        "2b",
        "return feature_acts, W_dec",
        "return feature_acts.tolist(), W_dec.tolist()",
        "the list",
    ),
    ("2b", "[0.0, 0.0, 2.0]", "[0.0, 0.0, torch.nan]", "your batch"),
    ("2c", "torch.where(active, pair_norms, 1.0)", "pair_norms", "the slope of n^α"),
    ("2c", "torch.where(active, powers, 0.0)", "pair_norms ** alpha", "the slope of n^α"),
    ("2c", "pair_norms, 1.0)", "pair_norms + 1e-3, 1.0)", "the steps of 1c"),
    ("2c", "torch.where(active, powers, 0.0)", "(pair_norms + 1e-8) ** alpha", "exactly 0"),
    ("2c", "torch.where(active, powers, 0.0)", "pair_norms.clamp(min=1e-8) ** alpha", "exactly 0"),
    ("2d", "feature_acts.split(1)", "feature_acts", "the batch axis"),
    ("2d", "feature_acts.split(1)", "[feature_acts]", "the whole batch"),
    ("2d", ".mean()", ".sum()", "you have the sum"),
    ("2d", ".mean()", "", "one number"),
    ("2d", "split(1)", "splits(1)", "`samples = feature_acts.splits(1)` raised AttributeError"),
    ("2e", " ** 0.5", "", "fourfold"),
    ("2e", "return ", "", "does it return"),
    ("3a", " - x[~present].mean(dim=0)", "", "what else is in x"),
    ("3a", "= x[present].mean(dim=0) -", "= -x[present].mean(dim=0) +", "the sign"),
    ("3a", "mean(dim=0)", "sum(dim=0)", "you have sums"),
    ("3a", "mean(dim=0)", "mean(dim=1)", "RuntimeError"),
    ("3a", "x[present].mean(dim=0)", "x[present][:20].mean(dim=0)", "not trained to the end"),
    ("3a", " / direction.norm()", "", "normalise"),
    ("3b", "torch.where(live, W_dec @ direction, -1.0)", "(W_dec @ direction)", "the dead"),
    ("3b", "W_dec @ direction", "(W_dec @ direction).abs()", "the sign"),
    (
        "3b",
        "int(torch.where(live, W_dec @ direction, -1.0).argmax())",
        "W_dec @ direction",
        "argmax:",
    ),
    (
        "3b",
        "int(torch.where(live, W_dec @ direction, -1.0).argmax())",
        "W_dec[0, 0]",
        "a whole number",
    ),
    (
        "3b",
        "int(torch.where(live, W_dec @ direction, -1.0).argmax())",
        "direction.max(0)",
        "argmax gives",
    ),
    ("3c", "parent_on & ~child_on.any(dim=1)", "parent_on", "which samples count"),
    ("3c", "~fires[group]", "fires[group]", "`~fires`"),
    ("3c", "torch.stack(", "list(", "the list"),
    ("3c", "groups += ", "groups = ", "the groups"),
    ("3d", "feature_acts[missed]", "feature_acts", "`missed`"),
    ("3d", " * (W_dec @ direction)", "", "the direction"),
    ("3d", "W_dec @ direction", "(W_dec @ direction).abs()", "the sign"),
    ("3d", "feature_acts[missed].mean(dim=0)", "feature_acts[missed]", "counts through its rows"),
    (
        "3d",
        "feature_acts[missed].mean(dim=0) *",
        "(feature_acts[missed].sum(0) > 0) *",
        "both factors",
    ),
    ("3d", "int(written.argmax())", "written", "argmax:"),
    ("4a", "sorted(strengths)", "strengths", "the rule"),
    ("4a", "for seed in seeds) / len(seeds)", "for seed in seeds[:1])", "a look at seeds [0]"),
    ("4a", " / len(seeds)", "", "you have the sum"),
    (
        "4a",
        "sum(absorption(strength, seed) for seed in seeds) / len(seeds)",
        "max(absorption(strength, seed) for seed in seeds)",
        "not the highest",
    ),
    ("4a", "mean <= at_most", "mean < at_most", "`at_most`"),
    ("4b", "score(0.0, seed)", "score(0.1, seed)", "peeking"),
    (
        "4b",
        "[score(strength, seed) - score(0.0, seed) for seed in seeds]",
        "(score(strength, seed) - score(0.0, seed) for seed in seeds)",
        "the brackets",
    ),
    (
        "4b",
        "[score(strength, seed) - score(0.0, seed) for seed in seeds]",
        "{seed: score(strength, seed) - score(0.0, seed) for seed in seeds}",
        "the list",
    ),
    (
        "4b",
        "score(strength, seed) - score(0.0, seed)",
        "score(0.0, seed) - score(strength, seed)",
        "the pairs",
    ),
    ("4c", "fresh.gather(1, winner)", "fresh.amin(1)", "the winner"),
    (
        "4c",
        "float(explored.gather(1, winner).mean()), float(fresh.gather(1, winner).mean())",
        "explored.gather(1, winner), fresh.gather(1, winner)",
        "the mean over the worlds",
    ),
    (
        "5a",
        "feature_acts * feature_acts[:, index]",
        "feature_acts * feature_acts",
        "sample by sample",
    ),
    ("5a", " ** 2", "", "s_i"),
    ("5a", ".clamp(min=0)", "", "max(0, cosine)"),
    ("5a", ".sum(dim=0)", ".mean(dim=0)", "the *sum*"),
    ("5a", ".sum(dim=0)", ".sum(dim=0).detach()", "from feature_acts with gradient"),
    ("5a", "sum(dim=1)", "sum(dim=1).detach()", "from W_dec with gradient"),
    ("5a", ".mean()", ".mean().item()", "item() and float()"),
    ("5a", "return ", "", "does it return"),
    (
        "5b",
        "(similarity * together).mean()",
        "(similarity * together).mean().detach()",
        "gradients",
    ),
    ("5b", "(similarity * together).mean()", "(similarity * together).sum() * 0", "gradients"),
    ("5b", "(similarity * together).mean()", "(similarity * together).mean().item()", "item()"),
    ("5b", "        return co_activation", "        co_activation", "does it return"),
    ("5b", '"co_firing"', '"co_activation"', "a regulariser of that name"),
    ("5b", "@register_regulariser", "", "Unknown regulariser 'co_firing'"),
    ("5b", "feature_acts = feature_acts.to_dense()", "pass", "raised TypeError"),
]
"""Exercise, a part of its solution, what a student may write instead, and what the check then says."""

ALSO_RIGHT = [
    ("2b", "[0.8, 0.6]", "[0.0, 1.0]"),
    (
        "2d",
        "torch.stack([c2r_loss(sample, W_dec) for sample in samples]).mean()",
        "c2r_loss(feature_acts.mean(0, keepdim=True), W_dec)",
    ),
    (
        "3b",
        "int(torch.where(live, W_dec @ direction, -1.0).argmax())",
        "torch.where(live, W_dec @ direction, -1.0).argmax()",
    ),
    (
        "4b",
        "return [score(strength, seed) - score(0.0, seed) for seed in seeds]",
        "return torch.tensor([score(strength, seed) - score(0.0, seed) for seed in seeds])",
    ),
]
"""Exercise, a part of its solution, and what does as well."""


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import checks

    known = dict(REGULARISERS)
    yield checks
    REGULARISERS.clear()  # 5b registers the student's
    REGULARISERS.update(known)


def answered(label, right, other, folder) -> tuple[str, dict]:
    """The exercise's check, and the solutions up to it with a part of the last one changed."""
    notebook = notebook_files.read(CLASSES[label > "3"])
    known = solutions(notebook)
    assert right in known[label]
    known[label] = known[label].replace(right, other)
    names = {"torch": torch, "Tensor": torch.Tensor, "c2r_loss": c2r_loss}
    for one, code in known.items():
        if file := FILE.match(code):
            (folder / file[1]).write_text(code, encoding="utf-8")
        elif one <= label:
            place = folder / f"exercise_{one}.py"  # as a notebook's cell, it has lines to be quoted
            place.write_text(code, encoding="utf-8")
            exec(compile(code, place, "exec"), names)
    return cells(notebook, CHECK)[label].source, names


@pytest.mark.parametrize(("label", "right", "wrong", "said"), WRONG)
def test_a_mistake_is_named(label, right, wrong, said, checks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check, names = answered(label, right, wrong, tmp_path)
    with pytest.raises(AssertionError, match=f"Exercise {label} is not right") as failed:
        exec(check, names | {"checks": checks})
    assert said in str(failed.value)
    for word in ("given", "expected", "got", "look at"):
        assert f"\n  {word}" in str(failed.value)


@pytest.mark.parametrize(("label", "right", "other"), ALSO_RIGHT)
def test_what_does_as_well_passes(label, right, other, checks, tmp_path, capsys):
    check, names = answered(label, right, other, tmp_path)
    exec(check, names | {"checks": checks})
    assert capsys.readouterr().out.startswith(f"Exercise {label} passes.")
