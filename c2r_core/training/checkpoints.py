"""One file that holds everything a training needs to go on: tensors, and JSON in the file's header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint, replacing the one before only when the new one is complete.

    Raises
    ------
    OSError
        If it cannot be written (full disk); the checkpoint before is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, part, metadata={"state": json.dumps(state)})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
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
