from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch

from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.forward import activations
from c2r_core.data.language_models import load_language_model
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import model_loss
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.model_loss import (
    ModelMarks,
    measure_model_preservation,
    model_marks,
    model_preservation,
)

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
    marks = model_marks(model, tokens, HOOK, mean_activation=mean)
    perfect, zero, to_mean = (
        model_preservation(model, sae, tokens, HOOK, marks=marks)
        for sae in (Copier(), Copier(0.0), Copier(0.0, mean))
    )
    assert perfect.ce_loss_with_sae == pytest.approx(perfect.ce_loss_without_sae, abs=1e-5)
    assert perfect.ce_loss_score == pytest.approx(1, abs=1e-5)
    assert perfect.ce_loss_score_mean_ablation == pytest.approx(1, abs=1e-5)
    assert perfect.kl_div_with_sae == pytest.approx(0, abs=1e-6)
    assert perfect.kl_div_score == pytest.approx(1, abs=1e-5)
    assert zero.ce_loss_score == zero.kl_div_score == 0
    assert to_mean.ce_loss_score_mean_ablation == pytest.approx(0, abs=1e-5)
    assert zero.kl_div_with_sae == zero.kl_div_with_ablation > 0.01
    assert abs(perfect.ce_loss_with_ablation - perfect.ce_loss_without_sae) > 0.01


def test_cross_entropy_is_the_models_own_loss(model, tokens):
    report = model_preservation(model, Copier(0.5), tokens, HOOK)
    with torch.no_grad():
        assert report.ce_loss_without_sae == pytest.approx(
            float(model(tokens, return_type="loss")), abs=1e-5
        )
    assert report.n_predicted_tokens == 5 * 11


def test_kl_and_loss_of_a_reconstruction_by_hand(model, tokens):
    def halve_all_but_first(activation, hook):
        return torch.cat([activation[:, :1], 0.5 * activation[:, 1:]], dim=1)

    with torch.no_grad():
        log_p = model(tokens).log_softmax(-1)[:, :-1]
        edited = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, halve_all_but_first)])
        log_q = edited.log_softmax(-1)[:, :-1]
    report = model_preservation(model, Copier(0.5), tokens, HOOK)
    loss = torch.nn.functional.nll_loss(log_q.flatten(0, 1), tokens[:, 1:].flatten())
    assert report.ce_loss_with_sae == pytest.approx(float(loss), abs=1e-5)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / 55
    assert report.kl_div_with_sae == pytest.approx(float(kl), rel=1e-4)


def test_tokens_dropped_in_training_keep_their_activation_in_every_arm(model, tokens):
    norms = activations(model, tokens, HOOK)[:, 1:].norm(dim=-1)
    report = model_preservation(model, Copier(), tokens, HOOK)
    assert report.n_unchanged_tokens == 5  # the first of each context
    zero, max_norm = torch.zeros(64), 1.0001 * float(norms.flatten().median())

    def with_zero_mean(max_norm):
        marks = model_marks(model, tokens, HOOK, max_norm=max_norm, mean_activation=zero)
        return model_preservation(model, Copier(0.0), tokens, HOOK, max_norm=max_norm, marks=marks)

    halfway = with_zero_mean(max_norm)
    assert halfway.n_unchanged_tokens == 5 + int((norms > max_norm).sum())
    ablated = halfway.ce_loss_with_ablation
    assert halfway.ce_loss_with_sae == ablated == halfway.ce_loss_with_mean_ablation
    assert ablated != report.ce_loss_with_ablation
    nothing = with_zero_mean(1e-9)
    assert nothing.n_unchanged_tokens == 60
    assert nothing.ce_loss_with_sae == nothing.ce_loss_with_ablation == nothing.ce_loss_without_sae
    assert nothing.ce_loss_score is nothing.kl_div_score is None
    assert nothing.ce_loss_score_mean_ablation is None


def test_the_measured_mean_equals_a_given_one(model, tokens):
    mean = activations(model, tokens, HOOK)[:, 1:].flatten(0, 1).mean(0)
    given = model_marks(model, tokens, HOOK, mean_activation=mean)
    assert astuple(model_marks(model, tokens, HOOK)) == pytest.approx(astuple(given), abs=1e-5)


def test_marks_by_hand(model, tokens):
    mean = activations(model, tokens, HOOK)[:, 1:].flatten(0, 1).mean(0)

    def loss_and_log_p(value):
        def put_in(activation, hook):
            return torch.cat([activation[:, :1], value.expand_as(activation[:, 1:])], dim=1)

        hooks = [] if value is None else [(HOOK, put_in)]
        with torch.no_grad():
            log_p = model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)[:, :-1]
        loss = torch.nn.functional.nll_loss(log_p.flatten(0, 1), tokens[:, 1:].flatten())
        return float(loss), log_p

    (ce_model, log_p), (ce_zero, log_q), (ce_mean, _) = map(
        loss_and_log_p, (None, torch.zeros(64), mean)
    )
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / 55
    by_hand = (ce_model, ce_zero, ce_mean, float(kl), 5)
    assert astuple(model_marks(model, tokens, HOOK)) == pytest.approx(by_hand, rel=1e-4)


def test_marks_that_are_no_numbers_are_not_kept(model, tokens, tmp_path):
    marks = model_marks(model, tokens, HOOK)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NotEvaluable, match=rf"ModelMarks.ce_zero is {bad}; expected a number"):
            replace(marks, ce_zero=bad).save(tmp_path / "marks")
    assert list(tmp_path.iterdir()) == []


def test_marks_are_kept(model, tokens, tmp_path):
    marks = model_marks(model, tokens, HOOK)
    marks.save(tmp_path / "marks")
    assert astuple(ModelMarks.load(tmp_path / "marks")) == astuple(marks)


def test_a_second_sae_pays_its_own_passes_alone(few_documents, model, monkeypatch, tmp_path):
    monkeypatch.setenv("C2R_CACHE", str(tmp_path))
    profile = load_profile("smoke")
    passes, contexts = [], []
    plain = model_loss.log_probs
    monkeypatch.setattr(
        model_loss, "log_probs", lambda *a, **s: (passes.append(1), plain(*a, **s))[1]
    )
    whole = model_loss.model_preservation
    monkeypatch.setattr(
        model_loss,
        "model_preservation",
        lambda model, sae, tokens, *a, **s: (
            contexts.append((tokens, s)),
            whole(model, sae, tokens, *a, **s),
        )[1],
    )
    counts, found = [], []
    for scale in (0.5, 0.9):
        sae = Copier(scale)
        sae.W_dec = torch.eye(64)
        inputs = Inputs(
            sae,
            profile.language_model,
            profile.evaluation,
            language_model=model,
            corpus=few_documents,
        )
        passes.clear()
        found.append(measure_model_preservation(inputs))
        counts.append(len(passes))
    assert counts == [5, 2], "one batch of contexts"
    assert found[0].ce_loss_with_sae != found[1].ce_loss_with_sae
    for scale, report, (tokens, settings) in zip((0.5, 0.9), found, contexts, strict=True):
        settings.pop("marks")
        hook = profile.language_model.hook_name
        assert whole(model, Copier(scale), tokens, hook, **settings) == report


def test_batches_do_not_matter(model, tokens):
    whole, parts = (
        model_preservation(model, Copier(0.8), tokens, HOOK, batch_size=n) for n in (5, 2)
    )
    assert astuple(whole) == pytest.approx(astuple(parts), abs=1e-5)


def test_bfloat16_is_near_float32(model, tokens):
    float32 = model_preservation(model, Copier(0.5), tokens, HOOK)
    bfloat16 = model_preservation(model, Copier(0.5), tokens, HOOK, precision="bfloat16")
    assert bfloat16.ce_loss_without_sae != float32.ce_loss_without_sae
    assert bfloat16.ce_loss_with_sae == pytest.approx(float32.ce_loss_with_sae, rel=0.01)


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
        model_preservation(model, sae, torch.ones(shape, dtype=torch.long), hook_name)


def test_every_token_dropped_is_explained(model, tokens):
    with pytest.raises(NotEvaluable, match="Every token keeps its activation"):
        model_preservation(model, Copier(), tokens, HOOK, max_norm=1e-9)
