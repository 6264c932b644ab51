"""The network against transformers and EasyLM, and the properties that make it a causal, packed, grouped-query
LLaMA.
"""
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, greedy, logits, on_mesh, one_device
from jax.sharding import PartitionSpec

import checkpoint
from checkpoint.formats import easylm
from checkpoint.formats.reading import half_split_from_interleaved
from model import llama, loss
from model.config import MODELS, Compute, LlamaConfig
from model.partition import BATCH, make_mesh
from model.remat import remat_policy
from model.weights import by_name, init_params, partitions, weight_specs

HUGGINGFACE = ('mha_untied', 'gqa_tied', 'llama31_rope', 'head_dim_100')


def assert_close(actual, expected, fraction, what=''):
    """|actual - expected| <= fraction * max |expected|."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=fraction * np.abs(expected).max(), err_msg=what)


def open_huggingface(golden, case):
    spec = f'hf::{golden}/huggingface/{case}'
    source = checkpoint.open(spec)
    params = source.load_params(source.config, one_device())
    return source.config, params, np.load(golden / f'huggingface/{case}/golden.npz')


@pytest.mark.parametrize('case', HUGGINGFACE)
def test_logits_and_loss_equal_transformers(golden, case):
    """Within 1e-4 of the largest |logit| of transformers 5.23 in float32; the mean cross entropy within 1e-5."""
    config, params, expected = open_huggingface(golden, case)
    tokens = expected['tokens'].astype(np.int32)
    z = logits(params, config, tokens)
    assert_close(z, expected['logits'], 1e-4)
    log_p = jax.nn.log_softmax(z[:, :-1], axis=-1)
    mean = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(mean, expected['loss'], rtol=1e-5)


@pytest.mark.parametrize('case', HUGGINGFACE)
def test_greedy_decoding_through_the_cache_equals_transformers(golden, case):
    """Every token that transformers generates after the prompt (24, or fewer up to its end token, after which it
    pads).
    """
    config, params, expected = open_huggingface(golden, case)
    prompt = int(expected['prompt_length'])
    tokens = greedy(params, config, expected['greedy'][:, :prompt].astype(np.int32), 24)
    for ours, theirs in zip(tokens.tolist(), expected['greedy'][:, prompt:].tolist(), strict=True):
        end = theirs.index(config.eos_token_id) + 1 if config.eos_token_id in theirs else len(theirs)
        assert end > 8 and ours[:end] == theirs[:end]


def test_logits_loss_and_gradients_equal_easylm(golden):
    """EasyLM's network, loss (mean over rows of row means) and every gradient, within 1e-4 of its largest element."""
    config = LlamaConfig(**json.loads((golden / 'easylm/model.json').read_text()))
    path = golden / 'easylm/streaming_params_fp32'
    params = checkpoint.open(f'params::{path}').load_params(config, one_device())
    expected = np.load(golden / 'easylm/model.npz')
    inputs, targets = expected['tokens'][:, :-1], expected['tokens'][:, 1:]
    assert_close(logits(params, config, inputs), expected['logits'], 1e-4)

    def value_and_grad(params, inputs_BT, targets_BT, mask_BT):
        def mean_loss(params):
            h_BTM, _ = llama.hidden_states(params, inputs_BT, jnp.ones_like(inputs_BT), config, Compute())
            nll_BT, correct_BT = loss.token_cross_entropy(params, h_BTM, targets_BT, Compute())
            return loss.row_mean_loss(nll_BT, correct_BT, mask_BT, jnp.ones_like(mask_BT[:, 0]))[0]
        return jax.value_and_grad(mean_loss)(params)

    outputs = (PartitionSpec(), partitions(config))
    run = on_mesh(value_and_grad, config, one_device(), outputs)
    value, grads = run(params, inputs, targets, expected['loss_mask'])
    np.testing.assert_allclose(value, expected['loss'], rtol=1e-5)
    for name, grad in by_name(grads, config, 'grad').items():
        weight = name.removeprefix('grad.')
        for layer in range(config.num_hidden_layers) if weight.startswith('layers.') else [None]:
            theirs = expected['grad/' + easylm.NAMES[weight].format(layer)]
            if weight in ('layers.w_q', 'layers.w_k'):
                theirs = half_split_from_interleaved(theirs, config.head_dim)
            theirs = theirs.T if weight == 'head' else theirs
            assert_close(grad if layer is None else grad[layer], theirs, 1e-4, f'{weight} {layer}')


def test_logits_at_t_ignore_tokens_after_t():
    """Changing token t + 1 leaves the logits at 0..t bitwise as they were, and changes those at t + 1."""
    params = init_params(TINY, one_device(), 0)
    tokens = np.arange(24, dtype=np.int32)[None] * 7 % 256
    changed = tokens.copy()
    changed[0, 12] = 200
    a, b = logits(params, TINY, tokens), logits(params, TINY, changed)
    np.testing.assert_array_equal(a[:, :12], b[:, :12])
    assert np.abs(a[:, 12] - b[:, 12]).max() > 1e-3


def test_rope_scores_depend_on_relative_position_only():
    """<rotate(q, p), rotate(k, s)> is the same for (p, s) and (p + 9, s + 9), and another for (p + 1, s)."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    config = dataclasses.replace(TINY, head_dim=8)
    at = lambda x, p: llama.rotate(x, llama.rope_table(jnp.full((1, 1), p), config))
    score = lambda p, s: float((at(q, p) * at(k, s)).sum())
    assert score(14, 5) == pytest.approx(score(5 + 9 + 9, 5 + 9), abs=1e-5)
    assert abs(score(15, 5) - score(14, 5)) > 1e-3


def test_gqa_equals_mha_with_repeated_kv():
    """Two key/value heads read by four query heads each give what eight equal copies give."""
    params = init_params(TINY, one_device(), 1)
    repeat = lambda w: jnp.repeat(w.reshape(3, 64, 2, 8), 4, axis=2).reshape(3, 64, 64)
    layers = dataclasses.replace(params.layers, w_k=repeat(params.layers.w_k), w_v=repeat(params.layers.w_v))
    wide = dataclasses.replace(params, layers=layers)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    expected = logits(params, TINY, tokens)
    assert_close(logits(wide, dataclasses.replace(TINY, num_key_value_heads=8), tokens), expected, 1e-6)


def test_initial_loss_is_near_log_vocab():
    """Small random weights predict almost uniformly: |mean cross entropy - log 256| < 0.05."""
    params = init_params(TINY, one_device(), 2)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 33)).astype(np.int32)
    log_p = jax.nn.log_softmax(logits(params, TINY, tokens[:, :-1]), axis=-1)
    mean = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], axis=-1).mean()
    assert abs(mean - np.log(256)) < 0.05


def test_packed_segments_equal_separate_sequences():
    """Two sequences in one row, kept apart by segments, have the logits that each has alone; padding changes
    nothing.
    """
    params = init_params(TINY, one_device(), 3)
    a, b = np.arange(10, 20, dtype=np.int32)[None], np.arange(100, 107, dtype=np.int32)[None]
    packed = np.concatenate([a, b, np.zeros((1, 3), np.int32)], axis=1)
    segments = np.array([[1] * 10 + [2] * 7 + [0] * 3], np.int32)
    z = logits(params, TINY, packed, segments_BT=segments)
    assert_close(z[:, :10], logits(params, TINY, a), 1e-6)
    assert_close(z[:, 10:17], logits(params, TINY, b), 1e-5)  # rotated by 10 positions more: only reassociation differs


def test_bf16_compute_stays_near_float32():
    """bfloat16 has 8 bits: the logits of three layers stay within 2 % of the largest |logit|, and are float32."""
    params = init_params(TINY, one_device(), 4)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    z = logits(params, TINY, tokens, compute=Compute(dtype='bf16'))
    assert z.dtype == jnp.float32
    assert_close(z, logits(params, TINY, tokens), 0.02)


def test_remat_changes_no_gradient():
    """What is recomputed is what was computed: gradients with a layer, or its attention and its ffn, recomputed
    equal those without, to reassociation; nothing_saveable makes the backward pass compute products again, of which
    save:gate,up saves two.
    """
    params = init_params(TINY, one_device(), 5)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)

    def gradient(**remat):
        def call(params, tokens_BT):
            def mean(params):
                h, _ = llama.hidden_states(params, tokens_BT, jnp.ones_like(tokens_BT), TINY, Compute(**remat))
                return jax.lax.psum(h.sum(), ('dp', 'fsdp', 'mp'))
            return jax.grad(mean)(params)
        compiled = on_mesh(call, TINY, one_device(), partitions(TINY)).lower(params, tokens)
        return compiled.compile()(params, tokens), compiled.as_text().count('dot_general')

    plain, products = gradient()
    counts = {}
    for name, remat in dict(nothing=dict(remat_block='nothing_saveable'), dots=dict(remat_block='checkpoint_dots'),
                            all=dict(remat_block='everything_saveable'), ffn=dict(remat_block='save:gate,up'),
                            parts=dict(remat_attention='nothing_saveable', remat_mlp='nothing_saveable')).items():
        gradients, counts[name] = gradient(**remat)
        jax.tree.map(lambda a, b: assert_close(b, a, 1e-5), plain, gradients)
    assert counts['nothing'] - 2 == counts['ffn'] > products == counts['all'] < counts['parts']


def test_a_remat_policy_that_is_not_known_is_refused_with_those_that_are():
    for policy in ('some', 'save:', 'save:q,gates', 'q,k'):
        with pytest.raises(ValueError, match=f'{policy=} is not known.*nothing_saveable.*attention_input,q,k,v'):
            remat_policy(policy)


@pytest.mark.parametrize('mesh_dim, smoothing', [('1,1,1', 0.0), ('1,2,4', 0.0), ('1,1,1', 0.1), ('1,2,4', 0.1)])
def test_cross_entropy_in_chunks_of_the_vocabulary_is_the_textbook_one(monkeypatch, mesh_dim, smoothing):
    """-sum of q log softmax, q = (1 - e) onehot + e / V, and JAX's own gradients of it, whole and in chunks of 3/8 of a
    device's vocabulary (so that the last begins early); the likeliest token is counted as correct.  To 1e-5 of the
    largest element.
    """
    mesh = make_mesh(mesh_dim, jax.devices()[:math.prod(map(int, mesh_dim.split(',')))])
    params = init_params(TINY, mesh, 6)
    rng = np.random.default_rng(0)
    h, targets = rng.normal(size=(2, 8, 64)).astype(np.float32), rng.integers(0, 256, (2, 8)).astype(np.int32)
    weights = np.arange(16, dtype=np.float32).reshape(2, 8)

    def ours(params, h, targets, weights):
        compute = Compute(label_smoothing=smoothing)
        total = lambda params, h: jnp.sum(loss.token_cross_entropy(params, h, targets, compute)[0] * weights)
        nll, correct = loss.token_cross_entropy(params, h, targets, compute)
        dparams, dh = jax.grad(total, (0, 1))(params, h)
        return nll, correct, dparams.head, dh

    def textbook(head, h):
        log_p = jax.nn.log_softmax(jnp.einsum('BPM,VM->BPV', h, head))
        q_BPV = (1 - smoothing) * jax.nn.one_hot(targets, 256) + smoothing / 256
        nll = -(q_BPV * log_p).sum(-1)
        return (nll * weights).sum(), nll

    head = jax.device_get(params.head)
    likeliest = np.argmax(h @ head.T, axis=-1)
    targets[0] = likeliest[0]
    (_, nll), (dhead, dh) = jax.value_and_grad(textbook, (0, 1), has_aux=True)(head, h)
    for elements in (1 << 24, -(-3 * 256 // mesh.shape['mp'] // 8) * 16 // mesh.shape['fsdp']):
        monkeypatch.setattr(loss, 'CHUNK_ELEMENTS', elements)
        run = on_mesh(ours, TINY, mesh, (BATCH, BATCH, partitions(TINY).head, BATCH))
        got = jax.device_get(run(params, h, targets, weights))
        np.testing.assert_array_equal(got[1], likeliest == targets)
        for a, b in zip((got[0], *got[2:]), (nll, dhead, dh), strict=True):
            assert_close(a, b, 1e-5)


def test_loss_is_the_mean_of_row_means():
    """Rows with 1, 3 and 0 targets and one of weight 0: (2 + (1 + 3 + 5) / 3 + 0) / 3; accuracy (1 + 1 / 3 + 0) / 3."""
    nll = jnp.array([[2., 9., 9.], [1., 3., 5.], [9., 9., 9.], [9., 9., 9.]])
    correct = jnp.array([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
    mask = jnp.array([[1., 0., 0.], [1., 1., 1.], [0., 0., 0.], [1., 1., 1.]])
    run = on_mesh(lambda params, *arrays: loss.row_mean_loss(*arrays), TINY, one_device(), PartitionSpec())
    value, accuracy = run(init_params(TINY, one_device(), 0), nll, correct, mask, jnp.array([1., 1., 1., 0.]))
    np.testing.assert_allclose([value, accuracy], [5 / 3, 4 / 9], rtol=1e-6)


def test_parameter_counts_of_the_named_models():
    """The counts their publishers state."""
    count = lambda name: sum(int(np.prod(spec.shape)) for spec in jax.tree.leaves(
        weight_specs(MODELS[name])))
    assert count('3b') == 3_426_473_600
    assert count('7b') == 6_738_415_616
    assert count('llama3_8b') == 8_030_261_248
    assert count('llama32_1b') == 1_235_814_400
    assert count('smollm2_135m') == 134_515_008
    assert count('smollm2_360m') == 361_821_120
