"""Run a notebook with checked parameters, refresh the committed ones, sum up what they claim.

python -m c2r_core.notebook.runner run NOTEBOOK --profile smoke --out EXECUTED
python -m c2r_core.notebook.runner refresh NOTEBOOK...
python -m c2r_core.notebook.runner summary
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from traitlets.config import Config

from c2r_core.artefacts.files import whole_file
from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import load_profile, profile_names
from c2r_core.artefacts.results import results_dir
from c2r_core.notebook import files as notebook_files
from c2r_core.notebook.claims import NOT_MEASURED, Line, counted

KERNEL_ENVIRONMENT = {"TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
"""Where a notebook runs unattended, progress bars and a debugger's remarks would be outputs."""


class NotebookFailed(RuntimeError):
    """A cell raised; the message says where the notebook with its traceback is."""


def run(notebook: Path, out: Path, parameters: Mapping[str, Any] | None = None) -> None:
    """Execute a notebook in a process of its own, in its own folder, and write it to `out`.

    `out` appears only when every cell has run. After a failure, the notebook with its traceback is
    beside it as `*.failed.ipynb`. FileNotFoundError if there is no such notebook, ValueError if it has no
    such parameter or the profile does not exist, NotebookFailed if a cell raises or the kernel dies.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    parameters = parameters or {}
    if not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
    known = notebook_files.parameter_names(notebook_files.read(notebook))
    for name in parameters:
        if name not in known:
            raise ValueError(f"{notebook.name}: {unknown_name('parameter', name, known)}")
    if "PROFILE" in parameters:
        load_profile(parameters["PROFILE"])

    failed = out.with_suffix(".failed.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    for name, value in KERNEL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with (
        # papermill writes cell by cell: where no other run does, and nobody looks after this one is killed.
        tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=".part", dir=out.parent) as room,
        tempfile.TemporaryDirectory(prefix="c2r-") as sockets,
    ):
        part = Path(room) / out.name
        try:
            papermill.execute_notebook(
                str(notebook),
                str(part),
                parameters=parameters,
                cwd=str(notebook.parent),
                kernel_name="python3",
                language="python",
                # Reach the kernel through files, not TCP: works without even a loopback network.
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
                extra_arguments=["--log-level=CRITICAL"],
                progress_bar=False,
            )
        except (papermill.PapermillExecutionError, DeadKernelError, CellTimeoutError) as error:
            part.replace(failed)
            raise NotebookFailed(
                f"{notebook} failed; the traceback is in {failed}\n{error}"
            ) from error
        part.replace(out)


def refresh(notebook: Path, work_folder: Path = Path("runs/refresh")) -> None:
    """Execute a committed notebook in place, with the parameters it holds, in canonical form.

    Doing it twice gives the same bytes. A failure leaves the notebook as it was.
    """
    out = work_folder / notebook.name
    run(notebook, out)
    text = notebook_files.canonical(notebook_files.read(out))
    with whole_file(notebook) as part:
        part.write_text(text, encoding="utf-8")


def summary(committed: Path, executed: Path) -> tuple[str, bool]:
    """Every verdict and lead, a count of the claims, and whether this run agrees with what is committed.

    `committed` is the folder of the notebooks with outputs, `executed` that of the same as just executed; see
    `disagreements`.
    """
    lines: list[str] = []
    every: list[Line] = []
    agrees, unsettled = True, []
    for path in sorted(committed.glob("[0-9][0-9]_*.ipynb")):
        run_path = executed / path.name
        lines.append(f"\n{path.stem}")
        was = notebook_files.read(path)
        awaits = notebook_files.awaits_evidence(was)
        if not run_path.is_file():
            why = "it waits for results that take long" if awaits else f"{run_path} is missing"
            lines.append(f"  not run: {why}")
            agrees &= awaits
            continue
        measured = notebook_files.verdicts(notebook_files.read(run_path))
        every += measured
        lines += [f"  {line.printed}" for line in measured]
        if awaits:
            lines.append("  committed without outputs, so there is nothing to compare with")
            continue
        differ, changed = disagreements(notebook_files.verdicts(was), measured)
        lines += [f"  DIFFERS, {line}" for line in differ]
        unsettled += [f"  {path.stem[:2]} {line}" for line in changed]
        agrees &= not differ
        lines.append(f"  notebook {run_path}, numbers {run_path.with_suffix('.json')}")
    outcome = "This run agrees with what is committed."
    if not agrees:
        outcome = "This run does NOT agree with what is committed: see the lines marked DIFFERS or not run."
    lines += ["", claims_text(every), ""]
    if unsettled:
        lines += [UNSETTLED, *unsettled, ""]
    return "\n".join([*lines, outcome]), agrees


UNSETTLED = (
    "Claims whose verdict is another one here, although the two intervals overlap. A training on another\n"
    "processor, which differs in how it rounds, is a new draw: what rests on one of them is not settled."
)


def disagreements(was: Sequence[Line], now: Sequence[Line]) -> tuple[list[str], list[str]]:
    """What differs between two runs of a notebook, and the claims that are not settled.

    A claim differs where the two intervals have nothing in common. Where they overlap and the verdict
    changed it is not settled. Every other line differs with its verdict. What takes a study of its own, such
    as `make validate`, and was not measured by the second run is left out.
    """
    unmeasured = {line.subject for line in now if line.verdict == NOT_MEASURED}
    was, now = ([x for x in lines if x.subject not in unmeasured] for lines in (was, now))
    of_now = {line.statement: line for line in now if line.interval}
    differ, unsettled, compared = [], [], set()
    for line in was:
        other = of_now.get(line.statement)
        if line.kind != "claim" or not line.interval or other is None:
            continue
        compared.add(line.statement)
        (low, high), (other_low, other_high) = line.interval, other.interval
        if max(low, other_low) > min(high, other_high):
            differ += [f"committed: {line.printed}", f"this run: {other.printed}"]
        elif line.verdict != other.verdict:
            unsettled.append(f"committed: {line.printed}\n     this run: {other.printed}")
    before, after = (
        [x.compared for x in lines if x.statement not in compared] for lines in (was, now)
    )
    for line in sorted(set(before) ^ set(after)):
        differ.append(f"{'committed' if line in before else 'this run'}: {line}")
    if not differ and [x.statement for x in was] != [x.statement for x in now]:
        differ.append("the order or the number of lines")
    return differ, unsettled


def computed_text(executed: Path, committed: Path) -> str:
    """How many of the committed results were computed by this run; the folders hold them study by study."""
    names = {path.relative_to(committed) for path in committed.glob("*/*.json")}
    here = {path.relative_to(executed) for path in executed.glob("*/*.json")}
    return (
        f"{len(names & here)} of {len(names)} results were computed here ({executed}), the others read "
        f"from {committed} where a notebook shows them; `make reproduce ALL=1` computes these too."
    )


def claims_text(lines: Iterable[Line]) -> str:
    """How many claims held and failed; checks, guards and leads are not counted."""
    rows = [
        f"  {f'{about}, about {subject}':32s} {held:3d} held  {failed:3d} failed"
        for (about, subject), (held, failed) in counted(lines).items()
    ]
    return "\n".join(["Claims (checks, guards and leads are not counted):", *rows])


def outcome_text(executed: Path) -> str:
    """What one executed notebook found: guards, claims and leads, how many claims hold, where to look."""
    found = notebook_files.verdicts(notebook_files.read(executed))
    lines = [f"  {line.printed}" for line in found if line.kind != "check"]
    judged = [x.verdict for x in found if x.kind == "claim" and x.verdict in ("holds", "FAILS")]
    if judged:
        held = judged.count("holds")
        lines.append(f"{held} of {len(judged)} claims hold; one that FAILS is a result, no error.")
    return "\n".join([*lines, f"`make lab` opens the notebooks; this one is {executed}"])


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m c2r_core.notebook.runner", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)

    runs = commands.add_parser("run", help="execute one notebook")
    runs.add_argument("notebook", type=Path)
    runs.add_argument("--out", type=Path, required=True, help="where the executed notebook goes")
    runs.add_argument("--profile", dest="PROFILE", help=", ".join(profile_names()))
    runs.add_argument("--seed", dest="SEED", type=int)
    runs.add_argument("--device", dest="DEVICE", help="auto, cpu or cuda")
    runs.add_argument("--brief", action="store_true", help="do not print what it found")
    runs.add_argument(
        "-p", dest="others", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )

    sums = commands.add_parser("summary", help="print every verdict and count the claims")
    sums.add_argument("--committed", type=Path, default=Path("notebooks"))
    sums.add_argument("--executed", type=Path, default=Path("runs/default"))

    refreshes = commands.add_parser("refresh", help="execute committed notebooks in place")
    refreshes.add_argument("notebooks", type=Path, nargs="+")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if a notebook failed, 2 if it could not be run or written."""
    given = _arguments(arguments)
    try:
        if given.command == "summary":
            text, agrees = summary(given.committed, given.executed)
            print(text)
            print(f"\n{computed_text(given.executed, results_dir('default'))}")
            return 0 if agrees else 1
        if given.command == "refresh":
            os.environ.setdefault("C2R_CELLS", "commit")
            for notebook in given.notebooks:
                print(f"refreshing {notebook}", flush=True)
                refresh(notebook)
            return 0
        parameters = {name: yaml.safe_load(value) for name, value in given.others}
        for name in ("PROFILE", "SEED", "DEVICE"):
            if getattr(given, name) is not None:
                parameters[name] = getattr(given, name)
        print(f"running {given.notebook} -> {given.out}", flush=True)
        started = time.monotonic()
        run(given.notebook, given.out, parameters)
        if not given.brief:
            print(outcome_text(given.out))
        print(f"done: {given.out} ({time.monotonic() - started:.0f} s)", flush=True)
    except NotebookFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
