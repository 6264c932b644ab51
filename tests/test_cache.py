"""The cache of keys and values: what is written comes back, and nothing else moves."""
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

from model import cache as kv_cache


@pytest.mark.parametrize('length', [1, 16, 40])
def test_slots_are_whole_blocks_of_the_kernel_before_and_after_growing(length):
    """A multiple of 16 slots and of 128 numbers a slot; growing keeps what is there, and never shrinks."""
    cache = kv_cache.init_cache(TINY, 2, length, jnp.bfloat16)
    assert cache.k_NBSW.shape == (3, 2, -(-length // 16) * 16, 128) and cache.v_NBSW.shape == cache.k_NBSW.shape
    filled = kv_cache.Cache(cache.k_NBSW + 1, cache.v_NBSW + 2)
    longer = kv_cache.longer(filled, length + 9)
    slots = filled.k_NBSW.shape[2]
    assert longer.k_NBSW.shape[2] % 16 == 0 and longer.k_NBSW.shape[2] >= length + 9
    np.testing.assert_array_equal(longer.v_NBSW[:, :, :slots], filled.v_NBSW)
    assert not longer.v_NBSW[:, :, slots:].any() and kv_cache.longer(longer, 1).k_NBSW.shape == longer.k_NBSW.shape


def test_tokens_go_to_the_slots_of_their_positions_in_one_layer_only():
    """Two rows at different places: read gives back what was written, other slots and layers stay zero."""
    new_BTKD = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype(np.float32)
    positions_BT = jnp.array([[0, 1, 2], [5, 6, 7]], jnp.int32)
    cache = kv_cache.write(kv_cache.init_cache(TINY, 2, 16, jnp.float32), 1, positions_BT, new_BTKD, -new_BTKD)
    expected_BSKD = np.zeros((2, 16, 2, 8), np.float32)
    expected_BSKD[0, :3], expected_BSKD[1, 5:8] = new_BTKD
    k_BSKD, v_BSKD = kv_cache.read(cache, 1, 2, 8)
    np.testing.assert_array_equal(k_BSKD, expected_BSKD)
    np.testing.assert_array_equal(v_BSKD, -expected_BSKD)
    assert not cache.k_NBSW[0].any() and not cache.k_NBSW[2].any()
