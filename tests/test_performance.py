"""What is timed is what it says: references equal ours, and memory is that of the call."""

from __future__ import annotations

import pytest
import torch

from c2r_core.artefacts.cells import compute, differing
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, performance
from c2r_core.losses import c2r_loss
from c2r_core.saes import BatchTopKSAE
from c2r_core.training import C2R, TrainConfig, train

SMOKE = load_profile("smoke")
SIZES = SMOKE.performance


@pytest.fixture(scope="module")
def values():
    return {cell.name: compute(cell) for cell in cells("performance", SMOKE)}


def test_every_cell_has_times_and_ratios(values):
    assert values["limits"]["gigaflop_per_second"] > 0
    timed = [of for name, of in values.items() if name != "limits"]
    for of in timed:
        assert of["seconds_ours"] > 0 and of["seconds_reference"] > 0
        ratios = (of["seconds_ratio_reference" + end] for end in ("_least", "", "_most"))
        least, middle, most = ratios
        assert 0 < least <= middle <= most
    assert "seconds_ratio_without" in values["step-64-c2r-on-every-step"]
    assert "seconds_ratio_without" not in values["step-64-no-penalty"]


def test_tables_have_a_row_a_cell(values):
    steps = performance.performance_table(values, "step")
    assert list(steps["what"]) == ["no penalty", "c2r on every step", "c2r on every fifth step"]
    assert list(performance.performance_table(values, "search")["latents"]) == SIZES.search_widths


def test_a_machine_s_speed_is_no_difference(values):
    slower = {name: 2 * value for name, value in values["term-64"].items()}
    assert differing(values["term-64"], slower) == []


@pytest.mark.parametrize("every", [0, 1])
def test_the_reference_takes_the_steps_that_ours_takes(every, monkeypatch):
    """From the same weights and batches to the same weights: what is timed is the same work."""
    # Ours bounds the gradient of its own loss, the reference that of the sum.
    monkeypatch.setattr(performance, "CLIP_NORM", 1e9)
    batches = performance._batches(SIZES, 0)
    ours = BatchTopKSAE(SIZES.d_in, 24, k=SIZES.k, seed=3)
    with torch.no_grad():
        ours.b_dec.copy_(batches[0].mean(0))
    plain = performance.PlainTraining(ours, every)
    config = TrainConfig(
        steps=500,
        warmup_share=0,
        decay_share=0,
        clip_norm=1e9,
        aux_k_coefficient=0.0,
        mean_square_norm=None,
    )
    from c2r_core.training.trainer import _Run

    penalties = [C2R(performance.WEIGHT, every=every)] if every else []
    run = _Run(ours, lambda step: batches[0], config, penalties, None)
    with torch.no_grad():
        ours.b_dec.copy_(plain.parameters[3])
    run.step = 100  # beyond the steps in which k falls to its target
    for step in range(4):
        run.take_step(batches[step])
        plain.step(batches[step], step)
    parts = (ours.W_enc, ours.b_enc, ours.W_dec, ours.b_dec)
    for own, other in zip(parts, plain.parameters, strict=True):
        assert torch.allclose(own, other, atol=1e-5)


def test_the_published_form_is_the_loss():
    acts, W_dec = performance._term_inputs(64, SIZES, 0)
    assert torch.allclose(performance.published_c2r(acts, W_dec), c2r_loss(acts, W_dec))


def test_memory_is_what_the_call_takes():
    mebibyte = 2**20
    assert performance.peak_memory(_takes, 64 * mebibyte) == pytest.approx(64 * mebibyte, rel=0.2)


def _takes(n_bytes):
    return lambda: torch.ones(n_bytes // 4)


def test_training_is_timed_step_by_step():
    clock = performance._Clock(performance._batches(SIZES, 0), "cpu")
    sae = BatchTopKSAE(SIZES.d_in, 24, k=SIZES.k)
    train(sae, clock, TrainConfig(steps=3, mean_square_norm=None), progress=False)
    assert len(clock.asked) == 4  # the first batch is also read to start from
    assert clock.seconds_of_last(2) > 0
