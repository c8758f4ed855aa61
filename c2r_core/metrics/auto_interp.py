"""AutoInterp: can a language model say in a line what a latent fires on, and foretell from it where it does?

Numbers as in SAEBench 0.6.0 (after arXiv 2309.08600): an explainer sees 15 excerpts, ten of the strongest
and five drawn by strength, with the firing tokens marked, and writes one line. A judge sees that line and
14 other excerpts without marks, two of the strongest, two drawn by strength and ten at random, and says on
which the latent fires. The score is the share of the 14 that it gets right; one who always says "none" is
right about ten times in 14.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from c2r_core.metrics.endpoint import Endpoint
from c2r_core.metrics.firings import Firings, drawn_latents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_TOP, N_WEIGHTED = 10, 5
"""Excerpts to explain."""
JUDGE_TOP, JUDGE_WEIGHTED, JUDGE_RANDOM = 2, 2, 10
"""Excerpts to judge."""
TOKENS_AROUND = 10

EXPLAIN = (
    "One unit of a neural network fires on the tokens between « and » in the excerpts. Say in one short "
    "line what these tokens, or the texts in which they stand, have in common. Answer with that line only."
)
JUDGE = (
    "You are told what one unit of a neural network fires on, and given numbered excerpts. Answer with the "
    "numbers of the excerpts in which it fires, separated by commas, or with the word none. Nothing else."
)


@dataclass(frozen=True)
class InterpretedLatent:
    """One latent; score and explanation are None, with the reason, where it could not be evaluated."""

    latent: int
    explanation: str | None = None
    score: float | None = None
    not_evaluable: str | None = None


@dataclass(frozen=True)
class AutoInterpReport:
    """Scores of some latents; means are over those that could be evaluated.

    Attributes
    ----------
    model : str
        Explainer and judge.
    latents : tuple of InterpretedLatent
    n_evaluated : int
    mean_score, sd_score : float or None
    """

    model: str
    latents: tuple[InterpretedLatent, ...]
    n_evaluated: int
    mean_score: float | None
    sd_score: float | None


def measure_auto_interp(
    firings: Firings,
    tokenizer: PreTrainedTokenizerBase,
    endpoint: Endpoint,
    *,
    n_latents: int = 100,
    seed: int = 0,
) -> AutoInterpReport:
    """Explain and judge latents that fire often enough, two requests each.

    Parameters
    ----------
    firings : Firings
    tokenizer : PreTrainedTokenizerBase
        Of the language model whose latents these are.
    endpoint : Endpoint
    n_latents : int
    seed : int
        Draws latents and excerpts.

    Raises
    ------
    EndpointError
        If the endpoint cannot be used. What it has answered is kept.
    ValueError
        If no latent fires often enough.
    """
    needed = N_TOP + N_WEIGHTED + JUDGE_TOP + JUDGE_WEIGHTED
    drawn = drawn_latents(firings, n_latents, needed, seed)

    def interpret(latent: int) -> InterpretedLatent:
        excerpts = _choose(firings, latent, np.random.default_rng(firings.identity(latent, seed)))
        if excerpts is None:
            reason = (
                f"{needed} excerpts in which it fires and {JUDGE_RANDOM} others are needed, none "
                "overlapping; there are fewer"
            )
            return InterpretedLatent(latent, not_evaluable=reason)
        return _interpret(latent, *excerpts, firings, tokenizer, endpoint)

    with ThreadPoolExecutor(endpoint.parallel) as workers:
        tasks = [workers.submit(interpret, int(latent)) for latent in drawn]
        try:
            rows = tuple(task.result() for task in tasks)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    scores = [row.score for row in rows if row.score is not None]
    return AutoInterpReport(
        model=endpoint.model,
        latents=rows,
        n_evaluated=len(scores),
        mean_score=fmean(scores) if scores else None,
        sd_score=stdev(scores) if len(scores) > 1 else None,
    )


class _Excerpt(NamedTuple):
    """Tokens `start` to `stop` of `contexts.ravel()`, and which of them fire."""

    start: int
    stop: int
    fires: np.ndarray


def _choose(
    firings: Firings, latent: int, generator: np.random.Generator
) -> tuple[list[_Excerpt], list[_Excerpt]] | None:
    """Excerpts to explain and to judge, without overlap; None if there are too few."""
    acts = firings.of(latent)
    size = firings.contexts.shape[1]
    taken = np.zeros(acts.size, dtype=bool)

    def excerpt(place: int) -> _Excerpt | None:
        context = place // size * size
        start, stop = max(context, place - TOKENS_AROUND), place + TOKENS_AROUND + 1
        stop = min(context + size, stop)
        if taken[start:stop].any():
            return None
        taken[start:stop] = True
        return _Excerpt(start, stop, acts[start:stop] > 0)

    def collect(places: np.ndarray, n: int) -> list[_Excerpt]:
        found: list[_Excerpt] = []
        for place in places:
            if len(found) == n:
                break
            if (one := excerpt(int(place))) is not None:
                found.append(one)
        return found

    firing = np.flatnonzero(acts > 0)
    top = collect(firing[np.argsort(-acts[firing], kind="stable")], N_TOP + JUDGE_TOP)
    # Drawn without replacement, each with a chance in proportion to its strength (Efraimidis & Spirakis).
    waiting = -np.log(generator.random(len(firing))) / acts[firing]
    weighted = collect(firing[np.argsort(waiting, kind="stable")], N_WEIGHTED + JUDGE_WEIGHTED)
    anywhere = collect(generator.permutation(firings.place), JUDGE_RANDOM)
    wanted = (N_TOP + JUDGE_TOP, N_WEIGHTED + JUDGE_WEIGHTED, JUDGE_RANDOM)
    if any(len(some) < n for some, n in zip((top, weighted, anywhere), wanted, strict=True)):
        return None
    top = [top[i] for i in generator.permutation(len(top))]
    to_judge = top[N_TOP:] + weighted[N_WEIGHTED:] + anywhere
    to_judge = [to_judge[i] for i in generator.permutation(len(to_judge))]
    return top[:N_TOP] + weighted[:N_WEIGHTED], to_judge


def _interpret(
    latent: int,
    to_explain: list[_Excerpt],
    to_judge: list[_Excerpt],
    firings: Firings,
    tokenizer: PreTrainedTokenizerBase,
    endpoint: Endpoint,
) -> InterpretedLatent:
    tokens = firings.contexts.ravel()

    def shown(excerpts: list[_Excerpt], marked: bool) -> str:
        lines = []
        for i, one in enumerate(excerpts, 1):
            words = [tokenizer.decode([int(token)]) for token in tokens[one.start : one.stop]]
            if marked:
                words = [f"«{w}»" if on else w for w, on in zip(words, one.fires, strict=True)]
            lines.append(f"{i}. " + "".join(words).replace("\n", " "))
        return "\n".join(lines)

    explanation = endpoint.ask(EXPLAIN, shown(to_explain, marked=True)).strip().partition("\n")[0]
    if not explanation:
        return InterpretedLatent(latent, not_evaluable="the explanation is empty")
    question = f"It fires on: {explanation}\n\n{shown(to_judge, marked=False)}"
    answer = endpoint.ask(JUDGE, question)
    said = _numbers(answer, len(to_judge))
    if said is None:
        reason = f"the judge's answer is neither numbers nor none: {answer[:80]!r}"
        return InterpretedLatent(latent, explanation, not_evaluable=reason)
    right = [one.fires.any() == (i in said) for i, one in enumerate(to_judge, 1)]
    return InterpretedLatent(latent, explanation, score=float(np.mean(right)))


def _numbers(answer: str, n: int) -> set[int] | None:
    """The excerpts that the judge names; None if it says anything else than numbers or none."""
    said = answer.strip().rstrip(".").lower()
    if said == "none":
        return set()
    if not re.fullmatch(r"\d+(\s*(,|\band\b|,\s*and\b)\s*\d+)*", said):
        return None
    numbers = {int(number) for number in re.findall(r"\d+", said)}
    return numbers if numbers <= set(range(1, n + 1)) else None
