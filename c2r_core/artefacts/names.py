"""What an error says about a name that does not exist."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable


def unknown_name(what: str, given: str, known: Iterable[str]) -> str:
    """A sentence naming the unknown thing, the nearest known one, and all known ones.

    >>> unknown_name("profile", "ful", ["smoke", "full"])
    "unknown profile 'ful'; did you mean 'full'? Known: smoke, full"
    """
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {given!r}{hint} Known: {', '.join(known) or 'none'}"


def slug(text: str) -> str:
    """A file name for a title.

    >>> slug("BatchTopK, C²R, B = 256")
    'batchtopk-c2r-b-256'
    """
    text = text.replace("√", "root ").replace("λ", "lambda")
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9._]+", "-", plain).strip("-")
