"""AutoInterp: can a language model say in a line what a latent fires on, and predict from it where it does?

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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from c2r_core.errors import NotEvaluable
from c2r_core.metrics import Headline, metric
from c2r_core.metrics.endpoint import KEY_VARIABLE, Endpoint
from c2r_core.metrics.firings import Firings, drawn_latents, firings_of
from c2r_core.metrics.rows import mean_of, none_of, sd_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from c2r_core.metrics.inputs import Inputs

N_TOP, N_WEIGHTED = 10, 5
"""Excerpts to explain."""
JUDGE_TOP, JUDGE_WEIGHTED, JUDGE_RANDOM = 2, 2, 10
"""Excerpts to judge."""

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
    """One latent; score and explanation are null, with the reason, where it could not be evaluated."""

    latent: int
    explanation: str | None = None
    score: float | None = None
    """Share of excerpts judged rightly."""
    not_evaluable: str | None = None


@dataclass(frozen=True)
class AutoInterp:
    """A language model explains latents, and predicts from the explanation where they fire."""

    autointerp_score: float
    """Mean share of excerpts judged rightly; saying "none" gets about 0.71."""
    autointerp_std_dev: float | None
    """Over latents; null with a single one."""
    num_latents: int
    """With a score."""
    model: str
    """Explainer and judge."""
    latents: tuple[InterpretedLatent, ...]


@metric(
    "autointerp",
    group="autointerp",
    headline={"autointerp_score": Headline("higher", 0.71)},
    needs="endpoint",
)
def measure(inputs: Inputs) -> AutoInterp:
    """Two questions a latent to the endpoint; what it has answered before is not asked again."""
    if inputs.endpoint is None:
        raise NotEvaluable(
            "No endpoint is named: give --endpoint URL and --endpoint-model NAME, of any server that "
            f"speaks OpenAI's chat completions; its key, if it wants one, in {KEY_VARIABLE}."
        )
    return measure_auto_interp(
        firings_of(inputs),
        inputs.language_model.tokenizer,
        inputs.endpoint,
        n_latents=inputs.sizes.autointerp_latents,
        seed=inputs.seed,
    )


def measure_auto_interp(
    firings: Firings,
    tokenizer: PreTrainedTokenizerBase,
    endpoint: Endpoint,
    *,
    n_latents: int = 100,
    seed: int = 0,
) -> AutoInterp:
    """Explain and judge latents that fire often enough, two requests each; the seed draws latents and
    excerpts.

    Raises NotEvaluable if no latent fires often enough or none gets a score; as EndpointError, if the
    endpoint cannot be used. What it has answered is kept.
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
        return _interpret(latent, *excerpts, tokenizer, endpoint)

    with ThreadPoolExecutor(endpoint.parallel) as workers:
        tasks = [workers.submit(interpret, int(latent)) for latent in drawn]
        try:
            rows = tuple(task.result() for task in tasks)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    known = [row for row in rows if row.score is not None]
    if not known:
        raise none_of("latents", rows)
    return AutoInterp(
        autointerp_score=mean_of(known, "score"),
        autointerp_std_dev=sd_of(known, "score"),
        num_latents=len(known),
        model=endpoint.model,
        latents=rows,
    )


class _Excerpt(NamedTuple):
    """Token ids, and which of them fire."""

    tokens: np.ndarray
    fires: np.ndarray


def _choose(
    firings: Firings, latent: int, generator: np.random.Generator
) -> tuple[list[_Excerpt], list[_Excerpt]] | None:
    """Excerpts to explain and to judge, without overlap; None if there are too few."""
    acts, tokens = firings.of(latent), firings.contexts.ravel()
    taken = np.zeros(acts.size, dtype=bool)
    firing = np.flatnonzero(acts > 0)
    hardest = firing[np.argsort(-acts[firing], kind="stable")]
    # Drawn without replacement, each with a chance in proportion to its strength (Efraimidis & Spirakis).
    waiting = -np.log(generator.random(len(firing))) / acts[firing]
    by_chance = firing[np.argsort(waiting, kind="stable")]
    kinds = []
    for places, n in (
        (hardest, N_TOP + JUDGE_TOP),
        (by_chance, N_WEIGHTED + JUDGE_WEIGHTED),
        (generator.permutation(firings.place), JUDGE_RANDOM),
    ):
        windows = [window for _, window in firings.windows(places, n, taken)]
        if len(windows) < n:
            return None
        kinds.append([_Excerpt(tokens[window], acts[window] > 0) for window in windows])
    top, weighted, anywhere = kinds
    top = [top[i] for i in generator.permutation(len(top))]
    to_judge = top[N_TOP:] + weighted[N_WEIGHTED:] + anywhere
    to_judge = [to_judge[i] for i in generator.permutation(len(to_judge))]
    return top[:N_TOP] + weighted[:N_WEIGHTED], to_judge


def _interpret(
    latent: int,
    to_explain: list[_Excerpt],
    to_judge: list[_Excerpt],
    tokenizer: PreTrainedTokenizerBase,
    endpoint: Endpoint,
) -> InterpretedLatent:
    def shown(excerpts: list[_Excerpt], marked: bool) -> str:
        lines = []
        for i, one in enumerate(excerpts, 1):
            words = [tokenizer.decode([int(token)]) for token in one.tokens]
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
