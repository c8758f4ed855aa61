"""What the faults of `make faults` share: how they are counted, processes of their own, and the work."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm

from architectures import make, new_sae
from c2r_core.artefacts.cells import Cell, read_or_compute
from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.batches import ToyBatches
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.store import ActivationStore
from c2r_core.data.toy import FeatureTree
from c2r_core.evaluate import __main__ as evaluate_command
from c2r_core.evaluate import evaluation
from c2r_core.experiments import cells
from c2r_core.metrics import inputs
from c2r_core.saes import BatchTopKSAE, load_sae, save_sae
from c2r_core.training import C2R, TrainConfig, train
from stores import small_config, small_corpus

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TREE = FeatureTree(d_in=12, n_parents=2, children_per_parent=2, n_singles=4)
EVERY = 10
CONFIG = TrainConfig(steps=100, lr=5e-3, log_every=7, checkpoint_every=EVERY)
MEASURED = "core,sparse_probing,meta_sae"
"""By the evaluations: quick, with records of both kinds, and with what is kept in the cache."""


# -- how it is counted ----------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of all tries of one fault."""

    unit: str = ""
    """Of the work that was lost."""
    allowed: int = 0
    """So much of it may be lost in one try."""
    tries: int = 0
    lost: int = 0
    """The most work of one try that had to be done twice."""
    silent: list[str] = field(default_factory=list)
    """Wrong results that nobody was told of: what, and in which try."""
    note: str = ""
    """What else is to be said of the tries."""

    def count(self, is_right: bool, what: str = "", lost: int = 0) -> None:
        """One more try, and how much work was done twice."""
        self.tries += 1
        self.lost = max(self.lost, lost)
        if not is_right:
            self.silent.append(f"try {self.tries}: {what}")

    @property
    def survived(self) -> int:
        """Tries after which all was as if nothing had happened."""
        return self.tries - len(self.silent)

    @property
    def work_lost(self) -> str:
        """As a text: "9 steps"."""
        return f"{self.lost} {self.unit}{'s' * (self.lost > 1)}" if self.lost else "0"


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


# -- processes of their own -----------------------------------------------------------------------


def started(work: Callable[..., object], *given: Any, said: Path | None = None) -> int:
    """Number of a process that does work(*given); a file may take what its error says."""
    child = os.fork()
    if child == 0:
        # tqdm's own lock is one for all forked processes, and stays locked when its holder is killed.
        tqdm.set_lock(threading.RLock())
        try:
            work(*given)
        except BaseException as error:
            if said is not None:
                said.write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    """Exit status of a process, once it has one."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(
    work: Callable[..., object],
    *given: Any,
    kill_after: float | None = None,
    said: Path | None = None,
) -> int:
    """Exit status of work(*given) in a process of its own, which is killed after so many seconds."""
    child = started(work, *given, said=said)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return ended(child)


def seconds(work: Callable[..., object], *given: Any) -> float:
    """How long work(*given) takes in a process of its own."""
    began = time.monotonic()
    assert forked(work, *given) == 0, "the work fails without any fault"
    return time.monotonic() - began


def in_little_room(limit: int, work: Callable[..., object], *given: Any) -> None:
    """Do the work where no file can grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    work(*given)


def as_rights_say(work: Callable[..., object], *given: Any) -> None:
    """Do the work so that a folder's rights bind it, also where the user is root (on Linux).

    Root writes where the rights forbid it, by a capability of its processes. This one gives all of them up.
    """
    if os.geteuid() == 0:
        version_3, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(version_3, nothing) == 0
    work(*given)


def under_jumping_clocks(seed: int, work: Callable[..., object], *given: Any) -> None:
    """Do the work while both clocks jump, at every look, by up to twelve days forward or back."""
    chance = random.Random(seed)

    def jumping(now: Callable[[], float]) -> Callable[[], float]:
        return lambda: now() + chance.uniform(-1e6, 1e6)

    time.time, time.monotonic = jumping(time.time), jumping(time.monotonic)
    work(*given)


@contextlib.contextmanager
def folders(folder: Path, cache: Path | None = None) -> Iterator[None]:
    """Cache, runs and results are in this folder for the block."""
    places = {name: folder / name for name in ("cache", "runs", "results")}
    places |= {} if cache is None else {"cache": cache}
    with patch.dict(os.environ, {f"C2R_{n.upper()}": str(place) for n, place in places.items()}):
        yield


# -- a training -----------------------------------------------------------------------------------


def trained(
    architecture: str,
    checkpoint: Path | None = None,
    steps_taken: Path | None = None,
    **changes: Any,
):
    """An SAE after all its steps, and their record; each step is noted in a file as it begins."""
    sae, batches = new_sae(architecture), ToyBatches(TREE, 32, 0)

    def source(step: int) -> torch.Tensor:
        note(steps_taken, step)
        return batches(step)

    config = replace(CONFIG, **changes)
    history = train(sae, source, config, [C2R(0.1, every=3)], checkpoint=checkpoint, progress=False)
    return sae, history.records


def trained_into(
    architecture: str, checkpoint: Path, result: Path, changes: Mapping[str, Any] = {}
) -> None:
    """Train, or take a training up, and write down the digest of what comes of it."""
    result.write_text(digest(*trained(architecture, checkpoint, **changes)))


def digest(sae: torch.nn.Module, records: object = None) -> str:
    """Of every bit of an SAE, and of what was recorded."""
    found = hashlib.sha256(repr(records).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def note(file: Path | None, what: object) -> None:
    """A line more in a file, which outlives its process."""
    if file is not None:
        with file.open("a") as opened:
            opened.write(f"{what}\n")


def noted(file: Path) -> list[str]:
    """The whole lines of such a file."""
    return file.read_text().split("\n")[:-1] if file.exists() else []


def is_one_of(saved: Path, known: set[str]) -> bool:
    """Whether a saved SAE is whole, and one of those whose digests are known."""
    try:
        return digest(load_sae(saved)) in known
    except (OSError, ValueError):
        return False


# -- a harvest, and cells -------------------------------------------------------------------------


@functools.cache
def _loaded() -> TransformerBridge:
    return load_language_model(RANDOM)


def language_model(name: str = RANDOM, *, device: str = "cpu") -> TransformerBridge:
    """The one that all work reads, loaded once: forked processes have it."""
    assert (name, device) == (RANDOM, "cpu")
    return _loaded()


def harvested(folder: Path, n_contexts: int = 40) -> None:
    """A store of the small corpus."""
    config = small_config(n_contexts)
    harvest(language_model(), small_corpus(), config, folder, contexts_per_pass=2)


def checksums(store: Path) -> dict[str, str]:
    """Those of a store's files, each compared with what is there."""
    opened = ActivationStore.open(store)
    opened.check()
    return opened.manifest.checksums()


def few_cells(begun: Path | None = None) -> list[Cell]:
    """Four cells of the smallest study; each is noted in a file as its computation begins."""

    def noting(cell: Cell) -> Cell:
        def compute() -> Any:
            note(begun, cell.name)
            return cell.compute()

        return replace(cell, compute=compute)

    return [noting(cell) for cell in cells("toy", load_profile("smoke"))[:4]]


def cells_computed(begun: Path | None = None) -> None:
    """Have all of them computed, or read."""
    for cell in few_cells(begun):
        read_or_compute(cell)


def values_of_cells() -> list[object]:
    """Their values, read."""
    return [read_or_compute(cell) for cell in few_cells()]


class Expected(NamedTuple):
    """What comes of work without any fault."""

    result: Any
    seconds: float


@functools.cache
def usual_training(architecture: str) -> Expected:
    """The digest of a training."""
    return Expected(digest(*trained(architecture)), seconds(trained, architecture))


@functools.cache
def usual_harvest(scratch: Path) -> Expected:
    """The checksums of a store."""
    store = scratch / "harvested"
    language_model()  # here, so that no process has to load it
    whole = seconds(harvested, store)
    return Expected(checksums(store), whole)


@functools.cache
def usual_cells(scratch: Path) -> Expected:
    """The values of the cells."""
    with folders(scratch / "cells"):
        whole = seconds(cells_computed)
        return Expected(values_of_cells(), whole)


# -- an evaluation --------------------------------------------------------------------------------


def evaluated(folder: Path, begun: Path | None = None) -> None:
    """`c2r evaluate` into folder/report.json; each metric is noted in a file as it begins.

    A RuntimeError says why there is no report.
    """
    saved = folder / "sae"
    if not saved.exists():
        save_sae(BatchTopKSAE(64, 96, k=8, seed=1), saved)
    record, said = evaluation._record, io.StringIO()

    def noting(name: str, given: object) -> object:
        note(begun, name)
        return record(name, given)

    arguments = [str(saved), "--profile", "smoke", "--metrics", MEASURED]
    with (
        patch.object(evaluation, "_record", noting),
        patch.object(inputs, "load_language_model", language_model),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        status = evaluate_command.main([*arguments, "--out", str(folder / "report.json")])
    if status == evaluate_command.NO_REPORT:
        raise RuntimeError(said.getvalue())


class Usual(NamedTuple):
    """An evaluation without any fault."""

    report: bytes
    seconds: float
    """That it takes once the cache is filled."""
    cache: Path


@functools.cache
def usual_evaluation(scratch: Path) -> Usual:
    """Made once for all faults, in this process, which has then imported all that an evaluation needs."""
    language_model()
    first, again = scratch / "evaluated", scratch / "evaluated-again"
    with folders(first):
        evaluated(first)
    with folders(again, cache=first / "cache"):
        whole = seconds(evaluated, again)
    reports = {(folder / "report.json").read_bytes() for folder in (first, again)}
    assert len(reports) == 1, "two evaluations differ"
    return Usual(reports.pop(), whole, first / "cache")


def is_usual(folder: Path, usual: Usual) -> bool:
    """Whether a folder has the report of `usual`, and nothing of an evaluation that is not finished."""
    report, unfinished = folder / "report.json", folder / "report.json.unfinished"
    return report.exists() and report.read_bytes() == usual.report and not unfinished.exists()


def two_saes() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Of the same shapes and with other weights."""
    return make("batch_topk", seed=0), make("batch_topk", seed=1)
