"""What a notebook opens in its set-up line: settings in, claims and measured numbers out."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import Profile, load_profile, training_seeds
from c2r_core.artefacts.results import plain, provenance, runs_dir, write_json
from c2r_core.notebook.claims import (
    ABOUT,
    NOT_JUDGED,
    SUBJECTS,
    About,
    Subject,
    Verdict,
    judge,
    judge_interval,
    shown,
)

RESULTS_SCHEMA = 1


class Session:
    """One run of one notebook. Made by `start`."""

    def __init__(self, notebook: str, profile: Profile, seed: int, device: str) -> None:
        self.notebook = notebook
        self.profile = profile
        self.seed = seed
        self.device = device
        self._started = time.monotonic()
        self._verdicts: list[Verdict] = []
        self._records: dict[str, Any] = {}

    def seeds(self, n: int) -> list[int]:
        """n seeds for training runs, none of which weights were chosen on; see `training_seeds`."""
        return training_seeds(n, self.seed)

    def record(self, **values: Any) -> None:
        """Keep measured values for the results file: numbers, arrays, dataclasses, nested or not.

        ValueError if a name was recorded before, TypeError if a value cannot be written as JSON.
        """
        for name, value in values.items():
            if name in self._records:
                raise ValueError(
                    f"{name!r} is recorded already; give every number a name of its own"
                )
            self._records[name] = plain(value)

    def check(self, text: str, value: Any, **bound: Any) -> None:
        """Print whether an identity holds; judged in every profile.

        `text` says what must be so, without measured digits; `value` is what was measured, a number, bool
        or str. The bound is one of `at_least`, `at_most`, `between=(low, high)` and `equals` (with
        `tolerance`), and none for a bool. ValueError as `claims.judge`.
        """
        self._judged(judge("check", text, value, **bound))

    def guard(self, text: str, value: Any, **bound: Any) -> None:
        """Print whether an instrument works, such as a probe or a null model; not judged in smoke.

        Takes what `check` takes.
        """
        self._judged(judge("guard", text, value, **bound))

    def claim(
        self,
        text: str,
        interval: Sequence[float] | None,
        *,
        n: str,
        reason: str,
        about: About,
        subject: Subject = "C²R",
        **bound: Any,
    ) -> None:
        """Print whether an interval lies on one side of a bound: a statement about the world.

        Not judged in smoke. An interval without ends (NaN), as of a single seed, cannot carry a claim
        and is printed as a lead. ValueError if `about` or `subject` is unknown, or as `judge_interval`.

        `text` has no measured digits. The interval is (mean, low, high), such as `statistics.Interval`, or
        None if not evaluable; `n` says what it is over, such as "5 seeds", and `reason` why the bound is
        where it is. The bound is one of `at_least` (for the lower end), `at_most` (for the upper) and
        `between=(low, high)` (for both).
        """
        for value, known in ((about, ABOUT), (subject, SUBJECTS)):
            if value not in known:
                raise ValueError(f"claim {text!r}: {unknown_name('value', value, known)}")
        judged = judge_interval(text, interval, **bound)
        if judged.ends_unknown:
            self.lead(f"{text} ({about}, {subject})", interval, n=n)
            return
        self._judged(judged._replace(n=n, reason=reason, about=about, subject=subject))

    def lead(self, text: str, interval: Sequence[float] | None = None, *, n: str = "") -> None:
        """Print an effect that was noticed after the fact; it is neither judged nor counted."""
        value = None if interval is None else [float(end) for end in interval]
        measured = shown(value) if value is not None and self._judges else ""
        self._print(Verdict("lead", text, value=value, measured=measured, n=n))

    @property
    def _judges(self) -> bool:
        return self.profile.name != "smoke"

    def _judged(self, verdict: Verdict) -> None:
        if verdict.kind != "check" and not self._judges:
            verdict = verdict._replace(verdict=NOT_JUDGED)
        self._print(verdict)

    def _print(self, verdict: Verdict) -> None:
        self._verdicts.append(verdict)
        print(verdict.line)

    def cells(
        self, study: str, *, live: bool = False, only: Callable[[str], bool] | None = None
    ) -> dict[str, Any]:
        """Every cell of a study at this notebook's profile, seed and device: {name: values}.

        Current cells are read, the others computed, as the variable C2R_CELLS says ("kept", "anew" or
        "commit", see `artefacts.cells`, or "main", see `experiments.how`). `live` computes every cell here
        and now, and neither reads nor writes a file; `only` says which cells, by name. ValueError if
        `experiments.STUDIES` has no such study.
        """
        from c2r_core.artefacts.cells import compute, read_or_compute
        from c2r_core.experiments import cells, how

        made = cells(study, self.profile, self.seed, self.device)
        wanted = [cell for cell in made if only is None or only(cell.name)]
        if live:
            return {cell.name: compute(cell) for cell in wanted}
        asked = os.environ.get("C2R_CELLS") or "kept"
        return {cell.name: read_or_compute(cell, how(study, cell.name, asked)) for cell in wanted}

    def finish(self) -> None:
        """Write claims, measured values and their provenance to the results file; print nothing."""
        name = self.notebook if self.seed == 0 else f"{self.notebook}-seed{self.seed}"
        write_json(
            runs_dir(self.profile.name) / f"{name}.json",
            {
                "schema": RESULTS_SCHEMA,
                "notebook": self.notebook,
                "claims": [plain(verdict._asdict()) for verdict in self._verdicts],
                "records": self._records,
                "provenance": provenance(
                    profile=self.profile.name,
                    seed=self.seed,
                    device=self.device,
                    seconds=time.monotonic() - self._started,
                ),
            },
        )


def start(notebook: str, profile: str = "default", seed: int = 0, device: str = "auto") -> Session:
    """Check a notebook's parameters, seed everything, and set threads and the figures' style.

    The notebook's name, without .ipynb, names its results file. The device is "cpu", "cuda", "cuda:1", or
    "auto": cuda where there is one, else cpu. ValueError if a parameter does not exist or is out of range.
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
    available = {"cpu": True, "cuda": torch.cuda.is_available()}
    if kind not in available:
        raise ValueError(unknown_name("device", device, ["auto", *available]))
    if not available[kind]:
        raise ValueError(f"device {device!r} is not available here; use 'auto' or 'cpu'")
    return device
