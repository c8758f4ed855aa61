"""`make fuzz`: gives every parser thousands of damaged and hostile files, and counts what it makes of them.

A parser may accept what it is given, or refuse it with an error that its docstring names. All else is a
fault: another error; a file that is accepted and cannot be used or, where checksums promise it, is not what
was written; a file written elsewhere, a process started, a pickle run, a key shown; more memory or time than
allowed. Each parser reads in a process of its own, whose address space may grow by MEMORY (RLIMIT_AS, where
the system has it) and whose own memory after each input is reported.

    python tests/fuzz.py [--inputs 10000] [--seed 0] [PARSER ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import damage
from parsers import PARSERS, Parser, Wrong

MEMORY = 2**30
SECONDS = 10
"""Of the processor's time, for one input."""
BATCH = 1000
"""Inputs that hypothesis draws in one go: it remembers what it has drawn."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.", "shutil.", "subprocess.", "ctypes.dlopen", "socket.connect", "pickle.find_class")
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv")


class Forbidden(BaseException):
    """The parser did what no file may make it do; not to be caught by it."""


class TooSlow(BaseException):
    """The parser took more than SECONDS."""


@dataclass
class Outcome:
    """What one parser made of its inputs."""

    parser: str
    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By type of a documented error."""
    faults: Counter[str] = field(default_factory=Counter)
    """By what went wrong."""
    examples: dict[str, str] = field(default_factory=dict)
    """Of each fault the first traceback."""
    outside: int = 0
    """Files that were written, and other things that were done, outside of what is read."""
    megabytes: float = 0.0
    """By which the process's own memory had grown after an input, at most."""
    seconds: float = 0.0


# -- one input ------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What a parser is given: files, with checksums made right or not, and what whole ones are read as."""

    files: damage.Files
    is_sealed: bool
    whole: list[object]


class Watch:
    """Hears of all that Python does to files and processes (`sys.addaudithook`)."""

    def __init__(self) -> None:
        self.room: Path | None = None
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def over(self, room: Path) -> Iterator[None]:
        """Only files below the folder may be written in the block."""
        self.room = room
        try:
            yield
        finally:
            self.room = None

    def _hear(self, event: str, given: tuple) -> None:
        if self.room is None:
            return
        if event == "open":
            path, _, flags = given
            is_path = isinstance(path, str | bytes | os.PathLike)
            if flags & _WRITES and is_path and not self._is_inside(path):
                raise Forbidden(f"opens {path!r} to write")
        elif event.startswith(_CHANGES) and event not in _HARMLESS:
            is_of_files = event.startswith(("os.", "shutil."))
            if not (is_of_files and all(map(self._may_change, _paths(given)))):
                raise Forbidden(f"{event} {given}")

    def _may_change(self, path: object) -> bool:
        """The entry itself, and not what it may be a link to."""
        folder, name = os.path.split(os.fsdecode(path))
        return self._is_inside(folder) or Path(folder, name) == self.room

    def _is_inside(self, path: object) -> bool:
        # A relative one counts from there: where a folder is emptied, it is relative to that.
        path = os.path.realpath(os.path.join(self.room, os.fsdecode(path)))
        return Path(path).is_relative_to(self.room)


def _paths(given: tuple) -> list:
    found = [one for one in given if isinstance(one, str | bytes | os.PathLike)]
    return found or ["/"]  # what names no path is not inside


def try_one(parser: Parser, given: Given, folder: Path, watch: Watch, outcome: Outcome) -> None:
    """Let the parser read files, sealed or as they are, and count what came of it."""
    room = folder / "room"
    damage.write(given.files, room)
    is_sealed = parser.seal is not None and given.is_sealed
    if is_sealed:
        with contextlib.suppress(Exception):  # too damaged for that
            parser.seal(room)
    outside = folder / damage.OUTSIDE
    outside.write_text("as it was")
    outcome.inputs += 1
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with watch.over(room):
            value = parser.read(room)
            if parser.seal is not None and not is_sealed and value not in given.whole:
                raise Wrong("read as it was not written")
        outcome.accepted += 1
    except parser.documented as error:
        outcome.refused[type(error).__name__] += 1
    except Wrong as error:
        _fault(outcome, f"wrong in silence: {error}", error)
    except Forbidden as error:
        outcome.outside += 1
        _fault(outcome, f"forbidden: {error}", error)
    except BaseException as error:
        _fault(outcome, f"undocumented {type(error).__name__}", error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if outside.read_text() != "as it was" or len(list(folder.iterdir())) != 2:
        outcome.outside += 1
        outcome.faults["a file outside was changed"] += 1


def _fault(outcome: Outcome, what: str, error: BaseException) -> None:
    outcome.faults[what] += 1
    if what not in outcome.examples:
        outcome.examples[what] = "".join(traceback.format_exception(error, limit=-3))[-1500:]


# -- many -----------------------------------------------------------------------------------------


def fuzz(parser: Parser, inputs: int, seed_of_all: int, folder: Path) -> Outcome:
    """Outcome of so many inputs, in a process of its own."""
    result = folder / f"{parser.name}.json"
    child = os.fork()
    if child == 0:
        try:
            room = folder / parser.name
            room.mkdir()
            outcome = _fuzz(parser, inputs, seed_of_all, room)
            result.write_text(json.dumps(vars(outcome)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        return Outcome(parser.name, faults=Counter({f"the process ended with {status}": 1}))
    values = json.loads(result.read_text())
    counts = {name: Counter(values.pop(name)) for name in ("refused", "faults")}
    return Outcome(**values, **counts)


def _fuzz(parser: Parser, inputs: int, seed_of_all: int, folder: Path) -> Outcome:
    started, outcome = time.monotonic(), Outcome(parser.name)
    logging.disable()  # warnings, thousands of them
    os.environ["C2R_API_KEY"] = damage.KEY
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, _too_slow)
    whole = tuple(parser.folders(folder / "whole"))
    work = folder / "work"
    values = []
    for files in whole:
        damage.write(files, work / "room")
        with contextlib.suppress(*parser.documented):  # whole files may say that something failed
            values.append(parser.read(work / "room"))  # imports what it needs, too
    watch, before = Watch(), _resident()
    limit = _address_space()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit + MEMORY, resource.RLIM_INFINITY))
    for start in range(0, inputs, BATCH):
        n = min(BATCH, inputs - start)

        @seed(f"{seed_of_all} {parser.name} {start}")
        @settings(
            max_examples=n,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(files=damage.damaged(whole), is_sealed=st.booleans())
        def read(files: damage.Files, is_sealed: bool) -> None:
            try_one(parser, Given(files, is_sealed, values), work, watch, outcome)
            outcome.megabytes = max(outcome.megabytes, round(_resident() - before, 1))

        read()
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def _too_slow(*_: Any) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def _resident() -> float:
    """Megabytes of this process's own memory; where the system does not tell, the most it ever had of all."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("RssAnon:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _address_space() -> int | None:
    """Bytes of it now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()


def row(outcome: Outcome) -> str:
    """A line of the table."""
    refused = ", ".join(f"{n} {name}" for name, n in sorted(outcome.refused.items()))
    faults = sum(outcome.faults.values())
    return (
        f"{outcome.parser:<20}{outcome.inputs:>8}{outcome.accepted:>10}{faults:>8}"
        f"{outcome.outside:>9}{outcome.megabytes:>7.0f}{outcome.seconds:>9.0f}  {refused}"
    )


HEADER = (
    f"{'parser':<20}{'inputs':>8}{'accepted':>10}{'faults':>8}{'outside':>9}"
    f"{'MB':>7}{'seconds':>9}  refused"
)


def main(arguments: list[str] | None = None) -> int:
    """Fuzz all parsers, or those named; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help=f"of {', '.join(PARSERS)}")
    parser.add_argument("--inputs", type=int, default=10_000, help="for each; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file for the outcomes in JSON")
    told = parser.parse_args(arguments)
    print(HEADER)
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in told.parsers or PARSERS:
            outcome = fuzz(PARSERS[name], told.inputs, told.seed, Path(folder).resolve())
            outcomes[name] = outcome
            print(row(outcome), flush=True)
            for what, n in outcome.faults.items():
                print(f"    FAULT: {n} times {what}")
                print("      " + outcome.examples.get(what, "").replace("\n", "\n      "))
    if told.out is not None:
        told.out.write_text(json.dumps({name: vars(one) for name, one in outcomes.items()}))
    return int(any(outcome.faults for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
