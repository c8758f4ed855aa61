"""Latents and words inside a notebook: a page in a frame that runs no script, and the same as plain text."""

from __future__ import annotations

import html
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from c2r_core.artefacts.names import unknown_name
from c2r_core.metrics.carriers import NO_CARRIER

CONTEXTS = {
    "top": "Where it fires hardest",
    "middle": "From the middle of its range",
    "near_misses": "Where it nearly fires",
}
"""The kinds of contexts by field, as the browser's pages and the study `examples` have them."""
HEIGHT = 420
"""Of the frame, in pixels; what is longer scrolls."""


class Part(NamedTuple):
    """A piece of a line: a token, or a word."""

    text: str
    strength: float = 0.0
    """How much of the colour it gets, 0 to 1."""
    is_chosen: bool = False
    """Whether it is the token for which the line is there."""


class Line(NamedTuple):
    """One line of a page; `lead` is what stands before its parts."""

    lead: str
    parts: Sequence[Part]
    is_exception: bool = False


class Section(NamedTuple):
    """A heading and its lines."""

    title: str
    lines: Sequence[Line]


class Inline:
    """What a notebook shows: a frame where it can show HTML, else text. Made by the functions below."""

    def __init__(self, title: str, sections: Sequence[Section], *, columns: bool = False) -> None:
        """`columns` puts the sections beside each other where there is room."""
        self.title, self.sections, self.columns = title, tuple(sections), columns

    def __repr__(self) -> str:
        lines = [self.title]
        for section in self.sections:
            lines.append(section.title)
            lines += [_as_text(line) for line in section.lines] or ["  none"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The frame, and below it, folded, the text: some viewers of notebooks take frames away."""
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="" srcdoc="{html.escape(self.page())}" '
            f'style="width:100%;height:{HEIGHT}px;border:1px solid #d0d7de"></iframe>'
            f"<details><summary>As text</summary><pre>{html.escape(repr(self))}</pre></details>"
        )

    def page(self) -> str:
        """The page in the frame; it loads nothing, and text goes into it as text."""
        css = (files("c2r_core.browser") / "static" / "browser.css").read_text(encoding="utf-8")
        body = "".join(
            f"<section><h2>{html.escape(section.title)}</h2>"
            + ("".join(map(_as_html, section.lines)) or "<p>None.</p>")
            + "</section>"
            for section in self.sections
        )
        if self.columns:
            body = f'<div class="columns">{body}</div>'
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f"<style>{css}</style><main><h1>{html.escape(self.title)}</h1>{body}</main></html>"
        )


def show(
    folder: str | Path,
    *,
    latent: int | None = None,
    letter: str | None = None,
    sae: str | None = None,
) -> Inline:
    """A latent, or the carriers of a first letter, from a folder that `browse` wrote.

    Parameters
    ----------
    folder : str or Path
    latent : int, optional
        Its number. Give this or a letter.
    letter : str, optional
        Such as "A"; every SAE of the folder is shown.
    sae : str, optional
        The latent's SAE by the name that it has in the folder; by default the first.

    Raises
    ------
    FileNotFoundError
        If the folder holds no such pages.
    ValueError
        If there is no such latent, letter or SAE, or not one of latent and letter is given.

    Examples
    --------
    In a notebook, as a cell's last line: ``show("my_pages", latent=7)``.
    """
    if (latent is None) == (letter is None):
        raise ValueError(f"latent is {latent} and letter is {letter}; give one of them.")
    folder = Path(folder)
    (index,) = _arguments(folder / "data" / "index.js")
    if letter is not None:
        return _show_letter(index, letter)
    names = [one["name"] for one in index["saes"]]
    if sae is not None and sae not in names:
        raise ValueError(unknown_name("SAE", sae, names))
    number = 0 if sae is None else names.index(sae)
    return _show_latent(folder, index, number, latent)


def show_contexts(title: str, latents: Sequence[Mapping[str, Any]]) -> Inline:
    """Latents with their contexts, as the study `examples` keeps them: texts in which «…» marks what fires.

    Each has `latent`, `density` and, under the names of CONTEXTS, lists of texts.
    """
    sections = []
    for one in latents:
        about = f"Latent {one['latent']}, fires on {_percent(one['density'])} of tokens"
        lines = [
            Line(kind.replace("_", " "), _marked(text))
            for kind in CONTEXTS
            for text in one.get(kind, ())
        ]
        sections.append(Section(about, lines))
    return Inline(title, sections)


def show_carriers(title: str, words: Mapping[str, Mapping[str, int]]) -> Inline:
    """For each SAE, by name, the words by the latent that carries them: {SAE: {word: latent}}, side by side.

    Latents come by how many words they carry, the most first. The words of all others are exceptions, and
    so are those that no latent carries, for which −1 stands. Where all SAEs have the same words, a last list
    says which of the SAEs make an exception of each.
    """
    sections, exceptions = [], {}
    for name, carried in words.items():
        groups = _by_carrier(carried)
        exceptions[name] = {word for one in groups if one.is_exception for word in one.words}
        how_many = f"{len(exceptions[name])} of {len(carried)} words"
        sections.append(Section(f"{name}, exceptions: {how_many}", [_line(one) for one in groups]))
    in_each = list(words.values())
    if len(in_each) > 1 and all(one.keys() == in_each[0].keys() for one in in_each):
        sections.append(
            Section("Where each word is an exception", _compared(in_each[0], exceptions))
        )
    return Inline(title, sections, columns=True)


class _Group(NamedTuple):
    """Words that one latent carries, or that none does."""

    latent: int
    words: list[str]
    is_exception: bool


def _by_carrier(carried: Mapping[str, int]) -> list[_Group]:
    """The latent of the most words first (ties: the lowest number), no latent last."""
    by_latent = defaultdict(list)
    for word, latent in carried.items():
        by_latent[latent].append(word)
    order = sorted(by_latent, key=lambda i: (i == NO_CARRIER, -len(by_latent[i]), i))
    return [_Group(i, by_latent[i], i in (NO_CARRIER, *order[1:])) for i in order]


def _line(group: _Group) -> Line:
    lead = "no latent" if group.latent == NO_CARRIER else f"latent {group.latent}"
    return Line(lead, _words(group.words), group.is_exception)


def _compared(words: Iterable[str], exceptions: Mapping[str, Set[str]]) -> list[Line]:
    """The words by the SAEs in which they are exceptions: those of none first, those of all last."""
    names = list(exceptions)
    by_saes = defaultdict(list)
    for word in words:
        by_saes[tuple(i for i, name in enumerate(names) if word in exceptions[name])].append(word)
    return [
        Line(" and ".join(names[i] for i in saes) or "nowhere", _words(by_saes[saes]), bool(saes))
        for saes in sorted(by_saes, key=lambda saes: (len(saes), saes))
    ]


def _words(words: Iterable[str]) -> list[Part]:
    return [Part(f"{word.strip()} ") for word in words]


# -- from a folder of the browser ----------------------------------------------------------------


def _arguments(file: Path) -> list[Any]:
    """What a file of data hands to the page."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; `c2r browse SAE --out FOLDER` writes it.")
    call = re.fullmatch(r"C2R\.\w+\((.*)\);\n", file.read_text(encoding="ascii"))
    return json.loads(f"[{call[1]}]")


def _show_latent(folder: Path, index: Mapping[str, Any], number: int, latent: int) -> Inline:
    own = index["saes"][number]
    summary, n_latents = own["latents"], len(own["latents"]["density"])
    if not 0 <= latent < n_latents:
        raise ValueError(f"latent is {latent}; {own['name']} has 0 to {n_latents - 1}.")
    piece, place = divmod(latent, index["piece"])
    of_piece = _arguments(folder / "data" / f"{number}-{piece:05d}.js")[2]
    found, most = of_piece[place], summary["max"][latent]
    sections = [
        Section(heading, [_context(one, most) for one in found[kind]])
        for kind, heading in CONTEXTS.items()
    ]
    for field, heading in (("promotes", "Promotes"), ("suppresses", "Suppresses")):
        sections.append(Section(heading, [Line(str(v), [Part(t)]) for t, v in found[field]]))
    near = [Line(str(c), [Part(f"latent {other}")]) for other, c in found["neighbours"]]
    sections.append(Section("Nearest decoder rows", near))
    share = _percent(summary["density"][latent])
    return Inline(
        f"Latent {latent} of {own['name']}, fires on {share} of {index['tokens']} tokens", sections
    )


def _show_letter(index: Mapping[str, Any], letter: str) -> Inline:
    concepts = {one["name"]: one for one in index["concepts"]}
    if letter not in concepts:
        raise ValueError(unknown_name("letter", letter, concepts))
    concept = concepts[letter]
    words = {
        name: dict(zip(concept["words"], own["carriers"], strict=True))
        for name, own in concept["saes"].items()
    }
    return show_carriers(f"Words that start with {letter}", words)


def _context(one: Mapping[str, Any], most: float) -> Line:
    pairs = zip(one["tokens"], one["acts"], strict=True)
    parts = [
        Part(token, act / most if most else 0.0, i == one["at"])
        for i, (token, act) in enumerate(pairs)
    ]
    return Line(str(one["acts"][one["at"]]), parts)


# -- as text and as HTML -------------------------------------------------------------------------


def _marked(text: str) -> list[Part]:
    """Parts of a text in which «…» stands around what fires."""
    return [Part(piece, float(i % 2)) for i, piece in enumerate(re.split("[«»]", text)) if piece]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _visible(text: str) -> str:
    return re.sub(r"[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]", "⏎", text).replace("\t", "⇥")


def _as_text(line: Line) -> str:
    def part(one: Part) -> str:
        text = _visible(one.text)
        return f"«{text}»" if one.strength else f"[{text}]" if one.is_chosen else text

    return f"  {line.lead:>12}  {''.join(map(part, line.parts))}".rstrip()


def _as_html(line: Line) -> str:
    def part(one: Part) -> str:
        text, strength = html.escape(_visible(one.text)), min(1.0, one.strength)
        css = ' class="token at"' if one.is_chosen else ""
        if strength:
            css += f' style="background:rgba(var(--fire),{0.12 + 0.5 * strength:.2f})"'
        return f"<span{css}>{text}</span>" if css else text

    colour = ' style="color:var(--bad)"' if line.is_exception else ""
    lead = f'<span class="value">{html.escape(line.lead)} </span>'
    return f'<div class="context"{colour}>{lead}{"".join(map(part, line.parts))}</div>'
