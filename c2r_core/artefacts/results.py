"""Small JSON files of results, each with where it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from c2r_core.artefacts import paths
from c2r_core.artefacts.fields import from_json
from c2r_core.artefacts.files import whole_file

COMMITTED_PROFILES = ("default", "full", "paper")


def results_dir(profile: str) -> Path:
    """Folder of a profile's committed results: in $C2R_RESULTS, else `results/` of the checkout."""
    return paths.project_folder("C2R_RESULTS", "results") / profile


def runs_dir(profile: str) -> Path:
    """Folder of what a run computes for itself: in $C2R_RUNS, else `runs/` of the checkout."""
    return paths.project_folder("C2R_RUNS", "runs") / profile


def plain(value: Any) -> Any:
    """`value` in JSON's own types, else a TypeError; NaN and infinities become null, tensors become lists."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(
        f"a {type(value).__name__} cannot be written as JSON; "
        "give numbers, text, lists, mappings, arrays, tensors or dataclasses"
    )


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that the file is either complete or not there."""
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; a ValueError that names the file if it is no JSON, or nested too deep."""
    try:
        return from_json(path.read_bytes())
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it to make it anew"
        ) from error


def digest_of(content: Any) -> str:
    """A hash of JSON's values, by which a file shows whether it still is what was written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def provenance(*, profile: str, seed: int, device: str, seconds: float) -> dict[str, Any]:
    """What made a result: code, versions, seed, hardware in general terms, and how long it took."""
    try:
        package = version("c2r-core")
    except PackageNotFoundError:
        package = "not installed"
    return {
        "package_version": package,
        "profile": profile,
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "seconds": round(seconds, 1),
    }
