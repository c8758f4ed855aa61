"""A stranger's afternoon: a new architecture, regulariser and metric, each one file and one line.

The three files lie in a temporary folder; the line is their import. Nothing else is touched: no
profile, no list, no schema, no tuning.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from conftest import PROJECT

ARCHITECTURE = '''
"""Activations that are linear above a threshold of 0.1, and zero below."""

from c2r_core.saes import SAE, register


@register
class HardShrinkSAE(SAE):
    """Keeps what exceeds 0.1."""

    architecture = "hard_shrink"

    def activate(self, pre_acts):
        return pre_acts * (pre_acts > 0.1)
'''

REGULARISER = '''
"""Busy latents cost: the largest norm of any latent over the batch."""

from dataclasses import dataclass
from typing import ClassVar

from c2r_core.saes.sparse import latent_norms
from c2r_core.training import Regulariser, register_regulariser


@register_regulariser
@dataclass(frozen=True)
class Busiest(Regulariser):
    """The norm of the busiest latent."""

    name: ClassVar[str] = "busiest"

    def __call__(self, feature_acts, W_dec, generator):
        return latent_norms(feature_acts).amax(-1)
'''

METRIC = '''
"""How evenly the latents share the work."""

from dataclasses import dataclass

from c2r_core.metrics import metric
from c2r_core.metrics.inputs import Inputs


@dataclass(frozen=True)
class BusiestReport:
    """Who fires most."""

    busiest_share: float
    """Share of all firings that are the busiest latent's."""


@metric("busiest", group="own", headline={"busiest_share": "lower"})
def measure(inputs: Inputs) -> BusiestReport:
    counts = sum((inputs.sae.encode(x) > 0).sum(0) for x in inputs.activations.chunks(inputs.chunk))
    return BusiestReport(float(counts.max() / counts.sum().clamp(min=1)))
'''

SESSION = """
import torch

import own_architecture
import own_metric
import own_regulariser
from c2r_core import TrainConfig, create_regulariser, create_sae, fold_norm_factor, load_sae, save_sae, train
from c2r_core.data.batches import StoreBatches
from c2r_core.data.harvest import HarvestConfig, harvest
from c2r_core.data.language_models import load_language_model
from c2r_core.data.text import Corpus, Document, split_documents
from c2r_core.evaluate import Options, compare, evaluate, read_report, write_report

words = "one two three four five six seven eight nine ten ".split()
corpus = Corpus("tiny", tuple(
    Document(str(n), " ".join(words[(n * i) % 10] for i in range(1, 400))) for n in range(1, 11)
))
model = load_language_model("random-2-layer")
training, _ = split_documents(corpus)
store = harvest(
    model, training, HarvestConfig("blocks.1.hook_resid_post", context_size=32, max_tokens=1024), "store"
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
    """Three files of somebody who uses the package."""
    folder = tmp_path_factory.mktemp("own")
    files = {"architecture": ARCHITECTURE, "regulariser": REGULARISER, "metric": METRIC}
    for name, text in files.items():
        (folder / f"own_{name}.py").write_text(text, encoding="utf-8")
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
