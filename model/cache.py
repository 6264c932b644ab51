"""The key/value cache of decoding: a row is a sequence (a *slot* of the server), a place of it a position.

Row s holds its tokens from place 0 on, so the key in place p has position p, and a query at position p sees exactly the
places up to p.  Later places (padding, or what an earlier sequence left) are never seen, and are overwritten in time.

A place is one row of W numbers: the heads side by side, filled up to whole lanes.  That is how the decode kernel reads
it: [T, K, D] would be padded to 128 lanes a head in a TPU's memory (kernels/decode_attention.py).  In an int8 cache a
head's key or value is its largest number / 127, a float32 factor, times whole numbers from -127 to 127.
"""
import jax
import jax.numpy as jnp
from jax import lax

from kernels.decode_attention import cache_width, round_up
from model.config import LlamaConfig
from model.partition import pytree

UNROLLED = 64  # so many rows are written one after the other
PLACES = 128  # a row has a multiple of so many: whole blocks of kernels/blockwise.py and tiles of the decode kernel


@pytree
class Cache:
    """Keys and values after rotary embedding, [layers, rows, places, width]; inside shard_map of the local heads.

    factors_NBCKS: of an int8 cache, [layers, rows, 2 (keys, values), heads, places]; else None.
    """

    k_NBSW: jax.Array
    v_NBSW: jax.Array
    factors_NBCKS: jax.Array | None = None


def init_cache(config: LlamaConfig, batch: int, length: int, dtype, mp: int = 1) -> Cache:
    """Make an empty cache of `batch` rows of at least `length` places, for one device of `mp` (each has a head)."""
    heads, places = max(1, config.num_key_value_heads // mp), round_up(length, PLACES)
    shape = (config.num_hidden_layers, batch, places, cache_width(heads, config.head_dim))
    factors = jnp.zeros((*shape[:2], 2, heads, places), jnp.float32) if dtype == jnp.int8 else None
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), factors)


def write(cache: Cache, layer: jax.Array, rows_B: jax.Array | None, starts_B: jax.Array, k_BTKD: jax.Array,
          v_BTKD: jax.Array) -> Cache:
    """Write T consecutive new keys and values of one layer into row rows_B[b] (None: b), from place starts_B[b] on.

    Rows may repeat, with places of their own.  Nothing is clamped: start + T is at most the row's length.  A negative
    start says that the row has no work: it is written to the row's end, which a server leaves free for it.
    """
    B, T, K, D = k_BTKD.shape
    starts_B = jnp.where(starts_B < 0, cache.k_NBSW.shape[2] - T, starts_B)
    rows_B = jnp.arange(B) if rows_B is None else rows_B
    factors_NBCKS = cache.factors_NBCKS
    if factors_NBCKS is not None:
        (k_BTKD, k_BTK), (v_BTKD, v_BTK) = _to_int8(k_BTKD), _to_int8(v_BTKD)
        new_BCKT = jnp.stack([k_BTK, v_BTK], axis=1).swapaxes(2, 3)
        for b in range(B):
            factors_NBCKS = lax.dynamic_update_slice(factors_NBCKS, new_BCKT[None, b:b + 1],
                                                     (layer, rows_B[b], 0, 0, starts_B[b]))

    def put(x_NBSW, new_BTKD):
        new_BTW = jnp.pad(new_BTKD.reshape(B, T, K * D).astype(x_NBSW.dtype),
                          ((0, 0), (0, 0), (0, x_NBSW.shape[3] - K * D)))
        if B > UNROLLED:
            return x_NBSW.at[layer, rows_B[:, None], starts_B[:, None] + jnp.arange(T)[None]].set(new_BTW)
        for b in range(B):
            x_NBSW = lax.dynamic_update_slice(x_NBSW, new_BTW[None, b:b + 1], (layer, rows_B[b], starts_B[b], 0))
        return x_NBSW

    return Cache(put(cache.k_NBSW, k_BTKD), put(cache.v_NBSW, v_BTKD), factors_NBCKS)


def _to_int8(x_BTKD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantize to (whole numbers, their factor [B, T, K])."""
    x_BTKD = x_BTKD.astype(jnp.float32)
    factor_BTK = jnp.abs(x_BTKD).max(axis=-1) / 127
    return jnp.round(x_BTKD / jnp.maximum(factor_BTK, 1e-30)[..., None]).astype(jnp.int8), factor_BTK


def read(cache: Cache, layer: jax.Array, rows_B: jax.Array | None, start: jax.Array | int, count: int, K: int, D: int):
    """Read k_BSKD, v_BSKD of one layer, `count` places from `start` on, of row rows_B[b] (None: b).

    They have the cache's dtype; those of an int8 cache are float32.
    """
    B = cache.k_NBSW.shape[1] if rows_B is None else rows_B.shape[0]

    def take(x_NBSW, which):
        parts = [lax.dynamic_slice(x_NBSW, (layer, b if rows_B is None else rows_B[b], start, 0),
                                   (1, 1, count, K * D))[0] for b in range(B)]
        x_BSKD = jnp.concatenate(parts).reshape(B, count, K, D)
        if cache.factors_NBCKS is None:
            return x_BSKD
        factors = [lax.dynamic_slice(cache.factors_NBCKS, (layer, b if rows_B is None else rows_B[b], which, 0, start),
                                     (1, 1, 1, K, count))[0, 0] for b in range(B)]
        return x_BSKD.astype(jnp.float32) * jnp.concatenate(factors).swapaxes(1, 2)[..., None]

    return take(cache.k_NBSW, 0), take(cache.v_NBSW, 1)
