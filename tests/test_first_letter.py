from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from c2r_core.metrics.first_letter import absorption

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["one_latent", "three_latents"])
def test_absorption_equals_saebench(name):
    golden = {key: torch.from_numpy(v) for key, v in np.load(DATA / f"absorption_{name}.npz").items()}
    arguments = ("activations", "feature_acts", "W_dec", "probe", "split_latents")
    fraction, full = absorption(*(golden[key] for key in arguments))
    torch.testing.assert_close(fraction, golden["absorption_fraction"], atol=1e-5, rtol=0)
    assert torch.equal(full, golden["full_absorption"])
