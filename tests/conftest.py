"""For all tests: no network, results and cache in temporary folders, a notebook to try on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from xdist.scheduler import LoadFileScheduling

from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.language_models import load_language_model
from c2r_core.data.text import Corpus, load_corpus
from c2r_core.notebook import runner
from forks import fork_kernels

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from xdist.remote import Producer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
fork_kernels()

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))

TINY_CELLS = [
    ("markdown", "# A tiny notebook", []),
    ("code", 'PROFILE = "default"\nSEED = 0\nDEVICE = "cpu"', ["parameters"]),
    (
        "code",
        "from c2r_core.notebook import start\n\n"
        'nb = start(notebook="00_tiny", profile=PROFILE, seed=SEED, device=DEVICE)',
        [],
    ),
    (
        "code",
        "import matplotlib.pyplot as plt\nimport torch\n\n"
        "draws = torch.rand(nb.profile.toy.steps)\nplt.hist(draws.numpy())\nplt.show()",
        [],
    ),
    ("code", "nb.record(mean=draws.mean())\nprint(float(draws.mean()))", ["nbval-ignore-output"]),
    (
        "code",
        'nb.check("draws stay below one", draws.max(), at_most=1.0)\n'
        'nb.guard("the mean is near a half", draws.mean(), between=(0.4, 0.6))\n'
        "interval = (0.25, 0.125, 0.375)\n"
        'nb.claim("it rises", interval, at_least=0, n="3 seeds", reason="a rise is above 0",\n'
        '         about="toy")\n'
        'nb.lead("it may rise elsewhere", interval, n="1 seed")\n'
        "nb.finish()",
        [],
    ),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that of workers side by side none is left with one at the end."""
    items.sort(key=lambda item: not _is_of_a_notebook(item.nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Workers side by side share out notebooks one by one, and other files, with their fixtures, whole."""

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if _is_of_a_notebook(nodeid) else super()._split_scope(nodeid)

    return Scheduling(config, log)


def _is_of_a_notebook(nodeid: str) -> bool:
    return "test_smoke_notebooks.py" in nodeid


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests of all workers and their kernels share one fresh cache and leave the project's folders alone."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if is_worker else own
    with pytest.MonkeyPatch.context() as patch:
        for name in ("results", "runs", "cache"):
            patch.setenv(f"C2R_{name.upper()}", str(shared / name))
        patch.delenv("MPLBACKEND", raising=False)
        yield


def write_tiny_notebook(path: Path, last_code: str = TINY_CELLS[-1][1]) -> Path:
    """A small notebook that has not run."""
    cells = []
    for number, (kind, source, tags) in enumerate(TINY_CELLS):
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        source = last_code if number == len(TINY_CELLS) - 1 else source
        cells.append(new(source, id=f"cell-{number}", metadata={"tags": tags} if tags else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="session")
def refreshed_notebook(_own_folders: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny notebook, executed under `default` and in canonical form; not to be changed."""
    folder = tmp_path_factory.mktemp("refreshed")
    notebook = write_tiny_notebook(folder / "00_tiny.ipynb")
    runner.refresh(notebook, work_folder=folder / "work")
    return notebook


@pytest.fixture
def committed_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """The values of a study's committed cells of `default`; the test is skipped unless all are current."""
    monkeypatch.delenv("C2R_RESULTS")

    def of(study: str) -> dict[str, Any]:
        from c2r_core.experiments.evidence import committed  # needs more than some tests do

        values = committed(study, load_profile("default"))
        if not values:
            pytest.skip(f"{study} is not current: run `c2r run {study}`")
        return values

    return of


@pytest.fixture(scope="session")
def random_model() -> TransformerBridge:
    """A language model of two small random blocks; not to be changed."""
    return load_language_model("random-2-layer")


@pytest.fixture(scope="session")
def few_documents() -> Corpus:
    """Some of the embedded documents."""
    return Corpus("few", load_corpus("sotu").documents[::20])
