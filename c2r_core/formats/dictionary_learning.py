"""SAEs that dictionary_learning wrote: a folder with `config.json` and `ae.pt`.

Read in the code of dictionary_learning 0.1.0. Encode and decode are those of the dictionary that
its `load_dictionary` gives:

- `AutoEncoder` gets decoder columns of norm 1, their norms moved into the encoder;
- BatchTopK and Matryoshka dictionaries use their threshold, TopK its k;
- normalised training is folded into the biases before `ae.pt` is written, so all take raw
  activations.

`ae.pt` is a pickle; it is read with `weights_only=True`, so nothing in it can run.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c2r_core.formats.inference import Gated, InferenceSAE, JumpReLU, ReLU, TopK, take

CONFIG, WEIGHTS = "config.json", "ae.pt"


def read(folder: Path, config: Mapping[str, Any]) -> tuple[InferenceSAE, str]:
    """The SAE of a dictionary_learning folder and the name of its class, as in its config.

    Raises
    ------
    ValueError
        If the class is unknown (the message lists the known ones), the file holds anything but
        tensors, or the tensors do not fit the config.
    """
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping) or "dict_class" not in trainer:
        raise ValueError(f"{folder / CONFIG} has no entry trainer.dict_class.")
    dict_class = trainer["dict_class"]
    if dict_class not in CLASSES:
        raise ValueError(f"dict_class is {dict_class!r}; this code reads {', '.join(CLASSES)}.")
    try:
        tensors = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged, or holds more than tensors, which would run code when "
            f"read ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise ValueError(f"{folder / WEIGHTS} is no state dict: expected tensors by name.")
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    sae = CLASSES[dict_class](tensors, trainer)
    said = (trainer.get("activation_dim"), trainer.get("dict_size"))
    if None not in said and said != tuple(sae.W_enc.shape):
        raise ValueError(
            f"{CONFIG} says (activation_dim, dict_size) = {said}; {WEIGHTS} has "
            f"{tuple(sae.W_enc.shape)}."
        )
    return sae, dict_class


def stated(config: Mapping[str, Any]) -> dict[str, str]:
    """What the config says about the model and the place in it."""
    trainer = config.get("trainer") or {}
    names = {
        "model": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"),
        "layer": trainer.get("layer"),
    }
    return {name: str(value) for name, value in names.items() if value is not None}


def _auto_encoder(tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> InferenceSAE:
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "bias")
    encoder, b_enc, decoder, bias = take(tensors, *names, file=WEIGHTS)
    norms = decoder.norm(dim=0)
    norms = torch.where(norms > 0, norms, 1.0)  # a column of zeros cannot get norm 1
    if torch.allclose(norms, torch.ones_like(norms)):
        norms = torch.ones_like(norms)
    return InferenceSAE(
        encoder.T * norms, (decoder / norms).T, bias, ReLU(b_enc * norms), centred=True
    )


def _auto_encoder_new(tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> InferenceSAE:
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    encoder, b_enc, decoder, b_dec = take(tensors, *names, file=WEIGHTS)
    return InferenceSAE(encoder.T, decoder.T, b_dec, ReLU(b_enc), centred=False)


def _gated(tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> InferenceSAE:
    names = ("encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "r_mag", "mag_bias")
    encoder, decoder, b_dec, *gate = take(tensors, *names, file=WEIGHTS)
    return InferenceSAE(encoder.T, decoder.T, b_dec, Gated(*gate), centred=True)


def _jump_relu(tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> InferenceSAE:
    names = ("W_enc", "W_dec", "b_dec", "b_enc", "threshold")
    W_enc, W_dec, b_dec, b_enc, threshold = take(tensors, *names, file=WEIGHTS)
    return InferenceSAE(W_enc, W_dec, b_dec, JumpReLU(b_enc, threshold), centred=False)


def _top_k(tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> InferenceSAE:
    # The threshold, kept for another way of encoding, is not used; older files lack it.
    tensors.pop("threshold", None)
    k = _checked_k(tensors, trainer)
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
    encoder, b_enc, decoder, b_dec = take(tensors, *names, file=WEIGHTS)
    return InferenceSAE(encoder.T, decoder.T, b_dec, TopK(b_enc, k), centred=True)


def _batch_top_k(tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> InferenceSAE:
    _checked_k(tensors, trainer)
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "threshold")
    encoder, b_enc, decoder, b_dec, threshold = take(tensors, *names, file=WEIGHTS)
    return InferenceSAE(encoder.T, decoder.T, b_dec, JumpReLU(b_enc, threshold), centred=True)


def _matryoshka(tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> InferenceSAE:
    _checked_k(tensors, trainer)
    tensors.pop("group_sizes", None)  # all groups are active when it is loaded
    names = ("W_enc", "W_dec", "b_dec", "b_enc", "threshold")
    W_enc, W_dec, b_dec, b_enc, threshold = take(tensors, *names, file=WEIGHTS)
    return InferenceSAE(W_enc, W_dec, b_dec, JumpReLU(b_enc, threshold), centred=True)


def _checked_k(tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> int | None:
    """k of the config, which must be that of the file if both give one."""
    in_file = int(tensors.pop("k")) if "k" in tensors else None
    k = trainer.get("k", in_file)
    if in_file not in (None, k):
        raise ValueError(f"{CONFIG} says k = {k}; {WEIGHTS} says {in_file}.")
    return k


CLASSES: dict[str, Callable[[dict[str, Tensor], Mapping[str, Any]], InferenceSAE]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump_relu,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}
