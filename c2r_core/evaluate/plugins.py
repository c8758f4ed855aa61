"""The option --plugin: metrics from a user's own module or file."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Give a command the option."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module or .py file with further metrics, to be imported first; may be repeated",
    )


def import_plugins(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Import modules by name or by file; one in the current folder is found too.

    The command ends with the parser's error where there is none.
    """
    for name in names:
        plugin = Path(name)
        sys.path.insert(0, str(plugin.parent.resolve()))
        try:
            importlib.import_module(plugin.name.removesuffix(".py"))
        except ModuleNotFoundError as error:
            parser.error(
                f"--plugin {name}: {error}; name a file, such as own_metric.py, or a module"
            )
