"""For all tests: no network, results and cache in temporary folders, a notebook to try on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))

TINY_CELLS = [
    ("markdown", "# A tiny notebook", []),
    ("code", 'PROFILE = "default"\nSEED = 0\nDEVICE = "cpu"', ["parameters"]),
    (
        "code",
        "from c2r_core.support import start\n\n"
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
        'nb.claim("draws stay below one", draws.max(), at_most=1.0, effect=False)\n'
        'nb.claim("the mean is near a half", draws.mean(), between=(0.4, 0.6))\n'
        "nb.finish()",
        [],
    ),
]


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests and their kernels share one fresh cache and leave the project's folders alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("C2R_RESULTS", str(tmp_path_factory.mktemp("results")))
        patch.setenv("C2R_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("MPLBACKEND", raising=False)
        yield


@pytest.fixture
def tiny_notebook(tmp_path: Path) -> Callable[..., Path]:
    """Writes a notebook that has not run: `tiny_notebook(last_code=..., name=...)`."""

    def write(last_code: str = TINY_CELLS[-1][1], name: str = "00_tiny.ipynb") -> Path:
        cells = []
        for number, (kind, source, tags) in enumerate(TINY_CELLS):
            new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
            source = last_code if number == len(TINY_CELLS) - 1 else source
            metadata = {"tags": tags} if tags else {}
            cells.append(new(source, id=f"cell-{number}", metadata=metadata))
        path = tmp_path / "notebooks" / name
        path.parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write
