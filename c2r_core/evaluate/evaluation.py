"""One evaluation: an SAE, a model and held-out documents in, a checked report out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, create_model

from c2r_core.artefacts.fingerprints import all_modules, fingerprint
from c2r_core.artefacts.profiles import load_profile
from c2r_core.artefacts.results import provenance, write_json
from c2r_core.data.language_models import check_hook_name
from c2r_core.data.text import Corpus
from c2r_core.evaluate.metrics import METRICS, chosen_metrics, standard_metrics
from c2r_core.evaluate.report import (
    SCHEMA_VERSION,
    Evaluated,
    ModelDescription,
    NotEvaluable,
    SAEDescription,
    Section,
    Settings,
    TextDescription,
    TrainingDocuments,
    record_of,
)
from c2r_core.experiments.language_model import SPLIT_SEED
from c2r_core.formats import OpenedSAE, open_sae
from c2r_core.metrics.endpoint import Endpoint
from c2r_core.metrics.inputs import Bench
from c2r_core.saes import SAE, fold_norm_factor
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")

Metrics = create_model(
    "Metrics",
    __base__=Section,
    __doc__="One record for each metric; null where it was not asked for.",
    **{name: (record_of(metric.values), None) for name, metric in METRICS.items()},
)


class Report(Section):
    """What one evaluation found."""

    schema_version: int = SCHEMA_VERSION
    sae: SAEDescription
    model: ModelDescription
    text: TextDescription
    settings: Settings
    metrics: Metrics
    provenance: dict[str, str | int | float | None]
    """What made the report: code, versions, hardware in general terms. The one part that may differ
    between two runs of the same evaluation on different machines."""

    @property
    def not_evaluable(self) -> dict[str, str]:
        """Reasons by metric, of those that could not be evaluated."""
        records = {name: getattr(self.metrics, name) for name in METRICS}
        return {
            name: record.reason
            for name, record in records.items()
            if isinstance(record, NotEvaluable)
        }


def evaluate(
    sae: AnySAE | str | Path,
    *,
    model: str | TransformerBridge | None = None,
    hook_name: str | None = None,
    corpus: str | Path | Corpus | None = None,
    metrics: Iterable[str] | None = None,
    against: AnySAE | str | Path | None = None,
    endpoint: Endpoint | None = None,
    ravel: str | Path | None = None,
    profile: str = "default",
    seed: int = 0,
    device: str = "cpu",
) -> Report:
    """Measure an SAE on held-out documents.

    Read are the documents that the project's split holds out, and no others: no SAE that was trained
    here, with the same `held_out_share` in its profile, has seen them. A metric that this SAE, model
    or corpus does not allow becomes a record with the reason, and the others go on; an error of the
    program is raised.

    Parameters
    ----------
    sae : AnySAE, str or Path
        A folder of any format that `open_sae` reads; or an object with encode, decode and W_dec of
        shape (d_sae, d_in) that takes raw activations (an SAE of this package gets its normalising
        factor folded in).
    model : str or TransformerBridge, optional
        As `load_language_model` takes it, or a loaded one. None is that of the profile, as below.
    hook_name : str, optional
        Where the SAE reads, such as `blocks.4.hook_resid_post`.
    corpus : str, Path or Corpus, optional
        As `load_corpus` takes it, or a loaded one.
    metrics : iterable of str
        Groups ("core", "absorption", …) or single metrics (keys of METRICS). None measures all that
        need nothing else, and those whose needs are given.
    against : AnySAE, str or Path, optional
        Another SAE, to be compared with latent by latent; as `sae`.
    endpoint : Endpoint, optional
        A language model that explains latents and judges the explanations.
    ravel : str or Path, optional
        Folder of RAVEL's public data (see `load_ravel`); otherwise cities that come with the package.
    profile : str
        A profile of profiles.yml: how many contexts, tokens and words.
    seed : int
        Of the words' split, the probes and the selector.
    device : str
        Of the language model, and of an SAE read from a folder.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is nothing to measure or to measure on: no such SAE, model, hook, corpus, profile or
        metric; or if the SAE was trained on the very documents that are held out here.
    """
    needs = {"against": against, "endpoint": endpoint}
    given = [name for name, value in needs.items() if value is not None]
    names = chosen_metrics(standard_metrics(given) if metrics is None else metrics)
    values = load_profile(profile)
    lm = values.language_model
    named = {
        "model": model if isinstance(model, str) else None,
        "hook_name": hook_name,
        "corpus": str(corpus) if isinstance(corpus, str | Path) else None,
    }
    lm = lm.model_copy(update={key: value for key, value in named.items() if value is not None})
    opened = _open(sae, device)
    trained_on = _training_text(Path(sae)) if isinstance(sae, str | Path) else None
    if opened.sae.W_dec.ndim != 2:
        raise ValueError(
            f"W_dec has shape {tuple(opened.sae.W_dec.shape)}; expected (d_sae, d_in). Measure the "
            "SAEs of a stack one by one."
        )
    with Bench(
        opened.sae,
        lm,
        values.evaluation,
        seed=seed,
        device=device,
        language_model=None if isinstance(model, str) else model,
        corpus=corpus if isinstance(corpus, Corpus) else None,
        against=None if against is None else _open(against, device).sae,
        endpoint=endpoint,
        ravel=ravel,
    ) as bench:
        text = _describe_text(bench, trained_on)
        if any(METRICS[name].reads_model for name in names):
            check_hook_name(bench.language_model, lm.hook_name)
        records = {name: _record(name, bench) for name in names}
        name = lm.model if model is None or isinstance(model, str) else model.cfg.model_name
        return Report(
            sae=_describe_sae(opened),
            model=ModelDescription(name=name, hook_name=lm.hook_name),
            text=text,
            settings=_describe_settings(bench, profile, names),
            metrics=Metrics(**records),
            provenance=_provenance(profile, seed, device),
        )


def write_report(report: Report, file: str | Path) -> None:
    """Write a report as JSON, whole or not at all; it was checked against the schema when made."""
    write_json(Path(file), report.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a report; `report.schema.json` is its committed copy."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def _record(name: str, bench: Bench) -> Evaluated | NotEvaluable:
    metric = METRICS[name]
    try:
        if len(bench.sae.W_dec) == 0:
            raise ValueError("The dictionary is empty: W_dec has no rows.")
        values = metric.measure(bench)
    except ValidationError:
        raise  # a ValueError by inheritance, but one of this program
    except ValueError as error:
        return NotEvaluable(reason=str(error))
    return Evaluated[metric.values](values=values)


def _open(sae: AnySAE | str | Path, device: str) -> OpenedSAE:
    return open_sae(sae, device) if isinstance(sae, str | Path) else _in_memory(sae)


def _in_memory(sae: AnySAE) -> OpenedSAE:
    if isinstance(sae, SAE):
        sae = fold_norm_factor(sae)
    architecture = getattr(sae, "architecture", type(sae).__name__)
    return OpenedSAE(sae, "in memory", architecture, weights_sha256=None)


def _describe_sae(opened: OpenedSAE) -> SAEDescription:
    d_sae, d_in = opened.sae.W_dec.shape
    return SAEDescription(
        format=opened.format,
        architecture=opened.architecture,
        d_in=d_in,
        d_sae=d_sae,
        weights_sha256=opened.weights_sha256,
        stated=opened.stated,
    )


def _describe_text(bench: Bench, trained_on: str | None) -> TextDescription:
    documents = bench.documents
    if trained_on == documents.corpus.fingerprint:
        raise ValueError(
            "The SAE was trained on the very documents that are held out here: its record names text "
            f"{trained_on[:12]}…. Evaluate it on another corpus."
        )
    known: TrainingDocuments = (
        "the other documents of this split"
        if trained_on == documents.training_fingerprint
        else "not known"
    )
    return TextDescription(
        corpus=documents.corpus.name.removesuffix("/held-out"),
        fingerprint=documents.corpus.fingerprint,
        n_documents=len(documents.corpus),
        n_repeated=documents.n_repeated,
        training_fingerprint=documents.training_fingerprint,
        split_seed=SPLIT_SEED,
        held_out_share=bench.lm.held_out_share,
        sae_trained_on=known,
    )


def _describe_settings(bench: Bench, profile: str, names: list[str]) -> Settings:
    lm = bench.lm
    return Settings(
        profile=profile,
        metrics=names,
        seed=bench.seed,
        context_size=lm.context_size,
        held_out_tokens=lm.held_out_tokens,
        drop_norm_ratio=lm.drop_norm_ratio,
        precision=bench.precision,
        cross_entropy_contexts=lm.cross_entropy_contexts,
        first_letter_words=lm.first_letter_words,
    )


def _training_text(folder: Path) -> str | None:
    """Fingerprint of the text an SAE was trained on, from the record beside it in the cache."""
    record = folder.expanduser().resolve().parent / "key.json"
    try:
        return json.loads(record.read_text(encoding="utf-8"))["key"]["data"]["text_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _provenance(profile: str, seed: int, device: str) -> dict[str, Any]:
    """As in other results, but for the time taken: it would differ between equal runs."""
    made = provenance(profile=profile, seed=seed, device=device, seconds=0.0)
    unwanted = ("seconds", "profile", "seed")
    return {key: value for key, value in made.items() if key not in unwanted} | {
        "code": fingerprint(all_modules())
    }
