"""Every parser of the project, with what it may be given and the errors that it names: for `make fuzz`."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import itertools
import json
import lzma
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import nbformat
import openai
import torch
import yaml

import damage
from architectures import make
from c2r_core.artefacts import cells, checksums, same_code
from c2r_core.artefacts.profiles import PROFILES_FILE, load_profile, profile_names
from c2r_core.artefacts.results import digest_of, write_json
from c2r_core.data import store as stores_of
from c2r_core.data.entities import load_ravel
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import RANDOM, load_language_model, model_fingerprint
from c2r_core.data.precision import faster_on_processor
from c2r_core.data.remote import open_remote
from c2r_core.data.store import MANIFEST, ActivationStore, Manifest
from c2r_core.data.streaming import open_texts
from c2r_core.data.text import held_out_documents, load_corpus
from c2r_core.data.words import FirstLetterTask
from c2r_core.errors import NotEvaluable
from c2r_core.evaluate import evaluate, read_report, write_report
from c2r_core.evaluate.compare import compare
from c2r_core.evaluate.evaluation import _Kept
from c2r_core.formats import open_sae
from c2r_core.metrics.endpoint import Endpoint, EndpointError
from c2r_core.notebook import files as notebook_files
from c2r_core.saes import create_sae, load_sae, save_sae
from c2r_core.training import checkpoints
from foreign_saes import DICTIONARY_LEARNING, SAE_LENS, write_dictionary_learning, write_sae_lens
from stores import small_config, small_corpus


class Wrong(AssertionError):
    """A file was accepted that cannot be used, or is not what was written."""


@dataclass(frozen=True)
class Parser:
    """One parser.

    Attributes
    ----------
    folders : callable
        Writes whole files below a folder, and gives them.
    read : callable
        Reads what stands in a folder and uses it; the result tells two contents apart.
    documented : tuple of exception types
        What the docstring names.
    seal : callable, optional
        Makes the checksums in a folder right again. With one, what is not sealed must be read as it was
        written, or refused.
    """

    name: str
    folders: Callable[[Path], Iterator[damage.Files]]
    read: Callable[[Path], object]
    documented: tuple[type[Exception], ...]
    seal: Callable[[Path], None] | None = None


PARSERS: dict[str, Parser] = {}


def parser(name: str, folders: Callable, *documented: type[Exception], **more: Any) -> Callable:
    """Decorator: the function reads for the parser of that name."""

    def add(read: Callable[[Path], object]) -> Callable:
        PARSERS[name] = Parser(name, folders, read, documented, **more)
        return read

    return add


def expect(condition: object, what: str) -> None:
    """Raise Wrong unless it holds."""
    if not condition:
        raise Wrong(what)


def digest(*tensors: torch.Tensor) -> str:
    """Of types, shapes and every bit."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# -- SAEs -----------------------------------------------------------------------------------------


def use_sae(sae: Any) -> str:
    """Encode and decode with it."""
    d_sae, d_in = sae.W_dec.shape
    x = torch.linspace(-1, 1, 3 * d_in).reshape(3, d_in)
    acts = sae.encode(x)
    expect(
        acts.shape == (3, d_sae) and acts.dtype == torch.float32,
        "encode gives another shape or type",
    )
    expect(sae.decode(acts).shape == x.shape, "decode gives another shape")
    return digest(*(tensor for _, tensor in sorted(sae.state_dict().items())))


def own_saes(folder: Path) -> Iterator[damage.Files]:
    for architecture in ("batch_topk", "jump_relu", "matryoshka_batch_topk", "gated"):
        sae = make(architecture)
        sae.norm_factor = 0.25
        about = {"model": "a-model", "lr": 0.004}
        yield damage.read(save_sae(sae, folder / architecture, trained_on=about))


def old_saes(folder: Path) -> Iterator[damage.Files]:
    for files in own_saes(folder):
        config = json.loads(files["config.json"])
        old = {k: v for k, v in config.items() if not k.endswith("_sha256")} | {"format_version": 1}
        yield files | {"config.json": json.dumps(old, indent=2).encode()}


def seal_sae(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_bytes())
    if config.get("format_version") == 2:
        config["weights_sha256"] = checksums.of_file(folder / "sae.safetensors")
        config.pop("config_sha256", None)
        config["config_sha256"] = checksums.of_values(config)
        file.write_text(json.dumps(config))


@parser("own SAE", own_saes, FileNotFoundError, ValueError, seal=seal_sae)
def read_own(folder: Path) -> object:
    sae = load_sae(folder)
    expect(
        sae.norm_factor > 0 and isinstance(sae.trained_on, dict), "what it was trained on is none"
    )
    return type(sae).__name__, sae.norm_factor, str(sae.config), use_sae(sae)


def opened(folder: Path) -> object:
    found = open_sae(folder)
    expect(
        all(isinstance(said, str) for said in found.stated.values()), "what is stated is no text"
    )
    if found.format != "c2r":  # what was saved here is what was trained
        weights = found.sae.state_dict()
        expect(not any(tensor.isnan().any() for tensor in weights.values()), "weights are NaN")
        expect(weights["W_dec"].isfinite().all(), "weights are infinite")
    return found.format, found.architecture, use_sae(found.sae)


def sae_lens(folder: Path) -> Iterator[damage.Files]:
    for architecture in SAE_LENS:
        write_sae_lens(folder / architecture, architecture, metadata={"model_name": "a"})
        yield damage.read(folder / architecture)


def dictionaries(folder: Path) -> Iterator[damage.Files]:
    for dict_class in DICTIONARY_LEARNING:
        write_dictionary_learning(folder / dict_class, dict_class)
        yield damage.read(folder / dict_class)


parser("own SAE, version 1", old_saes, FileNotFoundError, ValueError)(read_own)
parser("own SAE, opened", own_saes, FileNotFoundError, ValueError, seal=seal_sae)(opened)
parser("SAELens", sae_lens, FileNotFoundError, ValueError)(opened)
parser("dictionary_learning", dictionaries, FileNotFoundError, ValueError)(opened)


# -- checkpoints ----------------------------------------------------------------------------------

RUN = "run.safetensors"


def checkpoint(folder: Path) -> Iterator[damage.Files]:
    run = {"sae": {"d_in": 4}, "config": {"steps": 30}, "regularisers": []}
    folder.mkdir()
    for step in (10, 20):
        tensors = {
            "sae.W_dec": torch.full((4, 3), step / 7),
            "silent_samples": torch.tensor([step]),
        }
        state = {"step": step, "history": [{"step": 1, "fvu": 0.5}], "run": run}
        checkpoints.write_checkpoint(folder / RUN, tensors, state)
    both = damage.read(folder)
    yield both
    for content in both.values():
        yield {RUN: content}


def seal_checkpoint(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        with checkpoints.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        about = header["__metadata__"]
        about["sha256"] = checkpoints._checksum(tensors, about["state"])
        sealed = json.dumps(header).encode()
        file.write_bytes(len(sealed).to_bytes(8, "little") + sealed + content[end:])


@parser("checkpoint", checkpoint, ValueError, OSError, seal=seal_checkpoint)
def read_checkpoint(folder: Path) -> object:
    path = folder / RUN
    if not path.exists():
        raise FileNotFoundError("a training starts anew")
    tensors, state = checkpoints.read_checkpoint(path)
    with contextlib.suppress(ValueError):
        checkpoints.check_same_run(path, state["run"], {"sae": {"d_in": 4}})
    expect(isinstance(state["step"], int), "the step is no number")
    return state, digest(*(tensor for _, tensor in sorted(tensors.items())))


# -- stores ---------------------------------------------------------------------------------------


def small_stores(folder: Path) -> Iterator[damage.Files]:
    model = load_language_model(RANDOM)
    made = harvest(model, small_corpus(), small_config(), folder / "store", shard_tokens=32)
    yield damage.read(made.folder)


def seal_store(folder: Path) -> None:
    file = folder / MANIFEST
    values = json.loads(file.read_bytes())
    values.pop(stores_of.OF_MANIFEST, None)
    for name in ("tokens", "kept"):
        values[f"{name}_sha256"] = checksums.of_file(folder / f"{name}.npy")
    for shard in values["shards"]:
        of_shard = folder / shard["name"]
        if of_shard.parent == folder and of_shard.is_file():
            shard["sha256"], shard["n_bytes"] = checksums.of_file(of_shard), of_shard.stat().st_size
    file.write_bytes(stores_of._as_bytes(values))


def all_of(store: ActivationStore) -> object:
    store.check()
    rows = torch.cat(list(store.chunks(7, dropped=True)))
    expect(rows.shape == (store.manifest.n_tokens, store.d_in), "the rows are others than stated")
    batch = store.batch(range(min(5, len(store))))
    return digest(rows, batch, torch.from_numpy(store.contexts)), store.norm_factor


@parser(
    "store",
    small_stores,
    FileNotFoundError,
    ValueError,
    seal=seal_store,
)
def read_store(folder: Path) -> object:
    return all_of(ActivationStore.open(folder))


def remote_stores(folder: Path) -> Iterator[damage.Files]:
    for files in small_stores(folder):
        yield {f"there/{name}": content for name, content in files.items()}


@parser(
    "remote store",
    remote_stores,
    OSError,
    ValueError,
    seal=lambda folder: seal_store(folder / "there"),
)
def read_remote(folder: Path) -> object:
    here = folder / "here"
    try:
        store = open_remote(f"file://{folder / 'there'}", here)
    except Exception:
        expect(not here.exists(), "a part of a store is left")
        raise
    return all_of(store)


def manifests(folder: Path) -> Iterator[damage.Files]:
    for files in small_stores(folder):
        yield {MANIFEST: files[MANIFEST]}


def seal_manifest(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_bytes())
    values.pop(stores_of.OF_MANIFEST, None)
    (folder / MANIFEST).write_bytes(stores_of._as_bytes(values))


@parser(
    "manifest",
    manifests,
    FileNotFoundError,
    ValueError,
    seal=seal_manifest,
)
def read_manifest(folder: Path) -> object:
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError("ActivationStore.open says so")
    manifest = Manifest.read((folder / MANIFEST).read_bytes(), folder / MANIFEST, "Make it anew.")
    names = list(manifest.checksums())
    expect(
        all(Path(name).name == name and name != ".." for name in names), "a name leaves the folder"
    )
    return manifest


# -- settings, results, reports -------------------------------------------------------------------


def profiles(folder: Path) -> Iterator[damage.Files]:
    known = yaml.safe_load(PROFILES_FILE.read_text(encoding="utf-8"))
    some = {name: known[name] for name in ("default", "smoke")}
    yield {"profiles.yml": yaml.safe_dump(some, sort_keys=False).encode()}


@parser("profiles", profiles, ValueError, OSError)
def read_profiles(folder: Path) -> object:
    file = folder / "profiles.yml"
    names = profile_names(file)
    expect(all(isinstance(name, str) for name in names), "a name is no text")
    return [repr(load_profile(name, file)) for name in names]


CELL = cells.Cell(
    "toy",
    "one",
    "default",
    {"seeds": [1, 2]},
    lambda: {"fvu": 0.5, "rows": [1]},
    ("c2r_core.seeds",),
)


def committed_cells(folder: Path) -> Iterator[damage.Files]:
    write_json(CELL.file(folder / "default"), cells.content_of(CELL))
    yield damage.read(folder)
    yield {"default/another.json": b"{}"}


def seal_cell(folder: Path) -> None:
    file = CELL.file(folder / "default")
    content = json.loads(file.read_bytes())
    file.write_text(json.dumps(content | {"digest": cells._digest(content)}))


@parser("result", committed_cells, cells.EditedCellError, seal=seal_cell)
def read_cell(folder: Path) -> object:
    os.environ["C2R_RESULTS"], os.environ["C2R_RUNS"] = str(folder), str(folder / "runs")
    state, values = cells.look(CELL)
    expect(state.kind in ("current", "stale", "missing"), "the state is unknown")
    return "missing or stale" if state.kind != "current" else json.dumps(values)


def records(folder: Path) -> Iterator[damage.Files]:
    os.environ["C2R_RESULTS"] = str(folder)
    hashes = (None, "0" * 12, "1" * 12)
    same_code.add_same_code(
        same_code.SameCode(
            module="c2r_core.seeds",
            was=was,
            now=now,
            why="one more check",
            shown_by=["toy/one"],
            commits=same_code.Commits(was="a" * 40, now="b" * 40),
            provenance={"threads": 1},
        )
        for was, now in itertools.pairwise(hashes)
    )
    for n in range(len(hashes)):
        for kept in itertools.combinations(same_code.same_code(), n):  # a lost record is no harm
            yield damage.read(folder) | {
                "same_code.json": json.dumps([record.model_dump() for record in kept]).encode()
            }
    yield {"another.json": b"{}"}


def seal_records(folder: Path) -> None:
    file = folder / "same_code.json"
    for record in (content := json.loads(file.read_bytes())):
        rest = {name: value for name, value in record.items() if name != "digest"}
        record["digest"] = digest_of(rest)
    file.write_text(json.dumps(content))


@parser("same code", records, same_code.SameCodeError, seal=seal_records)
def read_records(folder: Path) -> object:
    os.environ["C2R_RESULTS"] = str(folder)
    same_code._read.cache_clear()  # damage may come faster than a file's time changes
    expect(not same_code.is_same_code("c2r_core.seeds", "1" * 12, "0" * 12), "the wrong way round")
    return sorted({repr(record) for record in same_code.same_code()})


def reports(folder: Path) -> Iterator[damage.Files]:
    folder.mkdir()
    sae = create_sae("topk", d_in=6, d_sae=24, k=2)
    write_report(evaluate(sae, metrics=["decoder"]), folder / "report.json")
    yield damage.read(folder)


@parser("report", reports, ValueError, OSError)
def parse_report(folder: Path) -> object:
    report = read_report(folder / "report.json")
    compare(report, report)
    return report.headline(), report.warnings, report.not_evaluable


UNFINISHED = "report.json.unfinished"


def unfinished(folder: Path) -> Iterator[damage.Files]:
    for files in reports(folder):
        records = json.loads(files["report.json"])["metrics"]
        lines = ["identity", *(json.dumps(one) for one in records.items())]
        yield {UNFINISHED: "\n".join(lines).encode()}


@parser("unfinished report", unfinished, ValueError)
def read_unfinished(folder: Path) -> object:
    file = folder / UNFINISHED
    if file.is_file() and not file.is_symlink():  # then no damage stops the next evaluation
        try:
            kept = _Kept(file, "identity").records
        except ValueError as error:
            raise Wrong("a damaged record stops the next evaluation") from error
        expect(_Kept(file, "identity").records == kept, "what is kept is not what was read")
        return kept
    return _Kept(file, "identity").records


def notebooks(folder: Path) -> Iterator[damage.Files]:
    new = nbformat.v4
    printed = new.new_output(
        "stream", text="[claim holds] one: measured 0.25 [0.12, 0.38], n = 5\n"
    )
    code = new.new_code_cell("print(1)", outputs=[printed], execution_count=1)
    notebook = new.new_notebook(cells=[new.new_markdown_cell("# Title"), code])
    yield {"00_a.ipynb": notebook_files.canonical(notebook).encode()}


@parser("notebook", notebooks, ValueError, OSError)
def read_notebook(folder: Path) -> object:
    return len(notebook_files.read(folder / "00_a.ipynb").cells)


# -- what is cached -------------------------------------------------------------------------------


def records(folder: Path) -> Iterator[damage.Files]:
    task = FirstLetterTask(
        words=(" apple", " bee"),
        activations=torch.ones(2, 3),
        letters=torch.tensor([0, 1]),
        is_test=torch.tensor([True, False]),
        hook_name="blocks.0.hook_resid_post",
        prefix="",
        n_dropped=0,
    )
    task.save(folder)
    yield damage.read(folder)


@parser("record", records, FileNotFoundError, ValueError)
def read_record(folder: Path) -> object:
    task = FirstLetterTask.load(folder)
    tensors = (task.activations, task.letters, task.is_test)
    expect(all(isinstance(tensor, torch.Tensor) for tensor in tensors), "a tensor is none")
    expect(all(isinstance(word, str) for word in task.words), "a word is no text")
    expect(
        isinstance(task.n_dropped, int) and isinstance(task.prefix, str),
        "a field is of another type",
    )
    return task.words


def precisions(folder: Path) -> Iterator[damage.Files]:
    folder.mkdir()
    faster_on_processor(folder / "precision.json", lambda: 2.0)
    yield {"precision.json": (folder / "precision.json").read_bytes()}


@parser("precision", precisions, OSError)
def read_precision(folder: Path) -> object:
    found = faster_on_processor(folder / "precision.json", lambda: 2.0)
    expect(found in ("float32", "bfloat16"), "the precision is none")
    return found


# -- text and models ------------------------------------------------------------------------------


def texts(folder: Path) -> Iterator[damage.Files]:
    yield {f"{name}.txt": f"The text of {name}: größer ∞.\n".encode() * 3 for name in "abcd"}


@parser("corpus", texts, FileNotFoundError, ValueError)
def read_corpus(folder: Path) -> object:
    corpus = load_corpus(folder)
    held_out = held_out_documents(corpus, 0.3).corpus
    return corpus.fingerprint, [document.text for document in held_out.documents]


def rows(folder: Path) -> Iterator[damage.Files]:
    lines = [{"text": "größer ∞", "n": 1}, {"n": None, "text": "two\n", "more": [{"a": 0.5}]}]
    text = "\n".join(map(json.dumps, lines)).encode()
    yield {"rows.jsonl": text}
    for ending, pack in {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.items():
        yield {f"rows.jsonl.{ending}": pack(text)}


@parser("lines of text", rows, FileNotFoundError, ValueError)
def read_rows(folder: Path) -> object:
    file = next(folder.iterdir(), folder / "rows.jsonl")
    found = list(open_texts(file))
    expect(all(isinstance(text, str) for text in found), "a text is none")
    return found


def ravel(folder: Path) -> Iterator[damage.Files]:
    attributes = {"Paris": {"Country": "France"}, "Rome": {"Country": "Italy"}}
    prompts = {"Country": ["The city %s is in", "%s"]}
    contents = {"entity_attributes": attributes, "attribute_to_prompts": prompts}
    yield {
        f"ravel_city_{name}.json": json.dumps(values).encode() for name, values in contents.items()
    }


@parser("RAVEL", ravel, FileNotFoundError, NotEvaluable)
def read_ravel(folder: Path) -> object:
    entities = load_ravel(folder)
    for template in entities.templates.values():
        expect(template.count("{subject}") == 1, "a template has no place, or two")
    return entities.values


def model_folders(folder: Path) -> Iterator[damage.Files]:
    yield {
        "config.json": b'{"model_type": "llama", "transformers_version": "5"}',
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
    }


@parser("model folder", model_folders, FileNotFoundError, ValueError)
def read_model_folder(folder: Path) -> object:
    return model_fingerprint(folder)


# -- endpoints ------------------------------------------------------------------------------------

ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "1, 2"}}
    ],
}


def ask(folder: Path, reply: Callable[[httpx.Request], httpx.Response]) -> str:
    """What an endpoint makes of a server's reply; answers are kept in the folder."""
    endpoint = Endpoint("http://localhost/v1", "m", 1e9, retries=0, folder=folder / "answers")
    endpoint._shared.client = openai.OpenAI(
        base_url=endpoint.url,
        api_key=os.environ.get("C2R_API_KEY", "none"),
        max_retries=0,
        http_client=httpx.Client(transport=httpx.MockTransport(reply), trust_env=False),
    )
    try:
        answer = endpoint.ask("Judge.", "Which?")
    except EndpointError as error:
        expect(damage.KEY not in str(error), "the error shows the key")
        raise
    expect(isinstance(answer, str), "the answer is no text")
    answer.encode()
    return answer


def answers(folder: Path) -> Iterator[damage.Files]:
    yield {"body.json": json.dumps(ANSWER).encode(), "status": b"200"}
    for status in (b"400", b"401", b"404", b"500"):
        yield {"body.json": b'{"error": {"message": "no", "code": 3}}', "status": status}


@parser("endpoint answer", answers, EndpointError)
def read_answer(folder: Path) -> object:
    parts = damage.read(folder)
    status = parts.get("status", b"200")
    status = int(status) if status.isdigit() and 100 <= int(status) <= 599 else 200
    kind = {"content-type": "application/json"}
    return ask(
        folder, lambda _: httpx.Response(status, content=parts.get("body.json", b""), headers=kind)
    )


def kept_answers(folder: Path) -> Iterator[damage.Files]:
    folder.mkdir()
    ask(folder, lambda _: httpx.Response(200, json=ANSWER))
    yield damage.read(folder)


@parser("kept answer", kept_answers, EndpointError, OSError)
def read_kept_answer(folder: Path) -> object:
    return ask(folder, lambda _: httpx.Response(200, json=ANSWER))
