"""Claims about serving/sampling.py, against probabilities computed by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving import sampling
from serving.sampling import FEW, Choice

choose = jax.jit(sampling.choose)
restrict = jax.jit(sampling.restrict, static_argnums=2)
row_keys = jax.jit(sampling.row_keys)


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
    """Little optimization, for this file alone: it compiles more than it computes."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


def choice(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, position=None, listed=(-1,), bias=(0.0,),
           only=False):
    """Choice of `rows` rows; each argument is one value (of listed and bias: one list) for all, or one a row."""
    spread = lambda x, kind, *rest: jnp.broadcast_to(jnp.asarray(x, kind), (rows, *rest))
    A = np.shape(listed)[-1]
    return Choice(spread(temperature, np.float32), spread(top_k, np.int32), spread(top_p, np.float32),
                  spread(min_p, np.float32), spread(seed, np.uint32),
                  spread(np.arange(rows) if position is None else position, np.int32),
                  spread(listed, np.int32, A), spread(bias, np.float32, A), spread(only, bool))


def part(choice, rows):
    """Some rows of a Choice."""
    return jax.tree.map(lambda x: x[rows], choice)


# softmax of these logits is exactly 0.4, 0.3, 0.2, 0.1, in this shuffled order
P_V = np.array([0.1, 0.4, 0.2, 0.3])
DRAWS = 4000
BOUND = 4 * 0.0079  # 4 standard deviations of a frequency of 4000 draws, sqrt(p (1 - p) / 4000) <= 0.0079


def frequencies(logits_V, **asked):
    """Frequencies of 4000 draws of one seed, at positions 0 to 3999."""
    logits_RV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (DRAWS, len(logits_V)))
    return np.bincount(np.asarray(choose(logits_RV, choice(DRAWS, **asked))), minlength=len(logits_V)) / DRAWS


def after(*weights):
    return np.array(weights) / sum(weights)


@pytest.mark.parametrize('wide', [False, True])
@pytest.mark.parametrize('asked, expected_V', [
    (dict(), P_V),                                           # everything
    (dict(temperature=0.5), after(*P_V**2)),                 # temperature is an exponent 1/T on probabilities
    (dict(top_k=2), after(0, 4, 0, 3)),                      # the two likeliest
    (dict(top_k=1), after(0, 1, 0, 0)),
    (dict(top_k=1000), P_V),                                 # more than there are
    (dict(top_p=0.6), after(0, 4, 0, 3)),                    # 0.4 < 0.6 <= 0.4 + 0.3
    (dict(top_k=3, top_p=0.5), after(0, 4, 0, 3)),           # top-p among the top three: 4/9 < 0.5 <= 7/9
    (dict(top_k=3, top_p=0.44), after(0, 1, 0, 0)),          # 0.44 <= 4/9; over all four it would take two tokens
    (dict(temperature=0.5, top_p=0.52), after(0, 1, 0, 0)),  # temperature before top-p: 16/30 >= 0.52
    (dict(top_p=1e-9), after(0, 1, 0, 0)),                   # the likeliest token always stays
    (dict(min_p=0.45), after(0, 4, 2, 3)),                   # 0.1 < 0.45 * 0.4 <= 0.2
    (dict(min_p=0.7), after(0, 4, 0, 3)),                    # 0.3 >= 0.7 * 0.4 = 0.28
    (dict(min_p=1.0), after(0, 1, 0, 0)),
    (dict(temperature=2.0, min_p=0.55), after(0, 4**0.5, 2**0.5, 3**0.5)),  # of the tempered: 0.5^(1/2) = 0.71
    (dict(top_k=3, min_p=0.2), after(0, 4, 2, 3)),           # both hold
    (dict(listed=(2,), bias=(np.log(6.0),)), after(1, 4, 12, 3)),
    (dict(listed=(2, 1), bias=(np.log(6.0), -1e9), top_k=2), after(0, 0, 12, 3)),  # bias before the filters
    (dict(listed=(2,), bias=(np.log(6.0),), temperature=0.5), after(1, 16, 144, 9)),  # and before the temperature
    (dict(listed=(0, 2, -1), bias=(0.0,) * 3, only=True), after(1, 0, 2, 0)),
    (dict(listed=(0, 2, 3), bias=(0.0,) * 3, only=True, top_k=2), after(0, 0, 2, 3)),
    (dict(listed=(0,), bias=(0.0,), only=True, min_p=1.0, top_p=0.1), after(1, 0, 0, 0)),
    (dict(only=[False] * DRAWS, listed=(0, 2), bias=(0.0,) * 2), P_V),  # listing alone forbids nothing
])
def test_draws_follow_bias_temperature_top_k_top_p_min_p(asked, expected_V, wide):
    """The frequencies are those of the renormalised restricted distribution, in the stated order of operations; also
    where the vocabulary is wide (300 ids no one would draw), so that few of many are looked at."""
    logits_V = np.log(P_V)
    if wide:
        logits_V = np.concatenate([logits_V, np.full(300, -60.0)])
        expected_V = np.concatenate([expected_V, np.zeros(300)])
    found_V = frequencies(logits_V, **asked)
    np.testing.assert_allclose(found_V, expected_V, atol=BOUND)
    assert (found_V[expected_V == 0] == 0).all()


def test_draws_of_many_ids_have_their_probabilities():
    """Chi-square over 40 ids, 39 degrees of freedom: below 88 but once in a hundred thousand seeds."""
    logits_V = np.asarray(jax.random.normal(jax.random.key(0), (40,)))
    for asked in (dict(), dict(temperature=0.7, seed=8), dict(temperature=1.5, seed=9)):
        expected_V = DRAWS * np.asarray(jax.nn.softmax(logits_V / asked.get('temperature', 1.0)))
        found_V = DRAWS * frequencies(logits_V, **asked)
        assert ((found_V - expected_V) ** 2 / expected_V).sum() < 88


@pytest.mark.parametrize('sort', [4, 8])
def test_exactly_the_top_k_stay_and_of_equals_the_smaller_ids(sort):
    """Whatever ties there are at the edge, and when all are equal; k = 0 keeps all.  Also where no more than the 4
    largest are sorted."""
    logits_RV = jnp.array([[5., 1., 5., 3., 3., 3., 0., 3.], [2.] * 8, [0., 1., 2., 3., 4., 5., 6., 7.]])
    for k, kept in ((1, ([0], [0], [7])), (2, ([0, 2], [0, 1], [6, 7])), (3, ([0, 2, 3], [0, 1, 2], [5, 6, 7])),
                    (4, ([0, 2, 3, 4], [0, 1, 2, 3], [4, 5, 6, 7])), (0, (list(range(8)),) * 3)):
        found_RV = restrict(logits_RV, choice(3, top_k=k), sort)
        assert [np.flatnonzero(np.isfinite(row)).tolist() for row in found_RV] == list(kept)
        np.testing.assert_array_equal(found_RV, jnp.where(jnp.isfinite(found_RV), logits_RV, -jnp.inf))


def test_of_equals_at_the_edge_of_top_p_the_smaller_ids_stay():
    """Four equal tokens: 0.5 takes two, a little more takes three."""
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.51, 3), (0.76, 4), (1.0, 4)):
        found_1V = restrict(jnp.zeros((1, 4)), choice(1, top_p=top_p), 4)
        assert np.isfinite(found_1V[0]).tolist() == [True] * kept + [False] * (4 - kept)


def test_min_p_keeps_what_is_just_at_the_floor():
    """p >= min_p * max p: a token with half the likeliest's probability stays at 0.5 and goes above."""
    logits_1V = jnp.array([[1.0, 0.5, 0.0]]) * 2 * np.log(2.0)  # 1 : 1/2 : 1/4
    for min_p, kept in ((0.0, 3), (0.25 - 1e-4, 3), (0.25 + 1e-4, 2), (0.5 - 1e-4, 2), (0.5 + 1e-4, 1), (1.0, 1)):
        assert np.isfinite(restrict(logits_1V, choice(1, min_p=min_p), 3)).sum() == kept


def test_temperature_zero_is_argmax_and_does_not_read_the_seed():
    """Greedy rows take the first of equal maxima, however close the others, also beside rows that draw; filters change
    nothing, biases and `only` do."""
    logits_RV = 1e-9 * jnp.array([[0., 3., 3., 1.]] * 4)
    for seed in range(5):
        for filters in (dict(), dict(top_k=3, top_p=0.5, min_p=0.1)):
            mixed = choose(logits_RV, choice(4, temperature=[0., 0., 9., 9.], seed=seed, **filters))
            assert mixed[:2].tolist() == [1, 1]
            assert choose(logits_RV, choice(4, temperature=0., seed=seed, **filters)).tolist() == [1] * 4
    listed = dict(temperature=0., listed=[[3, -1], [3, 0], [3, 0], [-1, -1]], bias=[[1., 0.], [0., 0.], [-1., 0.],
                                                                                      [1., 1.]])
    assert choose(logits_RV, choice(4, only=[False, True, True, False], **listed)).tolist() == [3, 3, 0, 1]


def test_a_row_does_not_depend_on_its_neighbours():
    """The same seed at the same position draws the same token alone, in another row, beside greedy rows, rows with
    biases, and rows that need the whole vocabulary sorted where this one needs few of it."""
    V = 3 * FEW
    logits_RV = 3 * jax.random.normal(jax.random.key(0), (12, V))
    rows = np.arange(12)
    asked = choice(12, temperature=[1., 1., 0., 2., 1., .5] * 2, top_k=[10, 50, 0, 0, 2 * FEW, FEW] * 2,
                   top_p=[.9, 1., 1., .8, .95, .7] * 2, min_p=[0, .01] * 6, seed=rows % 3 + 3, position=rows % 5,
                   listed=[[4, 9], [-1, -1]] * 6, bias=[[2., -2.], [0., 0.]] * 6)
    together_R = choose(logits_RV, asked)
    assert choose(logits_RV[::-1], part(asked, rows[::-1]))[::-1].tolist() == together_R.tolist()
    alone = [int(choose(logits_RV[row:row + 1], part(asked, rows[row:row + 1]))[0]) for row in rows]
    assert alone == together_R.tolist()
    for kept in ([0, 1], [0, 5, 6, 11], [2, 8]):  # no row that draws of the whole vocabulary, none at all
        kept = np.array(kept)
        assert choose(logits_RV[kept], part(asked, kept)).tolist() == together_R[kept].tolist()


def test_what_is_drawn_does_not_depend_on_how_many_are_sorted():
    """200 rows of a wide vocabulary by top-k 20 and top-p 0.9, without and with a neighbour that needs all of it."""
    logits_RV = 3 * jax.random.normal(jax.random.key(1), (201, 2 * FEW))
    asked = dict(top_p=.9, seed=5)
    few_R = choose(logits_RV, choice(201, top_k=20, **asked))
    wide_R = choose(logits_RV, choice(201, top_k=[20] * 200 + [0], **asked))
    assert few_R[:200].tolist() == wide_R[:200].tolist() and len(set(few_R.tolist())) > 50
    exact_RV = restrict(logits_RV, choice(201, top_k=[FEW] * 201, top_p=.9), 2 * FEW)
    np.testing.assert_array_equal(restrict(logits_RV, choice(201, top_k=[FEW] * 201, top_p=.9), FEW), exact_RV)


def test_seeds_and_positions_have_keys_of_their_own():
    """No two of 64 seeds x 64 positions share a key; the largest seed is one too."""
    seeds_R, positions_R = (axis.ravel() for axis in np.meshgrid(np.arange(64), np.arange(64)))
    seeds_R = np.where(seeds_R == 63, 2**32 - 1, seeds_R).astype(np.uint32)
    keys = np.asarray(jax.random.key_data(row_keys(seeds_R, positions_R.astype(np.int32))))
    assert len({tuple(key) for key in keys.tolist()}) == 64 * 64


def test_a_tiny_temperature_is_finite():
    """A temperature below the floor acts like the floor: logits do not overflow to equal infinities."""
    for temperature in (1e-37, 1e-8, 1e-3):
        for filters in (dict(), dict(top_p=.9), dict(top_k=1), dict(min_p=.5), dict(top_k=2, top_p=.5, min_p=.1)):
            found = choose(jnp.array([[999., 1000., 998.]] * 2), choice(2, temperature=temperature, **filters))
            assert found.tolist() == [1, 1]


def test_ids_that_are_hidden_never_come_out():
    """-inf for what the tokenizer does not know: hot draws and filters leave it out."""
    logits_RV = jnp.broadcast_to(jnp.where(jnp.arange(300) < 4, 0.0, -jnp.inf), (200, 300))
    for filters in (dict(), dict(top_k=200), dict(top_p=.999)):
        assert set(choose(logits_RV, choice(200, temperature=100., **filters)).tolist()) == {0, 1, 2, 3}


def test_filters_that_keep_more_than_few_keep_them_all():
    """300 equal tokens: top-k 200 draws of the first 200 and top-p 0.9 of the first 270, not of the first 128."""
    for filters, kept in ((dict(top_k=200), 200), (dict(top_p=.8999), 270)):
        found = choose(jnp.zeros((2000, 300)), choice(2000, **filters)).tolist()
        assert FEW < kept - 10 < max(found) < kept
