"""What a training records goes to those who listen, and changes nothing."""

from __future__ import annotations

import inspect
import sys
import warnings

import pytest
import torch

from c2r_core import C2R, BatchTopKSAE, History, TrainConfig, train
from c2r_core.errors import MissingExtra
from c2r_core.training.checkpoints import read_checkpoint
from c2r_core.training.tracking import tensorboard, tracked

STEPS = [0, 4, 8, 9]


def batches(step):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return torch.nn.functional.normalize(x, dim=-1)


def run(*, steps=10, checkpoint=None, n_stacked=None):
    sae = BatchTopKSAE(8, 24, k=2, seed=0 if n_stacked is None else list(range(n_stacked)))
    config = TrainConfig(steps=steps, log_every=4, checkpoint_every=5)
    source = batches if n_stacked is None else lambda step: batches(step).expand(n_stacked, -1, -1)
    history = train(sae, source, config, [C2R(weight=0.1)], checkpoint=checkpoint, progress=False)
    return sae, history


class Listener:
    """A log that keeps what it hears."""

    def __init__(self):
        self.heard = []

    def __call__(self, numbers, *, step):
        self.heard.append((step, numbers))

    @property
    def steps(self):
        return [step for step, _ in self.heard]


def test_a_log_hears_the_history_and_changes_nothing():
    alone, _ = run()
    first, second = Listener(), Listener()
    with tracked(first, second):
        sae, history = run()
    records = [{"step": step} | numbers for step, numbers in first.heard]
    assert records == history.records and first.heard == second.heard
    assert (
        first.steps == STEPS and {"lr", "l0", "reconstruction", "c2r"} <= first.heard[0][1].keys()
    )
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), sae.parameters(), strict=True))


def test_after_the_context_nobody_listens():
    listener = Listener()
    with tracked(listener):
        pass
    run()
    assert listener.heard == []


def test_an_inner_context_adds_its_log_and_leaves_the_outer_one():
    outer, inner = Listener(), Listener()
    with tracked(outer):
        with tracked(inner):
            run()
        run()
    assert inner.steps == STEPS and outer.steps == STEPS + STEPS


def test_the_saes_of_a_stack_are_numbered():
    listener = Listener()
    with tracked(listener):
        _, history = run(n_stacked=2)
    numbers = listener.heard[-1][1]
    assert [numbers["l0/0"], numbers["l0/1"]] == history.records[-1]["l0"]
    assert isinstance(numbers["lr"], float)


def test_what_a_training_has_sent_before_its_checkpoint_is_not_sent_again(tmp_path):
    file, listener = tmp_path / "run.safetensors", Listener()

    def stops(step):
        if step == 7:
            raise KeyboardInterrupt
        return batches(step)

    config = TrainConfig(steps=10, log_every=4, checkpoint_every=5)
    with tracked(listener), pytest.raises(KeyboardInterrupt):
        train(BatchTopKSAE(8, 24, k=2), stops, config, checkpoint=file, progress=False)
    assert listener.steps == [0, 4]
    assert [one["step"] for one in read_checkpoint(file)[1]["history"]] == [0, 4]
    with tracked(listener):
        history = train(BatchTopKSAE(8, 24, k=2), batches, config, checkpoint=file, progress=False)
    assert listener.steps == [one["step"] for one in history.records] == STEPS


def test_a_log_that_fails_costs_a_warning_and_no_training():
    well = Listener()

    def fails(numbers, *, step):
        if step == 4:
            raise OSError("no network")

    with pytest.warns(UserWarning, match="failed at step 4 .*: OSError: no network") as warned:
        with tracked(fails, well):
            run()
    assert len(warned) == 1 and well.steps == STEPS


def test_an_error_of_the_training_is_its_own_and_the_last_record_is_heard():
    def ends(step):
        if step == 5:
            raise RuntimeError("the text has ended")
        return batches(step)

    listener = Listener()
    with tracked(listener), pytest.raises(RuntimeError, match="has ended"):
        train(BatchTopKSAE(8, 24, k=2), ends, TrainConfig(steps=10, log_every=2), progress=False)
    assert listener.steps == [0, 2, 4]


def test_a_record_is_heard_as_it_is_when_the_next_one_comes():
    """A sharded training puts the sum over all shards in the place of its own L0."""
    listener = Listener()
    with tracked(listener):
        records = History().records
        for step in (0, 1):
            records.append({"step": step, "l0": 1.0})
            assert listener.steps == [0] * step
            records[-1]["l0"] = 4.0
    assert listener.heard == [(0, {"l0": 4.0}), (1, {"l0": 4.0})]


def test_tensorboard_reads_back_what_was_recorded(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard(tmp_path / "logs") as log, tracked(log):
        _, history = run()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(events.Tags()["scalars"]) == history.records[0].keys() - {"step"}
    for term in ("l0", "c2r", "lr"):
        read = [(event.step, event.value) for event in events.Scalars(term)]
        assert [step for step, _ in read] == STEPS
        recorded = [record[term] for record in history.records]
        assert [value for _, value in read] == pytest.approx(recorded, rel=1e-6)


def test_tensorboard_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtra, match=r"c2r-core\[tensorboard\]"):
        with tensorboard(tmp_path / "logs"):
            pass
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("package", "owner"), [("wandb", "Run"), ("trackio", None)])
def test_the_log_of_others_takes_what_is_sent(package, owner):
    """Their signature stands for them: a run would need a login or a server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(package, reason=f"{package} is not installed")
    signature = inspect.signature(getattr(module, owner).log if owner else module.log)
    heard = []

    def log(*given, **named):
        bound = signature.bind(*([None] if owner else []), *given, **named)
        heard.append(bound.arguments["step"])

    with tracked(log):
        run()
    assert heard == STEPS
