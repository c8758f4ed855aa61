"""The report of one evaluation: its schema, and what is checked before it is written.

Values carry SAEBench 0.6's names where they mean the same; a field's own sentence says where they
do not quite. Everything but `provenance` is a function of the SAE, the settings and the machine's
arithmetic: two processes write the same file.
"""

from __future__ import annotations

from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from types import UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from c2r_core.artefacts.results import plain

SCHEMA_VERSION = 1


class Section(BaseModel):
    """Frozen, without unknown keys; NaN and infinities become null, as JSON wants it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nan(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value if isinstance(value, BaseModel) else plain(value)
            for name, value in values.items()
        }


def section_of(report: type) -> type[Section]:
    """The section with the fields of a report's dataclass; those of dataclasses within become sections."""
    hints = get_type_hints(report)
    fields = {field.name: (_section_type(hints[field.name]), ...) for field in fields_of(report)}
    return create_model(report.__name__, __base__=Section, __doc__=report.__doc__, **fields)


def _section_type(kind: Any) -> Any:
    """`kind` with sections in place of dataclasses, and lists in place of tuples, as in JSON."""
    if is_dataclass(kind):
        return section_of(kind)
    arguments = [_section_type(argument) for argument in get_args(kind) if argument is not ...]
    if get_origin(kind) is tuple:
        return list[arguments[0]]
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(arguments)]  # noqa: UP007
    return kind


Values = TypeVar("Values", bound=Section)


class Evaluated(Section, Generic[Values]):
    """A metric that was measured."""

    status: Literal["evaluated"] = "evaluated"
    values: Values


class NotEvaluable(Section):
    """A metric that this SAE, model or corpus does not allow."""

    status: Literal["not evaluable"] = "not evaluable"
    reason: str


def record_of(values: type[Section]) -> Any:
    """The type of a metric's entry in a report; null where the metric was not asked for."""
    record = Annotated[Evaluated[values] | NotEvaluable, Field(discriminator="status")]
    return record | None


class SAEDescription(Section):
    """Which SAE was measured."""

    format: str
    """`c2r`, `sae_lens`, `dictionary_learning`, or `in memory`."""
    architecture: str
    """The format's own name for it."""
    d_in: int
    d_sae: int
    weights_sha256: str | None
    """Of the file with the weights; null for an SAE that was in memory."""
    stated: dict[str, str]
    """What the SAE's own config says of its training: model, hook_name, layer, data."""


class ModelDescription(Section):
    """Where the activations come from."""

    name: str
    hook_name: str


TrainingDocuments = Literal["the other documents of this split", "not known"]


class TextDescription(Section):
    """The documents that were read: the held-out side of the project's split, and nothing else."""

    corpus: str
    split: Literal["held-out"] = "held-out"
    fingerprint: str
    """SHA-256 of the documents read."""
    n_documents: int
    n_repeated: int
    """Held-out documents left out, because their text is also that of a training document."""
    training_fingerprint: str
    """SHA-256 of the split's other side, of which nothing was read."""
    split_seed: int
    held_out_share: float
    sae_trained_on: TrainingDocuments
    """Known where the SAE lies in the cache of the training runs, which records its data."""


class Settings(Section):
    """Everything else that decides the values."""

    profile: str
    metrics: list[str]
    seed: int
    """Of the words' split, the probes and the selector."""
    context_size: int
    held_out_tokens: int
    """At most so many tokens are read."""
    drop_norm_ratio: float
    """Tokens of a norm over so many medians are left out, and the first of each context."""
    precision: Literal["float32", "bfloat16"]
    """Of the language model's matrix products."""
    cross_entropy_contexts: int
    first_letter_words: int
