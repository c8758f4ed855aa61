"""One file that holds everything a training needs to go on: tensors, and JSON in the file's header.

The header also holds a SHA-256 of both, so that nothing goes on from what was not written. While a training
lasts, the checkpoint before the newest is kept beside it: `run.previous.safetensors` for `run.safetensors`.
It is read when the newest is damaged, and removed at the last step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from c2r_core.artefacts.fields import from_json
from c2r_core.artefacts.files import whole_file
from c2r_core.saes.base import SAE
from c2r_core.training.config import DECIDE_NOTHING, TrainConfig
from c2r_core.training.regularisers import Regulariser
from c2r_core.training.update import in_memory_order

START = "start (hash of the new SAE and the first batch)"


def identity(
    sae: SAE, config: TrainConfig, regularisers: Sequence[Regulariser], first_batch: Tensor
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued, JSON-ready."""
    start = hashlib.sha256()
    for tensor in (first_batch, *sae.state_dict().values()):
        start.update(_bytes(tensor))
    described = {
        "sae": sae.config | {"n_stacked": sae.n_stacked, "norm_factor": sae.norm_factor},
        "config": config.decides(),
        "regularisers": [{"name": r.name} | dataclasses.asdict(r) for r in regularisers],
        START: start.hexdigest()[:16],
    }
    return json.loads(json.dumps(described))


def check_same_run(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise a ValueError that names what differs, unless a checkpoint is of this training."""
    # Earlier versions also wrote down when checkpoints are written.
    config = theirs.get("config")
    if isinstance(config, dict):
        theirs = theirs | {"config": {k: v for k, v in config.items() if k not in DECIDE_NOTHING}}
    for part in ours:
        if theirs.get(part) != ours[part]:
            hint = " (an SAE that has trained already is not new: create it again)"
            raise ValueError(
                f"{path} belongs to another training: its {part} is {theirs.get(part)}, but now it is "
                f"{ours[part]}{hint if part == START else ''}. Name another file, or delete this one "
                "to start anew."
            )


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint of state["step"]; the one before, if of an earlier step, is kept beside it.

    `path` is a whole file at every instant, the old one or the new one. For a moment three checkpoints are on
    the disk. The last step, state["run"]["config"]["steps"], keeps none but its own.

    The checksum takes about 0.9 s for a GB on one core, about as long as the writing. The tensors are three
    times the SAE.

    Raises
    ------
    OSError
        If it cannot be written (full disk); those before are left as they were.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    metadata = {"state": text, "sha256": _checksum(contiguous, text)}
    is_first, step_before = not path.exists(), _step(path)
    is_last = state["step"] == state.get("run", {}).get("config", {}).get("steps")
    try:
        with contextlib.ExitStack() as once_written:
            # One of the same step was found damaged, and the training went on from the one before it.
            if step_before is not None and step_before < state["step"] and not is_last:
                _link(path, once_written.enter_context(whole_file(_previous(path))))
            with whole_file(path) as part:
                save_file(contiguous, part, metadata=metadata)
        if is_first or is_last:  # what may lie there is of another training, or needed no more
            _previous(path).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Could not write the checkpoint {path} ({error}). The one before it is unharmed: "
            "free some space and start again to go on from there."
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON state of a checkpoint; with a warning those of the one before, if it is damaged.

    Files of earlier versions, which hold no checksum, are read as they are.

    Raises
    ------
    ValueError
        If the file is not a checkpoint or is damaged, and there is none before it, or that is damaged too.
    OSError
        If it cannot be read.
    """
    try:
        return _read(path)
    except ValueError as damage:
        previous = _previous(path)
        if not previous.exists():
            raise
        try:
            tensors, state = _read(previous)
        except ValueError as also:
            raise ValueError(f"{damage} The one before it is of no help: {also}") from also
        warnings.warn(
            f"{damage} Going on from the one before it, {previous}, of step {state.get('step')}.",
            stacklevel=2,
        )
        return tensors, state


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["state"]
        if metadata.keys() != {"state"} and metadata["sha256"] != _checksum(tensors, text):
            raise ValueError("its content does not have the SHA-256 that it states")
        state = from_json(text)
        is_state = isinstance(state, dict) and isinstance(state.get("run"), dict)
        if not is_state or not isinstance(state.get("step"), int):
            raise ValueError("its state names no step and no training")
        return tensors, state
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of c2r_core, or is damaged ({error!r}); delete it to start anew."
        ) from error


def _checksum(tensors: Mapping[str, Tensor], state: str) -> str:
    """SHA-256 of the state and of all tensors by name, with their types and shapes."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes: its own memory, if that is contiguous and the processor's."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _step(path: Path) -> int | None:
    """The step of a checkpoint, by its header alone; None if there is no file, or none that says it."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(from_json(file.metadata()["state"])["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _link(path: Path, other: Path) -> None:
    """The same file under another name too, or a copy where the disk knows no such links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def optimiser_tensors(
    optimiser: torch.optim.Optimizer, named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """State of an optimiser of the named parameters' memory, as named tensors in the parameters' shapes."""
    names = list(named)
    return {
        f"optimiser.{names[index]}.{key}": in_memory_order(named[names[index]], value)
        if value.ndim
        else value
        for index, moments in optimiser.state_dict()["state"].items()
        for key, value in moments.items()
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, named: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimiser_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(named.items()):
        prefix = f"optimiser.{name}."
        moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        state[index] = {
            key: in_memory_order(parameter, torch.empty_like(parameter).copy_(value))
            if value.ndim
            else value
            for key, value in moments.items()
        }
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
