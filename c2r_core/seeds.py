"""Random streams that depend on nothing but the numbers that name them."""

from __future__ import annotations


def mix_seeds(seed: int, step: int) -> int:
    """One 63-bit seed from two numbers, so that every (seed, step) has its own random stream."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    return (mixed * 0xD6E8FEB86659FD93 % 2**64) >> 1
