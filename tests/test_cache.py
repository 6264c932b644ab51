"""The cache of keys and values: what is written comes back, and nothing else moves."""
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

from model import cache as kv_cache


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.int8])
def test_rows_are_whole_blocks_of_the_kernels(dtype):
    """A multiple of 128 places and of 128 numbers a place; an int8 cache has a factor for each head and place."""
    for length, places in ((1, 128), (128, 128), (129, 256)):
        cache = kv_cache.init_cache(TINY, 2, length, dtype)
        assert cache.k_NBSW.shape == cache.v_NBSW.shape == (3, 2, places, 128) and cache.k_NBSW.dtype == dtype
        assert dtype != jnp.int8 or cache.factors_NBCKS.shape == (3, 2, 2, 2, places)


@pytest.mark.parametrize('dtype, within', [(jnp.float32, 0), (jnp.int8, 0.01)])
@pytest.mark.parametrize('unrolled', [0, 16])
def test_tokens_go_to_their_places_in_one_layer_only(monkeypatch, dtype, within, unrolled):
    """Three pieces, two of them of row 2: read gives back what was written (int8: to 1 % of the largest), other places,
    rows and layers stay zero; a piece without work (start -1) goes to the row's end."""
    monkeypatch.setattr(kv_cache, 'UNROLLED', unrolled)
    new_BTKD = np.random.default_rng(0).normal(size=(4, 3, 2, 8)).astype(np.float32)
    rows, starts = jnp.array([2, 0, 2, 1]), jnp.array([5, 0, 8, -1])
    cache = kv_cache.write(kv_cache.init_cache(TINY, 3, 100, dtype), 1, rows, starts, new_BTKD, -new_BTKD)
    expected_BSKD = np.zeros((3, 128, 2, 8), np.float32)
    expected_BSKD[2, 5:8], expected_BSKD[0, :3], expected_BSKD[2, 8:11], expected_BSKD[1, 125:] = new_BTKD
    k_BSKD, v_BSKD = kv_cache.read(cache, 1, None, 0, 128, 2, 8)
    np.testing.assert_allclose(k_BSKD, expected_BSKD, atol=within * 3)
    np.testing.assert_allclose(v_BSKD, -expected_BSKD, atol=within * 3)
    some, _ = kv_cache.read(cache, 1, jnp.array([2, 2]), 4, 6, 2, 8)
    np.testing.assert_array_equal(some, np.stack([k_BSKD[2, 4:10]] * 2))
    assert not cache.k_NBSW[0].any() and not cache.k_NBSW[2].any()
