"""A checksum of an array's content that does not depend on where its parts lie."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.jit
def array_fingerprint(x: jax.Array) -> jax.Array:
    """uint32 hash of the bits of x: each element mixed with its position, summed modulo 2^32.

    Orbax has no checksum over array data: flipped bits would load in silence. A sum does not depend
    on layout: each device hashes its shards, all meshes agree. As the mix (murmur3's finalizer) is a
    bijection, one changed word is always seen; of other changes, 2^-32 are not.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = (jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo)(x.dtype).bits
    if bits < 8:
        x, bits = x.astype(jnp.float32), 32  # int4 and its like: exact
    h = lax.bitcast_convert_type(x, f"uint{min(bits, 32)}").astype(jnp.uint32)
    position = jnp.uint32(0)
    for axis, size in enumerate(h.shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, h.shape, axis)
    h ^= position * jnp.uint32(0x9E3779B1) + jnp.uint32(1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
