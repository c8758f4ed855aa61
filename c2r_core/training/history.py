"""What a training recorded of itself."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from c2r_core.errors import needs_extra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FOLLOWERS: ContextVar[tuple[Callable[[dict[str, Any]], None], ...]] = ContextVar(
    "followers", default=()
)
"""Called with every record that a training adds to its history; `c2r_core.training.tracking` sets them."""


class Records(list[dict[str, Any]]):
    """A history's records; what is appended is also given to the followers, what is restored is not."""

    def append(self, record: dict[str, Any]) -> None:
        """Add a record."""
        super().append(record)
        for follow in FOLLOWERS.get():
            follow(record)


@dataclass
class History:
    """Loss terms of a training, an entry every `log_every` steps.

    Each record holds the step, the learning rate, `l0` and the loss terms before weighting, in a
    stack as one list each; of a penalty that was off on this step, the value of the last step on which it
    was on.
    """

    records: list[dict[str, Any]] = field(default_factory=Records)

    def frame(self) -> pd.DataFrame:
        """Long table with the columns step, copy, term, value; copy is 0 outside a stack."""
        needs_extra("evaluate", "pandas")
        import pandas as pd

        rows = []
        for record in self.records:
            for term, value in record.items():
                for copy, one in enumerate(value if isinstance(value, list) else [value]):
                    rows.append({"step": record["step"], "copy": copy, "term": term, "value": one})
        table = pd.DataFrame(rows, columns=["step", "copy", "term", "value"])
        return table[table["term"] != "step"].reset_index(drop=True)

    def plot(
        self, term: str = "reconstruction", ax: Axes | None = None, label: str | None = None
    ) -> Axes:
        """Draw one recorded term over the steps; returns the Axes.

        Of a stack the line is the mean and the band goes from the lowest SAE to the highest, as the legend
        says. `label` names the line, for several histories in one Axes.

        Raises
        ------
        ValueError
            If the term was not recorded; the message lists those that were.
        """
        needs_extra("notebooks", "matplotlib", "seaborn")
        import matplotlib.pyplot as plt
        import seaborn as sns

        table = self.frame()
        known = list(dict.fromkeys(table["term"]))
        if term not in known:
            raise ValueError(f"No term {term!r} was recorded; there are: {', '.join(known)}.")
        if ax is None:
            _, ax = plt.subplots()
        n_copies = table["copy"].max() + 1
        if n_copies > 1:
            label = f"{f'{label}: ' if label else ''}mean and range of {n_copies} SAEs"
        rows = table[table["term"] == term]
        sns.lineplot(rows, x="step", y="value", errorbar=("pi", 100), ax=ax, label=label)
        ax.set(xlabel="optimiser step", ylabel=term.replace("_", " "))
        return ax
