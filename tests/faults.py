"""Flipped bits, for tests of what is read from files."""

from __future__ import annotations

import random
from pathlib import Path


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def some_bits(file: Path, n: int, *, first_byte: int = 0, end: int | None = None) -> list[int]:
    bits = range(8 * first_byte, 8 * (end or file.stat().st_size))
    return random.Random(0).sample(bits, n)


def accepted(file: Path, bits, read) -> list[int]:
    """Those of the bits with which, flipped, the file is read and not refused by its name."""
    whole, found = file.read_bytes(), []
    for bit in bits:
        flip(file, bit)
        try:
            read()
            found.append(bit)
        except ValueError as error:
            assert str(file) in str(error), f"bit {bit}: {error!r}"
        file.write_bytes(whole)
    read()
    return found
