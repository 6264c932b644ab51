"""--attention=pallas in the whole network: the TPU kernels, interpreted, give what the reference gives."""
import dataclasses

import jax
import numpy as np
import pytest
from helpers import QUICK, TINY

from data.batches import Batch
from data.tokenizer import load_tokenizer
from model import attention
from model.config import Compute
from model.partition import make_mesh
from model.weights import abstract_params, init_params
from serving.engine import Engine
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
    """Greedy answers of the engine, prompts of unequal length and a cache that grows, and scores to 1e-4 nats."""
    tokenizer = load_tokenizer(golden / 'easylm/tokenizer.model')
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size, max_sequence_length=128)
    params = init_params(config, mesh(mp), 5)
    prompts = ['the film', 'the dialogue holds together beautifully although the film has nothing to say']

    def answers(name):
        engine = Engine(params, config, Compute(attention=name), tokenizer, mesh(mp), batch_size=2, input_length=32,
                        seq_length=40)
        return ([answer.token_ids for answer in engine.generate(prompts, 0.0)],
                [score for score, _ in engine.loglikelihood(prompts, ['a fine film', 'nothing'])])

    (tokens, scores), (expected_tokens, expected_scores) = answers('pallas'), answers('reference')
    assert tokens == expected_tokens and len(tokens[0]) == 8
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-4)


def test_names_choose_and_nothing_falls_back(monkeypatch):
    """Empty is pallas on a TPU and reference elsewhere; an unknown name is refused; several tokens into a cache too."""
    assert attention.resolve('') == 'reference' and attention.resolve('pallas') == 'pallas'
    monkeypatch.setattr(attention, 'on_tpu', lambda: True)
    assert attention.resolve('') == 'pallas' and attention.resolve('reference') == 'reference'
    with pytest.raises(ValueError, match="attention='flash' is not implemented: use one of reference pallas"):
        attention.resolve('flash')
    q = np.zeros((1, 3, 2, 64), np.float32)
    with pytest.raises(ValueError, match="attention='pallas' continues a cache one token at a time, not by T=3"):
        attention.attend_cached('pallas', q, q, q, None, 0, None, from_start=False)
