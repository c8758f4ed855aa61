"""Cells: one measured result each, in a small JSON file that says on what code, settings and inputs it rests.

A cell is *current* when its file was computed with the settings, the inputs and the code that are there
now, *stale* when one of these differs (and it is said which), *missing* without a file, and *edited* when
the file is not what was computed. Code that was shown to compute the same counts as the same (`same_code`),
but not where a cell holds times or memory: these were not compared. Committed cells are in
`results/PROFILE/STUDY/`; what a notebook or a command computes for itself goes to `runs/PROFILE/STUDY/`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock

from c2r_core.artefacts.fingerprints import fingerprints
from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.results import (
    COMMITTED_PROFILES,
    digest_of,
    plain,
    provenance,
    read_json,
    results_dir,
    runs_dir,
    write_json,
)
from c2r_core.artefacts.same_code import is_same_code

SCHEMA = 1
MODES = ("kept", "anew", "commit")


@dataclass(frozen=True)
class Cell:
    """One result: how it is computed, and all that decides it.

    `name` says everything in which the cells of a study differ; `settings` is JSON; `modules` are
    entries as `fingerprints` takes them; `inputs` are fingerprints of models and text, by name.
    """

    study: str
    name: str
    profile: str
    settings: Mapping[str, Any]
    compute: Callable[[], Any]
    modules: tuple[str, ...]
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"

    def file(self, folder: Path) -> Path:
        """The cell's file under a profile's folder of results or runs."""
        return folder / self.study / f"{self.name}.json"

    def about(self) -> dict[str, Any]:
        """What the values depend on, as the file holds it."""
        return {
            "schema": SCHEMA,
            "study": self.study,
            "name": self.name,
            "settings": plain(self.settings),
            "inputs": dict(self.inputs),
            "modules": fingerprints(self.modules),
        }


class State(NamedTuple):
    """Whether a file holds a cell's values; `why` names the settings, inputs and modules that differ.

    Of a current cell it names the modules that differ and were shown to compute the same.
    """

    kind: Literal["current", "stale", "missing", "edited"]
    why: str = ""


class EditedCellError(ValueError):
    """A committed cell is not what was computed: it was edited by hand, or damaged."""


def state(cell: Cell, folder: Path | None = None) -> State:
    """State of the cell's file in a folder; without one, of the committed file."""
    return _examine(cell, cell.file(results_dir(cell.profile) if folder is None else folder))[0]


def look(cell: Cell) -> tuple[State, Any]:
    """State and values of the committed cell, current or stale, without computing; else of that in `runs/`.

    Under C2R_CELLS=main the other way round, under C2R_CELLS=anew of that in `runs/` alone. A file edited by
    hand is an EditedCellError.
    """
    own, committed = runs_dir(cell.profile), results_dir(cell.profile)
    orders = {"anew": [own], "main": [own, committed]}
    folders = orders.get(os.environ.get("C2R_CELLS"), [committed, own])
    looked_at = [_examine(cell, cell.file(folder)) for folder in folders]
    for found, _ in looked_at:
        if found.kind == "edited":
            raise EditedCellError(found.why)
    by_kind = {found.kind: (found, values) for found, values in reversed(looked_at)}
    return by_kind.get("current") or by_kind.get("stale") or looked_at[0]


def read_or_compute(cell: Cell, mode: str | None = None) -> Any:
    """The cell's values, as read from JSON whether kept or computed.

    The mode "kept" takes the committed cell if it is current, else one in `runs/` that is, else computes it
    into `runs/`; "anew" does not look at committed ones; "commit" computes what is not current and writes it
    to `results/`. Without one, $C2R_CELLS or "kept". Cells of `smoke` are never committed. A committed file
    that was edited by hand is an EditedCellError, which names it.
    """
    mode = mode or os.environ.get("C2R_CELLS") or "kept"
    if mode not in MODES:
        raise ValueError(f"C2R_CELLS: {unknown_name('mode', mode, MODES)}")
    if cell.profile not in COMMITTED_PROFILES:
        mode = "anew"
    committed, own = (cell.file(f(cell.profile)) for f in (results_dir, runs_dir))
    looked_at = {"kept": (committed, own), "anew": (own,), "commit": (committed,)}[mode]
    for file in looked_at:
        found, values = _examine(cell, file)
        if found.kind == "current":
            return values
        if found.kind == "edited" and file == committed:
            raise EditedCellError(found.why)
    target = committed if mode == "commit" else own
    own.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(own.with_suffix(".lock")):  # another process may be computing it
        found, values = _examine(cell, target)
        if found.kind == "current":
            return values
        content = content_of(cell)
        write_json(target, content)
        return content["values"]


def compute(cell: Cell) -> Any:
    """The cell's values, computed now and written nowhere; as they would be read from JSON."""
    return plain(cell.compute())


def content_of(cell: Cell) -> dict[str, Any]:
    """What the cell's file holds: what it depends on, its values, computed now, and their provenance."""
    started = time.monotonic()
    content = cell.about()  # of the code as it is before the computation
    content["values"] = compute(cell)
    content["digest"] = _digest(content)
    content["provenance"] = provenance(
        profile=cell.profile, seed=cell.seed, device=cell.device, seconds=time.monotonic() - started
    )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return digest_of({k: v for k, v in content.items() if k not in ("digest", "provenance")})


def _examine(cell: Cell, file: Path) -> tuple[State, Any]:
    if not file.is_file():
        return State("missing"), None
    try:
        content = read_json(file)
        untouched = content["digest"] == _digest(content) and _is_whole(content)
    except (ValueError, LookupError, TypeError, RecursionError):
        untouched = False
    if not untouched:
        why = f"{file} is not what was computed (edited?); delete it, or restore it from git"
        return State("edited", why), None
    now = cell.about()
    # One that is no longer reached decides nothing.
    counted = {name: content["modules"].get(name) for name in now["modules"]}
    same = _shown_the_same(counted, now["modules"], content["values"])
    counted |= {name: now["modules"][name] for name in same}
    differs = differences(content | {"modules": counted}, now)
    if differs:
        return State("stale", ", ".join(differs)), content["values"]
    return State("current", ", ".join(f"same code {name}" for name in same)), content["values"]


def _shown_the_same(
    stored: Mapping[str, str | None], now: Mapping[str, str], values: Any
) -> list[str]:
    """The modules with another hash than stored of which a record says that they compute the same."""
    changed = [name for name in now if stored[name] != now[name]]
    if not changed or _is_timed(values):
        return []
    return [name for name in changed if is_same_code(name, stored[name], now[name])]


def _is_timed(values: Any) -> bool:
    """Whether anything in the values is OF_THE_MACHINE."""
    waiting = [values]
    while waiting:  # a loop, since a file may be nested deeper than calls may
        one = waiting.pop()
        if isinstance(one, Mapping):
            if any(name.startswith(OF_THE_MACHINE) for name in one):
                return True
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return False


def _is_whole(content: Mapping[str, Any]) -> bool:
    if not {"schema", "settings", "inputs", "modules", "values"} <= content.keys():
        return False
    modules = content["modules"]
    return isinstance(modules, Mapping) and all(isinstance(h, str) for h in modules.values())


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which settings, inputs and modules two cells differ, by what `Cell.about` says of each."""
    differs = [
        f"{what[:-1]} {path}"
        for what in ("settings", "inputs", "modules")
        for path in _differences(one[what], other[what])
    ]
    return differs + ["schema"] * (one["schema"] != other["schema"])


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ: dotted paths."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            inner = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                yield inner
            else:
                yield from _differences(old[key], new[key], inner)
    elif old != new:
        yield path


RELATIVE, ABSOLUTE = 0.05, 0.02
OF_THE_MACHINE = ("seconds", "peak_memory", "gigaflop", "gigabyte")
"""How the names of fields begin that say something of the machine and not of the result."""


def differing(kept: Any, computed: Any, path: str = "") -> list[str]:
    """Where two cells' values differ by more than a recomputation may: one line each.

    A number may differ by 5 % or by 0.02, a count by 5 % or by 1, whichever is more: most metrics are shares,
    and training on another processor adds in another order. Of a list of records, such as one a letter or a
    seed, the means of each field are compared; texts, what is OF_THE_MACHINE, and whole numbers that name
    something (a latent, a seed) are not.
    """
    if isinstance(kept, Mapping) and isinstance(computed, Mapping):
        if kept.keys() != computed.keys():
            return [f"{path or 'values'}: other fields"]
        inner = ((f"{path}.{key}" if path else key, kept[key], computed[key]) for key in kept)
        inner = (one for one in inner if not one[0].rpartition(".")[2].startswith(OF_THE_MACHINE))
        return [line for name, a, b in inner for line in differing(a, b, name)]
    if isinstance(kept, list) and isinstance(computed, list):
        if all(isinstance(item, Mapping) for item in [*kept, *computed]):
            return differing(_means(kept), _means(computed), path)
        return differing(_mean(kept), _mean(computed), path)
    if _is_number(kept) and _is_number(computed):
        least = 1 if isinstance(kept, int) and isinstance(computed, int) else ABSOLUTE
        if abs(kept - computed) > max(least, RELATIVE * max(abs(kept), abs(computed))):
            return [f"{path}: {kept:.6g} kept, {computed:.6g} computed"]
        return []
    return [] if type(kept) is type(computed) else [f"{path}: {kept!r} kept, {computed!r} computed"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(items: list) -> float | None:
    numbers = [item for item in items if isinstance(item, float)]
    return sum(numbers) / len(numbers) if numbers else None


def _means(records: list[Mapping[str, Any]]) -> dict[str, float | None]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: _mean([record.get(name) for record in records]) for name in names}
