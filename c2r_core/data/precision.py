"""The precision of matrix products, and which one `auto` means on this machine."""

from __future__ import annotations

import functools
import json
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from c2r_core.artefacts.fields import from_json
from c2r_core.artefacts.files import whole_file
from c2r_core.artefacts.paths import cache_dir
from c2r_core.speed import MIN_SPEED_UP, bfloat16_speed_up

Precision = Literal["float32", "bfloat16"]

_log = logging.getLogger(__name__)


def resolve_precision(precision: str, device: str) -> Precision:
    """The precision that `auto` means: bfloat16 where the device multiplies in it, and fast.

    A CUDA device is asked. A processor is timed once, and the answer kept in the cache's folder. On any other
    device it is float32. ValueError if there is no such precision.
    """
    if precision == "auto":
        return _chosen(torch.device(device).type, cache_dir() / "precision.json")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}; expected 'float32' or 'bfloat16'.")
    return precision


@functools.cache
def _chosen(kind: str, kept: Path) -> Precision:
    """Once a process, so that the log says it once."""
    if kind == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if is_fast else "float32"
    else:
        precision = faster_on_processor(kept) if kind == "cpu" else "float32"
    _log.info("precision auto is %s on %s", precision, kind)
    return precision


def faster_on_processor(kept: Path, speed_up: Callable[[], float] | None = None) -> Precision:
    """bfloat16 if this processor multiplies in it at least 1.2 times as fast as in float32.

    Parameters
    ----------
    kept : Path
        JSON file of the answers so far, by processor and version of torch; made if it is not there.
    speed_up : callable, optional
        Measures how many times as fast bfloat16 is.
    """
    from filelock import FileLock  # comes with the extras

    measure = speed_up or bfloat16_speed_up
    machine = f"{_processor()}, torch {torch.__version__}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        known = _read(kept)
        if machine not in known:
            known[machine] = "bfloat16" if measure() >= MIN_SPEED_UP else "float32"
            with whole_file(kept) as part:
                part.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return known[machine]


def _read(kept: Path) -> dict[str, str]:
    """The answers that are kept; none where the file is not there or was damaged."""
    try:
        known = from_json(kept.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {machine: one for machine, one in known.items() if one in ("float32", "bfloat16")}


def _processor() -> str:
    """Its name; on Linux as the kernel tells it, since Python knows none there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
