"""Look at a latent: `c2r contexts SAE LATENT` prints the text on which it fires hardest."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, NamedTuple

import torch

from c2r_core.data.harvest import ActivationStore
from c2r_core.evaluate.options import OF_ITS_RECORD, add_reading_options, inputs_to_look_at
from c2r_core.metrics.encoding import chunk_size, encode
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Context(NamedTuple):
    """A token on which a latent fires, with its activation; in the text the token is in «»."""

    activation: float
    text: str


def strongest_contexts(
    sae: AnySAE,
    store: ActivationStore,
    tokenizer: PreTrainedTokenizerBase,
    latent: int,
    n: int = 4,
) -> list[Context]:
    """The tokens of a store on which a latent fires hardest, strongest first.

    Parameters
    ----------
    sae : AnySAE
        Takes raw activations: for an SAE of this package, what `fold_norm_factor` returns.
    tokenizer : PreTrainedTokenizerBase
        Of the model that the store was harvested from: `model.tokenizer`.
    latent : int
        From 0 to d_sae - 1.
    n : int
        At most so many; fewer where the latent fires on fewer tokens.

    Raises ValueError if there is no such latent.
    """
    d_sae = len(sae.W_dec)
    if not 0 <= latent < d_sae:
        raise ValueError(f"latent is {latent}; this SAE has latents 0 to {d_sae - 1}.")
    acts = torch.cat([encode(sae, x)[:, latent] for x in store.chunks(chunk_size(sae))])
    strongest = acts.topk(min(n, int((acts > 0).sum())))
    contexts = []
    for activation, row in zip(*map(torch.Tensor.tolist, strongest), strict=True):
        window = store.text_around(row, tokenizer)
        tokens = list(window.tokens)
        tokens[window.position] = f"«{tokens[window.position]}»"
        contexts.append(Context(activation, "".join(tokens)))
    return contexts


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 if there is nothing to look at."""
    parser = argparse.ArgumentParser(prog="c2r contexts", description=__doc__.partition(": ")[0])
    parser.add_argument("path", metavar="SAE", help="folder of an SAE, as `c2r evaluate` takes it")
    parser.add_argument("latents", metavar="LATENT", type=int, nargs="+", help="from 0 on")
    parser.add_argument("-n", type=int, default=4, help="contexts of each; default: %(default)s")
    add_reading_options(parser, OF_ITS_RECORD)
    given = parser.parse_args(arguments)
    try:
        inputs, read = inputs_to_look_at(given)
        print(read)
        tokenizer = inputs.language_model.tokenizer
        for latent in given.latents:
            found = strongest_contexts(inputs.sae, inputs.activations, tokenizer, latent, given.n)
            print(f"latent {latent}" + ("" if found else " fires on none of the held-out tokens"))
            for one in found:
                print(f"  {one.activation:8.2f}  {one.text!r}")
        if tokenizer.bos_token:
            print(f"{tokenizer.bos_token} is the token that begins every context.")
    except (ValueError, OSError) as error:
        print(f"Nothing to look at: {error}", file=sys.stderr)
        return 2
    return 0
