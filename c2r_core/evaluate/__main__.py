"""`c2r evaluate PATH`: measure an SAE folder and write one JSON report.

Exit status: 0 if every metric was evaluated; 3 if the report is there, but records a metric that
could not be; 2 if there is no report, because there was nothing to measure or to measure on, or no place
to write it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from c2r_core.artefacts.cache import DamagedArtefact
from c2r_core.evaluate import METRICS, Options, Report, json_schema, write_report
from c2r_core.evaluate.compare import main as compare_reports
from c2r_core.evaluate.compare import number
from c2r_core.evaluate.evaluation import prepare
from c2r_core.evaluate.options import add_reading_options, unlike_training
from c2r_core.evaluate.plugins import add_plugin_option, import_plugins
from c2r_core.metrics import groups
from c2r_core.metrics.endpoint import Endpoint

COMPLETE, NO_REPORT, INCOMPLETE = 0, 2, 3


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return compare_reports(arguments[1:])
    parser = _parser()
    given = parser.parse_args(arguments)
    import_plugins(parser, given.plugin)
    if given.schema:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return COMPLETE
    if given.path is None:
        parser.error("the folder of an SAE is missing")
    random.seed(given.seed)
    np.random.seed(given.seed % 2**32)
    torch.manual_seed(given.seed)
    started, out = time.monotonic(), Path(given.out)
    kept = out.with_name(f"{out.name}.unfinished")
    try:
        evaluation = prepare(
            given.path,
            model=given.model,
            hook_name=given.hook,
            corpus=given.corpus,
            metrics=given.metrics,
            options=_options(given, kept),
        )
    except (ValueError, OSError) as error:
        print(f"No report: {error}", file=sys.stderr)
        return NO_REPORT
    print(f"Measuring {', '.join(evaluation.names)} …", file=sys.stderr, flush=True)
    try:
        report = evaluation.measure(lambda line: print(f"  {line}", file=sys.stderr, flush=True))
        write_report(report, out)
    except (OSError, DamagedArtefact) as error:
        print(f"No report: {error}", file=sys.stderr)
        return NO_REPORT
    kept.unlink(missing_ok=True)
    _print(report)
    print(f"{out} ({time.monotonic() - started:.0f} s)")
    return INCOMPLETE if report.not_evaluable else COMPLETE


def _print(report: Report) -> None:
    for sentence in unlike_training(report.sae.stated, report.model, report.text):
        print(sentence)
    rows = report.headline()
    width = max((len(f"{row.metric}.{row.field}") for row in rows), default=0)
    for row in rows:
        notes = [] if row.better == "none" else [f"{row.better} is better"]
        notes += [] if row.baseline is None else [f"baseline {number(row.baseline)}"]
        name = f"{row.metric}.{row.field}"
        print(f"{name:{width}}  {number(row.value):>9}  {', '.join(notes)}".rstrip())
    for name, warning in report.warnings.items():
        print(f"Warning, {name}: {warning}")
    for name, reason in report.not_evaluable.items():
        print(f"{name}: not evaluable. {reason}")


def _options(given: argparse.Namespace, kept: Path) -> Options:
    endpoint = None
    if given.endpoint is not None:
        endpoint = Endpoint(
            given.endpoint, given.endpoint_model, requests_per_minute=given.endpoint_rpm
        )
    return Options(
        profile=given.profile,
        seed=given.seed,
        device=given.device,
        against=given.against,
        endpoint=endpoint,
        ravel=given.ravel,
        keep=kept,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="c2r evaluate",
        description="Measure an SAE on held-out documents and write one JSON report.",
        epilog="Exit status: 0 if every metric was evaluated, 3 if the report records one that could "
        "not be, 2 if there is no report. An evaluation that was interrupted goes on when started "
        "again with the same --out.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="folder of an SAE: of this package, SAELens or dictionary_learning",
    )
    add_reading_options(parser)
    parser.add_argument("--out", default="report.json", help="default: %(default)s")
    parser.add_argument(
        "--metrics",
        help=f"groups ({', '.join(groups())}) or single metrics ({', '.join(METRICS)}), separated by "
        "commas; default: all, as far as the other options allow",
    )
    add_plugin_option(parser)
    parser.add_argument("--endpoint", help="URL of a chat-completions server, for AutoInterp")
    parser.add_argument("--endpoint-model", default="", help="the model's name there")
    parser.add_argument(
        "--endpoint-rpm", type=float, default=60, help="requests a minute; default: %(default)s"
    )
    parser.add_argument("--ravel", help="folder of RAVEL's public data; default: own cities")
    parser.add_argument("--against", help="folder of another SAE, to compare with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--schema", action="store_true", help="print the report's JSON schema")
    return parser


if __name__ == "__main__":
    sys.exit(main())
