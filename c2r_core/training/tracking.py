"""A training's numbers sent elsewhere while it runs: TensorBoard, Weights & Biases, trackio, your own.

    with tensorboard("my_logs") as log, tracked(log):
        train(sae, batches, config, penalties)

Nothing is sent unless it is asked for like this. A `log` is any function that takes numbers by name and the
step, as `log({"l0": 10.2}, step=50)`: `run.log` of Weights & Biases and `trackio.log` are such functions as
they stand. Keys and logins are theirs and are not seen here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from c2r_core.errors import needs_extra
from c2r_core.training.history import FOLLOWERS


class Log(Protocol):
    """Takes the numbers of one step."""

    def __call__(self, numbers: dict[str, float], /, *, step: int) -> Any: ...


@contextmanager
def tracked(*logs: Log) -> Iterator[None]:
    """Within this context, what a training records goes to the logs too.

    These are the entries of its `History`, one every `log_every` steps, each as soon as the next is there and
    the last at the end; those of a stack are numbered, `l0/0`, `l0/1`, … A log that raises an error is left
    out from then on, with a warning: it must not cost a training. No result depends on who listens.

    Several trainings may run within one context, one after the other; their steps begin anew. A training
    that goes on from a checkpoint sends what follows, so that steps since the checkpoint may come twice.
    Of several processes, let the first alone enter it: all record the same.
    """
    followers = [_Follower(log) for log in logs]
    token = FOLLOWERS.set((*FOLLOWERS.get(), *followers))
    try:
        yield
    finally:
        FOLLOWERS.reset(token)
        for follower in followers:
            follower.finish()


@contextmanager
def tensorboard(folder: str | Path) -> Iterator[Log]:
    """A log for `tracked` that writes TensorBoard's event files; `tensorboard --logdir FOLDER` shows them.

    Raises
    ------
    MissingExtra
        If the extra "tensorboard" is not installed.
    """
    needs_extra("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:

        def log(numbers: dict[str, float], /, *, step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield log


class _Follower:
    """Hands records on, each when the next one comes: where shards train, the last is not final yet."""

    def __init__(self, log: Log) -> None:
        self.log: Log | None = log
        self.last: dict[str, Any] | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        self.finish()
        self.last = record

    def finish(self) -> None:
        record, self.last = self.last, None
        if record is None or self.log is None:
            return
        try:
            self.log(_flat(record), step=record["step"])
        except Exception as error:
            warnings.warn(
                f"A log failed at step {record['step']} and is left out from here; the training goes on: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            self.log = None


def _flat(record: dict[str, Any]) -> dict[str, float]:
    """Numbers by name, without the step."""
    numbers = {}
    for name, value in record.items():
        if isinstance(value, list):
            numbers |= {f"{name}/{copy}": one for copy, one in enumerate(value)}
        elif name != "step":
            numbers[name] = value
    return numbers
