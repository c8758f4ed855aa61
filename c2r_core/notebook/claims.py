"""Three kinds of verdict, printed apart, and leads, which are none.

A *check* is an identity, a *guard* says that an instrument works, a *claim* is about the world and
rests on an interval's end. Only claims are counted. What was noticed after the fact is a *lead*.
Each line prints what was measured, rounded; nbval and `make reproduce` compare everything but that
part, since the third digit of a trained metric moves between processors.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

About = Literal["toy", "language model"]
Subject = Literal["C²R", "others"]
ABOUT: tuple[About, ...] = ("toy", "language model")
SUBJECTS: tuple[Subject, ...] = ("C²R", "others")
NOT_JUDGED = "not judged in smoke"
NOT_MEASURED = "not measured"

MEASURED = r"measured [^\s,\[]+(?: \[[^\]\n]*\])?"
"""What a comparison of two runs leaves out of a line; also in tests/nbval_sanitize.cfg."""
_LINE = re.compile(
    rf"^\[(?:(check|guard|claim) (holds|FAILS|{NOT_JUDGED}|{NOT_MEASURED})|(lead))\] (.+)$",
    re.MULTILINE,
)
_INTERVAL = re.compile(r"measured [^\s,\[]+ \[([^,\]]+), ([^\]]+)\]")
_OF = re.compile(rf"^\(({'|'.join(ABOUT)}), ({'|'.join(SUBJECTS)})\) ")

MOST_DIGITS = 6
"""Digits behind the point that are ever printed."""


class Verdict(NamedTuple):
    """One judged expectation, or a lead."""

    kind: Literal["check", "guard", "claim", "lead"]
    text: str
    expectation: str = ""
    """The bound in words, such as "at most 0.5"; empty for a plain yes or no."""
    value: Any = None
    """A number, bool or str; of a claim, the interval as (mean, low, high)."""
    verdict: str = ""
    """One of "holds", "FAILS", "not judged in smoke" and "not measured"; empty for a lead."""
    measured: str = ""
    n: str = ""
    reason: str = ""
    about: str = ""
    subject: str = ""

    @property
    def ends_unknown(self) -> bool:
        """Whether this is a claim about a number that has no interval."""
        return self.kind == "claim" and _without_ends(self.value)

    @property
    def line(self) -> str:
        """What is printed."""
        head = f"[{self.kind}]" if self.kind == "lead" else f"[{self.kind} {self.verdict}]"
        of = f" ({self.about}, {self.subject})" if self.kind == "claim" else ""
        known = self.kind == "check" and self.verdict == "holds"  # it is what the text says
        hidden = known or self.verdict == NOT_JUDGED or not self.measured
        parts = [] if hidden else [f"measured {self.measured}"]
        if self.expectation:
            parts.append(("expected " if self.kind == "claim" else "") + self.expectation)
        body = f": {', '.join(parts)}" if parts else ""
        n = f"; n = {self.n}" if self.n else ""
        reason = f"; because {self.reason}" if self.reason else ""
        return f"{head}{of} {self.text}{body}{n}{reason}"


class Line(NamedTuple):
    """A verdict or lead as found again in a notebook's output."""

    kind: str
    verdict: str
    text: str

    @property
    def printed(self) -> str:
        """The line as it was printed."""
        return f"[{' '.join(filter(None, (self.kind, self.verdict)))}] {self.text}"

    @property
    def compared(self) -> str:
        """The line without what was measured."""
        return re.sub(MEASURED, "measured …", self.printed)

    @property
    def statement(self) -> str:
        """The line without its verdict and what was measured."""
        return self.compared.partition("] ")[2]

    @property
    def subject(self) -> str:
        """What the line speaks of: its statement without bound and n."""
        return re.split(r": (?:measured|expected) ", self.statement)[0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the interval that was printed, or None."""
        found = _INTERVAL.search(self.text)
        return (
            None if found is None else tuple(float(end.replace("−", "-")) for end in found.groups())
        )

    @property
    def about(self) -> tuple[str, str] | None:
        """(about, subject) of a claim."""
        found = _OF.match(self.text) if self.kind == "claim" else None
        return (found[1], found[2]) if found else None


def judge(
    kind: Literal["check", "guard"],
    text: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    between: tuple[float, float] | None = None,
    equals: Any = None,
    tolerance: float = 0.0,
) -> Verdict:
    """Compare a measured value with one expectation; bounds are inclusive, NaN and None never hold.

    `text` says what is expected, without measured digits. `tolerance` is the allowed absolute difference
    from `equals`. ValueError if more than one bound is given, or none for a value that is not a bool.
    """
    bounds = _bounds(at_least, at_most, between)
    if len(bounds) + (equals is not None) > 1 + (between is not None):
        raise ValueError(f"{kind} {text!r} has more than one bound; make it several")
    value = value.item() if hasattr(value, "item") else value
    value = math.nan if value is None else value
    if bounds:
        expectation, holds = _within((value, value), at_least, at_most, between)
    elif isinstance(equals, str | bool):
        holds, expectation = value == equals, f"equal to {equals}"
    elif equals is not None:
        holds, expectation = abs(value - equals) <= tolerance, f"equal to {equals:g}"
        expectation += f" within {tolerance:g}" if tolerance else ""
    elif isinstance(value, bool):
        holds, expectation = value, ""
    else:
        raise ValueError(
            f"{kind} {text!r} has a value of type {type(value).__name__} and no bound; "
            "give at_least, at_most, between or equals, or a bool"
        )
    measured = "" if isinstance(value, bool) else _rounded([value], bounds)[0]
    return Verdict(kind, text, expectation, value, _holds(holds), measured)


def judge_interval(
    text: str,
    interval: Sequence[float] | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    between: tuple[float, float] | None = None,
) -> Verdict:
    """Judge a claim by the end of an interval that is nearer to its bound; NaN never holds.

    The interval is (mean, low, high), such as `statistics.Interval`. Where there is none (None), since what
    it rests on was not measured, the claim is neither held nor failed.
    ValueError if not exactly one bound is given, or the interval has no two ends.
    """
    bounds = _bounds(at_least, at_most, between)
    if len(bounds) != 1 + (between is not None):
        raise ValueError(f"claim {text!r} needs exactly one of at_least, at_most and between")
    values = [math.nan] * 3 if interval is None else [_number(value) for value in interval]
    if len(values) != 3:
        raise ValueError(
            f"claim {text!r} rests on {len(values)} numbers; expected an interval (mean, low, high)"
        )
    expectation, holds = _within(tuple(values[1:]), at_least, at_most, between)
    if interval is None:
        return Verdict("claim", text, expectation, values, NOT_MEASURED)
    return Verdict("claim", text, expectation, values, _holds(holds), shown(values, bounds))


def shown(interval: Sequence[float], bounds: Sequence[float] = ()) -> str:
    """An interval as it is printed: "−0.10 [−0.23, +0.04]"; the mean alone if it has no ends."""
    values = [_number(value) for value in interval]
    if _without_ends(values):
        return _rounded(values[:1])[0]
    mean, low, high = _rounded(values, bounds)
    return f"{mean} [{low}, {high}]"


def claim_lines(outputs: Iterable[dict[str, Any]]) -> list[Line]:
    """Every verdict and lead in a code cell's outputs, in order."""
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    return [Line(m[1] or m[3], m[2] or "", m[4]) for m in _LINE.finditer(printed)]


def counted(lines: Iterable[Line]) -> dict[tuple[str, str], tuple[int, int]]:
    """How many claims were held and how many failed, by (about, subject)."""
    verdicts = [(line.about, line.verdict) for line in lines if line.about]
    return {
        of: (verdicts.count((of, "holds")), verdicts.count((of, "FAILS")))
        for of in itertools.product(ABOUT, SUBJECTS)
    }


def _without_ends(values: Sequence[float]) -> bool:
    return math.isfinite(values[0]) and all(math.isnan(end) for end in values[1:])


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _bounds(
    at_least: float | None, at_most: float | None, between: tuple[float, float] | None
) -> list[float]:
    return [bound for bound in (at_least, at_most, *(between or ())) if bound is not None]


def _holds(holds: bool) -> str:
    return "holds" if holds else "FAILS"


def _within(
    ends: tuple[float, float],
    at_least: float | None,
    at_most: float | None,
    between: tuple[float, float] | None,
) -> tuple[str, bool]:
    """The expectation in words, and whether both ends meet it."""
    low, high = ends
    if between is not None:
        least, most = between
        return f"between {least:g} and {most:g}", low >= least and high <= most
    if at_least is not None:
        return f"at least {at_least:g}", low >= at_least
    return f"at most {at_most:g}", high <= at_most


def _rounded(values: Sequence[Any], bounds: Sequence[float] = ()) -> list[str]:
    """Numbers to two significant digits of the largest, and to more where a bound would be blurred.

    A mean that lies on its bound gets no more digits than a hundredth of its interval's width has.
    """
    if any(not isinstance(value, int | float) for value in values):
        return [str(value) for value in values]
    if all(isinstance(value, int) for value in values):
        return [_signed(f"{value:d}") for value in values]
    finite = [abs(value) for value in values if math.isfinite(value) and value]
    digits = 1 - math.floor(math.log10(max(finite))) if finite else 0
    spread, most_of_mean = max(values) - min(values), MOST_DIGITS
    if math.isfinite(spread) and spread > 0:
        digits = max(digits, -math.floor(math.log10(spread)))
        most_of_mean = 2 - math.floor(math.log10(spread))
    digits = min(max(digits, 0), MOST_DIGITS)
    while digits < MOST_DIGITS and any(
        _blurs(value, bound, digits)
        for value in (values if digits < most_of_mean else values[1:])
        for bound in bounds
    ):
        digits += 1
    plus = "+" if min(values) < 0 and len(values) > 1 else ""
    return [_signed(f"{value:{plus}.{digits}f}") for value in values]


def _blurs(value: float, bound: float, digits: int) -> bool:
    """Whether a rounded value looks like its bound, or as if it lay on the bound's other side."""
    rounded = round(value, digits) if math.isfinite(value) else value
    crossed = rounded > bound if value <= bound else rounded < bound
    return crossed or (value != bound and rounded == round(bound, digits))


def _signed(text: str) -> str:
    return text.replace("-", "−")
