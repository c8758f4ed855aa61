"""Claims: expectations of a measured number, printed without the number.

The third significant digit of a trained metric moves between processors. So a notebook's output,
which is compared when it is run again, holds the expectation and the verdict; the number is in the
results file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

Verdict = Literal["holds", "FAILS", "not judged in smoke"]

_LINE = re.compile(r"^\[(holds|FAILS|not judged in smoke)\] (.+)$", re.MULTILINE)


class Claim(NamedTuple):
    """One judged expectation."""

    text: str
    expectation: str
    """The bounds in words, such as "at most 0.5"; empty where the value is a plain yes or no."""
    value: float | bool | str
    verdict: Verdict

    @property
    def line(self) -> str:
        """What is printed: never a measured digit."""
        return f"[{self.verdict}] " + ": ".join(filter(None, [self.text, self.expectation]))


def judge(
    text: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    between: tuple[float, float] | None = None,
    equals: Any = None,
    tolerance: float = 0.0,
) -> Claim:
    """Compare a measured value with one expectation; bounds are inclusive.

    A NaN or None (not evaluable) never holds.

    Parameters
    ----------
    text : str
        What is claimed, without measured digits.
    value : number, bool or str
        What was measured. Without any bound it must be a bool.
    tolerance : float
        Allowed absolute difference; only with `equals`.

    Raises
    ------
    ValueError
        If more than one bound is given, or none for a value that is not a bool.
    """
    bounds = (at_least, at_most, between, equals)
    if sum(bound is not None for bound in bounds) > 1:
        raise ValueError(f"claim {text!r} has more than one bound; make it several claims")
    value = value.item() if hasattr(value, "item") else value
    value = math.nan if value is None else value
    if at_least is not None:
        holds, expectation = value >= at_least, f"at least {at_least:g}"
    elif at_most is not None:
        holds, expectation = value <= at_most, f"at most {at_most:g}"
    elif between is not None:
        low, high = between
        holds, expectation = low <= value <= high, f"between {low:g} and {high:g}"
    elif isinstance(equals, str | bool):
        holds, expectation = value == equals, f"equal to {equals}"
    elif equals is not None:
        holds, expectation = abs(value - equals) <= tolerance, f"equal to {equals:g}"
        expectation += f" within {tolerance:g}" if tolerance else ""
    elif isinstance(value, bool):
        holds, expectation = value, ""
    else:
        raise ValueError(
            f"claim {text!r} has a value of type {type(value).__name__} and no bound; "
            "give at_least, at_most, between or equals, or a bool"
        )
    return Claim(text, expectation, value, "holds" if holds else "FAILS")


def claim_lines(outputs: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """(verdict, claim) of every claim line in a code cell's outputs, in order."""
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    return [(match[1], match[2]) for match in _LINE.finditer(printed)]
