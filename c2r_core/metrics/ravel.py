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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from c2r_core.data.entities import Entities, load_ravel, offline_cities
from c2r_core.data.forward import Precision, Prompts, activations_at, answer_log_probs, make_prompts
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import Headline, metric
from c2r_core.metrics.encoding import encode
from c2r_core.saes.interface import AnySAE
from c2r_core.statistics import mean_interval

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from c2r_core.metrics.inputs import Inputs

N_LATENTS = (1, 4, 16, 64)
N_PAIRS = 30
MIN_KNOWN = 20
"""Entities whose attribute the model tells, or the attribute is not evaluable."""


@dataclass(frozen=True)
class AttributeSwap:
    """One attribute, on entities on which nothing was chosen; shares from 0 to 1."""

    attribute: str
    n_known: int
    """Entities of which the model tells it."""
    n_latents: int
    """How many were swapped; chosen on other entities."""
    cause: float
    isolation: float
    disentanglement: float
    whole_cause: float
    """With the whole activation swapped."""
    whole_isolation: float


@dataclass(frozen=True)
class Ravel:
    """Means over attributes. Doing nothing has a cause of 0 and an isolation of 1, so a disentanglement of ½.

    How much the measurement can show is what swapping the whole activation does: where that causes little
    there is nothing to find, and where its isolation is near 0, as in early blocks, the attributes are all
    there but mixed, so that low scores say as much of the hook as of the SAE. Attributes are few and each has
    30 pairs a question: differences below the interval's width are not resolved. Entities are not from the
    held-out documents; no SAE was trained on these prompts.
    """

    disentanglement_score: float
    disentanglement_low: float
    """Ends of a 95 % interval over the attributes."""
    disentanglement_high: float
    cause_score: float
    isolation_score: float
    whole_activation_cause_score: float
    """With the whole activation swapped: how much there is to cause."""
    whole_activation_isolation_score: float
    attributes: tuple[AttributeSwap, ...]
    attributes_not_evaluable: dict[str, str]
    """Attributes left out, with the reason."""


@metric("ravel", group="ravel", headline={"disentanglement_score": Headline("higher", 0.5)})
def measure(inputs: Inputs) -> Ravel:
    """RAVEL's own data where a folder is given, cities with three attributes otherwise."""
    try:
        entities = offline_cities() if inputs.ravel is None else load_ravel(inputs.ravel)
    except FileNotFoundError as error:
        raise NotEvaluable(str(error)) from error  # concerns this metric alone
    task = entity_task(
        inputs.language_model, entities, inputs.lm.hook_name, precision=inputs.precision
    )
    return measure_ravel(inputs.sae, task, seed=inputs.seed)


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

    Raises NotEvaluable if fewer than two attributes have 20 entities that the model tells.
    """
    subjects = sorted(set.intersection(*(set(known) for known in entities.values.values())))
    made = {
        attribute: make_prompts(model.tokenizer, entities.prefixes[attribute], subjects, template)
        for attribute, template in entities.templates.items()
    }
    order = sorted(set.intersection(*(set(kept) for _, kept in made.values())))
    if not order:
        raise NotEvaluable(
            f"None of the {len(subjects)} entities ends where a token ends in all of the prompts."
        )
    asked, reasons = {}, {}
    for attribute, (prompts, kept) in made.items():
        aligned = prompts.chosen(torch.tensor([kept.index(i) for i in order], dtype=torch.long))
        values = [entities.values[attribute][subjects[i]] for i in order]
        one = _ask(model, aligned, values, hook_name, precision)
        n_known = int(one.known.sum())
        if n_known >= MIN_KNOWN:
            asked[attribute] = one
        else:
            reasons[attribute] = (
                f"the model tells the {attribute} of {n_known} of {len(order)} entities; {MIN_KNOWN} are "
                "needed"
            )
    if len(asked) < 2:
        raise NotEvaluable(
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
    is_unique = torch.tensor([ids.count(token) == 1 for token in ids])
    value = torch.tensor([answers.index(v) for v in values])

    def respond(rows: Tensor, replacements: Tensor | None) -> Tensor:
        return answer_log_probs(
            model,
            prompts.chosen(rows),
            hook_name,
            replacements,
            answers=ids,
            precision=precision,
        )

    said = respond(torch.arange(len(values)), None).argmax(1)
    activations = activations_at(model, prompts, hook_name, precision=precision)
    return Asked(activations, value, (said == value) & is_unique[value], respond)


# -- the swap ----------------------------------------------------------------------------------

Edit = Callable[[str, Tensor, Tensor], Tensor]
"""New activations (n, d_in) for a question, bases and sources, both numbers of entities (n,)."""


@torch.no_grad()
def measure_ravel(sae: AnySAE, task: EntityTask, *, n_pairs: int = N_PAIRS, seed: int = 0) -> Ravel:
    """Swap every attribute's latents between entities that differ in it.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes raw activations; rows of W_dec may have any norm.
    n_pairs : int
        Pairs (base, source) for each attribute and question, drawn anew for choosing and for scoring.
    seed : int
        Of the halves of the entities and of the pairs.

    Raises NotEvaluable if the SAE is made for another width, or gives NaN or infinite activations; if two
    attributes always go together.
    """
    acts = {name: encode(sae, asked.activations) for name, asked in task.asked.items()}
    rows = sae.W_dec.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    half = torch.randperm(len(task.entities), generator=generator) < len(task.entities) // 2

    def only(latents: Tensor) -> Edit:
        def edit(question: str, base: Tensor, source: Tensor) -> Tensor:
            change = acts[question][source][:, latents] - acts[question][base][:, latents]
            return task.asked[question].activations[base] + change @ rows[latents]

        return edit

    def whole(question: str, base: Tensor, source: Tensor) -> Tensor:
        return task.asked[question].activations[source]

    found = []
    for name, asked in task.asked.items():
        order = _by_difference(acts[name] * rows.norm(dim=1), asked, half)
        latents = max(
            (order[:n] for n in N_LATENTS),
            key=lambda some: sum(_swap(task, name, half, only(some), n_pairs, seed)),
        )
        cause, isolation = _swap(task, name, ~half, only(latents), n_pairs, seed + 1)
        limit = _swap(task, name, ~half, whole, n_pairs, seed + 1)
        scores = (cause, isolation, (cause + isolation) / 2, *limit)
        found.append(AttributeSwap(name, int(asked.known.sum()), len(latents), *scores))
    interval = mean_interval([row.disentanglement for row in found])
    return Ravel(
        disentanglement_score=interval.mean,
        disentanglement_low=interval.low,
        disentanglement_high=interval.high,
        cause_score=fmean(row.cause for row in found),
        isolation_score=fmean(row.isolation for row in found),
        whole_activation_cause_score=fmean(row.whole_cause for row in found),
        whole_activation_isolation_score=fmean(row.whole_isolation for row in found),
        attributes=tuple(found),
        attributes_not_evaluable=dict(task.not_evaluable),
    )


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
    task: EntityTask, attribute: str, among: Tensor, edit: Edit, n_pairs: int, seed: int
) -> tuple[float, float]:
    """Cause and isolation on pairs of these entities; the pairs depend on the task and the seed only."""
    own = task.asked[attribute]

    def share(question: str, wants_source: bool) -> float:
        """How often the answer is the source's, or the base's."""
        other = task.asked[question]
        bases, sources = ((among & asked.known).nonzero()[:, 0] for asked in (other, own))
        pairs = torch.cartesian_prod(bases, sources)
        base, source = pairs.T
        differs = (own.value[base] != own.value[source]) & (
            other.value[base] != other.value[source]
        )
        pairs = pairs[differs]
        if not len(pairs):
            raise NotEvaluable(
                f"No two of the entities that the model knows differ in {attribute!r} and {question!r}."
            )
        generator = torch.Generator().manual_seed(seed)
        base, source = pairs[torch.randperm(len(pairs), generator=generator)[:n_pairs]].T
        said = other.respond(base, edit(question, base, source)).argmax(1)
        wanted = other.value[source if wants_source else base]
        return float((said == wanted).double().mean())

    others = [question for question in task.asked if question != attribute]
    return share(attribute, True), fmean(share(question, False) for question in others)
