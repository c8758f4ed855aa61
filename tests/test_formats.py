"""SAEs of other libraries against plain formulas, and against the libraries where they are installed."""

from __future__ import annotations

import hashlib
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from c2r_core.formats import open_sae
from c2r_core.saes import BatchTopKSAE, GatedSAE, save_sae
from foreign_saes import (
    D_IN,
    D_SAE,
    DICTIONARY_LEARNING,
    SAE_LENS,
    random_tensors,
    write_dictionary_learning,
    write_sae_lens,
)


@pytest.fixture
def x():
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(9))


def library(name):
    """A module of another library; skips the test where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed")


def check(opened, x, feature_acts, x_hat, W_dec):
    assert (feature_acts > 0).any(0).sum() > 5 and (feature_acts == 0).any()
    torch.testing.assert_close(opened.sae.encode(x), feature_acts)
    torch.testing.assert_close(opened.sae.decode(feature_acts), x_hat)
    torch.testing.assert_close(opened.sae.W_dec, W_dec)
    # The whole of f through the decoder rows: they are rows, and W_dec is what decode uses.
    by_rows = sum(feature_acts[:, [i]] * opened.sae.W_dec[i] for i in range(D_SAE))
    torch.testing.assert_close(by_rows, x_hat - opened.sae.decode(torch.zeros(1, D_SAE)))


# -- SAELens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", SAE_LENS)
def test_sae_lens_by_formula(tmp_path, x, architecture, centred):
    p = write_sae_lens(tmp_path, architecture, apply_b_dec_to_input=centred)
    opened = open_sae(tmp_path)
    feature_acts = SAE_LENS[architecture][2](p, x - p["b_dec"] if centred else x)
    check(opened, x, feature_acts, feature_acts @ p["W_dec"] + p["b_dec"], p["W_dec"])
    assert (opened.format, opened.architecture) == ("sae_lens", architecture)
    assert opened.stated == {"model": "a-model", "hook_name": "blocks.0.hook_resid_post"}
    weights = (tmp_path / "sae_weights.safetensors").read_bytes()
    assert opened.weights_sha256 == hashlib.sha256(weights).hexdigest()


def test_sae_lens_decoder_norms_are_folded_where_topk_ranks_by_them(tmp_path, x):
    p = write_sae_lens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    norms = p["W_dec"].norm(dim=1)
    scaled = {**p, "W_enc": p["W_enc"] * norms, "b_enc": p["b_enc"] * norms}
    feature_acts = SAE_LENS["topk"][2](scaled, x - p["b_dec"])
    assert not torch.allclose(feature_acts, SAE_LENS["topk"][2](p, x - p["b_dec"]) * norms)
    rows = p["W_dec"] / norms[:, None]
    check(open_sae(tmp_path), x, feature_acts, feature_acts @ rows + p["b_dec"], rows)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_sae_lens_training_checkpoint_becomes_a_jumprelu(tmp_path, x, architecture):
    topk_threshold = {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    p = write_sae_lens(tmp_path, architecture, topk_threshold, k=3)
    z = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    feature_acts = torch.where(z > 0.7, z, 0.0)
    check(open_sae(tmp_path), x, feature_acts, feature_acts @ p["W_dec"] + p["b_dec"], p["W_dec"])


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_the_prefix_of_our_own_training_saes_is_no_part_of_the_architecture(
    tmp_path, x, architecture
):
    write_sae_lens(tmp_path, architecture)
    plain = open_sae(tmp_path)
    file = tmp_path / "cfg.json"
    config = json.loads(file.read_text()) | {"architecture": f"c2r_{architecture}"}
    file.write_text(json.dumps(config))
    opened = open_sae(tmp_path)
    assert opened.architecture == plain.architecture == architecture
    assert torch.equal(opened.sae.encode(x), plain.sae.encode(x))
    file.write_text(json.dumps(config | {"architecture": "c2r_temporal"}))
    with pytest.raises(
        ValueError, match="architecture is 'c2r_temporal'; this code reads standard"
    ):
        open_sae(tmp_path)


def test_sae_lens_before_version_6(tmp_path, x):
    p = write_sae_lens(tmp_path)
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "hook_point": "blocks.3.hook_resid_pre",
        "normalize_activations": False,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    opened = open_sae(tmp_path)
    feature_acts = SAE_LENS["topk"][2](p, x - p["b_dec"])
    check(opened, x, feature_acts, feature_acts @ p["W_dec"] + p["b_dec"], p["W_dec"])
    assert opened.architecture == "topk"
    assert opened.stated == {"hook_name": "blocks.3.hook_resid_pre"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "'layer_norm': the decoder would need the norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "Only 'none' can be measured"),
        ({"normalize_activations": "expected_average_only_in"}, "not in its folder. Fold them"),
        ({"reshape_activations": "hook_z"}, "takes several heads as one vector"),
        ({"architecture": "temporal"}, "'temporal'; this code reads standard, topk"),
        ({"activation_fn": "tanh-relu"}, "this code reads 'relu' and 'topk'"),
        ({"architecture": "jumprelu"}, "holds the tensors .*; expected .*'threshold'"),
        ({"architecture": "topk", "k": 0}, "k is 0; expected a positive"),
        ({"architecture": "topk", "k": D_SAE + 1}, "expected at most d_sae"),
        ({"d_sae": D_SAE + 1}, r"cfg.json says .d_in, d_sae. = \(6, 11\)"),
    ],
)
def test_sae_lens_what_cannot_be_represented_is_refused(tmp_path, config, message):
    write_sae_lens(tmp_path)
    file = tmp_path / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ValueError, match=message):
        open_sae(tmp_path)


def test_a_transposed_decoder_is_named(tmp_path):
    write_sae_lens(tmp_path, tensors={"W_dec": random_tensors()["W_dec"].T})
    with pytest.raises(ValueError, match="It is transposed"):
        open_sae(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("W_enc", r"W_enc has shape \(1, 6, 10\); expected \(d_in, d_sae\)"),
        ("b_dec", r"b_dec has shape \(1, 6\); expected \(6,\)"),
    ],
)
def test_tensors_of_another_shape_are_named(tmp_path, name, message):
    write_sae_lens(tmp_path, tensors={name: random_tensors()[name][None]})
    with pytest.raises(ValueError, match=message):
        open_sae(tmp_path)


def test_sae_lens_scaling_factor(tmp_path):
    write_sae_lens(tmp_path, tensors={"scaling_factor": torch.ones(D_SAE)})
    open_sae(tmp_path)
    write_sae_lens(tmp_path, tensors={"scaling_factor": torch.full((D_SAE,), 2.0)})
    with pytest.raises(ValueError, match="fine-tuned scaling_factor"):
        open_sae(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", [*SAE_LENS, "topk by norm"])
def test_sae_lens_against_the_library(tmp_path, x, architecture, centred):
    sae_lens = library("sae_lens")
    by_norm = {"rescale_acts_by_decoder_norm": True} if architecture == "topk by norm" else {}
    write_sae_lens(tmp_path, architecture.split()[0], apply_b_dec_to_input=centred, **by_norm)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    opened = open_sae(tmp_path)
    with torch.no_grad():
        feature_acts = theirs.encode(x)
        torch.testing.assert_close(opened.sae.encode(x), feature_acts)
        torch.testing.assert_close(opened.sae.decode(feature_acts), theirs.decode(feature_acts))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "by_norm"),
    [
        ("Standard", None),
        ("JumpReLU", None),
        ("Gated", None),
        ("TopK", True),
        ("TopK", False),
        ("BatchTopK", True),
        ("BatchTopK", False),
        ("MatryoshkaBatchTopK", True),
        ("MatryoshkaBatchTopK", False),
    ],
)
def test_sae_lens_training_saes_against_the_library(tmp_path, x, name, by_norm):
    sae_lens = library("sae_lens")
    settings = {"d_in": D_IN, "d_sae": D_SAE}
    if by_norm is not None:
        settings |= {"k": 3, "rescale_acts_by_decoder_norm": by_norm}
    if "Matryoshka" in name:
        settings["matryoshka_widths"] = [4, D_SAE]
    training = getattr(sae_lens, f"{name}TrainingSAE")
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")
    sae = training(config(**settings))
    drawn = random_tensors()
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            parameter.copy_(drawn[parameter_name])
    if "BatchTopK" in name:
        sae.topk_threshold.fill_(0.7)
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "export")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "export")
    with torch.no_grad():
        feature_acts = theirs.encode(x)
        x_hat = theirs.decode(feature_acts)
    for folder in ("checkpoint", "export"):
        ours = open_sae(tmp_path / folder).sae
        torch.testing.assert_close(ours.encode(x), feature_acts)
        torch.testing.assert_close(ours.decode(feature_acts), x_hat)


# -- dictionary_learning -----------------------------------------------------------------------


@pytest.mark.parametrize("dict_class", DICTIONARY_LEARNING)
def test_dictionary_learning_by_formula(tmp_path, x, dict_class):
    p = write_dictionary_learning(tmp_path, dict_class)
    opened = open_sae(tmp_path)
    *_, encode, rows = DICTIONARY_LEARNING[dict_class]
    feature_acts = encode(p, x)
    check(opened, x, feature_acts, feature_acts @ rows(p) + p["b_dec"], rows(p))
    assert (opened.format, opened.architecture) == ("dictionary_learning", dict_class)
    assert opened.stated == {"model": "a-model", "layer": "4", "hook_name": "resid_post_layer_4"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dict_class", DICTIONARY_LEARNING)
def test_dictionary_learning_against_the_library(tmp_path, x, dict_class):
    dictionaries = library("dictionary_learning.utils")
    write_dictionary_learning(tmp_path, dict_class)
    theirs, _ = dictionaries.load_dictionary(str(tmp_path), device="cpu")
    opened = open_sae(tmp_path)
    with torch.no_grad():
        feature_acts = theirs.encode(x)
        torch.testing.assert_close(opened.sae.encode(x), feature_acts)
        torch.testing.assert_close(opened.sae.decode(feature_acts), theirs.decode(feature_acts))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "IdentityDict"}, "'IdentityDict'; this code reads AutoEncoder, "),
        ({"dict_class": "BatchTopKSAE"}, "holds the tensors"),
        ({"activation_dim": 7}, r"says .activation_dim, dict_size. = \(7, 10\)"),
    ],
)
def test_dictionary_learning_bad_config_is_explained(tmp_path, trainer, message):
    write_dictionary_learning(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["trainer"] |= trainer
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_sae(tmp_path)


@pytest.mark.parametrize("trainer", [{}, None, ["AutoEncoder"]])
def test_dictionary_learning_without_a_class_is_explained(tmp_path, trainer):
    write_dictionary_learning(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(ValueError, match=r"config.json has no entry trainer.dict_class"):
        open_sae(tmp_path)


def test_dictionary_learning_k_of_config_and_file_must_agree(tmp_path):
    write_dictionary_learning(tmp_path, "AutoEncoderTopK", k=4)
    with pytest.raises(ValueError, match="config.json says k = 4; ae.pt says 3"):
        open_sae(tmp_path)


class Intruder:
    """A pickle that would run code when read."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, capsys):
    write_dictionary_learning(tmp_path)
    torch.save({"encoder.weight": Intruder()}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        open_sae(tmp_path)
    assert "code ran" not in capsys.readouterr().out
    torch.save([torch.zeros(2)], tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="no state dict"):
        open_sae(tmp_path)


# -- own SAEs, and recognising formats ---------------------------------------------------------


@pytest.mark.parametrize("own", [BatchTopKSAE(D_IN, D_SAE, 3), GatedSAE(D_IN, D_SAE, 0.1)])
def test_own_saes_take_raw_activations(tmp_path, x, own):
    own.norm_factor = 0.25
    opened = open_sae(save_sae(own, tmp_path / "sae"))
    assert (opened.format, opened.architecture) == ("c2r", own.architecture)
    with torch.no_grad():
        torch.testing.assert_close(opened.sae.encode(x), own.encode(0.25 * x) / 0.25)
        torch.testing.assert_close(opened.sae(x), own(0.25 * x) / 0.25)


def test_what_was_looked_for_is_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        open_sae(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError) as error:
        open_sae(tmp_path)
    for name in ("sae.safetensors", "cfg.json", "sae_weights.safetensors", "config.json", "ae.pt"):
        assert name in str(error.value)
    write_sae_lens(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae_lens .*: lacks cfg.json;"):
        open_sae(tmp_path)


def test_a_folder_of_two_formats_is_refused(tmp_path):
    write_sae_lens(tmp_path)
    write_dictionary_learning(tmp_path)
    with pytest.raises(ValueError, match="fits several formats"):
        open_sae(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_is_named(tmp_path, text):
    write_sae_lens(tmp_path)
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(ValueError, match="cfg.json is (damaged|no JSON object)"):
        open_sae(tmp_path)


def test_damaged_weights_are_named(tmp_path):
    write_sae_lens(tmp_path / "a")
    (tmp_path / "a" / "sae_weights.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="sae_weights.safetensors is damaged"):
        open_sae(tmp_path / "a")
    write_dictionary_learning(tmp_path / "b")
    (tmp_path / "b" / "ae.pt").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="ae.pt is damaged"):
        open_sae(tmp_path / "b")


def test_half_precision_weights_are_measured_in_float32(tmp_path, x):
    write_sae_lens(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    sae = open_sae(tmp_path).sae
    assert sae.W_dec.dtype == sae.decode(sae.encode(x)).dtype == torch.float32


def test_wrong_width_is_explained(tmp_path):
    write_sae_lens(tmp_path)
    with pytest.raises(ValueError, match="expects .*d_in=6"):
        open_sae(tmp_path).sae.encode(torch.zeros(2, 7))
