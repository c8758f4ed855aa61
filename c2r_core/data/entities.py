"""Entities with attributes that a language model may know: what is asked, of whom, and what is true."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c2r_core.artefacts.fields import from_json
from c2r_core.errors import NotEvaluable


@dataclass(frozen=True)
class Entities:
    """What is asked, of whom, and what is true; every field by attribute."""

    templates: Mapping[str, str]
    """A text with {subject} in it, which the model completes with the attribute's value."""
    prefixes: Mapping[str, str]
    """Examples in front of it."""
    values: Mapping[str, Mapping[str, str]]
    """The value of each entity."""


_CITY_TEMPLATES = {
    "country": "The city of{subject} is in the country of",
    "continent": "The city of{subject} is in the continent of",
    "language": "In the city of{subject}, most people speak",
}
_CITY_EXAMPLES = {
    " Prague": {"country": "Czechia", "continent": "Europe", "language": "Czech"},
    " Accra": {"country": "Ghana", "continent": "Africa", "language": "English"},
    " Jakarta": {"country": "Indonesia", "continent": "Asia", "language": "Indonesian"},
    " Bogota": {"country": "Colombia", "continent": "America", "language": "Spanish"},
}


def offline_cities() -> Entities:
    """Cities with country, continent and language, from `cities.csv` beside this file."""
    text = Path(__file__).with_name("cities.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    prefixes = {
        attribute: "".join(
            template.format(subject=city) + f" {known[attribute]}.\n"
            for city, known in _CITY_EXAMPLES.items()
        )
        for attribute, template in _CITY_TEMPLATES.items()
    }
    values = {a: {f" {row['city']}": row[a] for row in rows} for a in _CITY_TEMPLATES}
    return Entities(_CITY_TEMPLATES, prefixes, values)


def load_ravel(folder: str | Path, entity_type: str = "city") -> Entities:
    """RAVEL's public data (github.com/explanare/ravel, data.tgz), from a folder that you have unpacked.

    Read are `ravel_{entity_type}_entity_attributes.json` and `ravel_{entity_type}_attribute_to_prompts.json`,
    of each attribute the first prompt with one %s behind a space, and no examples in front.
    FileNotFoundError if one of them is missing. NotEvaluable if one of them is no JSON of RAVEL's form, or
    if no attribute has such a prompt.
    """
    start = Path(folder).expanduser() / f"ravel_{entity_type}_"
    files = [Path(f"{start}{name}.json") for name in ("entity_attributes", "attribute_to_prompts")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; expected the unpacked folder of RAVEL's data with {files[0].name} "
                f"and {files[1].name}."
            )
    attributes, prompts = _read(files[0], dict), _read(files[1], list)
    templates = {}
    for attribute, texts in prompts.items():
        once = [text for text in texts if _is_usable(text)]
        if once:
            # The space in front goes with the entity: it is part of its token.
            templates[attribute] = once[0].replace(" %s", "{subject}")
    if not templates:
        raise NotEvaluable(f"{files[1]} has no prompt with one %s behind a space.")
    values = {
        a: {f" {entity}": str(known[a]) for entity, known in attributes.items() if a in known}
        for a in templates
    }
    return Entities(templates, dict.fromkeys(templates, ""), values)


def _is_usable(prompt: object) -> bool:
    """Whether it is a text with one %s behind a space, and no brace, which marks a template's place."""
    is_text = isinstance(prompt, str)
    return is_text and prompt.count("%s") == 1 and " %s" in prompt and "{" not in prompt


def _read(file: Path, kind: type) -> dict[str, Any]:
    """A file's values by name, each of the kind given."""
    try:
        values = from_json(file.read_bytes())
    except ValueError as error:
        raise NotEvaluable(f"{file} is damaged ({error}). Unpack RAVEL's data again.") from error
    if not isinstance(values, dict) or not all(isinstance(one, kind) for one in values.values()):
        expected = {dict: "attributes by entity", list: "a list of prompts by attribute"}[kind]
        raise NotEvaluable(f"{file} does not hold {expected}. Unpack RAVEL's data again.")
    return values
