"""Study `language_model`, of notebooks 05 and 12–16, and the one way to train an SAE on a language model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile, training_seeds
from c2r_core.data.batches import StoreBatches
from c2r_core.data.harvest import harvest, harvest_config
from c2r_core.data.language_models import load_language_model, model_fingerprint
from c2r_core.data.precision import resolve_precision
from c2r_core.data.store import ActivationStore
from c2r_core.data.streaming import StreamedBatches, TextStream
from c2r_core.data.text import SPLIT_SEED, Corpus, load_corpus, split_documents
from c2r_core.evaluate.evaluation import evaluate
from c2r_core.experiments.study import Study
from c2r_core.metrics import METRICS, standard_metrics
from c2r_core.metrics.inputs import Inputs, Options
from c2r_core.saes import ARCHITECTURES, SAE, create_sae, fold_norm_factor, load_sae, save_sae
from c2r_core.training import C2R, Orthogonality, TrainConfig, train, weight_from_strength

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_READ = (
    "model",
    "hook_name",
    "context_size",
    "held_out_share",
    "train_tokens",
    "streamed",
    "held_out_tokens",
    "drop_norm_ratio",
    "precision",
    "cross_entropy_contexts",
    "first_letter_words",
)


# -- what is read -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """The language model and the text that SAEs are trained on and measured with, and how much of them."""

    profile: Profile

    @property
    def lm(self) -> LanguageModelProfile:
        """The profile's section."""
        return self.profile.language_model

    def settings(self) -> dict[str, Any]:
        """What decides an SAE's data and its measurements: JSON."""
        lm = {name: getattr(self.lm, name) for name in _READ}
        return lm | {"sizes": self.profile.evaluation.model_dump()}

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the model and the text."""
        return {"model": _model(self.lm.model), "text": _corpus(self.lm.corpus).fingerprint}

    def with_lm(self, **changes: Any) -> Sources:
        """The same with other values in the profile's section."""
        lm = self.lm.model_copy(update=changes)
        return Sources(self.profile.model_copy(update={"language_model": lm}))


_model, _corpus = functools.cache(model_fingerprint), functools.cache(load_corpus)


@functools.cache
def _training_side(corpus: str, held_out_share: float) -> Corpus:
    """Once a process, since the fingerprint of a folder is a pass over all its files."""
    return split_documents(_corpus(corpus), held_out_share, seed=SPLIT_SEED)[0]


@functools.lru_cache(maxsize=1)
def language_model(name: str, device: str = "cpu") -> TransformerBridge:
    """The model, loaded once a process."""
    return load_language_model(name, device=device)


def stored(
    lm: LanguageModelProfile, corpus: Corpus, max_tokens: int, device: str = "cpu"
) -> ActivationStore:
    """Activations of a corpus, harvested or from the cache.

    Raises
    ------
    ValueError
        If the corpus has fewer tokens than are asked for.
    """
    config = harvest_config(lm, max_tokens, device)
    key = asdict(config) | {"model": _model(lm.model), "text": corpus.fingerprint}

    def build(part: Path) -> None:
        harvest(language_model(lm.model, device), corpus, config, part)

    store = ActivationStore.open(cached("activations", key, build))
    if store.manifest.n_tokens <= max_tokens - lm.context_size:
        raise ValueError(
            f"The corpus {corpus.name!r} gives {store.manifest.n_tokens:,} tokens in contexts of "
            f"{lm.context_size}; the profile asks for {max_tokens:,}. Lower it in the profile, or "
            "name a folder with more text as its corpus."
        )
    return store


def training_corpus(lm: LanguageModelProfile) -> Corpus:
    """The documents that SAEs are trained on; the others are held out."""
    return _training_side(lm.corpus, lm.held_out_share)


def training_store(lm: LanguageModelProfile, device: str = "cpu") -> ActivationStore:
    """Their activations; where the profile streams, of as many tokens as are held out: to measure on."""
    tokens = min(lm.train_tokens, lm.held_out_tokens) if lm.streamed else lm.train_tokens
    return stored(lm, training_corpus(lm), tokens, device)


@dataclass(frozen=True)
class TrainingStream:
    """The training documents of a profile that streams: in order, and again from the beginning."""

    lm: LanguageModelProfile
    device: str = "cpu"

    def settings(self) -> dict[str, Any]:
        """What decides the batches, but their size and seed: JSON."""
        about = {"model": _model(self.lm.model), "text": training_corpus(self.lm).fingerprint}
        return asdict(harvest_config(self.lm, None, self.device)) | about

    def batches(self, batch_size: int, seed: int) -> StreamedBatches:
        """Batches straight from the model; errors are those of `StreamedBatches`."""
        corpus = training_corpus(self.lm)
        about = {"fingerprint": corpus.fingerprint}
        texts = TextStream(corpus.name, lambda: (d.text for d in corpus.documents), **about)
        model = language_model(self.lm.model, self.device)
        chosen = {"batch_size": batch_size, "seed": seed, "repeat": True}
        config = harvest_config(self.lm, None, self.device)
        return StreamedBatches(model, texts, config, **chosen)


TrainingData = ActivationStore | TrainingStream


def training_data(lm: LanguageModelProfile, device: str = "cpu") -> TrainingData:
    """What SAEs are trained on: a store, or a stream where the profile says so."""
    return TrainingStream(lm, device) if lm.streamed else training_store(lm, device)


# -- arms ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModelArm:
    """One way to train an SAE on activations; strengths are as in `weight_from_strength`."""

    architecture: str
    d_sae: int
    k: int
    batch_size: int
    config: TrainConfig
    """Its seed is the run's."""
    c2r_strength: float = 0.0
    orthogonality_weight: float = 0.0
    every: int = 1
    chunk_size: int | None = None

    def settings(self) -> dict[str, Any]:
        """All that decides the trained SAE, but data and seed: JSON."""
        return asdict(self) | {"config": self.config.decides()}

    def code(self) -> list[str]:
        """The module of its architecture."""
        return [ARCHITECTURES[self.architecture].__module__]

    def penalties(self) -> list:
        """The regularisers."""
        both = {"every": self.every, "chunk_size": self.chunk_size}
        found = []
        if self.c2r_strength:
            sizes = {"batch_size": self.batch_size, "d_sae": self.d_sae}
            found.append(C2R(weight_from_strength(self.c2r_strength, **sizes), **both))
        if self.orthogonality_weight:
            found.append(Orthogonality(self.orthogonality_weight, **both))
        return found


def arm_of(
    lm: LanguageModelProfile, device: str = "cpu", *, steps: int | None = None, **changes: Any
) -> LanguageModelArm:
    """The profile's recipe for a BatchTopK SAE, with fields of `LanguageModelArm` changed."""
    config = TrainConfig(
        steps=steps or lm.steps,
        lr=lm.lr,
        clip_norm=lm.clip_norm,
        aux_k_coefficient=lm.aux_k_coefficient,
        precision=resolve_precision(lm.precision, device),
    )
    plain = LanguageModelArm(
        architecture="batch_topk",
        d_sae=lm.d_sae,
        k=lm.k,
        batch_size=lm.batch_size,
        config=config,
        every=lm.penalty_every,
        chunk_size=lm.chunk_size,
    )
    return replace(plain, **changes)


def standard_arms(lm: LanguageModelProfile, device: str = "cpu") -> dict[str, LanguageModelArm]:
    """Baseline, C²R, OrtSAE, and a smaller baseline: what size alone would buy."""
    return {
        "baseline": arm_of(lm, device),
        "C²R": arm_of(lm, device, c2r_strength=lm.c2r_strength),
        "OrtSAE": arm_of(lm, device, orthogonality_weight=lm.orthogonality_weight),
        "small baseline": arm_of(lm, device, d_sae=lm.small_d_sae),
    }


def trained(
    arm: LanguageModelArm,
    data: TrainingData,
    seed: int,
    device: str = "cpu",
    progress: bool = False,
) -> SAE:
    """The arm's SAE, for activations of norm 1 (see `fold_norm_factor`), trained or from the cache."""
    is_streamed = isinstance(data, TrainingStream)

    def build(folder: Path) -> None:
        if is_streamed:
            batches = data.batches(arm.batch_size, seed)
        else:
            batches = StoreBatches(data, arm.batch_size, seed)
        sizes = {"d_in": batches(0).shape[-1], "d_sae": arm.d_sae, "k": arm.k}
        sae = create_sae(arm.architecture, **sizes, seed=seed).to(device)
        checkpoint = folder / "checkpoint.safetensors"
        how = {"checkpoint": checkpoint, "progress": progress}
        train(sae, batches, replace(arm.config, seed=seed), arm.penalties(), **how)
        save_sae(sae, folder / "sae")
        checkpoint.unlink(missing_ok=True)

    key = arm.settings() | {
        "seed": seed,
        "data": data.settings() if is_streamed else asdict(data.manifest),
        "device": device.partition(":")[0],
    }
    code = ["c2r_core.experiments.language_model:trained", *arm.code()]
    return load_sae(cached("sae", key, build, code=code, resumable=True) / "sae", device)


def inputs_of(sae: SAE, sources: Sources, device: str = "cpu") -> Inputs:
    """What metrics read of a trained SAE: held-out documents."""
    return Inputs(
        fold_norm_factor(sae),
        sources.lm,
        sources.profile.evaluation,
        Options(profile=sources.profile, device=device),
        language_model=language_model(sources.lm.model, device),
        corpus=_corpus(sources.lm.corpus),
    )


def of_trained(measure: Callable[..., Any]) -> Callable[..., Any]:
    """A measure of an SAE's `Inputs` as a cell's: of the arm's SAE of the first seed."""

    @functools.wraps(measure)
    def of_arm(
        arm: LanguageModelArm, sources: Sources, seeds: Sequence[int], device: str, **given: Any
    ) -> Any:
        sae = trained(arm, training_data(sources.lm, device), seeds[0], device)
        return measure(inputs_of(sae, sources, device), **given)

    return of_arm


# -- cells --------------------------------------------------------------------------------------


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """A cell for each seed, arm and metric, and one of examples for each arm of the first seed."""
    sources, arms = Sources(profile), standard_arms(profile.language_model, device)
    made = []
    for one in training_seeds(profile.language_model.seeds, seed):
        study = Study("language_model", profile, [one], device)
        for title, arm in arms.items():
            made += [metric_cell(study, arm, title, [name], sources) for name in standard_metrics()]
    return made


def metric_cell(
    study: Study, arm: LanguageModelArm, title: str, metrics: Sequence[str], sources: Sources
) -> Cell:
    """Records of some metrics, of the SAE that an arm and the study's one seed give."""
    label = f", {metrics[0]}" if len(metrics) == 1 else ""
    return study.cell(
        f"{title}, seed {study.seeds[0]}{label}",
        measure,
        modules=[METRICS[metric].measure.__module__ for metric in metrics],
        arm=arm,
        metrics=metrics,
        sources=sources,
    )


def measure(
    arm: LanguageModelArm,
    metrics: Sequence[str],
    sources: Sources,
    seeds: Sequence[int],
    device: str,
) -> dict[str, Any]:
    """{metric: its record} from the report of `evaluate`."""
    sae = trained(arm, training_data(sources.lm, device), seeds[0], device)
    own = training_store(sources.lm, device)
    return evaluated(sae, metrics, sources, device, train_store=own)


def evaluated(
    sae: SAE, metrics: Sequence[str], sources: Sources, device: str, **options: Any
) -> dict[str, Any]:
    """{metric: its record} of an SAE in memory; options are those of `Options`."""
    report = evaluate(
        sae,
        model=language_model(sources.lm.model, device),
        hook_name=sources.lm.hook_name,
        corpus=_corpus(sources.lm.corpus),
        metrics=metrics,
        options=Options(profile=sources.profile, device=device, **options),
    )
    return dict(report.metrics)


# -- tables -------------------------------------------------------------------------------------


def records(
    values: Mapping[str, Any], metric: str, titles: Iterable[str]
) -> dict[tuple[str, int], Mapping[str, Any]]:
    """A metric's values by (arm, seed), where it was evaluable."""
    found = {}
    for title in titles:
        of_title = re.compile(rf"{re.escape(slug(title))}-seed-(\d+)(-|$)")
        for name, of_cell in values.items():
            match = of_title.match(name)
            if match and metric in of_cell and of_cell[metric]["status"] == "evaluated":
                found[title, int(match[1])] = of_cell[metric]["values"]
    return found


def metric_table(
    values: Mapping[str, Any], columns: Mapping[str, str], titles: Iterable[str]
) -> pd.DataFrame:
    """Arm, seed, and the columns asked for; a metric that was not evaluable leaves NaN.

    Columns say by name where a number is: "reconstruction.fvu", "use.sae.mean_erased", …; titles are arms.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for column, path in columns.items():
        metric, *inner = path.split(".")
        for (arm, seed), found in records(values, metric, titles).items():
            row = rows.setdefault((arm, seed), {"arm": arm, "seed": seed})
            row[column] = functools.reduce(lambda value, key: value[key], inner, found)
    table = pd.DataFrame(rows.values(), columns=["arm", "seed", *columns])
    return table.astype(dict.fromkeys(columns, float))


def item_table(
    values: Mapping[str, Any], metric: str, items: str, titles: Iterable[str]
) -> pd.DataFrame:
    """Arm, seed, and the fields of each item of a list in a metric's report, such as its letters."""
    return pd.DataFrame(
        {"arm": arm, "seed": seed} | item
        for (arm, seed), found in records(values, metric, titles).items()
        for item in found[items]
    )
