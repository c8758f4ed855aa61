"""Faults of whole runs, for `make faults`: evaluations, notebooks, two at once, and what is around them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import nbformat
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory

import c2r_core.notebook.figures  # noqa: F401  # a forked kernel has it then
from c2r_core.notebook import files as notebook_files
from c2r_core.notebook import runner
from c2r_core.saes import ARCHITECTURES, load_sae, save_sae
from faults import flip
from faulty_work import (
    Expected,
    Outcome,
    Usual,
    World,
    as_rights_say,
    cells_computed,
    checksums,
    digest,
    ended,
    evaluated,
    folders,
    forked,
    harvested,
    is_usual,
    language_model,
    noted,
    seconds,
    started,
    trained,
    trained_into,
    two_saes,
    under_jumping_clocks,
    usual_cells,
    usual_evaluation,
    usual_harvest,
    usual_training,
    values_of_cells,
)
from forks import AsPopen, ForkedKernel, run_kernel

# -- evaluations ----------------------------------------------------------------------------------


def killed_evaluations(world: World) -> Outcome:
    """The same command again takes the evaluation up, and writes the report of one that was never killed."""
    outcome = Outcome("metric", allowed=1)
    usual = usual_evaluation(world.folder)
    for folder in world.tries(24):
        begun, again = folder / "begun", folder / "begun again"
        is_filled = world.chance.random() < 0.5
        with folders(folder, cache=_copied(usual, folder) if is_filled else None):
            moment = world.chance.uniform(0, 1.3 * usual.seconds)
            forked(evaluated, folder, begun, kill_after=moment)
            has_report = (folder / "report.json").exists()
            failed = forked(evaluated, folder, again)
        lost = 0 if has_report else len(set(noted(begun)) & set(noted(again)))
        what = f"killed after {len(noted(begun))} metrics: another report, or none"
        outcome.count(not failed and is_usual(folder, usual), what, lost)
    return outcome


def _copied(usual: Usual, folder: Path) -> Path:
    """A copy of the cache that an evaluation has filled."""
    return Path(shutil.copytree(usual.cache, folder / "cache"))


# -- notebooks ------------------------------------------------------------------------------------

NOTEBOOK = (
    'PROFILE = "smoke"\nSEED = 0\nDEVICE = "cpu"',
    "import torch\n"
    "from c2r_core.artefacts.cells import Cell, read_or_compute\n"
    "from c2r_core.notebook import start\n\n"
    'nb = start("00_tiny", profile=PROFILE, seed=SEED, device=DEVICE)',
    'found = nb.cells("toy", only=lambda name: name.startswith("relu"))\nprint(sorted(found))',
    "def draw():\n"
    "    return torch.randn(9000, generator=torch.Generator().manual_seed(1)).tolist()\n\n"
    'cell = Cell("tiny", "draws", "default", {"n": 9000}, draw, ("c2r_core.seeds",))\n'
    'draws = torch.tensor(read_or_compute(cell, "commit"))\nprint(float(draws.mean()))',
    "nb.record(found=found, mean=draws.mean())\n"
    'nb.check("all draws are finite", bool(draws.isfinite().all()))\n'
    "nb.finish()",
)
"""Cells of a study into runs/, a result into results/, and claims and numbers of its own."""
NAME = "00_tiny.ipynb"


def killed_notebooks(world: World) -> Outcome:
    """Run into runs/ as by `make reproduce`, or in its place as by `make refresh`; then run again."""
    outcome = Outcome("notebook", allowed=1)
    by_run, whole = usual_notebook(world.folder)
    new, executed = by_run[f"notebooks/{NAME}"], by_run[f"runs/smoke/{NAME}"]
    by_refresh = by_run | {f"notebooks/{NAME}": executed, f"runs/refresh/{NAME}": executed}
    del by_refresh[f"runs/smoke/{NAME}"]
    for i, folder in enumerate(world.tries(16)):
        work, expected = [(_run_notebook, by_run), (_refresh_notebook, by_refresh)][i % 2]
        _write_notebook(folder)
        alive, held = os.pipe()
        with folders(folder):
            moment = world.chance.uniform(0, 1.1 * whole)
            forked(_with_own_kernel, folder, work, folder, kill_after=moment)
            left = _whole_files(folder)
            failed = forked(_with_own_kernel, folder, work, folder)
        _wait_for_all(alive, held)
        half = [name for name in left if left[name] not in (expected.get(name), new)]
        is_right = not failed and not half and _whole_files(folder) == expected
        outcome.count(is_right, f"{work.__name__}: half written {half}", int(left != expected))
    return outcome


@functools.cache
def usual_notebook(scratch: Path) -> Expected:
    """What is on the disk after a run, without times."""
    folder = scratch / "notebook"
    _write_notebook(folder)
    alive, held = os.pipe()
    with folders(folder):
        whole = seconds(_with_own_kernel, folder, _run_notebook, folder)
    _wait_for_all(alive, held)
    return Expected(_whole_files(folder), whole)


def _write_notebook(folder: Path) -> None:
    new = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(
        cells=[new(source, id=f"cell-{i}") for i, source in enumerate(NOTEBOOK)]
    )
    notebook.cells[0].metadata["tags"] = ["parameters"]
    (folder / "notebooks").mkdir(parents=True)
    nbformat.write(notebook, folder / "notebooks" / NAME)


def _run_notebook(folder: Path) -> None:
    runner.run(folder / "notebooks" / NAME, folder / "runs" / "smoke" / NAME)


def _refresh_notebook(folder: Path) -> None:
    runner.refresh(folder / "notebooks" / NAME, folder / "runs" / "refresh")


def _whole_files(folder: Path) -> dict[str, object]:
    """What is in notebooks/, runs/ and results/, without times; None is a file that is not whole.

    Left out are locks, and what nothing ever reads (`*.part`).
    """
    found: dict[str, object] = {}
    for path in sorted(folder.glob("*/**/*")):
        name = path.relative_to(folder)
        is_read = not any(part.endswith((".part", ".lock")) for part in name.parts)
        if is_read and path.is_file() and name.parts[0] in ("notebooks", "runs", "results"):
            try:
                if path.suffix == ".ipynb":
                    found[name.as_posix()] = notebook_files.canonical(notebook_files.read(path))
                else:
                    found[name.as_posix()] = json.loads(path.read_bytes()) | {"provenance": {}}
            except ValueError:
                found[name.as_posix()] = None
    return found


def _wait_for_all(alive: int, held: int) -> None:
    """Until no other process holds this pipe: a kernel lives on for a second when its runner is killed."""
    os.close(held)
    os.read(alive, 1)
    os.close(alive)


def _with_own_kernel(folder: Path, work: Callable[..., object], *given: Any) -> None:
    """Do the work with a kernel that is forked now, while this process has one thread, and waits for it."""
    tempfile.tempdir = str(folder)
    here, there = multiprocessing.Pipe()
    kernel = multiprocessing.get_context("fork").Process(target=_kernel, args=(here, there))
    kernel.start()
    there.close()
    WaitingKernel.waiting, WaitingKernel.connection = kernel, here
    factory = KernelProvisionerFactory.instance()
    entry = EntryPoint("waiting", f"{__name__}:WaitingKernel", factory.GROUP_NAME)
    factory.provisioners["waiting"] = entry
    factory.default_provisioner_name = "waiting"
    work(*given)


def _kernel(other_end: Connection, connection: Connection) -> None:
    other_end.close()
    runner_is = os.getppid()
    try:
        arguments, folder, environment = connection.recv()
    except EOFError:
        return  # the runner was killed before it wanted a kernel
    os.environ.update(environment)
    # As the variable JPY_PARENT_PID tells a kernel that is not forked.
    run_kernel([*arguments, f"--IPKernelApp.parent_handle={runner_is}"], folder)


class WaitingKernel(ForkedKernel):
    """One kernel that is there already, and takes what a new one would be started with."""

    waiting: ClassVar[BaseProcess]
    connection: ClassVar[Connection]

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Tell the waiting kernel its arguments."""
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.cwd = kwargs.get("cwd") or os.getcwd()
        self.connection.send((arguments, self.cwd, kwargs["env"]))
        self.process, self.pid = AsPopen(self.waiting), self.waiting.pid
        return self.connection_info


# -- two runs at once -----------------------------------------------------------------------------

Twice = tuple[Callable[[int], object], Callable[[], bool]]
"""Work that is done twice, and is told which time it is; and whether what came of it is right."""


def two_at_once(world: World) -> Outcome:
    """The same work twice, in one place and a little apart; the first may be killed.

    The second waits, or does the work too, or is refused with a FileExistsError that names the place.
    """
    outcome = Outcome()
    kinds = (_two_of_cells, _two_trainings, _two_evaluations, _two_harvests, _two_notebooks)
    for i, folder in enumerate(world.tries(20)):
        kind = kinds[i % len(kinds)]
        work, is_right = kind(world, folder)
        is_killed, apart = world.chance.random() < 0.4, world.chance.uniform(0, 0.4)
        files = [folder / "said by first", folder / "said by second"]
        alive, held = os.pipe()
        with folders(folder):
            first = started(work, 0, said=files[0])
            time.sleep(apart)
            second = started(work, 1, said=files[1])
            if is_killed:
                time.sleep(world.chance.uniform(0, 0.4))
                os.kill(first, signal.SIGKILL)
            statuses = [ended(first), ended(second)]
            _wait_for_all(alive, held)
            said = [file.read_text() if file.exists() else "" for file in files]
            ended_well = all(
                status == 0
                or text.startswith("FileExistsError")
                and str(folder) in text
                or is_killed
                and status == -signal.SIGKILL
                for status, text in zip(statuses, said, strict=True)
            )
            outcome.count(ended_well and is_right(), f"{kind.__name__}: {statuses} {said}")
    return outcome


def _two_evaluations(world: World, folder: Path) -> Twice:
    usual = usual_evaluation(world.folder)
    save_sae(load_sae(usual.cache.parent / "sae"), folder / "sae")
    return lambda _: evaluated(folder), lambda: is_usual(folder, usual)


def _two_trainings(world: World, folder: Path) -> Twice:
    name, checkpoint = world.chance.choice(sorted(ARCHITECTURES)), folder / "run.safetensors"
    expected, results = usual_training(name).result, [folder / f"digest-{n}" for n in range(3)]

    def is_right() -> bool:
        trained_into(name, checkpoint, results[2])  # what the last checkpoint holds
        return {file.read_text() for file in results if file.exists()} == {expected}

    return lambda n: trained_into(name, checkpoint, results[n]), is_right


def _two_harvests(world: World, folder: Path) -> Twice:
    expected, store = usual_harvest(world.folder).result, folder / "store"
    return lambda _: harvested(store), lambda: checksums(store) == expected


def _two_of_cells(world: World, folder: Path) -> Twice:
    expected, begun = usual_cells(world.folder).result, folder / "begun"

    def is_right() -> bool:
        n_twice = len(noted(begun)) - len(set(noted(begun)))
        return (
            values_of_cells() == expected and n_twice <= 1
        )  # the one in which the first was killed

    return lambda _: cells_computed(begun), is_right


def _two_notebooks(world: World, folder: Path) -> Twice:
    expected = usual_notebook(world.folder).result
    _write_notebook(folder)
    return (
        lambda _: _with_own_kernel(folder, _run_notebook, folder),
        lambda: _whole_files(folder) == expected,
    )


# -- a language model that gives no numbers -------------------------------------------------------


def bad_language_models(world: World) -> Outcome:
    """NaN or infinity behind a part of a block, at one position: said, and nothing of it is kept.

    Work that does not read that part is as ever. The same work with a sound model then is as ever, too, with
    the same cache.
    """
    outcome, names, n_said = Outcome(), ("", ".mlp", ".self_attn"), 0
    for i, folder in enumerate(world.tries(20)):
        module = f"model.layers.{world.chance.randrange(2)}{world.chance.choice(names)}"
        bad = world.chance.choice([float("nan"), float("inf"), -float("inf")])
        spoil = partial(
            _spoiled, module, world.chance.randrange(32), world.chance.randrange(64), bad
        )
        said = folder / "said"
        if i % 2 == 1:
            usual = usual_evaluation(world.folder)
            with folders(folder):
                failed = forked(spoil, evaluated, folder, said=said)
                is_right = _says(said) if failed else _differs_by_what_it_says(folder, usual)
                n_said += bool(failed) or not is_usual(folder, usual)
                failed = forked(evaluated, folder)
            is_right &= not failed and is_usual(folder, usual)
        else:
            expected, store = usual_harvest(world.folder).result, folder / "store"
            failed = forked(spoil, harvested, store, said=said)
            is_right = not store.exists() and _says(said) if failed else True
            n_said += bool(failed)
            failed = failed and forked(harvested, store)
            is_right &= not failed and checksums(store) == expected
        what = said.read_text() if said.exists() else ""
        outcome.count(is_right, f"{bad} behind {module}: {what}")
    outcome.note = f"{n_said} were said, the others touched nothing that was read"
    return outcome


def _spoiled(
    module: str, position: int, column: int, bad: float, work: Callable[..., object], *given: Any
) -> None:
    """Do the work while the language model gives a bad number there; in a process that is not used again."""

    def spoil(_: object, __: object, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if position < x.shape[1]:
            x[:, position, column] = bad

    language_model().original_model.get_submodule(module).register_forward_hook(spoil)
    work(*given)


def _says(file: Path) -> bool:
    """Whether an error says that a number is none."""
    return re.search(r"\b(nan|inf|infinite)\b", file.read_text(), re.IGNORECASE) is not None


def _differs_by_what_it_says(folder: Path, usual: Usual) -> bool:
    """Whether each metric of a report is the usual one, or says why it could not be evaluated."""
    found = json.loads((folder / "report.json").read_bytes())["metrics"]
    expected = json.loads(usual.report)["metrics"]
    return all(
        record == expected[name]
        or record["status"] == "not evaluable"
        and "nan" in record["reason"].lower()
        for name, record in found.items()
    )


# -- a folder that may not be written to ----------------------------------------------------------


def read_only_folders(world: World) -> Outcome:
    """Written is nothing, with an error that names the place; what is there is read as ever."""
    outcome = Outcome()
    one, other = two_saes()
    for i, scratch in enumerate(world.tries(20)):
        folder, said = scratch / "read only", scratch / "said"
        save_sae(one, folder / "sae")
        usual_cells(world.folder)
        shutil.copytree(world.folder / "cells", folder / "kept")
        works = (
            partial(save_sae, other, folder / "sae", overwrite=True),
            partial(trained, "batch_topk", folder / "run.safetensors"),
            partial(harvested, folder / "store"),
            partial(evaluated, folder),
            cells_computed,
        )
        before = _content(folder)
        _allow_writing(folder, False)
        with folders(folder, cache=usual_evaluation(world.folder).cache):
            failed = forked(as_rights_say, works[i % len(works)], said=said)
            is_right = bool(failed) and _content(folder) == before
            is_right &= str(folder) in said.read_text() if said.exists() else False
        expected = digest(one), usual_cells(world.folder).result
        with folders(folder / "kept"):
            is_right &= forked(as_rights_say, _read, folder / "sae", *expected) == 0
        what = said.read_text() if said.exists() else "no error"
        outcome.count(is_right, f"{works[i % len(works)]}: {what}")
        _allow_writing(folder, True)
    return outcome


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _allow_writing(folder: Path, is_allowed: bool) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755 if is_allowed else 0o555)


def _read(saved: Path, sae: str, values: list[object]) -> None:
    assert digest(load_sae(saved)) == sae and values_of_cells() == values


# -- clocks ---------------------------------------------------------------------------------------


def jumping_clocks(world: World) -> Outcome:
    """A training that is killed and taken up, cells, and an evaluation, while both clocks jump: as ever."""
    outcome, names = Outcome(), sorted(ARCHITECTURES)
    for i, folder in enumerate(world.tries(15)):
        jump = partial(under_jumping_clocks, world.chance.randrange(2**32))
        with folders(folder):
            if i % 3 == 0:
                name = names[i // 3 % len(names)]
                checkpoint, result = folder / "run.safetensors", folder / "digest"
                work = partial(jump, trained_into, name, checkpoint, result)
                usual = usual_training(name)
                changes = {"checkpoint_minutes": 60 * 24}
                moment = world.chance.uniform(0, 1.5 * usual.seconds)
                forked(work, changes, kill_after=moment)
                is_right = forked(work, changes) == 0 and result.read_text() == usual.result
            elif i % 3 == 1:
                expected = usual_cells(world.folder).result
                is_right = forked(jump, cells_computed) == 0 and values_of_cells() == expected
            else:
                is_right = forked(jump, evaluated, folder) == 0
                is_right &= is_usual(folder, usual_evaluation(world.folder))
        outcome.count(is_right, ("training", "cells", "evaluation")[i % 3])
    return outcome


# -- what is damaged in the cache -----------------------------------------------------------------


def damaged_caches(world: World) -> Outcome:
    """Files of an entry are missing, one is cut, or a bit flipped: refused by name, or of no consequence.

    Once what is named is deleted, it is made anew.
    """
    outcome, usual = Outcome(), usual_evaluation(world.folder)
    for i, folder in enumerate(world.tries(24)):
        with folders(folder, cache=_copied(usual, folder)):
            entries = sorted(path.parent for path in folder.glob("cache/*/*/key.json"))
            entry, said = world.chance.choice(entries), folder / "said"
            files = sorted(entry.iterdir())
            damage = [world.chance.choice(files)]
            size = damage[0].stat().st_size
            if i % 3 == 0:
                damage = world.chance.sample(files, world.chance.randint(1, len(files)))
                for file in damage:
                    file.unlink()
            elif i % 3 == 1:
                os.truncate(damage[0], world.chance.randrange(size))
            else:
                flip(damage[0], world.chance.randrange(8 * size))
            is_right = True
            if forked(evaluated, folder, said=said):
                is_right = str(entry) in said.read_text()
                shutil.rmtree(entry)
                is_right &= forked(evaluated, folder) == 0
            is_right &= is_usual(folder, usual)
        what = said.read_text() if said.exists() else "read as whole"
        outcome.count(is_right, f"{entry.parent.name}, {[one.name for one in damage]}: {what}")
    return outcome
