"""Settings of nbval, loaded by `make nbval` with `-p tests.nbval_plugin`."""

from __future__ import annotations

import os
from pathlib import Path

from c2r_core.notebook import files
from c2r_core.notebook.runner import KERNEL_ENVIRONMENT
from tests.forks import fork_kernels

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NOT_COMPARED = ("text/html", "image/svg+xml")
"""Ids and styles in HTML are drawn at random; the same table is compared as text."""


def pytest_configure() -> None:
    for name, value in KERNEL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    fork_kernels()


def pytest_report_header() -> list[str]:
    """Said here, since workers beside each other do not print."""
    waiting = [path.name for path in sorted(NOTEBOOKS.glob("*.ipynb")) if _awaits(path)]
    return [f"not compared, awaits its evidence: {name}" for name in waiting]


def pytest_collectstart(collector) -> None:
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A notebook without outputs has nothing to compare; tests/test_hygiene.py says when that is allowed."""
    return collection_path.suffix == ".ipynb" and _awaits(collection_path) or None


def _awaits(path: Path) -> bool:
    return files.awaits_evidence(files.read(path))
