"""What a language model answers when one activation of its prompt is replaced.

Many prompts share their beginning (the examples of a few-shot prompt), so it is run once and kept.

    prompts, kept = make_prompts(model.tokenizer, "", [" Paris", " Rome"], "I live in{subject}, in")
    x = activations_at(model, prompts, hook_name)
    log_probs = answer_log_probs(model, prompts, hook_name, x + steering)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from c2r_core.data.language_models import Precision, run_to_hook

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import DynamicCache, PreTrainedTokenizerBase


class Prompts(NamedTuple):
    """Prompts with a common beginning, each with the token of its subject.

    Attributes
    ----------
    prefix : Tensor of int, shape (n_prefix,)
        What all prompts begin with; may be empty.
    tails : Tensor of int, shape (n, length)
        What follows, padded on the right.
    position : Tensor of int, shape (n,)
        Of the subject's last token within its tail: where an activation is read or replaced.
    last : Tensor of int, shape (n,)
        Of the last token of each tail; the answer is the model's next token.
    """

    prefix: Tensor
    tails: Tensor
    position: Tensor
    last: Tensor

    def chosen(self, which: Tensor) -> Prompts:
        """Those with these numbers (or where a mask is true), in that order."""
        return Prompts(self.prefix, self.tails[which], self.position[which], self.last[which])


def make_prompts(
    tokenizer: PreTrainedTokenizerBase, prefix: str, subjects: Sequence[str], template: str
) -> tuple[Prompts, list[int]]:
    """Prompts `prefix + template`, in which {subject} stands for each subject in turn.

    Each prompt is tokenised as a whole and must begin with the tokens of its text up to the subject's end, or
    the subject has no last token. A prompt starts with the tokenizer's BOS token, if it has one.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    prefix : str
        Shared by all prompts; may be empty.
    subjects : sequence of str
        With a leading space where the text wants one.
    template : str
        Such as "{subject} has the first letter:".

    Returns
    -------
    prompts : Prompts
    kept : list of int
        The subjects that have a prompt. Others merge with the text beside them in this tokenizer.

    Raises
    ------
    ValueError
        If the template does not hold {subject} once, or no subject can be kept.
    """
    before, marker, after = template.partition("{subject}")
    if not marker or "{subject}" in after:
        raise ValueError(f"The template is {template!r}; expected {{subject}} in it, once.")
    in_front = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    upto = [prefix + before + subject for subject in subjects]
    texts = [*upto, *(text + after for text in upto)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept, tails, positions = [], [], []
    for i, (start, whole) in enumerate(zip(ids[: len(upto)], ids[len(upto) :], strict=True)):
        if whole[: len(start)] == start and start[: len(in_front)] == in_front != start:
            kept.append(i)
            tails.append(whole[len(in_front) :])
            positions.append(len(start) - len(in_front) - 1)
    if not kept:
        raise ValueError(
            f"None of the {len(subjects)} subjects (the first is {subjects[0]!r}) ends where a token "
            f"ends behind {(prefix + before)[-30:]!r} in this tokenizer. Try another template."
        )
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    padded = torch.zeros(len(tails), max(len(tail) for tail in tails), dtype=torch.long)
    for row, tail in zip(padded, tails, strict=True):
        row[: len(tail)] = torch.tensor(tail)
    last = torch.tensor([len(tail) - 1 for tail in tails])
    prefix_ids = torch.tensor(bos + in_front, dtype=torch.long)
    return Prompts(prefix_ids, padded, torch.tensor(positions), last), kept


def activations_at(
    model: TransformerBridge,
    prompts: Prompts,
    hook_name: str,
    *,
    batch_size: int = 128,
    precision: Precision = "float32",
) -> Tensor:
    """Activations at every prompt's subject, float32, (n, d_in).

    Raises
    ------
    ValueError
        If `run_to_hook` refuses the hook or the precision.
    """
    _check(model, prompts, hook_name, precision)
    found = []
    for tails, position, _, cache in _batches(model, prompts, batch_size, precision):
        seen: list[Tensor] = []
        _run(
            model, tails, cache, [(hook_name, lambda x, hook, seen=seen: seen.append(x))], precision
        )
        found.append(seen[0][torch.arange(len(tails)), position.to(seen[0].device)].float().cpu())
    return torch.cat(found)


def answer_log_probs(
    model: TransformerBridge,
    prompts: Prompts,
    hook_name: str,
    replacements: Tensor | None = None,
    *,
    batch_size: int = 64,
    precision: Precision = "float32",
) -> Tensor:
    """Log-probabilities of the token behind every prompt, float32, (n, vocabulary).

    Parameters
    ----------
    model : TransformerBridge
    prompts : Prompts
    hook_name : str
        Such as `blocks.4.hook_resid_post`.
    replacements : Tensor, shape (n, d_in), optional
        What takes the place of the activation at each prompt's subject. None leaves the model as it is.
    batch_size : int
        Prompts per forward pass. Memory is about 3 · batch_size · length · vocabulary floats.
    precision : "float32" or "bfloat16"
        Of the model's matrix products.

    Raises
    ------
    ValueError
        If the replacements have another shape or are not finite, or if `run_to_hook` refuses the hook.
    """
    d_in = _check(model, prompts, hook_name, precision)
    n = len(prompts.tails)
    if replacements is not None:
        if replacements.shape != (n, d_in):
            raise ValueError(
                f"replacements have shape {tuple(replacements.shape)}; expected {(n, d_in)}, one "
                f"activation of {hook_name!r} for each prompt."
            )
        if not replacements.isfinite().all():
            raise ValueError("replacements hold NaN or infinite values; check the SAE's weights.")
    found, start = [], 0
    for tails, position, last, cache in _batches(model, prompts, batch_size, precision):
        rows = torch.arange(len(tails))
        hooks = []
        if replacements is not None:
            new = replacements[start : start + len(tails)]

            def replace(x: Tensor, hook: object, new=new, at=(rows, position)) -> Tensor:
                x = x.clone()
                x[at] = new.to(x)
                return x

            hooks = [(hook_name, replace)]
        logits = _run(model, tails, cache, hooks, precision)
        found.append(logits[rows, last].float().log_softmax(-1).cpu())
        start += len(tails)
    return torch.cat(found)


def _check(model: TransformerBridge, prompts: Prompts, hook_name: str, precision: Precision) -> int:
    """Width at the hook; one token through the model finds a wrong hook before the work begins."""
    return run_to_hook(model, prompts.tails[:1, :1], hook_name, precision).shape[-1]


def _batches(model: TransformerBridge, prompts: Prompts, batch_size: int, precision: Precision):
    """Tails, position, last, and the prefix's keys and values, batch by batch."""
    device = next(model.parameters()).device
    kept = None
    if len(prompts.prefix):
        from transformers import DynamicCache

        kept = DynamicCache(config=model.original_model.config)
        _run(model, prompts.prefix[None].to(device), kept, [], precision)
    for tails, position, last in zip(
        *(part.split(batch_size) for part in (prompts.tails, prompts.position, prompts.last)),
        strict=True,
    ):
        cache = copy.deepcopy(kept)
        if cache is not None:
            cache.batch_repeat_interleave(len(tails))
        yield tails.to(device), position, last, cache


def _run(
    model: TransformerBridge,
    tokens: Tensor,
    cache: DynamicCache | None,
    hooks: list,
    precision: Precision,
) -> Tensor:
    settings = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    enabled = precision == "bfloat16"
    with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16, enabled=enabled):
        return model.run_with_hooks(tokens, fwd_hooks=hooks, **settings)
