"""How a study makes its cells: the arguments of what is measured are the cell's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile


@dataclass(frozen=True)
class Study:
    """What the cells of one study have in common."""

    name: str
    profile: Profile
    seeds: Sequence[int]
    device: str = "cpu"

    def cell(
        self,
        name: str,
        measure: Callable[..., Any],
        *,
        modules: Sequence[str] = (),
        inputs: Mapping[str, str] | None = None,
        **given: Any,
    ) -> Cell:
        """The cell with what `measure(seeds=…, device=…, **given)` returns.

        Parameters
        ----------
        name : str
            A title; the cell's name is its `slug`.
        measure : callable
            A function of a module. With what it reaches, it is the code that the cell rests on.
        modules : sequence of str
            Entries beside it that reading imports cannot find.
        inputs : mapping
            Fingerprints of the model and text that are read.
        **given
            Its other arguments, and so the cell's settings: JSON, dataclasses, profile sections, or
            objects with a method `settings()`.
        """
        seeds = list(self.seeds)
        settings = {key: v.settings() if hasattr(v, "settings") else v for key, v in given.items()}
        return Cell(
            study=self.name,
            name=slug(name),
            profile=self.profile.name,
            settings={"seeds": seeds, **settings},
            compute=lambda: measure(seeds=seeds, device=self.device, **given),
            modules=(f"{measure.__module__}:{measure.__qualname__}", *modules),
            inputs=dict(inputs or {}),
            seed=seeds[0],
            device=self.device,
        )
