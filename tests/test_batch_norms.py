"""Batch norms: planted firing rates give slopes ½ and 1; tables of the choice of λ."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments.batch_norms import (
    FiringBlocks,
    firing_blocks,
    log_slopes,
    mean_batch_norms,
    neighbour_similarities,
    rate_groups,
)
from c2r_core.experiments.strength import (
    RULES,
    _NormSizes,
    batch_size_arms,
    batch_size_table,
    cells,
    distance_from_reference,
    needed_weights,
    norm_rows,
    penalty_exponent,
    spread,
    strength_by_rule,
    strength_table,
    toy_settings,
)
from c2r_core.training import weight_from_strength

SMOKE = load_profile("smoke")

BATCH_SIZES = (64, 128, 256, 512)


class PlantedSAE:
    """Encodes a sample as itself; its latents are the columns."""

    def __init__(self, d_sae: int) -> None:
        self.W_dec = torch.eye(d_sae)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x


def planted(rates: list[float], n: int = 2**16, magnitude: float = 3.0) -> FiringBlocks:
    """Blocks of latents that fire independently with these rates, always as strongly."""
    generator = torch.Generator().manual_seed(0)
    acts = magnitude * (torch.rand(n, len(rates), generator=generator) < torch.tensor(rates))
    return firing_blocks(PlantedSAE(len(rates)), acts.float().split(2**14), size=64)


def test_frequent_latents_grow_with_the_root_of_the_batch_and_rare_ones_with_the_batch():
    blocks = planted([0.5, 0.02, 0.0001, 0.0])
    norms = mean_batch_norms(blocks, BATCH_SIZES)
    frequent, between, rare, silent = log_slopes(BATCH_SIZES, norms).tolist()
    assert frequent == pytest.approx(0.5, abs=0.01)
    assert rare == pytest.approx(1.0, abs=0.05)
    assert 0.55 < between < 0.95 and math.isnan(silent)


def test_both_limits_bound_the_norm_and_are_met():
    rates = [0.5, 0.02, 0.0002]
    blocks = planted(rates)
    norms = mean_batch_norms(blocks, BATCH_SIZES) / blocks.magnitudes
    torch.testing.assert_close(blocks.magnitudes, torch.full((3,), 3.0, dtype=torch.float64))
    expected = torch.tensor(BATCH_SIZES, dtype=torch.float64).unsqueeze(1) * blocks.rates
    assert (norms <= expected * (1 + 1e-9)).all() and (norms <= expected.sqrt() * (1 + 1e-9)).all()
    torch.testing.assert_close(norms[-1, 0], expected[-1, 0].sqrt(), rtol=0.01, atol=0)
    torch.testing.assert_close(norms[0, 2], expected[0, 2], rtol=0.05, atol=0)


def test_a_norm_over_a_joined_batch_is_the_norm_over_its_samples():
    acts = torch.rand(24, 5, generator=torch.Generator().manual_seed(1))
    blocks = firing_blocks(PlantedSAE(5), acts.split(8), size=4)
    norms = mean_batch_norms(blocks, [4, 8, 20])
    torch.testing.assert_close(norms[0], acts.double().reshape(6, 4, 5).norm(dim=1).mean(0))
    torch.testing.assert_close(norms[1], acts.double().reshape(3, 8, 5).norm(dim=1).mean(0))
    torch.testing.assert_close(norms[2], acts[:20].double().norm(dim=0))


def test_what_cannot_be_joined_is_refused():
    sae = PlantedSAE(2)
    with pytest.raises(ValueError, match="6 samples; expected a multiple of 4"):
        firing_blocks(sae, [torch.ones(6, 2)], size=4)
    with pytest.raises(ValueError, match="no samples"):
        firing_blocks(sae, [], size=4)
    blocks = firing_blocks(sae, [torch.ones(8, 2)], size=4)
    for batch_size in (0, 6, 12):
        with pytest.raises(ValueError, match=f"{batch_size}; expected a multiple of 4 up to 8"):
            mean_batch_norms(blocks, [batch_size])


def test_rate_groups_are_ordered_and_equally_large():
    groups = rate_groups(torch.tensor([0.5, 0.0, 0.1, 0.3, 0.2, 0.01]), 2, at_least=0.05)
    assert [group.tolist() for group in groups] == [[2, 4], [3, 0]]
    with pytest.raises(ValueError, match="1 latents fire often enough; expected at least 2"):
        rate_groups(torch.tensor([0.5, 0.0]), 2)


def test_similarities_are_squared_positive_cosines_among_live_latents():
    W_dec = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.1], [0.0, -2.0]])
    similarities = neighbour_similarities(W_dec, torch.tensor([True, True, False, True]))
    expected = torch.tensor([0.5, 0.5, float("nan"), 0.0], dtype=torch.float64)
    torch.testing.assert_close(similarities, expected, equal_nan=True)


# -- the tables of the notebook -------------------------------------------------------------------


def sweep(arm: str, factor: float, lowest: float = 0.0) -> pd.DataFrame:
    """Absorption falls by 0.1 with every factor of ten in the strength; λ is `factor` times that."""
    strengths = [0.001, 0.01, 0.1, 1.0]
    absorption = [max(lowest, value) for value in (0.3, 0.2, 0.1, 0.0)]
    return pd.DataFrame(
        {"arm": arm, "strength": strengths, "absorption": absorption, "seed": 0}
    ).assign(weight=[factor * strength for strength in strengths])


def test_needed_weights_are_interpolated_on_a_logarithmic_scale():
    table = pd.concat([sweep("one", 2.0), sweep("other", 6.0), sweep("never", 1.0, lowest=0.2)])
    needed = needed_weights(table, "absorption", 0.15)
    assert needed["strength"].tolist()[:2] == pytest.approx([0.1**1.5] * 2)
    assert needed["weight"].tolist()[:2] == pytest.approx([2 * 0.1**1.5, 6 * 0.1**1.5])
    assert math.isnan(needed["weight"].iloc[2])
    assert spread(needed["strength"]) == pytest.approx(1)
    assert spread(needed["weight"]) == pytest.approx(3)
    assert needed_weights(table, "absorption", 0.35)["weight"].isna().all(), "there already"
    assert math.isnan(spread([1.0, math.nan]))


def test_toy_settings_change_one_size_each_and_keep_the_strength():
    settings = toy_settings(SMOKE.toy, SMOKE.strength)
    assert list(settings) == ["reference", "B = 64", "240 latents", "k = 4"]
    names = [cell.name for cell in cells(SMOKE)][: 2 * len(settings)]
    table = strength_table({name: [{"seed": 10}] for name in names}, SMOKE)
    assert len(table) == 8 and set(table["strength"]) == {0.1, 0.3}
    weights = table.groupby("arm")["weight"].max()
    reference = 0.3 * (SMOKE.toy.d_sae / SMOKE.toy.batch_size) ** 0.5
    assert weights["reference"] == pytest.approx(reference)
    assert weights["B = 64"] == pytest.approx(reference * 2**0.5)
    assert weights["240 latents"] == pytest.approx(reference * 2**0.5)
    assert weights["k = 4"] == weights["reference"]


def test_norm_table_orders_groups_from_rare_to_frequent():
    rates = [0.5, 0.4, 0.02, 0.01, 0.0002, 0.0003]
    own = SMOKE.strength.model_copy(update={"norm_batch_sizes": [64, 256], "groups": 3})
    table = pd.DataFrame(norm_rows(planted(rates), _NormSizes.of(own)))
    assert table["arm"].drop_duplicates().tolist() == ["1, rarest", "2", "3, most frequent"]
    assert table["rate"].is_monotonic_increasing
    slopes = table.drop_duplicates("arm")["slope"].tolist()
    assert slopes[0] > slopes[1] > slopes[2] == pytest.approx(0.5, abs=0.01)
    assert (table["firings"] == table["rate"] * table["batch_size"]).all()


def test_the_penalty_grows_as_the_norms_of_the_pairs_that_it_weighs():
    blocks = planted([0.5, 0.5, 0.0002, 0.0002])
    for near, exponent in (([0, 1], 0.5), ([2, 3], 1.0)):
        rows = torch.eye(4)
        rows[near[1], near[0]] = 2.0  # only these two are alike
        sae = SimpleNamespace(W_dec=rows)
        assert penalty_exponent(sae, blocks, BATCH_SIZES) == pytest.approx(exponent, abs=0.05)


@pytest.mark.parametrize("reference, batch_size", [(2048, 512), (128, 512)])
def test_rules_take_lambda_to_another_batch_size(reference, batch_size):
    def weight(rule):
        own = strength_by_rule(0.3, rule, batch_size, reference)
        return weight_from_strength(own, batch_size=batch_size, d_sae=64)

    kept = weight_from_strength(0.3, batch_size=reference, d_sae=64)
    assert weight("same λ") == pytest.approx(kept)
    assert weight("λ ∝ 1/√B") == pytest.approx(kept * (reference / batch_size) ** 0.5)
    assert weight("λ ∝ 1/B") == pytest.approx(kept * reference / batch_size)


def test_arms_at_other_batch_sizes_are_small_and_short():
    lm, own = SMOKE.language_model, SMOKE.strength
    arms = batch_size_arms(SMOKE, "cpu")
    assert list(arms) == [(128, "baseline"), (128, "C²R"), *((64, t) for t in ["baseline", *RULES])]
    for (batch_size, _), arm in arms.items():
        assert (arm.batch_size, arm.d_sae, arm.config.steps) == (
            batch_size,
            lm.small_d_sae,
            own.steps,
        )
    assert arms[64, "λ ∝ 1/√B"].c2r_strength == arms[128, "C²R"].c2r_strength


def test_batch_size_table_compares_with_the_baseline_of_equal_batch_size():
    arms = batch_size_arms(SMOKE, "cpu")
    values = {
        slug(f"B = {batch_size}, {title}, seed 10"): [
            {"group": group, "rate": 0.1, "similarity": (number + 1) * (group + 1)}
            for group in range(SMOKE.strength.groups)
        ]
        for number, (batch_size, title) in enumerate(arms)
    }
    table = batch_size_table(values, SMOKE)
    assert (table[table["arm"] == "baseline"]["relative"] == 1).all()
    at = table.groupby(["batch_size", "arm"])["relative"].unique().str[0]
    assert at[128, "C²R"] == 2 and at[64, "same λ"] == pytest.approx(4 / 3)
    factors = distance_from_reference(table, 128)
    assert len(factors) == 9 and set(factors["arm"]) == set(RULES)
    assert factors["factor"].iloc[0] == pytest.approx(4 / 3 / 2)
