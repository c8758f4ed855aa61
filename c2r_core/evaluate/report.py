"""The report of one evaluation: what it says, how it is written and read.

Values carry SAEBench 0.6's names where they mean the same; a field's own sentence says where they
do not quite. Everything but `provenance` is a function of the SAE, the settings and the machine's
arithmetic: two processes write the same file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_json
from typing_extensions import TypedDict

from c2r_core.artefacts.results import read_json, write_json
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import METRICS, REPORT_CONFIG, Metric

SCHEMA_VERSION = 2
Values = TypeVar("Values")


class Described:
    """What the schema takes its descriptions from: the texts under the fields."""

    __pydantic_config__ = REPORT_CONFIG


@dataclass(frozen=True)
class Evaluated(Described, Generic[Values]):
    """A metric that was measured."""

    values: Values
    status: Literal["evaluated"] = "evaluated"


@dataclass(frozen=True)
class NotEvaluated(Described):
    """A metric that this SAE, model or corpus does not allow."""

    reason: str
    status: Literal["not evaluable"] = "not evaluable"


@dataclass(frozen=True)
class SAEDescription(Described):
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
    """What the SAE's own record says of its training: model, hook_name, text, …"""


@dataclass(frozen=True)
class ModelDescription(Described):
    """Where the activations come from."""

    name: str
    hook_name: str


@dataclass(frozen=True)
class TextDescription(Described):
    """The documents that were read: the held-out side of the project's split, and nothing else."""

    corpus: str
    fingerprint: str
    """SHA-256 of the documents read."""
    n_documents: int
    n_repeated: int
    """Held-out documents left out, because their text is also that of a training document."""
    training_fingerprint: str
    """SHA-256 of the split's other side, of which nothing was read."""
    split_seed: int
    held_out_share: float
    sae_trained_on: Literal["the other documents of this split", "another text", "not known"]
    """By the SAE's own record."""
    split: Literal["held-out"] = "held-out"


@dataclass(frozen=True)
class Settings(Described):
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


class HeadlineRow(NamedTuple):
    """One number that sums a metric up; `better` and `baseline` as in `c2r_core.metrics.Headline`."""

    metric: str
    field: str
    value: float | None
    better: str
    baseline: float | None


Records = TypeVar("Records", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Report(Described, Generic[Records]):
    """What one evaluation found: `report["reconstruction"].fvu`, `report.headline()`."""

    sae: SAEDescription
    model: ModelDescription | None
    """Null where no metric asked for reads it, as is the text."""
    text: TextDescription | None
    settings: Settings
    metrics: Records
    """The record of each metric that was asked for, by name."""
    provenance: dict[str, str | int | float | None]
    """What made the report: code, versions, hardware in general terms. The one part that may differ
    between two runs of the same evaluation on different machines."""
    schema_version: int = SCHEMA_VERSION

    def __getitem__(self, name: str) -> Any:
        """A metric's own report.

        Raises KeyError if the metric was not asked for. Raises NotEvaluable if it could not be evaluated.
        """
        if name not in self.metrics:
            asked = ", ".join(self.metrics)
            raise KeyError(f"metric {name!r} was not asked for; the report has {asked}")
        record = self.metrics[name]
        if isinstance(record, NotEvaluated):
            raise NotEvaluable(record.reason)
        return record.values

    @property
    def not_evaluable(self) -> dict[str, str]:
        """Reasons by metric, of those that could not be evaluated."""
        return {n: r.reason for n, r in self.metrics.items() if isinstance(r, NotEvaluated)}

    @property
    def warnings(self) -> dict[str, str]:
        """By metric, what its report warns of."""
        found = {n: getattr(r.values, "warning", None) for n, r in self._measured()}
        return {name: warning for name, warning in found.items() if warning}

    def headline(self) -> list[HeadlineRow]:
        """The numbers that sum the metrics up, each with the better direction and its baseline."""
        return [
            HeadlineRow(
                name,
                field,
                _at(record.values, field),
                how.better,
                _at(record.values, how.baseline) if isinstance(how.baseline, str) else how.baseline,
            )
            for name, record in self._measured()
            for field, how in METRICS[name].headline.items()
        ]

    def _measured(self) -> list[tuple[str, Evaluated]]:
        return [
            (n, r) for n, r in self.metrics.items() if n in METRICS and isinstance(r, Evaluated)
        ]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a report, with all metrics that are registered now."""
    schema = _adapter(tuple(METRICS.values())).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def write_report(report: Report, file: str | Path) -> None:
    """Write a report as JSON, whole or not at all; undefined numbers are null."""
    write_json(Path(file), report)


def read_report(file: str | Path) -> Report:
    """What `write_report` wrote. The values of a metric that is not registered here are a plain mapping.

    Raises ValueError if the file is no report of this version, OSError if it cannot be read.
    """
    if not Path(file).exists():
        raise FileNotFoundError(
            f"There is no report {file}; `c2r evaluate FOLDER --out {file}` writes it."
        )
    content = read_json(Path(file))
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{file} is no report of version {SCHEMA_VERSION}: its schema_version is {version!r}. "
            "Evaluate the SAE again."
        )
    try:
        return checked_report(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no report: {error}") from error


def checked_report(content: Any) -> Report:
    """A report, or its JSON, checked against the schema; NaN and infinities become None."""
    report = _adapter(tuple(METRICS.values())).validate_json(_json(content))
    for name in report.metrics.keys() - METRICS.keys():
        report.metrics[name] = checked_record(name, report.metrics[name])
    return report


def checked_record(name: str, record: Any) -> Evaluated | NotEvaluated:
    """One metric's record, or its JSON, likewise; a ValueError names the metric that it does not fit."""
    kind = METRICS[name].report if name in METRICS else dict[str, Any]
    try:
        return TypeAdapter(_record(kind)).validate_json(_json(record))
    except ValidationError as error:
        raise ValueError(f"The metric {name!r} does not fit its report: {error}") from error


def _at(values: Any, path: str) -> Any:
    """The field at a path such as "live_latents.pw_mcc"; None where a part of it is None."""
    for name in path.split("."):
        if values is not None:
            values = values[name] if isinstance(values, Mapping) else getattr(values, name)
    return values


def _json(value: Any) -> bytes:
    return to_json(value, inf_nan_mode="null", fallback=lambda array: array.tolist())


def _record(kind: type) -> Any:
    return Annotated[Evaluated[kind] | NotEvaluated, Field(discriminator="status")]


@functools.lru_cache(maxsize=2)
def _adapter(metrics: tuple[Metric, ...]) -> TypeAdapter:
    records = TypedDict("Metrics", {of.name: NotRequired[_record(of.report)] for of in metrics})
    records.__pydantic_config__ = ConfigDict(extra="allow")
    return TypeAdapter(Report[records])
