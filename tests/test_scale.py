"""Arms that learn from one stream: each as if alone, stopped without a trace, and counted as they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from c2r_core.artefacts.cells import compute
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells
from c2r_core.experiments.plan import PUBLISHED, operations
from c2r_core.experiments.scale import arms_table, operations_table, stack_of

SMOKE, PAPER = load_profile("smoke"), load_profile("paper")


def test_an_arm_of_a_stack_learns_as_it_would_alone():
    stack = stack_of(SMOKE)
    alone = replace(stack, strengths=stack.strengths[-1:])

    def batches(n_stacked):
        def batch(step):
            x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
            return (x / x.norm(dim=-1, keepdim=True)).expand(n_stacked, -1, -1)

        return batch

    together = stack.train(batches(len(stack.strengths)), 0, "cpu").unstack()
    (single,) = alone.train(batches(1), 0, "cpu").unstack()
    assert torch.allclose(together[-1].W_dec, single.W_dec, atol=1e-4)
    assert not torch.allclose(together[0].W_dec, single.W_dec, atol=1e-2)


def test_the_paper_s_weight_is_among_the_arms():
    assert stack_of(PAPER).weights() == pytest.approx([0, 1.697, 5.0], abs=1e-3)


def test_what_is_measured():
    values = {cell.name: compute(cell) for cell in cells("scale", SMOKE)}
    table = arms_table(values)
    assert list(table.index) == ["no penalty", "C²R, strength 0.3", "C²R, strength 0.8839"]
    assert (
        table["fvu"].between(0, 1).all() and (table["l0"] / SMOKE.language_model.k - 1 < 0.2).all()
    )
    assert (table["nearest_cosine_in_chunks"] < table["nearest_cosine"]).all()
    cost = values["arms-of-one-stream"]
    assert min(cost["seconds_model"], cost["seconds_training"], cost["peak_memory"]) > 0
    resumed = values["stopped-and-continued"]
    assert resumed["continued_from"] == SMOKE.scale.check_steps // 2
    assert resumed["parameters_that_differ"] == 0 and resumed["largest_difference"] == 0


def test_one_stream_runs_the_model_once_and_the_exact_search_compares_all_pairs():
    lm = PAPER.language_model
    table = operations_table(lm, [0.0, 0.3, 0.8839])
    apart, shared, exact = (dict(row) for _, row in table.iterrows())
    assert apart["language model"] == 3 * shared["language model"]
    assert exact["searches for neighbours"] == 8 * shared["searches for neighbours"]
    assert apart["encoders"] == shared["encoders"] == exact["encoders"]
    one = operations(lm, PUBLISHED[lm.model], lm.d_sae, 0.3)
    assert sum(apart.values()) == pytest.approx(3 * sum(one) - one.search)


def test_a_model_of_unknown_size_is_named():
    lm = PAPER.language_model.model_copy(update={"model": "someone/unknown"})
    with pytest.raises(ValueError, match="'someone/unknown' is unknown"):
        operations_table(lm, [0.0])
