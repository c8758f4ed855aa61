"""How an answer is judged: does it return, has it the right type and shape, are its values right.

`checks.py` says what each exercise expects. What is the same for all of them is here.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Mapping
from numbers import Number
from pathlib import Path
from types import GeneratorType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import c2r_core

# Where to look, if an exercise has no hint of its own.
LINE = "the line that raised the error."
AXIS = "the axis: which one is summed over or searched, and which one stays?"
TYPES = {
    NoneType: "the function's end: does it return?",
    torch.return_types.max: "max(dim=…), which gives values and indices. argmax gives the index alone.",
    list: "the list: torch.stack makes one tensor of several, torch.tensor makes one of numbers.",
    np.ndarray: "NumPy, which knows no gradients. Stay with tensors.",
    Number: "item() and float(): they cut the gradient off. Return the tensor.",
    GeneratorType: "the brackets: [… for …] is a list, (… for …) is a generator.",
}
ROOT = (
    "√, whose slope at 0 is infinite. Times the slope 0 of what is under it, that is NaN where a latent is "
    "silent in the whole batch. Tensor.norm has gradient 0 there."
)
POWER = (
    "the slope of n^α at n = 0, which is infinite for α below 1. Times 0 it is NaN. On the result, "
    "torch.where or nan_to_num comes too late: give the power another input where the pair is silent."
)


class CheckFailed(AssertionError):
    """An answer is missing or not right yet. Jupyter shows the message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class Check:
    """One exercise's check: calls what the student wrote and words what is wrong with it.

    `compare` is all that most exercises need. It judges in this order: does the function return, and leave
    its arguments alone (`answer`); has the answer the right type and shape (`kind`); are its values right
    (`values`). Each step has its own advice.
    """

    def __init__(self, exercise: str) -> None:
        self.exercise = exercise

    def require(self, holds: bool, given: str, expected: Any, got: Any, look: str) -> None:
        """Fail the check unless something holds."""
        if not holds:
            raise CheckFailed(
                f"Exercise {self.exercise} is not right yet.\n"
                f"  given     {given}\n"
                f"  expected  {shown(expected)}\n"
                f"  got       {shown(got)}\n"
                f"  look at   {look}"
            )

    def answer(self, given: str, function: Callable, *arguments: Any, look: str = LINE) -> Any:
        """What the function returns. A stub, an error and a changed argument fail the check.

        `look` is the advice after a ValueError, which the package raises for arguments that do not fit.
        """
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            answer = function(*arguments)
        except Exception as error:
            if isinstance(error, NotImplementedError) and str(error).startswith("Exercise"):
                raise CheckFailed(
                    f"{error}\n  You have not written this one yet. Edit its cell, run the cell, and run "
                    "this check again."
                ) from None
            look = look if isinstance(error, ValueError) else LINE
            self.require(False, given, "an answer", raised(error), look)
        self.require(
            all(map(torch.equal, tensors, before)),
            given,
            "the arguments left as they were",
            "a changed argument",
            "operations in place (`/=`, `x[…] = …`, names that end in `_`): apply them to a new tensor.",
        )
        return answer

    def kind(self, got: Any, expected: Any, given: str, look: str = AXIS) -> Tensor:
        """`got` as a tensor, if it has the expected type and shape.

        Where a number or a list is expected, a tensor of that shape will do, but not the other way round.
        """
        wanted = torch.as_tensor(expected)
        found = got if isinstance(expected, Tensor) else as_tensor(got)
        if isinstance(found, Tensor):
            an_index = not wanted.is_floating_point()
            right = found.shape == wanted.shape and not (an_index and found.is_floating_point())
            if found.shape == wanted.shape:
                look = "the type: an index is a whole number, as argmax gives it."
            elif found.squeeze().shape == wanted.shape:
                look = "an axis of length 1 that is left over: keepdim=True keeps one, squeeze drops it."
        else:
            right = False
            look = next((hint for kind, hint in TYPES.items() if isinstance(got, kind)), look)
        self.require(right, given, kind_of(expected), kind_of(got), look)
        return found

    def values(
        self,
        got: Tensor,
        expected: Any,
        given: str,
        look: str,
        instead: Mapping[str, Any] | None = None,
    ) -> None:
        """Fail the check unless the values are right. `instead` has a better hint for each known mistake."""
        wanted = torch.as_tensor(expected)
        if close(got, wanted):
            return
        look = next((hint for hint, wrong in (instead or {}).items() if close(got, wrong)), look)
        if wanted.numel() > SMALL:
            where = (~torch.isclose(got.double(), wanted.double(), rtol=1e-4, atol=1e-6)).nonzero()
            place = where[0].tolist()
            got = f"{shown(got[tuple(place)])} there; {len(where)} of {len(got)} entries differ"
            wanted = f"{shown(wanted[tuple(place)])} at {place}"
        self.require(False, given, wanted, got, look)

    def compare(
        self,
        given: str,
        expected: Any,
        function: Callable,
        *arguments: Any,
        look: str,
        instead: Mapping[str, Any] | None = None,
        shape: str = AXIS,
        error: str = LINE,
    ) -> Any:
        """Call the function, and fail the check unless it gives what is expected; see the class."""
        got = self.answer(given, function, *arguments, look=error)
        self.values(self.kind(got, expected, given, shape), expected, given, look, instead)
        return got

    def gradient(
        self, value: Tensor, by: Tensor, expected: Tensor, given: str, look: str, nan: str = ROOT
    ) -> None:
        """Fail the check unless the value has the expected gradient."""
        self.require(
            value.requires_grad, given, "a gradient", "none", "detach(), no_grad() and item()."
        )
        got = torch.autograd.grad(value, by, retain_graph=True, allow_unused=True)[0]
        got = torch.zeros_like(by) if got is None else got
        n_nan = int(got.isnan().sum())
        self.require(not n_nan, given, "no NaN", f"{n_nan} entries that are NaN", nan)
        off = float((got - expected).abs().max() / expected.abs().max())
        what = f"entries that are off by {off:.1%} of the largest"
        self.require(off <= 1e-3, given, "the right gradient", what, look)

    def passes(self, remark: str = "") -> None:
        """Say so."""
        print(f"Exercise {self.exercise} passes. {remark}".rstrip())


# -- how a message shows things -------------------------------------------------------------------

SMALL = 24
"""Entries of a tensor that is shown in full."""


def shown(value: Any) -> str:
    """A value as a message shows it: small tensors in full, large ones by their shape, long texts cut."""
    if isinstance(value, Tensor) and value.numel() <= SMALL:
        entries = [float(f"{entry:.4g}") for entry in value.detach().double().flatten()]
        entries = entries if value.is_floating_point() else value.flatten().tolist()
        return str(np.array(entries).reshape(value.shape).tolist())
    if isinstance(value, Tensor):
        return f"{kind_of(value)}, from {value.min():.4g} to {value.max():.4g}"
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 300 else f"{text[:300]} …"


def kind_of(value: Any) -> str:
    """What a value is, without its entries if it is a tensor."""
    if isinstance(value, Tensor):
        what = f"tensor of shape {tuple(value.shape)}" if value.ndim else "scalar tensor"
        return f"a {what}, {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"{type(value).__name__} {shown(value)}"


def as_tensor(value: Any) -> Tensor | None:
    """A number, or numbers in a list, as a tensor; None for anything else."""
    if isinstance(value, torch.return_types.max):
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def close(got: Any, expected: Any) -> bool:
    """Whether two tensors, numbers or lists have the same shape and nearly the same values."""
    one, other = (torch.as_tensor(value).detach().double() for value in (got, expected))
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


LIBRARIES = (
    "<frozen",
    __file__,
    str(Path(__file__).with_name("checks.py")),
    str(Path(c2r_core.__file__).parent),
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
)
"""Where those lines of a traceback come from that the student has not written."""


def raised(error: Exception) -> str:
    """An error, and the student's own line in which it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if not frame.filename.startswith(LIBRARIES)]
    line = f"`{lines[-1]}` raised " if lines and lines[-1] else ""
    return f"{line}{type(error).__name__}: {shown(error)}"
