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

The samples are words of the first-letter task, those that assignment consistency does *not* score (`is_test`
is false in its split): no word is both scored there and picked on, erased or steered here. What links the two
measures is that the probe, from which assignment has a letter's direction, was fitted on these words.
First-letter absorption scores every word in one of its splits.

    task = letter_use_task(model, words)  # once per model and hook
    found, reference = measure_use(sae, task), measure_use_of_means(task)
    print(*use_examples(sae, task, n=3), sep="\\n")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.metrics import Headline, metric
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.metrics.rows import mean_of, none_of
from c2r_core.metrics.use_task import PER_LETTER, UseTask, letters_to_use
from c2r_core.saes.interface import AnySAE
from c2r_core.seeds import mix_seeds

if TYPE_CHECKING:
    from c2r_core.metrics.inputs import Inputs

N_SAMPLES = 20
STEERING_SCALE = 2.0


# -- the report --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConceptUse:
    """One concept; null stands for what could not be measured."""

    concept: str
    n_picking: int
    """Samples of the picking half that hold it."""
    n_right: int
    """Samples of the using half that hold it and that the model answers rightly."""
    latent: int | None = None
    """The one that was picked; null also for the means."""
    picking_f1: float | None = None
    """Of (latent > 0) as a detector of the concept, on the picking half."""
    using_f1: float | None = None
    """The same on the using half."""
    erased: float | None = None
    """Share of the samples whose right answer is gone without the latent."""
    steered: float | None = None
    """Share of samples of other concepts whose answer becomes this one."""
    collateral: float | None = None
    """KL(answers ‖ answers without the latent) on samples of other concepts, nats."""
    not_evaluable: str | None = None
    """The reason, if there is no score."""


@dataclass(frozen=True)
class DirectionUse:
    """Use of one direction for each concept. Means are over the evaluated concepts, null without one."""

    n_evaluated: int
    mean_picking_f1: float | None
    mean_using_f1: float | None
    mean_erased: float | None
    mean_steered: float | None
    mean_collateral: float | None
    concepts: tuple[ConceptUse, ...]


@dataclass(frozen=True)
class Use:
    """First letters, erased and steered with one latent each, on words of the held-out documents that
    assignment consistency does not score."""

    sae: DirectionUse
    """Of the latent that was picked on the other half of the words."""
    difference_of_means: DirectionUse
    """Of a direction without an SAE, on the same words: the reference."""
    n_picking_words: int
    n_using_words: int
    most_using_words_of_a_letter: int
    """The using half keeps so many words of a letter at most, the most frequent."""
    n_samples: int
    """Words erased, steered, and watched for what else breaks, for each letter."""
    steering_scale: float
    """How far words are moved, in distances between the two means."""


@metric(
    "use",
    group="use",
    headline={
        "sae.mean_erased": Headline("higher", "difference_of_means.mean_erased"),
        "sae.mean_steered": Headline("higher", "difference_of_means.mean_steered"),
        "sae.mean_collateral": Headline("lower", "difference_of_means.mean_collateral"),
    },
)
def measure(inputs: Inputs) -> Use:
    """Pick each letter's latent on one half of the words, erase and steer with it on the other."""
    task = letters_to_use(inputs)
    found = measure_use(inputs.sae, task, seed=inputs.seed)
    if found.n_evaluated == 0:
        raise none_of("letters", found.concepts)
    return Use(
        sae=found,
        difference_of_means=_kept_use_of_means(inputs, task),
        n_picking_words=int(task.for_picking.sum()),
        n_using_words=int((~task.for_picking).sum()),
        most_using_words_of_a_letter=PER_LETTER,
        n_samples=N_SAMPLES,
        steering_scale=STEERING_SCALE,
    )


def _kept_use_of_means(inputs: Inputs, task: UseTask) -> DirectionUse:
    """`measure_use_of_means`, once for all SAEs."""

    def build(folder: Path) -> None:
        found = measure_use_of_means(task, seed=inputs.seed)
        (folder / "use.json").write_text(json.dumps(asdict(found)), encoding="utf-8")

    settings = {"words": inputs.lm.first_letter_words, "seed": inputs.seed}
    folder = inputs.kept("use_of_means", settings, build, code=[__name__])
    values = json.loads((folder / "use.json").read_text(encoding="utf-8"))
    rows = values.pop("concepts")
    return DirectionUse(**values, concepts=tuple(ConceptUse(**row) for row in rows))


# -- directions, and what they are worth -------------------------------------------------------


class Direction(NamedTuple):
    """What a concept is moved by."""

    part: Tensor
    """What of each sample is taken out to erase the concept, (n, d_in)."""
    along: Tensor
    """Where samples are moved to steer, (d_in,)."""
    found: dict[str, float | int]
    """What to report of it: fields of `ConceptUse`."""


Pick = Callable[[int], Direction | None]
"""The direction for a concept (its number); None if there is none."""
Key = tuple[int, str]
"""A concept's number, and what is done to it."""


def measure_use(
    sae: AnySAE,
    task: UseTask,
    *,
    n_samples: int = N_SAMPLES,
    steering_scale: float = STEERING_SCALE,
    seed: int = 0,
) -> DirectionUse:
    """Erase and steer every concept with the one latent that was picked for it.

    The SAE takes raw activations; rows of W_dec may have any norm. `n_samples` are used for each concept and
    each use: a concept is not evaluable if fewer samples of the picking half hold it, or fewer of the using
    half hold it and are answered rightly. Which ones depends on the task and the seed only, so that every SAE
    is measured on the same. Samples are moved by `steering_scale` distances between the two means: equally
    far for every SAE.

    Raises NotEvaluable if widths do not fit, or the SAE gives NaN or infinite activations.
    """
    return _measure(task, _picked_latents(sae, task), n_samples, steering_scale, seed)


def measure_use_of_means(
    task: UseTask,
    *,
    n_samples: int = N_SAMPLES,
    steering_scale: float = STEERING_SCALE,
    seed: int = 0,
) -> DirectionUse:
    """The reference without an SAE: each concept's difference of means on the picking half.

    Erasing takes out what a sample has along it beyond the mean of the samples without the concept.
    Parameters as in `measure_use`.
    """

    def pick(concept: int) -> Direction:
        mean_with, mean_without = task.means(concept)
        along = torch.nn.functional.normalize(mean_with - mean_without, dim=0)
        excess = (task.activations - mean_without) @ along
        return Direction(excess[:, None] * along, along, {})

    return _measure(task, pick, n_samples, steering_scale, seed)


def _picked_latents(sae: AnySAE, task: UseTask) -> Pick:
    """Each concept's latent: that of largest F1 as a detector on the picking half (ties: lowest number)."""
    acts = encode_sparse(sae, task.activations).tocsc()
    rows = sae.W_dec.detach().float().cpu()
    is_picking = task.for_picking.numpy()
    fires = (acts > 0).astype("float64").T.tocsr()
    sides = [(side, fires[:, side]) for side in (is_picking, ~is_picking)]

    def pick(concept: int) -> Direction | None:
        holds = (task.concepts == concept).numpy()
        picking_f1, using_f1 = (
            2 * (on @ holds[side]) / np.maximum(on.sum(1) + holds[side].sum(), 1)
            for side, on in sides
        )
        best = int(picking_f1.argmax())
        if picking_f1[best] == 0:
            return None
        f1 = {"picking_f1": float(picking_f1[best]), "using_f1": float(using_f1[best])}
        part = torch.from_numpy(acts[:, [best]].toarray()) * rows[best]
        return Direction(part, rows[best], {"latent": best} | f1)

    return pick


@torch.no_grad()
def _measure(
    task: UseTask, pick: Pick, n_samples: int, steering_scale: float, seed: int
) -> DirectionUse:
    is_right = task.is_right()
    rows, moved = [], {}
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
        direction = pick(c)
        if direction is None:
            rows.append(replace(row, not_evaluable="no latent fires on any sample that holds it"))
            continue
        generator = torch.Generator().manual_seed(mix_seeds(seed, c))
        others = (~holds & ~task.for_picking).nonzero()[:, 0]
        held, others = (
            some[torch.randperm(len(some), generator=generator)[:n_samples]]
            for some in (right, others)
        )
        moved[c, "erased"] = _erase(task, direction, held)
        moved[c, "steered"] = _steer(task, direction, c, others, steering_scale)
        moved[c, "collateral"] = _erase(task, direction, others)
        rows.append(replace(row, **direction.found))
    answers = _answers(task, moved)
    for c, row in enumerate(rows):
        if row.not_evaluable is None:
            before = task.before[moved[c, "collateral"].rows].double()
            kl = before.exp() * (before - answers[c, "collateral"].double())
            rows[c] = replace(
                row,
                erased=_share(answers[c, "erased"][:, :-1].argmax(1) != c),
                steered=_share(answers[c, "steered"][:, :-1].argmax(1) == c),
                collateral=float(kl.sum()) / len(before),
            )
    evaluated = [row for row in rows if row.not_evaluable is None]
    names = ("picking_f1", "using_f1", "erased", "steered", "collateral")
    means = {f"mean_{name}": mean_of(evaluated, name) for name in names}
    return DirectionUse(n_evaluated=len(evaluated), **means, concepts=tuple(rows))


def _share(is_so: Tensor) -> float:
    return float(is_so.double().mean())


class _Moved(NamedTuple):
    """Samples `rows` of the using half, (n,), and the activations that they are given, (n, d_in)."""

    rows: Tensor
    x: Tensor


def _erase(task: UseTask, direction: Direction, rows: Tensor) -> _Moved:
    """The concept taken out."""
    return _Moved(rows, task.activations[rows] - direction.part[rows])


def _steer(task: UseTask, direction: Direction, concept: int, rows: Tensor, scale: float) -> _Moved:
    """Moved along the direction, as far as the concept's mean is away."""
    mean_with, mean_without = task.means(concept)
    along = torch.nn.functional.normalize(direction.along, dim=0)
    shift = scale * (mean_with - mean_without).norm() * along
    return _Moved(rows, task.activations[rows] + shift)


def _answers(task: UseTask, moved: Mapping[Key, _Moved]) -> dict[Key, Tensor]:
    """Answers to all that is moved, asked together; to activations left as they are, those of before."""
    if not moved:
        return {}
    rows, x = (torch.cat(parts) for parts in zip(*moved.values(), strict=True))
    answers = task.before[rows].clone()
    touched = (x != task.activations[rows]).any(1)
    if touched.any():
        answers[touched] = task.respond(rows[touched], x[touched])
    parts = answers.split([len(one.rows) for one in moved.values()])
    return dict(zip(moved, parts, strict=True))


# -- as text -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class UseExample:
    """One sample that the model answers rightly, and what erasing and steering make of the answer."""

    sample: str
    before: str
    latent: int
    """The one picked for the concept that the sample holds."""
    fires: bool
    """Whether it does on this sample; if not, there is nothing to erase."""
    after_erasing: str
    steered_to: str
    """Another concept, whose latent is added."""
    after_steering: str

    def __str__(self) -> str:
        silent = "" if self.fires else " (silent here)"
        return (
            f"{self.sample} → {self.before}   without latent {self.latent}{silent}: "
            f"{self.after_erasing}   steered to {self.steered_to}: {self.after_steering}"
        )


@torch.no_grad()
def use_examples(
    sae: AnySAE,
    task: UseTask,
    n: int = 3,
    *,
    steering_scale: float = STEERING_SCALE,
    seed: int = 0,
) -> list[UseExample]:
    """Prompts, and the model's answers before, after erasing, and after steering.

    There are n samples at most, each of another concept, drawn with the seed among those that the model
    answers rightly. SAE, task, scale and errors are as in `measure_use`.
    """
    pick, is_right = _picked_latents(sae, task), task.is_right()
    generator = torch.Generator().manual_seed(seed)
    directions, rows = {}, {}
    for c in torch.randperm(len(task.names), generator=generator).tolist():
        right = (is_right & (task.concepts == c)).nonzero()[:, 0]
        direction = pick(c) if len(right) and len(rows) <= n else None
        if direction is not None:
            directions[c] = direction
            rows[c] = right[torch.randperm(len(right), generator=generator)[:1]]

    def said(answers: Tensor) -> str:
        best = int(answers[0].argmax())
        return task.names[best] if best < len(task.names) else "something else"

    concepts = list(rows)
    pairs = list(zip(concepts[:n], concepts[1:] + concepts[:1], strict=False))
    moved = {}
    for c, target in pairs:
        moved[c, "erased"] = _erase(task, directions[c], rows[c])
        moved[c, "steered"] = _steer(task, directions[target], target, rows[c], steering_scale)
    answers = _answers(task, moved)
    examples = []
    for c, target in pairs:
        row, own = rows[c], directions[c]
        examples.append(
            UseExample(
                sample=task.samples[int(row)],
                before=said(task.before[row]),
                latent=own.found["latent"],
                fires=bool(own.part[row].any()),
                after_erasing=said(answers[c, "erased"]),
                steered_to=task.names[target],
                after_steering=said(answers[c, "steered"]),
            )
        )
    return examples
