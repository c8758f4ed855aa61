"""One file that holds everything a training needs to go on: tensors, and JSON in the file's header."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from c2r_core.artefacts.files import whole_file
from c2r_core.saes.base import SAE
from c2r_core.training.config import TrainConfig
from c2r_core.training.regularisers import Regulariser

START = "start (hash of the new SAE and the first batch)"


def identity(
    sae: SAE, config: TrainConfig, regularisers: Sequence[Regulariser], first_batch: Tensor
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued, JSON-ready."""
    start = hashlib.sha256()
    for tensor in (first_batch, *sae.state_dict().values()):
        start.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    described = {
        "sae": sae.config | {"n_stacked": sae.n_stacked, "norm_factor": sae.norm_factor},
        "config": dataclasses.asdict(config),
        "regularisers": [{"name": r.name} | dataclasses.asdict(r) for r in regularisers],
        START: start.hexdigest()[:16],
    }
    return json.loads(json.dumps(described))


def check_same_run(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise a ValueError that names what differs, unless a checkpoint is of this training."""
    for part in ours:
        if theirs.get(part) != ours[part]:
            hint = " (an SAE that has trained already is not new: create it again)"
            raise ValueError(
                f"{path} belongs to another training: its {part} is {theirs.get(part)}, but now it is "
                f"{ours[part]}{hint if part == START else ''}. Name another file, or delete this one "
                "to start anew."
            )


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint, replacing the one before only when the new one is complete.

    Raises
    ------
    OSError
        If it cannot be written (full disk); the checkpoint before is left as it was.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with whole_file(path) as part:
            save_file(contiguous, part, metadata={"state": json.dumps(state)})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Could not write the checkpoint {path} ({error}). The one before it is unharmed: "
            "free some space and start again to go on from there."
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON state of a checkpoint.

    Raises
    ------
    ValueError
        If the file is not a checkpoint or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = json.loads(file.metadata()["state"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of c2r_core, or is damaged ({error!r}); delete it to start anew."
        ) from error
    return tensors, state


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """State of an optimiser with one parameter group, as named tensors."""
    return {
        f"optimiser.{names[index]}.{key}": value
        for index, moments in optimiser.state_dict()["state"].items()
        for key, value in moments.items()
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """Inverse of `optimiser_tensors`."""
    parameters = optimiser.param_groups[0]["params"]
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        prefix = f"optimiser.{name}."
        moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        # Fused Adam walks through memory, so a moment must be laid out as its parameter is.
        state[index] = {
            key: torch.empty_like(parameter).copy_(value) if value.ndim else value
            for key, value in moments.items()
        }
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
