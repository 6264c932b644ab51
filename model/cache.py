"""The key/value cache of decoding: one row per sequence, one slot per position.

Row b holds its tokens from slot 0 on, so the key in slot s has position s, and a query at position p sees exactly the
slots s <= p.  What lies in later slots (padding of a shorter prompt, or leftovers) is never seen, and decoding
overwrites it.
"""
import jax
import jax.numpy as jnp
from jax import lax

from model.config import LlamaConfig
from model.partition import pytree


@pytree
class Cache:
    """Keys and values after rotary embedding; K is the local number of key/value heads inside shard_map."""

    k_NBSKD: jax.Array
    v_NBSKD: jax.Array


def init_cache(config: LlamaConfig, batch: int, length: int, dtype, mp: int = 1) -> Cache:
    """An empty cache of `batch` rows and `length` slots, for one device of `mp` (at least one key/value head each)."""
    heads = max(1, config.num_key_value_heads // mp)
    shape = (config.num_hidden_layers, batch, length, heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache: Cache, layer: jax.Array, positions_BT: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array) -> Cache:
    """The cache with T consecutive new keys and values of one layer, row b's starting at slot positions_BT[b, 0]."""

    def put(slots_BSKD, new_BTKD):
        rows = jax.vmap(lambda slots, new, start: lax.dynamic_update_slice(slots, new, (start, 0, 0)))(
            lax.dynamic_index_in_dim(slots_BSKD, layer, keepdims=False), new_BTKD.astype(slots_BSKD.dtype),
            positions_BT[:, 0])
        return lax.dynamic_update_index_in_dim(slots_BSKD, rows, layer, 0)

    return Cache(put(cache.k_NBSKD, k_BTKD), put(cache.v_NBSKD, v_BTKD))


def read(cache: Cache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k_BSKD, v_BSKD of one layer."""
    return (lax.dynamic_index_in_dim(cache.k_NBSKD, layer, keepdims=False),
            lax.dynamic_index_in_dim(cache.v_NBSKD, layer, keepdims=False))
