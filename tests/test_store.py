"""Reading a store: rows, chunks, text, and what a damaged one says."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch

from c2r_core.artefacts.checksums import of_file
from c2r_core.artefacts.paths import data_dir
from c2r_core.data.arrays import mapped
from c2r_core.data.language_models import RANDOM, SMOLLM2, load_language_model
from c2r_core.data.store import ActivationStore, HarvestConfig, Manifest
from faults import accepted, flip, some_bits
from stores import CONTEXT, HOOK, change_manifest, small_store

pytestmark = pytest.mark.skipif(
    not (data_dir() / SMOLLM2).is_dir(), reason="SmolLM2 is not here; run `make data`"
)


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("harvest") / "store")


@pytest.fixture
def copy_of(store, tmp_path):
    """A copy of the store's folder, to damage."""
    for file in store.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_rows_are_the_kept_tokens_in_order(store) -> None:
    kept = torch.cat(list(store.chunks(7, dropped=True)))[torch.from_numpy(store.kept)]
    assert torch.equal(torch.cat(list(store.chunks(50))), kept)
    assert torch.equal(store.batch(range(len(store))), kept)
    assert [len(chunk) for chunk in store.chunks(100)][:-1] == [100] * (len(store) // 100)


def test_a_batch_keeps_the_order_asked_for_across_shards(store) -> None:
    rows = torch.cat(list(store.chunks(1000)))
    indices = np.random.default_rng(0).integers(0, len(store), 300)
    assert torch.equal(store.batch(indices), rows[indices])
    assert torch.equal(store.batch(torch.tensor([5, 5, 0])), rows[[5, 5, 0]])
    assert store.batch([]).shape == (0, store.d_in)


def test_rows_outside_the_store_are_refused(store, model) -> None:
    for indices in ([-1], [0, len(store)]):
        with pytest.raises(IndexError, match=f"rows 0 to {len(store) - 1}"):
            store.batch(indices)
    with pytest.raises(IndexError):
        store.text_around(len(store), model.tokenizer)


def test_the_norm_factor_gives_unit_mean_squared_norm(store) -> None:
    rows = store.batch(range(len(store))).double() * store.norm_factor
    assert rows.pow(2).sum(1).mean().item() == pytest.approx(1, rel=1e-12)


def test_text_around_shows_the_token_within_its_context(store, model) -> None:
    positions = np.flatnonzero(store.kept)
    row = int(np.flatnonzero(positions % CONTEXT == 5)[0])
    window = store.text_around(row, model.tokenizer, before=3, after=2)
    assert len(window.tokens) == 6 and window.position == 3
    assert window.tokens[3] == model.tokenizer.decode([store.contexts.ravel()[positions[row]]])
    row = int(np.flatnonzero(positions % CONTEXT == CONTEXT - 1)[0])
    window = store.text_around(row, model.tokenizer, before=100, after=100)
    assert len(window.tokens) == CONTEXT and window.position == CONTEXT - 1
    assert window.tokens[0] == model.tokenizer.bos_token


def read_all(folder) -> None:
    for _ in ActivationStore.open(folder).chunks(100, dropped=True):
        pass


def test_no_flipped_bit_of_any_file_is_read(copy_of) -> None:
    files = sorted(copy_of.iterdir())
    assert [file.name for file in files] == ["kept.npy", "manifest.json"] + [
        *(f"shard-0000{i}.npy" for i in range(4)),
        "tokens.npy",
    ]
    for file in files:
        bits = some_bits(file, 100, end=128) + some_bits(file, 60, first_byte=128)
        assert not accepted(file, bits, lambda: read_all(copy_of)), file.name


def test_a_manifest_is_read_only_as_it_was_spelled(copy_of) -> None:
    file = copy_of / "manifest.json"
    assert not accepted(file, some_bits(file, 2000), lambda: manifest_of(file))
    whole = file.read_bytes()
    for content in (whole + b"\n", whole.replace(b" ", b""), whole.replace(b"{", b'{"d_in":1,', 1)):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"manifest\.json is not spelled as it was saved.*harvest"
        ):
            ActivationStore.open(copy_of)


def manifest_of(file) -> Manifest:
    return Manifest.read(file.read_bytes(), file, "Do this.")


def test_a_shard_is_compared_when_it_is_first_read_and_all_of_them_on_request(copy_of) -> None:
    flip(copy_of / "shard-00003.npy", 8 * 200)
    store = ActivationStore.open(copy_of)
    assert store.batch([0, 5]).shape == (2, 64)
    named = r"shard-00003\.npy is not what was saved.*harvest again"
    for read in (lambda: store.batch([len(store) - 1, 0]), store.check, lambda: read_all(copy_of)):
        with pytest.raises(ValueError, match=named):
            read()
    flip(copy_of / "shard-00003.npy", 8 * 200)
    store.check()
    flip(copy_of / "tokens.npy", 8 * 200)
    with pytest.raises(ValueError, match="tokens.npy is not what was saved"):
        store.check()


def test_files_of_two_stores_do_not_mix(copy_of) -> None:
    one, other = copy_of / "shard-00000.npy", copy_of / "shard-00001.npy"
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="shard-00000.npy is not what was saved"):
        read_all(copy_of)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_factor": float("nan")}, "norm_factor is nan; expected float"),
        ({"norm_factor": float("inf")}, "norm_factor is inf"),
        ({"norm_factor": "1.0"}, "norm_factor is '1.0'; expected float"),
        ({"norm_factor": 0}, "norm_factor is 0; expected a positive number"),
        ({"d_in": True}, "d_in is True; expected int"),
        ({"d_in": 64.0}, "d_in is 64.0; expected int"),
        ({"d_in": 10**30}, "shard-00000.npy has 192 tokens and"),
        ({"n_tokens": 10**30}, "the shards have 640"),
        ({"n_tokens": None}, "n_tokens is None"),
        ({"n_kept": 641}, "n_kept 641"),
        ({"context_size": 7}, "contexts of 7 tokens"),
        ({"max_tokens": "many"}, "max_tokens is 'many'; expected int | None"),
        ({"dtype": "object"}, "dtype is 'object'"),
        ({"library_versions": ["torch"]}, "library_versions is .*expected dict"),
        ({"library_versions": {"torch": 2}}, "library_versions.*is 2; expected str"),
        ({"shards": None}, "shards is None; expected tuple"),
        ({"shards": []}, "the shards have 0"),
        ({"shards": ["shard-00000.npy"]}, "Shard is 'shard-00000.npy'; expected values by name"),
        ({"surprise": 1}, "Manifest has no field named 'surprise'"),
    ],
)
def test_a_bad_manifest_is_refused_though_its_checksum_is_right(copy_of, changes, message) -> None:
    change_manifest(copy_of, lambda values: values.update(changes))
    with pytest.raises(ValueError, match=f"manifest.json is no manifest .*{message}.*harvest"):
        ActivationStore.open(copy_of)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "../x.npy", r"named '\.\./x.npy'; expected shard-00001.npy"),
        ("name", "shard-00000.npy", "named 'shard-00000.npy'; expected shard-00001.npy"),
        ("name", "tokens.npy", "named 'tokens.npy'"),
        ("name", 3, "name is 3; expected str"),
        ("n_bytes", 10**18, "shard-00001.npy has 192 tokens and 1000000000000000000 bytes"),
        ("n_bytes", -1, "-1 bytes"),
        ("n_tokens", 0, "the shards have 448"),
    ],
)
def test_a_bad_shard_in_the_manifest_is_refused(copy_of, field, value, message) -> None:
    change_manifest(copy_of, lambda values: values["shards"][1].update({field: value}))
    with pytest.raises(ValueError, match=f"manifest.json is no manifest .*{message}.*harvest"):
        ActivationStore.open(copy_of)


def test_a_manifest_that_lacks_a_field_or_is_no_manifest_is_refused(copy_of) -> None:
    file = copy_of / "manifest.json"
    for name in json.loads(file.read_text()):
        if name not in ("format_version", "manifest_sha256"):
            whole = file.read_bytes()
            change_manifest(copy_of, lambda values, name=name: values.pop(name))
            with pytest.raises(ValueError, match=f"manifest.json .*lacks {name}"):
                ActivationStore.open(copy_of)
            file.write_bytes(whole)
    for content in (b"", b"{", b"\xff{}", b"[" * 10**5, b"3", b"[]", b"null", b"{}", b"\x80\x04N."):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.json .*harvest again"):
            ActivationStore.open(copy_of)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def npy(header: bytes, rest: bytes = b"\0" * 100) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + rest


STRANGE = {
    "another type": np.zeros(640),
    "another shape": np.zeros((640, 1), dtype=bool),
    "the other order": np.asfortranarray(np.zeros((40, CONTEXT), dtype=np.int32)),
    "a pickle": np.array([Bomb()] * 640, dtype=object),
    "no array": b"",
    "an archive": b"PK\x03\x04" + b"\0" * 60,
    "a bare pickle": b"\x80\x04N.",
    "no header": npy(b""),
    "code": npy(b"__import__('os')\n"),
    "half a header": npy(b"{'descr': '<f2', "),
    "a huge shape": npy(b"{'descr': '|b1', 'fortran_order': False, 'shape': (10**18,)}\n"),
    "a huge number": npy(
        b"{'descr': '|b1', 'fortran_order': False, 'shape': (1000000000000000000,)}\n"
    ),
    "beyond any": npy(b"{'descr': '|b1', 'fortran_order': False, 'shape': (%s,)}\n" % (b"9" * 400)),
    "a negative": npy(b"{'descr': '|b1', 'fortran_order': False, 'shape': (-640,)}\n"),
    "nothing to map": npy(b"{'descr': '|b1', 'fortran_order': False, 'shape': (0,)}\n", b""),
    "an odd type": npy(b"{'descr': ('<f2', 3, 4), 'fortran_order': False, 'shape': (640,)}\n"),
    "deep": npy(b"(" * 5000),
    "signs": npy(b"-" * 9000 + b"1"),
    "braces": npy(b"{" + b"1:" * 4000),
    "nul": npy(b"{'descr': '\x00', 'fortran_order': False, 'shape': (640,)}\n"),
    "no latin": npy("{'descr': 'ü'".encode()),
}


@pytest.mark.parametrize("name", ["kept.npy", "tokens.npy", "shard-00001.npy"])
@pytest.mark.parametrize("content", STRANGE.values(), ids=STRANGE)
def test_a_file_of_another_kind_is_refused_though_its_checksum_is_right(
    copy_of, name, content
) -> None:
    if isinstance(content, bytes):
        (copy_of / name).write_bytes(content)
    else:
        np.save(copy_of / name, content, allow_pickle=True)
    if name.startswith("shard"):  # its size is checked first
        whole = 128 + 12 * CONTEXT * 64 * 2
        with (copy_of / name).open("r+b") as file:
            file.truncate(whole)
    checksum = of_file(copy_of / name)

    def adopt(values) -> None:
        if name.startswith("shard"):
            values["shards"][1]["sha256"] = checksum
        else:
            values[f"{name.removesuffix('.npy')}_sha256"] = checksum

    change_manifest(copy_of, adopt)
    with pytest.raises(ValueError, match=f"{name} (is no array of numbers|holds).*harvest again"):
        read_all(copy_of)


def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path) -> None:
    file = tmp_path / "kept.npy"
    file.write_bytes(b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b"{}")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"kept\.npy is no array .*claims 4,294,967,295 bytes"):
            mapped(file, of_file(file), (2,), "bool", "Harvest again.")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 2**20


def test_as_many_are_kept_as_the_manifest_says(copy_of) -> None:
    change_manifest(copy_of, lambda values: values.update(n_kept=values["n_kept"] - 1))
    with pytest.raises(ValueError, match=r"kept\.npy keeps .* tokens, the manifest says"):
        ActivationStore.open(copy_of)


@pytest.mark.parametrize("name", ["shard-00002.npy", "kept.npy", "tokens.npy"])
def test_a_missing_file_is_named(copy_of, name) -> None:
    (copy_of / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing.*harvest again"):
        ActivationStore.open(copy_of)


def test_a_truncated_shard_is_named(copy_of) -> None:
    shard = copy_of / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"(?s)shard-00001\.npy.*truncated.*harvest again"):
        ActivationStore.open(copy_of)


def test_a_folder_without_a_store_and_another_format_are_refused(copy_of, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="manifest.json"):
        ActivationStore.open(tmp_path / "nowhere")
    for version in (2, 99):
        change_manifest(copy_of, lambda values, v=version: values.update(format_version=v))
        with pytest.raises(ValueError, match=f"format version {version}; this code reads 3"):
            ActivationStore.open(copy_of)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"context_size": 1}, "context_size is 1; expected at least 2"),
        ({"max_tokens": 15, "context_size": 16}, "at least one context of 16"),
        ({"drop_norm_ratio": 0.5}, "drop_norm_ratio is 0.5"),
        ({"drop_norm_ratio": float("nan")}, "drop_norm_ratio is nan"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; expected 'float16' or 'float32'"),
        ({"precision": "half"}, "precision is 'half'"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        HarvestConfig(hook_name=HOOK, **setting)


def test_a_chunk_holds_at_least_one_token(store) -> None:
    with pytest.raises(ValueError, match="size is 0; expected a positive number of tokens"):
        next(store.chunks(0))
