"""The playground shows its cells as they are, moves in under a second, and says something without scripts."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from statistics import fmean

import pytest
import torch

from c2r_core.artefacts.cells import read_or_compute
from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.toy import FeatureTree
from c2r_core.experiments import playground as study
from c2r_core.experiments import steering, synthetic, toy
from c2r_core.playground import page, write_page
from c2r_core.playground.__main__ import main
from c2r_core.training import C2R, weight_from_strength

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SMOKE = load_profile("smoke")
OWN = SMOKE.playground
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

MOVES = """<script>addEventListener("load", () => {
  const moves = [];
  for (const input of document.querySelectorAll("#sliders input"))
    for (let place = 0; place <= Number(input.max); place += 1) {
      input.value = String(place);
      const started = performance.now();
      input.dispatchEvent(new Event("input"));
      document.body.getBoundingClientRect();
      moves.push({ at: location.hash.slice(1), ms: performance.now() - started,
        mcc: document.querySelector("#numbers td").textContent,
        squares: document.querySelector("figure").querySelectorAll("rect").length,
        wide: document.documentElement.scrollWidth > document.documentElement.clientWidth });
    }
  document.body.replaceChildren(JSON.stringify(moves));
});</script>"""


@pytest.fixture(scope="module")
def points():
    """The points of every world by the cell's name."""
    return {cell.name: read_or_compute(cell) for cell in study.cells(SMOKE)}


@pytest.fixture(scope="module")
def texts():
    """What the study `steering` gives, by SAE."""
    made = zip(steering.TITLES, steering.cells(SMOKE), strict=True)
    return {title: read_or_compute(cell) for title, cell in made}


@pytest.fixture(scope="module")
def written(points, texts, tmp_path_factory):
    return write_page(
        tmp_path_factory.mktemp("page") / "playground.html", SMOKE, home="docs/index.html"
    )


# -- the study ----------------------------------------------------------------------------------


def test_every_world_has_every_point_once(points):
    assert len(points) == len(OWN.child_probabilities) * len(OWN.cosines)
    expected = [(None, 0.0), *((a, s) for a in OWN.alphas for s in OWN.strengths)]
    for of_world in points.values():
        assert [(one["alpha"], one["strength"]) for one in of_world] == expected
        assert all(len(one[field]) == OWN.seeds for one in of_world for field in study.SHOWN)


def test_a_point_is_the_training_that_it_names(points):
    (name, (arm, about)), *_ = study.worlds(SMOKE).items()
    assert about == {"child": OWN.child_probabilities[0], "cosine": OWN.cosines[0]}
    assert arm.features.parent_alone == pytest.approx(1 - about["child"])
    point = points[name][-1]
    weight = weight_from_strength(
        OWN.strengths[-1], batch_size=arm.batch_size, d_sae=arm.d_sae, alpha=OWN.alphas[-1]
    )
    assert point["weight"] == pytest.approx(weight)
    alone = synthetic.Arm(**vars(arm) | {"regulariser": C2R(weight, alpha=OWN.alphas[-1])})
    seeds = study.cells(SMOKE)[0].settings["seeds"]
    (row,) = toy.reports(
        {1: synthetic.trained(alone, seeds[:1])[seeds[0]]},
        arm.features,
        SMOKE.toy.evaluation_samples,
    )
    assert point["fvu"][0] == pytest.approx(row["fvu"], abs=2e-3)


def test_a_picture_has_the_live_latents_by_the_feature_they_are_nearest_to(points):
    tree = FeatureTree(d_in=6, n_parents=1, children_per_parent=2, n_singles=2)
    true = tree.directions
    rows = torch.stack([true[4], true[2] - true[1], true[0] + 0.5 * true[1]])
    lines = [[int(v) for v in line.split()] for line in study.cosine_rows(rows, tree).split("/")]
    assert lines == [[89, 45, 0, 0, 0], [0, -71, 71, 0, 0], [0, 0, 0, 0, 100]]
    for of_world in points.values():
        for one in of_world:
            assert len(one["cosines"].split("/")) == round(one["live_share"][0] * OWN.d_sae)


def test_steered_texts_are_of_latents_that_fire_and_the_first_is_not_steered(texts):
    (unsteered,) = {one["texts"][0] for latents in texts.values() for one in latents}
    for latents in texts.values():
        assert len({one["latent"] for one in latents}) == steering.N_LATENTS
        for one in latents:
            assert len(one["texts"]) == len(steering.FACTORS) and any(
                text != unsteered for text in one["texts"]
            )
            assert one["largest"] > 0 and all("«" in context for context in one["top"])


# -- the page -----------------------------------------------------------------------------------


def test_the_page_holds_every_point_and_loads_nothing(written, points):
    text = written.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    data = json.loads(found)
    assert [world["points"] for world in data["worlds"]] == list(points.values())
    assert "<!-- " not in text and "innerHTML" not in text
    assert not re.search(r"(src|href)=\"(?!docs/index\.html|data:,)", text)
    for name in ("html", "css", "js"):
        static = page._static(f"playground.{name}").replace("http://www.w3.org/2000/svg", "")
        assert "http" not in static
    for field, (title, *_) in page.METRICS.items():
        assert field in study.SHOWN and f'"title":"{title}"' in found


def test_the_table_has_every_world_without_the_penalty_and_with_it(points):
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page.table(page.page_data(SMOKE)))
    assert len(rows) == len(points) * (1 + len(OWN.strengths))
    first = next(iter(points.values()))[0]
    cells = re.findall(r"<td>(.*?)</td>", rows[0])
    assert cells[2:4] == ["0", f"{fmean(first['mcc']):.3g}"]


def test_what_has_not_been_computed_is_said_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("C2R_RUNS", str(tmp_path))
    out = tmp_path / "page.html"
    assert main(["--profile", "smoke", "--out", str(out)]) == 2
    assert "4 of 4 results are missing" in (said := capsys.readouterr().err)
    assert "c2r run playground --profile smoke" in said and not out.exists()
    assert main(["--profile", "smokey", "--out", str(out)]) == 2
    assert "did you mean 'smoke'" in capsys.readouterr().err


def test_the_command_writes_the_page_and_names_it(written, tmp_path, capsys):
    out = tmp_path / "pages" / "own.html"
    assert main(["--profile", "smoke", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert "Home</a>" in written.read_text("utf-8") and "Home</a>" not in out.read_text("utf-8")


def test_without_scripts_there_are_the_tables(written):
    text = written.read_text("utf-8")
    live = text[text.index('<div id="live" hidden>') : text.index("<h2>Some points")]
    assert "<td>" not in live and "The sliders need JavaScript" in text
    points = len(study.worlds(SMOKE)) * (1 + len(OWN.strengths)) * 7
    assert text.count("<td>") == points + len(steering.TITLES) * len(steering.FACTORS) * 4


# -- in a browser -------------------------------------------------------------------------------


def shown(path, fragment: str = "", *options: str) -> str:
    """The page as Chromium shows it; what goes wrong in the console is an error here."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", *options, f"file://{path}{fragment}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert run.returncode == 0 and not console, console or run.stderr
    return run.stdout


@needs_chromium
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_every_move_redraws_its_own_point_in_under_a_second(written, tmp_path, size):
    copy = tmp_path / "moves.html"
    copy.write_text(written.read_text("utf-8").replace("</body>", f"{MOVES}</body>"), "utf-8")
    said = re.search(r"<body>\s*(.*?)\s*</body>", shown(copy, "", f"--window-size={size}"), re.S)[1]
    moves = json.loads(html.unescape(said))
    worlds = page.page_data(SMOKE)["worlds"]
    assert len(moves) == sum(len(one["values"]) for one in page.sliders(OWN))
    for move in moves:
        at = {name: float(value) for name, value in re.findall(r"(\w+)=([^&]*)", move["at"])}
        (world,) = (w for w in worlds if all(w[key] == at[key] for key in ("child", "cosine")))
        alpha = at["alpha"] if at["strength"] else None
        (point,) = (
            p for p in world["points"] if p["alpha"] == alpha and p["strength"] == at["strength"]
        )
        assert float(move["mcc"].split()[0]) == pytest.approx(fmean(point["mcc"]), abs=6e-4)
        assert move["squares"] == len(re.split("[ /]", point["cosines"]))
        assert move["ms"] < 1000 and not move["wide"]


@needs_chromium
def test_a_steered_text_is_that_of_its_latent_and_strength(written, texts, tmp_path):
    copy = tmp_path / "steered.html"
    moves = """<script>addEventListener("load", () => {
      const say = (id, key, value) => { const one = document.getElementById(id);
        one[key] = value; one.dispatchEvent(new Event("input")); };
      say("steered-sae", "value", "C²R");
      say("steered-latent", "selectedIndex", 1);
      say("factor", "value", "2");
      document.body.replaceChildren(JSON.stringify(document.getElementById("written").textContent));
    });</script>"""
    copy.write_text(written.read_text("utf-8").replace("</body>", f"{moves}</body>"), "utf-8")
    said = re.search(r"<body>\s*(.*?)\s*</body>", shown(copy), re.S)[1]
    assert json.loads(html.unescape(said)) == steering.PROMPT + texts["C²R"][1]["texts"][2]


def test_without_steered_texts_the_page_does_not_speak_of_them(
    written, points, tmp_path, monkeypatch
):
    assert '<section id="steering">' in written.read_text("utf-8")
    monkeypatch.setattr(steering, "PROMPT", "Another prompt of which there is no result")
    text = write_page(tmp_path / "page.html", SMOKE).read_text("utf-8")
    assert '<section id="steering" hidden>' in text and '"steering":null' in text


@needs_chromium
def test_an_address_leads_to_its_point_and_a_wrong_one_to_the_start(written):
    there = shown(written, "#strength=1&alpha=2&child=0.3&cosine=0.8")
    assert "Here: strength 1, α = 2" in there and 'id="live" hidden' not in there
    assert "Here: no penalty" in shown(written, "#strength=7&other=1")
