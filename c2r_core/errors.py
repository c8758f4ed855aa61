"""The one exception that an evaluation writes down instead of passing on."""

from __future__ import annotations


class NotEvaluable(ValueError):
    """An SAE, a model or a text does not allow a measurement; the message says why.

    Raised on purpose, and the only exception that becomes a record of a report. Any other error is
    one of the program and surfaces.
    """
