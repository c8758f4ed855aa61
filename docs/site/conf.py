"""Sphinx's settings for the project's site: `make docs`.

The source folder is the project's, so that links between the README, the notebooks and the documents lead
to pages as they stand. Nothing is executed: notebooks show their committed outputs.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from importlib import import_module
from pathlib import Path

import yaml

SITE = Path(__file__).resolve().parent
PROJECT = SITE.parents[1]
sys.path.insert(0, str(SITE))

import claims  # noqa: E402
import links  # noqa: E402

import c2r_core  # noqa: E402
from c2r_core.artefacts.profiles import load_profile  # noqa: E402
from c2r_core.notebook import files  # noqa: E402
from c2r_core.playground import write_page  # noqa: E402

project = "C²R under test"
author = "The C²R compendium authors"
project_copyright = author
version = release = c2r_core.__version__
language = "en"

# -- what is read ---------------------------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.katex",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "exercises/*.ipynb", "exercises/README.md"]
exclude_patterns = [".*", "c2r_core", "cache", "data", "results", "runs", "tests"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # by default scripts of another host; the notebooks show no widgets
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# -- the reference --------------------------------------------------------------------------------

default_role = "code"
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_param = napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style"), ("Fields", "params_style")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False

# -- how it looks ---------------------------------------------------------------------------------

html_theme = "furo"
html_title = project
html_additional_pages = {"index": "to_first_page.html"}
templates_path = ["templates"]
html_static_path = ["static"]
html_copy_source = html_show_sphinx = False
html_show_search_summary = False  # it fetches pages, which a browser refuses for files
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1b3a57", "color-brand-content": "#1f5f8b"},
    "dark_css_variables": {"color-brand-primary": "#8fc1e3", "color-brand-content": "#8fc1e3"},
}
pygments_style, pygments_dark_style = "friendly", "github-dark"

# Formulas as MathML, which browsers set with their own fonts: KaTeX's would come from another host.
katex_css_path = "site.css"
katex_options = r'output: "mathml", throwOnError: true, macros: {"½": "\\tfrac12"}'


# -- what is filled in ----------------------------------------------------------------------------


def fill_in(app, page: str, source: list[str]) -> None:
    """Put what is known only when the site is built into the pages that show it."""
    notebooks = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if page == "docs/index":
        source[0] = source[0].replace("<!-- notebooks -->", contents(notebooks))
    if page == "docs/api/index":
        source[0] = source[0].replace("<!-- names -->", public_names())
    if page == "docs/what_holds":
        for path in notebooks:
            app.env.note_dependency(str(path))
        text = claims.page(claims.printed(notebooks), prefix="../notebooks")
        source[0] = source[0].replace("<!-- claims -->", text)
    if page == "docs/how_to_cite":
        app.env.note_dependency(str(PROJECT / "CITATION.cff"))
        source[0] = source[0].replace("<!-- citation -->", citation())


def contents(notebooks: list[Path]) -> str:
    """The notebooks in a table of contents, with the numbers by which the text names them."""
    return "\n".join(
        f"{path.stem[:2]} {claims.title(files.read(path))} <../notebooks/{path.stem}>"
        for path in notebooks
    )


def public_names() -> str:
    """A table of what can be imported from `c2r_core`, each with its first sentence."""
    rooms = {name: import_module(f"c2r_core.{name}") for name in ("losses", "saes", "training")}
    rows = ["| name | what it is |", "|---|---|"]
    for name in c2r_core.__all__:
        room = next(room for room, module in rooms.items() if name in module.__all__)
        sentence = re.split(r"(?<=\.)\s|\n\n", inspect.getdoc(getattr(c2r_core, name)))[0]
        rows.append(
            f"| {{py:obj}}`{name} <c2r_core.{room}.{name}>` | {' '.join(sentence.split())} |"
        )
    return "\n".join(rows)


def citation() -> str:
    """The reference that CITATION.cff asks for, in one line."""
    cited = yaml.safe_load((PROJECT / "CITATION.cff").read_text("utf-8"))["preferred-citation"]
    authors = ", ".join(one["family-names"] for one in cited["authors"])
    where = ", ".join(re.sub("^arXiv:", "arXiv ", one["value"]) for one in cited["identifiers"])
    return f"{authors}. *{cited['title']}*. {cited['collection-title']}, {cited['year']}. {where}."


def add_playground(app, error: Exception | None) -> None:
    """Put the playground beside the pages, made of this checkout's results."""
    if error is None:
        os.environ["C2R_RESULTS"] = str(PROJECT / "results")
        write_page(
            Path(app.outdir) / "playground.html", load_profile("default"), home="docs/index.html"
        )


def leave_out_alias(app, what, name, member, skip: bool, options) -> bool | None:
    """A named tuple's fields are in its signature; "Alias for field number 0" adds nothing."""
    return True if (member.__doc__ or "").startswith("Alias for field number") else None


def setup(app) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-skip-member", leave_out_alias)
    app.connect("source-read", fill_in)
    app.connect("doctree-read", links.mark, priority=400)  # before downloads are gathered
    app.connect("doctree-resolved", links.resolve)
    app.connect("html-collect-pages", links.pages)
    app.connect("build-finished", add_playground)
