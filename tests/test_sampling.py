"""Claims about serving/sampling.py, against probabilities computed by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving import sampling
from serving.sampling import restrict

choose = jax.jit(sampling.choose, static_argnums=(3, 4))
row_keys = jax.jit(sampling.row_keys)


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
    """Little optimization, for this file alone: it compiles more than it computes."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


# softmax of these logits is exactly 0.4, 0.3, 0.2, 0.1, in this shuffled order
P_V = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS_1V = jnp.log(jnp.asarray(P_V, jnp.float32))[None]


def drawn(temperature, top_k, top_p, draws=4000):
    """Frequencies of `draws` independent draws from LOGITS_1V."""
    logits_BV = jnp.repeat(LOGITS_1V, draws, axis=0)
    keys_B = row_keys(7, jnp.arange(draws), jnp.zeros(draws, jnp.int32))
    tokens_B = choose(logits_BV, keys_B, jnp.full(draws, temperature), top_k, top_p)
    return np.bincount(np.asarray(tokens_B), minlength=4) / draws


# 4 standard deviations of a frequency of 4000 draws, sqrt(p (1 - p) / 4000) <= 0.0079
BOUND = 4 * 0.0079


@pytest.mark.parametrize('temperature, top_k, top_p, expected_V', [
    (1.0, 0, 1.0, P_V),                                   # everything
    (0.5, 0, 1.0, P_V**2 / (P_V**2).sum()),               # temperature is an exponent 1/T on probabilities
    (1.0, 2, 1.0, np.array([0, 4, 0, 3]) / 7),            # the two likeliest
    (1.0, 0, 0.6, np.array([0, 4, 0, 3]) / 7),            # 0.4 < 0.6 <= 0.4 + 0.3
    (1.0, 3, 0.5, np.array([0, 4, 0, 3]) / 7),            # top-p among the top three: 4/9 < 0.5 <= 7/9
    (1.0, 3, 0.44, np.array([0, 1, 0, 0])),               # 0.44 <= 4/9; over all four it would take two tokens
    (0.5, 0, 0.52, np.array([0, 1, 0, 0])),               # temperature before top-p: 16/30 >= 0.52
    (1.0, 0, 1e-9, np.array([0, 1, 0, 0])),               # the likeliest token always stays
])
def test_draws_follow_temperature_then_top_k_then_top_p(temperature, top_k, top_p, expected_V):
    """The frequencies are those of the renormalised restricted distribution, in the stated order of operations."""
    np.testing.assert_allclose(drawn(temperature, top_k, top_p), expected_V, atol=BOUND)


def test_restrict_keeps_exactly_the_top_k():
    """Tokens come in descending order of their logits."""
    logits_BC, tokens_BC = restrict(LOGITS_1V, 3, 1.0)
    assert tokens_BC.tolist() == [[1, 3, 2]]
    np.testing.assert_allclose(jnp.exp(logits_BC), [[0.4, 0.3, 0.2]], rtol=1e-6)


def test_temperature_zero_is_argmax_and_does_not_read_the_key():
    """Greedy rows take the first of equal maxima, however close the others, also beside rows that sample."""
    logits_BV = 1e-9 * jnp.array([[0., 3., 3., 1.]] * 4)
    for seed in range(5):
        keys_B = row_keys(seed, jnp.arange(4), jnp.arange(4))
        assert choose(logits_BV, keys_B, jnp.array([0., 0., 9., 9.]), 0, 1.0)[:2].tolist() == [1, 1]
        assert choose(logits_BV, keys_B, jnp.zeros(4), 0, 1.0).tolist() == [1] * 4


def test_a_row_does_not_depend_on_its_neighbours():
    """The same request at the same position draws the same token alone, in another row and beside other rows."""
    logits_BV = jax.random.normal(jax.random.key(0), (8, 50))
    requests_B, positions_B = jnp.arange(8) + 3, jnp.arange(8) % 3
    together_B = choose(logits_BV, row_keys(1, requests_B, positions_B), jnp.ones(8), 10, 0.9)
    backwards_B = choose(logits_BV[::-1], row_keys(1, requests_B[::-1], positions_B[::-1]), jnp.ones(8), 10, 0.9)[::-1]
    alone = [choose(logits_BV[row:row + 1], row_keys(1, requests_B[row:row + 1], positions_B[row:row + 1]),
                    jnp.ones(1), 10, 0.9)[0] for row in range(8)]
    assert together_B.tolist() == backwards_B.tolist() == [int(token) for token in alone]


def test_requests_positions_and_seeds_have_keys_of_their_own():
    """No two of 4 seeds x 16 requests x 16 positions share a key."""
    requests_B, positions_B = (axis.ravel() for axis in jnp.meshgrid(jnp.arange(16), jnp.arange(16)))
    keys = np.concatenate([jax.random.key_data(row_keys(seed, requests_B, positions_B)) for seed in range(4)])
    assert len({tuple(key) for key in keys.tolist()}) == 4 * 16 * 16


def test_tiny_temperature_is_finite():
    """A temperature below the floor acts like the floor: logits do not overflow to equal infinities."""
    logits_BV = jnp.array([[999., 1000.]])
    assert choose(logits_BV, row_keys(0, jnp.arange(1), jnp.arange(1)), jnp.array([1e-37]), 0, 0.9).tolist() == [1]
