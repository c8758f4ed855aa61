"""A fingerprint counts the code that is reached, and nothing else."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from c2r_core.artefacts import fingerprints as module
from c2r_core.artefacts.fingerprints import (
    all_modules,
    fingerprint,
    fingerprints,
    has_source,
)

FILES = {
    "__init__.py": "from c2r_core.saes import SAE\n",
    "losses/__init__.py": "from c2r_core.losses.pairs import loss\n",
    "losses/pairs.py": "def loss(x):\n    return x * 2\n",
    "saes/__init__.py": "from .base import SAE\nfrom .topk import TopK\nWIDTHS = (1, 2)\n",
    "saes/base.py": "import c2r_core.losses\n\nclass SAE:\n    pass\n",
    "saes/topk.py": "from c2r_core.saes.base import SAE\n\nclass TopK(SAE):\n    pass\n",
    "artefacts/__init__.py": "",
    "artefacts/cache.py": "from c2r_core.saes import SAE\n",
    "metrics/__init__.py": "",
    "metrics/toy.py": "def evaluate():\n    return 1\n",
    "experiments/__init__.py": "",
    "experiments/toy.py": (
        "from typing import TYPE_CHECKING\n"
        "from c2r_core.artefacts.cache import cached\n"
        "from c2r_core.losses import loss\n"
        "from c2r_core.metrics import toy\n"
        "if TYPE_CHECKING:\n    from c2r_core.saes import SAE\n"
        "SAMPLES = 5\n"
        "def trained():\n    return cached(loss)\n"
        "def measure():\n    return toy.evaluate(trained(), SAMPLES)\n"
        "def table() -> SAE:\n    from c2r_core.saes import base\n    return base\n"
    ),
    "experiments/other.py": "from c2r_core.experiments.toy import trained\n",
}


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A small package, and how to write a file of it anew."""
    monkeypatch.setattr(module, "PACKAGE", tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        module._read.cache_clear()

    for name, text in FILES.items():
        write(name, text)
    yield write
    module._read.cache_clear()


def names(*entries: str) -> list[str]:
    return [name.removeprefix("c2r_core.") for name in fingerprints(entries)]


def test_imports_are_followed_and_artefacts_are_not(package):
    whole = ["losses", "losses.pairs", "saes", "saes.base", "saes.topk"]
    assert names("c2r_core.saes") == whole
    assert names("c2r_core.experiments.toy") == [
        "experiments.toy",
        "losses",
        "losses.pairs",
        "metrics.toy",
        "saes.base",
    ]


def test_of_a_study_only_what_is_reached_counts(package):
    reached = ["experiments.toy:measure", "losses.pairs", "metrics.toy"]
    assert names("c2r_core.experiments.toy:measure") == reached
    assert names("c2r_core.experiments.toy:trained") == [
        "experiments.toy:trained",
        "losses.pairs",
    ]
    assert "experiments.toy:trained" in names("c2r_core.experiments.other")
    before = fingerprint(["c2r_core.experiments.toy:measure"])
    source = FILES["experiments/toy.py"]
    package("experiments/toy.py", source.replace("return base", "return base.SAE"))
    assert fingerprint(["c2r_core.experiments.toy:measure"]) == before
    package("experiments/toy.py", source.replace("SAMPLES = 5", "SAMPLES = 6"))
    assert fingerprint(["c2r_core.experiments.toy:measure"]) != before


def test_of_a_package_only_the_names_asked_for_count(package):
    assert names("c2r_core.saes:SAE") == ["losses", "losses.pairs", "saes.base"]
    package("experiments/widths.py", "from c2r_core.saes import WIDTHS\n")
    assert names("c2r_core.experiments.widths") == ["experiments.widths", "saes:WIDTHS"]
    before = fingerprints(["c2r_core.experiments.toy:trained", "c2r_core.saes:SAE"])
    package("saes/own.py", "from c2r_core.saes.base import SAE\n\nclass Own(SAE):\n    pass\n")
    package("saes/__init__.py", FILES["saes/__init__.py"] + "from .own import Own\n")
    assert fingerprints(["c2r_core.experiments.toy:trained", "c2r_core.saes:SAE"]) == before


def test_a_module_of_the_user_s_own_is_its_file_and_what_that_imports_of_the_package(
    package, monkeypatch, tmp_path
):
    own = ModuleType("own_metric")
    monkeypatch.setitem(sys.modules, "own_metric", own)
    assert not has_source("own_metric"), "typed at a prompt"
    with pytest.raises(ModuleNotFoundError, match="own_metric"):
        fingerprints(["own_metric"])
    own.__file__ = str(tmp_path / "own_metric.py")
    package("own_metric.py", "import torch\nfrom c2r_core import C2R\nimport c2r_core.losses\n")
    assert has_source("own_metric")
    before = fingerprints(["own_metric"])
    assert set(before) >= {"own_metric", "c2r_core.losses.pairs"}
    package("own_metric.py", "import c2r_core.losses\nNUMBER = 1\n")
    assert fingerprints(["own_metric"])["own_metric"] != before["own_metric"]


def test_code_counts_and_comments_do_not(package):
    before = fingerprints(["c2r_core.saes"])
    package(
        "losses/pairs.py", 'def loss(x):\n    """Twice."""\n    return (x\n        * 2)  # twice\n'
    )
    assert fingerprints(["c2r_core.saes"]) == before
    package("losses/pairs.py", "def loss(x):\n    return x * 3\n")
    after = fingerprints(["c2r_core.saes"])
    assert [name for name in after if after[name] != before[name]] == ["c2r_core.losses.pairs"]


def test_what_is_not_there_is_named(package):
    with pytest.raises(ModuleNotFoundError, match="c2r_core.nothing"):
        fingerprints(["c2r_core.nothing"])
    with pytest.raises(ModuleNotFoundError, match="defines no 'nothing'"):
        fingerprints(["c2r_core.experiments.toy:nothing"])


def test_the_package_itself_can_be_read():
    everything = fingerprints(all_modules())
    assert "c2r_core.saes.base" in everything
    assert not any(name.startswith("c2r_core.artefacts") for name in everything)
    assert all(module._file(name) for name in module.FILES), "what is left out by name is there"
    assert not set(module.FILES) & set(everything), "keeping a result does not decide it"
    assert "c2r_core.metrics.use" in everything and "c2r_core.metrics" not in everything, (
        "another metric leaves what is measured with the others as it is"
    )
