"""The rows of a report, one row a letter, concept or latent: their means, and where none has a value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from c2r_core.errors import NotEvaluable


def mean_of(rows: Iterable[object], name: str) -> float | None:
    """Mean of a field over the rows that have a value; None if none has."""
    values = _values(rows, name)
    return fmean(values) if values else None


def sd_of(rows: Iterable[object], name: str) -> float | None:
    """Standard deviation (n − 1) of a field over the rows that have a value; None for fewer than two."""
    values = _values(rows, name)
    return stdev(values) if len(values) > 1 else None


def none_of(what: str, rows: Sequence[object]) -> NotEvaluable:
    """What to raise where each row says why it is not evaluable."""
    example = f"; for example: {rows[0].not_evaluable}" if rows else ""
    return NotEvaluable(f"None of the {len(rows)} {what} could be measured{example}.")


def _values(rows: Iterable[object], name: str) -> list[float]:
    return [getattr(row, name) for row in rows if getattr(row, name) is not None]
