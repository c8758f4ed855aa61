"""Model cards, `c2r push` and `c2r pull`: the hub's own client against a hub in this process."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from c2r_core import C2R, BatchTopKSAE, TrainConfig, load_sae, save_sae, train
from c2r_core.__main__ import main as c2r
from c2r_core.evaluate import Options, evaluate, write_report
from c2r_core.formats import open_sae
from c2r_core.hub import model_card, pull, push
from fake_hub import fake_hub
from foreign_saes import write_dictionary_learning, write_sae_lens

REPO, TOKEN = "me/my-sae", "hf_" + "thisIsASecretOfTheTests"


@pytest.fixture
def hub(monkeypatch):
    with fake_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(hub.endpoint, token=TOKEN)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small trained SAE that says what it was trained on, and a report beside it."""
    sae = BatchTopKSAE(8, 24, k=2, seed=0)
    x = torch.nn.functional.normalize(torch.randn(64, 8), dim=-1)
    train(sae, lambda step: x, TrainConfig(steps=3), [C2R(weight=0.25)], progress=False)
    about = {"model": "smollm2-135m", "hook_name": "blocks.4.hook_resid_post", "text": "a | b"}
    folder = save_sae(sae, tmp_path_factory.mktemp("sae") / "my_sae", trained_on=about)
    write_report(
        evaluate(folder, metrics="decoder", options=Options("smoke")), folder / "report.json"
    )
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy to change."""
    copy = tmp_path / "my_sae"
    copy.mkdir()
    for file in trained.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def another_sae(folder):
    return save_sae(BatchTopKSAE(8, 24, k=2, seed=1), folder, overwrite=True)


# -- the card -------------------------------------------------------------------------------------


def test_the_card_says_what_is_recorded(trained):
    report = json.loads((trained / "report.json").read_text())
    card = ModelCard(
        model_card(trained, REPO, report=trained / "report.json", license="mit"),
    )
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.license == "mit" and card.data.library_name == "c2r-core"
    assert {"sparse-autoencoder", "batch_topk"} <= set(card.data.tags)
    assert "| k | 2 |" in card.text and "C2R(weight=0.25" in card.text
    assert "| text | a \\| b |" in card.text
    value = report["metrics"]["decoder"]["values"]["average_max_decoder_cosine_sim"]
    assert f"| decoder.average_max_decoder_cosine_sim | {value:.4g} | none | – |" in card.text
    assert f"c2r pull {REPO} my-sae" in card.text


def test_a_card_states_no_more_than_is_known(tmp_path):
    card = ModelCard(model_card(another_sae(tmp_path / "sae"), REPO))
    assert card.data.license is None and card.data.base_model is None
    assert card.data.eval_results is None
    assert "of which model is not recorded" in card.text
    assert "Nothing is recorded of it." in card.text and "There is no report." in card.text


def test_numbers_measured_on_text_are_in_the_metadata(tmp_path, few_documents, random_model):
    folder = save_sae(BatchTopKSAE(64, 96, k=8, seed=1), tmp_path / "sae")
    report = evaluate(
        folder,
        model=random_model,
        corpus=few_documents,
        metrics="reconstruction",
        options=Options("smoke"),
    )
    write_report(report, folder / "report.json")
    card = ModelCard(model_card(folder, REPO, report=folder / "report.json"))
    found = {result.metric_name: result for result in card.data.eval_results}
    fvu = found["reconstruction.fvu"]
    assert fvu.metric_value == pytest.approx(report["reconstruction"].fvu)
    assert (fvu.dataset_name, fvu.dataset_split) == ("few", "held-out")
    assert f"{report.text.n_documents} held-out documents of `few`" in card.text


def test_a_report_on_another_sae_is_refused(folder, tmp_path):
    other = another_sae(tmp_path / "other")
    with pytest.raises(ValueError, match="report.json is a report on another SAE"):
        model_card(other, REPO, report=folder / "report.json")


# -- push -----------------------------------------------------------------------------------------


def test_what_is_pushed_comes_back_the_same_and_needs_no_login_in_any_file(
    folder, tmp_path, hub, api
):
    done = push(folder, REPO, api=api)
    assert done.private and hub.private[REPO]
    assert set(done.files) == {"config.json", "sae.safetensors", "README.md", "report.json"}
    assert pull(REPO, tmp_path / "back", api=api) == done.commit
    names = {"config.json", "sae.safetensors", "report.json"}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert load_sae(tmp_path / "back").trained_on == load_sae(folder).trained_on
    assert hub.logins - {None} == {f"Bearer {TOKEN}"}
    written = [*hub.files(REPO).values(), *(p.read_bytes() for p in tmp_path.rglob("*.*"))]
    assert not any(TOKEN.encode() in content for content in written)


def test_pushing_the_same_again_makes_no_commit(folder, hub, api):
    first = push(folder, REPO, api=api)
    n_commits = len(hub.repos[REPO])
    again = push(folder, REPO, api=api)
    assert again.files == () and again.commit == first.commit
    assert len(hub.repos[REPO]) == n_commits


def test_nothing_is_replaced_unasked(folder, hub, api, tmp_path):
    push(folder, REPO, api=api)
    before = hub.files(REPO)
    other = another_sae(tmp_path / "other")
    with pytest.raises(FileExistsError) as error:
        push(other, REPO, api=api)
    for name in ("config.json", "sae.safetensors", "README.md", "report.json"):
        assert name in str(error.value)
    assert hub.files(REPO) == before
    push(other, REPO, api=api, overwrite=True)
    there = hub.files(REPO)
    assert there["sae.safetensors"] == (other / "sae.safetensors").read_bytes()
    assert "report.json" not in there, "it is a report on the SAE before"


def test_a_card_written_by_hand_is_not_replaced_unasked(folder, hub, api):
    hub.add(REPO, {"README.md": b"# By hand\n"})
    with pytest.raises(FileExistsError, match="holds README.md with other contents"):
        push(folder, REPO, api=api)
    assert "config.json" not in hub.files(REPO)


def test_a_commit_that_came_between_is_not_lost(folder, hub, api):
    hub.add(REPO, {".gitattributes": b""})
    hub.before_commit = lambda: hub.add(REPO, {"README.md": b"# By hand\n"})
    with pytest.raises(OSError, match="changed meanwhile"):
        push(folder, REPO, api=api)
    assert hub.files(REPO)["README.md"] == b"# By hand\n"


def test_a_repository_that_is_there_keeps_its_visibility(folder, hub, api):
    hub.add(REPO, {".gitattributes": b""}, private=False)
    assert not push(folder, REPO, api=api).private
    assert not push(folder, "me/shown", public=True, api=api).private


def test_a_damaged_sae_is_not_pushed(folder, hub, api):
    content = bytearray((folder / "sae.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "sae.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not what was saved"):
        push(folder, REPO, api=api)
    assert hub.repos == {}


@pytest.mark.parametrize(("status", "message"), [(401, "hf auth login"), (403, "hf auth login")])
def test_a_refusal_says_what_to_do_and_no_token(folder, hub, api, status, message):
    hub.refuses = status
    with pytest.raises(OSError, match=message) as error:
        push(folder, REPO, api=api)
    assert TOKEN not in str(error.value)


def test_a_hub_that_is_not_there_is_an_error_of_one_line(folder, hub):
    hub.close()
    with pytest.raises(OSError, match="cannot be reached"):
        push(folder, REPO, api=HfApi(hub.endpoint))


def test_a_name_that_is_none_is_refused(folder, api):
    with pytest.raises(ValueError, match="Repo id must"):
        push(folder, "me/my/sae", api=api)


# -- pull -----------------------------------------------------------------------------------------


def test_a_revision_is_a_commit(folder, tmp_path, hub, api):
    first = push(folder, REPO, api=api).commit
    push(another_sae(tmp_path / "other"), REPO, overwrite=True, api=api)
    assert pull(f"{REPO}@{first}", tmp_path / "first", api=api) == first
    assert open_sae(tmp_path / "first").weights_sha256 == open_sae(folder).weights_sha256
    with pytest.raises(FileNotFoundError, match="no such revision"):
        pull(f"{REPO}@v9", tmp_path / "none", api=api)
    assert not (tmp_path / "none").exists()


def test_one_sae_of_a_saelens_repository(tmp_path, hub, api):
    write_sae_lens(tmp_path / "lens")
    files = {f"blocks.4/{p.name}": p.read_bytes() for p in (tmp_path / "lens").iterdir()}
    hub.add(REPO, {"README.md": b"", **files})
    pull(f"{REPO}/blocks.4", tmp_path / "back", api=api)
    assert open_sae(tmp_path / "back").format == "sae_lens"
    with pytest.raises(FileNotFoundError, match="owner/name/folder"):
        pull(REPO, tmp_path / "none", api=api)


def test_no_pickle_and_nothing_unknown_is_fetched(folder, tmp_path, hub, api):
    push(folder, REPO, api=api)
    hub.add(REPO, {"training.pt": pickle.dumps(1), "setup.py": b"raise SystemExit"})
    pull(REPO, tmp_path / "back", api=api)
    assert set(hub.fetched) == {"config.json", "sae.safetensors", "report.json"}
    write_dictionary_learning(tmp_path / "pickled")
    hub.add("me/pickled", {p.name: p.read_bytes() for p in (tmp_path / "pickled").iterdir()})
    with pytest.raises(FileNotFoundError, match=r"holds ae.pt, config.json; .* Pickles .* are not"):
        pull("me/pickled", tmp_path / "none", api=api)


def test_an_sae_changed_on_the_hub_is_refused_and_leaves_no_folder(folder, tmp_path, hub, api):
    push(folder, REPO, api=api)
    content = bytearray(hub.files(REPO)["sae.safetensors"])
    content[-1] ^= 1
    hub.add(REPO, {"sae.safetensors": bytes(content)})
    with pytest.raises(ValueError, match="of me/my-sae cannot be opened: .*not what was saved"):
        pull(REPO, tmp_path / "back", api=api)
    assert not (tmp_path / "back").exists()


def test_a_folder_is_not_replaced_unasked(folder, tmp_path, hub, api):
    push(folder, REPO, api=api)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        pull(REPO, tmp_path / "mine", api=api)
    assert hub.fetched == [] and (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    pull(REPO, tmp_path / "mine", overwrite=True, api=api)
    assert not (tmp_path / "mine" / "notes.txt").exists()


def test_a_repository_that_is_not_there(tmp_path, hub, api):
    with pytest.raises(FileNotFoundError, match="There is no me/my-sae, or you may not see it"):
        pull(REPO, tmp_path / "back", api=api)


def test_a_folder_that_the_repository_lacks_is_named(tmp_path, hub, api, monkeypatch):
    hub.add(REPO, {"README.md": b""})
    answers = hub.server.RequestHandlerClass
    get = answers.do_GET

    def without_folders(self):
        if "/tree/" not in self.path:
            return get(self)
        return self._json({"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})

    monkeypatch.setattr(answers, "do_GET", without_folders)
    with pytest.raises(FileNotFoundError, match="no such folder in the repository: me/my-sae/l4"):
        pull(f"{REPO}/l4", tmp_path / "back", api=api)
    assert not (tmp_path / "back").exists()


# -- the commands ---------------------------------------------------------------------------------


def test_the_commands(folder, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert c2r(["push", str(folder), REPO, "--card"]) == 0
    assert capsys.readouterr().out == model_card(folder, REPO)
    assert hub.repos == {}
    assert c2r(["push", str(folder), REPO]) == 0
    said = capsys.readouterr().out
    assert f"{hub.endpoint}/{REPO} (private), commit {hub.sha(REPO)}: new or changed" in said
    assert c2r(["push", str(folder), REPO]) == 0
    assert "all was there already" in capsys.readouterr().out
    assert c2r(["pull", REPO, str(tmp_path / "back")]) == 0
    assert c2r(["pull", REPO, str(tmp_path / "back")]) == 2
    said = capsys.readouterr()
    assert "c2r pull: " in said.err and "not empty" in said.err
    assert TOKEN not in said.out + said.err and hub.logins - {None} == {f"Bearer {TOKEN}"}
