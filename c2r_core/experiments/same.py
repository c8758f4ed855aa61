"""`c2r same`: proof by computation that a change of code altered no number, so that cells stay current.

Some cells are computed with the code of an earlier revision and with that of HEAD. Each code comes from git,
and has a process and an empty cache of its own. If all values agree to the bit, a record is made for every
module that changed and that these cells depend on (`artefacts.same_code`). What else changed is named, and
stays as it is.

What is not compared is not shown. So name cells for each way in which a changed module is used: two changes
that make up for each other in one study need not do so in another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from c2r_core.artefacts.cells import OF_THE_MACHINE, differences
from c2r_core.artefacts.paths import checkout, data_dir
from c2r_core.artefacts.results import provenance
from c2r_core.artefacts.same_code import (
    Commits,
    SameCode,
    SameCodeError,
    add_same_code,
    same_code,
    same_code_file,
)

SIDES = ("was", "now")
_LINES = 20
_PROGRAM = Path(__file__).with_name("one_side.py")


class Change(NamedTuple):
    """A module with two hashes; `was` is None if the cells did not depend on it before."""

    module: str
    was: str | None
    now: str


def same(
    revision: str, names: Sequence[str], why: str, profile: str = "default", device: str = "cpu"
) -> int:
    """Compute cells with the code of an earlier revision and of HEAD; if all agree, record it.

    Parameters
    ----------
    revision : str
        What git takes for a commit: a hash, a tag, HEAD~3.
    names : Sequence[str]
        The cells, STUDY/CELL.
    why : str
        What was changed, for the record.

    Returns
    -------
    int
        0 if the cells agree and records were added, 1 if a value differs.

    Raises
    ------
    SameCodeError
        If the code here is not committed, there is no such revision, the cells have other settings or inputs
        there, depend on nothing that changed, cannot be computed or hold nothing that could be compared.
    """
    started = time.monotonic()
    if not why.strip():
        raise SameCodeError("--why is empty; say in a few words what was changed")
    same_code()  # a damaged file is an error before the work, and not after it
    commits = _commits(revision)
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            _Side(commit, _unpacked(commit, Path(folder) / side), names, profile, device)
            for side, commit in zip(SIDES, commits.model_dump().values(), strict=True)
        ]
        abouts = [side.ask("about") for side in sides]
        shown = _changes(
            *(_all_there(side, about) for side, about in zip(sides, abouts, strict=True))
        )
        values = [side.ask("values") for side in sides]
    unlike = [line for name in names for line in _unlike(name, *(found[name] for found in values))]
    if unlike:
        print("\n".join(unlike[:_LINES]))
        print(f"{len(unlike)} values differ, the first of them above; nothing is recorded")
        return 1
    origin = provenance(profile=profile, seed=0, device=device, seconds=time.monotonic() - started)
    del origin["seed"]  # each cell has its own
    origin["date"] = date.today().isoformat()
    add_same_code(
        SameCode(**change._asdict(), why=why, shown_by=by, commits=commits, provenance=origin)
        for change, by in shown.items()
    )
    print(f"{len(names)} cells agree to the bit. Recorded in {same_code_file().name}:")
    for change, by in shown.items():
        print(f"  {change.module}, by {len(by)} cells")
    _name_others(*(about["modules"] for about in abouts), shown)
    return 0


class _Side(NamedTuple):
    """A revision's files, and the cells that it is asked about."""

    commit: str
    folder: Path
    names: Sequence[str]
    profile: str
    device: str

    def ask(self, what: str) -> Any:
        """An answer of one_side.py, from a process that finds nothing which other code has made."""
        print(f"{what} of {len(self.names)} cells, with the code of {self.commit[:7]}", flush=True)
        with tempfile.TemporaryDirectory() as room:
            answer = Path(room) / "answer.json"
            own = {f"C2R_{name.upper()}": f"{room}/{name}" for name in ("cache", "results", "runs")}
            own |= {"C2R_DATA": str(data_dir()), "PYTHONPATH": str(self.folder)}
            environment = {"PYTHONHASHSEED": "0"} | os.environ | own
            program = [sys.executable, "-c", _PROGRAM.read_text(encoding="utf-8"), what]
            done = subprocess.run(  # noqa: S603 (this Python, this project's own code, and no shell)
                [*program, str(answer), self.profile, self.device, *self.names],
                cwd=self.folder,
                env=environment,
            )
            if done.returncode:
                raise SameCodeError(
                    f"the code of {self.commit[:7]} failed, with the error above; name other cells, or "
                    "another revision"
                )
            return json.loads(answer.read_text(encoding="utf-8"))


def _commits(revision: str) -> Commits:
    changed = _git("status", "--porcelain", "--", "c2r_core")
    if changed:
        raise SameCodeError(
            f"c2r_core differs from what is committed; commit it first, or put it aside:\n{changed}"
        )
    found = {
        side: _git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
        for side, name in zip(SIDES, (revision, "HEAD"), strict=True)
    }
    return Commits(**found)


def _git(*arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        raise SameCodeError("c2r same needs git, which is not installed here")
    command = [git, "-C", str(checkout()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 (as above)
    if done.returncode:
        raise SameCodeError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _unpacked(commit: str, folder: Path) -> Path:
    """The project's files as they are in a commit."""
    archive = folder.with_suffix(".tar")
    _git("archive", "--format=tar", f"--output={archive}", commit)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder


def _all_there(side: _Side, about: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a side says of its cells, if it has all of them, and speaks of its own code."""
    if not Path(about["package"]).resolve().is_relative_to(side.folder.resolve()):
        raise SameCodeError(
            f"Python takes c2r_core from {about['package']}, not from {side.commit[:7]}"
        )
    if missing := [name for name in side.names if name not in about["cells"]]:
        raise SameCodeError(f"{side.commit[:7]} has no cell {', '.join(missing)}; name others")
    return about["cells"]


def _changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[Change, list[str]]:
    """The modules that changed, each with the cells that depend on it."""
    shown: dict[Change, list[str]] = {}
    for name in now:
        without_code = (cells[name] | {"modules": {}} for cells in (was, now))
        if other := differences(*without_code):
            raise SameCodeError(
                f"{name} is another measurement in the two revisions: {', '.join(other)} differs"
            )
        for module, digest in now[name]["modules"].items():
            before = was[name]["modules"].get(module)
            if before != digest:
                shown.setdefault(Change(module, before, digest), []).append(name)
    if not shown:
        raise SameCodeError(
            "no module that these cells depend on differs; there is nothing to show"
        )
    return shown


def _unlike(name: str, was: Any, now: Any) -> Iterator[str]:
    """Where two computations of a cell differ: one line each."""
    before, after = (dict(_leaves(values)) for values in (was, now))
    if not before and not after:
        raise SameCodeError(f"{name} holds times and memory alone, which are not compared")
    for path in sorted(before.keys() | after.keys()):
        one, other = (leaves.get(path, "nothing") for leaves in (before, after))
        if one != other:
            yield f"{name}: {path or 'its value'} was {one}, is {other}"


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and JSON of every single value that is not OF_THE_MACHINE; equal JSON means equal bits."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            if not key.startswith(OF_THE_MACHINE):
                yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(values, list) and values:
        for number, value in enumerate(values):
            yield from _leaves(value, f"{path}[{number}]")
    else:
        yield path, json.dumps(values)


def _name_others(
    was: Mapping[str, str], now: Mapping[str, str], shown: Mapping[Change, list[str]]
) -> None:
    """Print the changed modules that only cells which were not compared depend on."""
    every = {Change(module, was.get(module), digest) for module, digest in now.items()}
    others = [change.module for change in every - shown.keys() if change.was != change.now]
    if others:
        print(f"Not shown, since none of these cells depends on it: {', '.join(sorted(others))}")
