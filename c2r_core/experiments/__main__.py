"""Evidence: what is committed, what is stale, and how it is computed again."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from c2r_core.artefacts import cache
from c2r_core.artefacts.cells import Cell, compute, differing, read_or_compute, state
from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import load_profile, profile_names
from c2r_core.artefacts.results import read_json, results_dir, runs_dir, write_json
from c2r_core.artefacts.same_code import SameCodeError, same_code, same_code_file
from c2r_core.errors import MissingExtra
from c2r_core.experiments import STUDIES, cells


def status(studies: Sequence[str], profile: str, as_json: bool = False) -> int:
    """Print how many cells of each study are current, stale or missing, and what made them stale."""
    same_code()  # a damaged file is an error, also where no cell needs it
    found = {}
    for study in studies:
        made = _cells(study, profile)
        found[study] = {cell.name: state(cell, How().folder(cell)) for cell in made}
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
    by_record = sum(
        one.kind == "current" and bool(one.why) for by in found.values() for one in by.values()
    )
    if by_record:
        print(
            f"{by_record} of the current ones by {same_code_file().name}: other code, same numbers"
        )
    return 0


def plan(profile: str, device: str) -> int:
    """Print what a profile's language-model SAEs need here and would cost; 1 if something is missing."""
    from c2r_core.experiments.plan import plan as planned

    lines = planned(load_profile(profile), device)
    print("\n".join(map(str, lines)))
    return int(not all(line.ok for line in lines))


def harvest(profile: str, device: str) -> int:
    """Store the activations that a profile's SAEs are trained on, unless the cache has them."""
    from c2r_core.experiments.language_model import training_store

    manifest = training_store(load_profile(profile).language_model, device).manifest
    print(f"activations of {manifest.n_tokens:,} tokens are in the cache")
    return 0


def run(studies: Sequence[str], how: How, limit: int | None, minutes: float | None) -> int:
    """Compute the cells that are missing or stale, each written when it is done; 1 if one failed."""
    started, failed, stopped = time.monotonic(), 0, False

    def wanted() -> Iterator[Cell]:
        nonlocal stopped
        begun = 0
        for cell in _all_cells(studies, how):
            if state(cell, how.folder(cell)).kind != "current":
                stopped = begun == limit or bool(
                    minutes and time.monotonic() - started > 60 * minutes
                )
                if stopped:
                    return
                begun += 1
                yield cell

    for cell, found in _computed(wanted(), how, keep=True):
        if isinstance(found, Exception):
            failed += 1
            line = f"FAILED: {type(found).__name__}: {found}"
        else:
            line = f"{read_json(cell.file(how.folder(cell)))['provenance']['seconds']} s"
        print(f"{cell.study}/{cell.name}: {line}", flush=True)
    if stopped:
        print("stopped at the limit; run it again to go on")
    return int(failed > 0)


def verify(studies: Sequence[str], how: How) -> int:
    """Compute committed cells again and compare; 1 if a number differs by more than its tolerance."""
    bad = 0

    def report(cell: Cell, line: str) -> None:
        nonlocal bad
        bad += bool(line)
        print(f"{cell.study}/{cell.name}: {line or 'agrees'}", flush=True)

    def comparable() -> Iterator[Cell]:
        for cell in _all_cells(studies, how):
            found = state(cell, how.folder(cell))
            if found.kind in ("current", "stale"):
                yield cell
            else:
                report(cell, found.why or "not committed")

    for cell, found in _computed(comparable(), how, keep=False):
        if isinstance(found, Exception):
            report(cell, f"FAILED: {type(found).__name__}: {found}")
        else:
            kept: Any = read_json(cell.file(how.folder(cell)))["values"]
            report(cell, "; ".join(differing(kept, found)))
    return int(bad > 0)


class How(NamedTuple):
    """Where cells are computed, here, one by one, or on a cluster; and where their files go."""

    profile: str = "default"
    device: str = "cpu"
    workers: int | None = None
    scheduler: str | None = None
    anew: bool = False

    def folder(self, cell: Cell) -> Path:
        """`results/`, or `runs/` for what is computed anew beside what is committed."""
        is_own = self.anew or cell.profile == "smoke"
        return runs_dir(cell.profile) if is_own else results_dir(cell.profile)


def _computed(waiting: Iterable[Cell], how: How, *, keep: bool) -> Iterator[tuple[Cell, Any]]:
    """Each cell with its values, which are then in its file if they are to be kept.

    An error of a cell surfaces here, and comes in the place of its values from a cluster.
    """
    if how.workers is None and how.scheduler is None:
        for cell in waiting:
            mode = "anew" if how.anew else "commit"
            yield cell, read_or_compute(cell, mode) if keep else compute(cell)
        return
    from c2r_core.experiments.cluster import computed_on, connected, local_cluster

    cluster = connected(how.scheduler) if how.scheduler else local_cluster(how.workers)
    with cluster as client:
        for cell, found in computed_on(client, waiting):
            if keep and not isinstance(found, Exception):
                write_json(cell.file(how.folder(cell)), found)
            yield cell, found if isinstance(found, Exception) else found["values"]


def _all_cells(studies: Sequence[str], how: How) -> Iterator[Cell]:
    for study in studies:
        yield from _cells(study, how.profile, how.device)


def _cells(name: str, profile: str, device: str = "cpu") -> list[Cell]:
    """All cells of a study, or the one of "STUDY/CELL"."""
    study, _, one = name.partition("/")
    by_name = {cell.name: cell for cell in cells(study, load_profile(profile), device=device)}
    if one and one not in by_name:
        raise SystemExit(unknown_name(f"cell of {study}", one, by_name))
    return [by_name[one]] if one else list(by_name.values())


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"  # as the notebooks have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; the exit code says whether all is well."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return _run(given, parser)
    except (MissingExtra, ConnectionError, SameCodeError) as error:
        print(f"c2r {given.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
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
            command.add_argument(
                "--anew", action="store_true", help="into runs/, whatever is committed"
            )
        if name != "status":
            help_ = "of torch, on every worker; auto: cuda where there is one here"
            command.add_argument("--device", default="cpu", help=help_)
            where = command.add_mutually_exclusive_group()
            where.add_argument("--workers", type=int, help="so many processes of this machine")
            where.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster")
    for name, about in (("plan", plan), ("harvest", harvest)):
        command = commands.add_parser(name, help=about.__doc__)
        command.add_argument("--profile", default="default", choices=profile_names())
        command.add_argument(
            "--device", default="cpu", help="of torch; auto: cuda where there is one"
        )
    command = commands.add_parser(
        "prune", help="remove from the cache what no code here would find"
    )
    command.add_argument("--dry-run", action="store_true")
    command = commands.add_parser(
        "same", help="show that a change of code altered no number, so that cells stay current"
    )
    command.add_argument("revision", metavar="REVISION", help="of git, before the change")
    command.add_argument("cells", nargs="+", metavar="CELL", help="STUDY/CELL, or STUDY: all of it")
    command.add_argument("--why", required=True, metavar="TEXT", help="what was changed")
    command.add_argument("--profile", default="default", choices=profile_names())
    command.add_argument("--device", default="cpu", help="of torch")
    return parser


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if given.command == "prune":
        removed, freed = cache.prune(given.dry_run)
        print(f"{removed} entries, {freed / 2**20:.0f} MiB{' would go' if given.dry_run else ''}")
        return 0
    if given.command == "plan":
        return plan(given.profile, _device(given.device))
    if given.command == "harvest":
        return harvest(given.profile, _device(given.device))
    if given.command == "same":
        from c2r_core.experiments.same import same

        wanted = (cell for name in given.cells for cell in _cells(name, given.profile))
        names = list(dict.fromkeys(f"{cell.study}/{cell.name}" for cell in wanted))
        return same(given.revision, names, given.why, given.profile, _device(given.device))
    studies = given.studies or list(STUDIES)
    if given.command == "status":
        return status(studies, given.profile, given.json)
    if not given.studies:
        print("performance: left out, since times mean nothing beside other work; see `make bench`")
        studies.remove("performance")
    if not given.studies and find_spec("sae_lens") is None:
        print("parity: left out, since the extra saelens is not installed")
        studies.remove("parity")
    if given.workers is not None and given.workers < 1:
        parser.error(f"--workers is {given.workers}; expected at least 1")
    how = How(given.profile, _device(given.device), given.workers, given.scheduler)
    if given.command == "run":
        return run(studies, how._replace(anew=given.anew), given.limit, given.minutes)
    return verify(studies, how)


if __name__ == "__main__":
    sys.exit(main())
