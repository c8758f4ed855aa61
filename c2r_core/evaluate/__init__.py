"""Measure any SAE: `evaluate` in Python, `c2r evaluate PATH` in a shell.

The only way in which the project measures an SAE on a language model. What is measured is in
`c2r_core.metrics`, a file for each metric.
"""

from c2r_core.errors import needs_extra

needs_extra("evaluate", "pandas", "pydantic", "scipy", "sklearn")

from c2r_core.evaluate.compare import compare
from c2r_core.evaluate.contexts import strongest_contexts
from c2r_core.evaluate.evaluation import evaluate
from c2r_core.evaluate.report import Report, json_schema, read_report, write_report
from c2r_core.evaluate.saebench import saebench_results, write_saebench
from c2r_core.metrics import METRICS
from c2r_core.metrics.inputs import Options

__all__ = [
    "METRICS",
    "Options",
    "Report",
    "compare",
    "evaluate",
    "json_schema",
    "read_report",
    "saebench_results",
    "strongest_contexts",
    "write_report",
    "write_saebench",
]
