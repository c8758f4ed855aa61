from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch

from c2r_core.data.forward import activations
from c2r_core.data.language_models import load_language_model
from c2r_core.metrics.model_loss import compare_cross_entropy, cross_entropy_recovered

HOOK = "blocks.0.hook_resid_post"


class Copier:
    """An SAE that multiplies by `scale`: 1 is perfect, 0 ablates."""

    def __init__(self, scale=1.0, offset=0.0):
        self.scale, self.offset = scale, offset

    def encode(self, x):
        return x

    def decode(self, feature_acts):
        return feature_acts * self.scale + self.offset


@pytest.fixture(scope="module")
def model():
    return load_language_model("random-2-layer")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 40_000, (5, 12), generator=torch.Generator().manual_seed(0))


def test_perfect_and_ablating_saes_mark_the_ends(model, tokens):
    mean = activations(model, tokens, HOOK)[:, 1:].flatten(0, 1).mean(0)
    saes = {"perfect": Copier(), "zero": Copier(0.0), "mean": Copier(0.0, mean)}
    reports = compare_cross_entropy(model, saes, tokens, HOOK, mean_activation=mean)
    perfect = reports["perfect"]
    assert perfect.ce_sae == pytest.approx(perfect.ce_model, abs=1e-5)
    assert perfect.recovered_zero == pytest.approx(1, abs=1e-5)
    assert perfect.recovered_mean == pytest.approx(1, abs=1e-5)
    assert perfect.kl == pytest.approx(0, abs=1e-6)
    assert reports["zero"].recovered_zero == pytest.approx(0, abs=1e-5)
    assert reports["mean"].recovered_mean == pytest.approx(0, abs=1e-5)
    assert reports["zero"].kl > 0.01
    assert abs(perfect.ce_zero - perfect.ce_model) > 0.01


def test_cross_entropy_is_the_models_own_loss(model, tokens):
    report = cross_entropy_recovered(model, Copier(0.5), tokens, HOOK)
    with torch.no_grad():
        assert report.ce_model == pytest.approx(float(model(tokens, return_type="loss")), abs=1e-5)
    assert report.n_tokens == 5 * 11


def test_kl_and_loss_of_a_reconstruction_by_hand(model, tokens):
    def halve_all_but_first(activation, hook):
        return torch.cat([activation[:, :1], 0.5 * activation[:, 1:]], dim=1)

    with torch.no_grad():
        log_p = model(tokens).log_softmax(-1)[:, :-1]
        edited = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, halve_all_but_first)])
        log_q = edited.log_softmax(-1)[:, :-1]
    report = cross_entropy_recovered(model, Copier(0.5), tokens, HOOK)
    loss = torch.nn.functional.nll_loss(log_q.flatten(0, 1), tokens[:, 1:].flatten())
    assert report.ce_sae == pytest.approx(float(loss), abs=1e-5)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / 55
    assert report.kl == pytest.approx(float(kl), rel=1e-4)


def test_tokens_dropped_in_training_keep_their_activation_in_every_arm(model, tokens):
    norms = activations(model, tokens, HOOK)[:, 1:].norm(dim=-1)
    report = cross_entropy_recovered(model, Copier(), tokens, HOOK)
    assert report.n_unchanged == 5  # the first of each context
    halfway = cross_entropy_recovered(
        model,
        Copier(0.0),
        tokens,
        HOOK,
        drop_norm_ratio=1.0001,
        mean_activation=torch.zeros(64),
    )
    assert halfway.n_unchanged == 5 + int((norms > 1.0001 * norms.flatten().median()).sum())
    assert halfway.ce_sae == halfway.ce_zero == halfway.ce_mean != report.ce_zero
    nothing = cross_entropy_recovered(
        model, Copier(0.0), tokens, HOOK, median_norm=1e-9, mean_activation=torch.zeros(64)
    )
    assert nothing.n_unchanged == 60
    assert nothing.ce_sae == nothing.ce_zero == nothing.ce_model
    assert nothing.recovered_zero is None and nothing.recovered_mean is None


def test_measured_median_and_mean_equal_given_ones(model, tokens):
    x = activations(model, tokens, HOOK)[:, 1:].flatten(0, 1)
    given = cross_entropy_recovered(
        model,
        Copier(0.8),
        tokens,
        HOOK,
        median_norm=float(x.norm(dim=1).quantile(0.5)),
        mean_activation=x.mean(0),
    )
    measured = cross_entropy_recovered(model, Copier(0.8), tokens, HOOK)
    assert astuple(measured) == pytest.approx(astuple(given), abs=1e-5)


def test_batches_and_other_saes_do_not_matter(model, tokens):
    alone = cross_entropy_recovered(model, Copier(0.8), tokens, HOOK, batch_size=5)
    saes = {"other": Copier(0.1), "this": Copier(0.8)}
    among = compare_cross_entropy(model, saes, tokens, HOOK, batch_size=2)
    assert list(among) == ["other", "this"]
    assert astuple(among["this"]) == pytest.approx(astuple(alone), abs=1e-5)
    assert among["other"].ce_sae != among["this"].ce_sae


def test_bfloat16_is_near_float32(model, tokens):
    float32 = cross_entropy_recovered(model, Copier(0.5), tokens, HOOK)
    bfloat16 = cross_entropy_recovered(model, Copier(0.5), tokens, HOOK, precision="bfloat16")
    assert replace(bfloat16, kl=0) != replace(float32, kl=0)
    assert bfloat16.ce_sae == pytest.approx(float32.ce_sae, rel=0.01)


@pytest.mark.parametrize(
    ("sae", "shape", "hook_name", "message"),
    [
        (Copier(), (12,), HOOK, "expected .n_contexts, context_size."),
        (Copier(), (3, 1), HOOK, "at least two tokens"),
        (Copier(), (3, 4), "blocks.0.hook_resid_pots", "hook_resid_post"),
        (Copier(float("nan")), (3, 4), HOOK, "NaN or infinite"),
        (Copier(torch.ones(2, 1, 1)), (3, 4), HOOK, "same shape"),
    ],
)
def test_bad_input_is_explained(model, sae, shape, hook_name, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy_recovered(model, sae, torch.ones(shape, dtype=torch.long), hook_name)


def test_every_token_dropped_is_explained(model, tokens):
    with pytest.raises(ValueError, match="Every token keeps its activation"):
        cross_entropy_recovered(model, Copier(), tokens, HOOK, median_norm=1e-9)
