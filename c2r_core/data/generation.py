"""Text that a language model writes while a vector is added to its activations at one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from c2r_core.data.forward import check_hook_name
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@torch.no_grad()
def continuations(
    model: TransformerBridge, prompt: str, hook_name: str, shifts: Tensor, n_tokens: int
) -> list[str]:
    """What the model writes behind a prompt, one text for each shift, always taking the likeliest token.

    Parameters
    ----------
    model : TransformerBridge
    prompt : str
        At least one token; it starts with the tokenizer's BOS token, if it has one.
    hook_name : str
        Such as `blocks.4.hook_resid_post`.
    shifts : Tensor, shape (n, d_in)
        Each is added to the activation at the hook, at every token of the prompt and of the text. A row of
        zeros leaves the model as it is.
    n_tokens : int
        Tokens of a text at most; it ends earlier where the model ends it.

    Raises
    ------
    ValueError
        If the model has no such hook, the prompt has no token, or the shifts have another shape.
    NotEvaluable
        If the shifts are not finite.
    """
    check_hook_name(model, hook_name)
    if shifts.ndim != 2:
        raise ValueError(f"shifts have shape {tuple(shifts.shape)}; expected (n, d_in).")
    if not shifts.isfinite().all():
        raise NotEvaluable("shifts hold NaN or infinite values; check the SAE's weights.")
    tokenizer = model.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"The prompt is {prompt!r}; expected text of at least one token.")
    device = next(model.parameters()).device
    tokens = torch.tensor([bos + ids], device=device).expand(len(shifts), -1)

    def shift(x: Tensor, hook: object) -> Tensor:
        if shifts.shape[1] != x.shape[-1]:
            raise ValueError(
                f"shifts have width {shifts.shape[1]}; {hook_name!r} has {x.shape[-1]}."
            )
        return x + shifts[:, None].to(x)

    with model.hooks(fwd_hooks=[(hook_name, shift)]):
        written = model.generate(
            tokens, max_new_tokens=n_tokens, do_sample=False, return_type="tokens", verbose=False
        )
    new = written[:, tokens.shape[1] :].tolist()
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new]
