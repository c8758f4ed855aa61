"""What a trained SAE is worth: a metric is one file with its report, its computation and its name.

    @dataclass(frozen=True)
    class Sparsity:
        "How many latents are active at once."

        l0: float
        "Mean number of active latents per token."

    @metric("sparsity", group="core", headline={"l0": "lower"})
    def measure_sparsity(inputs: Inputs) -> Sparsity:
        ...

The file's name in MODULES is all that is missing; a metric outside of the package only has to be
imported. The report's fields are its JSON and its schema, with the texts under them as descriptions;
a field that can be undefined (NaN) says so in its type, `float | None`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

from c2r_core.errors import needs_extra

needs_extra("evaluate", "pandas", "pydantic", "scipy", "sklearn")

from pydantic import ConfigDict

from c2r_core.artefacts.names import unknown_name

if TYPE_CHECKING:
    from c2r_core.metrics.inputs import Inputs

MODULES = (
    "reconstruction",
    "model_loss",
    "decoder",
    "absorption",
    "assignment",
    "agreement",
    "probing",
    "ablation",
    "detection",
    "auto_interp",
    "meta_sae",
    "ravel",
    "use",
)
"""The files that hold a metric, in the order of a report. A new one goes here."""

Direction = Literal["higher", "lower", "near 1", "none"]


class Headline(NamedTuple):
    """A number that sums a metric up.

    Attributes
    ----------
    better : str
        Which way is better: "higher", "lower", "near 1", or "none" if it is only to be known.
    baseline : str, float or None
        What it is to be compared with: a number, or the path of a field of the same report.
    """

    better: Direction
    baseline: str | float | None = None


@dataclass(frozen=True, eq=False)
class Metric:
    """A registered metric; see `metric`."""

    name: str
    group: str
    measure: Callable[[Inputs], Any]
    report: type
    headline: Mapping[str, Headline]
    needs: str | None
    reads_model: bool


METRICS: dict[str, Metric] = {}
"""All metrics by name."""

REPORT_CONFIG = ConfigDict(use_attribute_docstrings=True, extra="forbid", allow_inf_nan=False)


def metric(
    name: str,
    *,
    group: str,
    headline: Mapping[str, Direction | Headline],
    needs: str | None = None,
    reads_model: bool = True,
) -> Callable[[Callable[[Inputs], Any]], Callable[[Inputs], Any]]:
    """Register a function that takes `Inputs` and returns a report, or raises NotEvaluable.

    Parameters
    ----------
    name : str
        Of its record.
    group : str
        By which it is asked for together with others.
    headline : mapping of str
        Paths of the report's fields, such as "fvu" or "all_latents.pw_mcc", with the direction that is
        better; `Headline` also names a baseline.
    needs : str, optional
        A field of `Options` without which it is only measured where it is asked for by name.
    reads_model : bool
        It reads activations or text, and not the SAE alone.

    Raises
    ------
    TypeError
        If the function's return annotation is not a dataclass, or a field of it has no type.
    ValueError
        If another metric or group has the name, or a headline names no field or no direction.
    """

    def register(measure: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
        report = get_type_hints(measure, localns={"Inputs": Any}).get("return")
        if not is_dataclass(report):
            raise TypeError(
                f"{measure.__name__} returns {report!r}; a metric's return annotation names the "
                "dataclass of its report."
            )
        _describe(report)
        rows = {
            field: Headline(row) if isinstance(row, str) else row for field, row in headline.items()
        }
        _check_name(name, group, measure)
        _check_report(report, rows)
        METRICS[name] = Metric(name, group, measure, report, rows, needs, reads_model)
        return measure

    return register


def _check_name(name: str, group: str, measure: Callable) -> None:
    known = METRICS.get(name)
    if known and (known.measure.__module__, known.measure.__qualname__) != (
        measure.__module__,
        measure.__qualname__,
    ):
        raise ValueError(
            f"A metric {name!r} is there already, in {known.measure.__module__}; take another name."
        )
    if name != group and name in groups():
        raise ValueError(f"{name!r} is the name of a group of metrics; take another name.")


def _check_report(report: type, headline: Mapping[str, Headline]) -> None:
    fields = report.__dataclass_fields__
    for path, row in headline.items():
        if path.split(".")[0] not in fields:
            raise ValueError(f"headline: {unknown_name('field', path, fields)}")
        if row.better not in get_args(Direction):
            raise ValueError(
                f"headline: {unknown_name('direction', row.better, get_args(Direction))}"
            )
    for name, value in vars(report).items():
        if not name.startswith("_") and name not in fields and not hasattr(value, "__get__"):
            raise TypeError(
                f"{report.__name__}.{name} has no type, so it would not be reported; write `{name}: float`."
            )


def groups() -> tuple[str, ...]:
    """Names of all groups."""
    return tuple(dict.fromkeys(of.group for of in METRICS.values()))


def standard_metrics(given: Iterable[str] = ()) -> tuple[str, ...]:
    """All metrics whose needs are among the options given."""
    given = {None, *given}
    return tuple(name for name, of in METRICS.items() if of.needs in given)


def chosen_metrics(names: str | Iterable[str]) -> list[str]:
    """The metrics that names of groups or of single metrics stand for, in the order of METRICS.

    Raises
    ------
    ValueError
        If a name is unknown, or there is none.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    known = list(dict.fromkeys([*groups(), *METRICS]))
    for name in names:
        if name not in known:
            raise ValueError(unknown_name("metric", name, known))
    if not names:
        raise ValueError(f"No metric was asked for; known are {', '.join(known)}.")
    return [name for name, of in METRICS.items() if {name, of.group} & set(names)]


def _describe(kind: Any) -> None:
    """Let pydantic read the texts under a dataclass's fields, and under those of dataclasses within."""
    if is_dataclass(kind) and "__pydantic_config__" not in vars(kind):
        kind.__pydantic_config__ = REPORT_CONFIG
        for hint in get_type_hints(kind).values():
            _describe(hint)
    for argument in get_args(kind):
        _describe(argument)


for _module in MODULES:
    importlib.import_module(f"{__name__}.{_module}")
