"""How a study makes its cells: the arguments of what is measured are the cell's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile


class NamedArm(NamedTuple):
    """An arm with a cell of its own: the cell's title, the arm, and what a table says about it."""

    name: str
    arm: Any
    about: Mapping[str, Any]


def arm_table(values: Mapping[str, Any], arms: Iterable[NamedArm]) -> pd.DataFrame:
    """One row an arm and seed: what is said about the arm, seed, metrics."""
    return pd.DataFrame(
        [dict(about) | row for name, _, about in arms for row in values[slug(name)]]
    )


@dataclass(frozen=True)
class Study:
    """What the cells of one study have in common."""

    name: str
    profile: Profile
    seeds: Sequence[int]
    device: str = "cpu"

    def cell(
        self, name: str, measure: Callable[..., Any], *, modules: Sequence[str] = (), **given: Any
    ) -> Cell:
        """The cell with what `measure(seeds=…, device=…, **given)` returns.

        Its name is the `slug` of a title. Measure is a function of a module: with what it reaches, and
        `modules`, which reading imports cannot find, it is the code that the cell rests on. What is given
        are the cell's settings: JSON, dataclasses, profile sections, or objects with a method `settings()`;
        one with a method `inputs()` has the fingerprints of the model and text that are read, one with a
        method `code()` the modules of what it takes by name.
        """
        seeds, inputs, modules = list(self.seeds), {}, list(modules)
        for value in given.values():
            inputs |= value.inputs() if hasattr(value, "inputs") else {}
            modules += value.code() if hasattr(value, "code") else []
        settings = {key: v.settings() if hasattr(v, "settings") else v for key, v in given.items()}
        return Cell(
            study=self.name,
            name=slug(name),
            profile=self.profile.name,
            settings={"seeds": seeds, **settings},
            compute=lambda: measure(seeds=seeds, device=self.device, **given),
            modules=(f"{measure.__module__}:{measure.__qualname__}", *modules),
            inputs=inputs,
            seed=seeds[0],
            device=self.device,
        )

    def cells(
        self, arms: Iterable[NamedArm], measure: Callable[..., Any], **given: Any
    ) -> list[Cell]:
        """A cell for each arm; arms of one name are one."""
        by_name = {slug(name): arm for name, arm, _ in arms}
        return [self.cell(name, measure, arm=arm, **given) for name, arm in by_name.items()]
