"""What code a result depends on: the modules that are reached from its entry, a hash of each.

An entry is a module, "c2r_core.seeds", or one definition in it, "c2r_core.experiments.toy:measure".
What it imports is read from the source, imports inside functions too, those for type checkers not; so
nothing is imported here. Of a package's own file, which gathers names, and of BY_DEFINITION, only the
definitions count that the entry reaches: another architecture, regulariser or table leaves the others' cells
as they are. What is taken by name, from a list to which anyone may add, the entry does not reach: who
takes an architecture, a regulariser or a metric says its module too, as `Arm.code` does. Artefacts are left
out, since what they decide, a setting, is kept beside the result, and so are the modules that write what is
computed and read it again (FILES): tests hold them to give back what they took, to the bit. A module of the
user's own is its file, with what that imports of this package.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = "c2r_core"
LEFT_OUT = f"{ROOT}.artefacts"
FILES = tuple(
    f"{ROOT}.{name}"
    for name in (
        "evaluate.report",
        "formats.c2r",
        "formats.dictionary_learning",
        "formats.inference",
        "formats.sae_lens",
        "saes.files",
        "training.checkpoints",
        "training.history",
    )
)
"""How SAEs, checkpoints, histories and reports are kept. The formats of other libraries count nowhere: all
that a study measures was trained here."""
REGISTRY = f"{ROOT}.metrics"
"""The list of metrics, not a metric: a cell names the files that it measures with."""
BY_DEFINITION = (f"{ROOT}.experiments.", f"{ROOT}.data.batches")
"""Modules, beside packages, of which only what is reached counts."""


def fingerprints(entries: Iterable[str]) -> dict[str, str]:
    """A hash of every module that the entries reach, by name; comments and docstrings do not count.

    A definition that is merely passed on is not listed; the module is that makes it. A ModuleNotFoundError
    says if an entry, or what it imports, is not there.
    """
    seen: dict[str, str] = {}
    waiting = list(entries)
    while waiting:
        entry = waiting.pop()
        if entry not in seen:
            seen[entry], imported = _read(PACKAGE, entry)
            waiting += imported
    return {name: digest for name, digest in sorted(seen.items()) if digest}


def fingerprint(entries: Iterable[str]) -> str:
    """One hash of all modules that the entries reach."""
    text = "".join(f"{name} {digest}\n" for name, digest in fingerprints(entries).items())
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def all_modules() -> list[str]:
    """Every module of the package that can count."""
    files = (file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))
    names = (".".join((ROOT, *file.parts)).removesuffix(".__init__") for file in files)
    return sorted(name for name in names if _counts(name))


def has_source(name: str) -> bool:
    """Whether there is a file for a module; a notebook's or a prompt's own has none."""
    return _file(name) is not None


def _file(name: str) -> Path | None:
    if not _is_inside(name):
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        return file if file.suffix == ".py" and file.is_file() else None
    path = PACKAGE.joinpath(*name.split(".")[1:])
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None


@functools.cache
def _read(package: Path, entry: str) -> tuple[str, tuple[str, ...]]:
    """Hash of an entry, "" if it only passes on what it imports, and the entries that it imports."""
    module, _, definition = entry.partition(":")
    file = _file(module)
    if file is None:
        raise ModuleNotFoundError(f"{module} is no module of {package}")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = _reached(tree, definition, module) if definition else tree.body
    without_text = ast.Module(body, type_ignores=[])
    imported = tuple(sorted(set(_imports(without_text, module, file.name == "__init__.py"))))
    for node in ast.walk(without_text):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    if definition and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body):
        return "", imported
    return hashlib.sha256(ast.dump(without_text).encode()).hexdigest()[:12], imported


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _reached(tree: ast.Module, definition: str, module: str) -> list[ast.stmt]:
    """The top-level statements that a definition needs, in order."""
    binds = {i: set(_bound(statement)) for i, statement in enumerate(tree.body)}
    if not any(definition in names for names in binds.values()):
        raise ModuleNotFoundError(f"{module} defines no {definition!r}")
    needed, wanted = set(), {definition}
    while True:
        new = {i for i, names in binds.items() if names & wanted} - needed
        if not new:
            break
        needed |= new
        for i in new:
            wanted |= {n.id for n in ast.walk(tree.body[i]) if isinstance(n, ast.Name)}
    kept = []
    for i in sorted(needed):
        statement = tree.body[i]
        if isinstance(statement, ast.Import | ast.ImportFrom):
            names = [a for a in statement.names if (a.asname or a.name.split(".")[0]) in wanted]
            statement.names = names
        kept.append(statement)
    return kept


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement gives a meaning to."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.split(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif not _for_type_checkers(statement):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _for_type_checkers(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _imports(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    if _for_type_checkers(node):
        return
    if isinstance(node, ast.Import):
        yield from (n for alias in node.names if (n := _module_of(alias.name)))
    elif isinstance(node, ast.ImportFrom):
        above = module.split(".")
        above = above[: len(above) - node.level + is_package] if node.level else []
        source = ".".join([*above, *filter(None, [node.module])])
        for alias in node.names:
            inner = _module_of(f"{source}.{alias.name}")
            if inner:
                yield inner
            elif outer := _module_of(source):
                in_part = _is_read_in_part(source) and alias.name != "*"
                yield f"{outer}:{alias.name}" if in_part else outer
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, module, is_package)


def _is_read_in_part(name: str) -> bool:
    is_package = name != ROOT and _file(name).name == "__init__.py"
    return is_package or name.startswith(BY_DEFINITION)


def _module_of(name: str) -> str | None:
    """`name` if it is a module of this package that counts."""
    return name if _is_inside(name) and _counts(name) and _file(name) else None


def _is_inside(name: str) -> bool:
    return f"{name}.".startswith(f"{ROOT}.")


def _counts(name: str) -> bool:
    return name not in (REGISTRY, *FILES) and not f"{name}.".startswith(f"{LEFT_OUT}.")
