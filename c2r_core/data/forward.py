"""Every pass through a language model: up to a hook, behind a beginning that is run once, with an activation
replaced.

    x = activations(model, tokens, "blocks.4.hook_resid_post")  # nothing behind the hook is computed

    prompts, kept = make_prompts(model.tokenizer, "", [" Paris", " Rome"], "I live in{subject}, in")
    x = activations_at(model, prompts, hook_name)
    log_probs = answer_log_probs(model, prompts, hook_name, x + steering)
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from c2r_core.data.precision import Precision, resolve_precision
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import DynamicCache, PreTrainedTokenizerBase


UNEMBEDDING = "unembed.hook_in"
"""The hook at what a bridge multiplies by the unembedding."""


def check_hook_name(model: TransformerBridge, hook_name: str) -> None:
    """Raise ValueError, with near names, if the model has no such hook or has it switched off."""
    if hook_name not in model.hook_dict:
        near = difflib.get_close_matches(hook_name, model.hook_dict, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"Model {model.cfg.model_name!r} ({model.cfg.n_layers} blocks) has no hook "
            f"{hook_name!r}. {hint}The residual stream after block n is blocks.n.hook_resid_post; "
            "model.hook_dict lists all names."
        )
    model.check_hooks_to_add(hook_name)


class _HookReached(Exception):
    def __init__(self, activation: Tensor):
        self.activation = activation


def activations(
    model: TransformerBridge,
    tokens: Tensor,
    hook_name: str,
    *,
    precision: Precision = "float32",
    cache: DynamicCache | None = None,
) -> Tensor:
    """Activations at a hook, computing nothing behind it.

    Parameters
    ----------
    model : TransformerBridge
    tokens : Tensor of int, shape (batch, context)
    hook_name : str
        A hook whose activation is one vector a token, such as `blocks.4.hook_resid_post`.
    precision : "float32" or "bfloat16"
        "bfloat16" runs the matrix products in autocast: about twice as fast on CPUs with bf16
        instructions, relative error 0.8 % at block 4 of SmolLM2.
    cache : DynamicCache, optional
        Keys and values of what stands before the tokens; those of the tokens are added.

    Returns
    -------
    Tensor of float32, shape (batch, context, d_in), without gradient, on the model's device

    Raises
    ------
    ValueError
        If the precision or the hook does not exist, if the model never reaches the hook, or if its
        activation is not of shape (batch, context, d_in).
    NotEvaluable
        If an activation is NaN or infinite.
    """

    def stop(activation: Tensor) -> None:
        raise _HookReached(activation)

    try:
        _run(model, tokens, precision, hook_name, stop, cache)
    except _HookReached as reached:
        x = reached.activation
    if x.shape[:-1] != tokens.shape:
        raise ValueError(
            f"Hook {hook_name!r} gives shape {tuple(x.shape)} for tokens of shape "
            f"{tuple(tokens.shape)}; expected one vector a token, as at blocks.n.hook_resid_post."
        )
    if not x.isfinite().all():
        raise NotEvaluable(
            f"The language model {model.cfg.model_name!r} gives NaN or infinite activations at "
            f"{hook_name!r}. Try precision='float32', and check that the model's weights are sound."
        )
    return x.float()


def log_probs(
    model: TransformerBridge,
    tokens: Tensor,
    hook_name: str | None = None,
    edit: Callable[[Tensor], Tensor | None] | None = None,
    *,
    precision: Precision = "float32",
) -> Tensor:
    """Log-probabilities of each token behind the first, float32, (batch, context − 1, vocabulary).

    Parameters
    ----------
    model : TransformerBridge
    tokens : Tensor of int, shape (batch, context)
    hook_name, edit : str, callable, optional
        `edit` sees the activation at the hook; what it returns, unless None, replaces it.
    precision : "float32" or "bfloat16"
        Of the model's matrix products.

    Raises
    ------
    ValueError
        If the precision or the hook does not exist, or the model never reaches the hook.
    NotEvaluable
        If the model answers NaN.
    """
    return _log_softmax(_run(model, tokens, precision, hook_name, edit)[:, :-1], model)


# -- prompts with a common beginning -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts with a common beginning, each with the token of its subject.

    What a model computes in the common beginning is kept, and shared with those `chosen` from these.

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
    _prefix_caches: WeakKeyDictionary = field(default_factory=WeakKeyDictionary, repr=False)

    def __len__(self) -> int:
        return len(self.tails)

    def chosen(self, which: Tensor | slice) -> Prompts:
        """Those with these numbers (or where a mask is true), in that order."""
        parts = (part[which] for part in (self.tails, self.position, self.last))
        return Prompts(self.prefix, *parts, self._prefix_caches)

    def without_prefix(self) -> Prompts:
        """The same prompts with the common beginning in each tail, to be run again for each."""
        n = len(self.prefix)
        tails = torch.cat([self.prefix.expand(len(self), -1), self.tails], dim=1)
        return Prompts(self.prefix[:0], tails, self.position + n, self.last + n)


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
        If the template does not hold {subject} once.
    NotEvaluable
        If no subject can be kept.
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
            tails.append(torch.tensor(whole[len(in_front) :]))
            positions.append(len(start) - len(in_front) - 1)
    if not kept:
        raise NotEvaluable(
            f"None of the {len(subjects)} subjects (the first is {subjects[0]!r}) ends where a token "
            f"ends behind {(prefix + before)[-30:]!r} in this tokenizer. Try another template."
        )
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Prompts(
        prefix=torch.tensor(bos + in_front, dtype=torch.long),
        tails=torch.nn.utils.rnn.pad_sequence(tails, batch_first=True),
        position=torch.tensor(positions),
        last=torch.tensor([len(tail) - 1 for tail in tails]),
    ), kept


def activations_at(
    model: TransformerBridge,
    prompts: Prompts,
    hook_name: str,
    *,
    batch_size: int = 128,
    precision: Precision = "float32",
) -> Tensor:
    """Activations at every prompt's subject, float32, (n, d_in), on the CPU.

    Attention is causal, so what follows the subjects is not run, nor is the model behind the hook.
    Errors are those of `activations`.
    """
    found = []
    for part, cache in _behind_prefix(model, prompts, batch_size, precision, hook_name):
        tails = part.tails[:, : int(part.position.max()) + 1]
        x = activations(model, tails, hook_name, precision=precision, cache=cache)
        found.append(x[torch.arange(len(part)), part.position.to(x.device)].cpu())
    return torch.cat(found)


def answer_log_probs(
    model: TransformerBridge,
    prompts: Prompts,
    hook_name: str,
    replacements: Tensor | None = None,
    *,
    answers: Sequence[int] | None = None,
    batch_size: int = 64,
    precision: Precision = "float32",
) -> Tensor:
    """Log-probabilities of the token behind every prompt, float32, (n, vocabulary), on the CPU.

    Logits are computed of each prompt's last token alone.

    Parameters
    ----------
    model : TransformerBridge
    prompts : Prompts
    hook_name : str
        Such as `blocks.4.hook_resid_post`.
    replacements : Tensor, shape (n, d_in), optional
        What takes the place of the activation at each prompt's subject. None leaves the model as it is.
    answers : sequence of int, optional
        Tokens whose log-probabilities are returned, (n, len(answers)); by default the whole vocabulary's.
    batch_size : int
        Prompts per forward pass. Memory is about 3 · batch_size · vocabulary floats.
    precision : "float32" or "bfloat16"
        Of the model's matrix products.

    Raises
    ------
    ValueError
        If the replacements have another shape, or `activations` would refuse the hook or the precision.
    NotEvaluable
        If the replacements are not finite, or the model answers NaN.
    """
    if replacements is not None and not replacements.isfinite().all():
        raise NotEvaluable("replacements hold NaN or infinite values; check the SAE's weights.")
    found, start = [], 0
    for part, cache in _behind_prefix(model, prompts, batch_size, precision):
        rows = torch.arange(len(part))

        def replace(x: Tensor, part=part, start=start, at=(rows, part.position)) -> Tensor | None:
            if replacements is None:
                return None
            if replacements.shape != (len(prompts), x.shape[-1]):
                raise ValueError(
                    f"replacements have shape {tuple(replacements.shape)}; expected "
                    f"{(len(prompts), x.shape[-1])}, one activation of {hook_name!r} for each prompt."
                )
            x = x.clone()
            x[at] = replacements[start : start + len(part)].to(x)
            return x

        logits = _run(model, part.tails, precision, hook_name, replace, cache, part.last)
        said = _log_softmax(logits[:, 0], model)
        found.append((said if answers is None else said[:, answers]).cpu())
        start += len(part)
    return torch.cat(found)


# -- one pass ----------------------------------------------------------------------------------


def _run(
    model: TransformerBridge,
    tokens: Tensor,
    precision: Precision,
    hook_name: str | None = None,
    edit: Callable[[Tensor], Tensor | None] | None = None,
    cache: DynamicCache | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Logits (batch, context, vocabulary) of a pass in which `edit` sees, and may replace, an activation.

    With `last`, (batch,), only those of this one token of each row: (batch, 1, vocabulary).
    """
    n_seen = 0

    def hook(activation: Tensor, hook: object) -> Tensor | None:
        nonlocal n_seen
        n_seen += 1
        return edit(activation)

    device = next(model.parameters()).device
    enabled = resolve_precision(precision, device.type) == "bfloat16"
    hooks = []
    if edit is not None:
        check_hook_name(model, hook_name)
        hooks = [(hook_name, hook)]
    if last is not None:
        check_hook_name(
            model, UNEMBEDDING
        )  # a hook that is not there would be passed over in silence
        rows = torch.arange(len(last))
        hooks.append((UNEMBEDDING, lambda x, hook: x[rows, last][:, None]))
    settings = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
    with torch.no_grad(), autocast, model.hooks(fwd_hooks=hooks):
        logits = model(tokens.to(device, torch.long), **settings)
    if edit is not None and not n_seen:
        raise ValueError(
            f"Hook {hook_name!r} exists in {model.cfg.model_name!r} but a forward pass never "
            "reaches it. Choose another, such as blocks.0.hook_resid_post."
        )
    return logits


def _log_softmax(logits: Tensor, model: TransformerBridge) -> Tensor:
    """Log-probabilities, float32, of the same shape; NotEvaluable if there are NaN among them."""
    said = logits.float().log_softmax(-1)
    if said[..., 0].isnan().any():  # NaN or infinity anywhere in a row makes the whole row NaN
        raise NotEvaluable(
            f"The language model {model.cfg.model_name!r} answers NaN. Try precision='float32', and check "
            "that the model's weights are sound."
        )
    return said


def _behind_prefix(
    model: TransformerBridge,
    prompts: Prompts,
    batch_size: int,
    precision: Precision,
    stop_at: str | None = None,
) -> Iterator[tuple[Prompts, DynamicCache | None]]:
    """Prompts batch by batch, with the keys and values of their prefix (up to the hook at which to stop)."""
    caches = prompts._prefix_caches.setdefault(model, {})
    if len(prompts.prefix) and (precision, stop_at) not in caches:
        from transformers import DynamicCache

        kept, prefix = DynamicCache(config=model.original_model.config), prompts.prefix[None]
        if stop_at is None:
            _run(model, prefix, precision, cache=kept, last=torch.tensor([prefix.shape[1] - 1]))
        else:  # the layers behind the hook never run, so their part of the cache stays empty
            activations(model, prefix, stop_at, precision=precision, cache=kept)
        caches[precision, stop_at] = kept
    for start in range(0, len(prompts), batch_size):
        part = prompts.chosen(slice(start, start + batch_size))
        cache = copy.deepcopy(caches.get((precision, stop_at)))
        if cache is not None:
            cache.batch_repeat_interleave(len(part))
        yield part, cache
