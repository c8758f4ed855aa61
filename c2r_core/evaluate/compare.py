"""Two reports side by side: `c2r compare A.json B.json`."""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from c2r_core.evaluate.plugins import add_plugin_option, import_plugins
from c2r_core.evaluate.report import Report, read_report


class ComparedRow(NamedTuple):
    """A headline number of two reports; None where one lacks it."""

    metric: str
    field: str
    a: float | None
    b: float | None
    better: str
    winner: str
    """"a", "b", or "" where they are equal, or no direction is better."""


def compare(a: Report, b: Report) -> list[ComparedRow]:
    """Headline numbers of two reports, with the better one of each.

    Which of two numbers is better says nothing of whether the difference is more than chance.
    """
    rows_a, rows_b = ({row[:2]: row for row in report.headline()} for report in (a, b))
    compared = []
    for key in dict.fromkeys([*rows_a, *rows_b]):
        better = (rows_a.get(key) or rows_b[key]).better
        values = [rows[key].value if key in rows else None for rows in (rows_a, rows_b)]
        compared.append(ComparedRow(*key, *values, better, _winner(*values, better)))
    return compared


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
    rows = compare(a, b)
    width = max((len(f"{row.metric}.{row.field}") for row in rows), default=0)
    print(f"{'':{width}}  {'A':>10}  {'B':>10}  better")
    for row in rows:
        marked = [
            number(value) + ("*" if row.winner == side else " ")
            for side, value in (("a", row.a), ("b", row.b))
        ]
        name = f"{row.metric}.{row.field}"
        print(f"{name:{width}}  {marked[0]:>10}  {marked[1]:>10}  {row.better}")
    for name, reasons in (("A", a.not_evaluable), ("B", b.not_evaluable)):
        for metric, reason in reasons.items():
            print(f"{name}: {metric} is not evaluable. {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
