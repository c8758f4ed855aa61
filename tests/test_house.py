"""The house: rooms know only those below, files and functions stay small, one walk from text to a number."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from c2r_core import experiments, metrics
from conftest import PROJECT

PACKAGE = PROJECT / "c2r_core"

FLOORS = (
    ("errors", "seeds", "speed", "statistics", "artefacts"),
    ("losses",),
    ("saes", "data"),
    ("training", "formats"),
    ("metrics",),
    ("evaluate",),
    ("experiments", "browser", "hub"),
    ("notebook", "playground"),
    ("__init__", "__main__"),
)
"""From the bottom up. Rooms on one floor do not know each other, but for what the ground floor holds."""
NEIGHBOURS = {("statistics", "errors"), ("artefacts", "errors"), ("__main__", "__init__")}

WALK = (
    "data.text",
    "data.harvest",
    "data.forward",
    "data.store",
    "data.batches",
    "training.trainer",
    "saes.topk",
    "losses.c2r",
    "metrics.reconstruction",
    "evaluate.evaluation",
    "experiments.language_model",
    "notebook.session",
)
"""One activation's way from text to a number in a notebook."""

DEFINED_ELSEWHERE = ("encode", "decode", "activate", "sparsity", "forward", "backward")
"""Methods whose class, or that class's base, says what they do."""

MAX_LINES = 400
MAX_PARAMETERS = 8


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package by its name below c2r_core."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


@cache
def imports(module: str) -> set[str]:
    """The modules of the package that one imports, wherever in the file, also for types alone."""
    found = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import):
            found |= {resolved(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import; write out c2r_core"
            for alias in node.names:
                file = resolved(f"{node.module}.{alias.name}")
                found.add(file or resolved(node.module))
    return found - {None}


def resolved(name: str) -> str | None:
    """The file of a dotted name, as a key of `trees`; None for what is no module of the package."""
    if name == "c2r_core":
        return "__init__"
    inside = name.removeprefix("c2r_core.")
    if inside == name:
        return None
    return next((file for file in (inside, f"{inside}.__init__") if file in trees()), None)


def allowed(module: str, imported: str) -> bool:
    rooms = room(module), room(imported)
    return floor(imported) < floor(module) or rooms[0] == rooms[1] or rooms in NEIGHBOURS


def test_every_room_has_a_floor():
    rooms = {room(module) for module in trees()}
    assert rooms == {name for names in FLOORS for name in names}


def test_nothing_imports_upwards():
    upwards = [
        f"{module} -> {imported}"
        for module in trees()
        for imported in sorted(imports(module))
        if not allowed(module, imported)
    ]
    assert not upwards, "\n".join(upwards)


def test_the_public_names_are_for_users():
    """Inside, a name is imported from where it is made."""
    users = [module for module in trees() if "__init__" in imports(module)]
    assert users == ["__main__"]


def test_nothing_imports_in_a_circle():
    """A room's __init__ gathers its files; what those import of it again would be a circle."""
    seen: dict[str, bool] = {}  # whether a module is finished

    def visit(module: str, path: tuple[str, ...]) -> None:
        if seen.get(module) is False:
            pytest.fail("in a circle: " + " -> ".join((*path[path.index(module) :], module)))
        if module in seen:
            return
        seen[module] = False
        for imported in sorted(imports(module)):
            visit(imported, (*path, module))
        seen[module] = True

    for module in trees():
        visit(module, ())


@pytest.mark.parametrize("module", trees())
def test_no_file_is_long(module):
    lines = (PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES


def functions(module: str):
    """Functions and methods with the class that they belong to, if any; no closures."""
    for node in trees()[module].body:
        if isinstance(node, ast.ClassDef):
            yield from (
                (node, one)
                for one in node.body
                if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
            )
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield None, node


def is_public(name: str) -> bool:
    return not name.startswith("_")


def test_no_function_takes_many_parameters():
    many = []
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = node.args
                names = [one.arg for one in given.posonlyargs + given.args + given.kwonlyargs]
                n = len([name for name in names if name not in ("self", "cls")])
                if n > MAX_PARAMETERS:
                    many.append(f"{module}: {getattr(node, 'name', 'lambda')} takes {n}")
    assert not many, "\n".join(many)


def test_what_is_public_says_what_it_is():
    silent = []
    for module, tree in trees().items():
        if ast.get_docstring(tree) is None:
            silent.append(module)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and is_public(node.name):
                silent += [] if ast.get_docstring(node) else [f"{module}: {node.name}"]
        for owner, function in functions(module):
            public = is_public(function.name) and (owner is None or is_public(owner.name))
            implements = owner is not None and function.name in DEFINED_ELSEWHERE
            if public and not implements and ast.get_docstring(function) is None:
                silent.append(
                    f"{module}: {owner.name + '.' if owner else ''}{function.name} has no docstring"
                )
    assert not silent, "\n".join(silent)


def reaches(module: str) -> set[str]:
    """All modules that one imports, and those import, and so on; metrics and studies by their lists."""
    found: set[str] = set()
    todo = [module]
    while todo:
        known = todo.pop()
        listed = {"evaluate.evaluation": metrics_listed, "notebook.session": studies_listed}
        for imported in (imports(known) | listed.get(known, set)()) - found:
            found.add(imported)
            todo.append(imported)
    return found


def metrics_listed() -> set[str]:
    return {f"metrics.{name}" for name in metrics.MODULES}


def studies_listed() -> set[str]:
    return {module.removeprefix("c2r_core.") for module in experiments.STUDIES.values()}


def test_the_walk_from_text_to_a_number_is_short_and_goes_one_way():
    assert len(WALK) <= 12
    assert reaches(WALK[-1]) >= set(WALK[:-1])
    for i, earlier in enumerate(WALK):
        known = reaches(earlier)
        for later in WALK[i + 1 :]:
            assert later not in known or earlier not in reaches(later), f"{earlier} <-> {later}"


def test_the_package_holds_no_other_python():
    """What a user runs is in the package, and so is all that makes evidence; `docs` makes the site."""
    outside = {path.parts[len(PROJECT.parts)] for path in _scripts()}
    assert outside <= {"c2r_core", "tests", "exercises", "docs"}


def _scripts() -> list[Path]:
    skipped = {".venv", ".venv-lock", ".venv-newest", "runs", "data", "cache"}
    return [path for path in PROJECT.rglob("*.py") if path.parts[len(PROJECT.parts)] not in skipped]
