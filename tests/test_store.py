"""Reading a store: rows, chunks, text, and what a damaged one says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from stores import CONTEXT, HOOK, small_store

from c2r_core.artefacts.paths import data_dir
from c2r_core.data.language_models import RANDOM, SMOLLM2, load_language_model
from c2r_core.data.store import ActivationStore, HarvestConfig

pytestmark = pytest.mark.skipif(
    not (data_dir() / SMOLLM2).is_dir(), reason="SmolLM2 is not here; run `make data`"
)


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("harvest") / "store")


@pytest.fixture
def copy_of(store, tmp_path):
    """A copy of the store's folder, to damage."""
    for file in store.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_rows_are_the_kept_tokens_in_order(store) -> None:
    kept = torch.cat(list(store.chunks(7, dropped=True)))[torch.from_numpy(store.kept)]
    assert torch.equal(torch.cat(list(store.chunks(50))), kept)
    assert torch.equal(store.batch(range(len(store))), kept)
    assert [len(chunk) for chunk in store.chunks(100)][:-1] == [100] * (len(store) // 100)


def test_a_batch_keeps_the_order_asked_for_across_shards(store) -> None:
    rows = torch.cat(list(store.chunks(1000)))
    indices = np.random.default_rng(0).integers(0, len(store), 300)
    assert torch.equal(store.batch(indices), rows[indices])
    assert torch.equal(store.batch(torch.tensor([5, 5, 0])), rows[[5, 5, 0]])
    assert store.batch([]).shape == (0, store.d_in)


def test_rows_outside_the_store_are_refused(store, model) -> None:
    for indices in ([-1], [0, len(store)]):
        with pytest.raises(IndexError, match=f"rows 0 to {len(store) - 1}"):
            store.batch(indices)
    with pytest.raises(IndexError):
        store.text_around(len(store), model.tokenizer)


def test_the_norm_factor_gives_unit_mean_squared_norm(store) -> None:
    rows = store.batch(range(len(store))).double() * store.norm_factor
    assert rows.pow(2).sum(1).mean().item() == pytest.approx(1, rel=1e-12)


def test_text_around_shows_the_token_within_its_context(store, model) -> None:
    positions = np.flatnonzero(store.kept)
    row = int(np.flatnonzero(positions % CONTEXT == 5)[0])
    window = store.text_around(row, model.tokenizer, before=3, after=2)
    assert len(window.tokens) == 6 and window.position == 3
    assert window.tokens[3] == model.tokenizer.decode([store.contexts.ravel()[positions[row]]])
    row = int(np.flatnonzero(positions % CONTEXT == CONTEXT - 1)[0])
    window = store.text_around(row, model.tokenizer, before=100, after=100)
    assert len(window.tokens) == CONTEXT and window.position == CONTEXT - 1
    assert window.tokens[0] == model.tokenizer.bos_token


@pytest.mark.parametrize("name", ["shard-00002.npy", "kept.npy", "tokens.npy"])
def test_a_missing_file_is_named(copy_of, name) -> None:
    (copy_of / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing.*harvest again"):
        ActivationStore.open(copy_of)


def test_a_truncated_shard_is_named(copy_of) -> None:
    shard = copy_of / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"(?s)shard-00001\.npy.*truncated.*harvest again"):
        ActivationStore.open(copy_of)


def test_a_folder_without_a_store_and_another_format_are_refused(copy_of, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="manifest.json"):
        ActivationStore.open(tmp_path / "nowhere")
    manifest = json.loads((copy_of / "manifest.json").read_text())
    (copy_of / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99; this code reads 2"):
        ActivationStore.open(copy_of)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"context_size": 1}, "context_size is 1; expected at least 2"),
        ({"max_tokens": 15, "context_size": 16}, "at least one context of 16"),
        ({"drop_norm_ratio": 0.5}, "drop_norm_ratio is 0.5"),
        ({"drop_norm_ratio": float("nan")}, "drop_norm_ratio is nan"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; expected 'float16' or 'float32'"),
        ({"precision": "half"}, "precision is 'half'"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        HarvestConfig(hook_name=HOOK, **setting)
