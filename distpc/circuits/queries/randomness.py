"""Random numbers by name: the same for a sample and a choice however samples are batched.

A generator hands out numbers in the order of being asked, which depends on batches and on how the
circuit is folded. Here a number is a hash of (seed, stream, sample), by SplitMix64 (Steele, Lea and
Flood, 2014): the stream's key, plus the sample times an odd constant, finalised.
"""

from __future__ import annotations

import math

from torch import Tensor

STREAMS_PER_REGION = 2
_BITS = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def uniforms(seed: int, stream: int, samples: Tensor) -> Tensor:
    """Float64 numbers in [0, 1), one for each of `samples` (int64)."""
    key = _finalise(_finalise(seed & _BITS) + (stream + 1) * _GOLDEN)
    z = samples * _signed(_GOLDEN) + _signed(key)
    z = (z ^ _shift(z, 30)) * _signed(_FACTORS[0])
    z = (z ^ _shift(z, 27)) * _signed(_FACTORS[1])
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def normals(seed: int, stream: int, samples: Tensor) -> Tensor:
    """Standard normal float64 numbers (Box and Muller); takes the streams `stream` and the next."""
    radius = (-2.0 * (1.0 - uniforms(seed, stream, samples)).log()).sqrt()
    return radius * (2.0 * math.pi * uniforms(seed, stream + 1, samples)).cos()


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's copies the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    value &= _BITS
    return value - 2**64 if value >= 2**63 else value


def _finalise(z: int) -> int:
    z &= _BITS
    z = (z ^ (z >> 30)) * _FACTORS[0] & _BITS
    z = (z ^ (z >> 27)) * _FACTORS[1] & _BITS
    return z ^ (z >> 31)
