"""Damaged and hostile files, drawn by hypothesis: what a parser may be given.

A folder is a mapping from names to contents. One or two of its files are damaged: as bytes, or as what their
ending says they are, so that the damage gets past the first check. A number becomes a text or 10^400, a
header claims terabytes, a pickle calls a function, an archive unpacks to more than memory.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from hypothesis import strategies as st

KEY = "a-key-that-nobody-may-see"
"""Of an endpoint. A hostile server may send it back."""
OUTSIDE = "outside"
"""A file beside the folder that is read; nothing may change it."""

_DEPTHS = {"@deep@": 100_000, "@half as deep as can be read@": 400}
_BOMB = 300 * 2**20
_MOST_UNPACKED = 2**24


class Odd(NamedTuple):
    """What stands in a folder where a file should."""

    kind: Literal["folder", "link out", "link to itself", "link to nothing"]


Files = dict[str, bytes | Odd]


def write(files: Mapping[str, bytes | Odd], folder: Path) -> None:
    """Put the files into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.kind == "folder":
            path.mkdir()
        else:
            to = {"link out": f"../{OUTSIDE}", "link to itself": path.name}
            path.symlink_to(to.get(content.kind, "nothing"))


def read(folder: Path) -> Files:
    """The files of a folder and of those in it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


# -- values ---------------------------------------------------------------------------------------

_NUMBERS = (0, -1, 1, 2, 2**31, 2**63, 10**12, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320)
_TEXTS = ("", f"../{OUTSIDE}", "/etc/hostname", "..", "\ud800", "\x00", "\u2028", "none", KEY)
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((*_NUMBERS, float("inf"), float("nan"))),
    st.integers(),
    st.sampled_from((*_TEXTS, "x" * 3000, *_DEPTHS)),
    st.text(max_size=12),
)
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def _changed(draw: st.DrawFn, value: Any) -> Any:
    """JSON's values with one of them replaced, dropped, renamed or put somewhere else."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or draw(st.integers(0, 30)) == 0:
        return draw(_values)
    inside, key = draw(st.sampled_from(places))
    how = draw(st.sampled_from(("replace", "replace", "replace", "drop", "add", "copy")))
    if how == "replace":
        inside[key] = draw(_values)
    elif how == "drop":
        del inside[key]
    elif how == "copy":
        other, of = draw(st.sampled_from(places))
        inside[key] = copy.deepcopy(other[of])
    elif isinstance(inside, dict):
        inside[draw(st.text(max_size=6) | st.sampled_from(("seed", "device", "__class__")))] = draw(
            _values
        )
    else:
        inside.insert(key, draw(_values))
    return value


def _places(value: Any):
    """Every (container, key) in JSON's values."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _dumped(value: Any, **how: Any) -> bytes:
    """As JSON; where the text says so, nested deeper than any parser may follow."""
    text = json.dumps(value, **how)
    for mark, depth in _DEPTHS.items():
        text = text.replace(json.dumps(mark), "[" * depth + "]" * depth)
    return text.encode()


# -- bytes ----------------------------------------------------------------------------------------


@st.composite
def _bytes(draw: st.DrawFn, content: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """Flipped bits, cut, repeated, overwritten, or not that file at all."""
    n = len(content)
    how = draw(st.sampled_from(("flip", "flip", "cut", "insert", "overwrite", "repeat", "other")))
    at = draw(st.integers(0, max(n - 1, 0)))
    if how == "other" or n == 0:
        return draw(st.sampled_from((b"", b"\x00", *others)) | st.binary(max_size=200))
    if how == "flip":
        return (
            content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        )
    if how == "cut":
        return content[:at]
    piece = draw(st.binary(min_size=1, max_size=16))
    if how == "insert":
        return content[:at] + piece + content[at:]
    if how == "overwrite":
        return content[:at] + piece + content[at + len(piece) :]
    return content[:at] + content[draw(st.integers(0, at)) :]


@st.composite
def _json(draw: st.DrawFn, content: bytes) -> bytes:
    return _dumped(draw(_changed(json.loads(content))), indent=draw(st.sampled_from((None, 1, 2))))


@st.composite
def _json_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """One line with other values, or damaged."""
    lines = content.split(b"\n")
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(_json(lines[at]) | _bytes(lines[at], tuple(lines)))
    return b"\n".join(lines)


_LENGTHS = (0, 1, 7, 2**20, 100_000_001, 10**12, 2**63, 2**64 - 1)


@st.composite
def _safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """Another header over the same numbers; in a checkpoint also another state."""
    (length,) = struct.unpack("<Q", content[:8])
    header, numbers = content[8 : 8 + length], content[8 + length :]
    how = draw(st.sampled_from(("header", "header", "state", "length", "numbers")))
    if how == "length":
        return struct.pack("<Q", draw(st.sampled_from(_LENGTHS))) + header + numbers
    if how == "numbers":
        return content[: 8 + length] + draw(_bytes(numbers))
    values = json.loads(header)
    about = values.get("__metadata__", {})
    if how == "state" and "state" in about:
        about["state"] = draw(_json(about["state"].encode())).decode()
        header = _dumped(values)
    else:
        header = _dumped(draw(_changed(values)))
    return struct.pack("<Q", len(header)) + header + numbers


_HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 2), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': 3, 'shape': [4], }",
    "{'descr': [('a', '<f4', (1000000, 1000000))], 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }",
    "__import__('os').abort()",
    "(" * 5000,
    "-" * 9000 + "1",
    "{" + "1:" * 4000,
    "x" * 60_000,
)


@st.composite
def _npy(draw: st.DrawFn, content: bytes) -> bytes:
    """Another header over the same numbers."""
    (length,) = struct.unpack("<H", content[8:10])
    header, numbers = content[10 : 10 + length], content[10 + length :]
    given = draw(st.sampled_from(_HEADERS).map(str.encode) | _bytes(header))[:60_000]
    version = draw(
        st.sampled_from((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\xff\x00"))
    )
    size = struct.pack("<H" if version[0] == 1 else "<I", len(given) + 1)
    return content[:6] + version + size + given + b"\n" + numbers


# -- archives with a pickle -----------------------------------------------------------------------


class _Calls:
    """Pickled as a call of any function."""

    def __init__(self, function: Callable, *given: Any) -> None:
        self.call = (function, given)

    def __reduce__(self) -> tuple:
        return self.call


def _call(module: str, name: str, argument: int) -> bytes:
    """A pickle that calls a function by name with one number."""
    number = pickle.dumps(argument, protocol=2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + number + b"\x85R."


def _with_pickle(program: bytes) -> bytes:
    """An archive as `torch.save` writes it, with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved({}))) as whole, zipfile.ZipFile(file, "w") as archive:
        for one in whole.infolist():
            is_program = one.filename.endswith("data.pkl")
            archive.writestr(one.filename, program if is_program else whole.read(one))
    return file.getvalue()


def _larger_shapes(names: tuple[str, ...]) -> bytes:
    """The pickle of tensors of 4 numbers each, which says that they have 100 million."""
    with zipfile.ZipFile(io.BytesIO(_saved({name: torch.zeros(4) for name in names}))) as archive:
        program = archive.read("archive/data.pkl")
    shape, larger = b"K\x04\x85", b"J" + struct.pack("<i", 10**8) + b"\x85"
    assert program.count(shape) == len(names)
    return program.replace(shape, larger)


@functools.cache
def hostile_archives() -> dict[str, tuple[bytes, bool]]:
    """Files in the place of a dictionary's state, and whether torch may read them: no code, little memory."""
    wide = torch.zeros(1).expand(10**6, 10**6)
    names = ("encoder.weight", "decoder.weight", "encoder.bias", "bias")
    pickles = {
        "a command": pickle.dumps(_Calls(os.system, f"echo x > ../{OUTSIDE}"), protocol=2),
        "an expression": pickle.dumps({names[0]: _Calls(eval, "print('run')")}, protocol=2),
        "a command by protocol 4": pickle.dumps(_Calls(os.system, "true"), protocol=4),
        "100 GB of bytes": _call("__builtin__", "bytearray", 10**11),
        "a storage of a TB": _call("torch.storage", "UntypedStorage", 10**12),
        "a tensor of 4 TB": _call("torch", "FloatTensor", 10**12),
    }
    harmless = {
        "nested deep": b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
        "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
        "nothing": b"\x80\x02.",
        "shapes larger than the numbers": _larger_shapes(names),
    }
    states = {
        "4 TB of one number": {name: wide for name in names},
        "sparse": {name: torch.eye(6).to_sparse() for name in names},
        "complex": {name: torch.zeros(10, 6, dtype=torch.complex64) for name in names},
        "lists": {name: [1, 2] for name in names},
        "a tensor": torch.zeros(3),
        "no tensors": {},
    }
    on_meta = {name: torch.empty(10, 6, device="meta") for name in names}
    old = _saved({names[0]: torch.zeros(3)}, _use_new_zipfile_serialization=False)
    return (
        {name: (_with_pickle(program), False) for name, program in pickles.items()}
        | {name: (_with_pickle(program), True) for name, program in harmless.items()}
        | {name: (_saved(state), True) for name, state in states.items()}
        | {"no numbers": (_saved(on_meta), False), "before archives": (old, False)}
        | {"a bomb": (_bomb(), False)}
    )


def _saved(state: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


@functools.cache
def _bomb() -> bytes:
    """An archive of half a megabyte whose one tensor unpacks to more than a parser may take."""
    kept = zipfile.ZipFile(io.BytesIO(_saved({"encoder.weight": torch.zeros(4)})))
    n_values = b"J" + struct.pack("<i", _BOMB // 4)
    file, tensor = io.BytesIO(), zipfile.ZipInfo("archive/data/0")
    tensor.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file, "w") as archive:
        for one in kept.infolist():
            if one.filename != tensor.filename:
                archive.writestr(one.filename, kept.read(one).replace(b"K\x04", n_values))
        with archive.open(tensor, "w") as opened:
            for _ in range(_BOMB // 2**20):
                opened.write(bytes(2**20))
    return file.getvalue()


@st.composite
def _archive(draw: st.DrawFn, content: bytes) -> bytes:
    """The same entries but one, each with a checksum that is right; or a hostile file."""
    how = draw(st.sampled_from(("entry", "entry", "entry", "hostile", "compress", "name")))
    if how == "hostile":
        return draw(st.sampled_from([content for content, _ in hostile_archives().values()]))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(one.file_size for one in archive.infolist()) > _MOST_UNPACKED:
            raise ValueError("a bomb is not unpacked")
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    name = draw(st.sampled_from(sorted(entries)))
    if how == "name":
        entries[draw(st.sampled_from((f"../{OUTSIDE}", "/etc/x", "", name + "/")))] = entries.pop(
            name
        )
    elif how == "entry":
        entries[name] = draw(_bytes(entries[name]))
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if how == "compress" else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        for one, data in entries.items():
            archive.writestr(
                zipfile.ZipInfo(one), data, kind
            )  # without the time, so always the same
    return file.getvalue()


# -- YAML -----------------------------------------------------------------------------------------

_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
_HOSTILE_YAML = (
    f"default: !!python/object/apply:os.system ['echo x > ../{OUTSIDE}']\n",
    "default: !!python/name:os.system\n",
    _LAUGHS + "default: {seed: *j, toy: *j}\n",
    "default: &a {toy: *a}\n",
    "default: &a [*a]\n",
    "default: " + "[" * 5000,
    "default: {<<: [1, 2]}\n",
    "default: 0x" + "f" * 5000 + "\n",
    "default: 2001-99-99\n",
    "? [1, 2]\n: 3\n",
    "a: {based_on: b}\nb: {based_on: a}\ndefault: {based_on: default}\n",
    "default: 1\n---\ndefault: 2\n",
    "\tdefault: 1\n",
)


@st.composite
def _yaml(draw: st.DrawFn, content: bytes) -> bytes:
    if b"*" in content or draw(st.integers(0, 3)) == 0:  # aliases stand for too much to be changed
        return draw(st.sampled_from(_HOSTILE_YAML)).encode()
    values = draw(_changed(yaml.safe_load(content)))
    try:
        return yaml.safe_dump(values, allow_unicode=True, sort_keys=False).encode()
    except UnicodeEncodeError:
        return _dumped(values)  # JSON is YAML


# -- folders --------------------------------------------------------------------------------------

_BY_ENDING: dict[str, Callable[[bytes], st.SearchStrategy[bytes]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ipynb": _json,
    ".safetensors": _safetensors,
    ".npy": _npy,
    ".pt": _archive,
    ".yml": _yaml,
}
_ODD = tuple(map(Odd, ("folder", "link out", "link to itself", "link to nothing")))


UNREADABLE = (
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    yaml.YAMLError,
    zipfile.BadZipFile,
    zlib.error,
)


@st.composite
def damaged(draw: st.DrawFn, folders: tuple[Mapping[str, bytes], ...]) -> Files:
    """One of the folders, one or two of its files damaged, missing, swapped, or no files at all."""
    files: Files = dict(draw(st.sampled_from(folders)))
    others = tuple(content for folder in folders for content in folder.values())
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        name = draw(st.sampled_from(sorted(files) or ["new"]))
        content, how = files.get(name), draw(st.integers(0, 19))
        if how == 0:
            files.pop(name, None)
        elif how == 1 or not isinstance(content, bytes):
            files[name] = draw(st.sampled_from(_ODD))
        else:
            as_what = _BY_ENDING.get(Path(name).suffix)
            by_ending = as_what is not None and how > 6
            try:
                files[name] = draw(as_what(content) if by_ending else _bytes(content, others))
            except UNREADABLE:
                files[name] = draw(_bytes(content, others))  # damaged twice
    return files
