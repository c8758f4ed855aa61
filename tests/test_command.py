"""`c2r evaluate` and `c2r compare` from end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from c2r_core.evaluate import Options, compare, contexts, evaluate, json_schema, read_report
from c2r_core.evaluate import __main__ as command
from c2r_core.evaluate.options import unlike_training
from c2r_core.formats.inference import InferenceSAE, ReLU
from c2r_core.metrics import METRICS
from c2r_core.saes import BatchTopKSAE, save_sae
from conftest import PROJECT
from foreign_saes import write_dictionary_learning, write_sae_lens

D_IN, D_SAE = 64, 96  # the random model's width


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sae = BatchTopKSAE(D_IN, D_SAE, k=8, seed=1)
    sae.norm_factor = 0.1
    return save_sae(sae, tmp_path_factory.mktemp("own") / "sae")


@pytest.fixture(scope="module")
def corpus_folder(few_documents, tmp_path_factory):
    """Some documents as a folder of text files."""
    folder = tmp_path_factory.mktemp("texts") / "few"
    folder.mkdir()
    for document in few_documents.documents:
        (folder / f"{document.name}.txt").write_text(document.text, encoding="utf-8")
    return folder


def _in_a_process(arguments: list[str]) -> int:
    return subprocess.call([sys.executable, "-m", "c2r_core.evaluate", *arguments], cwd=PROJECT)


def test_two_processes_write_the_same_report(folder, corpus_folder, tmp_path, monkeypatch, capfd):
    """In a process of its own, and here; each has a cache of its own, so that nothing is handed over."""
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    own = [str(folder), "--seed", "3", "--corpus", str(corpus_folder), "--profile", "smoke"]
    statuses, said = [], []
    for file, run in zip(files, (_in_a_process, command.main), strict=True):
        monkeypatch.setenv("C2R_CACHE", str(file.with_suffix("")))
        statuses.append(run([*own, "--out", str(file)]))
        said.append(capfd.readouterr().out)
    assert statuses == [command.INCOMPLETE] * 2
    assert "absorption: not evaluable. None of the 26 letters" in said[0]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    report = json.loads(first)
    assert report["sae"]["format"] == "c2r" and report["settings"]["seed"] == 3
    assert report["text"]["corpus"] == "few" and report["text"]["n_repeated"] == 0
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["first.json", "second.json"]


def test_it_prints_headlines_with_direction_and_baseline(folder, corpus_folder, tmp_path, capsys):
    out = tmp_path / "report.json"
    arguments = [str(folder), "--out", str(out), "--corpus", str(corpus_folder)]
    arguments += ["--profile", "smoke", "--metrics", "core"]
    assert command.main(arguments) == command.COMPLETE
    said, on_the_way = capsys.readouterr()
    assert on_the_way.startswith("Measuring reconstruction, ")
    assert re.search(r"^  reconstruction: \d+\.\d s$", on_the_way, re.MULTILINE)
    fvu = read_report(out)["reconstruction"].fvu
    (line,) = [line for line in said.splitlines() if line.startswith("reconstruction.fvu")]
    assert line.split() == [
        "reconstruction.fvu",
        f"{fvu:.4g}",
        *"lower is better, baseline 1".split(),
    ]


def test_it_measures_other_libraries_saes(corpus_folder, tmp_path):
    p = write_sae_lens(tmp_path / "lens", d_in=D_IN, d_sae=D_SAE)
    write_dictionary_learning(tmp_path / "dictionary", "AutoEncoderNew", d_in=D_IN, d_sae=D_SAE)
    reports = {}
    for name in ("lens", "dictionary"):
        out = tmp_path / f"{name}.json"
        arguments = [str(tmp_path / name), "--out", str(out), "--corpus", str(corpus_folder)]
        arguments += ["--profile", "smoke", "--metrics", "core"]
        assert command.main(arguments) == command.COMPLETE
        reports[name] = read_report(out)
        assert "absorption" not in reports[name].metrics
    assert reports["lens"].sae.format == "sae_lens"
    assert reports["lens"].sae.stated["model"] == "a-model"
    assert reports["dictionary"].sae.architecture == "AutoEncoderNew"
    # The same SAE in memory gives the same values.
    plain = InferenceSAE(p["W_enc"], p["W_dec"], p["b_dec"], ReLU(p["b_enc"]), centred=True)
    report = evaluate(plain, corpus=corpus_folder, metrics="core", options=Options("smoke"))
    assert report.metrics == reports["lens"].metrics
    assert report.sae.format == "in memory" and report.sae.weights_sha256 is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no folder nowhere"),
        (["{empty}"], "lacks config.json and sae.safetensors; sae_lens"),
        (["{own}", "--model", "random-2-layers"], "Did you mean 'random-2-layer'"),
        (["{own}", "--hook", "blocks.9.hook_resid_post"], "has no hook"),
        (["{own}", "--corpus", "sotus"], "Did you mean 'sotu'"),
        (["{own}", "--metrics", "core,absorbtion"], "did you mean 'absorption'"),
    ],
)
def test_without_anything_to_measure_there_is_no_report(
    arguments, message, folder, tmp_path, capsys
):
    out = tmp_path / "report.json"
    (tmp_path / "empty").mkdir()
    arguments = [word.format(own=folder, empty=tmp_path / "empty") for word in arguments]
    assert command.main([*arguments, "--profile", "smoke", "--out", str(out)]) == command.NO_REPORT
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_without_a_place_for_it_there_is_no_report(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = [str(folder), "--metrics", "decoder", "--profile", "smoke"]
    out = tmp_path / "file" / "report.json"
    assert command.main([*arguments, "--out", str(out)]) == command.NO_REPORT
    assert re.search(f"No report: .*{tmp_path / 'file'}", capsys.readouterr().err)


def test_with_a_damaged_cache_there_is_no_report(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("C2R_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "report.json"
    arguments = [str(folder), "--metrics", "absorption", "--profile", "smoke", "--out", str(out)]
    assert command.main(arguments) != command.NO_REPORT
    out.unlink()
    (checksums,) = (tmp_path / "cache" / "words").glob("*/checksums.json")
    checksums.unlink()
    assert command.main(arguments) == command.NO_REPORT
    assert (
        f"No report: {checksums} is missing. Delete {checksums.parent}" in capsys.readouterr().err
    )
    assert not out.exists()


def test_without_an_sae_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as end:
        command.main([])
    assert end.value.code == command.NO_REPORT
    assert "the folder of an SAE is missing" in capsys.readouterr().err


def test_what_is_read_is_what_the_sae_was_trained_on_or_it_is_said(tmp_path, capsys):
    about = {"model": "random-2-layer", "hook_name": "blocks.1.hook_resid_post"}
    about |= {"text": "my_texts/train", "text_fingerprint": "another"}
    own = str(save_sae(BatchTopKSAE(D_IN, D_SAE, k=8, seed=1), tmp_path / "own", trained_on=about))
    warned = "This SAE was trained on my_texts: give --corpus my_texts."
    assert contexts.main([own, "7", "--profile", "smoke", "-n", "1"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    read = "random-2-layer at blocks.1.hook_resid_post; text: sotu, held out."
    assert first == f"{read} {warned}" and rest[0].startswith("latent 7")
    assert rest[-1].endswith(" is the token that begins every context.")
    other = ["--profile", "smoke", "--hook", "blocks.0.hook_resid_post"]
    elsewhere = "Its config says that it reads blocks.1.hook_resid_post; measured at blocks.0."
    assert contexts.main([own, "7", "-n", "1", *other]) == 0
    assert elsewhere in capsys.readouterr().out
    out = tmp_path / "report.json"
    command.main([own, "--metrics", "reconstruction", "--out", str(out), *other])
    said = capsys.readouterr().out
    assert elsewhere in said and warned in said
    same_name = unlike_training({"text": "sotu/train"}, None, read_report(out).text)
    assert same_name == ["This SAE was trained on other documents of sotu: some may be read here."]


def test_an_error_of_the_program_is_no_message(folder, tmp_path, monkeypatch):
    def broken(inputs):
        raise ValueError("operands could not be broadcast together")

    from dataclasses import replace

    monkeypatch.setitem(METRICS, "decoder", replace(METRICS["decoder"], measure=broken))
    with pytest.raises(ValueError, match="broadcast"):
        command.main([str(folder), "--metrics", "decoder", "--out", str(tmp_path / "report.json")])


def test_the_schema_is_printed(capsys):
    assert command.main(["--schema"]) == command.COMPLETE
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "c2r_core", "evaluate", "--schema"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=PROJECT, text=True, **pipes) as run:
        assert run.stdout.readline() == "{\n"
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 1


OWN_METRIC = """
from dataclasses import dataclass

from c2r_core.metrics import metric


@dataclass(frozen=True)
class Own:
    number: float


@metric("of_my_own", group="own", headline={"number": "higher"}, reads_model=False)
def measure(inputs) -> Own:
    return Own(1.0)
"""


def test_a_plugin_is_a_file_or_a_module_of_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "metric_of_my_own.py").write_text(OWN_METRIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    try:
        for plugin in ("metric_of_my_own", str(tmp_path / "metric_of_my_own.py")):
            assert command.main(["--plugin", plugin, "--schema"]) == 0
            assert "of_my_own" in capsys.readouterr().out
    finally:
        METRICS.pop("of_my_own", None)
    with pytest.raises(SystemExit):
        command.main(["--plugin", "nowhere", "--schema"])
    assert "No module named 'nowhere'; name a file" in capsys.readouterr().err


def test_two_reports_side_by_side(folder, tmp_path, capsys):
    other = save_sae(BatchTopKSAE(D_IN, 40, k=8, seed=2), tmp_path / "other")
    files = []
    for number, path in enumerate((folder, other)):
        files.append(str(tmp_path / f"{number}.json"))
        command.main([str(path), "--metrics", "decoder", "--out", files[-1], "--seed", str(number)])
    capsys.readouterr()
    assert command.main(["compare", *files]) == 0
    said = capsys.readouterr().out
    assert "Not measured alike: settings.seed: 0 and 1" in said
    assert "0.json" in said and "1.json" in said and "* better number; no test of chance." in said
    (row,) = compare(*map(read_report, files))
    assert f"{row.a:.4g}" in said and f"{row.b:.4g}" in said
    assert command.main(["compare", files[0], str(tmp_path / "none.json")]) == 2
    assert "There is no report" in capsys.readouterr().err


def test_reports_with_a_metric_of_one_s_own_are_compared(folder, tmp_path, monkeypatch, capsys):
    plugin = tmp_path / "metric_to_compare.py"
    plugin.write_text(OWN_METRIC.replace("of_my_own", "to_compare"))
    monkeypatch.setattr("sys.path", list(sys.path))
    own, files = ["--plugin", str(plugin)], [str(tmp_path / name) for name in ("a.json", "b.json")]

    def said(*arguments):
        """What the command prints, in a process that has not seen the plugin."""
        try:
            command.main([*arguments])
        finally:
            METRICS.pop("to_compare", None)
            sys.modules.pop("metric_to_compare", None)
        return capsys.readouterr().out

    for file in files:
        said(str(folder), *own, "--metrics", "to_compare", "--out", file)
    assert "to_compare.number" in said("compare", *files, *own)
    assert "to_compare" not in said("compare", *files)


def test_the_package_does_not_import_the_command():
    script = "import c2r_core, sys; print('c2r_core.evaluate' in sys.modules)"
    assert (
        subprocess.check_output([sys.executable, "-c", script], text=True, cwd=PROJECT) == "False\n"
    )
