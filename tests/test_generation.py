"""Text that is written under a shift is what the model finds likeliest, token by token."""

from __future__ import annotations

import pytest
import torch

from c2r_core.data.forward import log_probs
from c2r_core.data.generation import continuations
from c2r_core.errors import NotEvaluable

HOOK = "blocks.0.hook_resid_post"
PROMPT = "The people of the"


def one_by_one(model, shift, n):
    """The same by whole passes, without what generation keeps."""
    tokenizer = model.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = bos + tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    start = len(tokens)
    for _ in range(n):
        filled = torch.tensor([[*tokens, 0]])  # of the last token no log-probabilities are returned
        tokens.append(int(log_probs(model, filled, HOOK, lambda x: x + shift)[0, -1].argmax()))
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


def test_each_text_is_the_likeliest_under_its_own_shift(random_model):
    generator = torch.Generator().manual_seed(0)
    shifts = torch.cat([torch.zeros(1, 64), 5 * torch.randn(2, 64, generator=generator)])
    written = continuations(random_model, PROMPT, HOOK, shifts, 6)
    assert written == [one_by_one(random_model, shift, 6) for shift in shifts]
    assert len(set(written)) == 3
    assert continuations(random_model, PROMPT, HOOK, shifts[:1], 6) == written[:1]


@pytest.mark.parametrize(
    ("prompt", "hook", "shifts", "error", "problem"),
    [
        ("", HOOK, torch.zeros(1, 64), ValueError, "at least one token"),
        (PROMPT, "blocks.9.hook_resid_post", torch.zeros(1, 64), ValueError, "has no hook"),
        (PROMPT, HOOK, torch.zeros(64), ValueError, r"shape \(64,\)"),
        (PROMPT, HOOK, torch.zeros(1, 32), ValueError, "width 32"),
        (PROMPT, HOOK, torch.full((1, 64), torch.nan), NotEvaluable, "NaN"),
    ],
)
def test_what_cannot_be_written_is_said(random_model, prompt, hook, shifts, error, problem):
    with pytest.raises(error, match=problem):
        continuations(random_model, prompt, hook, shifts, 2)
