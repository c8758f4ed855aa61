"""Every notebook runs to its end under the smoke profile; its checks hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from c2r_core.notebook import files as notebook_files
from c2r_core.notebook import runner
from conftest import NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_smoke(notebook, tmp_path):
    out = tmp_path / notebook.name
    runner.run(notebook, out, {"PROFILE": "smoke"})
    lines = notebook_files.verdicts(notebook_files.read(out))
    assert [line for line in lines if line.kind != "lead"]
    assert [line.printed for line in lines if line.verdict == "FAILS"] == []
    results = Path(os.environ["C2R_RUNS"]) / "smoke" / f"{notebook.stem}.json"
    assert len(json.loads(results.read_text())["claims"]) == len(lines)
