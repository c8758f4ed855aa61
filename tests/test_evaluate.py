"""Any SAE in, one report out: the command from end to end, and what happens to input that is bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import jsonschema
import pytest
import torch

from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.forward import activations
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.text import (
    SPLIT_SEED,
    Corpus,
    Document,
    held_out_documents,
    load_corpus,
    split_documents,
)
from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.evaluate import METRICS, Report, evaluate, json_schema, write_report
from c2r_core.evaluate import __main__ as command
from c2r_core.evaluate.evaluation import SCHEMA_FILE
from c2r_core.evaluate.metrics import chosen_metrics, standard_metrics
from c2r_core.evaluate.report import NotEvaluable, Section
from c2r_core.formats.inference import InferenceSAE, ReLU
from c2r_core.metrics.absorption import LetterProbes, evaluate_first_letter
from c2r_core.metrics.endpoint import Endpoint
from c2r_core.metrics.inputs import Bench
from c2r_core.saes import BatchTopKSAE, save_sae
from conftest import PROJECT
from foreign_saes import write_dictionary_learning, write_sae_lens

D_IN, D_SAE = 64, 96  # the random model's width
PROFILE = load_profile("smoke")
SMOKE, SIZES = PROFILE.language_model, PROFILE.evaluation
FIRST = ("core", "absorption")
CORE = ("reconstruction", "model_preservation", "decoder", "live_decoder")


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture(scope="module")
def corpus():
    """Some of the embedded documents."""
    return Corpus("few", load_corpus("sotu").documents[::20])


@pytest.fixture(scope="module")
def corpus_folder(corpus, tmp_path_factory):
    """The same as a folder of text files."""
    folder = tmp_path_factory.mktemp("texts") / "few"
    folder.mkdir()
    for document in corpus.documents:
        (folder / f"{document.name}.txt").write_text(document.text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sae():
    sae = BatchTopKSAE(D_IN, D_SAE, k=8, seed=1)
    sae.norm_factor = 0.1
    return sae


@pytest.fixture(scope="module")
def folder(sae, tmp_path_factory):
    return save_sae(sae, tmp_path_factory.mktemp("own") / "sae")


def measured(sae, model, corpus, *metrics, **options):
    """A smoke-size evaluation with a model and a corpus that are loaded already."""
    return evaluate(
        sae, model=model, corpus=corpus, metrics=metrics or ["core"], profile="smoke", **options
    )


def assert_only(report, not_evaluable):
    """These metrics of those asked for could not be evaluated, for these reasons; all others were."""
    assert report.not_evaluable.keys() == not_evaluable.keys(), report.not_evaluable
    for name, reason in not_evaluable.items():
        assert reason in report.not_evaluable[name]
    for name in set(report.settings.metrics) - set(not_evaluable):
        assert getattr(report.metrics, name).status == "evaluated"


# -- the command ---------------------------------------------------------------------------------


def start(arguments, out, cache):
    return subprocess.Popen(
        [sys.executable, "-m", "c2r_core.evaluate", *arguments, "--out", out, "--profile", "smoke"],
        cwd=PROJECT,
        env=os.environ | {"C2R_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_write_the_same_report(folder, corpus_folder, tmp_path):
    arguments = [folder, "--seed", "3", "--corpus", corpus_folder]
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    # Each with a cache of its own, so that nothing is handed over.
    processes = [start(arguments, file, file.with_suffix("")) for file in files]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [command.INCOMPLETE] * 2
    assert "absorption: not evaluable. None of the 26 letters" in said[0]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    report = json.loads(first)
    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    assert Report.model_validate(report).model_dump(mode="json") == report
    assert report["sae"]["format"] == "c2r" and report["settings"]["seed"] == 3
    assert report["text"]["corpus"] == "few" and report["text"]["n_repeated"] == 0
    values = report["metrics"]["reconstruction"]["values"]
    assert values["explained_variance"] == 1 - values["fvu"]
    assert not list(tmp_path.glob("*.part"))


def test_the_command_measures_other_libraries_saes(corpus_folder, tmp_path, capsys):
    p = write_sae_lens(tmp_path / "lens", d_in=D_IN, d_sae=D_SAE)
    write_dictionary_learning(tmp_path / "dictionary", "AutoEncoderNew", d_in=D_IN, d_sae=D_SAE)
    reports = {}
    for name in ("lens", "dictionary"):
        out = tmp_path / f"{name}.json"
        arguments = [str(tmp_path / name), "--out", str(out), "--corpus", str(corpus_folder)]
        arguments += ["--profile", "smoke", "--metrics", "core"]
        assert command.main(arguments) == command.COMPLETE
        reports[name] = json.loads(out.read_text())
        jsonschema.validate(reports[name], json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
        assert reports[name]["metrics"]["absorption"] is None
    assert "reconstruction: evaluated" in capsys.readouterr().out
    assert reports["lens"]["sae"]["format"] == "sae_lens"
    assert reports["lens"]["sae"]["stated"]["model"] == "a-model"
    assert reports["dictionary"]["sae"]["architecture"] == "AutoEncoderNew"
    # The same SAE in memory gives the same values.
    plain = InferenceSAE(p["W_enc"], p["W_dec"], p["b_dec"], ReLU(p["b_enc"]), centred=True)
    report = evaluate(plain, corpus=corpus_folder, profile="smoke", metrics=["core"])
    report = report.model_dump(mode="json")
    assert report["metrics"] == reports["lens"]["metrics"]
    assert report["sae"]["format"] == "in memory" and report["sae"]["weights_sha256"] is None


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


def test_the_committed_schema_is_the_reports_own(capsys):
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json_schema()
    assert command.main(["--schema"]) == command.COMPLETE
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_the_package_does_not_import_the_command():
    script = "import c2r_core, sys; print('c2r_core.evaluate' in sys.modules)"
    assert (
        subprocess.check_output([sys.executable, "-c", script], text=True, cwd=PROJECT) == "False\n"
    )


# -- values --------------------------------------------------------------------------------------


def test_values_by_hand(sae, model, corpus):
    report = measured(sae, model, corpus)
    held_out = split_documents(corpus, SMOKE.held_out_share, seed=SPLIT_SEED)[1]
    bench = Bench(None, SMOKE, SIZES, language_model=model, corpus=corpus)
    assert bench.documents.corpus == held_out

    with Bench(sae, SMOKE, SIZES, language_model=model, corpus=corpus) as bench:
        x = bench.activations.batch(range(len(bench.activations))).double()
        contexts = torch.from_numpy(bench.activations.contexts)
    stored = activations(model, contexts, SMOKE.hook_name)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(x, stored.double(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        feature_acts = sae.encode(0.1 * x.float()).double() / 0.1
        x_hat = sae.double().decode(0.1 * feature_acts) / 0.1
        sae.float()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    density = (feature_acts != 0).double().mean(0)
    values = report.metrics.reconstruction.values
    assert values.fvu == pytest.approx(float(fvu), rel=1e-4)
    assert values.l0 == pytest.approx(float(density.sum()), rel=1e-6)
    assert values.frac_alive == float((density > 0).double().mean())
    assert values.freq_over_1_percent == float((density > 0.01).double().mean())
    of_dense = float(density[density > 0.1].sum() / density.sum())
    assert values.normalized_freq_over_10_percent == pytest.approx(of_dense)
    cosines = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = (cosines @ cosines.T).fill_diagonal_(-1).amax(1)
    decoder = report.metrics.decoder.values
    assert decoder.average_max_decoder_cosine_sim == pytest.approx(float(cosines.mean()), rel=1e-5)
    loss = report.metrics.model_preservation.values
    kl_score = 1 - loss.kl_div_with_sae / loss.kl_div_with_ablation
    assert loss.kl_div_score == pytest.approx(kl_score)
    gain = loss.ce_loss_with_ablation - loss.ce_loss_with_sae
    assert loss.ce_loss_score == gain / (loss.ce_loss_with_ablation - loss.ce_loss_without_sae)


def planted_letters():
    """Words of A and B by their letter's direction; an SAE with a latent for each, but for one word
    of A that another latent has absorbed."""
    n, eye = 60, torch.eye(D_IN)
    letters = torch.arange(2).repeat_interleave(n // 2)
    is_test = (torch.arange(n // 2) >= 20).repeat(2)
    activations = 10 * eye[letters]
    activations[29] += 10 * eye[2]  # the last word of A, a test word
    task = FirstLetterTask(
        words=tuple(f"{LETTERS[i].lower()}{n}" for n, i in enumerate(letters)),
        activations=activations,
        letters=letters,
        is_test=is_test,
        hook_name=SMOKE.hook_name,
        prefix="",
        n_dropped=0,
    )
    weights = torch.zeros(26, D_IN)
    weights[:2] = eye[:2]
    probes = LetterProbes(
        weights, torch.full((26,), -5.0), (1.0, 1.0) + (None,) * 24, (None,) * 2 + ("few",) * 24
    )
    W_enc = torch.stack([eye[0] - eye[2], eye[1], eye[2]], dim=1)
    W_dec = torch.stack([eye[0], eye[1], 0.8 * eye[0] + 0.6 * eye[2]])
    return (
        task,
        probes,
        InferenceSAE(W_enc, W_dec, torch.zeros(D_IN), ReLU(torch.zeros(3)), centred=True),
    )


def test_absorption_in_saebenchs_names(monkeypatch, model, corpus):
    task, probes, sae = planted_letters()
    monkeypatch.setattr(Bench, "letters", (task, probes))
    report = measured(sae, model, corpus, "absorption")
    assert_only(report, {})
    values = report.metrics.absorption.values
    a, b = values.letters[:2]
    assert (a.first_letter, a.num_probe_true_positives, a.num_full_absorption) == ("A", 10, 1)
    assert a.mean_absorption_fraction == a.full_absorption_rate == pytest.approx(0.1)
    assert (a.split_features, b.num_full_absorption) == ([0], 0)
    assert values.mean_full_absorption_score == pytest.approx(0.05)
    assert values.std_dev_full_absorption_score == pytest.approx(0.1 / 2**0.5)
    assert (values.num_letters, values.num_good_probes, values.num_words) == (2, 2, 60)
    assert values.letters[2].not_evaluable == "few"
    theirs = evaluate_first_letter(sae, task, probes)
    assert values.mean_absorption_fraction_score == theirs.mean_absorption_fraction


def test_an_own_sae_in_memory_gets_its_norm_factor_folded(sae, folder, model, corpus):
    in_memory = measured(sae, model, corpus, "reconstruction")
    from_folder = measured(folder, model, corpus, "reconstruction")
    assert in_memory.metrics == from_folder.metrics
    sae_raw = BatchTopKSAE(D_IN, D_SAE, k=8, seed=1)
    other = measured(sae_raw, model, corpus, "reconstruction")
    assert other.metrics == in_memory.metrics, "a scale alone changes nothing without biases"
    sae_raw.threshold.fill_(0.5)
    assert measured(sae_raw, model, corpus, "reconstruction").metrics != in_memory.metrics


# -- what is read --------------------------------------------------------------------------------


def replace_call(monkeypatch, tokenizer, changed):
    """Let calls of the tokenizer pass through `changed(texts, ids)`, which returns other ids."""
    original = type(tokenizer).__call__

    def call(self, texts, **options):
        encoded = original(self, texts, **options)
        if isinstance(texts, str):
            return {"input_ids": changed([texts], [encoded["input_ids"]])[0]}
        return {"input_ids": changed(texts, encoded["input_ids"])}

    monkeypatch.setattr(type(tokenizer), "__call__", call)


def test_training_documents_are_never_read(sae, model, corpus, monkeypatch):
    heard = set()

    def listen(texts, ids):
        heard.update(texts)
        return ids

    replace_call(monkeypatch, model.tokenizer, listen)
    report = evaluate(sae, model=model, corpus=corpus, profile="smoke")
    training, held_out = split_documents(corpus, SMOKE.held_out_share, seed=SPLIT_SEED)
    assert heard.isdisjoint(document.text for document in training.documents)
    assert heard >= {document.text for document in held_out.documents}
    assert report.text.fingerprint == held_out.fingerprint != training.fingerprint
    assert report.text.training_fingerprint == training.fingerprint


def test_a_copy_of_a_training_document_is_left_out(corpus):
    training, held_out = split_documents(corpus, 0.5, seed=SPLIT_SEED)
    copied = held_out.documents[0].name
    copy = training.documents[0].text
    with_copy = Corpus(
        "copied",
        tuple(replace(d, text=copy) if d.name == copied else d for d in corpus.documents),
    )
    documents = held_out_documents(with_copy, 0.5)
    assert documents.n_repeated == 1
    assert documents.corpus.documents == held_out.documents[1:]
    with pytest.raises(ValueError, match="nothing is left to evaluate on"):
        held_out_documents(Corpus("same", tuple(Document(str(i), "a") for i in range(4))), 0.5)


def test_what_the_sae_was_trained_on_is_compared(folder, model, corpus):
    training, held_out = split_documents(corpus, SMOKE.held_out_share, seed=SPLIT_SEED)

    def evaluated_after_training_on(fingerprint):
        record = {"key": {"data": {"text_fingerprint": fingerprint}}}
        (folder.parent / "key.json").write_text(json.dumps(record))
        return measured(folder, model, corpus, "decoder").text.sae_trained_on

    assert measured(folder, model, corpus, "decoder").text.sae_trained_on == "not known"
    known = evaluated_after_training_on(training.fingerprint)
    assert known == "the other documents of this split"
    assert evaluated_after_training_on("something else") == "not known"
    with pytest.raises(ValueError, match="the very documents that are held out"):
        evaluated_after_training_on(held_out.fingerprint)
    (folder.parent / "key.json").unlink()


# -- bad input: a record, and the other metrics unharmed ----------------------------------------


def linear_sae(d_in=D_IN, d_sae=D_SAE, bias=0.0):
    W_dec = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
    biases = torch.full((d_sae,), bias)
    return InferenceSAE(W_dec.T, W_dec, torch.zeros(d_in), ReLU(biases), centred=True)


def test_a_dead_dictionary(model, corpus, monkeypatch):
    monkeypatch.setattr(Bench, "letters", planted_letters()[:2])
    report = measured(linear_sae(bias=-1e9), model, corpus, *FIRST)
    no_latent = "24 begin too few of them, 0 are not told by a probe on the model itself, and for 2"
    assert_only(report, {"live_decoder": "0 latents are live", "absorption": no_latent})
    values = report.metrics.reconstruction.values
    assert (values.l0, values.frac_alive, values.l2_ratio) == (0, 0, 0)
    assert values.relative_reconstruction_bias is None
    assert values.normalized_freq_over_1_percent == 0
    loss = report.metrics.model_preservation.values
    assert loss.ce_loss_score == 0 and loss.kl_div_score == 0


def test_an_empty_dictionary(model, corpus):
    report = measured(linear_sae(d_sae=0), model, corpus, *FIRST)
    assert_only(report, dict.fromkeys((*CORE, "absorption"), "The dictionary is empty"))


def test_a_dictionary_of_nan(model, corpus):
    sae = linear_sae()
    sae.W_dec[3] = float("nan")
    report = measured(sae, model, corpus)
    assert report.not_evaluable.keys() == set(CORE)
    assert "NaN" in report.not_evaluable["reconstruction"]


def test_another_width(model, corpus, monkeypatch):
    monkeypatch.setattr(Bench, "letters", planted_letters()[:2])
    report = measured(linear_sae(d_in=D_IN + 1), model, corpus, *FIRST)
    reasons = dict.fromkeys(CORE, "takes activations of width 65") | {"absorption": "64 entries"}
    del reasons["decoder"]  # needs no activations
    assert_only(report, reasons)


def test_a_tokenizer_that_breaks_the_template(sae, model, corpus, monkeypatch):
    def turn_prompts_around(texts, ids):
        pairs = zip(texts, ids, strict=True)
        return [i[::-1] if "has the first letter" in text else i for text, i in pairs]

    replace_call(monkeypatch, model.tokenizer, turn_prompts_around)
    report = measured(sae, model, corpus, *FIRST)
    assert_only(report, {"absorption": "is a single token behind"})


def test_a_corpus_without_words(sae, model):
    texts = (f"{i} 1234567890 +-*/ " * 200 for i in range(4))
    digits = Corpus("digits", tuple(Document(str(i), text) for i, text in enumerate(texts)))
    report = measured(sae, model, digits, *FIRST)
    assert_only(report, {"absorption": "No token of corpus 'digits/held-out'"})


def test_too_few_words(sae, model, corpus):
    report = measured(sae, model, corpus, *FIRST)
    assert_only(report, {"absorption": "None of the 26 letters could be measured on"})
    assert "begin too few of them" in report.not_evaluable["absorption"]


def test_documents_too_short_for_a_context(sae, model):
    short = Corpus("short", tuple(Document(str(i), f"A short text {i}.") for i in range(4)))
    report = measured(sae, model, short, *FIRST)
    reasons = dict.fromkeys(("reconstruction", "model_preservation", "live_decoder"), "fills a")
    assert_only(report, reasons | {"absorption": "None of the 26 letters"})


@pytest.mark.parametrize("fault", ["dead", "empty", "NaN", "another width"])
def test_a_bad_sae_harms_no_report(fault, model, corpus):
    bad = {
        "dead": linear_sae(bias=-1e9),
        "empty": linear_sae(d_sae=0),
        "NaN": linear_sae(bias=float("nan")),
        "another width": linear_sae(d_in=D_IN + 1),
    }
    report = evaluate(bad[fault], model=model, corpus=corpus, profile="smoke")
    assert report.settings.metrics == list(standard_metrics())
    for name in report.settings.metrics:
        record = getattr(report.metrics, name)
        assert record.status == "evaluated" or len(record.reason) > 20
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_what_needs_more_is_measured_where_it_is_given(sae, model, corpus):
    assert {"agreement", "autointerp"} == set(METRICS) - set(standard_metrics())
    assert set(standard_metrics(["against"])) - set(standard_metrics()) == {"agreement"}
    report = measured(sae, model, corpus, "agreement", "autointerp", "meta_sae")
    reasons = {"agreement": "name its folder with --against", "autointerp": "give --endpoint URL"}
    assert_only(report, reasons)
    unreachable = Endpoint("http://127.0.0.1:9/v1", "m", retries=0)
    report = measured(
        sae, model, corpus, "agreement", "autointerp", against=sae, endpoint=unreachable
    )
    assert_only(report, {"autointerp": "cannot be reached"})
    assert report.metrics.agreement.values.all_latents.pw_mcc == pytest.approx(1)


def test_an_error_of_the_program_is_raised(sae, model, corpus, monkeypatch):
    class Values(Section):
        number: int

    def fails_with(error):
        def measure(bench):
            raise error

        return measure

    def returns_nonsense(bench):
        return Values(number="many")

    for measure, raised in (
        (fails_with(KeyError("x")), KeyError),
        (returns_nonsense, ValueError),
    ):
        broken = replace(METRICS["decoder"], measure=measure)
        monkeypatch.setitem(METRICS, "decoder", broken)
        with pytest.raises(raised):
            measured(sae, model, corpus, "decoder")
    bad_input = replace(METRICS["decoder"], measure=fails_with(ValueError("not this SAE")))
    monkeypatch.setitem(METRICS, "decoder", bad_input)
    report = measured(sae, model, corpus, "decoder")
    assert report.metrics.decoder == NotEvaluable(reason="not this SAE")


def test_a_stack_is_refused(model, corpus):
    with pytest.raises(ValueError, match="one by one"):
        measured(BatchTopKSAE(D_IN, D_SAE, k=8, seed=[0, 1]), model, corpus)


def test_metrics_are_chosen_by_group_or_name():
    assert chosen_metrics(["core"]) == list(CORE)
    assert chosen_metrics(["absorption", "decoder"]) == ["decoder", "absorption"]
    with pytest.raises(ValueError, match="No metric was asked for"):
        chosen_metrics([])


def test_a_report_is_written_whole(sae, model, corpus, tmp_path, monkeypatch):
    report = measured(sae, model, corpus, "decoder")
    write_report(report, tmp_path / "deep" / "report.json")
    before = (tmp_path / "deep" / "report.json").read_bytes()

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(report, tmp_path / "deep" / "report.json")
    assert (tmp_path / "deep" / "report.json").read_bytes() == before


def test_the_command_in_the_readme_is_one():
    text = (PROJECT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    (line,) = [line for line in text.splitlines() if "-m c2r_core.evaluate my_sae" in line]
    given = command._parser().parse_args(line.split("c2r_core.evaluate")[1].split())
    assert given.metrics is None  # all
    assert (given.model, given.hook, given.corpus) == (
        "smollm2-135m",
        "blocks.4.hook_resid_post",
        "sotu",
    )
