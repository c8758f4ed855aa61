"""What a notebook opens in its set-up line: settings in, claims and measured numbers out."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import Profile, load_profile
from c2r_core.artefacts.results import (
    COMMITTED_PROFILES,
    plain,
    provenance,
    read_json,
    runs_dir,
    write_json,
)
from c2r_core.notebook.claims import Claim, judge

RESULTS_SCHEMA = 1
FIRST_SEED = 10


class Session:
    """One run of one notebook. Made by `start`."""

    def __init__(self, notebook: str, profile: Profile, seed: int, device: str) -> None:
        self.notebook = notebook
        self.profile = profile
        self.seed = seed
        self.device = device
        self._started = time.monotonic()
        self._claims: list[Claim] = []
        self._records: dict[str, Any] = {}

    def seeds(self, n: int) -> list[int]:
        """n seeds for training runs that a claim rests on.

        They begin at FIRST_SEED: weights are chosen on smaller ones, effects confirmed on these.
        """
        return [FIRST_SEED + self.seed + i for i in range(n)]

    def record(self, **values: Any) -> None:
        """Keep measured values for the results file: numbers, arrays, dataclasses, nested or not.

        Raises
        ------
        ValueError
            If a name was recorded before.
        TypeError
            If a value cannot be written as JSON.
        """
        for name, value in values.items():
            if name in self._records:
                raise ValueError(
                    f"{name!r} is recorded already; give every number a name of its own"
                )
            self._records[name] = plain(value)

    def claim(self, text: str, value: Any, *, effect: bool = True, **bound: Any) -> None:
        """Judge a measured value against one bound and print the verdict, never the value.

        Parameters
        ----------
        text : str
            What is claimed, without measured digits.
        value : number, bool or str
            What was measured.
        effect : bool
            Whether this is about what training does; such a claim is not judged under `smoke`.
        **bound
            One of `at_least`, `at_most`, `between=(low, high)`, `equals` (with `tolerance`);
            none for a bool. See `claims.judge`.
        """
        claim = judge(text, value, **bound)
        if effect and self.profile.name == "smoke":
            claim = claim._replace(verdict="not judged in smoke")
        self._claims.append(claim)
        print(claim.line)

    def cell(
        self,
        name: str,
        compute: Callable[[], Any],
        *,
        settings: BaseModel | Mapping[str, Any] | None = None,
    ) -> Any:
        """One cell of a table, such as one arm and seed: computed, and kept in a JSON file.

        Under `full` and `paper` a kept cell with the same settings is read instead of computed, so
        that a rerun fills only what is missing. `smoke` and `default` always compute.

        Parameters
        ----------
        name : str
            Names the file; it must say everything that differs between cells, the seed included.
            What code computed a kept cell is in its provenance; delete cells that new code would
            compute differently.
        compute : callable
            Returns the cell's values: numbers, lists, mappings or dataclasses.
        settings : mapping or profile section, optional
            What the values depend on. None means the whole profile.

        Returns
        -------
        The values as read from JSON, the same whether computed or kept.
        """
        path = runs_dir(self.profile.name) / self.notebook / f"{name}.json"
        key = plain(settings or self.profile)
        if self.profile.name in COMMITTED_PROFILES and path.is_file():
            kept = read_json(path)
            if kept["key"] == key:
                return kept["values"]
        started = time.monotonic()
        values = plain(compute())
        write_json(
            path,
            {
                "schema": RESULTS_SCHEMA,
                "key": key,
                "values": values,
                "provenance": self._provenance(time.monotonic() - started),
            },
        )
        return values

    def finish(self) -> None:
        """Write claims, measured values and their provenance to the results file; print nothing."""
        name = self.notebook if self.seed == 0 else f"{self.notebook}-seed{self.seed}"
        write_json(
            runs_dir(self.profile.name) / f"{name}.json",
            {
                "schema": RESULTS_SCHEMA,
                "notebook": self.notebook,
                "claims": [claim._asdict() for claim in self._claims],
                "records": self._records,
                "provenance": self._provenance(time.monotonic() - self._started),
            },
        )

    def _provenance(self, seconds: float) -> dict[str, Any]:
        return provenance(
            profile=self.profile.name, seed=self.seed, device=self.device, seconds=seconds
        )


def start(notebook: str, profile: str = "default", seed: int = 0, device: str = "auto") -> Session:
    """Check a notebook's parameters, seed everything, and set threads and the figures' style.

    Parameters
    ----------
    notebook : str
        The notebook's name without .ipynb; names its results file.
    profile : str
        A profile of profiles.yml.
    seed : int
        Not negative.
    device : str
        "cpu", "cuda", "cuda:1", or "auto": cuda where there is one, else cpu.

    Raises
    ------
    ValueError
        If one of them does not exist or is out of range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0 on, got {seed!r}")
    session = Session(notebook, load_profile(profile), seed, _usable_device(device))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from c2r_core.notebook.figures import use_style

    use_style()
    return session


def _usable_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
    }
    if kind not in available:
        raise ValueError(unknown_name("device", device, ["auto", *available]))
    if not available[kind]:
        raise ValueError(f"device {device!r} is not available here; use 'auto' or 'cpu'")
    return device
