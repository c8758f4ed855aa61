"""`make faults`: breaks real work at random moments, and counts what it costs.

Processes are killed in the middle of a training, a save, a harvest and a computation of cells; disks fill up,
files are cut, swapped and altered by one bit, and numbers become NaN. After each fault the work is taken up
again as a user would. Counted are the tries, those after which all was as if nothing had happened, the most
steps of a training that had to be taken twice, and wrong results that nobody was told of: there must be none.

    python tests/inject_faults.py [--share 0.1] [--seed 0]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from architectures import make, new_sae
from c2r_core.artefacts.cells import read_or_compute
from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.batches import StoreBatches, ToyBatches
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.store import ActivationStore
from c2r_core.data.toy import FeatureTree
from c2r_core.experiments import cells
from c2r_core.saes import ARCHITECTURES, load_sae, save_sae
from c2r_core.training import C2R, DivergedError, TrainConfig, train
from c2r_core.training.checkpoints import read_checkpoint
from faults import flip
from stores import small_config, small_corpus

TREE = FeatureTree(d_in=12, n_parents=2, children_per_parent=2, n_singles=4)
EVERY = 10
CONFIG = TrainConfig(steps=100, lr=5e-3, log_every=7, checkpoint_every=EVERY)


@dataclass
class Outcome:
    """What became of all tries of one fault."""

    fault: str
    tries: int = 0
    most_steps_lost: int = 0
    silent: list[str] = field(default_factory=list)
    """Wrong results that nobody was told of: what, and in which try."""

    def count(self, is_right: bool, what: str = "") -> None:
        """One more try."""
        self.tries += 1
        if not is_right:
            self.silent.append(f"try {self.tries}: {what}")

    @property
    def survived(self) -> int:
        """Tries after which all was as if nothing had happened."""
        return self.tries - len(self.silent)


@dataclass(frozen=True)
class World:
    """What the faults share: a source of chance, a scratch folder, and how many tries to make."""

    chance: random.Random
    folder: Path
    share: float

    def tries(self, n: int) -> Iterator[Path]:
        """A new folder for each of n tries, or of their share."""
        for _ in range(max(1, round(n * self.share))):
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            yield folder
            shutil.rmtree(folder)


def forked(work: Callable[..., object], *given: Any, kill_after: float | None = None) -> int:
    """Exit status of work(*given) in a process of its own, which is killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            work(*given)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seconds(work: Callable[..., object], *given: Any) -> float:
    """How long work(*given) takes in a process of its own."""
    started = time.monotonic()
    assert forked(work, *given) == 0, "the work fails without any fault"
    return time.monotonic() - started


def in_little_room(limit: int, work: Callable[..., object], *given: Any) -> None:
    """Do the work where no file can grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    work(*given)


# -- training -------------------------------------------------------------------------------------


def trained(architecture: str, checkpoint: Path | None = None, steps_taken: Path | None = None):
    """An SAE after all its steps, and their record; each step is noted in a file as it begins."""
    sae, batches = new_sae(architecture), ToyBatches(TREE, 32, 0)

    def source(step: int) -> torch.Tensor:
        if steps_taken is not None:
            with steps_taken.open("a") as file:
                file.write(f"{step}\n")
        return batches(step)

    penalties = [C2R(0.1, every=3)]
    history = train(sae, source, CONFIG, penalties, checkpoint=checkpoint, progress=False)
    return sae, history.records


def digest(sae: torch.nn.Module, records: object = None) -> str:
    """Of every bit of an SAE, and of what was recorded."""
    found = hashlib.sha256(repr(records).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def killed_trainings(world: World) -> Outcome:
    """Every architecture in turn; another process takes the training up."""
    outcome, names = Outcome("training killed"), sorted(ARCHITECTURES)
    usual = {name: digest(*trained(name)) for name in names}
    whole = {name: seconds(trained, name) for name in names}

    def resumed(name: str, checkpoint: Path, result: Path) -> None:
        result.write_text(digest(*trained(name, checkpoint)))

    for i, folder in enumerate(world.tries(240)):
        name, checkpoint, taken = (
            names[i % len(names)],
            folder / "run.safetensors",
            folder / "steps",
        )
        moment = world.chance.uniform(0, 1.5 * whole[name])  # with checkpoints it takes longer
        forked(trained, name, checkpoint, taken, kill_after=moment)
        saved = read_checkpoint(checkpoint)[1]["step"] if checkpoint.exists() else 0
        outcome.most_steps_lost = max(outcome.most_steps_lost, _last(taken) - saved)
        result = folder / "digest"
        failed = forked(resumed, name, checkpoint, result)
        is_right = not failed and result.read_text() == usual[name]
        outcome.count(is_right, f"{name} resumed from step {saved}")
    return outcome


def _last(steps_taken: Path) -> int:
    taken = steps_taken.read_text().split("\n")[:-1] if steps_taken.exists() else []
    return int(taken[-1]) if taken else 0


def numbers_that_are_none(world: World) -> Outcome:
    """NaN or infinity in a batch, in a penalty, or in the weights: said at once, and no checkpoint of it."""
    outcome = Outcome("NaN or infinity in a training")
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
    outcome = Outcome("saving an SAE killed")
    one, other = make("batch_topk", seed=0), make("batch_topk", seed=1)
    known = {digest(one), digest(other)}

    def again_and_again(saved: Path) -> None:
        while True:
            for sae in (other, one):
                save_sae(sae, saved, overwrite=True)

    for folder in world.tries(60):
        saved = save_sae(one, folder / "sae")
        forked(again_and_again, saved, kill_after=world.chance.uniform(0.01, 0.2))
        outcome.count(_is_one_of(saved, known), "no SAE, or another")
    return outcome


def _is_one_of(saved: Path, known: set[str]) -> bool:
    try:
        return digest(load_sae(saved)) in known
    except (OSError, ValueError):
        return False


def full_disks(world: World) -> Outcome:
    """No file may grow beyond a random size: an error says so, and what was there is as it was."""
    outcome = Outcome("no room left, in a save or a checkpoint")
    one, other = make("batch_topk", seed=0), make("batch_topk", seed=1)

    def over_it(saved: Path) -> None:
        save_sae(other, saved, overwrite=True)

    for folder in world.tries(60):
        saved, checkpoint = save_sae(one, folder / "sae"), folder / "run.safetensors"
        limit = world.chance.randrange(0, (saved / "sae.safetensors").stat().st_size)

        failed = forked(in_little_room, limit, over_it, saved) != 0
        is_right = failed and _is_one_of(saved, {digest(one)})
        failed = forked(in_little_room, limit, trained, "batch_topk", checkpoint) != 0
        is_right &= failed and not checkpoint.exists()
        left = [path.name for path in folder.iterdir() if path.name != "sae"]
        outcome.count(is_right and not left, f"limit {limit}: left {left}")
    return outcome


def damaged_files(world: World) -> Outcome:
    """A bit, an end, or a whole file of another: refused with its name, or of no consequence."""
    outcome = Outcome("file with a flipped bit, cut, or swapped")
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
    store = harvest(load_language_model(RANDOM), small_corpus(), small_config(), folder / "store")

    def all_batches() -> str:
        opened = ActivationStore.open(store.folder)
        opened.check()
        return repr([StoreBatches(opened, 4, seed=0)(step).tolist() for step in range(3)])

    for path in sorted(store.folder.iterdir()):
        yield path, all_batches


# -- from text to results -------------------------------------------------------------------------


def killed_harvests(world: World) -> Outcome:
    """No store, or a whole one; the next harvest is as the first would have been."""
    outcome = Outcome("harvest killed")
    model, corpus, config = load_language_model(RANDOM), small_corpus(), small_config(40)

    def work(folder: Path) -> None:
        harvest(model, corpus, config, folder, contexts_per_pass=2)

    usual = world.folder / "usual"
    whole = seconds(work, usual)
    expected = ActivationStore.open(usual).manifest.checksums()
    for folder in world.tries(40):
        store = folder / "store"
        forked(work, store, kill_after=world.chance.uniform(0, whole))
        if not store.exists():
            assert forked(work, store) == 0
        opened = ActivationStore.open(store)
        opened.check()
        outcome.count(opened.manifest.checksums() == expected, "another store")
    return outcome


def killed_cells(world: World) -> Outcome:
    """A study of four cells: those that were finished are kept, the others computed, all as ever."""
    outcome = Outcome("computation of results killed")
    chosen = cells("toy", load_profile("smoke"))[:4]

    def work() -> None:
        for cell in chosen:
            read_or_compute(cell)

    def values() -> list[object]:
        return [read_or_compute(cell) for cell in chosen]

    for i, folder in enumerate(world.tries(40)):
        os.environ["C2R_RUNS"] = str(folder / "runs")
        os.environ["C2R_CACHE"] = str(folder / "cache")
        if i == 0:
            whole, usual = seconds(work), values()
            shutil.rmtree(folder / "runs")
            shutil.rmtree(folder / "cache", ignore_errors=True)
        forked(work, kill_after=world.chance.uniform(0, whole))
        assert forked(work) == 0
        outcome.count(values() == usual, "other values")
    return outcome


FAULTS = (
    killed_trainings,
    killed_saves,
    killed_harvests,
    killed_cells,
    full_disks,
    damaged_files,
    numbers_that_are_none,
)


def main(arguments: list[str] | None = None) -> int:
    """Inject all; 1 if a wrong result was silent, or more than a checkpoint's interval was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the tries")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # processes are forked from this one
    outcomes = []
    print(f"{'fault':<42}{'tries':>7}{'survived':>10}{'steps lost':>12}{'silent':>8}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for fault in FAULTS:
            started = time.monotonic()
            world = World(
                random.Random(f"{given.seed} {fault.__name__}"), Path(folder), given.share
            )
            outcome = fault(world)
            outcomes.append(outcome)
            print(
                f"{outcome.fault:<42}{outcome.tries:>7}{outcome.survived:>10}"
                f"{outcome.most_steps_lost:>12}{len(outcome.silent):>8}"
                f"{time.monotonic() - started:>9.0f}",
                flush=True,
            )
            for one in outcome.silent[:5]:
                print(f"    {one}")
    n_tries, n_silent = sum(o.tries for o in outcomes), sum(len(o.silent) for o in outcomes)
    lost = max(outcome.most_steps_lost for outcome in outcomes)
    print(f"{n_tries} faults, {n_silent} wrong in silence, at most {lost} steps taken twice")
    return int(n_silent > 0 or lost > EVERY)


if __name__ == "__main__":
    sys.exit(main())
