"""What the committed notebooks say holds and fails, read from their outputs when the site is built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from nbformat import NotebookNode

from c2r_core.notebook import files
from c2r_core.notebook.claims import ABOUT, SUBJECTS, Line

SUBJECT_TITLES = {"C²R": "on C²R", "others": "on other methods and on the measurements themselves"}
ABOUT_TITLES = {"toy": "Toy features", "language model": "The language model"}
VERDICTS = {"holds": "held", "FAILS": "failed", "not measured": "not measured"}


class Printed(NamedTuple):
    """A line and the notebook that printed it."""

    notebook: Path
    title: str
    line: Line


def printed(notebooks: Iterable[Path]) -> list[Printed]:
    """Every verdict and lead of some notebooks, in order."""
    found = []
    for path in notebooks:
        notebook = files.read(path)
        found += [Printed(path, title(notebook), line) for line in files.verdicts(notebook)]
    return found


def title(notebook: NotebookNode) -> str:
    """A notebook's first heading."""
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def page(lines: Sequence[Printed], prefix: str) -> str:
    """Markdown: how many claims held and failed, then every line, held and failed apart.

    `prefix` is the way from the page to the notebooks' folder, such as "../notebooks".
    """
    claims = [one for one in lines if one.line.about]
    parts = [_counts(claims)]
    for about in ABOUT:
        for subject in SUBJECTS:
            own = [one for one in claims if one.line.about == (about, subject)]
            parts.append(f"## {ABOUT_TITLES[about]}: claims {SUBJECT_TITLES[subject]}")
            parts += _by_verdict(own, prefix)
    rest = {
        "guard": ("Guards", "Does an instrument, or a demonstration, work?"),
        "check": ("Checks", "Identities, true by mathematics or by construction."),
    }
    for kind, (heading, what) in rest.items():
        parts.append(f"## {heading}\n\n{what}")
        parts += _by_verdict([one for one in lines if one.line.kind == kind], prefix)
    leads = [one for one in lines if one.line.kind == "lead"]
    parts.append("## Leads\n\nNoticed afterwards, or without an interval, and not judged.")
    parts.append(_list(leads, prefix))
    return "\n\n".join(parts)


def _counts(claims: Sequence[Printed]) -> str:
    rows = ["| claims | held | failed |", "|---|--:|--:|"]
    for about in ABOUT:
        for subject in SUBJECTS:
            of = [one.line.verdict for one in claims if one.line.about == (about, subject)]
            group = f"{ABOUT_TITLES[about]}, {SUBJECT_TITLES[subject]}"
            rows.append(f"| {group} | {of.count('holds')} | {of.count('FAILS')} |")
    return "\n".join(rows)


def _by_verdict(lines: Sequence[Printed], prefix: str) -> list[str]:
    parts = []
    for verdict, name in VERDICTS.items():
        own = [one for one in lines if one.line.verdict == verdict]
        if own:
            parts += [f"### {name.capitalize()}: {len(own)}", _list(own, prefix)]
    return parts


def _list(lines: Sequence[Printed], prefix: str) -> str:
    """One list for each notebook, under its name."""
    parts: list[str] = []
    last = None
    for one in lines:
        if one.notebook != last:
            number = one.notebook.stem.partition("_")[0]
            parts.append(f"**Notebook {number}: [{one.title}]({prefix}/{one.notebook.name})**\n")
            last = one.notebook
        parts.append(f"- {_shown(one.line)}")
    return "\n".join("\n" + part if part.startswith("**") else part for part in parts)


def _shown(line: Line) -> str:
    """The line without its group, which the heading says; numbers and reasons in smaller type."""
    text = re.sub(r"^\([^)]*\) ", "", line.text) if line.about else line.text
    statement, measured, rest = text.partition(": measured ")
    if not measured:
        return _plain(text)
    return f'{_plain(statement)}<br><span class="c2r-numbers">measured {_plain(rest)}</span>'


def _plain(text: str) -> str:
    """Text with what Markdown would read as markup escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|$#~])", r"\\\1", text)
