"""Measure any SAE: `evaluate` in Python, `python -m c2r_core.evaluate PATH` in a shell.

This room knows all the others and nobody knows it. A further metric is a function with its values
and one line in `metrics.METRICS`.
"""

from c2r_core.errors import needs_extra

needs_extra("evaluate", "pandas", "pydantic", "scipy", "sklearn")

from c2r_core.evaluate.evaluation import Report, evaluate, json_schema, write_report
from c2r_core.evaluate.metrics import METRICS

__all__ = ["METRICS", "Report", "evaluate", "json_schema", "write_report"]
