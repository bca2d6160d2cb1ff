"""Counter-based randomness: a number is a hash of what it is for, so nothing has a state.

The order of an epoch, a split and the augmentation of an image are functions of (seed, ...) alone:
the same on every rank, in every worker, at every batch size, and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


class Draw(IntEnum):
    """What a number is drawn for; two draws of one image are independent."""

    SPLIT = 0
    ORDER = 1
    CROP_TOP = 2
    CROP_LEFT = 3
    FLIP = 4
    CUTOUT_TOP = 5
    CUTOUT_LEFT = 6
    ITEM = 7


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One output of SplitMix64 (Steele et al. 2014) from state `x`."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*fields: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for every combination of the fields (broadcast; at least 1-D)."""
    # arrays, never numpy scalars: only those wrap around without a warning
    state = np.zeros(1, dtype=np.uint64)
    for field in fields:
        if isinstance(field, int):
            word = np.array([field & _MASK], dtype=np.uint64)
        else:
            word = field.astype(np.uint64)
        state = _mix(state ^ word)
    return state


def below(bits: NDArray[np.uint64], bound: int) -> NDArray[np.int64]:
    """Integers in [0, bound) from 64 random bits each; bound is at most 2^32."""
    return (((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def permutation(size: int, *fields: int) -> NDArray[np.int64]:
    """A random order of range(size), a function of the fields."""
    return np.argsort(hash64(*fields, np.arange(size)), kind="stable")


def spread(size: int, count: int) -> NDArray[np.bool_]:
    """Mark `count` of `size` positions as evenly as possible: any run of n positions has
    n * count / size of them, give or take one."""
    steps = np.arange(size + 1, dtype=np.int64) * count // size
    return np.diff(steps) > 0


@contextmanager
def seeded(bits: int) -> Iterator[None]:
    """Seed the global CPU generators of python, numpy and torch; restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)
        # not torch.manual_seed: that reseeds the accelerators too
        torch.default_generator.manual_seed(bits)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
