"""Evidence: what is committed, what is stale, and how it is computed again."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from c2r_core.artefacts import cache
from c2r_core.artefacts.cells import Cell, compute, differing, read_or_compute, state
from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import load_profile, profile_names
from c2r_core.artefacts.results import read_json, results_dir, runs_dir
from c2r_core.experiments import STUDIES, cells


def status(studies: Sequence[str], profile: str, as_json: bool = False) -> int:
    """Print how many cells of each study are current, stale or missing, and what made them stale."""
    found = {}
    for study in studies:
        found[study] = {cell.name: state(cell, _folder(cell)) for cell in _cells(study, profile)}
    if as_json:
        print(json.dumps({s: {n: c._asdict() for n, c in by.items()} for s, by in found.items()}))
        return 0
    print(f"{'':16}{'current':>8}{'stale':>8}{'missing':>8}{'edited':>8}")
    for study, by_name in found.items():
        counts = Counter(one.kind for one in by_name.values())
        numbers = "".join(f"{counts[k]:8d}" for k in ("current", "stale", "missing", "edited"))
        print(f"{study:16}{numbers}")
        reasons = Counter(
            reason
            for one in by_name.values()
            if one.kind == "stale"
            for reason in one.why.split(", ")
        )
        for reason, count in reasons.most_common(5):
            print(f"{'':16}  {count} differ in {reason}")
        if len(reasons) > 5:
            print(f"{'':16}  and {len(reasons) - 5} other reasons; --json has them all")
        for one in by_name.values():
            if one.kind == "edited":
                print(f"{'':16}  {one.why}")
    return 0


def run(studies: Sequence[str], profile: str, limit: int | None, minutes: float | None) -> int:
    """Compute the cells that are missing or stale, one by one, each written when it is done."""
    started, done = time.monotonic(), 0
    for study in studies:
        for cell in _cells(study, profile):
            if state(cell, _folder(cell)).kind == "current":
                continue
            if done == limit or (minutes and time.monotonic() - started > 60 * minutes):
                print("stopped at the limit; run it again to go on")
                return 0
            began = time.monotonic()
            read_or_compute(cell, "commit")
            print(f"{cell.study}/{cell.name}: {time.monotonic() - began:.1f} s", flush=True)
            done += 1
    return 0


def verify(studies: Sequence[str], profile: str) -> int:
    """Compute committed cells again and compare; 1 if a number differs by more than its tolerance."""
    bad = 0
    for cell in (cell for study in studies for cell in _cells(study, profile)):
        found = state(cell, _folder(cell))
        line = found.why
        if found.kind in ("current", "stale"):
            kept: Any = read_json(cell.file(_folder(cell)))["values"]
            line = "; ".join(differing(kept, compute(cell)))
        elif found.kind == "missing":
            line = "not committed"
        bad += bool(line)
        print(f"{cell.study}/{cell.name}: {line or 'agrees'}", flush=True)
    return int(bad > 0)


def _cells(name: str, profile: str) -> list[Cell]:
    """All cells of a study, or the one of "STUDY/CELL"."""
    study, _, one = name.partition("/")
    by_name = {cell.name: cell for cell in cells(study, load_profile(profile))}
    if one and one not in by_name:
        raise SystemExit(unknown_name(f"cell of {study}", one, by_name))
    return [by_name[one]] if one else list(by_name.values())


def _folder(cell: Cell):
    return runs_dir(cell.profile) if cell.profile == "smoke" else results_dir(cell.profile)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(prog="c2r", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("status", status), ("run", run), ("verify", verify)):
        command = commands.add_parser(name, help=about.__doc__)
        what = f"{', '.join(STUDIES)}; or one cell of it, STUDY/CELL"
        command.add_argument("studies", nargs="*", metavar="STUDY", help=what)
        command.add_argument("--profile", default="default", choices=profile_names())
        if name == "status":
            command.add_argument("--json", action="store_true", help="every cell, for programs")
        elif name == "run":
            command.add_argument("--limit", type=int, help="at most so many cells")
            command.add_argument("--minutes", type=float, help="start no cell after so long")
    command = commands.add_parser(
        "prune", help="remove from the cache what no code here would find"
    )
    command.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    if given.command == "prune":
        removed, freed = cache.prune(given.dry_run)
        print(f"{removed} entries, {freed / 2**20:.0f} MiB{' would go' if given.dry_run else ''}")
        return 0
    studies = given.studies or list(STUDIES)
    if given.command == "status":
        return status(studies, given.profile, given.json)
    if not given.studies and find_spec("sae_lens") is None:
        print("parity: left out, since the extra saelens is not installed")
        studies.remove("parity")
    if given.command == "run":
        return run(studies, given.profile, given.limit, given.minutes)
    return verify(studies, given.profile)


if __name__ == "__main__":
    sys.exit(main())
