"""`make threads`: is a short training the same when it is run again, and with two threads for one?

Every training runs in a process of its own. Printed is how far the loss at the first and the last step and
the decoder's rows differ, for each architecture.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from c2r_core.data.batches import ToyBatches
from c2r_core.data.toy import FeatureTree
from c2r_core.saes import create_sae
from c2r_core.training import C2R, TrainConfig, train

FEATURES = FeatureTree(d_in=128, n_parents=16, children_per_parent=4, n_singles=48)
BATCH, D_SAE, STEPS = 1024, 2048, 200
ARCHITECTURES = {
    "topk": {"k": 8},
    "batch_topk": {"k": 8},
    "relu": {"l1_weight": 0.02},
    "jump_relu": {"target_l0": 8},
}


def trained(architecture: str, file: str) -> None:
    """Train, and save the loss at every step and the decoder's rows."""
    sae = create_sae(architecture, d_in=128, d_sae=D_SAE, **ARCHITECTURES[architecture])
    config = TrainConfig(steps=STEPS, lr=1e-3, log_every=1)
    history = train(sae, ToyBatches(FEATURES, BATCH), config, [C2R(0.3)], progress=False)
    losses = [record["reconstruction"] for record in history.records]
    torch.save({"losses": torch.tensor(losses), "W_dec": sae.W_dec.detach()}, file)


def run(architecture: str, n_threads: int, file: Path) -> dict[str, torch.Tensor]:
    """The same in a process of its own, with a number of threads that the libraries keep to."""
    settings = {"OMP_NUM_THREADS": str(n_threads), "MKL_DYNAMIC": "FALSE", "OMP_DYNAMIC": "FALSE"}
    command = [sys.executable, __file__, architecture, str(file)]
    subprocess.run(command, env=os.environ | settings, check=True)
    return torch.load(file, weights_only=True)


def main() -> None:
    """Train each architecture with one thread, with one again, and with two; print a table."""
    print(f"{STEPS} steps, batch {BATCH}, {D_SAE} latents; torch {torch.__version__}")
    print(
        "| architecture | threads | to the bit | loss, first step | loss, last step | rows, least cosine |"
    )
    print("|---|---|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            one, *others = (
                (n, run(architecture, n, Path(folder) / f"{architecture}-{i}.pt"))
                for i, n in enumerate((1, 1, 2))
            )
            for n, other in others:
                print(row(architecture, n, one[1], other), flush=True)


def row(architecture: str, n: int, one: dict, other: dict) -> str:
    """A line of the table."""
    same = all(torch.equal(one[name], other[name]) for name in one)
    apart = (one["losses"] / other["losses"] - 1).abs()
    cosine = torch.nn.functional.cosine_similarity(one["W_dec"].double(), other["W_dec"].double())
    numbers = f"{apart[0]:.1e} | {apart[-1]:.1e} | {cosine.min():.6f}"
    return f"| {architecture} | 1 and {n} | {'yes' if same else 'no'} | {numbers} |"


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else trained(*sys.argv[1:])
