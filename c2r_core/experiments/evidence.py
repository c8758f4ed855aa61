"""The report's data: what the notebooks claimed and measured, gathered into one committed file.

`make evidence` gathers it from the results of `make refresh`. The report notebook reads it, and what
`make validate`, `make blocks` and `make parity` have written; it trains nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2r_core.artefacts import paths
from c2r_core.artefacts.results import read_json, results_dir, write_json

if TYPE_CHECKING:
    import pandas as pd

ARMS = ("baseline", "C²R", "OrtSAE", "small baseline")
DIGITS = 4  # significant ones, of every measured value

FROM_NOTEBOOK_05 = {
    "FVU": lambda cell: cell["fvu"],
    "L0": lambda cell: cell["l0"],
    "live latents (share)": lambda cell: cell["live_share"],
    "cross-entropy recovered": lambda cell: cell["cross_entropy"]["recovered_zero"],
    "KL (nats)": lambda cell: cell["cross_entropy"]["kl"],
    "absorption, mean fraction": lambda cell: cell["first_letter"]["mean_absorption_fraction"],
    "absorption, full": lambda cell: cell["first_letter"]["mean_full_absorption"],
    "split latents per letter": lambda cell: cell["first_letter"]["mean_split_size"],
}
"""Rows of the table of arms: name and where in the arm's cell."""

FROM_OTHERS = {
    "assignment consistency": ("12_consistency", "letters", "mean_consistency"),
    "modal latent, precision": ("12_consistency", "letters", "mean_precision"),
    "modal latent, recall": ("12_consistency", "letters", "mean_recall"),
    "sparse probing, one latent": ("13_probing", "sparse_probing", "mean_top_k", "1"),
    "sparse probing, five latents": ("13_probing", "sparse_probing", "mean_top_k", "5"),
    "sparse probing, all latents": ("13_probing", "sparse_probing", "mean_sae"),
    "SCR, 20 latents": ("13_probing", "scr", "mean_scr", "20"),
    "TPP, 20 latents": ("13_probing", "tpp", "tpp", "20"),
    "RAVEL, cause": ("13_probing", "ravel", "mean_cause"),
    "RAVEL, isolation": ("13_probing", "ravel", "mean_isolation"),
    "detection score": ("14_interpretation", "detection", "mean_score"),
    "meta-SAE, variance explained": ("14_interpretation", "meta_sae", "explained_variance"),
    "meta-SAE, random rows": ("14_interpretation", "meta_sae", "random_explained_variance"),
    "right answers erased": ("15_use", "use", "mean_erased"),
    "answers steered": ("15_use", "use", "mean_steered"),
}
"""Rows of the table of arms: notebook, record, then within what the record has of the arm."""


def report_file() -> Path:
    """The committed file."""
    return paths.project_folder("C2R_REPORT", "results") / "report.json"


def gather(executed: Path, notebooks: list[str]) -> dict[str, Any]:
    """Claims of all notebooks and the table of arms, from the results files of one profile.

    Parameters
    ----------
    executed : Path
        Folder of the results files.
    notebooks : list of str
        Names of the notebooks that claim something.

    Raises
    ------
    FileNotFoundError
        If one of them has not been run.
    """
    results = {}
    for name in notebooks:
        file = executed / f"{name}.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: run `make refresh` before `make evidence`."
            )
        results[name] = read_json(file)
    claims = [
        {"notebook": name} | claim for name, result in results.items() for claim in result["claims"]
    ]
    cells = {arm: _cell(executed / "05_llm_sae", arm) for arm in ARMS}
    arms = {row: {a: read(cells[a]) for a in ARMS} for row, read in FROM_NOTEBOOK_05.items()}
    for row, (notebook, record, *path) in FROM_OTHERS.items():
        of_arms = results[notebook]["records"][record]
        arms[row] = {arm: _within(of_arms[arm], path) for arm in ARMS}
    return _rounded({"claims": claims, "arms": arms})


def _cell(folder: Path, arm: str) -> dict[str, Any]:
    """The arm's first seed."""
    files = sorted(folder.glob(f"{arm}-seed*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no result of {arm!r}: run notebook 05.")
    return read_json(files[0])["values"]


def _within(value: Any, path: list[str]) -> Any:
    for key in path:
        value = value[key]
    return value


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


# -- tables ------------------------------------------------------------------------------------


def arms_table(report: Mapping[str, Any]) -> pd.DataFrame:
    """One row a measurement, one column an arm."""
    import pandas as pd

    return pd.DataFrame(report["arms"]).T[list(ARMS)]


def claims_table(report: Mapping[str, Any]) -> pd.DataFrame:
    """How many claims hold and fail, by notebook."""
    import pandas as pd

    table = pd.DataFrame(report["claims"])
    counts = table.groupby("notebook")["verdict"].value_counts().unstack(fill_value=0)
    return counts.reindex(columns=["holds", "FAILS"], fill_value=0)


def failed_claims(report: Mapping[str, Any]) -> list[str]:
    """The claims that fail, one line each, with the value."""
    return [
        f"{claim['notebook'][:2]}  {claim['text']}: {claim['expectation']}; measured {claim['value']:.3g}"
        for claim in report["claims"]
        if claim["verdict"] == "FAILS"
    ]


def validation_table(folder: Path) -> pd.DataFrame:
    """One row an SAE of `make validate`: what it is, its measurements, and how use fails."""
    import pandas as pd

    rows = []
    for file in sorted(folder.glob("*seed*.json")):
        cell = read_json(file)
        spec, values = cell["spec"], cell["values"]
        rows.append(
            {
                "architecture": spec["architecture"],
                "d_sae": spec["d_sae"],
                "k": spec["k"],
                "steps": spec["steps"],
                "c2r_strength": spec["c2r_strength"],
                "orthogonality_weight": spec["orthogonality_weight"],
                "consistency": values["assignment"]["mean_consistency"],
                "fvu": values["fvu"],
                "absorption": values["absorption"],
                "f1": values["assignment"]["mean_f1"],
                "erasing fails": 1 - values["use"]["mean_erased"],
                "steering fails": 1 - values["use"]["mean_steered"],
            }
        )
    return pd.DataFrame(rows)


EFFECTS = {
    "consistency": "assignment consistency",
    "erasing fails": "erasing fails (share)",
    "steering fails": "steering fails (share)",
    "absorption": "absorption, mean fraction",
    "fvu": "FVU",
}


def paired_effects(saes: pd.DataFrame) -> pd.DataFrame:
    """What C²R at the paper's strength and OrtSAE change, over SAEs that differ in nothing else.

    One row per penalty and measurement: penalty, name, n_pairs, mean, low, high (95 %, Student's t over
    architectures, widths and k).
    """
    import pandas as pd

    from c2r_core.statistics import paired_interval

    alike = ["architecture", "d_sae", "k", "steps"]
    c2r, ort = saes["c2r_strength"], saes["orthogonality_weight"]
    plain = saes[(c2r == 0) & (ort == 0)].set_index(alike)
    rows = []
    for penalty, which in (("C²R", c2r == c2r.max()), ("OrtSAE", ort > 0)):
        treated = saes[which].set_index(alike)
        for column, name in EFFECTS.items():
            effect = paired_interval(treated[column], plain.loc[treated.index, column])
            rows.append(
                {"penalty": penalty, "name": name, "n_pairs": len(treated), **effect._asdict()}
            )
    return pd.DataFrame(rows)


def correlation_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Rank correlations with failure, and by how much consistency leads each predictor, with intervals."""
    import pandas as pd

    rows = []
    for group, found in summary["correlations"].items():
        for failure in ("erasing", "steering"):
            for predictor, values in found[failure].items():
                lead = values["lead_of_consistency"] or [None] * 3
                rows.append(
                    {"saes": group, "failure": failure, "predictor": predictor}
                    | dict(zip(("mean", "low", "high"), values["rank_correlation"], strict=True))
                    | dict(zip(("lead", "lead_low", "lead_high"), lead, strict=True))
                )
    return pd.DataFrame(rows)


def blocks_table(folder: Path) -> pd.DataFrame:
    """One row per block and k of `make blocks`."""
    import pandas as pd

    rows = []
    for file in sorted(folder.glob("block*.json")):
        cell = read_json(file)
        for k, baseline in cell["values"]["baselines"].items():
            rows.append(
                {
                    "block": cell["block"],
                    "k": int(k),
                    "letters": cell["values"]["n_good_letters"],
                    "absorption": baseline["absorption"],
                    "full_absorption": baseline["full_absorption"],
                    "fvu": baseline["fvu"],
                }
            )
    return pd.DataFrame(rows)


def main() -> int:
    """Gather what `make refresh` has left and write the committed file."""
    notebooks = sorted(file.stem for file in Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
    try:
        report = gather(results_dir("default"), [n for n in notebooks if not n.endswith("_report")])
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    write_json(report_file(), report)
    print(report_file())
    return 0


if __name__ == "__main__":
    sys.exit(main())
