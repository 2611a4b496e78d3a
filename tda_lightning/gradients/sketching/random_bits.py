"""Random signs and hash buckets from raw Philox bits: the same on all machines and versions.

NumPy guarantees that its raw words never change. Its distributions and torch's generators come
without this guarantee. Each table is keyed by a seed and a name, so it does not depend on others.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def sign_matrix(height: int, width: int, seed: int, key: str) -> Float[Tensor, "height width"]:
    """Return a matrix of random signs, divided by the square root of ``width``."""
    return signs(height * width, seed, key).reshape(height, width) / math.sqrt(width)


def signs(count: int, seed: int, key: str) -> Float[Tensor, " count"]:
    """Return independent signs, in float64."""
    words = _random_words(-(-count // 64), seed, key).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8))[:count]
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)


def buckets(count: int, dimension: int, seed: int, key: str) -> Int[Tensor, " count"]:
    """Return independent integers from 0 to ``dimension - 1``."""
    words = _random_words(count, seed, key)
    return torch.from_numpy((words % np.uint64(dimension)).astype(np.int64))


def _random_words(count: int, seed: int, key: str) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    words: np.ndarray = generator.random_raw(count)
    return words
