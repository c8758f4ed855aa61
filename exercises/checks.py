"""Checks of the exercises: what was given, what was expected, where to look.

A check takes what you wrote, tries it on small inputs, and prints that it passes or raises `CheckFailed`.
Read the message first; reading this file gives the answers away.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from checking import POWER, ROOT, TYPES, Check, close, kind_of, shown
from torch import Tensor
from torch.nn.functional import normalize

from c2r_core import (
    BatchTopKSAE,
    TrainConfig,
    c2r_loss,
    create_regulariser,
    nearest_neighbours,
    strength_from_weight,
    train,
    weight_from_strength,
)
from c2r_core.data.toy import FeatureTree
from c2r_core.training import REGULARISERS

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data"
"""Values computed with the published code of the paper."""

# Latents 0 and 1 are alike (cosine 0.8); the others are orthogonal to everything. The loss is 2.24.
EXAMPLE_ROWS = torch.tensor([[1.0, 0, 0, 0], [2.4, 1.8, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1.0]])
EXAMPLE_ACTS = torch.tensor([[3.0, 0, 1, 0], [4.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 1, 0]])
EXAMPLE = "rows (1,0,0,0) (2.4,1.8,0,0) (0,0,2,0) (0,0,0,1), whose latents have norms 5, 2, √2, 0"


def golden(name: str) -> dict[str, Tensor]:
    """Stored inputs, losses and gradients of the published code."""
    with np.load(GOLDEN / f"c2r_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


# -- 1: write the loss ----------------------------------------------------------------------------


def check_1a(nearest_rows: Callable[[Tensor], Tensor]) -> None:
    """The index of every row's nearest other row."""
    check = Check("1a")
    shape = "the product: unit @ unit.T compares rows, unit.T @ unit columns. Then argmax(dim=1)."
    cases = [
        (
            [[1, 0], [0.8, 0.6], [0, 1]],
            [1, 0, 1],
            "the diagonal: every row is most similar to itself. Fill it with −∞ before you take argmax.",
        ),
        (
            [[1, 0], [0.8, 0.6], [0, 5]],
            [1, 0, 1],
            "the row lengths: a cosine needs rows of norm 1, and the last row has norm 5.",
        ),
        (
            [[1, 0], [-1, 0], [0.1, 1]],
            [2, 2, 0],
            "the sign: rows 0 and 1 are opposite. Take the largest cosine, not the largest |cosine|.",
        ),
    ]
    for rows, expected, look in cases:
        W_dec, expected = torch.tensor(rows, dtype=torch.float32), torch.tensor(expected)
        given = f"W_dec = {rows}"
        check.compare(given, expected, nearest_rows, W_dec, look=look, shape=shape)
    W_dec = golden("small")["W_dec"]
    look = "the norms: W_dec.norm(dim=1, keepdim=True) has one for each row, dim=0 one for each column."
    expected = nearest_neighbours(W_dec).index
    check.compare("64 random rows of width 16", expected, nearest_rows, W_dec, look=look)
    check.passes()


def check_1b(batch_norms: Callable[[Tensor], Tensor]) -> None:
    """The norm of every latent's activations over the batch."""
    check = Check("1b")
    look = "the axis, which is the batch (the first one), and the root of a sum, not of a mean."
    given = f"feature_acts = {shown(EXAMPLE_ACTS)}"
    for repeats, times in ((1, ""), (4, ", four times below each other")):
        expected = repeats**0.5 * torch.tensor([5.0, 2.0, 2**0.5, 0.0])
        acts = EXAMPLE_ACTS.repeat(repeats, 1)
        check.compare(given + times, expected, batch_norms, acts, look=look)
    acts = EXAMPLE_ACTS.clone().requires_grad_()
    given = f"the gradient of the sum of the norms, {given}"
    norms = check.answer(given, batch_norms, acts)
    check.gradient(norms.sum(), acts, normalize(EXAMPLE_ACTS, dim=0), given, "the norms.")
    check.passes()


def check_1c(c2r: Callable[..., Tensor]) -> None:
    """The penalty: a worked example, then values and gradients of the published code."""
    check = Check("1c")
    check.compare(
        EXAMPLE,
        torch.tensor(0.64 * (7 + 7) / 4),
        c2r,
        EXAMPLE_ACTS,
        EXAMPLE_ROWS,
        look="the three factors: s_i, then n_i + n_j(i), then the mean over the latents.",
        instead={
            "the mean over the latents: you have the sum.": 0.64 * (7 + 7),
            "the square of the cosine.": 0.8 * (7 + 7) / 4,
            "the row lengths: a cosine needs both rows at norm 1.": 2.4**2 * (7 + 7) / 4,
            "n_i + n_j(i): you have their product.": 0.64 * (10 + 10) / 4,
            "n_i + n_j(i): you have one of the two.": 0.64 * (5 + 2) / 4,
        },
    )
    given = "two opposite rows (1,0) (−1,0), both firing"
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    look = "max(0, cosine): square it after that."
    check.compare(given, torch.tensor(0.0), c2r, torch.ones(3, 2), opposite, look=look)

    expected = torch.tensor(0.64 * (49 + 49) / 4)
    look = "alpha: it is the exponent of n_i + n_j(i), not of the similarity, and not of each norm."
    given = f"alpha = 2 and {EXAMPLE}"
    check.compare(given, expected, c2r, EXAMPLE_ACTS, EXAMPLE_ROWS, 2.0, look=look)
    for name in ("small", "medium", "sparse"):
        _check_golden(check, c2r, name, alpha=1.0)
    check.passes("It agrees with the published code, gradients included.")


def _check_golden(check: Check, c2r: Callable[..., Tensor], name: str, alpha: float) -> None:
    """Loss and gradients against the published code's; where it has a NaN, 0 is expected."""
    stored = golden(name)
    acts, W_dec = (stored[key].requires_grad_() for key in ("acts", "W_dec"))
    given = (
        f"golden batch c2r_{name}.npz, {len(acts)} samples, {len(W_dec)} latents, alpha = {alpha}"
    )
    look = "the steps of 1c, on this larger batch."
    loss = check.compare(given, stored[f"alpha{alpha}_loss"], c2r, acts, W_dec, alpha, look=look)
    for key, by, term in (("acts", acts, "n_i"), ("W_dec", W_dec, "s_i")):
        expected = stored[f"alpha{alpha}_grad_{key}"].nan_to_num(nan=0.0)
        given_too = f"the gradient by {key}, {given}"
        look = f"whether {term} is computed from {key} with gradient. Only the search for j(i) has none."
        check.gradient(loss, by, expected, given_too, look, ROOT if alpha >= 1 else POWER)


# -- 2: break it ----------------------------------------------------------------------------------


def _batch(check: Check, got: Any, names: str) -> tuple[Tensor, Tensor]:
    """Activations and decoder rows that a student made, if the package's c2r_loss takes them."""
    right = isinstance(got, (tuple, list)) and len(got) == len(names.split(", "))
    check.require(right, "nothing", names, got, "the return statement.")
    tensors = all(isinstance(one, Tensor) for one in got[:2])
    two = " and ".join(kind_of(one) for one in got[:2])
    check.require(tensors, "nothing", "feature_acts and W_dec as tensors", two, TYPES[list])
    acts, W_dec = (tensor.detach().float() for tensor in got[:2])
    look = "your batch: a column of feature_acts, finite and ≥ 0, for every row of W_dec."
    check.answer("your batch, by the package's c2r_loss", c2r_loss, acts, W_dec, look=look)
    return acts, W_dec


def check_2a(order_matters: Callable[[], tuple[Tensor, Tensor, Sequence[int]]]) -> None:
    """One dictionary, numbered in two ways, with two values of the loss."""
    check = Check("2a")
    got = check.answer("nothing", order_matters)
    acts, W_dec = _batch(check, got, "feature_acts, W_dec, order")
    order = check.answer("your order", lambda: [int(i) for i in got[2]])
    given = f"a dictionary of {len(W_dec)} latents and the order {order}"
    check.require(
        sorted(order) == list(range(len(W_dec))),
        given,
        f"every number from 0 to {len(W_dec) - 1} once",
        order,
        "`order`, which only renumbers the latents.",
    )
    one, other = float(c2r_loss(acts, W_dec)), float(c2r_loss(acts[:, order], W_dec[order]))
    check.require(
        abs(one - other) > 0.01 * max(one, other),
        given,
        "two values of the loss that differ by more than 1 %",
        f"{one:.4g} and {other:.4g}",
        "ties: argmax takes the first of several equal cosines. How many equal rows does a tie need?",
    )
    check.passes(f"The same latents cost {one:.3g} in one order and {other:.3g} in the other.")


def check_2b(silent_pair: Callable[[], tuple[Tensor, Tensor]], c2r: Callable[..., Tensor]) -> None:
    """A batch with a finite loss and, under the plain formula, a gradient that is NaN."""
    check = Check("2b")
    acts, W_dec = _batch(check, check.answer("nothing", silent_pair), "feature_acts, W_dec")
    index = nearest_neighbours(W_dec).index
    norms = acts.norm(dim=0)
    check.require(
        bool((norms + norms[index] == 0).any()),
        f"a batch of {len(acts)} samples and {len(W_dec)} latents",
        "a latent with n_i + n_j(i) = 0",
        f"n_i + n_j(i) = {shown(norms + norms[index])}",
        "what the slope of √n is at n = 0, and which n is 0 in your batch.",
    )
    given = "your batch, by your c2r with alpha = 0.5"
    acts.requires_grad_()
    loss = check.kind(check.answer(given, c2r, acts, W_dec, 0.5), torch.tensor(0.0), given)
    check.require(bool(loss.isfinite()), given, "a finite loss", loss, "0 / 0 in your c2r.")
    (gradient,) = check.answer(f"the gradient of {given}", torch.autograd.grad, loss, acts)
    n_nan = int(gradient.isnan().sum())
    safe = "Your own c2r stays finite here, so exercise 2c is done as well: use it there."
    remark = f"The loss is {loss.item():.3g}, and {n_nan} entries of its gradient are NaN."
    check.passes(remark if n_nan else safe)


def check_2c(c2r_mended: Callable[..., Tensor]) -> None:
    """Golden values for three exponents, and 0 where the published gradient is NaN."""
    check = Check("2c")
    for alpha in (1.0, 2.0, 0.5):
        for name in ("small", "medium", "sparse"):
            _check_golden(check, c2r_mended, name, alpha)
    given = "two similar rows whose latents are silent, alpha = 0.5"
    loss = check.answer(given, c2r_mended, torch.zeros(3, 2), EXAMPLE_ROWS[:2], 0.5)
    look = "a small number that is added or clamped to: it changes the loss. Here we want none."
    check.require(float(loss) == 0, given, "a loss of exactly 0", loss, look)
    check.passes("Silent pairs have gradient 0 for every alpha.")


def check_2d(one_sample_at_a_time: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The mean of the losses of batches of one."""
    check = Check("2d")
    acts, W_dec = (golden("small")[key] for key in ("acts", "W_dec"))
    losses = torch.stack([c2r_loss(sample.unsqueeze(0), W_dec) for sample in acts])
    check.compare(
        "golden batch c2r_small.npz, 32 samples",
        float(losses.mean()),
        one_sample_at_a_time,
        acts,
        W_dec,
        look="the mean over the samples, of c2r_loss with one sample at a time.",
        instead={
            "batches of one: this is the loss of the whole batch.": c2r_loss(acts, W_dec),
            "the mean over the samples: you have the sum.": losses.sum(),
        },
        shape="the mean over the samples: one number.",
        error="the batch axis, which must stay: acts[b] has shape (64,), acts[b : b + 1] has (1, 64).",
    )
    check.passes()


def check_2e(convert_weight: Callable[[float, int, int], float]) -> None:
    """The weight for another batch size that has the same strength."""
    check = Check("2e")
    look = "the table: how does the loss grow when the batch grows fourfold? λ must make up for it."
    for weight, old, new in ((1.0, 64, 256), (5.0, 2048, 512)):
        given = f"λ = {weight:g}, tuned at batch size {old}; the new batch size is {new}"
        strength = strength_from_weight(weight, batch_size=old, d_sae=1024)
        expected = weight_from_strength(strength, batch_size=new, d_sae=1024)
        check.compare(given, expected, convert_weight, weight, old, new, look=look)
    check.passes("Same conversion as weight_from_strength.")


# -- 3: find absorption ---------------------------------------------------------------------------


def check_3a(probe_direction: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A direction that was learned from labels, against the true one."""
    check = Check("3a")
    tree = FeatureTree(d_in=32, n_parents=5, n_singles=5, parent_probability=0.2, seed=7)
    x, features = tree.sample(10_000, torch.Generator().manual_seed(7))
    for parent in range(3):
        given = f"10 000 samples of other features, and where parent {parent + 1} is on"
        present, true = features[:, parent] > 0, tree.directions[parent]
        got = check.kind(check.answer(given, probe_direction, x, present), true, given).detach()
        norm = float(got.norm())
        check.require(abs(norm - 1) < 1e-3, given, "norm 1", norm, "the last step: normalise.")
        on, off, n_on = x[present].mean(0), x[~present].mean(0), int(present.sum())
        sums = n_on * on - (len(x) - n_on) * off
        instead = {
            "the sign: with the concept minus without.": off - on,
            "the means: you have sums, and more samples are without the concept.": sums,
            "what else is in x. Subtract what is there when the parent is off.": on,
        }
        look = "the difference of the means. Or is it a probe that was not trained to the end?"
        known = (hint for hint, wrong in instead.items() if close(got, normalize(wrong, dim=0)))
        cosine = float(got @ true)
        expected = "a cosine above 0.9 with the true direction"
        check.require(cosine > 0.9, given, expected, cosine, next(known, look))
    check.passes()


def check_3b(detector: Callable[[Tensor, Tensor, Tensor], int]) -> None:
    """The live latent nearest to a direction."""
    check = Check("3b")
    W_dec = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    acts = torch.tensor([[0.0, 5.0, 0.0, 9.0], [0.0, 5.0, 1.0, 9.0]])
    check.compare(
        f"W_dec = {shown(W_dec)}, the direction (1, 0), and latent 0 silent in the whole batch",
        2,
        detector,
        acts,
        W_dec,
        torch.tensor([1.0, 0.0]),
        look="argmax over the latents.",
        instead={
            "the dead: a latent that never fires detects nothing.": 0,
            "the sign: latent 1 points the other way.": 1,
            "the cosine with the direction; how hard a latent fires does not count here.": 3,
        },
        shape="argmax: one latent, not a value for each.",
    )
    check.passes()


def check_3c(silent_shares: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """How often a detector is silent, parent on: alone, and with each child."""
    check = Check("3c")
    parent_on = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    child = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 0, 0])
    child_on = child.unsqueeze(1) == torch.tensor([1, 2])
    fires = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    check.compare(
        "10 samples, the parent on in the first 8: alone in 4 (silent in 1), with child 1 in 3 "
        "(silent in 2), with child 2 in 1 (silent)",
        torch.tensor([1 / 4, 2 / 3, 1.0]),
        silent_shares,
        fires,
        parent_on,
        child_on,
        look="which samples count: parent on and no child, then parent on and this child. Divide by those.",
        instead={"`~fires`: these are the shares in which it fires.": [3 / 4, 1 / 3, 0.0]},
        shape="the groups: alone first, then one for each child.",
    )
    check.passes()


def check_3d(carrier: Callable[[Tensor, Tensor, Tensor, Tensor], int]) -> None:
    """The latent that writes most along a direction in the samples that were missed."""
    check = Check("3d")
    W_dec = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, -0.6], [-0.6, 0.8]])
    acts = torch.tensor(
        [[0, 0, 0, 0, 0], [0, 2, 9, 0, 3], [0, 2, 9, 1.0, 3], [7, 0, 0, 0, 0]],
    )
    missed = torch.tensor([True, True, True, False])
    check.compare(
        f"W_dec = {shown(W_dec)}, feature_acts = {shown(acts)}, the first three samples missed",
        1,
        carrier,
        acts,
        W_dec,
        torch.tensor([1.0, 0.0]),
        missed,
        look="the mean over the missed samples, before argmax: that of a matrix counts through its rows.",
        instead={
            "`missed`: latent 0 is silent in those samples, so it writes nothing.": 0,
            "the direction: latent 2 fires hardest, but its row is orthogonal to the probe.": 2,
            "both factors: activation times cosine with the direction.": 3,
            "the sign: latent 4 writes against the direction.": 4,
        },
        shape="argmax: one latent, not a value for each.",
    )
    check.passes()


# -- 4: tune, then confirm ------------------------------------------------------------------------


class Ledger:
    """A score of (strength, seed) that comes from a table, and keeps a record of what was looked at."""

    def __init__(self, score: Callable[[float, int], float]) -> None:
        self.score, self.looked_at = score, set()

    def __call__(self, strength: float, seed: int) -> float:
        """One look."""
        self.looked_at.add((strength, seed))
        return self.score(strength, seed)


def check_4a(choose_strength: Callable[..., float]) -> None:
    """The smallest strength whose mean over the exploring seeds is low enough."""
    check = Check("4a")
    table = {0.1: (0.125, 1.0), 0.3: (0.0, 0.375), 1.0: (0.25, 0.125), 3.0: (0.125, 0.125)}
    table[10.0] = (0.0, 0.0)
    mistakes = {
        "the mean: at strength 0.1 one seed is low enough, and the mean is not.": 0.1,
        "the mean over the seeds, not the highest of them.": 1.0,
        "the mean over the seeds: you have the sum.": 3.0,
        "the rule: the smallest strength that is low enough, not the first or the lowest.": 10.0,
    }
    _check_choice(check, choose_strength, table, mistakes)
    at_the_limit = {"`at_most`: a mean of exactly 0.25 is low enough.": 1.0}
    _check_choice(check, choose_strength, table | {0.3: (0.0, 0.5)}, at_the_limit)
    check.passes()


def _check_choice(check: Check, choose_strength: Callable, table: dict, instead: dict) -> None:
    """What is chosen on two seeds with these scores, where 0.3 is right, and what was looked at."""
    absorption = Ledger(lambda strength, seed: table[strength][seed] if seed < 2 else 0.0)
    order = (10.0, 0.1, 0.3, 1.0, 3.0)
    given = f"absorption on seeds 0 and 1: {table}; strengths {order}; at_most = 0.25"
    got = check.answer(given, choose_strength, absorption, order, (0, 1), 0.25)
    got = check.kind(got, 0.3, given)
    seeds = sorted({seed for _, seed in absorption.looked_at})
    look = "`seeds`: the mean is over all of these, and over no other."
    check.require(
        seeds == [0, 1], given, "a look at seeds [0, 1]", f"a look at seeds {seeds}", look
    )
    check.values(got, 0.3, given, "the rule, which is in the text.", instead)


def check_4b(confirm: Callable[..., list[float]]) -> None:
    """One difference for each confirming seed, paired."""
    check = Check("4b")
    score = Ledger(lambda strength, seed: seed / 10 - (0.2 if strength else 0.0) * (seed - 4))
    given = "strength 0.3, seeds (5, 6, 7), scores 0.3 0.2 0.1 with C²R and 0.5 0.6 0.7 without"
    expected = [-0.2, -0.4, -0.6]
    got = check.answer(given, confirm, score, 0.3, (5, 6, 7))
    got = check.kind(got, expected, given, "the list: one number for each seed.")
    check.require(
        score.looked_at == {(strength, seed) for strength in (0, 0.3) for seed in (5, 6, 7)},
        given,
        "the chosen strength and strength 0, each on seeds 5, 6 and 7, and nothing else",
        sorted(score.looked_at),
        "what you look at: another strength or another seed would be peeking.",
    )
    look = "the pairs: with minus without for the same seed, one number for each seed."
    check.values(got, expected, given, look)
    check.passes()


def check_4c(winner_scores: Callable[[Tensor, Tensor], tuple[float, float]]) -> None:
    """What the best explored strength scored when it was chosen, and on fresh seeds."""
    check = Check("4c")
    explored = torch.tensor([[0.0, -2.0, 1.0], [-1.0, 3.0, 0.0]])
    fresh = torch.tensor([[5.0, 1.0, 0.0], [2.0, 5.0, 0.0]])
    check.compare(
        f"explored = {shown(explored)}, fresh = {shown(fresh)}, lower is better",
        [-1.5, 1.5],
        winner_scores,
        explored,
        fresh,
        look="the winner, which `explored` alone decides, row by row; `fresh` is read at its place.",
        shape="the mean over the worlds: two numbers.",
    )
    check.passes()


# -- 5: a regulariser of one's own ----------------------------------------------------------------


def check_5a(co_activation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The penalty on two similar latents that fire in the same sample."""
    check = Check("5a")
    similar, opposite = [[1.0, 0.0], [0.8, 0.6]], [[1.0, 0.0], [-1.0, 0.0]]
    turns, together = [[3.0, 0.0], [0.0, 2.0]], [[3.0, 2.0], [1.0, 1.0]]
    cases = [
        ("take turns", similar, turns, 0.0, "the product, sample by sample: no sum of norms."),
        ("fire together", similar, together, 0.64 * 7, "s_i, and the mean over latents."),
        ("fire together", opposite, together, 0.0, "max(0, cosine): square it after that."),
    ]
    instead = {
        "the *sum* over the samples: you have the mean.": 0.64 * 7 / 2,
        "the mean over the latents: you have the sum.": 0.64 * 7 * 2,
    }
    for what, rows, acts, expected, look in cases:
        given = f"latents with the rows {rows} that {what}: {acts}"
        arguments = torch.tensor(acts), torch.tensor(rows)
        check.compare(
            given, torch.tensor(expected), co_activation, *arguments, look=look, instead=instead
        )

    acts = golden("small")["acts"].requires_grad_()
    rows = golden("small")["W_dec"].requires_grad_()
    W_dec = normalize(
        rows, dim=-1
    )  # whether the student does it again or not, the gradient is the same
    given = "the golden batch c2r_small.npz, rows at norm 1"
    reference = create_regulariser("co_activation", weight=1.0)(acts, W_dec, torch.Generator())
    look = "which neighbour goes with which latent."
    got = check.compare(given, reference.detach(), co_activation, acts, W_dec, look=look)
    for name, by, what in (("W_dec", rows, "the cosine"), ("feature_acts", acts, "the product")):
        (expected,) = torch.autograd.grad(reference, by, retain_graph=True)
        look = f"{what}: it must be computed from {name} with gradient. Only the search has none."
        check.gradient(got, by, expected, f"the gradient by {name}, {given}", look)
    check.passes()


def check_5b(file: str, name: str) -> None:
    """Import a file, and train a small SAE with the regulariser that it registers."""
    check = Check("5b")
    path = Path(file).resolve()
    given = f"the file {file}"
    look = "JupyterLab's menu: File, New, Python File. Paste your class and rename the file."
    check.require(path.is_file(), given, "a file in the notebook's folder", "no such file", look)
    package = {one: of for one, of in REGULARISERS.items() if of.__module__.startswith("c2r_core.")}
    REGULARISERS.pop(name, None)  # of the file as it was before
    check.answer(given, _imported, path)
    taken = [one for one, of in package.items() if REGULARISERS.get(one, of) is not of]
    REGULARISERS.update(package)
    look = "`name`: the package has a regulariser of that name."
    check.require(not taken and name not in package, given, "a name of its own", taken, look)

    given = f"create_regulariser({name!r}, weight=100.0)"
    look = "the class: has it this `name`, and @register_regulariser above it?"
    penalty = check.answer(given, lambda: create_regulariser(name, weight=100.0), look=look)
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(64, 16, generator=generator).requires_grad_()
    W_dec = normalize(torch.randn(16, 8, generator=generator), dim=-1).requires_grad_()
    value = check.answer(f"the value of {given}", penalty, acts, W_dec, generator)
    check.kind(value, torch.tensor(0.0), given, "mean(): one number for each batch.")
    look = "gradients: item(), detach() and no_grad() cut them off. Or is the value always 0?"
    check.require(value.requires_grad, given, "a value with a gradient", "none", look)

    x = torch.randn(64, 8, generator=generator) / 8**0.5
    config = TrainConfig(steps=20, mean_square_norm=None)

    def rows(penalties: list) -> Tensor:
        sae = BatchTopKSAE(8, 16, k=4)
        train(sae, lambda step: x, config, penalties, progress=False)
        return sae.W_dec.detach()

    same = torch.equal(rows([]), check.answer(f"a training with {given}", rows, [penalty]))
    check.require(not same, given, "another SAE than without the penalty", "the same SAE", look)
    check.passes(f"{path.name} is all that it takes.")


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
