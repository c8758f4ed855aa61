"""Settings of nbval, loaded by `make nbval` with `-p tests.nbval_plugin`."""

from __future__ import annotations

import os

from c2r_core.notebook import files
from c2r_core.notebook.runner import KERNEL_ENVIRONMENT

NOT_COMPARED = ("text/html", "image/svg+xml")
"""Ids and styles in HTML are drawn at random; the same table is compared as text."""


def pytest_configure() -> None:
    for name, value in KERNEL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def pytest_collectstart(collector) -> None:
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED


def pytest_ignore_collect(collection_path):
    """A notebook without outputs has nothing to compare; tests/test_hygiene.py says when that is allowed."""
    if collection_path.suffix == ".ipynb" and files.awaits_evidence(files.read(collection_path)):
        print(f"not compared, awaits its evidence: {collection_path.name}")
        return True
    return None
