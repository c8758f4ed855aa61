"""Links of the README and the notebooks to files that are no page of the site: each file gets a page.

In a checkout they lead to the file itself. On the site they lead to the file's text, in colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

STANDS_FOR = {
    "README.md": "docs/index",
    "CONTRIBUTING.md": "docs/contributing",
    "CITATION.cff": "docs/how_to_cite",
    "c2r_core/playground/__init__.py": "playground",
}
"""Pages that show a file in a better way than as its text."""

LANGUAGES = {".py": "python", ".yml": "yaml", ".md": "markdown"}


def mark(app: Sphinx, doctree: nodes.document) -> None:
    """Turn what MyST takes for downloads, unknown pages or unknown labels into links to a file's page."""
    root, page = Path(app.srcdir), app.env.docname
    documents = {str(app.env.doc2path(name, base=False)): name for name in app.env.found_docs}
    for node in list(doctree.findall(addnodes.pending_xref)) + list(
        doctree.findall(addnodes.download_reference)
    ):
        if node.get("reftype") != "myst":
            continue
        path = _file(root, page, node)
        if path in documents:  # MyST has looked for it beside the page that includes the README
            node.attributes |= {
                "refdomain": "doc",
                "reftarget": documents[path],
                "reftargetid": None,
            }
        elif path:
            node.replace_self(nodes.reference("", "", *node.children, internal=True, c2r_file=path))


def resolve(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Give every marked link its address, and remember the file for `pages`."""
    for link in doctree.findall(nodes.reference):
        if path := link.get("c2r_file"):
            target = STANDS_FOR.get(path, f"source/{path}")
            link["refuri"] = app.builder.get_relative_uri(page, target)


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for every file that is linked."""
    linked = {
        link["c2r_file"]
        for name in app.env.found_docs
        for link in app.env.get_doctree(name).findall(nodes.reference)
        if "c2r_file" in link
    }
    for path in sorted(linked - set(STANDS_FOR)):
        text = (Path(app.srcdir) / path).read_text(encoding="utf-8")
        language = LANGUAGES.get(Path(path).suffix, "text")
        code = app.builder.highlighter.highlight_block(text, language)
        yield f"source/{path}", {"title": path, "body": f"<h1>{path}</h1>{code}"}, "page.html"


def _file(root: Path, page: str, node: nodes.Element) -> str | None:
    """The file that a link names, relative to the project's folder; a package's `__init__.py`.

    The way to it starts at the page, or, in what a page includes of the README, at the project's folder.
    """
    target = node["reftarget"].partition("#")[0]
    if (
        node.get("refdomain") == "doc"
    ):  # as Sphinx names a document: from the root, without its suffix
        tried = [root / f"{target}.md", root / f"{target}.ipynb"]
    else:
        tried = [(root / page).parent / target, root / target]
    for path in tried if target else ():
        path = path / "__init__.py" if path.is_dir() else path
        if path.is_file():
            return path.resolve().relative_to(root.resolve()).as_posix()
    return None
