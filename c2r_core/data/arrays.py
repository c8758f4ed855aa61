"""Arrays of numbers in `.npy` files that are no one's word: what is mapped is what was written."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError

import numpy as np

from c2r_core.artefacts.checksums import compare, of_file


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
        array = np.lib.format.open_memmap(file, mode="r")
    except (ValueError, TypeError, SyntaxError, EOFError, OverflowError, TokenError) as error:
        raise ValueError(f"{file} is no array of numbers ({error}). {remedy}") from error
    if (array.shape, array.dtype) != (shape, np.dtype(dtype)) or not array.flags.c_contiguous:
        raise ValueError(
            f"{file} holds {array.dtype} of shape {array.shape}; expected {dtype} of shape {shape}. {remedy}"
        )
    return array
