"""The Python of the README and the guide runs as it stands, on small data; and they name what exists."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch

import c2r_core
import c2r_core.training
from c2r_core.__main__ import COMMANDS
from c2r_core.artefacts.profiles import load_profile
from c2r_core.metrics import groups
from c2r_core.notebook import files, runner
from conftest import PROJECT
from fake_hub import fake_hub

README = (PROJECT / "README.md").read_text(encoding="utf-8")
GUIDE = (PROJECT / "docs" / "guide.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README + GUIDE, flags=re.DOTALL)
SMALLER = {
    "smollm2-135m": "random-2-layer",
    "blocks.4.": "blocks.1.",
    "max_tokens=700_000": "max_tokens=6_000",
    "batch_size=2048, seed": "batch_size=128, seed",
    "d_sae=4096, k": "d_sae=96, k",
    "steps=1000": "steps=20",
    'profile="default"': 'profile="smoke"',
}
"""Only sizes: what the README's example is run with here."""


def test_the_whole_way_from_text_to_a_latent_runs(tmp_path, monkeypatch, capsys):
    (example,) = [code for code in PYTHON if "harvest(" in code]
    for large, small in SMALLER.items():
        assert example.count(large) == 1, large
        example = example.replace(large, small)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["plain"].text.sae_trained_on == "the other documents of this split"
    said = capsys.readouterr().out
    assert "reconstruction fvu" in said and "«" in said
    assert (tmp_path / "my_c2r.json").is_file() and (tmp_path / "c2r.png").is_file()
    (again,) = [line for line in example.splitlines() if "ActivationStore.open(" in line]
    exec(again.partition(": ")[2], names)
    assert len(names["store"]) == len(names["batches"].store)
    (streamed,) = [code for code in PYTHON if "StreamedBatches(" in code]
    (tmp_path / "my_texts.jsonl").write_text(
        "".join(json.dumps({"text": d.text}) + "\n" for d in names["training"].documents[:20])
    )
    streamed = streamed.replace("blocks.4.", "blocks.1.")
    exec(streamed.replace("batch_size=2048,", "batch_size=64, buffer_tokens=2048,"), names)
    assert names["batches"](0).shape == (64, 64)
    (as_results,) = [code for code in PYTHON if "write_saebench(" in code]
    exec(as_results, names)
    (result,) = (tmp_path / "eval_results").rglob("*_eval_results.json")
    assert json.loads(result.read_text())["eval_type_id"] == "core"
    (moved,) = [code for code in PYTHON if "import pull, push" in code]
    with fake_hub(monkeypatch) as hub:
        exec(moved, names)
    assert (
        hub.private["me/my-c2r"] and "license: mit" in hub.files("me/my-c2r")["README.md"].decode()
    )
    assert (tmp_path / "my_copy" / "config.json").read_bytes() == (
        tmp_path / "my_c2r" / "config.json"
    ).read_bytes()


def test_a_training_is_watched(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    (example,) = [code for code in PYTHON if "tracked(log)" in code]
    monkeypatch.chdir(tmp_path)
    x = torch.nn.functional.normalize(torch.randn(32, 8), dim=-1)
    sae = c2r_core.BatchTopKSAE(8, 24, k=2)
    names = {"sae": sae, "batches": lambda step: x, "penalties": []} | vars(c2r_core.training)
    exec(example.replace("steps=1000", "steps=3"), names)
    assert names["history"].records and list((tmp_path / "my_logs").iterdir())


def test_a_figure_of_one_s_own(tmp_path, monkeypatch, capsys):
    (example,) = [code for code in PYTHON if "item_table(" in code]
    monkeypatch.setenv("C2R_RESULTS", str(PROJECT / "results"))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert "language_model: " in capsys.readouterr().out
    assert list(names["absorption"].columns) == ["C²R", "OrtSAE", "baseline"]
    assert names["absorption"].notna().to_numpy().any(1).all() and len(names["absorption"]) > 20
    assert (tmp_path / "letters.png").is_file()


def test_what_is_printed_is_what_the_notebooks_print():
    (block,) = [block for block in README.split("```")[1::2] if "[claim FAILS]" in block]
    *claims, last = block.strip().splitlines()
    notebook = files.read(PROJECT / "notebooks" / "03_toy_c2r.ipynb")
    printed = [line.printed for line in files.verdicts(notebook)]
    for claim in claims:
        assert any(line.startswith(claim.removesuffix("…")) for line in printed), claim
    assert last in inspect.getsource(runner)


def test_the_loss_and_the_conversion():
    (loop,) = [code for code in PYTHON if "import c2r_loss" in code]
    assert len(loop.splitlines()) <= 11 and loop.count("\n\n") == 1, "ten lines"
    sae = c2r_core.ReLUSAE(4, 6, l1_weight=0.0)
    before = sae.W_dec.detach().clone()
    x = torch.nn.functional.normalize(torch.randn(16, 4), dim=-1)
    names = {"batches": [x] * 3, "sae": sae, "optimiser": torch.optim.Adam(sae.parameters())}
    exec(loop, names)
    assert not sae.W_dec.equal(before) and torch.isfinite(names["loss"])
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(6))
    assert (names["c2r_loss"](names["feature_acts"], sae.W_dec) > 0).all()
    (conversion,) = [code for code in PYTHON if "strength_from_weight(" in code]
    lines = [line.split("#") for line in conversion.splitlines() if "#" in line]
    assert len(lines) == 2
    for call, said in lines:
        value = eval(call, {name: getattr(c2r_core, name) for name in c2r_core.__all__})
        assert value == pytest.approx(float(said.split(":")[0]), rel=0.01)


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = {
        "#" + re.sub(r"[^\w -]", "", line.strip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    assert len(links) > 30
    assert [x for x in links if x not in headings and not (PROJECT / x).exists()] == []


def test_every_make_target_and_command_exists():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make\s+(\w+)", README, flags=re.MULTILINE))
    assert {"reproduce", "test", "lab", "status", "verify", "validate", "parity"} <= targets
    for name in targets:
        assert re.search(rf"^{name}[:/]", makefile, flags=re.MULTILINE), name
    commands = set(re.findall(r"(?:^|`)c2r (\w+)", README, flags=re.MULTILINE))
    assert {"evaluate", "compare", "contexts"} <= commands <= set(COMMANDS)


def test_the_strength_of_the_example_is_a_quarter_of_what_is_measured():
    (example,) = [code for code in PYTHON if "harvest(" in code]
    (call,) = re.findall(r"weight_from_strength\((.*)\)", example)
    measured = load_profile("default").language_model.c2r_strength
    assert float(call.split(",")[0]) == pytest.approx(measured / 4, rel=0.01)


def test_a_shell_block_reads_no_report_that_it_has_not_written():
    (block,) = [b for b in README.split("```")[1::2] if "\nc2r compare" in b]
    evaluated = {line.split()[2] for line in block.splitlines() if line.startswith("c2r evaluate")}
    written = set(re.findall(r"--out (\S+\.json)", block))
    assert written == {f"{sae}.json" for sae in evaluated}
    assert set(re.findall(r"\S+\.json", block)) == written
    assert evaluated == {"my_plain", "my_c2r"}


def test_every_room_and_every_group_of_metrics_is_in_its_table():
    rooms = {path.parent.name for path in (PROJECT / "c2r_core").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^    c2r_core/(\w+)  ", README, flags=re.MULTILINE))
    table = README[README.index("| group |") :].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row[:40])}
    assert named == set(groups())


def test_nothing_is_left_to_be_filled_in():
    assert re.findall(r"@@\w+", README) == []
