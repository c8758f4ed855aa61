"""The project's site: what it says holds, that it is whole, and that it needs no other host, in Chromium."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from c2r_core.notebook import files
from c2r_core.notebook.claims import Line
from conftest import NOTEBOOKS, PROJECT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
INSTALLED = all(
    importlib.util.find_spec(name) for name in ("furo", "myst_nb", "sphinxcontrib.katex")
)
WIDTHS = (1280, 390)

PROBE = """<!doctype html><meta charset="utf-8"><pre id="found"></pre><script>
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "900px";
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page; document.body.append(frame);
  await loaded;
  const shown = frame.contentDocument, all = what => [...shown.querySelectorAll(what)];
  await frame.contentWindow.document.fonts.ready;
  const found = {
    page, width, needed: shown.documentElement.scrollWidth,
    formulas: all("span.math, div.math").length,
    unset: all("span.math, div.math").filter(one => !one.querySelector(".katex math")).length,
    figures: all(".cell_output img").length,
    missing: all("img").filter(one => !one.naturalWidth).map(one => one.src),
    elsewhere: frame.contentWindow.performance.getEntriesByType("resource")
      .map(one => one.name).filter(name => !name.startsWith(location.origin)),
  };
  frame.remove();
  return found;
}
(async () => {
  const all = [];
  for (const page of PAGES) for (const width of WIDTHS) all.push(await look(page, width));
  document.getElementById("found").textContent = JSON.stringify(all);
})();
</script>"""


AT_ONCE = 10
"""Pages that Chromium looks at in one visit."""

needs_sphinx = pytest.mark.skipif(not INSTALLED, reason="make docs has not been run here")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, built anew; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
    command += ["-c", "docs/site", "-d", folder / "read", ".", folder / "site"]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "site"


def opened(address: str) -> str:
    """A page as Chromium shows it, cut off from other hosts; what the console says is an error here."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=60000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    run = subprocess.run([*command, address], capture_output=True, text=True, timeout=300)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert run.returncode == 0 and not console, console or run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def looked_at(site):
    """What Chromium finds on every page, at every width."""
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    pages.remove("index.html")  # it only leads to the first page

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Says nothing."""

    handler, found = functools.partial(Quiet, directory=site), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for start in range(
            0, len(pages), AT_ONCE
        ):  # Chromium gives each visit a minute of its time
            some = pages[start : start + AT_ONCE]
            constants = f"<script>const PAGES = {some}, WIDTHS = {list(WIDTHS)};</script>"
            (site / "probe.html").write_text(constants + PROBE)
            shown = opened(f"http://127.0.0.1:{server.server_port}/probe.html")
            found += json.loads(re.search(r'<pre id="found">(.*?)</pre>', shown)[1])
        server.shutdown()
    (site / "probe.html").unlink()
    assert len(found) == len(pages) * len(WIDTHS)
    return found


# -- what holds, what does not --------------------------------------------------------------------


def claims_module():
    spec = importlib.util.spec_from_file_location("site_claims", PROJECT / "docs/site/claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_held_and_failed_claims_stand_apart_and_each_has_its_notebook():
    claims = claims_module()
    path = PROJECT / "notebooks" / "03_toy_c2r.ipynb"
    lines = [
        Line(
            "claim", "holds", "(toy, C²R) a|b < c: measured −0.3 [−0.4, −0.2], expected at most 0"
        ),
        Line("claim", "FAILS", "(toy, C²R) d_e: measured 1 [−1, 3], expected at least 0"),
        Line("lead", "", "noticed"),
    ]
    page = claims.page([claims.Printed(path, "Toys", line) for line in lines], "../notebooks")
    held, failed = page.index("### Held: 1"), page.index("### Failed: 1")
    assert held < page.index(r"a\|b \< c<br>") < failed < page.index(r"d\_e<br>")
    assert r"measured −0.3 \[−0.4, −0.2\], expected at most 0" in page
    assert page.count("[Toys](../notebooks/03_toy_c2r.ipynb)") == 3
    assert "| Toy features, on C²R | 1 | 1 |" in page
    assert page.index("## Leads") < page.index("- noticed")


@needs_sphinx
def test_every_verdict_of_the_committed_notebooks_is_on_the_page(site):
    page = (site / "docs/what_holds.html").read_text(encoding="utf-8")
    article = page[page.index('<article role="main"') : page.index("</article>")]
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", article))
    lines = [line for path in NOTEBOOKS for line in files.verdicts(files.read(path))]
    assert len(lines) > 100 and article.count("<li>") == len(lines)
    for heading in ("Held: ", "Failed: "):
        assert heading in shown
    measured = [re.search(r"measured \S+(?: \[[^\]]*\])?", line.text) for line in lines]
    assert [found[0] for found in measured if found and found[0] not in shown] == []


# -- the site is whole ----------------------------------------------------------------------------


@needs_sphinx
def test_every_link_inside_the_site_leads_to_a_page_and_a_place(site):
    texts = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    places = {page: set(re.findall(r'\bid="([^"]*)"', text)) for page, text in texts.items()}
    broken = []
    for page, text in texts.items():
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', text):
            path, _, place = link.partition("#")
            if re.match(r"\w+:", path):
                continue
            target = Path(os.path.normpath(page.parent / path)) if path else page
            if not target.is_file() or place and place not in places.get(target, {place}):
                broken.append((page.name, link))
    assert broken == []


@needs_sphinx
def test_a_linked_file_that_is_no_page_is_shown_as_text(site):
    page = (site / "source/c2r_core/saes/base.py.html").read_text(encoding="utf-8")
    assert "What every sparse autoencoder is" in page
    glossary = (site / "docs/glossary.html").read_text(encoding="utf-8")
    assert 'href="../source/c2r_core/saes/base.py.html"' in glossary


@needs_sphinx
def test_nothing_is_taken_from_another_host(site):
    asked = []
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        asked += re.findall(r'\bsrc(?:set)?="(?:https?:)?//[^"]*"', text)
        asked += re.findall(r'<link\b[^>]*\bhref="(?:https?:)?//[^"]*"', text)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        asked += re.findall(r"(?:url\(|@import)[\s\"']*(?:https?:)?//[^)]*", text)
    assert asked == []


@needs_sphinx
@needs_chromium
def test_pages_ask_no_other_host_and_fit_their_width(looked_at):
    assert [one["elsewhere"] for one in looked_at if one["elsewhere"]] == []
    wide = [(one["page"], one["needed"]) for one in looked_at if one["needed"] > one["width"]]
    assert wide == []


@needs_sphinx
@needs_chromium
def test_formulas_are_set_and_figures_are_there(looked_at):
    assert [one["page"] for one in looked_at if one["unset"] or one["missing"]] == []
    pages = {one["page"]: one for one in looked_at}
    assert pages["notebooks/00_start_here.html"]["formulas"] > 5
    for path in NOTEBOOKS:
        outputs = [o for cell in files.read(path).cells for o in cell.get("outputs", ())]
        drawn = sum("image/png" in output.get("data", {}) for output in outputs)
        assert pages[f"notebooks/{path.stem}.html"]["figures"] == drawn, path.stem


@needs_sphinx
@needs_chromium
def test_a_page_and_the_search_work_from_the_disk(site):
    assert "do sparse-autoencoder latents become more reliable?" in opened(
        f"file://{site}/index.html"
    )
    found = opened(f"file://{site}/search.html?q=absorption")
    assert re.search(
        r'class="search".*<a href="docs/glossary\.html" data-score', found, flags=re.DOTALL
    )
