"""Harvesting: what is stored, what is dropped, and what errors, kills, rivals and full disks leave behind."""

from __future__ import annotations

import json
import os
import resource
import time

import numpy as np
import pytest
import torch

from c2r_core.artefacts import files
from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.files import DiskFullError
from c2r_core.artefacts.paths import data_dir
from c2r_core.data import harvest as harvesting
from c2r_core.data.forward import activations
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import RANDOM, SMOLLM2, load_language_model, model_fingerprint
from c2r_core.data.store import ActivationStore
from c2r_core.data.text import Corpus, Document
from c2r_core.errors import NotEvaluable
from forks import forked
from stores import CONTEXT, HOOK, all_activations, small_config, small_corpus, small_store

pytestmark = pytest.mark.skipif(
    not (data_dir() / SMOLLM2).is_dir(), reason="SmolLM2 is not here; run `make data`"
)


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture(scope="module")
def corpus():
    return small_corpus()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("harvest") / "store")


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

    (contexts,) = harvesting.cut_contexts(WithoutBos(), ["one two three four five"], 2)
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


def test_norms_and_kept_tokens_by_their_plain_forms() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(6 * CONTEXT, 33)) * generator.lognormal(size=(6 * CONTEXT, 1))
    x = x.astype(np.float16)
    norms = harvesting.row_norms(torch.from_numpy(x))
    by_hand = [np.sqrt(sum(float(value) ** 2 for value in row)) for row in x]
    np.testing.assert_allclose(norms, by_hand, rtol=1e-12)
    behind = [norm for i, norm in enumerate(by_hand) if i % CONTEXT]
    median = harvesting.median_norm(norms, CONTEXT)
    assert median == pytest.approx(np.median(behind), rel=1e-12)
    kept = harvesting.kept_positions(norms, CONTEXT, 2 * median)
    expected = [i for i, norm in enumerate(by_hand) if i % CONTEXT and norm <= 2 * median]
    assert kept.tolist() == expected and 0 < len(expected) < len(behind)
    factor = harvesting.norm_factor(norms[kept])
    assert np.mean((factor * x[kept].astype(float)) ** 2) * 33 == pytest.approx(1, rel=1e-12)


def test_the_first_token_of_a_context_is_dropped_whatever_its_norm(model, corpus, tmp_path) -> None:
    store = harvest(model, corpus, small_config(drop_norm_ratio=1e6), tmp_path / "store")
    expected = np.arange(4 * CONTEXT) % CONTEXT != 0
    assert np.array_equal(store.kept, expected)


def test_the_manifest_says_how_the_store_was_made(store, corpus) -> None:
    written = json.loads((store.folder / "manifest.json").read_text())
    assert written["model_name"] == RANDOM
    assert written["hook_name"] == HOOK
    assert written["corpus_name"] == "speeches"
    assert written["text_fingerprint"] == corpus.fingerprint
    assert written["model_fingerprint"] == model_fingerprint(RANDOM)
    assert (written["dtype"], written["precision"]) == ("float16", "float32")
    assert (written["n_tokens"], written["d_in"]) == (40 * CONTEXT, 64)
    assert [shard["n_tokens"] for shard in written["shards"]] == [12 * CONTEXT] * 3 + [4 * CONTEXT]
    installed = written["library_versions"]["torch"]  # some builds add "+cu130" to it themselves
    assert installed and torch.__version__.startswith(installed)
    assert np.load(store.folder / "shard-00003.npy").dtype == np.float16
    assert ActivationStore.open(store.folder).manifest == store.manifest


def test_float32_and_bfloat16_are_stored_as_asked(model, corpus, tmp_path) -> None:
    exact = harvest(model, corpus, small_config(dtype="float32"), tmp_path / "a")
    stored = torch.cat(list(exact.chunks(1000, dropped=True)))
    assert torch.equal(stored, all_activations(exact, model))
    config = small_config(dtype="float32", precision="bfloat16")
    rough = harvest(model, corpus, config, tmp_path / "b")
    assert not torch.equal(torch.cat(list(rough.chunks(1000, dropped=True))), stored)
    assert rough.manifest.precision == "bfloat16"


def test_short_documents_are_counted(model, tmp_path) -> None:
    corpus = Corpus("c", (Document("long", "word " * 100), Document("short", "word")))
    store = harvest(model, corpus, small_config(max_tokens=None), tmp_path / "s")
    assert (store.manifest.n_documents, store.manifest.n_short_documents) == (2, 1)


def test_a_progress_bar_only_on_request(model, corpus, tmp_path, capfd) -> None:
    harvest(model, corpus, small_config(), tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    harvest(model, corpus, small_config(), tmp_path / "b", progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and "64/64" in captured.err


def test_a_text_shorter_than_a_context_is_refused(model, tmp_path) -> None:
    corpus = Corpus("c", (Document("short", "four score and seven"),))
    with pytest.raises(NotEvaluable, match="longest has 4 tokens, a context needs 15"):
        harvest(model, corpus, small_config(), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_hook_is_refused_before_anything_is_written(model, corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match="blocks.0.hook_resid_post"):
        harvest(
            model, corpus, small_config(hook_name="blocks.0.hook_resid_pots"), tmp_path / "store"
        )
    assert list(tmp_path.iterdir()) == []


def test_settings_that_do_not_fit_are_refused(model, corpus, tmp_path) -> None:
    config = small_config(context_size=5000, max_tokens=None)
    with pytest.raises(ValueError, match="context_size is 5000; expected 2 to 2048, the longest"):
        harvest(model, corpus, config, tmp_path / "store")
    for setting in ("contexts_per_pass", "shard_tokens"):
        with pytest.raises(ValueError, match=f"{setting} is 0"):
            harvest(model, corpus, small_config(), tmp_path / "store", **{setting: 0})
    with pytest.raises(TypeError, match=r"corpus is 'texts'; expected a Corpus: load_corpus\(\)"):
        harvest(model, "texts", small_config(), tmp_path / "store")
    with pytest.raises(TypeError, match=r"expected HarvestConfig\(hook_name=...\)"):
        harvest(model, corpus, HOOK, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(model, corpus, store) -> None:
    with pytest.raises(FileExistsError, match="ActivationStore.open"):
        harvest(model, corpus, small_config(), store.folder)


def with_activations_times(factor: float, monkeypatch) -> None:
    monkeypatch.setattr(
        harvesting, "activations", lambda *a, **settings: activations(*a, **settings) * factor
    )


def test_half_precision_overflow_suggests_float32(model, corpus, tmp_path, monkeypatch) -> None:
    with_activations_times(1e6, monkeypatch)
    with pytest.raises(NotEvaluable, match="does not fit into float16 .*dtype='float32'"):
        harvest(model, corpus, small_config(), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []
    harvest(model, corpus, small_config(dtype="float32"), tmp_path / "store")


def test_activations_that_are_all_zero_are_refused(model, corpus, tmp_path, monkeypatch) -> None:
    with_activations_times(0.0, monkeypatch)
    with pytest.raises(NotEvaluable, match="activations .* are zero"):
        harvest(model, corpus, small_config(), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_seen_before_the_model_runs(
    model, corpus, tmp_path, monkeypatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage)
    n_bytes = 40 * CONTEXT * (64 * 2 + 5)
    with pytest.raises(DiskFullError, match=f"{n_bytes:,} bytes are needed, 1,000 are free.*store"):
        harvest(model, corpus, small_config(40), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_half_way_is_explained_and_cleaned(model, corpus, tmp_path) -> None:
    # A limit on the size of files fails a write as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(DiskFullError, match="the disk is full: it has been removed"):
            harvest(model, corpus, small_config(40), tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def _harvest(room, how) -> None:
    """Harvest, and at the end be killed, or be in no hurry."""
    statistics = harvesting._statistics

    def at_the_end(*arguments):
        if how == "dies":
            os._exit(9)
        (room / f"builder-{os.getpid()}").touch()
        time.sleep(0.5)
        return statistics(*arguments)

    def build(folder):
        harvest(load_language_model(RANDOM), small_corpus(), small_config(), folder)

    harvesting._statistics = at_the_end
    if how == "dies":
        build(room / "stores" / "store")
    os.environ["C2R_CACHE"] = str(room / "stores")
    folder = cached("activations", {}, build)
    assert ActivationStore.open(folder).manifest.n_tokens == 4 * CONTEXT


@pytest.mark.parametrize("how", ["dies", "same cache entry"])
def test_killed_and_simultaneous_harvests(model, corpus, tmp_path, how) -> None:
    processes = [forked(_harvest, tmp_path, how) for _ in range(1 if how == "dies" else 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == ([9] if how == "dies" else [0, 0])
    stores = tmp_path / "stores"
    if how == "dies":
        (left,) = stores.iterdir()
        store = harvest(model, corpus, small_config(), stores / "store")
        assert sorted(path.name for path in stores.iterdir()) == ["store", left.name]
        assert store.manifest.n_tokens == 4 * CONTEXT
    else:
        assert not list(stores.rglob("*.part"))
        assert len(list(tmp_path.glob("builder-*"))) == 1, "the other waits for it"
