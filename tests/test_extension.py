"""A stranger's afternoon: a new architecture, regulariser and metric, each one file and one line.

The three files are the README's, in a temporary folder; the line is their import. Nothing else is
touched: no profile, no list, no schema, no tuning.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from c2r_core.artefacts import fingerprints as fingerprints_module
from c2r_core.artefacts.fingerprints import fingerprints
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import STUDIES, cells
from conftest import PROJECT

SESSION = """
import torch

import own_architecture
import own_metric
import own_regulariser
from c2r_core import TrainConfig, create_regulariser, create_sae, fold_norm_factor, load_sae, save_sae, train
from c2r_core.data.batches import StoreBatches
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import load_language_model
from c2r_core.data.store import HarvestConfig
from c2r_core.data.text import Corpus, Document, split_documents
from c2r_core.evaluate import Options, compare, evaluate, read_report, write_report

words = "one two three four five six seven eight nine ten ".split()
corpus = Corpus("tiny", tuple(
    Document(str(n), " ".join(words[(n * i) % 10] for i in range(1, 400))) for n in range(1, 11)
))
model = load_language_model("random-2-layer")
training, _ = split_documents(corpus)
store = harvest(
    model,
    training,
    HarvestConfig(hook_name="blocks.1.hook_resid_post", context_size=32, max_tokens=1024),
    "store",
)
reports = []
for weight in (0.0, 1.0):
    sae = create_sae("hard_shrink", d_in=store.d_in, d_sae=96, seed=0)
    penalty = create_regulariser("busiest", weight=weight)
    history = train(sae, StoreBatches(store, 64, seed=0), TrainConfig(steps=20), [penalty], progress=False)
    assert "busiest" in history.records[0]
    save_sae(sae, f"sae{weight}")
    again = load_sae(f"sae{weight}")
    x = store.batch(range(8))
    assert fold_norm_factor(again).encode(x).equal(fold_norm_factor(sae).encode(x))
    report = evaluate(
        f"sae{weight}", model=model, hook_name="blocks.1.hook_resid_post", corpus=corpus,
        metrics=["own", "reconstruction"], options=Options(profile="smoke"),
    )
    write_report(report, f"report{weight}.json")
    reports.append(read_report(f"report{weight}.json"))
headline = [row for row in reports[0].headline() if row.metric == "busiest"]
assert [(row.field, row.better) for row in headline] == [("busiest_share", "lower")], headline
compared = [row for row in compare(*reports) if row.metric == "busiest"]
assert len(compared) == 1
print(reports[0]["busiest"].busiest_share)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of somebody who uses the package, as the README shows them."""
    folder = tmp_path_factory.mktemp("own")
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"```python\n# (own_\w+\.py)\n(.*?)```", readme, flags=re.DOTALL)
    assert len(files) == 3
    for name, code in files:
        (folder / name).write_text(code, encoding="utf-8")
    return folder


def test_newcomers_train_save_load_and_are_measured(folder):
    outcome = subprocess.run(
        [sys.executable, "-c", SESSION],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(PROJECT)])},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    share = float(outcome.stdout.split()[-1])
    assert 0 < share < 1
    report = json.loads((folder / "report0.0.json").read_text(encoding="utf-8"))
    assert report["metrics"]["busiest"]["values"] == {"busiest_share": share}


LINES = {
    "own_architecture": "saes",
    "own_regulariser": "training",
    "own_metric": "metrics",
}
"""By file, the room that it goes to, and whose __init__ gets its line."""


def test_newcomers_in_the_package_make_no_cell_stale(folder, monkeypatch, tmp_path):
    smoke = load_profile("smoke")
    made = {f"{study}/{one.name}": one for study in STUDIES for one in cells(study, smoke)}
    before = {name: fingerprints(one.modules) for name, one in made.items()}
    package = tmp_path / "c2r_core"
    shutil.copytree(PROJECT / "c2r_core", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, room in LINES.items():
        shutil.copy(folder / f"{name}.py", package / room)
        with (package / room / "__init__.py").open("a", encoding="utf-8") as file:
            file.write(f"from c2r_core.{room} import {name}  # noqa\n")
    monkeypatch.setattr(fingerprints_module, "PACKAGE", package)
    assert "c2r_core.saes.own_architecture" in fingerprints(["c2r_core.saes"]), "the copy is read"
    for name, one in made.items():
        assert fingerprints(one.modules) == before[name], name
