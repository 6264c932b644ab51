"""Make caches in the layout of kernels/decode_attention.py, for benches and tests (a server has model/cache.py)."""
import jax
import jax.numpy as jnp

from kernels.decode_attention import LANES, cache_width, tile_rows


def make_cache(x_BSKD) -> jax.Array:
    """Make [1, B, slots, W] of one layer's keys or values; added slots and lanes hold zeros."""
    B, S, K, D = x_BSKD.shape
    rows = LANES if x_BSKD.dtype == jnp.int8 else tile_rows(x_BSKD.dtype)
    return jnp.pad(x_BSKD.reshape(1, B, S, K * D), ((0, 0), (0, 0), (0, -S % rows), (0, cache_width(K, D) - K * D)))


def make_pages(k_BSKD, v_BSKD, table_BP, page: int) -> jax.Array:
    """Make a pool [1, pages, 2, page, W] with a page more than the table names, which holds zeros."""
    both = jnp.stack([make_cache(x)[0].reshape(table_BP.size, page, -1) for x in (k_BSKD, v_BSKD)], axis=1)
    pool = jnp.zeros((1, table_BP.size + 1, *both.shape[1:]), both.dtype)
    return pool.at[0, table_BP.reshape(-1)].set(both)


def quantize(x_BSKD) -> tuple[jax.Array, jax.Array]:
    """Round to int8 numbers and float32 factors_BKS: the largest of a slot's head becomes 127."""
    factors_BSK = jnp.maximum(jnp.abs(x_BSKD.astype(jnp.float32)).max(-1), 1e-30) / 127
    return jnp.round(x_BSKD / factors_BSK[..., None]).astype(jnp.int8), factors_BSK.swapaxes(1, 2)
