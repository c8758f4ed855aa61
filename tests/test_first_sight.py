"""The figure that opens the README: it shows the committed results, and can be read on any background."""

from __future__ import annotations

import importlib.util
import json
import re
from statistics import fmean

import pytest
from PIL import Image

from c2r_core.artefacts.profiles import load_profile
from conftest import PROJECT

PICTURE = PROJECT / "docs" / "figures" / "first_sight.png"


@pytest.fixture(scope="module")
def picture():
    with Image.open(PICTURE) as image:
        image.load()
        return image


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("first_sight", PICTURE.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_shows_the_committed_results(picture, script, monkeypatch):
    monkeypatch.setenv("C2R_RESULTS", str(PROJECT / "results"))
    now = script.shown(load_profile("default"))
    assert json.loads(picture.text["shown"]) == now, "run make figure"
    assert len(now["split"]["C²R"]) == load_profile("default").toy.seeds


def test_the_caption_has_the_other_family_s_numbers(script, monkeypatch):
    monkeypatch.setenv("C2R_RESULTS", str(PROJECT / "results"))
    profile = load_profile("default")
    values = script.committed("toy", profile)
    tables = {name: script.toy_table(values, name, profile.toy) for name in ("relu", "batch_topk")}
    split, silent = (
        {name: fmean(script.values_by_seed(tables[name], "baseline", column)) for name in tables}
        for column in ("latents_per_parent", "silent_with_child")
    )
    assert split["relu"] > split["batch_topk"] and silent["batch_topk"] > silent["relu"]
    caption = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    other = split["batch_topk"], silent["relu"]
    assert "in the other it is {:.1f} latents (left) and {:.2f} (middle).".format(*other) in caption


def test_a_missing_result_is_named_with_the_command_that_computes_it(script):
    with pytest.raises(FileNotFoundError, match="of toy is missing; compute it with `c2r run toy"):
        script.shown(load_profile("default"))


def test_it_is_small_sharp_and_on_white(picture):
    assert PICTURE.stat().st_size <= 150_000
    assert min(picture.info["dpi"]) > 159
    rgb = picture.convert("RGBA")
    corners = [(x, y) for x in (0, rgb.width - 1) for y in (0, rgb.height - 1)]
    assert {rgb.getpixel(corner) for corner in corners} == {(255, 255, 255, 255)}


def test_it_opens_the_readme_and_its_description_has_its_numbers(picture):
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    description, path = re.search(r"!\[(.*?)\]\((.*?)\)", readme, re.DOTALL).groups()
    assert PROJECT / path == PICTURE and readme.index("![") < readme.index("A sparse autoencoder")
    shown = json.loads(picture.text["shown"])
    mean = {what: {arm: fmean(x) for arm, x in shown[what].items()} for what in ("split", "silent")}
    said = " ".join(description.split())
    assert "about seven latents carry one concept, with C²R or OrtSAE about one" in said
    assert [round(x) for x in mean["split"].values()] == [7, 1, 1]
    assert "silent in two of five samples" in said and "in almost none" in said
    assert round(5 * mean["silent"]["baseline"]) == 2
    assert max(mean["silent"]["C²R"], mean["silent"]["OrtSAE"]) < 0.05
    effect = {(one["name"].split("\n")[0], one["arm"]): one["mean"] for one in shown["text"]}
    assert "C²R and OrtSAE lower absorption and raise consistency" in said
    assert max(effect["absorption", arm] for arm in ("C²R", "OrtSAE")) < 0
    assert min(effect["consistency", arm] for arm in ("C²R", "OrtSAE")) > 0
