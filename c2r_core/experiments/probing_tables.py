"""Sparse probing, SCR and TPP of several arms, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from c2r_core.metrics.ablation import THRESHOLDS, SCRReport, TPPReport
from c2r_core.metrics.probing import KS, SparseProbingReport

if TYPE_CHECKING:
    import pandas as pd


def probing_rows(probed: Mapping[str, SparseProbingReport]) -> pd.DataFrame:
    """One row per arm and evaluated task: arm, task, the accuracies by k ("1", "2", "5"), sae, model."""
    import pandas as pd

    rows = [
        {"arm": arm, "task": task.task, **task.top_k, "sae": task.sae, "model": task.model}
        for arm, report in probed.items()
        for task in report.tasks
        if task.not_evaluable is None
    ]
    return pd.DataFrame(rows, columns=["arm", "task", *map(str, KS), "sae", "model"])


def ablation_rows(scr: Mapping[str, SCRReport], tpp: Mapping[str, TPPReport]) -> pd.DataFrame:
    """One row per arm and number of latents taken out: arm, n, scr, tpp; missing where not evaluable."""
    import pandas as pd

    rows = []
    for arm, report in scr.items():
        for n in THRESHOLDS:
            restored = report.mean_scr[str(n)] if report.mean_scr else float("nan")
            targeted = tpp[arm].tpp[str(n)] if arm in tpp else float("nan")
            rows.append({"arm": arm, "n": n, "scr": restored, "tpp": targeted})
    return pd.DataFrame(rows, columns=["arm", "n", "scr", "tpp"])
