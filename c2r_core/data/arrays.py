"""Arrays of numbers in `.npy` files that are no one's word: what is mapped is what was written."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError

import numpy as np

from c2r_core.artefacts.checksums import compare, of_file

_LONGEST_HEADER = 10_000
"""Bytes; numpy refuses longer ones too, but has read them by then."""
_NO_HEADER = (
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    OverflowError,
    TokenError,
    RecursionError,
    MemoryError,  # of Python's parser, for text that is nested too deep
)


def mapped(
    file: Path, checksum: str, shape: tuple[int, ...], dtype: str, remedy: str
) -> np.ndarray:
    """An array as a memory map, to read; nothing is ever unpickled.

    Parameters
    ----------
    file : Path
    checksum : str
        The SHA-256 that the file must have; it is read once for that.
    shape, dtype
        What the array must be, in C's order.
    remedy : str
        What to do about another one, for messages.

    Raises
    ------
    ValueError
        If the file has another checksum, is no array of numbers, or of another shape or type.
    """
    compare(file, checksum, of_file(file), remedy)
    try:
        _check_header(file)
        array = np.lib.format.open_memmap(file, mode="r")
    except _NO_HEADER as error:
        raise ValueError(f"{file} is no array of numbers ({error}). {remedy}") from error
    if (array.shape, array.dtype) != (shape, np.dtype(dtype)) or not array.flags.c_contiguous:
        raise ValueError(
            f"{file} holds {array.dtype} of shape {array.shape}; expected {dtype} of shape {shape}. {remedy}"
        )
    return array


def _check_header(file: Path) -> None:
    """Raise a ValueError if the header's own length says that it is longer than any header of numbers."""
    with file.open("rb") as opened:
        start = opened.read(12)
    is_first_version = start[6:7] == b"\x01"  # with two bytes for the length, later ones with four
    length = int.from_bytes(start[8 : 10 if is_first_version else 12], "little")
    if length > _LONGEST_HEADER:
        raise ValueError(
            f"its header claims {length:,} bytes; expected at most {_LONGEST_HEADER:,}"
        )
