"""`c2r COMMAND …`, or `python -m c2r_core COMMAND …`: everything that is run from a shell.

Each command is a module with a `main(arguments) -> exit status`, imported when it is asked for.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import c2r_core
from c2r_core.errors import MissingExtra


class Command(NamedTuple):
    """Where a command lives, and its line in the help."""

    module: str
    help: str
    passes_name: bool = False
    """Whether the module has several commands and is told which."""


COMMANDS = {
    "evaluate": Command("c2r_core.evaluate.__main__", "measure an SAE; headline numbers, a report"),
    "compare": Command("c2r_core.evaluate.compare", "two reports side by side"),
    "contexts": Command("c2r_core.evaluate.contexts", "the text on which one latent fires hardest"),
    "browse": Command("c2r_core.browser.__main__", "an SAE's latents as pages to look at"),
    "playground": Command(
        "c2r_core.playground.__main__", "sliders over small SAEs on toy features, one page"
    ),
    "export": Command("c2r_core.formats.__main__", "an SAE in another library's format"),
    "saebench": Command("c2r_core.evaluate.saebench", "a report as SAEBench's result files"),
    "push": Command("c2r_core.hub.__main__", "an SAE to the Hugging Face hub, with a card", True),
    "pull": Command("c2r_core.hub.__main__", "an SAE from the Hugging Face hub", True),
    "data": Command("c2r_core.data.smollm2", "fetch the small language model, once"),
    "status": Command(
        "c2r_core.experiments.__main__", "which results are current, stale or missing", True
    ),
    "plan": Command(
        "c2r_core.experiments.__main__", "what a profile needs here, and what it costs", True
    ),
    "harvest": Command(
        "c2r_core.experiments.__main__", "store the activations that a profile trains on", True
    ),
    "run": Command("c2r_core.experiments.__main__", "compute the cells of studies", True),
    "verify": Command(
        "c2r_core.experiments.__main__", "compute results again, compare with those kept", True
    ),
    "same": Command(
        "c2r_core.experiments.__main__", "show that a change of code altered no number", True
    ),
    "prune": Command(
        "c2r_core.experiments.__main__", "remove from the cache what no code here would find", True
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for a command that does not exist."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0
    if given[0] == "--version":
        print(f"c2r {c2r_core.__version__}")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        print(f"c2r has no command {name!r}.\n\n{_help()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        module = import_module(command.module)
    except MissingExtra as error:
        print(f"c2r {name}: {error}", file=sys.stderr)
        return 2
    try:
        status = module.main([name, *rest] if command.passes_name else rest)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 1
    return status


def _reader_has_gone() -> bool:
    """Whether what is printed goes to a reader, such as `head`, that has seen enough; then no more is."""
    out, polled = sys.stdout.fileno(), select.poll()
    polled.register(out, 0)  # that a pipe has no reader is told in any case
    if not polled.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)  # for Python's own last flush
    return True


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: c2r COMMAND …      (c2r COMMAND --help says more)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
