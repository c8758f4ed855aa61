"""The errors that mean something to a caller."""

from __future__ import annotations

import sys
from importlib.util import find_spec


class NotEvaluable(ValueError):
    """Raised on purpose where a metric, SAE, model or text does not allow a measurement.

    The only exception that becomes a record in a report; every other one surfaces.
    """


class MissingExtra(ImportError):
    """A part of the package was imported without the extra that it needs."""


def needs_extra(extra: str, *modules: str) -> None:
    """Raise `MissingExtra`, which names what to install, unless all modules can be found.

    Parameters
    ----------
    extra : str
        An optional dependency group of pyproject.toml, such as "lm".
    modules : str
        Top-level modules that come with it; they are looked for, not imported.
    """
    missing = [name for name in modules if not _is_there(name)]
    if missing:
        names = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        raise MissingExtra(
            f"{names} cannot be imported. This part of c2r_core needs the extra {extra!r}: "
            f"pip install 'c2r-core[{extra}]'",
            name=missing[0],
        )


def _is_there(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
