"""--attention=pallas in the whole network: the TPU kernels, interpreted, give what the reference gives."""
import dataclasses

import jax
import numpy as np
import pytest
from helpers import QUICK, TINY, Asker

from data.batches import Batch
from data.tokenizer import load_tokenizer
from kernels import blockwise, reference
from model import attention
from model.config import Compute
from model.partition import make_mesh
from model.weights import abstract_params, init_params
from training import loop, step
from training.optimizer import AdamW
from training.state import init_state

HYPER = AdamW(lr=1e-3, end_lr=1e-3, lr_warmup_steps=0, lr_decay_steps=10, multiply_by_parameter_scale=True)
SMALL = dataclasses.replace(TINY, num_hidden_layers=2)


def mesh(mp: int):
    return make_mesh(f'1,1,{mp}', jax.devices()[:mp])


def batch(T: int) -> Batch:
    """Two rows of T tokens: one of two packed examples, one with padding at its end."""
    tokens_BT = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, T)).astype(np.int32)
    segments_BT = np.array([[1] * (T // 3) + [2] * (T - T // 3), [1] * (T - 5) + [0] * 5], np.int32)
    loss_mask_BT = (segments_BT > 0).astype(np.float32)
    return Batch(tokens_BT, segments_BT, None, np.roll(tokens_BT, -1, 1), loss_mask_BT, np.ones(2, np.float32))


@pytest.mark.parametrize('mp', [1, 4])
def test_a_training_step_with_pallas_equals_the_reference(mp):
    """Loss, norms and every updated weight to 1e-5, with heads split over mp, packed segments and padding; with mp=4
    two devices share a key/value head.
    """
    def after_one_step(name):
        params = init_params(SMALL, mesh(mp), 3)
        state, rows = init_state(params, SMALL, HYPER, 1, mesh(mp)), loop.put(batch(24), mesh(mp))
        jitted = step.make_train_step(SMALL, Compute(attention=name), HYPER, 1, mesh(mp))
        return jitted.lower(state, rows).compile(compiler_options=QUICK)(state, rows)

    (state, metrics), (expected_state, expected) = after_one_step('pallas'), after_one_step('reference')
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_training_step_with_pallas_runs_the_kernels():
    """The step's program calls a Pallas kernel under that name, and none under the other."""
    for name, kernels in (('pallas', True), ('reference', False)):
        function = step.make_train_step(SMALL, Compute(attention=name), HYPER, 1, mesh(1))
        state = jax.eval_shape(lambda params: init_state(params, SMALL, HYPER, 1, mesh(1)),
                               abstract_params(SMALL, mesh(1)))
        text = str(jax.make_jaxpr(function)(state, batch(24)))
        assert ('pallas_call' in text) == kernels


@pytest.mark.parametrize('mp', [2])
def test_decoding_with_pallas_gives_the_tokens_of_the_reference(golden, mp):
    """Greedy answers of the engine, prompts of unequal length, and scores to 1e-4 nats."""
    tokenizer = load_tokenizer(golden / 'easylm/tokenizer.model')
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size, max_sequence_length=128)
    params = init_params(config, mesh(mp), 5)
    prompts = ['the film', 'the dialogue holds together beautifully although the film has nothing to say']

    def answers(name):
        asker = Asker(params, config, Compute(attention=name), tokenizer, mesh(mp), batch_size=2, input_length=32,
                      seq_length=40)
        return asker.tokens(0.0, prompts, 8), [score for score, _ in asker.loglikelihood(
            prompts, ['a fine film', 'nothing'])]

    (tokens, scores), (expected_tokens, expected_scores) = answers('pallas'), answers('reference')
    assert tokens == expected_tokens and len(tokens[0]) == 8
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-4)


def test_names_choose_and_nothing_falls_back(monkeypatch):
    """Empty is pallas on a TPU and reference elsewhere; an unknown name is refused."""
    assert attention.resolve('') == 'reference' and attention.resolve('pallas') == 'pallas'
    monkeypatch.setattr(attention, 'on_tpu', lambda: True)
    assert attention.resolve('') == 'pallas' and attention.resolve('reference') == 'reference'
    with pytest.raises(ValueError, match="attention='flash' is not implemented: use one of reference pallas"):
        attention.resolve('flash')


@pytest.mark.parametrize('T', [1, 5])
def test_attention_over_a_cache_is_that_of_the_definition(T):
    """Rows at positions up to 300 of 384, more than two blocks: within 2e-6 of kernels/reference.py; numbers past a
    row's last position, NaN here, are never used; a row's result does not change with its neighbours' lengths."""
    random, B, S, H, K, D = np.random.default_rng(0), 4, 384, 6, 2, 16
    q, k, v = (random.normal(size=shape).astype(np.float32) for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, D)))
    positions_BT = np.array([[0], [127], [128], [300]]) + np.arange(T)[None]
    slots_BS, ones = np.tile(np.arange(S), (B, 1)), np.ones
    expected = reference.attention(q, k, v, scale=0.25, query_positions_BT=positions_BT, key_positions_BS=slots_BS,
                                   query_segments_BT=ones((B, T), int), key_segments_BS=ones((B, S), int))
    hidden_BS = slots_BS > positions_BT[:, -1:]
    k[hidden_BS], v[hidden_BS] = np.nan, np.nan

    def found(rows):
        read = lambda start, count: (jax.lax.dynamic_slice_in_dim(k[rows], start, count, 1),
                                     jax.lax.dynamic_slice_in_dim(v[rows], start, count, 1))
        return jax.jit(lambda q: blockwise.cached_attention(q, read, positions_BT[rows], scale=0.25, kv_heads=K))(
            q[rows])

    together = found(slice(0, 4))
    np.testing.assert_allclose(together, expected, atol=2e-6)
    np.testing.assert_allclose(found(slice(0, 2)), together[:2], atol=1e-6)
