"""What is timed is what it says: references equal ours, and memory is that of the call."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from c2r_core.artefacts.cells import compute, differing
from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.forward import activations
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.text import Corpus, Document
from c2r_core.experiments import cells, growth, performance, pipeline, samples, timing
from c2r_core.losses import c2r_loss
from c2r_core.saes import BatchTopKSAE
from c2r_core.training import C2R, TrainConfig, train
from forks import CONTEXT

SMOKE = load_profile("smoke")
SIZES = SMOKE.performance


@pytest.fixture(scope="module")
def values():
    """Memory is measured in forked processes here, which start at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.multiprocessing, "get_context", lambda method: CONTEXT)
        return {cell.name: compute(cell) for cell in cells("performance", SMOKE)}


def test_every_cell_has_times_and_ratios(values):
    assert values["limits"]["gigaflop_per_second"] > 0
    for of in (of for name, of in values.items() if _has_a_reference(name)):
        assert of["seconds_ours"] > 0 and of["seconds_reference"] > 0
        ratios = (of["seconds_ratio_reference" + end] for end in ("_least", "", "_most"))
        least, middle, most = ratios
        assert 0 < least <= middle <= most
    assert "seconds_ratio_without" in values["step-64-c2r-on-every-step"]
    assert "seconds_ratio_without" not in values["step-64-no-penalty"]
    assert 0 < values["step-64-no-penalty"]["seconds_ratio_product"] < 1


def _has_a_reference(name):
    return name != "limits" and not name.startswith(("growth", "memory"))


def test_tables_have_a_row_a_cell(values):
    steps = performance.performance_table(values, "step")
    assert list(steps["what"]) == ["no penalty", "c2r on every step", "c2r on every fifth step"]
    assert list(performance.performance_table(values, "search")["latents"]) == SIZES.search_widths


def test_growth_has_a_row_a_width_and_a_slope(values):
    table = performance.performance_table(values, "growth")
    assert list(table["latents"]) == SIZES.growth_widths
    assert (table["seconds_product"] < table["seconds_ours"]).all()
    planted = pd.DataFrame({"latents": [8, 16, 64], "seconds": [3.0, 12.0, 192.0]})
    assert growth.fitted_slope(planted, "seconds") == pytest.approx(2)
    assert math.isnan(growth.fitted_slope(planted[:1], "seconds"))


def test_the_memory_of_a_step_grows_with_the_weights():
    wide = SIZES.model_copy(update={"d_in": 64})
    n_latents = 2**16
    taken = timing.peak_memory(growth._steps_once, n_latents, wide, 0)
    moments_and_gradient = 3 * 4 * 2 * wide.d_in * n_latents
    assert moments_and_gradient < taken < 3 * moments_and_gradient


def test_every_stage_has_its_memory(values, monkeypatch):
    """Streaming is measured in a process of its own; what is run for the others is run here."""
    table = performance.memory_table(values)
    assert list(table["stage"]) == ["streaming"] and (table["MiB"] > 0).all()
    run = []

    def peak_memory(prepare, *arguments):
        run.append(prepare(*arguments)())
        return 2.0**20

    monkeypatch.setattr(pipeline, "peak_memory", peak_memory)
    sizes = {"harvest_memory_tokens": [512], "evaluation_memory_tokens": [256]}
    profile = SMOKE.model_copy(update={"performance": SIZES.model_copy(update=sizes)})
    of_memory = [cell for cell in cells("performance", profile) if "memory" in cell.name]
    table = performance.memory_table({cell.name: compute(cell) for cell in of_memory})
    assert list(table["stage"]) == ["harvest", "streaming", "evaluation"]
    assert list(table["tokens"]) == ["512", "", "256"] and (table["MiB"] == 1).all()
    assert run[2].fvu > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_bare_model_gives_what_is_harvested(attention):
    model, hook_name = load_language_model(RANDOM), "blocks.0.hook_resid_post"
    tokens = torch.arange(64).reshape(2, 32)
    bare = pipeline.bare_model(model, hook_name, attention)
    assert len(bare.layers) == 1
    with torch.no_grad():
        found = bare(tokens).last_hidden_state
    assert torch.allclose(found, activations(model, tokens, hook_name), atol=1e-5)


def test_a_model_ends_behind_a_block_only():
    model = load_language_model(RANDOM)
    with pytest.raises(ValueError, match="expected blocks.n.hook_resid_post"):
        pipeline.bare_model(model, "blocks.0.hook_mlp_out", "eager")


def test_some_text_is_enough_and_hardly_more():
    documents = tuple(Document(str(i), "one " * 30) for i in range(9))
    assert len(pipeline.some_text(Corpus("many", documents), 50)) == 3


def test_a_machine_s_speed_is_no_difference(values):
    slower = {name: 2 * value for name, value in values["term-64"].items()}
    assert differing(values["term-64"], slower) == []


@pytest.mark.parametrize("every", [0, 1])
def test_the_reference_takes_the_steps_that_ours_takes(every, monkeypatch):
    """From the same weights and batches to the same weights: what is timed is the same work."""
    # Ours bounds the gradient of its own loss, the reference that of the sum.
    monkeypatch.setattr(performance, "CLIP_NORM", 1e9)
    batches = samples.sample_batches(SIZES, 0)
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
    acts, W_dec = samples.term_inputs(64, SIZES, 0)
    assert torch.allclose(performance.published_c2r(acts, W_dec), c2r_loss(acts, W_dec))


def test_memory_is_what_the_call_takes():
    mebibyte = 2**20
    assert timing.peak_memory(_takes, 64 * mebibyte) == pytest.approx(64 * mebibyte, rel=0.2)


def _takes(n_bytes):
    return lambda: torch.ones(n_bytes // 4)


def test_training_is_timed_step_by_step():
    clock = timing.Clock(samples.sample_batches(SIZES, 0), "cpu")
    sae = BatchTopKSAE(SIZES.d_in, 24, k=SIZES.k)
    train(sae, clock, TrainConfig(steps=3, mean_square_norm=None), progress=False)
    assert len(clock.asked) == 4  # the first batch is also read to start from
    assert len(clock.last(2)) == 2 and min(clock.last(2)) > 0
