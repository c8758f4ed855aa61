"""What a committed notebook must look like, and how to bring it into that form."""

from __future__ import annotations

import ast
import base64
import json
import re
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from PIL import Image

from c2r_core.notebook.claims import NOT_JUDGED, Line, claim_lines

PARAMETERS = ("PROFILE", "SEED", "DEVICE")
MAX_BYTES = 300_000
MAX_CELL_LINES = 25

_MACHINE_PATH = re.compile(r"(?<![\w./:])/(home|Users|root|tmp|var|opt|mnt|work)/|\b[A-Z]:\\")
_TIMING = re.compile(
    r"it/s\b|s/it\b|Wall time|CPU times|\d (ms|s|sec|seconds?|minutes)\b|\d\.\d+s\b"
)
_MAGIC = re.compile(r"^\s*[%!]|get_ipython\(", re.MULTILINE)
_CELLS = re.compile(r'nb\.cells\(\s*"(\w+)"(, live=True)?')
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def read(path: Path) -> NotebookNode:
    """The notebook as nbformat reads it; ValueError if the file is none, OSError if it cannot be read."""
    try:
        return nbformat.read(path, as_version=4)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # of any kind: nbformat takes for granted what it has not checked yet
        raise ValueError(f"{path} is not a valid notebook: {error}") from error


def parameter_names(notebook: NotebookNode) -> list[str]:
    """Names that the cell tagged `parameters` assigns, in order; empty without such a cell."""
    return [
        node.id
        for cell in notebook.cells
        if "parameters" in _tags(cell)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]


def verdicts(notebook: NotebookNode) -> list[Line]:
    """Every verdict and lead that the notebook printed."""
    return [line for cell in _code(notebook) for line in claim_lines(cell.outputs)]


def canonical(notebook: NotebookNode) -> str:
    """The notebook's text without what changes from run to run: the form that is committed.

    Keeps sources, outputs, execution counts, cell ids and tags. Drops timings, papermill's and
    widgets' metadata, the interpreter's version and injected parameters; joins the pieces of one
    stream; keeps figures in 256 colours.
    """
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": python, "language_info": {"name": "python"}}
    cells = [_canonical_cell(c) for c in notebook.cells if "injected-parameters" not in _tags(c)]
    kept = nbformat.v4.new_notebook(metadata=metadata, cells=cells)
    return nbformat.writes(kept).rstrip("\n") + "\n"


def awaits_evidence(notebook: NotebookNode) -> bool:
    """Whether nothing in it was executed: the form in which a notebook waits for its studies' cells."""
    return all(cell.execution_count is None and not cell.outputs for cell in _code(notebook))


def studies(notebook: NotebookNode) -> list[str]:
    """Names of the studies whose cells it reads and does not compute live."""
    source = "\n".join(cell.source for cell in _code(notebook))
    found = [name for name, live in _CELLS.findall(source) if not live]
    return sorted({*found, *(("validation",) if "gather(" in source else ())})


def problems(path: Path) -> list[str]:
    """What keeps a notebook from being committed, one sentence each; empty if all is well.

    Of one that awaits its evidence only the source is judged.
    """
    found: list[str] = []
    text = path.read_text(encoding="utf-8")
    notebook = read(path)
    code = _code(notebook)

    def require(condition: bool, problem: str) -> None:
        if not condition:
            found.append(problem)

    require(len(text.encode()) <= MAX_BYTES, f"larger than {MAX_BYTES // 1000} kB")
    require(text == canonical(notebook), "not in canonical form; run make refresh")
    ids = [cell.get("id") for cell in json.loads(text)["cells"]]  # nbformat would mend them
    require(all(ids) and len(set(ids)) == len(ids), "cell ids are missing or not unique")
    awaits = awaits_evidence(notebook) and bool(studies(notebook))
    counts = [cell.execution_count for cell in code]
    require(
        awaits or bool(code) and counts == list(range(1, len(code) + 1)),
        f"execution counts are not 1 to {len(code)} but {counts}; run make refresh",
    )
    tagged = [cell for cell in notebook.cells if "parameters" in _tags(cell)]
    require(len(tagged) == 1, f"{len(tagged)} cells tagged `parameters` instead of one")
    names = parameter_names(notebook)
    require(names == list(PARAMETERS), f"parameters are {names} instead of {list(PARAMETERS)}")
    require(
        not any("injected-parameters" in _tags(cell) for cell in notebook.cells),
        "holds a cell of injected parameters",
    )

    outputs = [output for cell in code for output in cell.outputs]
    require(all(o.output_type != "error" for o in outputs), "holds an error output")
    require(awaits or any("image/png" in o.get("data", {}) for o in outputs), "shows no figure")
    judged = [line.verdict for line in verdicts(notebook) if line.verdict]
    require(awaits or bool(judged), "prints no verdict")
    require(NOT_JUDGED not in judged, "was run under the smoke profile")

    for number, cell in enumerate(notebook.cells, start=1):
        where = f"cell {number}"
        printed = "\n".join(_text(output) for output in cell.get("outputs", ()))
        if cell.cell_type == "code":
            lines = len(cell.source.splitlines())
            require(lines <= MAX_CELL_LINES, f"{where} has {lines} lines: over {MAX_CELL_LINES}")
            require(not _MAGIC.search(cell.source), f"{where} uses a magic or a shell command")
        require(
            not _MACHINE_PATH.search(f"{cell.source}\n{printed}"), f"{where} names a local path"
        )
        require(not _TIMING.search(printed), f"{where} prints a timing")
    found += _link_problems(path, notebook)
    return found


def _link_problems(path: Path, notebook: NotebookNode) -> list[str]:
    links = {
        link
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for link in _LINK.findall(cell.source)
        if "://" not in link and not link.startswith(("attachment:", "mailto:"))
    }
    found = [
        f"link to {link} leads nowhere"
        for link in sorted(links)
        if not (path.parent / link).exists()
    ]
    for before, after in pairwise(sorted(path.parent.glob("[0-9][0-9]_*.ipynb"))):
        neighbour = {before: after, after: before}.get(path)
        if neighbour is not None and neighbour.name not in links:
            found.append(f"no link to its neighbour {neighbour.name}")
    return found


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _text(output: NotebookNode) -> str:
    data = output.get("data", {})
    texts = [content for kind, content in data.items() if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), *texts])


def _canonical_cell(cell: NotebookNode) -> NotebookNode:
    tags = {"tags": list(_tags(cell))} if _tags(cell) else {}
    kept = NotebookNode({**cell, "metadata": NotebookNode(tags)})
    if cell.cell_type == "code":
        kept.outputs = [_with_fewer_colours(output) for output in _joined(cell.outputs)]
    return kept


def _with_fewer_colours(output: NotebookNode) -> NotebookNode:
    """A figure of a few flat colours needs no more than 256: a third of the bytes."""
    png = output.get("data", {}).get("image/png")
    image = png and Image.open(BytesIO(base64.b64decode(png)))
    if not image or image.mode == "P":
        return output
    smaller = BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(smaller, "png", optimize=True)
    text = base64.b64encode(smaller.getvalue()).decode()
    return NotebookNode({**output, "data": NotebookNode({**output.data, "image/png": text})})


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with neighbouring pieces of one stream joined; how they were cut is chance."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            joined[-1] = NotebookNode({**last, "text": last["text"] + output.text})
        else:
            joined.append(output)
    return joined
