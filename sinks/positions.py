"""Who sees whom, at what distance, and the rotations that say so (docs/papers/streamingllm.md 1.2, 1.10, 2).

The stream is tokens 0, 1, 2, ...; the first S are the sinks. When token t is the query, `evicted` tokens after the sinks
have been forgotten, and the cache holds the sinks and everything after the gap:

    0 .. S-1 | S .. S+evicted-1 forgotten | S+evicted .. t

Positions are places in the cache, so the gap has no width: recent tokens lie at their true distance, the sinks closer than
they were. `visible` and `distance` below are the only definition of both; every path of sinks/attention.py uses them.

Legend: B batch, T queries, M keys, P rotated pairs of a head.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from sinks.config import ModelConfig

NOWHERE = -1  # the index of a slot that holds nothing


def evicted_at(t: jax.Array, capacity: int, at_least: jax.Array | int = 0) -> jax.Array:
    """Tokens forgotten when t is the query: per-token streaming keeps S + R = `capacity` past tokens.

    `at_least` is what has been evicted in blocks before (sinks/policies.py: evict_for_space); 0 in the paper's stream.
    """
    return jnp.maximum(at_least, t - capacity)


def visible(t: jax.Array, j: jax.Array, evicted: jax.Array, n_sinks: int) -> jax.Array:
    """Whether query t attends to token j: a sink, or a token after the gap, up to itself."""
    is_sink = (j >= 0) & (j < n_sinks)
    return (is_sink | (j >= n_sinks + evicted)) & (j <= t)


def distance(t: jax.Array, j: jax.Array, evicted: jax.Array, n_sinks: int) -> jax.Array:
    """Places between token j and query t in the cache. Meaningless where not `visible`."""
    return t - j - jnp.where(j < n_sinks, evicted, 0)


def ring_index(length: jax.Array, n_sinks: int, slots: int) -> jax.Array:
    """The token in each slot of the ring after `length` tokens [...]: [..., slots], NOWHERE in empty slots.

    Token j >= n_sinks lives in slot (j - n_sinks) mod slots: the newest one of each residue is there.
    """
    newest = length[..., None] - 1
    j = newest - (newest - n_sinks - jnp.arange(slots)) % slots
    return jnp.where(j >= n_sinks, j, NOWHERE)


class Rotation(NamedTuple):
    """cos and sin of every rotated pair's angle, [..., P]."""

    cos: jax.Array
    sin: jax.Array


def frequencies(config: ModelConfig) -> np.ndarray:
    """RoPE's angles per token in radians, float64 [P], after the config's scaling."""
    P = config.rotary_dim // 2
    angles = config.rope_theta ** (-np.arange(P) / P) if P else np.zeros(0)
    scaling = config.rope_scaling
    if scaling is None:
        return angles
    if scaling.kind == "linear":
        return angles / scaling.factor
    # llama3: turns made over the original context decide. Many: unchanged; few: slowed down; between: interpolated.
    turns = scaling.original_positions * angles / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * angles + (1 - keep) * angles / scaling.factor


def rotation(config: ModelConfig, t: jax.Array, dtype: DTypeLike) -> Rotation:
    """The rotation of position t (int32, any shape), [..., P].

    Angles are integers: 64-bit fractions of a turn, multiplied modulo one turn. They are as exact at t = 2^30 as at
    t = 1, where float32 angles have lost whole turns from 2^24 on. (Two 32-bit words: no need for jax's 64-bit mode.)
    """
    fractions = [round(f / (2 * math.pi) * 2**64) for f in frequencies(config)]
    high = np.array([f >> 32 for f in fractions], np.uint32)
    low = np.array([f & 0xFFFFFFFF for f in fractions], np.uint32)
    t = t.astype(jnp.uint32)[..., None]
    turn_high, turn_low = t * high + _multiply_high(t, low), t * low
    signed = lax.bitcast_convert_type(turn_high, jnp.int32)
    turns = signed.astype(dtype) * 2.0**-32 + turn_low.astype(dtype) * 2.0**-64
    return Rotation(jnp.cos(2 * math.pi * turns), jnp.sin(2 * math.pi * turns))


def _multiply_high(a: jax.Array, b: np.ndarray) -> jax.Array:
    """The upper 32 bits of the 64-bit product of unsigned 32-bit integers, from 16-bit halves."""
    a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a1 * b0 + (a0 * b0 >> 16)
    return a1 * b1 + (middle >> 16) + ((middle & 0xFFFF) + a0 * b1 >> 16)


def between(a: Rotation, b: Rotation) -> Rotation:
    """What turns a key rotated by a into one rotated by b."""
    return Rotation(b.cos * a.cos + b.sin * a.sin, b.sin * a.cos - b.cos * a.sin)


def rotate(x_BTHK: jax.Array, by: Rotation) -> jax.Array:
    """Rotates the first 2P features of every head, taken as two halves, by `by` [B, T, P]; the rest pass."""
    P = by.cos.shape[-1]
    if not P:
        return x_BTHK
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    a, b, rest = x_BTHK[..., :P], x_BTHK[..., P : 2 * P], x_BTHK[..., 2 * P :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def alibi_slopes(config: ModelConfig) -> np.ndarray | None:
    """What a score loses per unit of distance, float64 [H]; None without ALiBi.

    A geometric sequence from 2^(-8/H); for H not a power of two, as Press et al. interleave it. Falcon scales its bias
    together with the scores by 1 / sqrt(K).
    """
    if not config.alibi:
        return None
    power = 2 ** math.floor(math.log2(config.heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power, 2) / power)
    slopes = np.concatenate([slopes, between])[: config.heads]
    return slopes * config.head_dim**-0.5 if config.family == "falcon" else slopes
