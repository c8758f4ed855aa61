"""Any SAE in, one report out: values by hand, and what happens to input that is bad."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch

from c2r_core.artefacts import fingerprints
from c2r_core.artefacts.profiles import load_profile
from c2r_core.artefacts.results import plain, read_json, write_json
from c2r_core.data.forward import activations
from c2r_core.data.text import SPLIT_SEED, Corpus, Document, split_documents
from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.errors import NotEvaluable
from c2r_core.evaluate import (
    METRICS,
    Options,
    compare,
    evaluate,
    json_schema,
    read_report,
    strongest_contexts,
    write_report,
)
from c2r_core.evaluate.evaluation import _Kept
from c2r_core.evaluate.report import NotEvaluated, checked_record
from c2r_core.formats.inference import InferenceSAE, ReLU
from c2r_core.metrics import chosen_metrics, metric, standard_metrics
from c2r_core.metrics.absorption import evaluate_first_letter
from c2r_core.metrics.endpoint import Endpoint
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_probes import LetterProbes, LetterSplit
from c2r_core.notebook.tables import paired_items
from c2r_core.saes import BatchTopKSAE, TopKSAE, save_sae
from conftest import PROJECT

D_IN, D_SAE = 64, 96  # the random model's width
PROFILE = load_profile("smoke")
SMOKE, SIZES = PROFILE.language_model, PROFILE.evaluation
FIRST = ("core", "absorption")
CORE = tuple(name for name, of in METRICS.items() if of.group == "core")


@pytest.fixture(scope="module")
def sae():
    sae = BatchTopKSAE(D_IN, D_SAE, k=8, seed=1)
    sae.norm_factor = 0.1
    return sae


@pytest.fixture(scope="module")
def folder(sae, tmp_path_factory):
    return save_sae(sae, tmp_path_factory.mktemp("own") / "sae")


@pytest.fixture
def measured(random_model, few_documents):
    """A smoke-size evaluation with a model and a corpus that are loaded already."""

    def measured(sae, *metrics, corpus=few_documents, **options):
        options = Options(profile="smoke", **options)
        return evaluate(
            sae, model=random_model, corpus=corpus, metrics=metrics or "core", options=options
        )

    return measured


def assert_only(report, not_evaluable):
    """These metrics of those asked for could not be evaluated, for these reasons; all others were."""
    assert report.not_evaluable.keys() == not_evaluable.keys(), report.not_evaluable
    for name, reason in not_evaluable.items():
        assert reason in report.not_evaluable[name]
    for name in set(report.settings.metrics) - set(not_evaluable):
        assert report.metrics[name].status == "evaluated"


# -- values --------------------------------------------------------------------------------------


def test_values_by_hand(sae, measured, random_model, few_documents):
    report = measured(sae)
    inputs = Inputs(
        sae, SMOKE, SIZES, Options("smoke"), language_model=random_model, corpus=few_documents
    )
    x = inputs.activations.batch(range(len(inputs.activations))).double()
    contexts = torch.from_numpy(inputs.activations.contexts)
    stored = activations(random_model, contexts, SMOKE.hook_name)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(x, stored.double(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        feature_acts = sae.encode(0.1 * x.float()).double() / 0.1
        x_hat = sae.double().decode(0.1 * feature_acts) / 0.1
        sae.float()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    density = (feature_acts != 0).double().mean(0)
    values = report["reconstruction"]
    assert values.fvu == pytest.approx(float(fvu), rel=1e-4)
    assert values.explained_variance == 1 - values.fvu
    assert values.l0 == pytest.approx(float(density.sum()), rel=1e-6)
    assert values.frac_alive == float((density > 0).double().mean())
    assert values.num_alive == int((density > 0).sum())
    assert values.freq_over_1_percent == float((density > 0.01).double().mean())
    of_dense = float(density[density > 0.1].sum() / density.sum())
    assert values.normalized_freq_over_10_percent == pytest.approx(of_dense)
    cosines = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = (cosines @ cosines.T).fill_diagonal_(-1).amax(1)
    found = report["decoder"].average_max_decoder_cosine_sim
    assert found == pytest.approx(float(cosines.mean()), rel=1e-5)
    loss = report["model_preservation"]
    kl_score = 1 - loss.kl_div_with_sae / loss.kl_div_with_ablation
    assert loss.kl_div_score == pytest.approx(kl_score)
    gain = loss.ce_loss_with_ablation - loss.ce_loss_with_sae
    assert loss.ce_loss_score == gain / (loss.ce_loss_with_ablation - loss.ce_loss_without_sae)


def test_what_else_is_said_of_reconstruction(sae, measured, random_model, few_documents):
    inputs = Inputs(
        sae, SMOKE, SIZES, Options("smoke"), language_model=random_model, corpus=few_documents
    )
    store = inputs.activations
    values = measured(sae, "reconstruction", train_store=store)["reconstruction"]
    assert values.fvu_on_training_documents == values.fvu, "the same tokens"
    assert values.fvu_with_dropped_tokens != values.fvu
    assert measured(sae, "reconstruction")["reconstruction"].fvu_on_training_documents is None


def test_an_sae_that_expects_another_scale_is_told(sae, measured, random_model, few_documents):
    inputs = Inputs(
        sae, SMOKE, SIZES, Options("smoke"), language_model=random_model, corpus=few_documents
    )
    x = inputs.activations.batch(range(len(inputs.activations)))
    # (relu(b + x) − relu(b − x)) / 2 is x as long as |x| < b, and (x ± b) / 2 beyond.
    rows = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])

    def clipping(bias):
        return InferenceSAE(
            rows.T, rows / 2, torch.zeros(D_IN), ReLU(torch.full((2 * D_IN,), bias)), centred=True
        )

    # Trained where E‖x‖² is smaller by a factor of 400 (b is right for x / 20).
    assert measured(clipping(float(x.abs().max())), "reconstruction").warnings == {}
    shrunken = float(x.abs().max()) * inputs.activations.norm_factor / 20
    report = measured(clipping(shrunken), "reconstruction")
    assert ("reconstruction" in report.warnings) == (inputs.activations.norm_factor < 1)


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
    sae = InferenceSAE(W_enc, W_dec, torch.zeros(D_IN), ReLU(torch.zeros(3)), centred=True)
    return [LetterSplit(task, probes)], sae


@pytest.fixture
def planted(monkeypatch):
    splits, sae = planted_letters()
    monkeypatch.setattr("c2r_core.metrics.absorption.letter_splits", lambda inputs: splits)
    monkeypatch.setattr("c2r_core.metrics.letter_latents.letters", lambda inputs: splits[0].task)
    return splits, sae


def test_absorption_in_saebenchs_names(planted, measured):
    splits, sae = planted
    report = measured(sae, "absorption")
    assert_only(report, {})
    values = report["absorption"]
    a, b = values.letters[:2]
    assert (a.first_letter, a.num_probe_true_positives, a.num_full_absorption) == ("A", 10, 1)
    assert a.mean_absorption_fraction == a.full_absorption_rate == pytest.approx(0.1)
    assert (a.split_features, b.num_full_absorption) == ((0,), 0)
    assert values.mean_full_absorption_score == pytest.approx(0.05)
    assert values.std_dev_full_absorption_score == pytest.approx(0.1 / 2**0.5)
    assert (values.num_letters, values.num_good_probes, values.num_words) == (2, 2, 60)
    assert values.letters[2].not_evaluable == "few"
    assert values == evaluate_first_letter(sae, splits)


def test_an_own_sae_in_memory_gets_its_norm_factor_folded(sae, folder, measured):
    in_memory = measured(sae, "reconstruction")
    assert in_memory.metrics == measured(folder, "reconstruction").metrics
    sae_raw = BatchTopKSAE(D_IN, D_SAE, k=8, seed=1)
    other = measured(sae_raw, "reconstruction")
    assert other.metrics == in_memory.metrics, "a scale alone changes nothing without biases"
    sae_raw.threshold.fill_(0.5)
    assert measured(sae_raw, "reconstruction").metrics != in_memory.metrics


# -- the report ----------------------------------------------------------------------------------


def test_a_report_is_written_read_and_fits_its_schema(sae, measured, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    report = measured(sae, "core", "autointerp")
    write_report(report, tmp_path / "deep" / "report.json")
    assert read_report(tmp_path / "deep" / "report.json") == report
    content = json.loads((tmp_path / "deep" / "report.json").read_text(encoding="utf-8"))
    schema = json_schema()
    jsonschema.validate(content, schema)
    assert schema["$defs"]["Reconstruction"]["properties"]["l0"]["description"].startswith(
        "Mean number"
    )
    assert content["metrics"]["autointerp"]["status"] == "not evaluable"
    del content["metrics"]["reconstruction"]["values"]["fvu"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_what_was_not_measured_says_so(sae, measured):
    report = measured(sae, "decoder", "autointerp")
    with pytest.raises(KeyError, match="'use' was not asked for"):
        report["use"]
    with pytest.raises(NotEvaluable, match="No endpoint"):
        report["autointerp"]
    assert report["decoder"] is report.metrics["decoder"].values


def test_of_a_metric_that_is_not_registered_here_the_values_are_read(sae, measured, tmp_path):
    report = measured(sae, "decoder")
    content = plain(report)
    content["metrics"] |= {
        "foreign": {"values": {"number": 2.0}, "status": "evaluated"},
        "impossible": {"reason": "no such text", "status": "not evaluable"},
    }
    write_json(tmp_path / "report.json", content)
    again = read_report(tmp_path / "report.json")
    assert again["foreign"] == {"number": 2.0} and again["decoder"] == report["decoder"]
    assert again.not_evaluable == {"impossible": "no such text"}
    with pytest.raises(NotEvaluable, match="no such text"):
        again["impossible"]
    write_report(again, tmp_path / "again.json")
    assert read_json(tmp_path / "again.json") == content
    content["metrics"]["foreign"] = {"number": 2.0}
    write_json(tmp_path / "report.json", content)
    with pytest.raises(ValueError, match="'foreign'"):
        read_report(tmp_path / "report.json")


def test_headlines_have_a_direction_and_a_baseline(sae, measured):
    report = measured(sae, "reconstruction", "decoder")
    rows = {(row.metric, row.field): row for row in report.headline()}
    fvu = rows["reconstruction", "fvu"]
    assert (fvu.value, fvu.better, fvu.baseline) == (report["reconstruction"].fvu, "lower", 1)
    assert rows["decoder", "average_max_decoder_cosine_sim"].better == "none"


def test_a_metric_that_would_mislead_is_refused_when_it_is_registered():
    @dataclass(frozen=True)
    class Own:
        number: float
        forgotten = 3

    def measure(inputs) -> Own: ...

    def register(name="mine", report=Own, **headline):
        measure.__annotations__["return"] = report
        metric(name, group="own", headline=headline or {"number": "higher"})(measure)

    with pytest.raises(TypeError, match="Own.forgotten has no type"):
        register()
    del Own.forgotten
    for name, why in (("reconstruction", "is there already"), ("core", "name of a group")):
        with pytest.raises(ValueError, match=why):
            register(name)
    with pytest.raises(ValueError, match="unknown field 'numbr'; did you mean 'number'"):
        register(numbr="higher")
    with pytest.raises(ValueError, match="unknown direction 'up'"):
        register(number="up")
    assert "mine" not in METRICS


def test_every_headline_is_a_field_of_its_report():
    for of in METRICS.values():
        for field, how in of.headline.items():
            paths = [field, how.baseline] if isinstance(how.baseline, str) else [field]
            schema = json_schema()["$defs"]
            for path in paths:
                properties = schema[of.report.__name__]["properties"]
                for part in path.split("."):
                    assert part in properties, (of.name, path)
                    text = json.dumps(properties[part])
                    properties = next(
                        (d["properties"] for n, d in schema.items() if f'/{n}"' in text), {}
                    )


def test_two_reports_are_compared(sae, measured):
    other = TopKSAE(D_IN, D_SAE, k=4, seed=1)
    reports = measured(sae, "core"), measured(other, "core", "absorption")
    rows = {(row.metric, row.field): row for row in compare(*reports)}
    fvu = rows["reconstruction", "fvu"]
    assert (fvu.a, fvu.b) == tuple(report["reconstruction"].fvu for report in reports)
    assert fvu.winner == ("a" if fvu.a < fvu.b else "b")
    ratio = rows["reconstruction", "l2_ratio"]
    assert ratio.winner == ("a" if abs(ratio.a - 1) < abs(ratio.b - 1) else "b")
    assert rows["reconstruction", "l0"].winner == ""
    assert {row.winner for row in compare(reports[0], reports[0])} == {""}


def test_means_over_letters_are_compared_letter_by_letter(sae, measured):
    """As in the README's figure, from the same committed results."""
    report, found = measured(sae, "decoder"), {}
    for arm in ("baseline", "c2r"):
        file = PROJECT / f"results/default/language_model/{arm}-seed-10-absorption.json"
        found[arm] = json.loads(file.read_text())["values"]["absorption"]
    a, b = (
        replace(report, metrics={"absorption": checked_record("absorption", record)})
        for record in found.values()
    )
    (row,) = [r for r in compare(a, b) if r.field == "mean_absorption_fraction_score"]
    table = pd.DataFrame(
        {"arm": arm, "seed": 10} | letter
        for arm, record in found.items()
        for letter in record["values"]["letters"]
    )
    expected = paired_items(table, "first_letter", "mean_absorption_fraction", arm="c2r")
    assert row.difference.interval == pytest.approx(expected.interval)
    assert f"{row.difference.n} first_letters, 1 seed" == expected.n
    assert str(row.difference).endswith(f"], {row.difference.n} letters")
    assert all(r.difference is None for r in compare(a, report))


def test_a_metric_says_which_report_it_returns():
    def measure(inputs: Inputs) -> float:
        return 0.0

    with pytest.raises(TypeError, match="measure returns .*float.* names the dataclass of its rep"):
        metric("mine", group="own", headline={})(measure)
    assert "mine" not in METRICS


def test_a_full_disk_leaves_the_report_that_was_there(sae, measured, tmp_path, monkeypatch):
    report = measured(sae, "decoder")
    write_report(report, tmp_path / "report.json")
    before = (tmp_path / "report.json").read_bytes()

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError):
        write_report(report, tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == before


# -- bad input: a record, and the other metrics unharmed ----------------------------------------


def linear_sae(d_in=D_IN, d_sae=D_SAE, bias=0.0):
    W_dec = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
    biases = torch.full((d_sae,), bias)
    return InferenceSAE(W_dec.T, W_dec, torch.zeros(d_in), ReLU(biases), centred=True)


def test_a_dead_dictionary(measured, planted):
    report = measured(linear_sae(bias=-1e9), *FIRST)
    no_latent = "24 begin too few of them, 0 are not told by a probe on the model itself, and for 2"
    assert_only(report, {"live_decoder": "0 latents are live", "absorption": no_latent})
    values = report["reconstruction"]
    assert (values.l0, values.frac_alive, values.l2_ratio) == (0, 0, 0)
    assert values.relative_reconstruction_bias is None
    assert values.normalized_freq_over_1_percent == 0
    loss = report["model_preservation"]
    assert loss.ce_loss_score == 0 and loss.kl_div_score == 0


def test_an_empty_dictionary(measured):
    report = measured(linear_sae(d_sae=0), *FIRST)
    assert_only(report, dict.fromkeys((*CORE, "absorption"), "The dictionary is empty"))


def test_a_dictionary_of_nan(measured):
    sae = linear_sae()
    sae.W_dec[3] = float("nan")
    assert_only(measured(sae), dict.fromkeys(CORE, "NaN"))


def test_another_width(measured, planted):
    report = measured(linear_sae(d_in=D_IN + 1), *FIRST)
    reasons = dict.fromkeys([*CORE, "absorption"], "takes activations of width 65")
    del reasons["decoder"]  # needs no activations
    assert_only(report, reasons)


def test_a_corpus_without_words(sae, measured):
    texts = (f"{i} 1234567890 +-*/ " * 200 for i in range(4))
    digits = Corpus("digits", tuple(Document(str(i), text) for i, text in enumerate(texts)))
    report = measured(sae, *FIRST, corpus=digits)
    assert_only(report, {"absorption": "No token of corpus 'digits/held-out'"})


def test_too_few_words(sae, measured):
    report = measured(sae, *FIRST)
    assert_only(report, {"absorption": "None of the 26 letters could be measured on"})
    assert "begin too few of them" in report.not_evaluable["absorption"]


def test_documents_too_short_for_a_context(sae, measured):
    short = Corpus("short", tuple(Document(str(i), f"A short text {i}.") for i in range(4)))
    report = measured(sae, *FIRST, corpus=short)
    reading = [name for name in CORE if METRICS[name].reads_model]
    assert {"reconstruction", "model_preservation", "live_decoder"} <= set(reading)
    reasons = dict.fromkeys(reading, "fills a") | {"absorption": "None of the 26 letters"}
    assert_only(report, reasons)


@pytest.mark.parametrize(
    ("fault", "bad", "evaluable"),
    [
        (
            "dead",
            lambda: linear_sae(bias=-1e9),
            {"reconstruction", "model_preservation", "decoder"},
        ),
        ("empty", lambda: linear_sae(d_sae=0), set()),
        ("NaN", lambda: linear_sae(bias=float("nan")), {"decoder", "meta_sae"}),
        ("another width", lambda: linear_sae(d_in=D_IN + 1), {"decoder", "meta_sae"}),
    ],
)
def test_a_bad_sae_harms_no_report(fault, bad, evaluable, random_model, few_documents, tmp_path):
    report = evaluate(
        bad(), model=random_model, corpus=few_documents, options=Options(profile="smoke")
    )
    assert report.settings.metrics == list(standard_metrics())
    assert evaluable <= set(report.metrics) - set(report.not_evaluable), fault
    must_refuse = {"empty": set(standard_metrics()), "dead": {"live_decoder", "detection"}}
    of_acts = {
        "reconstruction",
        "live_decoder",
        "model_preservation",
        "detection",
        "sparse_probing",
    }
    assert must_refuse.get(fault, of_acts) <= set(report.not_evaluable)
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report


def test_what_needs_more_is_measured_where_it_is_given(sae, measured):
    assert {"agreement", "autointerp"} == set(METRICS) - set(standard_metrics())
    assert set(standard_metrics(["against"])) - set(standard_metrics()) == {"agreement"}
    report = measured(sae, "agreement", "autointerp", "meta_sae")
    reasons = {"agreement": "name its folder with --against", "autointerp": "give --endpoint URL"}
    assert_only(report, reasons)
    unreachable = Endpoint("http://127.0.0.1:9/v1", "m", retries=0)
    report = measured(sae, "agreement", "autointerp", against=sae, endpoint=unreachable)
    assert_only(report, {"autointerp": "cannot be reached"})
    assert report["agreement"].all_latents.pw_mcc == pytest.approx(1)


@dataclass(frozen=True)
class Broken:
    """A report with a number."""

    number: int


def test_only_what_is_refused_on_purpose_becomes_a_record(sae, measured, monkeypatch):
    def measuring(name, result):
        def measure(inputs):
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setitem(METRICS, name, replace(METRICS[name], measure=measure, report=Broken))

    for error in (
        KeyError("x"),
        ValueError("operands could not be broadcast"),
        RuntimeError("CUDA"),
    ):
        measuring("decoder", error)
        with pytest.raises(type(error)) as caught:
            measured(sae, "decoder")
        assert caught.value.__notes__ == ["while measuring 'decoder'"]
    for nonsense in ("many", float("nan")):
        measuring("decoder", Broken(nonsense))
        with pytest.raises(ValueError, match="(?s)'decoder'.*number"):
            measured(sae, "decoder")
    measuring("decoder", NotEvaluable("not this SAE"))
    report = measured(sae, "decoder", "meta_sae")
    assert report.metrics["decoder"] == NotEvaluated("not this SAE")
    assert report.metrics["meta_sae"].status == "evaluated"


def test_an_error_loses_no_finished_metric(sae, measured, monkeypatch, tmp_path):
    whole, counted = measured(sae, "core"), []
    measure = METRICS["reconstruction"].measure

    def counting(inputs):
        counted.append(1)
        return measure(inputs)

    def out_of_memory(inputs):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setitem(
            METRICS, "reconstruction", replace(METRICS["reconstruction"], measure=counting)
        )
        patch.setitem(METRICS, "decoder", replace(METRICS["decoder"], measure=out_of_memory))
        with pytest.raises(RuntimeError, match="out of memory"):
            measured(sae, "core", keep=tmp_path / "kept")
        assert counted == [1]
        patch.setitem(METRICS, "decoder", replace(METRICS["decoder"], measure=whole_measure))
        assert measured(sae, "core", keep=tmp_path / "kept").metrics == whole.metrics
        assert counted == [1], "taken from what was kept"
        with (tmp_path / "kept").open("a") as file:
            file.write('["live_decoder", {"val')  # killed while writing
        assert measured(sae, "core", keep=tmp_path / "kept").metrics == whole.metrics
        another = BatchTopKSAE(D_IN, D_SAE, k=8, seed=2)
        measured(another, "core", keep=tmp_path / "kept")
        assert counted == [1, 1], "of another SAE nothing is taken"


whole_measure = METRICS["decoder"].measure


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"3",
        b'["decoder"]',
        b'[["decoder"], 1]',
        b'["decoder", 3]',
        b'["decoder", {"status": "evaluated", "values": {}}]',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_of_damaged_records_the_metric_is_measured_again(sae, measured, tmp_path, caplog, damage):
    kept = tmp_path / "kept"
    whole = measured(sae, "decoder", "meta_sae", keep=kept)
    identity, decoder, meta_sae, end = kept.read_bytes().split(b"\n")
    kept.write_bytes(b"\n".join([identity, damage, meta_sae, end]))
    assert measured(sae, "decoder", "meta_sae", keep=kept).metrics == whole.metrics
    assert [record.getMessage() for record in caplog.records] == [
        f"{kept}: 1 of 2 records are damaged; what they held is measured again"
    ]
    assert sorted(kept.read_bytes().split(b"\n")) == sorted([identity, decoder, meta_sae, end])


def test_an_evaluation_that_begins_anew_says_so(sae, measured, tmp_path, caplog):
    (tmp_path / "kept").write_bytes(b"\xff\xfe")
    measured(sae, "decoder", keep=tmp_path / "kept")
    assert "kept is of another evaluation, or damaged; it is begun anew" in caplog.text


@pytest.mark.parametrize("to", [None, "elsewhere", "kept", "nothing"])
def test_finished_metrics_are_kept_in_no_folder_and_through_no_link(sae, measured, tmp_path, to):
    elsewhere, kept = tmp_path / "elsewhere", tmp_path / "kept"
    elsewhere.write_text("as it was")
    if to is None:
        kept.mkdir()
    else:
        kept.symlink_to(to)
    with pytest.raises(ValueError, match="kept is no file, but a link or a folder"):
        measured(sae, "decoder", keep=kept)
    assert elsewhere.read_text() == "as it was" and not (tmp_path / "nothing").exists()


def test_a_link_that_is_put_there_meanwhile_is_not_written_through(tmp_path):
    elsewhere, file = tmp_path / "elsewhere", tmp_path / "kept"
    elsewhere.write_text("as it was")
    kept = _Kept(file, "identity")
    file.unlink()
    file.symlink_to(elsewhere)
    kept.add("decoder", NotEvaluated("not this SAE"))
    assert elsewhere.read_text() == "as it was"
    assert _Kept(file, "identity").records == {"decoder": NotEvaluated("not this SAE")}


OWN_METRIC = """
from dataclasses import dataclass

from c2r_core.metrics import metric


@dataclass(frozen=True)
class Own:
    number: float


@metric("to_edit", group="own", headline={"number": "higher"}, reads_model=False)
def measure(inputs) -> Own:
    return Own(%s)
"""


def test_of_a_plugin_that_was_edited_nothing_is_taken(sae, measured, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("sys.dont_write_bytecode", True)

    def found(text):
        """In a process that has not seen the plugin."""
        (tmp_path / "metric_to_edit.py").write_text(text)
        importlib.invalidate_caches()
        try:
            importlib.import_module("metric_to_edit")
            return measured(sae, "to_edit", keep=tmp_path / "kept")["to_edit"].number
        finally:
            METRICS.pop("to_edit", None)
            sys.modules.pop("metric_to_edit", None)
            fingerprints._read.cache_clear()

    assert found(OWN_METRIC % "1.0") == 1.0
    lines = (tmp_path / "kept").read_text().splitlines()
    (tmp_path / "kept").write_text("\n".join([lines[0], lines[1].replace("1.0", "7.0")]) + "\n")
    assert found(OWN_METRIC % "(1.0)") == 7.0, "taken from what was kept"
    assert found(OWN_METRIC % "2.0") == 2.0


def test_of_a_metric_whose_code_is_in_no_file_nothing_is_kept(sae, measured, monkeypatch, tmp_path):
    def typed(inputs):
        counted.append(1)
        return whole_measure(inputs)

    counted, typed.__module__ = [], "__prompt__"
    monkeypatch.setitem(METRICS, "decoder", replace(METRICS["decoder"], measure=typed))
    for n in (1, 2):
        measured(sae, "decoder", keep=tmp_path / "kept")
        assert counted == [1] * n


class Turned:
    """The decoder as other libraries keep it."""

    W_dec = torch.randn(D_IN, D_SAE)

    def encode(self, x):
        return x @ self.W_dec

    def decode(self, feature_acts):
        return feature_acts @ self.W_dec.T


def test_what_is_no_sae_is_refused(measured):
    with pytest.raises(ValueError, match="one by one"):
        measured(BatchTopKSAE(D_IN, D_SAE, k=8, seed=[0, 1]), "decoder")
    with pytest.raises(ValueError, match="Is W_dec transposed"):
        measured(Turned(), "decoder")
    with pytest.raises(ValueError, match="has no encode and no decode and no W_dec"):
        measured(object(), "decoder")


def test_metrics_are_chosen_by_group_or_name(sae, measured):
    assert chosen_metrics("core") == chosen_metrics(["core"]) == list(CORE)
    assert {"reconstruction", "model_preservation", "decoder", "live_decoder"} <= set(CORE)
    assert chosen_metrics("absorption, decoder") == ["decoder", "absorption"]
    for nothing in ([], ""):
        with pytest.raises(ValueError, match="No metric was asked for|unknown metric"):
            chosen_metrics(nothing)
    with pytest.raises(ValueError, match="did you mean 'absorption'"):
        chosen_metrics("absorbtion")


def test_a_hook_that_nothing_reads_is_not_recorded(sae, few_documents):
    report = evaluate(
        sae, hook_name="blocks.99.nowhere", metrics="decoder", options=Options(profile="smoke")
    )
    assert report.model is None and report.text is None


# -- what the SAE was trained on -----------------------------------------------------------------


def test_what_the_sae_was_trained_on_is_compared(sae, measured, few_documents):
    training, held_out = split_documents(few_documents, SMOKE.held_out_share, seed=SPLIT_SEED)

    def after_training_on(fingerprint):
        sae.trained_on = {"text_fingerprint": fingerprint} if fingerprint else {}
        return measured(sae, "live_decoder").text.sae_trained_on

    assert after_training_on(None) == "not known"
    assert after_training_on(training.fingerprint) == "the other documents of this split"
    assert after_training_on("something else") == "another text"
    with pytest.raises(ValueError, match="the very documents that are held out"):
        after_training_on(held_out.fingerprint)
    sae.trained_on = {}


@pytest.mark.parametrize("latent", [-1, D_SAE])
def test_a_latent_that_is_not_there_is_named(sae, latent):
    with pytest.raises(
        ValueError, match=f"latent is {latent}; this SAE has latents 0 to {D_SAE - 1}"
    ):
        strongest_contexts(sae, None, None, latent)
