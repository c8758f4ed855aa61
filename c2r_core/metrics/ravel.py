"""RAVEL: can one attribute of an entity be swapped without the others?

At an entity's token, an attribute's latents are given the values that they have for another entity. *Cause*:
does the model then answer that entity's attribute? *Isolation*: do its answers on the other attributes stay?
Disentanglement is the mean of the two (arXiv 2402.17700, SAEBench 0.6.0). Doing nothing scores 0 and 1, so
½ is no achievement; swapping the whole activation, reported beside, shows how much there is to cause.
Both are counted on pairs of entities that differ in the attribute and in what is asked, so that an answer
cannot stay by being the same.

Latents are chosen on other entities than those that are swapped, by how much their activations differ
between the attribute's values; how many, 1 to 64, also there. SAEBench learns a mask (MDBM); ours is simpler,
so the numbers are not to be compared with published ones.

    task = entity_task(model, offline_cities(), hook_name)  # or load_ravel(folder)
    report = measure_ravel(sae, task)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from c2r_core.data.forward import (
    Precision,
    Prompts,
    activations_at,
    answer_log_probs,
    make_prompts,
)
from c2r_core.saes.interface import AnySAE, finite_feature_acts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

N_LATENTS = (1, 4, 16, 64)
N_PAIRS = 30
MIN_KNOWN = 20
"""Entities whose attribute the model tells, or the attribute is not evaluable."""


# -- entities ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entities:
    """What is asked, of whom, and what is true.

    Attributes
    ----------
    templates : mapping from an attribute to a text with {subject} in it
        What the model completes with the attribute's value.
    prefixes : mapping from an attribute to a text
        Examples in front of it.
    values : mapping from an attribute to a mapping from entity to value
    """

    templates: Mapping[str, str]
    prefixes: Mapping[str, str]
    values: Mapping[str, Mapping[str, str]]


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
    file = Path(__file__).with_name("cities.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
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

    Raises
    ------
    FileNotFoundError
        If one of them is missing.
    ValueError
        If no attribute has such a prompt.
    """
    folder = Path(folder).expanduser()
    names = ("entity_attributes", "attribute_to_prompts")
    files = [folder / f"ravel_{entity_type}_{name}.json" for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; expected the unpacked folder of RAVEL's data with {files[0].name} "
                f"and {files[1].name}."
            )
    attributes, prompts = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    templates = {}
    for attribute, texts in prompts.items():
        once = [t for t in texts if t.count("%s") == 1 and " %s" in t and "{" not in t]
        if once:
            # The space in front goes with the entity: it is part of its token.
            templates[attribute] = once[0].replace(" %s", "{subject}")
    if not templates:
        raise ValueError(f"{files[1]} has no prompt with one %s behind a space.")
    values = {
        a: {f" {entity}": str(known[a]) for entity, known in attributes.items() if a in known}
        for a in templates
    }
    return Entities(templates, dict.fromkeys(templates, ""), values)


# -- what a model knows of them ----------------------------------------------------------------


class Asked(NamedTuple):
    """One attribute, asked of all entities.

    Attributes
    ----------
    activations : Tensor, shape (n_entities, d_in)
        At the entity's last token in this attribute's prompt.
    value : Tensor of int, shape (n_entities,)
        Which of the attribute's answers is right.
    known : Tensor of bool, shape (n_entities,)
        Whether the model's likeliest answer is the right one.
    respond : callable
        `respond(rows, replacements)`: log-probabilities of the attribute's answers, (len(rows),
        n_answers).
    """

    activations: Tensor
    value: Tensor
    known: Tensor
    respond: Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class EntityTask:
    """Entities, and the attributes of which the model tells enough.

    Attributes
    ----------
    entities : tuple of str
    asked : mapping from an attribute to Asked
    not_evaluable : mapping from an attribute to the reason why it is left out
    """

    entities: tuple[str, ...]
    asked: Mapping[str, Asked]
    not_evaluable: Mapping[str, str]


def entity_task(
    model: TransformerBridge,
    entities: Entities,
    hook_name: str,
    *,
    precision: Precision = "float32",
) -> EntityTask:
    """Ask a model every attribute of every entity.

    Answers are judged among the attribute's values, by their first token; a value that shares it with
    another counts as not known.

    Raises
    ------
    ValueError
        If fewer than two attributes have 20 entities that the model tells.
    """
    subjects = sorted(set.intersection(*(set(known) for known in entities.values.values())))
    prompts, kept = {}, set(range(len(subjects)))
    for attribute, template in entities.templates.items():
        made, own = make_prompts(model.tokenizer, entities.prefixes[attribute], subjects, template)
        prompts[attribute] = (made, own)
        kept &= set(own)
    if not kept:
        raise ValueError(
            f"None of the {len(subjects)} entities ends where a token ends in all of the prompts."
        )
    order = sorted(kept)
    asked, reasons = {}, {}
    for attribute, (made, own) in prompts.items():
        aligned = made.chosen(torch.tensor([own.index(i) for i in order], dtype=torch.long))
        values = [entities.values[attribute][subjects[i]] for i in order]
        one = _ask(model, aligned, values, hook_name, precision)
        n_known = int(one.known.sum())
        if n_known < MIN_KNOWN:
            reasons[attribute] = (
                f"the model tells the {attribute} of {n_known} of {len(order)} entities; {MIN_KNOWN} are "
                "needed"
            )
        else:
            asked[attribute] = one
    if len(asked) < 2:
        raise ValueError(
            f"{len(asked)} attributes can be asked, and two are needed: {'; '.join(reasons.values())}."
        )
    return EntityTask(tuple(subjects[i] for i in order), asked, reasons)


def _ask(
    model: TransformerBridge,
    prompts: Prompts,
    values: list[str],
    hook_name: str,
    precision: Precision,
) -> Asked:
    answers = sorted(set(values))
    ids = [model.tokenizer(f" {a}", add_special_tokens=False)["input_ids"][0] for a in answers]
    tokens = torch.tensor(ids)
    is_unique = torch.tensor([ids.count(token) == 1 for token in ids])
    value = torch.tensor([answers.index(v) for v in values])

    def respond(rows: Tensor, replacements: Tensor | None) -> Tensor:
        log_probs = answer_log_probs(
            model, prompts.chosen(rows), hook_name, replacements, precision=precision
        )
        return log_probs[:, tokens]

    said = respond(torch.arange(len(values)), None).argmax(1)
    activations = activations_at(model, prompts, hook_name, precision=precision)
    return Asked(activations, value, (said == value) & is_unique[value], respond)


# -- the swap ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttributeSwap:
    """One attribute, on entities on which nothing was chosen.

    Attributes
    ----------
    attribute : str
    n_known : int
        Entities of which the model tells it.
    n_latents : int
        How many were swapped; chosen on other entities.
    cause, isolation, disentanglement : float in [0, 1]
    whole_cause, whole_isolation : float in [0, 1]
        With the whole activation swapped.
    """

    attribute: str
    n_known: int
    n_latents: int
    cause: float
    isolation: float
    disentanglement: float
    whole_cause: float
    whole_isolation: float


@dataclass(frozen=True)
class RavelReport:
    """Means over the attributes; `not_evaluable` names the attributes left out, with reasons."""

    attributes: tuple[AttributeSwap, ...]
    not_evaluable: dict[str, str]
    mean_cause: float
    mean_isolation: float
    mean_disentanglement: float
    mean_whole_cause: float
    mean_whole_isolation: float


class _Scores(NamedTuple):
    cause: float
    isolation: float

    @property
    def disentanglement(self) -> float:
        return (self.cause + self.isolation) / 2


@torch.no_grad()
def measure_ravel(
    sae: AnySAE, task: EntityTask, *, n_pairs: int = N_PAIRS, seed: int = 0
) -> RavelReport:
    """Swap every attribute's latents between entities that differ in it.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes raw activations; rows of W_dec may have any norm.
    task : EntityTask
    n_pairs : int
        Pairs (base, source) for each attribute and question, drawn anew for choosing and for scoring.
    seed : int
        Of the halves of the entities and of the pairs.

    Raises
    ------
    ValueError
        If the SAE is made for another width, or gives NaN or infinite activations.
    """
    d_in = next(iter(task.asked.values())).activations.shape[1]
    if sae.W_dec.ndim != 2 or sae.W_dec.shape[1] != d_in:
        raise ValueError(
            f"The SAE's W_dec has shape {tuple(sae.W_dec.shape)}; expected (d_sae, {d_in}), the width of "
            "the entities' activations."
        )
    acts = {name: finite_feature_acts(sae, asked.activations) for name, asked in task.asked.items()}
    rows = sae.W_dec.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    half = torch.randperm(len(task.entities), generator=generator) < len(task.entities) // 2
    found = []
    for name, asked in task.asked.items():
        order = _by_difference(acts[name] * rows.norm(dim=1), asked, half)

        def partly(question: str, base: Tensor, source: Tensor, latents: Tensor) -> Tensor:
            change = acts[question][source][:, latents] - acts[question][base][:, latents]
            return task.asked[question].activations[base] + change @ rows[latents]

        def whole(question: str, base: Tensor, source: Tensor, latents: None) -> Tensor:
            return task.asked[question].activations[source]

        chosen, _ = max(
            ((n, _swap(task, name, half, partly, order[:n], n_pairs, seed)) for n in N_LATENTS),
            key=lambda pair: pair[1].disentanglement,
        )
        scores = _swap(task, name, ~half, partly, order[:chosen], n_pairs, seed + 1)
        limit = _swap(task, name, ~half, whole, None, n_pairs, seed + 1)
        n_known = int(asked.known.sum())
        found.append(
            AttributeSwap(
                name, n_known, len(order[:chosen]), *scores, scores.disentanglement, *limit
            )
        )
    means = {
        f"mean_{score}": fmean(getattr(row, score) for row in found)
        for score in ("cause", "isolation", "disentanglement", "whole_cause", "whole_isolation")
    }
    return RavelReport(tuple(found), dict(task.not_evaluable), **means)


def _by_difference(acts: Tensor, asked: Asked, among: Tensor) -> Tensor:
    """Latents by the variance of their activations between the attribute's values, largest first."""
    rows = among & asked.known
    x, value = acts[rows].double(), asked.value[rows]
    spread = torch.zeros(acts.shape[1], dtype=torch.float64)
    for v in value.unique():
        own = x[value == v]
        spread += len(own) * (own.mean(0) - x.mean(0)).square()
    return spread.argsort(descending=True, stable=True)


def _swap(
    task: EntityTask,
    attribute: str,
    among: Tensor,
    edit: Callable[..., Tensor],
    latents: Tensor | None,
    n_pairs: int,
    seed: int,
) -> _Scores:
    """Cause and isolation on pairs of these entities; the pairs depend on the task and the seed only."""

    def pairs(question: str) -> tuple[Tensor, Tensor]:
        """Pairs that differ in the attribute and in what is asked, and whose base is known."""
        own, other = task.asked[attribute], task.asked[question]
        sources = (among & own.known).nonzero()[:, 0]
        bases = (among & other.known).nonzero()[:, 0]
        grid = torch.cartesian_prod(bases, sources)
        base, source = grid.T
        differs = (own.value[base] != own.value[source]) & (
            other.value[base] != other.value[source]
        )
        grid = grid[differs]
        generator = torch.Generator().manual_seed(seed)
        drawn = grid[torch.randperm(len(grid), generator=generator)[:n_pairs]]
        return drawn[:, 0], drawn[:, 1]

    def answers(question: str) -> tuple[Tensor, Tensor, Tensor]:
        base, source = pairs(question)
        asked = task.asked[question]
        if not len(base):
            raise ValueError(
                f"No two of the entities that the model knows differ in {attribute!r} and {question!r}."
            )
        said = asked.respond(base, edit(question, base, source, latents)).argmax(1)
        return said, asked.value[base], asked.value[source]

    said, _, wanted = answers(attribute)
    cause = float((said == wanted).double().mean())
    kept = []
    for question in task.asked:
        if question != attribute:
            said, before, _ = answers(question)
            kept.append(float((said == before).double().mean()))
    return _Scores(cause, fmean(kept))
