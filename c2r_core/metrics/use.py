"""Use: what is a latent worth to someone who steers or erases a concept with it?

The latent for a concept is picked on one half of the samples, as the one whose firing best detects the
concept there, and used on the other half:

- **erase**: in samples that hold the concept and that the model answers rightly, take the latent out of the
  activation, x − f w. How often is the right answer gone? Never where the latent is silent: its exceptions
  are the cost.
- **steer**: in samples of other concepts, move the activation along w, as far as twice the distance of the
  concept's mean activation from that of all others. How often does the answer become the concept?
- **what else breaks**: take the latent out of samples of other concepts; KL divergence of the answers, nats.

The SAE's reconstruction error stays in the activation. `measure_use_of_means` does the same with the
difference of the two means, a direction without an SAE: what the model lets anyone move at this place.

    task = letter_use_task(model, words)  # once per model and hook
    report, reference = measure_use(sae, task), measure_use_of_means(task)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from c2r_core.data.forward import Precision, answer_log_probs, make_prompts
from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.saes.interface import AnySAE, finite_feature_acts
from c2r_core.seeds import mix_seeds

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

N_SAMPLES = 20
STEERING_SCALE = 2.0

Respond = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class UseTask:
    """Samples of concepts, and a model that answers which concept a sample holds.

    Attributes
    ----------
    names : tuple of str
        The concepts.
    activations : Tensor, shape (n, d_in)
        Raw, where the SAE reads.
    concepts : Tensor of int, shape (n,)
        The one concept that each sample holds.
    for_picking : Tensor of bool, shape (n,)
        The half on which latents are picked; they are used on the other.
    respond : callable
        `respond(rows, replacements)`: the model's log-probabilities (len(rows), n_concepts + 1) of each
        concept's answer and of all other answers together, for samples `rows`, with their
        activations replaced by `replacements` (len(rows), d_in), or untouched where that is None.
    """

    names: tuple[str, ...]
    activations: Tensor
    concepts: Tensor
    for_picking: Tensor
    respond: Respond

    @cached_property
    def before(self) -> Tensor:
        """Answers to the untouched samples of the using half, (n, n_concepts + 1); else NaN."""
        using = (~self.for_picking).nonzero()[:, 0]
        answers = self.respond(using, None)
        before = torch.full((len(self.concepts), answers.shape[1]), torch.nan)
        before[using] = answers
        return before

    def is_right(self) -> Tensor:
        """Samples of the using half whose likeliest concept is the one that they hold."""
        return (self.before[:, :-1].argmax(1) == self.concepts) & ~self.for_picking

    def means(self, concept: int) -> tuple[Tensor, Tensor]:
        """Mean activation of the picking half's samples with and without the concept."""
        holds = self.concepts == concept
        with_it = self.activations[self.for_picking & holds].mean(0)
        return with_it, self.activations[self.for_picking & ~holds].mean(0)


@dataclass(frozen=True)
class ConceptUse:
    """One concept; None stands for what could not be measured.

    Attributes
    ----------
    concept : str
    n_picking : int
        Samples of the picking half that hold it.
    n_right : int
        Samples of the using half that hold it and that the model answers rightly.
    latent : int
        The one that was picked; None also for the means.
    picking_f1, using_f1 : float in [0, 1]
        Of (latent > 0) as a detector of the concept, on either half; None also for the means.
    erased : float in [0, 1]
        Share of the samples whose right answer is gone without the latent.
    steered : float in [0, 1]
        Share of samples of other concepts whose answer becomes this one.
    collateral : float
        KL(answers ‖ answers without the latent) on samples of other concepts, nats.
    not_evaluable : str
        The reason, if there is no score; else None.
    """

    concept: str
    n_picking: int
    n_right: int
    latent: int | None = None
    picking_f1: float | None = None
    using_f1: float | None = None
    erased: float | None = None
    steered: float | None = None
    collateral: float | None = None
    not_evaluable: str | None = None


@dataclass(frozen=True)
class UseReport:
    """Use of one SAE's latents. Means are over the evaluated concepts, None without one.

    Attributes
    ----------
    n_samples : int
        Samples erased, steered, and watched for what else breaks, for each concept.
    steering_scale : float
        How far samples are moved, in distances between the two means.
    concepts : tuple of ConceptUse
    n_evaluated : int
    """

    n_samples: int
    steering_scale: float
    concepts: tuple[ConceptUse, ...]
    n_evaluated: int
    mean_picking_f1: float | None
    mean_using_f1: float | None
    mean_erased: float | None
    mean_steered: float | None
    mean_collateral: float | None


@torch.no_grad()
def measure_use(
    sae: AnySAE,
    task: UseTask,
    *,
    n_samples: int = N_SAMPLES,
    steering_scale: float = STEERING_SCALE,
    seed: int = 0,
    chunk_size: int = 512,
) -> UseReport:
    """Erase and steer every concept with the one latent that was picked for it.

    Which samples are used depends on the task and the seed only, so that every SAE is measured on the same.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes raw activations; rows of W_dec may have any norm.
    task : UseTask
    n_samples : int
        For each concept and each use. A concept is not evaluable if fewer samples of the picking half hold
        it, or fewer of the using half hold it and are answered rightly.
    steering_scale : float
        How far samples are moved, in distances between the two means: equally far for every SAE.
    seed : int
        Draws the samples.
    chunk_size : int
        Samples encoded at a time.

    Raises
    ------
    ValueError
        If widths do not fit, or the SAE gives NaN or infinite activations.
    """
    if sae.W_dec.ndim != 2 or sae.W_dec.shape[1] != task.activations.shape[1]:
        raise ValueError(
            f"The SAE's W_dec has shape {tuple(sae.W_dec.shape)}; expected (d_sae, "
            f"{task.activations.shape[1]}), the width of the task's activations."
        )
    firing = _Firing(sae, task.activations, chunk_size)

    def pick(concept: int) -> _Handle | None:
        holds = task.concepts == concept
        latent, f1 = firing.best_detector(holds, task.for_picking)
        if latent is None:
            return None
        using_f1 = firing.f1(latent, holds, ~task.for_picking)
        found = {"latent": latent, "picking_f1": f1, "using_f1": using_f1}
        return _Handle(firing.contribution(latent), firing.rows[latent], found)

    return _measure(task, pick, n_samples, steering_scale, seed)


@torch.no_grad()
def measure_use_of_means(
    task: UseTask,
    *,
    n_samples: int = N_SAMPLES,
    steering_scale: float = STEERING_SCALE,
    seed: int = 0,
) -> UseReport:
    """The reference without an SAE: each concept's difference of means on the picking half.

    Erasing takes out what a sample has along it beyond the mean of the samples without the concept.
    Parameters as in `measure_use`.
    """

    def pick(concept: int) -> _Handle:
        mean_with, mean_without = task.means(concept)
        direction = torch.nn.functional.normalize(mean_with - mean_without, dim=0)
        excess = (task.activations - mean_without) @ direction
        return _Handle(excess[:, None] * direction, direction, {})

    return _measure(task, pick, n_samples, steering_scale, seed)


class _Handle(NamedTuple):
    """What a concept is moved by: its part in every sample (n, d_in), a direction, and what to report."""

    part: Tensor
    direction: Tensor
    found: dict[str, float | int]


def _measure(
    task: UseTask,
    pick: Callable[[int], _Handle | None],
    n_samples: int,
    steering_scale: float,
    seed: int,
) -> UseReport:
    is_right = task.is_right()
    rows = []
    for c, name in enumerate(task.names):
        holds = task.concepts == c
        right = (holds & is_right).nonzero()[:, 0]
        row = ConceptUse(name, int((holds & task.for_picking).sum()), len(right))
        if min(row.n_picking, row.n_right) < n_samples:
            reason = (
                f"{row.n_picking} samples to pick on and {row.n_right} rightly answered ones to use; "
                f"{n_samples} are needed of each"
            )
            rows.append(replace(row, not_evaluable=reason))
            continue
        handle = pick(c)
        if handle is None:
            rows.append(replace(row, not_evaluable="no latent fires on any sample that holds it"))
            continue
        generator = torch.Generator().manual_seed(mix_seeds(seed, c))
        others = (~holds & ~task.for_picking).nonzero()[:, 0]
        held, others = (
            some[torch.randperm(len(some), generator=generator)[:n_samples]]
            for some in (right, others)
        )
        scores = {
            "erased": _erased(task, handle, c, held),
            "steered": _steered(task, handle, c, others, steering_scale),
            "collateral": _collateral(task, handle, others),
        }
        rows.append(replace(row, **handle.found, **scores))
    evaluated = [row for row in rows if row.not_evaluable is None]
    means = {}
    for name in ("picking_f1", "using_f1", "erased", "steered", "collateral"):
        values = [getattr(row, name) for row in evaluated if getattr(row, name) is not None]
        means[f"mean_{name}"] = fmean(values) if values else None
    return UseReport(n_samples, steering_scale, tuple(rows), len(evaluated), **means)


def _erased(task: UseTask, handle: _Handle, concept: int, held: Tensor) -> float:
    hit = held[_is_touched(handle, held)]
    if not len(hit):
        return 0.0
    answers = task.respond(hit, task.activations[hit] - handle.part[hit])
    return float((answers[:, :-1].argmax(1) != concept).sum()) / len(held)


def _steered(task: UseTask, handle: _Handle, concept: int, others: Tensor, scale: float) -> float:
    mean_with, mean_without = task.means(concept)
    direction = torch.nn.functional.normalize(handle.direction, dim=0)
    shift = scale * (mean_with - mean_without).norm() * direction
    answers = task.respond(others, task.activations[others] + shift)
    return float((answers[:, :-1].argmax(1) == concept).double().mean())


def _collateral(task: UseTask, handle: _Handle, others: Tensor) -> float:
    hit = others[_is_touched(handle, others)]
    if not len(hit):
        return 0.0
    before = task.before[hit].double()
    after = task.respond(hit, task.activations[hit] - handle.part[hit]).double()
    return float((before.exp() * (before - after)).sum()) / len(others)


def _is_touched(handle: _Handle, rows: Tensor) -> Tensor:
    """Samples in which the concept's handle is there at all; the others would answer as before."""
    return handle.part[rows].any(1)


class _Firing:
    """Which latents fire where, and what they write."""

    def __init__(self, sae: AnySAE, activations: Tensor, chunk_size: int) -> None:
        from scipy.sparse import csc_array, vstack

        self.rows = sae.W_dec.detach().float().cpu()
        chunks = []
        for x in activations.split(chunk_size):
            chunks.append(csc_array(finite_feature_acts(sae, x).numpy()))
        self._acts = vstack(chunks, format="csc")
        self._fires = (self._acts > 0).astype("float64")

    def best_detector(self, holds: Tensor, among: Tensor) -> tuple[int | None, float]:
        """The latent of largest F1 as a detector (ties: the lowest number), and that F1."""
        among = among.numpy()
        fires, holds = self._fires.T[:, among], holds.numpy()[among].astype("float64")
        both = fires @ holds
        f1 = 2 * both / (fires.sum(1) + holds.sum())
        best = int(f1.argmax())
        return (best, float(f1[best])) if f1[best] > 0 else (None, 0.0)

    def f1(self, latent: int, holds: Tensor, among: Tensor) -> float:
        fires = torch.from_numpy(self._fires[:, [latent]].toarray()[:, 0] > 0)
        both = int((fires & holds & among).sum())
        total = int((fires & among).sum() + (holds & among).sum())
        return 2 * both / total if total else 0.0

    def contribution(self, latent: int) -> Tensor:
        """f w on every sample, (n, d_in)."""
        acts = torch.from_numpy(self._acts[:, [latent]].toarray())
        return acts * self.rows[latent]


# -- a task that is at hand --------------------------------------------------------------------


def letter_use_task(
    model: TransformerBridge,
    task: FirstLetterTask,
    *,
    precision: Precision = "float32",
    per_letter: int = 60,
    for_picking: Tensor | None = None,
    seed: int = 0,
) -> UseTask:
    """First letters: the model is asked to complete "{word} has the first letter:".

    The answer is a letter's token with a leading space, as in the examples of the prompt. No word is both
    picked on and used.

    Parameters
    ----------
    model : TransformerBridge
    task : FirstLetterTask
        Words, their activations, and the examples in front of them.
    precision : "float32" or "bfloat16"
        Of the model's matrix products.
    per_letter : int
        Words of a letter that the using half keeps at most, the most frequent; the model answers them all.
    for_picking : Tensor of bool, shape (n_words,), optional
        Which of the task's words latents are picked on; by default a random half.
    seed : int
        Of that half.

    Raises
    ------
    ValueError
        If the tokenizer has no single token for a letter, or the words do not keep their tokens.
    """
    tokenizer = model.tokenizer
    ids = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in LETTERS]
    long = [letter for letter, tokens in zip(LETTERS, ids, strict=True) if len(tokens) != 1]
    if long:
        raise ValueError(
            f"The letters {', '.join(long)} behind a space are several tokens each in this tokenizer, "
            "so there is no one answer to look for."
        )
    answers = torch.tensor(ids)[:, 0]
    prompts, kept = make_prompts(
        tokenizer, task.prefix, task.words, "{subject} has the first letter:"
    )
    if for_picking is None:
        for_picking = random_half(len(task.words), seed)
    kept = torch.tensor(kept)
    letters, for_picking = task.letters[kept], for_picking[kept]
    rank = torch.zeros(len(kept), dtype=torch.long)
    for letter in range(len(LETTERS)):
        rows = ((letters == letter) & ~for_picking).nonzero()[:, 0]
        rank[rows] = torch.arange(len(rows))
    wanted = (for_picking | (rank < per_letter)).nonzero()[:, 0]
    prompts = prompts.chosen(wanted)

    def respond(rows: Tensor, replacements: Tensor | None) -> Tensor:
        log_probs = answer_log_probs(
            model, prompts.chosen(rows), task.hook_name, replacements, precision=precision
        )
        letters = log_probs[:, answers]
        rest = torch.log1p(-letters.double().exp().sum(1).clamp(max=1 - 1e-9)).float()
        return torch.cat([letters, rest[:, None]], dim=1)

    return UseTask(
        names=tuple(LETTERS),
        activations=task.activations[kept[wanted]],
        concepts=letters[wanted],
        for_picking=for_picking[wanted],
        respond=respond,
    )


def random_half(n: int, seed: int) -> Tensor:
    """A mask (n,) that is true for n // 2 entries, drawn with this seed."""
    half = torch.zeros(n, dtype=torch.bool)
    half[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]] = True
    return half
