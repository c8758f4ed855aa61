"""Means over the rows of a report, one row a letter, concept or latent."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev


def mean_of(rows: Iterable[object], name: str) -> float | None:
    """Mean of a field over the rows that have a value; None if none has."""
    values = _values(rows, name)
    return fmean(values) if values else None


def sd_of(rows: Iterable[object], name: str) -> float | None:
    """Standard deviation (n − 1) of a field over the rows that have a value; None for fewer than two."""
    values = _values(rows, name)
    return stdev(values) if len(values) > 1 else None


def _values(rows: Iterable[object], name: str) -> list[float]:
    return [getattr(row, name) for row in rows if getattr(row, name) is not None]
