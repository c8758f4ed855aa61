"""SAEs in the format of SAELens: a folder with `cfg.json` and `sae_weights.safetensors`.

Read in the code of SAELens 6.54.12. Encode and decode are those of the SAE that
`SAE.load_from_disk` gives, with these limits:

- architectures standard, topk, jumprelu, gated, and the training checkpoints batchtopk and
  matryoshka_batchtopk, which become JumpReLU SAEs as in SAELens' own export; a training checkpoint of
  `c2r_core.training.sae_lens`, whose names begin with `c2r_`, is read as the architecture it adds C²R to;
- `rescale_acts_by_decoder_norm` is folded into the weights, so decoder rows then have norm 1 and
  activations are those that SAELens returns;
- activations that SAELens normalises sample by sample, or reshapes, are refused: such a decoder
  needs to know x, and an SAE is measured here through encode and decode alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from c2r_core.formats.inference import Gated, InferenceSAE, JumpReLU, ReLU, TopK, as_numbers, take

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OUR_PREFIX = "c2r_"
"""What `c2r_core.training.sae_lens` puts before SAELens' name of an architecture."""
ARCHITECTURES = (
    "standard",
    "topk",
    "jumprelu",
    "gated",
    "batchtopk",
    "matryoshka_batchtopk",
)
WRITTEN_AS = {ReLU: "standard", TopK: "topk", JumpReLU: "jumprelu", Gated: "gated"}


def read(folder: Path, config: Mapping[str, Any]) -> tuple[InferenceSAE, str]:
    """The SAE of a SAELens folder and the name of its architecture, as in its config.

    Raises ValueError if the SAE cannot be represented exactly (the message says which setting forbids it),
    a setting is of another type, or the tensors do not fit the config or hold a NaN.
    """
    for name in ("metadata", "activation_fn_kwargs"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise ValueError(f"{name} is {config[name]!r}; expected settings by name.")
    architecture, k = _architecture(config)
    _refuse_what_decode_cannot_undo(config)
    has_free_decoder = _switch(config, "rescale_acts_by_decoder_norm", False)
    centred = _switch(config, "apply_b_dec_to_input", True)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}).") from error
    tensors = as_numbers(tensors, WEIGHTS)
    # Written by older versions; ones mean nothing.
    scaling_factor = tensors.pop("scaling_factor", torch.ones(()))
    if not torch.allclose(scaling_factor, torch.ones_like(scaling_factor)):
        raise ValueError(
            f"{folder / WEIGHTS} holds a fine-tuned scaling_factor, which SAELens 6 no longer "
            "applies. Fold it into the SAE with the version that trained it."
        )

    if architecture == "gated":
        names = ("W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag")
        W_enc, W_dec, b_dec, *gate = take(tensors, *names, file=WEIGHTS)
        activation = Gated(*gate)
    else:
        if "log_threshold" in tensors:  # JumpReLU checkpoints of older versions
            tensors["threshold"] = tensors.pop("log_threshold").exp()
        if "topk_threshold" in tensors:  # one for all latents, in training checkpoints
            tensors["threshold"] = tensors.pop("topk_threshold")
        jumps = architecture not in ("standard", "topk")
        names = ("W_enc", "W_dec", "b_dec", "b_enc", *(["threshold"] if jumps else []))
        W_enc, W_dec, b_dec, b_enc, *threshold = take(tensors, *names, file=WEIGHTS)
        if jumps:
            activation = JumpReLU(b_enc, *threshold)
        else:
            activation = TopK(b_enc, k) if architecture == "topk" else ReLU(b_enc)
    sae = InferenceSAE(W_enc, W_dec, b_dec, activation, centred=centred)
    if has_free_decoder and architecture != "gated":
        sae.divide_decoder(sae.W_dec.norm(dim=-1).clamp(min=1e-8))
    stated = (config.get("d_in"), config.get("d_sae"))
    if stated != tuple(sae.W_enc.shape):
        raise ValueError(
            f"{CONFIG} says (d_in, d_sae) = {stated}; {WEIGHTS} has {tuple(sae.W_enc.shape)}."
        )
    return sae, architecture


def write(sae: InferenceSAE, folder: Path, stated: Mapping[str, Any]) -> None:
    """Both files of an SAE that `SAE.load_from_disk` loads; all that can be represented here can be there."""
    d_in, d_sae = sae.W_enc.shape
    architecture = WRITTEN_AS[type(sae.activation)]
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors |= {name: getattr(sae.activation, name) for name in sae.activation.names}
    if architecture == "jumprelu":  # one for each latent there
        tensors["threshold"] = tensors["threshold"].expand(d_sae)
    save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, folder / WEIGHTS)
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            name: stated[key]
            for name, key in (("model_name", "model"), ("hook_name", "hook_name"))
            if key in stated
        },
    }
    if architecture == "topk":
        config["k"] = sae.activation.k
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stated(config: Mapping[str, Any]) -> dict[str, str]:
    """What the config says about the model, the hook and the data of the training."""
    said = {**config, **(config.get("metadata") or {})}
    names = {
        "model": said.get("model_name"),
        "hook_name": said.get("hook_name") or said.get("hook_point"),
        "data": said.get("dataset_path"),
    }
    return {name: str(value) for name, value in names.items() if value}


def _architecture(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """Architecture and k; before version 6, TopK was a "standard" SAE with another activation."""
    given = config.get("architecture", "standard")
    architecture = str(given).removeprefix(OUR_PREFIX)
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    k = config.get("k")
    if activation == "topk":
        architecture, k = "topk", (config.get("activation_fn_kwargs") or {}).get("k", k)
    elif activation != "relu":
        raise ValueError(f"activation_fn is {activation!r}; this code reads 'relu' and 'topk'.")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"The architecture is {given!r}; this code reads {', '.join(ARCHITECTURES)}."
        )
    return architecture, k


def _refuse_what_decode_cannot_undo(config: Mapping[str, Any]) -> None:
    normalise = config.get("normalize_activations")
    if normalise is None or normalise is False:
        normalise = "none"
    if normalise is True:  # before there were several ways
        normalise = "expected_average_only_in"
    if normalise in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"normalize_activations is {normalise!r}: this SAE takes activations scaled by numbers "
            "that are not in its folder. Fold them into the weights with SAELens "
            "(fold_activation_norm_scaling_factor, fold_activation_whitening) and save it again; "
            "what SAELens writes at the end of a training is folded already."
        )
    if normalise != "none":
        raise ValueError(
            f"normalize_activations is {normalise!r}: the decoder would need the norm of x, which "
            "decode(feature_acts) does not know. Only 'none' can be measured."
        )
    hook_name = str(config.get("hook_name") or config.get("hook_point") or "")
    reshape = config.get("reshape_activations", "hook_z" if "hook_z" in hook_name else "none")
    if reshape != "none":
        raise ValueError(
            f"reshape_activations is {reshape!r}: this SAE takes several heads as one vector. Only "
            "hooks with one vector a token, such as blocks.4.hook_resid_post, can be measured."
        )


def _switch(config: Mapping[str, Any], name: str, default: bool) -> bool:
    given = config.get(name)
    given = default if given is None else given
    if not isinstance(given, bool):
        raise ValueError(f"{name} is {given!r}; expected true or false.")
    return given
