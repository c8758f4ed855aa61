"""Passes through a language model: where they stop, what is kept, what a replaced activation changes."""

from __future__ import annotations

import pytest
import torch

from c2r_core.data import forward
from c2r_core.data.forward import (
    activations,
    activations_at,
    answer_log_probs,
    check_hook_name,
    log_probs,
    make_prompts,
)
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.errors import NotEvaluable

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


def some_tokens(batch: int = 3, context: int = 16) -> torch.Tensor:
    return torch.randint(3, 49152, (batch, context), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"])
def test_stopping_gives_what_a_full_pass_gives(model, hook_name) -> None:
    tokens = some_tokens()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[hook_name])
    stopped = activations(model, tokens, hook_name)
    assert torch.equal(stopped, cache[hook_name])
    assert stopped.dtype == torch.float32 and not stopped.requires_grad


def test_a_pass_to_a_hook_stops_there_and_leaves_no_hook_behind(model) -> None:
    reached = []
    later = model.blocks[1].hook_in
    handle = later.register_forward_hook(lambda *_: reached.append("block 1"))
    try:
        activations(model, some_tokens(), "blocks.0.hook_resid_post")
        assert reached == []
        model(some_tokens())
        assert reached == ["block 1"]
    finally:
        handle.remove()


def test_bfloat16_is_close_but_not_equal(model) -> None:
    exact = activations(model, some_tokens(), "blocks.1.hook_resid_post")
    rough = activations(model, some_tokens(), "blocks.1.hook_resid_post", precision="bfloat16")
    error = ((rough - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 0.02
    assert rough.dtype == torch.float32


def test_an_unknown_precision_is_refused(model) -> None:
    with pytest.raises(ValueError, match="precision is 'bf16'"):
        activations(model, some_tokens(), "blocks.0.hook_resid_post", precision="bf16")


def test_activations_that_are_not_one_vector_a_token_are_refused(model) -> None:
    with pytest.raises(ValueError, match="one vector a token"):
        activations(model, some_tokens(), "blocks.0.attn.hook_pattern")


def test_it_is_said_when_the_model_never_reaches_a_hook(model) -> None:
    with pytest.raises(ValueError, match="never reaches it"):
        activations(model, some_tokens(), "hook_pos_embed")


def test_a_hook_that_is_switched_off_says_how_to_switch_it_on(model) -> None:
    with pytest.raises(ValueError, match="set_use_hook_mlp_in"):
        check_hook_name(model, "blocks.0.hook_mlp_in")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("blocks.1.hook_resid_pos", "blocks.1.hook_resid_post"),
        ("blocks.2.hook_resid_post", "blocks.1.hook_resid_post"),
        ("nothing like it", "model.hook_dict"),
    ],
)
def test_an_unknown_hook_suggests_near_ones(model, wrong, near) -> None:
    with pytest.raises(ValueError, match=near):
        check_hook_name(model, wrong)


def test_activations_that_are_not_finite_are_the_models_fault(monkeypatch) -> None:
    model = load_language_model(RANDOM)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(NotEvaluable, match=f"The language model '{RANDOM}' gives NaN .* '{HOOK}'"):
        activations(model, some_tokens(), HOOK)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_model_that_answers_nan_is_refused(bad) -> None:
    model = load_language_model(RANDOM)
    prompts = make_prompts(model.tokenizer, "", ["cat", "dog"], "{subject}: a")[0]

    def spoil(_: object, __: object, output: torch.Tensor) -> None:
        output[..., 7] = bad

    model.original_model.get_submodule("model.norm").register_forward_hook(spoil)
    assert activations(model, some_tokens(), HOOK).isfinite().all(), "the fault is behind the hook"
    with pytest.raises(NotEvaluable, match=f"The language model '{RANDOM}' answers NaN"):
        answer_log_probs(model, prompts, HOOK)
    with pytest.raises(NotEvaluable, match="answers NaN"):
        log_probs(model, some_tokens())


def test_log_probabilities_are_those_of_the_next_tokens(model) -> None:
    tokens = some_tokens()
    with torch.no_grad():
        expected = model(tokens)[:, :-1].log_softmax(-1)
    torch.testing.assert_close(log_probs(model, tokens), expected)
    x = activations(model, tokens, HOOK)
    seen = []
    assert torch.equal(log_probs(model, tokens, HOOK, seen.append), log_probs(model, tokens))
    assert torch.equal(seen[0], x)
    torch.testing.assert_close(log_probs(model, tokens, HOOK, lambda _: x), expected)
    assert not torch.allclose(log_probs(model, tokens, HOOK, lambda _: 0 * x), expected, atol=1e-2)
    with pytest.raises(ValueError, match="never reaches it"):
        log_probs(model, tokens, "hook_pos_embed", lambda _: None)


# -- prompts with a common beginning -----------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(model):
    return make_prompts(
        model.tokenizer, "cat, dog\n", [" river", " unbelievable", "sun"], "see{subject}, then"
    )[0]


def test_the_subject_is_located_by_its_text(model, prompts):
    for i, subject in enumerate([" river", " unbelievable", "sun"]):
        upto = prompts.tails[i, : prompts.position[i] + 1]
        assert model.tokenizer.decode(upto) == f"see{subject}"
        assert model.tokenizer.decode(prompts.tails[i, : prompts.last[i] + 1]).endswith(", then")


def test_a_subject_that_merges_with_its_neighbours_is_left_out(model):
    prompts, kept = make_prompts(model.tokenizer, "", ["gov", " people"], "the{subject}ernment")
    assert 0 not in kept and len(prompts.tails) == len(kept)
    with pytest.raises(ValueError, match="Try another template"):
        make_prompts(model.tokenizer, "", ["gov"], " the {subject}ernment")
    with pytest.raises(ValueError, match="once"):
        make_prompts(model.tokenizer, "", ["gov"], "no subject")


def test_a_kept_prefix_changes_nothing(model, prompts):
    for one, other in (
        (
            activations_at(model, prompts, HOOK),
            activations_at(model, prompts.without_prefix(), HOOK),
        ),
        (
            answer_log_probs(model, prompts, HOOK),
            answer_log_probs(model, prompts.without_prefix(), HOOK),
        ),
    ):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_activation_replaced_by_itself_changes_nothing_and_by_another_much(model, prompts):
    x = activations_at(model, prompts, HOOK)
    before = answer_log_probs(model, prompts, HOOK)
    assert before.exp().sum(1).allclose(torch.ones(3), atol=1e-4)
    assert torch.allclose(
        answer_log_probs(model, prompts, HOOK, x, batch_size=2), before, atol=1e-5
    )
    changed = answer_log_probs(model, prompts, HOOK, x.flip(0))
    assert not torch.allclose(changed[0], before[0], atol=1e-2)
    assert torch.allclose(changed[1], before[1], atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_answers_are_those_of_a_pass_over_the_whole_prompt(model, prompts, precision, is_replaced):
    """The plain form: one prompt at a time, nothing kept, logits of every token."""
    x = activations_at(model, prompts, HOOK, precision=precision).flip(0) if is_replaced else None
    found = answer_log_probs(model, prompts, HOOK, x, precision=precision)
    whole = prompts.without_prefix()
    expected = []
    for i in range(len(prompts)):

        def replaced(activation, hook, i=i):
            if x is not None:
                activation = activation.clone()
                activation[0, whole.position[i]] = x[i].to(activation)
            return activation

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        with torch.no_grad(), autocast, model.hooks(fwd_hooks=[(HOOK, replaced)]):
            logits = model(whole.tails[i : i + 1, : whole.last[i] + 1])
        expected.append(logits[0, -1].float().log_softmax(-1))
    tolerance = {"atol": 1e-5} if precision == "float32" else {"atol": 0.1}
    assert torch.allclose(found, torch.stack(expected), **tolerance)
    chosen = answer_log_probs(model, prompts, HOOK, x, answers=[7, 5], precision=precision)
    assert torch.equal(chosen, found[:, [7, 5]])


def test_only_the_last_token_of_a_prompt_is_unembedded(model):
    prompts = make_prompts(
        model.tokenizer, "cat, dog\n", [" river", " unbelievable"], "{subject}: a"
    )[0]
    assert len(prompts.last.unique()) == 2
    seen = []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: seen.append(x.shape[:2]))]):
        answer_log_probs(model, prompts, HOOK)
    assert seen == [(1, 1), (2, 1)], "the beginning, then the prompts"


def test_bad_replacements_are_refused(model, prompts):
    with pytest.raises(ValueError, match="replacements have shape"):
        answer_log_probs(model, prompts, HOOK, torch.zeros(2, 64))
    with pytest.raises(ValueError, match="NaN"):
        answer_log_probs(model, prompts, HOOK, torch.full((3, 64), torch.nan))


def test_the_common_beginning_runs_once_for_all_that_are_chosen(model, prompts, monkeypatch):
    lengths = []
    run = forward._run

    def remember(model, tokens, *arguments, **settings):
        lengths.append(tokens.shape)
        return run(model, tokens, *arguments, **settings)

    monkeypatch.setattr(forward, "_run", remember)
    template = "see{subject}, then go home again"
    fresh = make_prompts(model.tokenizer, "cat, dog\n", [" river", "sun"], template)[0]
    for _ in range(2):
        answer_log_probs(model, fresh.chosen(torch.tensor([1])), HOOK)
        activations_at(model, fresh, HOOK, batch_size=1)
    prefix = (1, len(fresh.prefix))
    assert lengths.count(prefix) == 2, "once whole, and once to the hook"
    assert max(length for _, length in lengths if (_, length) != prefix) == fresh.tails.shape[1]


def test_what_follows_the_subjects_is_not_run_to_read_them(model, prompts, monkeypatch):
    run = forward._run
    seen = []
    monkeypatch.setattr(
        forward, "_run", lambda m, t, *a, **s: (seen.append(t.shape[1]), run(m, t, *a, **s))[1]
    )
    activations_at(model, prompts.without_prefix(), HOOK)
    assert seen == [int(prompts.position.max()) + 1 + len(prompts.prefix)]
