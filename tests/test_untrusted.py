"""Files and servers that mean harm: nothing of theirs runs, takes much memory, or shows a key."""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile

import httpx
import openai
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from architectures import make
from c2r_core.artefacts.cells import EditedCellError, _digest, look
from c2r_core.artefacts.profiles import load_profile, profile_names
from c2r_core.artefacts.results import read_json
from c2r_core.data.language_models import _random_llama, load_language_model
from c2r_core.data.streaming import open_texts
from c2r_core.data.words import FirstLetterTask
from c2r_core.evaluate import read_report
from c2r_core.formats import open_sae
from c2r_core.metrics.endpoint import KEY_VARIABLE, Endpoint, EndpointError
from c2r_core.saes import load_sae, save_sae
from c2r_core.training.checkpoints import read_checkpoint, write_checkpoint
from conftest import PROJECT
from damage import hostile_archives
from faults import accepted, some_bits
from foreign_saes import write_dictionary_learning, write_sae_lens
from parsers import ANSWER

KEY = "sk-not-to-be-found-anywhere"

# -- the code -------------------------------------------------------------------------------------

UNPICKLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAY_NAME_PICKLE = {"formats/dictionary_learning.py"}
"""It names the errors of a damaged pickle, which it lets torch read without code."""
RUN = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = {
    ("yaml", name)
    for name in ("load", "load_all", "full_load", "unsafe_load", "Loader", "FullLoader")
} | {("yaml", "UnsafeLoader"), ("os", "system"), ("os", "popen"), ("pd", "read_pickle")}


def sources():
    """Every module, and every cell of code in a notebook, by name."""
    for room in ("c2r_core", "exercises", "docs"):
        for path in sorted((PROJECT / room).rglob("*.py")):
            yield path.relative_to(PROJECT / room).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        yield path.name, "\n".join(code)


LOADERS = ("from_pretrained", "boot_transformers")
ONLY_OWN_FILES = {"data/smollm2.py"}
"""It reads what this package has fetched, by its checksum."""


def unsafe(name: str, source: str) -> list[str]:
    """What a source does that could run code of a file that it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            taken = UNPICKLE.intersection(module.partition(".")[0] for module in modules if module)
            if taken and name not in MAY_NAME_PICKLE:
                found.append(f"imports {', '.join(taken)}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in FORBIDDEN:
                found.append(f"{node.value.id}.{node.attr}")
            if node.value.id == "pickle" and node.attr not in ("UnpicklingError",):
                found.append(f"pickle.{node.attr}")
        if isinstance(node, ast.Call):
            given = {one.arg: getattr(one.value, "value", "?") for one in node.keywords}
            called = ast.unparse(node.func)
            if called in RUN:
                found.append(f"calls {called}")
            if called == "torch.load" and given.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
            is_loader = isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS
            if is_loader and given.get("trust_remote_code") is not False:
                if name not in ONLY_OWN_FILES:
                    found.append(f"{called} without trust_remote_code=False")
            for option in ("allow_pickle", "trust_remote_code", "shell"):
                if given.get(option, False) is not False:
                    found.append(f"{option}={given[option]}")
    return found


def test_no_code_reads_a_pickle_or_runs_what_a_file_says():
    assert {name: found for name, source in sources() if (found := unsafe(name, source))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, yaml.SafeLoader)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "AutoModel.from_pretrained(n)",
        "eval(text)",
        "from joblib import load",
    ],
)
def test_the_search_for_such_code_finds(source):
    assert unsafe("x.py", source)


KEYS = re.compile(
    r"\b(sk-(?!not-to-be)[\w-]{16,}|hf_\w{20,}|gh[pousr]_\w{20,}|AKIA[0-9A-Z]{16}|xox[bp]-[\w-]{10,})"
    r"|BEGIN (RSA |EC |OPENSSH )?PRIVATE KEY|Bearer [\w.-]{16,}"
)


def test_no_file_of_the_project_holds_a_key():
    rooms = ("c2r_core", "notebooks", "results", "tests", "docs", "exercises")
    paths = [
        *PROJECT.glob("*.*"),
        *(path for room in rooms for path in (PROJECT / room).rglob("*")),
    ]
    texts = (
        p for p in paths if p.suffix in (".py", ".ipynb", ".json", ".md", ".yml", ".toml", ".lock")
    )
    found = {
        path.name: m[0] for path in texts if (m := KEYS.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}
    assert KEYS.search("key: sk-" + "a" * 20) and KEYS.search("Authorization: Bearer " + "b" * 20)


# -- SAEs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile_archives())
def test_a_hostile_archive_is_refused_before_torch_reads_it(tmp_path, monkeypatch, name):
    write_dictionary_learning(tmp_path)
    content, is_read_by_torch = hostile_archives()[name]
    (tmp_path / "ae.pt").write_bytes(content)
    if not is_read_by_torch:
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch reads it"))
    with pytest.raises(ValueError, match=r"ae\.pt"):
        open_sae(tmp_path)


def test_no_flipped_bit_of_an_archives_numbers_is_read(tmp_path):
    write_dictionary_learning(tmp_path)
    file = tmp_path / "ae.pt"
    with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as archive:
        numbers = [one for one in archive.infolist() if "/data/" in one.filename]
    first = file.read_bytes().index(archive_content(file, numbers[0].filename))
    bits = some_bits(file, 100, first_byte=first, end=first + numbers[0].file_size)
    assert not accepted(file, bits, lambda: open_sae(tmp_path))


def archive_content(file, name):
    with zipfile.ZipFile(file) as archive:
        return archive.read(name)


def test_half_precision_parameters_of_a_dictionary_are_read(tmp_path):
    write_dictionary_learning(tmp_path)
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    halves = {name: torch.nn.Parameter(tensor.half()) for name, tensor in tensors.items()}
    torch.save(halves, tmp_path / "ae.pt")
    assert open_sae(tmp_path).sae.W_dec.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("W_enc", lambda t: t.fill_(torch.nan), "W_enc in .* holds a NaN"),
        ("b_dec", lambda t: t.fill_(torch.inf), "b_dec in .* holds a NaN or an infinity"),
        (
            "W_dec",
            lambda t: t.to(torch.int32),
            "W_dec in .* is torch.int32; expected floating-point",
        ),
        ("W_dec", lambda t: t.to(torch.complex64), "W_dec in .* is torch.complex64"),
        ("b_enc", lambda t: t[0], r"b_enc has shape \(\); expected \(10,\)"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(tmp_path, name, change, message):
    write_sae_lens(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name].clone()).contiguous()}, file)
    with pytest.raises(ValueError, match=message):
        open_sae(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is 'no'; expected true or false"),
        ({"rescale_acts_by_decoder_norm": "false"}, "expected true or false"),
        ({"metadata": ["a"]}, "metadata is .*; expected settings by name"),
        ({"activation_fn_kwargs": "k"}, "activation_fn_kwargs is 'k'"),
        ({"normalize_activations": []}, r"normalize_activations is \[\]"),
    ],
)
def test_a_setting_of_another_type_is_named(tmp_path, settings, message):
    write_sae_lens(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        open_sae(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"d_in": 10**6, "d_sae": 10**7},
            r"does not fit .*\(d_sae, d_in\) are \[10000000, 1000000\]",
        ),
        ({"d_sae": "40"}, "does not fit"),
        ({"seed": [1, 2]}, "one too many: seed"),
        ({"architecture": ["topk"]}, "config.json"),
        ({"k": "3"}, "k is '3'"),
        ({"norm_factor": -1.0}, "norm_factor -1.0; expected a positive number"),
        ({"norm_factor": float("nan")}, "norm_factor nan"),
        ({"norm_factor": "1"}, "norm_factor '1'"),
        ({"trained_on": ["model"]}, "trained_on"),
    ],
)
def test_what_a_config_says_is_checked_before_it_takes_memory(
    tmp_path, monkeypatch, settings, message
):
    folder = save_sae(make("topk"), tmp_path / "sae")
    config = json.loads((folder / "config.json").read_text())
    old = {k: v for k, v in config.items() if not k.endswith("_sha256")} | {"format_version": 1}
    (folder / "config.json").write_text(json.dumps(old))
    assert load_sae(folder).d_sae == 40
    (folder / "config.json").write_text(json.dumps(old | settings))
    with pytest.raises(ValueError, match=message):
        load_sae(folder)


# -- checkpoints, profiles, results ---------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [[1], {"step": "1", "run": {}}, {"step": 1}, {"step": 1, "run": [2]}]
)
def test_a_checkpoint_without_a_step_or_a_training_is_refused(tmp_path, state):
    path = tmp_path / "run.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"state": json.dumps(state)})
    with pytest.raises(ValueError, match="names no step and no training"):
        read_checkpoint(path)
    write_checkpoint(path, {"a": torch.zeros(2)}, {"step": 1, "run": {}})
    assert read_checkpoint(path)[1]["step"] == 1


PROFILES = {
    "a tag of Python's": "default: !!python/object/apply:os.system ['exit']",
    "aliases": "default: {toy: {d_in: &a [1]}, strength: {widths: *a}}",
    "itself": "default: &a {toy: *a}",
    "deep": "default: " + "[" * 1500,
    "a list": "- default",
    "a number": "default: 3",
    "a section that is a text": "default: {toy: many}",
    "no text for a key": "default: {toy: {3: 4}}",
    "a circle": "default: {}\nsmoke: {based_on: full}\nfull: {based_on: smoke}",
    "not a date": "default: {toy: {d_in: 2001-99-99}}",
    "no UTF-8": "default: \ud800",
}


@pytest.mark.parametrize("text", PROFILES.values(), ids=PROFILES)
def test_what_is_no_file_of_profiles_is_refused(tmp_path, text):
    file = tmp_path / "profiles.yml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"profiles\.yml"):
        for name in profile_names(file):
            load_profile(name, file)
            load_profile("smoke", file)


def test_a_setting_that_is_not_finite_is_refused(tmp_path):
    known = yaml.safe_load(
        (PROJECT / "c2r_core/artefacts/profiles.yml").read_text(encoding="utf-8")
    )
    known["default"]["toy"]["magnitude_sd"] = float("inf")
    (tmp_path / "profiles.yml").write_text(yaml.safe_dump({"default": known["default"]}))
    with pytest.raises(ValueError, match=r"toy\.magnitude_sd is inf"):
        load_profile("default", tmp_path / "profiles.yml")


DEEP = "[" * 100_000 + "]" * 100_000


def test_json_that_is_nested_too_deep_is_refused_by_name(tmp_path):
    (tmp_path / "a.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON \(it is nested too deep\)"):
        read_json(tmp_path / "a.json")
    folder = save_sae(make("topk"), tmp_path / "sae")
    (folder / "config.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"config\.json is damaged \(it is nested too deep\)"):
        open_sae(folder)


@pytest.mark.parametrize(
    "content", [{"values": 3}, {"values": 3, "schema": 1, "modules": []}, [], 3]
)
def test_a_result_that_lacks_what_it_rests_on_counts_as_edited(tmp_path, monkeypatch, content):
    from parsers import CELL

    monkeypatch.setenv("C2R_RESULTS", str(tmp_path))
    monkeypatch.setenv("C2R_RUNS", str(tmp_path / "runs"))
    if isinstance(content, dict):
        content["digest"] = _digest(content)
    file = CELL.file(tmp_path / "default")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    with pytest.raises(EditedCellError, match="toy/one.json is not what was computed"):
        look(CELL)


def test_what_a_file_says_in_another_shape_is_named(tmp_path):
    file = tmp_path / "profiles.yml"
    for text, message in (
        ("smoke: {based_on: full}\nfull: {based_on: smoke}", "'smoke' is based on itself"),
        ("smoke: {based_on: {a: 3}}", "profile 'smoke': based_on is no name of a profile"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_profile("smoke", file)

    folder, deep = save_sae(make("topk"), tmp_path / "sae"), []
    config = json.loads((folder / "config.json").read_text())
    for _ in range(200):
        deep = [deep]
    (folder / "config.json").write_text(json.dumps(config | {"k": deep}))
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        load_sae(folder)

    old = {k: v for k, v in config.items() if not k.endswith("_sha256")} | {"format_version": 1}
    (folder / "config.json").write_text(json.dumps(old))
    weights = load_file(folder / "sae.safetensors")
    save_file({"W_dec": weights["W_dec"]}, folder / "sae.safetensors")
    with pytest.raises(ValueError, match=r"sae\.safetensors does not fit config\.json: "):
        load_sae(folder)

    dictionary = tmp_path / "dictionary"
    dictionary.mkdir()
    write_dictionary_learning(dictionary, "AutoEncoderTopK", k=3)
    tensors = torch.load(dictionary / "ae.pt", weights_only=True)
    for name, tensor, message in (
        ("k", torch.tensor(1.5), r"k in ae\.pt is torch\.float32 .*; expected an integer"),
        ("encoder.weight", torch.zeros(3), r"has shape \(3,\); expected a matrix"),
    ):
        torch.save(tensors | {name: tensor}, dictionary / "ae.pt")
        with pytest.raises(ValueError, match=message):
            open_sae(dictionary)

    (tmp_path / "report.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="no report of version .*: its schema_version is 99"):
        read_report(tmp_path / "report.json")

    (tmp_path / "task.json").write_text('{"format_version": 1}')
    save_file({}, tmp_path / "task.safetensors")
    with pytest.raises(ValueError, match="does not hold a whole FirstLetterTask"):
        FirstLetterTask.load(tmp_path)


# -- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["null", f'{{"text": "b", "more": {DEEP}}}'], ids=["null", "deep"])
def test_a_row_that_is_no_text_is_refused(tmp_path, row):
    file = tmp_path / "texts.jsonl"
    file.write_text(f'{row}\n{{"text": "a"}}\n')
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 1, is no JSON"):
        list(open_texts(file))


# -- language models ------------------------------------------------------------------------------


def test_the_code_and_the_pickle_of_a_model_folder_do_not_run(tmp_path, random_model):
    folder, sign = tmp_path / "model", tmp_path / "ran"
    _random_llama().save_pretrained(folder)
    random_model.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "own.py").write_text(f"open({str(sign)!r}, 'w').close()\nclass Own: pass\n")
    remote = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config | remote))
    with pytest.raises(ValueError):
        load_language_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()

    class Runs:
        def __reduce__(self):
            return (open, (str(sign), "w"))

    torch.save({"lm_head.weight": Runs()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_language_model(folder)
    assert not sign.exists()


# -- endpoints ------------------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Asks a server that answers as told, with the key that is given."""

    def asked(reply, key=KEY):
        monkeypatch.setenv(KEY_VARIABLE, key)
        endpoint = Endpoint("http://localhost/v1", "m", 1e9, retries=0, folder=tmp_path / "answers")
        endpoint._shared.client = openai.OpenAI(
            base_url=endpoint.url,
            api_key=key.strip(),
            max_retries=0,
            http_client=httpx.Client(transport=httpx.MockTransport(reply), trust_env=False),
        )
        return endpoint.ask("Judge.", "Which?")

    return asked


def says(content):
    answer = json.loads(json.dumps(ANSWER))
    answer["choices"][0]["message"]["content"] = content
    return lambda request: httpx.Response(200, json=answer)


def kept(folder):
    return [file.read_bytes().decode() for file in folder.glob("answers/*/*.json")]


def test_a_key_that_a_server_repeats_is_neither_kept_nor_given(ask, tmp_path):
    assert ask(says(f"You are {KEY}.")) == "You are ***."
    assert len(kept(tmp_path)) == 1 and KEY not in kept(tmp_path)[0]


def test_a_key_of_no_secret_is_left_in_an_answer(ask):
    assert ask(says("none"), key="none") == "none"


def test_the_end_of_the_line_behind_a_key_is_not_sent(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}\n")
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", retries=0, timeout=1)
    with pytest.raises(EndpointError, match="cannot be reached") as caught:
        endpoint.ask("Judge.", "Which?")
    assert KEY not in str(caught.value)
    assert endpoint._shared.client.api_key == KEY


def test_an_address_with_a_password_is_refused_without_showing_it():
    with pytest.raises(ValueError, match=f"set {KEY_VARIABLE} instead") as caught:
        Endpoint(f"https://me:{KEY}@localhost/v1", "m")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("content", [3, ["1"], {"a": 1}])
def test_an_answer_that_is_no_text_is_an_error_of_the_endpoint(ask, content):
    with pytest.raises(EndpointError, match="not text"):
        ask(says(content))


def test_an_answer_that_no_file_can_hold_is_mended(ask):
    body = json.dumps(ANSWER).replace('"1, 2"', '"1 \\ud800"').encode()
    assert ask(lambda request: httpx.Response(200, content=body)) == "1 ?"


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"answer": 3}', b"\xff", DEEP.encode()])
def test_a_damaged_answer_is_asked_again(ask, tmp_path, damage):
    assert ask(says("one")) == "one"
    (file,) = tmp_path.glob("answers/*/*.json")
    file.write_bytes(damage)
    assert ask(says("other")) == "other" == ask(says("a third"))
