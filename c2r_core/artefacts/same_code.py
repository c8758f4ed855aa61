"""Changes of code that altered no number, as `c2r same` has shown: `results/same_code.json`.

A record says that a module with one hash computes the same as with another. It was shown by cells that were
computed with both and agreed to the bit; other cells that reach the module are taken to agree too. Records of
one module make a chain: if A computes the same as B and B the same as C, a cell of A counts as one of C.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from c2r_core.artefacts.paths import project_folder
from c2r_core.artefacts.results import digest_of, write_json

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
"""Of a module, as `fingerprints` makes it."""
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Commits(_Strict):
    """The two versions of the project that were compared."""

    was: Commit
    now: Commit


class SameCode(_Strict):
    """One module that computes the same as it did."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    module: Annotated[str, Field(pattern=r"^\w+(\.\w+)*(:\w+)?$")]
    """As `fingerprints` names it: a module, or one definition in it."""
    was: Hash | None
    """None where the cells did not depend on it: a file was split, or another one is imported."""
    now: Hash
    why: Annotated[str, Field(pattern=r"\S")]
    """What was changed, in a person's words."""
    shown_by: Annotated[list[str], Field(min_length=1)]
    """The cells that depend on it and agree, STUDY/CELL."""
    commits: Commits
    provenance: dict[str, Any]
    digest: str = ""
    """Of all the other fields."""

    def sealed(self) -> SameCode:
        """The same record with its digest."""
        return self.model_copy(update={"digest": self._digest()})

    def is_sealed(self) -> bool:
        """Whether no field was changed since."""
        return self.digest == self._digest()

    def _digest(self) -> str:
        return digest_of(self.model_dump(exclude={"digest"}))


class SameCodeError(ValueError):
    """The file of records was edited or damaged, or `c2r same` cannot compare what it was given."""


def same_code_file() -> Path:
    """Where the records are: one file for all profiles."""
    return project_folder("C2R_RESULTS", "results") / "same_code.json"


def same_code() -> tuple[SameCode, ...]:
    """All records; none without a file. A SameCodeError if one of them is not what `c2r same` wrote."""
    file = same_code_file()
    if not file.is_file():
        return ()
    now = file.stat()
    return _read(file, now.st_mtime_ns, now.st_size)


def is_same_code(module: str, was: str | None, now: str) -> bool:
    """Whether records lead from one hash of a module to another; None where there was no module."""
    steps = [record for record in same_code() if record.module == module]
    reached = {was}
    while new := {step.now for step in steps if step.was in reached} - reached:
        reached |= new
    return now in reached


def add_same_code(records: Iterable[SameCode]) -> None:
    """Put records behind those that are there, each with its digest."""
    every = [*same_code(), *(record.sealed() for record in records)]
    write_json(same_code_file(), [record.model_dump() for record in every])


@functools.lru_cache(maxsize=1)
def _read(file: Path, _mtime_ns: int, _size: int) -> tuple[SameCode, ...]:
    try:
        records = TypeAdapter(list[SameCode]).validate_json(file.read_bytes())
        wrong = [f"{n}: not its digest" for n, one in enumerate(records) if not one.is_sealed()]
    except ValidationError as error:
        records, wrong = [], [f"{_path(one['loc'])}: {one['msg']}" for one in error.errors()]
    if wrong:
        raise SameCodeError(f"{file} is not what c2r same wrote ({wrong[0]}); restore it from git")
    return tuple(records)


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "the file"
