"""A model card: what a saved SAE and its evaluation report say, in the hub's format.

The card states what is in the files and nothing else. What they do not say, such as a licence, is the
caller's to give, or stays out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from c2r_core.artefacts.checksums import of_file
from c2r_core.artefacts.results import read_json
from c2r_core.data.language_models import RANDOM, SMOLLM2
from c2r_core.saes.files import CONFIG, OF_CONFIG, OF_WEIGHTS, WEIGHTS, load_sae

if TYPE_CHECKING:
    from c2r_core.evaluate.report import Report

ON_THE_HUB = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct", RANDOM: None}
"""Models that have another name here than on the hub, or are not there."""
NO_SETTINGS = ("format_version", "norm_factor", "trained_on", OF_CONFIG, OF_WEIGHTS)
"""Entries of a config that do not describe the architecture."""


def model_card(
    folder: str | Path, repo: str, *, report: str | Path | None = None, license: str | None = None
) -> str:
    """The README.md of a repository that holds one SAE.

    Parameters
    ----------
    folder : path
        As `save_sae` wrote it.
    repo : str
        Where the SAE will be, "owner/name".
    report : path, optional
        A report of `c2r evaluate` on this SAE.
    license : str, optional
        The hub's short name of one, such as "mit". None states none.

    Raises
    ------
    FileNotFoundError or ValueError
        If the folder holds no whole SAE, as `load_sae` says; if the report is none, or is of another SAE.
    """
    folder = Path(folder)
    load_sae(folder)  # what is damaged gets no card
    config = read_json(folder / CONFIG)
    found = None if report is None else _report_on(folder, Path(report))
    name = repo.rpartition("/")[2]
    parts = [
        f"---\n{_metadata(config, name, found, license).to_yaml()}\n---\n\n# {name}",
        _summary(config),
        _use(repo, name),
        "## Architecture\n\n" + _table(("setting", "value"), _settings(config).items()),
        _training(config),
        _evaluation(found),
    ]
    return "\n\n".join(parts) + "\n"


def _report_on(folder: Path, file: Path) -> Report:
    from c2r_core.evaluate.report import read_report

    report, weights = read_report(file), of_file(folder / WEIGHTS)
    if report.sae.weights_sha256 != weights:
        raise ValueError(
            f"{file} is a report on another SAE: its weights have SHA-256 {report.sae.weights_sha256}, "
            f"those in {folder} have {weights}. Evaluate this SAE: c2r evaluate {folder}"
        )
    return report


def _metadata(
    config: Mapping[str, Any], name: str, report: Report | None, license: str | None
) -> ModelCardData:
    model = config.get("trained_on", {}).get("model")
    base_model = ON_THE_HUB.get(model, model)
    return ModelCardData(
        base_model=base_model if base_model and base_model.count("/") == 1 else None,
        eval_results=_eval_results(report) or None,
        library_name="c2r-core",
        license=license,
        model_name=name,
        tags=["sparse-autoencoder", "interpretability", config["architecture"]],
    )


def _eval_results(report: Report | None) -> list[EvalResult]:
    """The headline numbers that were measured on text."""
    if report is None or report.text is None:
        return []
    return [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=report.text.corpus,
            dataset_name=report.text.corpus,
            dataset_split=report.text.split,
            metric_type=row.field,
            metric_name=f"{row.metric}.{row.field}",
            metric_value=row.value,
        )
        for row in report.headline()
        if row.value is not None
    ]


def _summary(config: Mapping[str, Any]) -> str:
    trained_on = config.get("trained_on", {})
    source = "".join(
        f" {preposition} `{trained_on[key]}`"
        for key, preposition in (("model", "of"), ("hook_name", "at"))
        if key in trained_on
    )
    reads = f"activations{source}" if source else "activations; of which model is not recorded"
    return (
        f"A sparse autoencoder (SAE) with {config['d_sae']} latents, architecture "
        f"`{config['architecture']}`. It reads {reads}."
    )


def _use(repo: str, name: str) -> str:
    return f"""## Use

```
c2r pull {repo} {name}
```

```python
from c2r_core import fold_norm_factor, load_sae

sae = fold_norm_factor(load_sae("{name}"))
feature_acts = sae.encode(x)  # raw activations (batch, d_in) -> (batch, d_sae)
```"""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NO_SETTINGS}


def _training(config: Mapping[str, Any]) -> str:
    recorded = config.get("trained_on") or {}
    if not recorded:
        return "## Training\n\nNothing is recorded of it."
    scale = (
        f"Activations were multiplied by {config['norm_factor']:.6g}; `fold_norm_factor` folds that into the "
        "weights."
    )
    return f"## Training\n\n{scale}\n\n" + _table(("recorded", "value"), recorded.items())


def _evaluation(report: Report | None) -> str:
    if report is None:
        return "## Evaluation\n\nThere is no report."
    where = [f"Profile `{report.settings.profile}`, seed {report.settings.seed}."]
    if report.model is not None and report.text is not None:
        where.insert(
            0,
            f"Measured on `{report.model.name}` at `{report.model.hook_name}`, on "
            f"{report.text.n_documents} held-out documents of `{report.text.corpus}` "
            f"(the SAE was trained on: {report.text.sae_trained_on}).",
        )
    rows = [
        (f"{row.metric}.{row.field}", _number(row.value), row.better, _number(row.baseline))
        for row in report.headline()
    ]
    table = _table(("number", "value", "better", "baseline"), rows)
    remarks = [f"- Warning, {name}: {text}" for name, text in report.warnings.items()]
    remarks += [f"- Not evaluable, {name}: {why}" for name, why in report.not_evaluable.items()]
    made = ", ".join(f"{key} {value}" for key, value in report.provenance.items())
    parts = ["## Evaluation", " ".join(where), table, "\n".join(remarks), f"Made by: {made}."]
    return "\n\n".join(filter(None, parts))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
