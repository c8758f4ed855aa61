"""Checks of the exercises: what was given, what was expected, where to look.

A check takes what you wrote, tries it on small inputs, and prints that it passes or raises `CheckFailed`.
Read the message first; reading this file gives the answers away.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data"
"""Values computed with the published code of the paper."""

# Latents 0 and 1 are alike (cosine 0.8); the others are orthogonal to everything. The loss is 2.24.
EXAMPLE_ROWS = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1.0]])
EXAMPLE_ACTS = torch.tensor([[3.0, 0, 1, 0], [4.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 1, 0]])
EXAMPLE = "rows (1,0,0,0) (0.8,0.6,0,0) (0,0,2,0) (0,0,0,1), whose latents have norms 5, 2, √2, 0"


class CheckFailed(AssertionError):
    """An answer is missing or not right yet. Jupyter shows the message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class Check:
    """One exercise's check: calls what the student wrote and words what is wrong with it."""

    def __init__(self, exercise: str) -> None:
        self.exercise = exercise

    def answer(self, given: str, function: Callable, *arguments: Any) -> Any:
        """What the function returns. A stub fails the check; any other error also says what was given."""
        try:
            got = function(*arguments)
        except NotImplementedError as stub:
            raise CheckFailed(
                f"{stub}\n  You have not written this one yet. Edit its cell, run the cell, and run "
                "this check again."
            ) from None
        except Exception as error:
            error.add_note(f"Exercise {self.exercise}: this was raised for {given}.")
            raise
        self.require(
            got is not None, given, "an answer", got, "the function's end: does it return?"
        )
        return got

    def require(self, holds: bool, given: str, expected: str, got: Any, look: str) -> None:
        """Fail the check unless something holds."""
        if not holds:
            raise CheckFailed(
                f"Exercise {self.exercise} is not right yet.\n"
                f"  given     {given}\n"
                f"  expected  {expected}\n"
                f"  got       {shown(got)}\n"
                f"  look at   {look}"
            )

    def close(self, got: Any, expected: Tensor, given: str, look: str, rtol: float = 1e-4) -> None:
        """Fail the check unless `got` is a tensor or number of the expected shape and values."""
        is_number = isinstance(got, (int, float)) and expected.ndim == 0
        got = torch.tensor(got) if is_number else got
        right = (
            isinstance(got, Tensor)
            and got.shape == expected.shape
            and torch.allclose(got.double(), expected.double(), rtol=rtol, atol=1e-6)
        )
        self.require(right, given, shown(expected), got, look)

    def latent(self, got: Any, expected: int, given: str, looks: dict[int, str]) -> None:
        """Fail the check unless `got` is the expected latent; each wrong one has its own hint."""
        look = looks.get(int(got), "the axis of argmax.")
        self.require(int(got) == expected, given, f"latent {expected}", got, look)

    def passes(self, remark: str = "") -> None:
        """Say so."""
        print(f"Exercise {self.exercise} passes. {remark}".rstrip())


def shown(value: Any) -> str:
    """A value as a message shows it: small tensors in full, large ones by their shape."""
    if isinstance(value, Tensor) and value.numel() <= 24:
        values = value.detach().double() if value.is_floating_point() else value
        return f"tensor {np.round(values.numpy(), 4).tolist()}"
    if isinstance(value, Tensor):
        return (
            f"a tensor of shape {tuple(value.shape)}, from {value.min():.4g} to {value.max():.4g}"
        )
    return str(value)


def golden(name: str) -> dict[str, Tensor]:
    """Stored inputs, losses and gradients of the published code."""
    with np.load(GOLDEN / f"c2r_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


# -- 1: write the loss ----------------------------------------------------------------------------


def check_1a(nearest_rows: Callable[[Tensor], Tensor]) -> None:
    """The index of every row's nearest other row."""
    check = Check("1a")
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
        given = f"W_dec = {rows}"
        got = check.answer(given, nearest_rows, torch.tensor(rows, dtype=torch.float32))
        check.close(got, torch.tensor(expected), given, look)
    W_dec = golden("small")["W_dec"]
    given = "64 random rows of width 16"
    expected = nearest_neighbours(W_dec).index
    check.close(check.answer(given, nearest_rows, W_dec), expected, given, "all of the above.")
    check.passes()


def check_1b(batch_norms: Callable[[Tensor], Tensor]) -> None:
    """The norm of every latent's activations over the batch."""
    check = Check("1b")
    for repeats in (1, 4):
        given = f"feature_acts = {EXAMPLE_ACTS.tolist()}, {repeats} time(s) below each other"
        got = check.answer(given, batch_norms, EXAMPLE_ACTS.repeat(repeats, 1))
        expected = repeats**0.5 * torch.tensor([5.0, 2.0, 2**0.5, 0.0])
        look = "the axis, which is the batch (the first one), and the root of a sum, not of a mean."
        check.close(got, expected, given, look)
    check.passes()


def check_1c(c2r: Callable[..., Tensor]) -> None:
    """The penalty: a worked example, then values and gradients of the published code."""
    check = Check("1c")
    look = "the mean, which is over the latents, and the square of the cosine."
    got = check.answer(EXAMPLE, c2r, EXAMPLE_ACTS, EXAMPLE_ROWS)
    check.close(got, torch.tensor(0.64 * (7 + 7) / 4), EXAMPLE, look)

    given = "two opposite rows (1,0) (−1,0), both firing"
    got = check.answer(given, c2r, torch.ones(3, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    check.close(got, torch.tensor(0.0), given, "max(0, cosine): square it after, not before.")

    given = f"alpha = 2 and {EXAMPLE}"
    got = check.answer(given, c2r, EXAMPLE_ACTS, EXAMPLE_ROWS, 2.0)
    look = "alpha: it is the exponent of the pair's norm n_i + n_j(i), not of the similarity."
    check.close(got, torch.tensor(0.64 * (49 + 49) / 4), given, look)

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
    loss = check.answer(given, c2r, acts, W_dec, alpha)
    check.close(loss, stored[f"alpha{alpha}_loss"], given, "the steps above, on this larger batch.")
    check.require(
        loss.requires_grad, given, "a loss with a gradient", "none", "detach() and no_grad()."
    )
    gradients = torch.autograd.grad(loss, (acts, W_dec), allow_unused=True)
    for key, what, gradient in zip(("acts", "W_dec"), ("n_i", "s_i"), gradients, strict=True):
        expected = stored[f"alpha{alpha}_grad_{key}"].nan_to_num(nan=0.0)
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        n_nan = int(gradient.isnan().sum())
        off = float((gradient - expected).abs().max() / expected.abs().max())
        check.require(
            off <= 1e-3,
            f"the gradient by {key}, {given}",
            "the published gradient, and 0 where that is NaN",
            f"{n_nan} entries that are NaN"
            if n_nan
            else f"entries off by {off:.1%} of the largest",
            f"whether {what} is computed from {key} with gradient. Only the search for j(i) has none.",
        )


# -- 2: break it ----------------------------------------------------------------------------------


def check_2a(order_matters: Callable[[], tuple[Tensor, Tensor, Sequence[int]]]) -> None:
    """One dictionary, numbered in two ways, with two values of the loss."""
    check = Check("2a")
    got = check.answer("nothing", order_matters)
    three = isinstance(got, tuple) and len(got) == 3
    expected = "three things: feature_acts, W_dec, order"
    check.require(three, "nothing", expected, got, "the return statement.")
    acts, W_dec, order = got
    order = [int(i) for i in order]
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
        [one, other],
        "ties: argmax takes the first of several equal cosines. How many equal rows does a tie need?",
    )
    check.passes(f"The same latents cost {one:.3g} in one order and {other:.3g} in the other.")


def check_2b(silent_pair: Callable[[], tuple[Tensor, Tensor]], c2r: Callable[..., Tensor]) -> None:
    """A batch with a finite loss and, under the plain formula, a gradient that is NaN."""
    check = Check("2b")
    got = check.answer("nothing", silent_pair)
    two = isinstance(got, tuple) and len(got) == 2
    check.require(two, "nothing", "feature_acts and W_dec", got, "the return statement.")
    acts, W_dec = (tensor.detach().float() for tensor in got)
    check.answer("your batch, by the package's c2r_loss", c2r_loss, acts, W_dec)
    index, cosine = nearest_neighbours(W_dec)
    norms = acts.norm(dim=0)
    pair_norms = norms + norms[index]
    given = f"a batch of {len(acts)} samples and {len(W_dec)} latents"
    check.require(
        bool(((pair_norms == 0) & (cosine > 0)).any()),
        given,
        "a latent with n_i + n_j(i) = 0 and a cosine above 0",
        f"n_i + n_j(i) = {shown(pair_norms)} at cosines {shown(cosine)}",
        "what the slope of √n is at n = 0, and which n is 0 in your batch.",
    )
    acts.requires_grad_()
    loss = check.answer(given, c2r, acts, W_dec, 0.5)
    check.require(
        bool(loss.isfinite()), given, "a finite loss", loss, "the inputs: are they finite?"
    )
    (gradient,) = torch.autograd.grad(loss, acts)
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
    check.passes("Silent pairs have gradient 0 for every alpha.")


def check_2d(one_sample_at_a_time: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The mean of the losses of batches of one."""
    check = Check("2d")
    stored = golden("small")
    acts, W_dec = stored["acts"], stored["W_dec"]
    given = "golden batch c2r_small.npz, 32 samples"
    expected = torch.stack([c2r_loss(sample.unsqueeze(0), W_dec) for sample in acts]).mean()
    look = "the batch axis, which must stay: acts[b] has shape (64,), acts[b : b + 1] has (1, 64)."
    check.close(check.answer(given, one_sample_at_a_time, acts, W_dec), expected, given, look)
    check.passes()


def check_2e(convert_weight: Callable[[float, int, int], float]) -> None:
    """The weight for another batch size that has the same strength."""
    check = Check("2e")
    for weight, old, new in ((1.0, 64, 256), (5.0, 2048, 512)):
        given = f"λ = {weight:g}, tuned at batch size {old}; the new batch size is {new}"
        strength = strength_from_weight(weight, batch_size=old, d_sae=1024)
        expected = torch.tensor(weight_from_strength(strength, batch_size=new, d_sae=1024))
        got = check.answer(given, convert_weight, weight, old, new)
        look = "the table: how does the loss grow when the batch grows fourfold? λ must make up for it."
        check.close(got, expected, given, look)
    check.passes("Same conversion as weight_from_strength.")


# -- 3: find absorption ---------------------------------------------------------------------------


def check_3a(probe_direction: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A direction that was learned from labels, against the true one."""
    check = Check("3a")
    tree = FeatureTree(d_in=32, n_parents=5, n_singles=5, parent_probability=0.2, seed=7)
    x, features = tree.sample(10_000, torch.Generator().manual_seed(7))
    for parent in range(3):
        given = f"10 000 samples of other features, and where parent {parent} is on"
        got = check.answer(given, probe_direction, x, features[:, parent] > 0)
        right = isinstance(got, Tensor) and got.shape == (32,)
        check.require(
            right, given, "a tensor of shape (32,)", got, "the mean: over samples, axis 0."
        )
        norm = float(got.norm())
        check.require(
            math.isclose(norm, 1, rel_tol=1e-3), given, "norm 1", norm, "the last step: normalise."
        )
        cosine = float(got @ tree.directions[parent])
        look = "what else is in x where the parent is on. Subtract what is there when it is off."
        check.require(
            cosine > 0.92, given, "a cosine above 0.92 with the true direction", cosine, look
        )
    check.passes()


def check_3b(detector: Callable[[Tensor, Tensor, Tensor], int]) -> None:
    """The live latent nearest to a direction."""
    check = Check("3b")
    W_dec = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    acts = torch.tensor([[0.0, 5.0, 0.0, 9.0], [0.0, 5.0, 1.0, 9.0]])
    given = f"W_dec = {shown(W_dec)}, the direction (1, 0), and latent 0 silent in the whole batch"
    got = check.answer(given, detector, acts, W_dec, torch.tensor([1.0, 0.0]))
    look = {
        0: "the dead: a latent that never fires detects nothing.",
        1: "the sign: latent 1 points the other way.",
        3: "the cosine with the direction; how hard a latent fires does not count here.",
    }
    check.latent(got, 2, given, look)
    check.passes()


def check_3c(silent_shares: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """How often a detector is silent, parent on: alone, and with each child."""
    check = Check("3c")
    parent_on = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    child = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 0, 0])
    child_on = child.unsqueeze(1) == torch.tensor([1, 2])
    fires = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    given = (
        "10 samples, the parent on in the first 8: alone in 4 (silent in 1), with child 0 in 3 "
        "(silent in 2), with child 1 in 1 (silent)"
    )
    got = check.answer(given, silent_shares, fires, parent_on, child_on)
    look = "which samples count: parent on and no child, then parent on and this child. Divide by those."
    check.close(got, torch.tensor([1 / 4, 2 / 3, 1.0]), given, look)
    check.passes()


def check_3d(carrier: Callable[[Tensor, Tensor, Tensor, Tensor], int]) -> None:
    """The latent that writes most along a direction in the samples that were missed."""
    check = Check("3d")
    W_dec = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, -0.6]])
    acts = torch.tensor([[0, 2, 9, 0], [0, 2, 9, 1.0], [7, 0, 0, 0]])
    missed = torch.tensor([True, True, False])
    given = f"W_dec = {shown(W_dec)}, feature_acts = {shown(acts)}, the first two samples missed"
    got = check.answer(given, carrier, acts, W_dec, torch.tensor([1.0, 0.0]), missed)
    look = {
        0: "`missed`: in those samples latent 0 is silent.",
        2: "the direction: latent 2 fires hardest, but its row is orthogonal to the probe.",
        3: "both factors: activation times cosine with the direction, mean over the missed samples.",
    }
    check.latent(got, 1, given, look)
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
    table = {0.1: [0.02, 0.5], 0.3: [0.03, 0.05], 1.0: [0.0, 0.0]}
    absorption = Ledger(lambda strength, seed: table[strength][seed] if seed < 2 else 0.0)
    given = f"absorption on seeds 0 and 1: {table}; strengths in the order (1, 0.1, 0.3)"
    got = check.answer(given, choose_strength, absorption, (1.0, 0.1, 0.3), (0, 1))
    seeds = sorted({seed for _, seed in absorption.looked_at})
    check.require(
        seeds == [0, 1], given, "a look at seeds 0 and 1", f"a look at seeds {seeds}", "`seeds`."
    )
    look = {
        0.1: "the mean: at strength 0.1 one seed is below 0.05 and the mean is 0.26.",
        1.0: "the rule: the smallest strength that is low enough, not the first one or the lowest score.",
    }
    check.require(got == 0.3, given, "0.3", got, look.get(got, "the rule, which is in the text."))
    check.passes()


def check_4b(confirm: Callable[..., list[float]]) -> None:
    """One difference for each confirming seed, paired."""
    check = Check("4b")
    score = Ledger(lambda strength, seed: seed / 10 - (0.2 if strength else 0.0) * (seed - 4))
    given = "strength 0.3, seeds (5, 6, 7), scores 0.3 0.2 0.1 with C²R and 0.5 0.6 0.7 without"
    got = check.answer(given, confirm, score, 0.3, (5, 6, 7))
    allowed = {(strength, seed) for strength in (0, 0.3) for seed in (5, 6, 7)}
    check.require(
        score.looked_at == allowed,
        given,
        "the chosen strength and strength 0, each on seeds 5, 6 and 7, and nothing else",
        sorted(score.looked_at),
        "what you look at: another strength or another seed would be peeking.",
    )
    look = "the pairs: with minus without for the same seed, one number for each seed."
    check.close(torch.as_tensor(got), torch.tensor([-0.2, -0.4, -0.6]), given, look)
    check.passes()


def check_4c(winner_scores: Callable[[Tensor, Tensor], tuple[float, float]]) -> None:
    """What the best explored strength scored when it was chosen, and on fresh seeds."""
    check = Check("4c")
    explored = torch.tensor([[0.0, -2.0, 1.0], [-1.0, 3.0, 0.0]])
    fresh = torch.tensor([[5.0, 1.0, 0.0], [2.0, 5.0, 0.0]])
    given = f"explored = {explored.tolist()}, fresh = {fresh.tolist()}, lower is better"
    got = check.answer(given, winner_scores, explored, fresh)
    look = "the winner, which `explored` alone decides, row by row; `fresh` is read at its place."
    check.close(torch.as_tensor(got), torch.tensor([-1.5, 1.5]), given, look)
    check.passes()


# -- 5: a regulariser of one's own ----------------------------------------------------------------


def check_5a(co_activation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The penalty on two similar latents that fire in the same sample."""
    check = Check("5a")
    W_dec = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    cases = [
        (
            "that take turns",
            [[3.0, 0.0], [0.0, 2.0]],
            "the product, sample by sample: no sum of norms.",
        ),
        ("that fire together", [[3.0, 2.0], [1.0, 1.0]], "s_i, and the mean over latents."),
    ]
    for what, acts, look in cases:
        given = f"two latents at cosine 0.8 {what}: {acts}"
        acts = torch.tensor(acts)
        expected = 0.64 * (acts[:, 0] * acts[:, 1]).sum()
        check.close(check.answer(given, co_activation, acts, W_dec), expected, given, look)

    acts = golden("small")["acts"]
    W_dec = torch.nn.functional.normalize(golden("small")["W_dec"], dim=-1).requires_grad_()
    given = "the golden batch c2r_small.npz, rows at norm 1"
    reference = create_regulariser("co_activation", weight=1.0)(acts, W_dec, torch.Generator())
    got = check.answer(given, co_activation, acts, W_dec)
    check.close(got, reference.detach(), given, "which neighbour goes with which latent.")
    look = "the cosine: it must be computed from W_dec with gradient. Only the search has none."
    check.require(got.requires_grad, given, "a gradient by W_dec", "none", look)
    check.passes()


def check_5b(file: str, name: str) -> None:
    """Import a file, and train a small SAE with the regulariser that it registers."""
    check = Check("5b")
    path = Path(file).resolve()
    given = f"the file {file}"
    check.require(
        path.is_file(),
        given,
        "a file in the notebook's folder",
        "no such file",
        "JupyterLab's menu: File, New, Python File. Paste your class and rename the file.",
    )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    check.answer(given, lambda: spec.loader.exec_module(module) or module)

    given = f"create_regulariser({name!r}, weight=100.0)"
    penalty = check.answer(given, lambda: create_regulariser(name, weight=100.0))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 8**0.5
    config = TrainConfig(steps=20, mean_square_norm=None, log_every=1)
    look = "gradients: item(), detach() and no_grad() cut them off. Or is the value always 0?"

    def rows(penalties: list) -> Tensor:
        sae = BatchTopKSAE(8, 16, k=4)
        try:
            history = train(sae, lambda step: x, config, penalties, progress=False)
        except ValueError as error:
            if "without a gradient" not in str(error):
                raise
            check.require(False, given, "a value with a gradient", str(error), look)
        if penalties:
            values = [record[name] for record in history.records]
            shape = "one number for each batch"
            check.require(
                all(isinstance(v, float) for v in values), given, shape, values[0], "mean()."
            )
        return sae.W_dec.detach()

    same = torch.equal(rows([]), check.answer(f"a training with {given}", rows, [penalty]))
    check.require(not same, given, "another SAE than without the penalty", "the same SAE", look)
    check.passes(f"{path.name} is all that it takes.")
