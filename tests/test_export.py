"""SAEs written for other libraries: read back here, and loaded by these where they are installed."""

from __future__ import annotations

import pytest
import torch
from test_formats import library

from architectures import D_IN, every_architecture, make
from c2r_core.formats import export_sae, open_sae
from c2r_core.formats.__main__ import main
from c2r_core.formats.export import ACTIVATIONS, WRITTEN
from c2r_core.saes import BatchTopKSAE, TopKSAE, save_sae
from foreign_saes import (
    DICTIONARY_LEARNING,
    SAE_LENS,
    write_dictionary_learning,
    write_sae_lens,
)

NORM_FACTOR = 0.25
every_format = pytest.mark.parametrize("format", WRITTEN)


def samples(d_in):
    return torch.randn(200, d_in, generator=torch.Generator().manual_seed(9)) / NORM_FACTOR


def own(architecture):
    """An SAE of this package, trained on scaled activations, with raw samples and what it makes of them."""
    if architecture not in ACTIVATIONS:
        pytest.skip(f"{architecture} is registered elsewhere")
    sae = make(architecture)
    sae.norm_factor, x = NORM_FACTOR, samples(D_IN)
    with torch.no_grad():
        feature_acts = sae.encode(NORM_FACTOR * x) / NORM_FACTOR
        x_hat = sae(NORM_FACTOR * x) / NORM_FACTOR
    assert (feature_acts > 0).any(0).sum() > 5 and (feature_acts == 0).any()
    return sae, x, feature_acts, x_hat


def check(theirs, x, feature_acts, x_hat):
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), feature_acts, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.decode(feature_acts), x_hat, rtol=1e-4, atol=1e-4)


@every_format
@every_architecture
def test_what_is_exported_is_read_back_with_equal_outputs(tmp_path, architecture, format):
    sae, *expected = own(architecture)
    sae.trained_on = {"model": "a-model", "hook_name": "blocks.0.hook_resid_post", "steps": 3}
    opened = open_sae(export_sae(sae, tmp_path / "theirs", format))
    assert opened.format == format
    assert opened.stated == {"model": "a-model", "hook_name": "blocks.0.hook_resid_post"}
    check(opened.sae, *expected)
    torch.testing.assert_close(opened.sae.W_dec, sae.W_dec.detach())


@pytest.mark.filterwarnings("ignore")
@every_architecture
def test_sae_lens_loads_what_is_exported_with_equal_outputs(tmp_path, architecture):
    sae_lens = library("sae_lens")
    sae, *expected = own(architecture)
    check(sae_lens.SAE.load_from_disk(export_sae(sae, tmp_path / "theirs", "sae_lens")), *expected)


@pytest.mark.filterwarnings("ignore")
@every_architecture
def test_dictionary_learning_loads_what_is_exported_with_equal_outputs(tmp_path, architecture):
    dictionaries = library("dictionary_learning.utils")
    sae, *expected = own(architecture)
    folder = export_sae(sae, tmp_path / "theirs", "dictionary_learning")
    check(dictionaries.load_dictionary(str(folder), device="cpu")[0], *expected)


@every_format
@pytest.mark.parametrize("source", [*SAE_LENS, *DICTIONARY_LEARNING])
def test_an_sae_of_one_library_is_written_for_another(tmp_path, source, format):
    write = write_sae_lens if source in SAE_LENS else write_dictionary_learning
    write(tmp_path / "given", source)
    given = open_sae(tmp_path / "given")
    x = samples(given.sae.W_dec.shape[1])
    with torch.no_grad():
        feature_acts = given.sae.encode(x)
        x_hat = given.sae.decode(feature_acts)
    assert main([str(tmp_path / "given"), str(tmp_path / "new"), "--format", format]) == 0
    opened = open_sae(tmp_path / "new")
    check(opened.sae, x, feature_acts, x_hat)
    assert opened.stated["hook_name"] == given.stated["hook_name"]


@pytest.mark.parametrize("source", SAE_LENS)
def test_moving_the_bias_in_and_out_changes_nothing(tmp_path, source):
    write_sae_lens(tmp_path, source)
    sae = open_sae(tmp_path).sae
    x = samples(sae.W_dec.shape[1])
    moved = sae.with_centred(False)
    assert moved.centred is False and moved.with_centred(False) is moved
    assert not torch.equal(moved.activation(x @ sae.W_enc), sae.activation(x @ sae.W_enc))
    torch.testing.assert_close(moved.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        moved.with_centred(True).encode(x), sae.encode(x), rtol=1e-4, atol=1e-5
    )


def test_what_cannot_be_exported_says_why(tmp_path):
    class Own(TopKSAE):
        architecture = "own_of_the_test"

    for sae, format, message in (
        (BatchTopKSAE(6, 10, k=2, seed=[0, 1]), "sae_lens", "stack of 2 SAEs; export what unstack"),
        (Own(6, 10, k=2), "sae_lens", "'own_of_the_test', of which other libraries know nothing"),
        (
            TopKSAE(6, 10, k=2),
            "saelens",
            "'saelens'; expected one of sae_lens, dictionary_learning",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export_sae(sae, tmp_path / "theirs", format)
        assert not (tmp_path / "theirs").exists()


def test_a_folder_is_not_replaced_unasked(tmp_path, capsys):
    folder = save_sae(TopKSAE(6, 10, k=2), tmp_path / "mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    arguments = [str(folder), str(tmp_path / "theirs"), "--format", "sae_lens"]
    assert main(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["notes.txt"]
    assert main([*arguments, "--overwrite"]) == 0
    assert open_sae(tmp_path / "theirs").architecture == "topk"
