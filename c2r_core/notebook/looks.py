"""How arms and lines are drawn, in every figure alike.

An arm has one colour, marker and label in every figure (`ARMS`); in a figure without arms the colours
are others. Lines differ by marker and by lightness as well as by colour, so that figures read in grey.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from typing import NamedTuple


class Style(NamedTuple):
    """How one arm, or one line, is drawn."""

    colour: str
    marker: str
    label: str
    line: str = "-"

    @property
    def mark(self) -> dict[str, str]:
        """Colour and marker as matplotlib's arguments."""
        return {"color": self.colour, "marker": self.marker}


COLOURS = ("#1b3a57", "#d1603d", "#5ba3a0", "#c9b458", "#8a6fa8", "#9a9a9a", "#5f7f2e", "#e39aa8")
OTHER_COLOURS = "#33333d #2f86c9 #a3306b #7cc4ea #8a5a33 #c08fd6 #2b8f4e #b0b04a".split()
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
LINES = ("-", "--", ":", "-.")
GREY = {"color": "0.4", "linewidth": 1, "zorder": 1}

_NAMES = (
    ("baseline", "none"),
    ("C²R", "ReLU with C²R", "BatchTopK with C²R", "C²R, 0.88"),
    ("OrtSAE",),
    ("small baseline", "directed OrtSAE"),
    ("minimum", "directed", "directed, 0.88"),
    ("no SAE", "unweighted sum", "directed OrtSAE, margin"),
    ("product", "silent partner, directed"),
    ("co-activation", "directed, margin"),
)
_LOOKS, _OTHER_LOOKS = (
    tuple(zip(colours, MARKERS, LINES * 2, strict=True)) for colours in (COLOURS, OTHER_COLOURS)
)
ARMS: dict[str, Style] = {
    name: Style(colour, marker, name, line)
    for names, (colour, marker, line) in zip(_NAMES, _LOOKS, strict=True)
    for name in names
} | {name: Style("#4d4d4d", "*", name, ":") for name in ("group lasso", "held norms")}
"""What an arm looks like, by its name; one dictionary for all figures."""


def styles(names: Iterable[Hashable]) -> dict[Hashable, Style]:
    """A style for every name: an arm's own, else the next free one; without arms, one of other colours."""
    names = dict.fromkeys(names)
    own = {name: ARMS[name] for name in names if name in ARMS}
    taken = {style.colour for style in own.values()}
    looks = _LOOKS if own else _OTHER_LOOKS
    free = itertools.cycle(look for look in looks if look[0] not in taken)
    others = (name for name in names if name not in own)
    return own | {
        name: Style(colour, marker, str(name), line)
        for name, (colour, marker, line) in zip(others, free, strict=False)
    }
