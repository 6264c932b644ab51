"""The key/value cache of decoding: one row per sequence, one slot per position.

Row b holds its tokens from slot 0 on, so the key in slot s has position s, and a query at position p sees exactly the
slots s <= p.  Later slots (padding of a shorter prompt, or leftovers) are never seen, and decoding overwrites them.

A slot is one row of W numbers: the heads side by side, filled up to whole lanes.  That is how the decode kernel reads
it: [S, K, D] would be padded to 128 lanes a head in a TPU's memory (kernels/decode_attention.py).
"""
import jax
import jax.numpy as jnp
from jax import lax

from kernels.decode_attention import cache_width, round_up
from model.config import LlamaConfig
from model.partition import pytree

SLOTS = 16  # a cache has a multiple of so many, as the kernel wants it


@pytree
class Cache:
    """Keys and values after rotary embedding, [layers, rows, slots, width]; inside shard_map of the local heads."""

    k_NBSW: jax.Array
    v_NBSW: jax.Array


def init_cache(config: LlamaConfig, batch: int, length: int, dtype, mp: int = 1) -> Cache:
    """Make an empty cache of `batch` rows of at least `length` slots, for one device of `mp` (each has a head)."""
    heads = max(1, config.num_key_value_heads // mp)
    shape = (config.num_hidden_layers, batch, round_up(length, SLOTS), cache_width(heads, config.head_dim))
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def longer(cache: Cache, length: int) -> Cache:
    """Lengthen the cache to at least `length` slots."""
    more = max(0, round_up(length, SLOTS) - cache.k_NBSW.shape[2])
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), cache)


def write(cache: Cache, layer: jax.Array, positions_BT: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array) -> Cache:
    """Write T consecutive new keys and values of one layer, row b's starting at slot positions_BT[b, 0]."""

    def put(slots_NBSW, new_BTKD):
        B, T, K, D = new_BTKD.shape
        new_BTW = jnp.pad(new_BTKD.reshape(B, T, K * D), ((0, 0), (0, 0), (0, slots_NBSW.shape[3] - K * D)))
        rows = jax.vmap(lambda slots, new, start: lax.dynamic_update_slice(slots, new, (start, 0)))(
            lax.dynamic_index_in_dim(slots_NBSW, layer, keepdims=False), new_BTW.astype(slots_NBSW.dtype),
            positions_BT[:, 0])
        return lax.dynamic_update_index_in_dim(slots_NBSW, rows, layer, 0)

    return Cache(put(cache.k_NBSW, k_BTKD), put(cache.v_NBSW, v_BTKD))


def read(cache: Cache, layer: jax.Array, K: int, D: int) -> tuple[jax.Array, jax.Array]:
    """Read k_BSKD, v_BSKD of one layer."""
    def take(x_NBSW):
        x_BSW = lax.dynamic_index_in_dim(x_NBSW, layer, keepdims=False)
        return x_BSW[:, :, :K * D].reshape(*x_BSW.shape[:2], K, D)

    return take(cache.k_NBSW), take(cache.v_NBSW)
