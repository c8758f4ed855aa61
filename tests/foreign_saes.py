"""SAE folders as other libraries write them, each with its encode written out as a plain formula."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

D_IN, D_SAE = 6, 10


def random_tensors(d_in=D_IN, d_sae=D_SAE, seed=0):
    """Every tensor that some architecture has; decoder rows of many norms."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "W_enc": draw(d_in, d_sae),
        "W_dec": draw(d_sae, d_in) * (0.5 + torch.rand(d_sae, 1, generator=generator)),
        "b_enc": 0.3 * draw(d_sae),
        "b_dec": 0.3 * draw(d_in),
        "threshold": 0.2 * draw(d_sae).abs(),
        "b_gate": 0.3 * draw(d_sae),
        "r_mag": 0.3 * draw(d_sae),
        "b_mag": 0.3 * draw(d_sae),
    }


def top_k(z, k):
    """relu of the k largest entries of each row, one row at a time."""
    rows = []
    for row in z:
        kept = row.argsort(descending=True)[:k]
        rows.append(torch.zeros_like(row).index_put((kept,), row[kept].clamp(min=0)))
    return torch.stack(rows)


# Name, settings, names of the tensors beside W_enc, W_dec and b_dec, and f as a function of the
# tensors p and the centred input c.
SAE_LENS = {
    "standard": ({}, ["b_enc"], lambda p, c: (c @ p["W_enc"] + p["b_enc"]).clamp(min=0)),
    "topk": ({"k": 3}, ["b_enc"], lambda p, c: top_k(c @ p["W_enc"] + p["b_enc"], 3)),
    "jumprelu": (
        {},
        ["b_enc", "threshold"],
        lambda p, c: torch.where(
            c @ p["W_enc"] + p["b_enc"] > p["threshold"], c @ p["W_enc"] + p["b_enc"], 0.0
        ),
    ),
    "gated": (
        {},
        ["b_gate", "r_mag", "b_mag"],
        lambda p, c: torch.where(
            c @ p["W_enc"] + p["b_gate"] > 0,
            (c @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]).clamp(min=0),
            0.0,
        ),
    ),
}


def write_sae_lens(folder, architecture="standard", tensors=None, d_in=D_IN, d_sae=D_SAE, **config):
    """A folder in the format of SAELens 6; `tensors` replaces some of the random ones."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings, names, _ = SAE_LENS.get(architecture, ({}, ["b_enc"], None))
    p = random_tensors(d_in, d_sae) | (tensors or {})
    chosen = ["W_enc", "W_dec", "b_dec", *names, *(tensors or {})]
    save_file({name: p[name].contiguous() for name in chosen}, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": "a-model",
            "hook_name": "blocks.0.hook_resid_post",
        },
        **settings,
        **config,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return p


def _linear(p):
    return {"encoder.weight": p["W_enc"].T, "decoder.weight": p["W_dec"].T}


def _relu(z):
    return z.clamp(min=0)


def _unit(p):
    """W_enc, b_enc and W_dec with the norms of the decoder rows moved into the encoder."""
    norms = p["W_dec"].norm(dim=1)
    return p["W_enc"] * norms, p["b_enc"] * norms, p["W_dec"] / norms[:, None]


# Name, trainer settings, state dict of the tensors p, f of p and x, and the decoder rows.
DICTIONARY_LEARNING = {
    "AutoEncoder": (
        {},
        lambda p: _linear(p) | {"encoder.bias": p["b_enc"], "bias": p["b_dec"]},
        lambda p, x: _relu((x - p["b_dec"]) @ _unit(p)[0] + _unit(p)[1]),
        lambda p: _unit(p)[2],
    ),
    "AutoEncoderNew": (
        {},
        lambda p: _linear(p) | {"encoder.bias": p["b_enc"], "decoder.bias": p["b_dec"]},
        lambda p, x: _relu(x @ p["W_enc"] + p["b_enc"]),
        lambda p: p["W_dec"],
    ),
    "AutoEncoderTopK": (
        {"k": 3},
        lambda p: (
            _linear(p)
            | {"encoder.bias": p["b_enc"], "b_dec": p["b_dec"]}
            | {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        ),
        lambda p, x: top_k((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 3),
        lambda p: p["W_dec"],
    ),
    "BatchTopKSAE": (
        {"k": 3},
        lambda p: (
            _linear(p)
            | {"encoder.bias": p["b_enc"], "b_dec": p["b_dec"]}
            | {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(0.7)}
        ),
        lambda p, x: _above((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0.7),
        lambda p: p["W_dec"],
    ),
    "MatryoshkaBatchTopKSAE": (
        {"k": 3, "group_sizes": [4, 6]},
        lambda p: (
            {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
            | {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(0.7)}
            | {"group_sizes": torch.tensor([4, 6])}
        ),
        lambda p, x: _above((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0.7),
        lambda p: p["W_dec"],
    ),
    "GatedAutoEncoder": (
        {},
        lambda p: (
            _linear(p)
            | {"decoder_bias": p["b_dec"], "r_mag": p["r_mag"]}
            | {"gate_bias": p["b_gate"], "mag_bias": p["b_mag"]}
        ),
        lambda p, x: (
            _relu((x - p["b_dec"]) @ p["W_enc"] * p["r_mag"].exp() + p["b_mag"])
            * ((x - p["b_dec"]) @ p["W_enc"] + p["b_gate"] > 0)
        ),
        lambda p: p["W_dec"],
    ),
    "JumpReluAutoEncoder": (
        {},
        lambda p: {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
        lambda p, x: _above(x @ p["W_enc"] + p["b_enc"], p["threshold"]),
        lambda p: p["W_dec"],
    ),
}


def _above(z, threshold):
    return torch.where((z > threshold) & (z > 0), z, 0.0)


def write_dictionary_learning(folder, dict_class="AutoEncoder", d_in=D_IN, d_sae=D_SAE, **trainer):
    """A folder in the format of dictionary_learning 0.1.0; returns the tensors under our names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings, state_dict, *_ = DICTIONARY_LEARNING[dict_class]
    p = random_tensors(d_in, d_sae)
    torch.save({name: t.clone() for name, t in state_dict(p).items()}, folder / "ae.pt")
    trainer = {
        "dict_class": dict_class,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "lm_name": "a-model",
        "layer": 4,
        "submodule_name": "resid_post_layer_4",
        **settings,
        **trainer,
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return p
