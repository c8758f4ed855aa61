"""Batches are a pure function of (seed, step), normalised, and say what they are made of."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from c2r_core.artefacts.paths import data_dir
from c2r_core.data.batches import Prefetched, StoreBatches, ToyBatches
from c2r_core.data.language_models import RANDOM, SMOLLM2
from c2r_core.data.toy import FeatureTree
from stores import HOOK, small_store

pytestmark = pytest.mark.skipif(
    not (data_dir() / SMOLLM2).is_dir(), reason="SmolLM2 is not here; run `make data`"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("harvest") / "store")


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


def test_batches_say_what_they_are_made_of(store) -> None:
    batches = StoreBatches(store, 64, seed=1)
    assert batches.norm_factor == store.norm_factor
    assert batches.trained_on == {
        "model": RANDOM,
        "model_fingerprint": store.manifest.model_fingerprint,
        "hook_name": HOOK,
        "text": "speeches",
        "text_fingerprint": store.manifest.text_fingerprint,
    }
    tree = FeatureTree(n_parents=2)
    toys = ToyBatches(tree, 8)
    assert toys.norm_factor == tree.norm_factor
    assert toys.trained_on == {"features": repr(tree)} and "n_parents=2" in repr(tree)


def test_prefetched_batches_are_the_same_and_are_there_before_they_are_asked_for():
    batches = ToyBatches(
        FeatureTree(d_in=20, n_parents=2, children_per_parent=2, n_singles=4), 8, 3
    )
    made, third = [], threading.Event()

    def source(step):
        made.append((step, threading.current_thread().name))
        if step == 2:
            third.set()
        return batches(step)

    ahead = Prefetched(source, ahead=2)
    assert torch.equal(ahead(0), batches(0))
    assert third.wait(timeout=30), "nobody has asked for it yet"
    for step in (1, 2, 7, 8, 0):
        assert torch.equal(ahead(step), batches(step))
    steps, threads = zip(*made, strict=True)
    assert steps[:3] == (0, 1, 2) and all(name.startswith("prefetched") for name in threads)


def test_prefetched_batches_know_what_their_source_knows_and_fail_where_it_does():
    def source(step):
        if step > 1:
            raise OSError(f"disk gone at {step}")
        return torch.zeros(2, 3)

    ahead = Prefetched(source)
    assert getattr(ahead, "norm_factor", None) is None
    assert ahead(0).shape == ahead(1).shape == (2, 3)
    with pytest.raises(OSError, match="disk gone at 2"):
        ahead(2)
    source.norm_factor = 0.5
    assert ahead.norm_factor == 0.5
    with pytest.raises(ValueError, match="ahead is 0; expected at least 1"):
        Prefetched(source, ahead=0)
