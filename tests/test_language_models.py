"""Language models: loading in silence and offline, names, and what identifies their content."""

from __future__ import annotations

import socket
import sys

import pytest
import torch

from c2r_core.artefacts.paths import data_dir
from c2r_core.data import language_models
from c2r_core.data.forward import activations
from c2r_core.data.language_models import (
    RANDOM,
    SMOLLM2,
    load_language_model,
    model_fingerprint,
)

needs_data = pytest.mark.skipif(
    not (data_dir() / SMOLLM2).is_dir(), reason="SmolLM2 is not here; run `make data`"
)


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def some_tokens(batch: int = 3, context: int = 16) -> torch.Tensor:
    return torch.randint(3, 49152, (batch, context), generator=torch.Generator().manual_seed(0))


@needs_data
@pytest.mark.parametrize("name", [RANDOM, SMOLLM2])
def test_embedded_models_load_in_silence_without_network(name, no_network, capfd) -> None:
    model = load_language_model(name)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert model.cfg.model_name == name
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.tokenizer.decode(model.tokenizer("Four score")["input_ids"][-2:]) == "Four score"


@needs_data
def test_loading_leaves_the_verbosity_of_transformers_alone() -> None:
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    try:
        load_language_model(RANDOM)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled() == bars
    finally:
        logging.set_verbosity(before)


@needs_data
def test_the_random_model_is_always_the_same_and_leaves_the_global_generator_alone(model) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again = load_language_model(RANDOM)
    assert torch.equal(torch.random.get_rng_state(), state)
    tokens = some_tokens()
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))


@needs_data
def test_smollm2_predicts_and_its_residual_stream_is_that_of_transformers() -> None:
    from transformers import AutoModelForCausalLM

    model = load_language_model(SMOLLM2)
    prompt = model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    reference = AutoModelForCausalLM.from_pretrained(
        data_dir() / SMOLLM2, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = reference(prompt, output_hidden_states=True)
        logits = model(prompt)
    assert torch.equal(logits, expected.logits)
    assert model.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    stopped = activations(model, prompt, "blocks.4.hook_resid_post")
    assert torch.equal(stopped, expected.hidden_states[5])


@pytest.mark.parametrize("wrong", ["smollm2-135", "SmolLM2-135m-", "random-2-layers"])
def test_a_near_miss_of_an_embedded_model_is_refused_before_asking_the_hub(
    wrong, monkeypatch
) -> None:
    import transformers

    monkeypatch.delattr(transformers.AutoTokenizer, "from_pretrained")
    with pytest.raises(ValueError, match="Did you mean '(smollm2-135m|random-2-layer)'"):
        load_language_model(wrong)


def test_a_name_that_the_hub_does_not_know_is_explained(monkeypatch) -> None:
    import transformers

    def unknown(*args, **kwargs):
        raise OSError("nobody/nothing is not a valid model identifier\nmore lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unknown)
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*\(nobody/nothing is not a valid"):
        load_language_model("nobody/nothing")


@pytest.mark.parametrize("name", [RANDOM, SMOLLM2])
def test_without_data_the_error_says_make_data(name, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("C2R_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make data"):
        load_language_model(name)


@needs_data
def test_a_local_folder_loads(tmp_path, model) -> None:
    language_models._random_llama().save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(some_tokens()), model(some_tokens()))


@needs_data
def test_the_fingerprint_of_a_folder_is_its_content(tmp_path, model, monkeypatch) -> None:
    for name in ("a", "b"):
        language_models._random_llama().save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    first = model_fingerprint(tmp_path / "a")
    assert first == model_fingerprint(str(tmp_path / "b")) and len(first) == 64
    hashed = []
    whole_hash = language_models.hashlib.file_digest
    monkeypatch.setattr(
        language_models.hashlib,
        "file_digest",
        lambda file, kind: (hashed.append(file.name), whole_hash(file, kind))[1],
    )
    assert model_fingerprint(tmp_path / "a") == first and hashed == []
    for file in ("model.safetensors", "tokenizer.json"):
        path = tmp_path / "b" / file
        before = model_fingerprint(tmp_path / "b")
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert model_fingerprint(tmp_path / "b") != before
    config = tmp_path / "a" / "config.json"
    config.write_text(
        config.read_text().replace('"transformers_version": "', '"transformers_version": "0')
    )
    assert model_fingerprint(tmp_path / "a") == first
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    assert model_fingerprint(tmp_path / "a") != first
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        model_fingerprint(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("config.json", "{", ValueError, r"config\.json is damaged"),
        ("config.json", "[" * 100_000, ValueError, r"config\.json is damaged .*nested too deep"),
        ("config.json", "[]", ValueError, r"config\.json is no JSON object"),
        ("config.json", None, FileNotFoundError, r"config\.json is no file"),
        ("model.safetensors", None, FileNotFoundError, r"model\.safetensors is no file"),
        ("tokenizer.json", None, FileNotFoundError, r"tokenizer\.json is no file"),
        ("config.json", "", FileNotFoundError, r"holds no config\.json"),
    ],
)
def test_a_model_folder_that_is_damaged_is_refused(tmp_path, name, content, error, message) -> None:
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_text("{}")
    assert model_fingerprint(tmp_path)
    (tmp_path / name).unlink()
    if content is None:
        (tmp_path / name).mkdir()
    elif content:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        model_fingerprint(tmp_path)


@needs_data
def test_the_fingerprint_of_a_name(tmp_path, monkeypatch) -> None:
    assert model_fingerprint(RANDOM) != model_fingerprint(SMOLLM2)
    import huggingface_hub

    found = str(tmp_path / "snapshots" / "abc123" / "config.json")
    for answer, expected in ((None, "some/model"), (found, "some/model@abc123")):
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, a=answer: a)
        assert model_fingerprint("some/model") == expected


def test_importing_the_module_does_not_load_transformer_lens() -> None:
    import subprocess

    code = "import sys, c2r_core.data.language_models; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
