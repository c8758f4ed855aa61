"""Two reports side by side: `c2r compare A.json B.json`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from c2r_core.errors import NotEvaluable
from c2r_core.evaluate.plugins import add_plugin_option, import_plugins
from c2r_core.evaluate.report import Report, read_report
from c2r_core.statistics import Interval, paired_interval

LETTERS, CONCEPTS = ("letters", "first_letter"), ("concepts", "concept")
PAIRED = {
    ("absorption", "mean_absorption_fraction_score"): (*LETTERS, "mean_absorption_fraction"),
    ("absorption", "mean_full_absorption_score"): (*LETTERS, "full_absorption_rate"),
    ("absorption", "mean_num_split_features"): (*LETTERS, "num_split_features"),
    ("assignment_consistency", "mean_consistency"): (*CONCEPTS, "consistency"),
    ("assignment_consistency", "mean_exception_rate"): (*CONCEPTS, "exception_rate"),
    ("assignment_consistency", "mean_no_carrier_share"): (*CONCEPTS, "no_carrier_share"),
    ("assignment_consistency", "mean_f1"): (*CONCEPTS, "f1"),
}
"""Headline numbers that are means: of which list of the metric's report, what names an item, its field."""


class Difference(NamedTuple):
    """The mean of B − A over the items that both reports have, with its 95 % interval (Student's t)."""

    interval: Interval
    n: int
    items: str
    """What they are: "letters" or "concepts"."""

    def __str__(self) -> str:
        mean, low, high = (f"{value:+.3f}".replace("-", "−") for value in self.interval)
        return f"{mean} [{low}, {high}], {self.n} {self.items}"


class ComparedRow(NamedTuple):
    """A headline number of two reports; None where one lacks it."""

    metric: str
    field: str
    a: float | None
    b: float | None
    better: str
    winner: str
    """"a", "b", or "" where they are equal, or no direction is better."""
    difference: Difference | None = None
    """None where the number is no mean over items, or fewer than two items have it in both reports."""


def compare(a: Report, b: Report) -> list[ComparedRow]:
    """Headline numbers of two reports, with the better one of each.

    Which of two numbers is better says nothing of whether the difference is more than chance. Where a number
    is a mean over letters or concepts, `difference` has an interval over these; what another training would
    change is not in it.
    """
    rows_a, rows_b = ({row[:2]: row for row in report.headline()} for report in (a, b))
    compared = []
    for key in dict.fromkeys([*rows_a, *rows_b]):
        better = (rows_a.get(key) or rows_b[key]).better
        values = [rows[key].value if key in rows else None for rows in (rows_a, rows_b)]
        winner = _winner(*values, better)
        compared.append(ComparedRow(*key, *values, better, winner, _difference(a, b, *key)))
    return compared


def _difference(a: Report, b: Report, metric: str, field: str) -> Difference | None:
    if (metric, field) not in PAIRED:
        return None
    items, name, value = PAIRED[metric, field]
    try:
        first, second = (
            {getattr(item, name): getattr(item, value) for item in getattr(report[metric], items)}
            for report in (a, b)
        )
    except (KeyError, NotEvaluable):  # one of them has no such metric
        return None
    both = [k for k, v in first.items() if v is not None and second.get(k) is not None]
    if len(both) < 2:
        return None
    interval = paired_interval([second[k] for k in both], [first[k] for k in both])
    return Difference(interval, len(both), items)


def differences(a: Report, b: Report) -> list[str]:
    """What keeps two reports from being compared: another model, text or setting."""
    pairs = {
        f"{part}.{name}": (value, getattr(getattr(b, part), name))
        for part in ("model", "text", "settings")
        if getattr(a, part) is not None and getattr(b, part) is not None
        for name, value in vars(getattr(a, part)).items()
        if name not in ("metrics", "sae_trained_on")
    }
    return [f"{name}: {x} and {y}" for name, (x, y) in pairs.items() if x != y]


def _winner(a: float | None, b: float | None, better: str) -> str:
    if a is None or b is None or a == b or better == "none":
        return ""
    if better == "near 1":
        a, b, better = abs(a - 1), abs(b - 1), "lower"
    return "a" if (a < b) == (better == "lower") else "b"


def number(value: float | None) -> str:
    """Four significant digits; a dash for what is not there."""
    return "–" if value is None else f"{value:.4g}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="c2r compare",
        description="Set two reports side by side; * marks the better number, whether or not the "
        "difference is more than chance.",
    )
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    add_plugin_option(parser)
    given = parser.parse_args(arguments)
    import_plugins(parser, given.plugin)
    try:
        a, b = read_report(given.a), read_report(given.b)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for difference in differences(a, b):
        print(f"Not measured alike: {difference}")
    names = [Path(file).name for file in (given.a, given.b)]
    names = [given.a, given.b] if names[0] == names[1] else names
    _print(compare(a, b), names)
    for name, reasons in zip(names, (a.not_evaluable, b.not_evaluable), strict=True):
        for metric, reason in reasons.items():
            print(f"{name}: {metric} is not evaluable. {reason}")
    return 0


def _print(rows: list[ComparedRow], names: list[str]) -> None:
    width = max((len(f"{row.metric}.{row.field}") for row in rows), default=0)
    wide = [max(10, len(name)) for name in names]
    titles = "  ".join(f"{name:>{w}}" for name, w in zip(names, wide, strict=True))
    print(f"{'':{width}}  {titles}  {'better':6}  second − first")
    for row in rows:
        marked = "  ".join(
            f"{number(value) + ('*' if row.winner == side else ' '):>{w}}"
            for side, value, w in zip("ab", (row.a, row.b), wide, strict=True)
        )
        line = f"{f'{row.metric}.{row.field}':{width}}  {marked}  {row.better:6}"
        print(f"{line}  {'' if row.difference is None else row.difference}".rstrip())
    print("* better number; no test of chance.")
    if any(row.difference for row in rows):
        print(
            "The intervals (95 %) are over letters or concepts, paired; another training may differ by more."
        )


if __name__ == "__main__":
    sys.exit(main())
