"""RAVEL on a stand-in whose answers depend on the activation in a known way, and on the random model."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from c2r_core.data.entities import load_ravel, offline_cities
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import ravel as module
from c2r_core.metrics.ravel import Asked, EntityTask, entity_task, measure_ravel

N, N_VALUES = 120, 4  # entities; values of each of two attributes
D_IN = 2 * N_VALUES


class Dictionary:
    def __init__(self, W_enc, W_dec):
        self.W_enc, self.W_dec = W_enc, W_dec

    def encode(self, x):
        return (x @ self.W_enc).relu()


@pytest.fixture
def task():
    """Coordinates 0–3 say the colour, 4–7 the shape; the model answers by the largest of either."""
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(N_VALUES, (N,), generator=generator)
    shape = torch.randint(N_VALUES, (N,), generator=generator)
    x = torch.zeros(N, D_IN)
    x[torch.arange(N), colour] = 2
    x[torch.arange(N), N_VALUES + shape] = 2

    def asked(value, columns):
        def respond(rows, replacements):
            return (x[rows] if replacements is None else replacements)[:, columns].log_softmax(1)

        return Asked(x, value, torch.ones(N, dtype=torch.bool), respond)

    return EntityTask(
        tuple(map(str, range(N))),
        {
            "colour": asked(colour, slice(0, N_VALUES)),
            "shape": asked(shape, slice(N_VALUES, D_IN)),
        },
        {"size": "the model tells none"},
    )


def test_a_latent_for_each_value_swaps_one_attribute_alone(task):
    report = measure_ravel(Dictionary(torch.eye(D_IN), torch.eye(D_IN)), task)
    assert (report.cause_score, report.isolation_score) == (1, 1)
    assert report.disentanglement_score == report.disentanglement_low == 1
    assert {row.n_latents for row in report.attributes} == {4}
    assert (report.whole_activation_cause_score, report.whole_activation_isolation_score) == (1, 0)
    assert report.attributes_not_evaluable == {"size": "the model tells none"}


def test_latents_that_hold_both_attributes_cannot_be_swapped_apart(task):
    entangled = torch.cat([torch.eye(N_VALUES)] * 2, dim=1)  # a colour's latent drags a shape along
    report = measure_ravel(Dictionary(torch.eye(D_IN)[:, :N_VALUES], entangled), task)
    colour = report.attributes[0]
    assert colour.cause == 1 and colour.isolation < 0.8


def test_unrelated_latents_cause_nothing(task):
    silent = Dictionary(-torch.ones(D_IN, 5), torch.randn(5, D_IN))
    report = measure_ravel(silent, task)
    assert (report.cause_score, report.isolation_score) == (0, 1)
    assert report.disentanglement_score == 0.5  # as for doing nothing


def test_permuted_and_rescaled_latents_score_the_same(task):
    order = torch.randperm(D_IN, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.2, 5, D_IN)
    other = Dictionary(
        (torch.eye(D_IN) * scale)[:, order], (torch.eye(D_IN) / scale[:, None])[order]
    )
    assert measure_ravel(other, task) == measure_ravel(
        Dictionary(torch.eye(D_IN), torch.eye(D_IN)), task
    )


def test_bad_saes_are_refused(task):
    with pytest.raises(NotEvaluable, match="takes activations of width 3; these have 8"):
        measure_ravel(Dictionary(torch.eye(3), torch.eye(3)), task)
    with pytest.raises(NotEvaluable, match="NaN"):
        measure_ravel(Dictionary(torch.full((D_IN, 2), torch.nan), torch.ones(2, D_IN)), task)


def test_attributes_that_always_go_together_cannot_be_told_apart(task):
    asked = task.asked | {"hue": task.asked["colour"]}
    same = replace(task, asked={name: asked[name] for name in ("colour", "hue")})
    assert measure_ravel(Dictionary(torch.eye(D_IN), torch.eye(D_IN)), same).isolation_score == 0
    constant = asked["shape"]._replace(value=torch.zeros(N, dtype=torch.long))
    with pytest.raises(NotEvaluable, match="No two of the entities"):
        measure_ravel(
            Dictionary(torch.eye(D_IN), torch.eye(D_IN)),
            replace(task, asked={"colour": asked["colour"], "shape": constant}),
        )


def test_a_model_that_knows_nothing_is_said_to():
    model = load_language_model(RANDOM)
    with pytest.raises(NotEvaluable, match=r"0 attributes can be asked.* of \d+ of 79 entities"):
        entity_task(model, offline_cities(), "blocks.0.hook_resid_post")


def test_cities_are_complete_and_distinct():
    cities = offline_cities()
    names = {frozenset(known) for known in cities.values.values()}
    assert len(names) == 1 and len(next(iter(names))) == 79
    assert all(value.strip() for known in cities.values.values() for value in known.values())
    shown = {" Prague", " Accra", " Jakarta", " Bogota"}
    assert not shown & set(cities.values["country"])


def test_a_tokenizer_that_joins_every_entity_is_named(monkeypatch):
    monkeypatch.setattr(module, "make_prompts", lambda *_: (None, []))
    model = SimpleNamespace(tokenizer=None)
    with pytest.raises(NotEvaluable, match=r"None of the \d+ entities ends where a token ends"):
        entity_task(model, offline_cities(), "blocks.0.hook_resid_post")


def test_ravels_own_files(tmp_path):
    (tmp_path / "ravel_city_entity_attributes.json").write_text(
        json.dumps({"Paris": {"Country": "France", "Latitude": "49"}})
    )
    with pytest.raises(FileNotFoundError, match="attribute_to_prompts"):
        load_ravel(tmp_path)
    (tmp_path / "ravel_city_attribute_to_prompts.json").write_text(
        json.dumps({"Country": ["%s and %s", "People in %s live in"], "Latitude": ["no subject"]})
    )
    entities = load_ravel(tmp_path)
    (tmp_path / "ravel_town_entity_attributes.json").write_text("{}")
    (tmp_path / "ravel_town_attribute_to_prompts.json").write_text('{"Country": ["%s is in"]}')
    with pytest.raises(NotEvaluable, match="no prompt with one %s"):
        load_ravel(tmp_path, "town")
    assert entities.templates == {"Country": "People in{subject} live in"}
    assert entities.values == {"Country": {" Paris": "France"}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("entity_attributes", "{"),
        ("entity_attributes", "\udcff"),
        ("entity_attributes", "[" * 100_000),
        ("entity_attributes", "[]"),
        ("entity_attributes", '{"Paris": ["Country"]}'),
        ("attribute_to_prompts", '{"Country": "People in %s live in"}'),
        ("attribute_to_prompts", "3"),
    ],
)
def test_files_that_are_not_ravels_are_refused(tmp_path, name, content):
    files = {"entity_attributes": "{}", "attribute_to_prompts": '{"Country": ["In %s live"]}'}
    for one, text in (files | {name: content}).items():
        (tmp_path / f"ravel_city_{one}.json").write_text(text, errors="surrogateescape")
    with pytest.raises(NotEvaluable, match=f"city_{name}.json (is damaged|does not hold)"):
        load_ravel(tmp_path)


def test_a_prompt_of_ravels_that_no_template_can_hold_is_passed_over(tmp_path):
    prompts = [3, "{In} %s live", "In%s live", "In %s live"]
    (tmp_path / "ravel_city_entity_attributes.json").write_text("{}")
    (tmp_path / "ravel_city_attribute_to_prompts.json").write_text(json.dumps({"Country": prompts}))
    assert load_ravel(tmp_path).templates == {"Country": "In{subject} live"}
