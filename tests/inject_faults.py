"""`make faults`: breaks real work at random moments, and counts what it costs.

Processes are killed in the middle of a training, a save, a harvest, a computation of cells, an evaluation and
a notebook. Disks fill up, folders may not be written to, two runs meet in one place, clocks jump. Files are
cut, swapped and altered by one bit, and numbers become NaN. After each fault the work is taken up again as a
user would. Counted are the tries, those after which all was as if nothing had happened, the most work of one
try that had to be done twice, and wrong results that nobody was told of: there must be none. `docs/faults.md`
says what to do after each.

    python tests/inject_faults.py [--share 0.1] [--seed 0] [--only killed_evaluations]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from architectures import make, new_sae
from c2r_core.data.batches import StoreBatches, ToyBatches
from c2r_core.data.harvest import harvest
from c2r_core.data.store import ActivationStore
from c2r_core.saes import ARCHITECTURES, load_sae, save_sae
from c2r_core.training import C2R, DivergedError, train
from c2r_core.training.checkpoints import read_checkpoint
from faults import flip
from faults_of_runs import (
    bad_language_models,
    damaged_caches,
    jumping_clocks,
    killed_evaluations,
    killed_notebooks,
    read_only_folders,
    two_at_once,
)
from faulty_work import (
    CONFIG,
    EVERY,
    TREE,
    Outcome,
    World,
    cells_computed,
    checksums,
    digest,
    folders,
    forked,
    harvested,
    in_little_room,
    is_one_of,
    language_model,
    noted,
    trained,
    trained_into,
    two_saes,
    usual_cells,
    usual_harvest,
    usual_training,
    values_of_cells,
)
from stores import small_config, small_corpus

CUTS = 30
"""Points at which the training of each architecture is killed."""

# -- training -------------------------------------------------------------------------------------


def killed_trainings(world: World) -> Outcome:
    """Every architecture in turn; another process takes the training up."""
    outcome, names = Outcome("step", allowed=EVERY), sorted(ARCHITECTURES)
    tried = Counter(dict.fromkeys(names, 0))
    for i, folder in enumerate(world.tries(CUTS * len(names))):
        name, checkpoint = names[i % len(names)], folder / "run.safetensors"
        taken, result, usual = folder / "steps", folder / "digest", usual_training(name)
        moment = world.chance.uniform(0, 1.5 * usual.seconds)  # with checkpoints it takes longer
        forked(trained, name, checkpoint, taken, kill_after=moment)
        saved = read_checkpoint(checkpoint)[1]["step"] if checkpoint.exists() else 0
        last = int((noted(taken) or ["0"])[-1])
        failed = forked(trained_into, name, checkpoint, result)
        is_right = not failed and result.read_text() == usual.result
        outcome.count(is_right, f"{name} resumed from step {saved}", last - saved)
        tried[name] += 1
    outcome.note = f"at least {min(tried.values())} of each of the {len(names)} architectures"
    return outcome


def numbers_that_are_none(world: World) -> Outcome:
    """NaN or infinity in a batch, in a penalty, or in the weights: said at once, and no checkpoint of it."""
    outcome = Outcome()
    batches = ToyBatches(TREE, 32, 0)
    for folder in world.tries(60):
        where = world.chance.choice(["batch", "penalty", "weights"])
        bad, at = world.chance.choice([float("nan"), float("inf")]), world.chance.randrange(2, 99)
        sae, checkpoint = new_sae("batch_topk"), folder / "run.safetensors"

        def source(step: int, where=where, at=at, bad=bad, sae=sae) -> torch.Tensor:
            x = batches(step)
            Unsteady.factor = bad if step == at and where == "penalty" else 1.0
            if step == at and where == "batch":
                x[3, 5] = bad
            elif step == at and where == "weights":
                with torch.no_grad():
                    sae.W_dec[1, 2] = bad
            return x

        try:
            train(sae, source, CONFIG, [Unsteady(0.1)], checkpoint=checkpoint, progress=False)
            said = False
        except (ValueError, DivergedError):
            said = True
        kept = read_checkpoint(checkpoint)[0].values() if checkpoint.exists() else []
        is_finite = all(torch.isfinite(t).all() for t in kept if t.is_floating_point())
        outcome.count(said and is_finite, f"{bad} in the {where} of step {at}")
    return outcome


class Unsteady(C2R):
    """C²R times a number that is set from outside."""

    factor: ClassVar[float] = 1.0

    def __call__(self, *given: Any) -> torch.Tensor:
        return super().__call__(*given) * Unsteady.factor


# -- files ----------------------------------------------------------------------------------------


def killed_saves(world: World) -> Outcome:
    """An SAE saved over another again and again: there is always one of the two, whole."""
    outcome = Outcome()
    one, other = two_saes()
    known = {digest(one), digest(other)}

    def again_and_again(saved: Path) -> None:
        while True:
            for sae in (other, one):
                save_sae(sae, saved, overwrite=True)

    for folder in world.tries(60):
        saved = save_sae(one, folder / "sae")
        forked(again_and_again, saved, kill_after=world.chance.uniform(0.01, 0.2))
        outcome.count(is_one_of(saved, known), "no SAE, or another")
    return outcome


def full_disks(world: World) -> Outcome:
    """No file may grow beyond a random size: an error says so, and what was there is as it was."""
    outcome = Outcome()
    one, other = two_saes()

    def over_it(saved: Path) -> None:
        save_sae(other, saved, overwrite=True)

    for folder in world.tries(60):
        saved, checkpoint = save_sae(one, folder / "sae"), folder / "run.safetensors"
        limit = world.chance.randrange(0, (saved / "sae.safetensors").stat().st_size)

        failed = forked(in_little_room, limit, over_it, saved) != 0
        is_right = failed and is_one_of(saved, {digest(one)})
        failed = forked(in_little_room, limit, trained, "batch_topk", checkpoint) != 0
        is_right &= failed and not checkpoint.exists()
        left = [path.name for path in folder.iterdir() if path.name != "sae"]
        outcome.count(is_right and not left, f"limit {limit}: left {left}")
    return outcome


def damaged_files(world: World) -> Outcome:
    """A bit, an end, or a whole file of another: refused with its name, or of no consequence."""
    outcome = Outcome()
    folder = Path(tempfile.mkdtemp(dir=world.folder))
    readers = dict(_readers(folder))
    originals = {file: file.read_bytes() for file in readers}
    expected = {file: read() for file, read in readers.items()}
    for _ in world.tries(150):
        file = world.chance.choice(sorted(readers))
        read, whole = readers[file], originals[file]
        damage = world.chance.choice(["bit", "cut", "swap"])
        if damage == "bit":
            flip(file, world.chance.randrange(8 * len(whole)))
        elif damage == "cut":
            file.write_bytes(whole[: world.chance.randrange(len(whole))])
        else:
            file.write_bytes(originals[world.chance.choice([o for o in originals if o != file])])
        try:
            is_right = read() == expected[file]
        except (ValueError, OSError) as error:
            is_right = str(file) in str(error) or str(file.parent) in str(error)
        outcome.count(is_right, f"{damage} of {file.name}")
        file.write_bytes(whole)
    return outcome


def _readers(folder: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """Files of every kind, and how each is read."""
    saved = save_sae(make("batch_topk"), folder / "sae")
    for name in ("config.json", "sae.safetensors"):
        yield saved / name, lambda: digest(load_sae(saved))
    checkpoint = folder / "run.safetensors"
    trained("batch_topk", checkpoint)
    yield checkpoint, lambda: repr(read_checkpoint(checkpoint))
    store = harvest(language_model(), small_corpus(), small_config(), folder / "store")

    def all_batches() -> str:
        opened = ActivationStore.open(store.folder)
        opened.check()
        return repr([StoreBatches(opened, 4, seed=0)(step).tolist() for step in range(3)])

    for path in sorted(store.folder.iterdir()):
        yield path, all_batches


# -- from text to results -------------------------------------------------------------------------


def killed_harvests(world: World) -> Outcome:
    """No store, or a whole one; the next harvest is as the first would have been."""
    outcome, usual = Outcome("harvest", allowed=1), usual_harvest(world.folder)
    for folder in world.tries(40):
        store = folder / "store"
        forked(harvested, store, kill_after=world.chance.uniform(0, usual.seconds))
        lost = int(not store.exists())
        failed = lost and forked(harvested, store)
        outcome.count(not failed and checksums(store) == usual.result, "another store", lost)
    return outcome


def killed_cells(world: World) -> Outcome:
    """A study of four cells: those that were finished are kept, the others computed, all as ever."""
    outcome, usual = Outcome("cell", allowed=1), usual_cells(world.folder)
    for folder in world.tries(40):
        begun = folder / "begun"
        with folders(folder):
            forked(cells_computed, begun, kill_after=world.chance.uniform(0, usual.seconds))
            failed = forked(cells_computed, begun)
            is_right = not failed and values_of_cells() == usual.result
        lost = len(noted(begun)) - len(set(noted(begun)))
        outcome.count(is_right, "other values", lost)
    return outcome


FAULTS: dict[str, Callable[[World], Outcome]] = {
    "training killed": killed_trainings,
    "saving an SAE killed": killed_saves,
    "harvest killed": killed_harvests,
    "computation of results killed": killed_cells,
    "evaluation killed": killed_evaluations,
    "notebook killed": killed_notebooks,
    "two runs at once in one place": two_at_once,
    "no room left, in a save or a checkpoint": full_disks,
    "folder that may not be written to": read_only_folders,
    "file with a flipped bit, cut, or swapped": damaged_files,
    "entry of the cache half written or changed": damaged_caches,
    "NaN or infinity in a training": numbers_that_are_none,
    "NaN or infinity in a language model": bad_language_models,
    "clocks that jump": jumping_clocks,
}
"""By the name of their row in the table."""


def main(arguments: list[str] | None = None) -> int:
    """Inject all; 1 if a wrong result was silent, or more work was lost than may be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the tries")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    names = [fault.__name__ for fault in FAULTS.values()]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these faults")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # processes are forked from this one
    outcomes = []
    # Flushed, since a forked process would else print it again.
    print(
        f"{'fault':<42}{'tries':>7}{'survived':>10}{'work lost':>12}{'silent':>8}{'seconds':>9}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, fault in FAULTS.items():
            if fault.__name__ not in given.only:
                continue
            started = time.monotonic()
            chance = random.Random(f"{given.seed} {fault.__name__}")
            outcome = fault(World(chance, Path(folder), given.share))
            outcomes.append(outcome)
            print(
                f"{name:<42}{outcome.tries:>7}{outcome.survived:>10}"
                f"{outcome.work_lost:>12}{len(outcome.silent):>8}"
                f"{time.monotonic() - started:>9.0f}",
                flush=True,
            )
            for one in outcome.silent[:5]:
                print(f"    {one}", flush=True)
            if outcome.note:
                print(f"    {outcome.note}", flush=True)
    n_tries, n_silent = sum(o.tries for o in outcomes), sum(len(o.silent) for o in outcomes)
    lost = ", ".join(outcome.work_lost for outcome in outcomes if outcome.lost) or "nothing"
    print(f"{n_tries} faults, {n_silent} wrong in silence, done twice at most: {lost}")
    return int(n_silent > 0 or any(outcome.lost > outcome.allowed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
