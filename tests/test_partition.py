"""Where arrays live: the literal table of shardings, the grammar of --mesh_dim, and equality across meshes."""
import dataclasses
import re

import jax
import numpy as np
import pytest
from helpers import MESHES, QUICK, TINY, one_device
from jax.sharding import PartitionSpec as P

from data.batches import Batch
from model import llama
from model.config import Compute
from model.partition import make_mesh
from model.weights import check_divisible, init_params, weight_specs
from training import step
from training.loop import put
from training.optimizer import AdamW
from training.state import init_state


def test_weight_shapes_and_partitions_are_these():
    """The whole table for the 3B model, as a literal: the shardings are EasyLM's partition rules."""
    specs = jax.tree.leaves(weight_specs(llama.LlamaConfig(32000, 3200, 8640, 26, 32)))
    assert {spec.name: (spec.shape, spec.partition) for spec in specs} == {
        'embedding': ((32000, 3200), P('mp', 'fsdp')),
        'layers.attention_norm': ((26, 3200), P(None, None)),
        'layers.w_q': ((26, 3200, 3200), P(None, 'fsdp', 'mp')),
        'layers.w_k': ((26, 3200, 3200), P(None, 'fsdp', 'mp')),
        'layers.w_v': ((26, 3200, 3200), P(None, 'fsdp', 'mp')),
        'layers.w_o': ((26, 3200, 3200), P(None, 'mp', 'fsdp')),
        'layers.ffn_norm': ((26, 3200), P(None, None)),
        'layers.w_gate': ((26, 3200, 8640), P(None, 'fsdp', 'mp')),
        'layers.w_up': ((26, 3200, 8640), P(None, 'fsdp', 'mp')),
        'layers.w_down': ((26, 8640, 3200), P(None, 'mp', 'fsdp')),
        'final_norm': ((3200,), P(None)),
        'head': ((32000, 3200), P('mp', 'fsdp')),
    }


@pytest.mark.parametrize('mesh_dim, expected', [
    ('1,4,2', dict(dp=1, fsdp=4, mp=2)),
    ('1,-1,1', dict(dp=1, fsdp=8, mp=1)),
    ('-1,2,2', dict(dp=2, fsdp=2, mp=2)),
    ('!2,2,2', dict(dp=2, fsdp=2, mp=2)),
    ('dp:1,mp:2,fsdp:4', dict(dp=1, mp=2, fsdp=4)),
    ('mp:-1,dp:2,fsdp:1', dict(mp=4, dp=2, fsdp=1)),
])
def test_mesh_dim_reads_easylm_grammar(mesh_dim, expected):
    """Sizes, names in the order given, one -1, and the leading '!'."""
    mesh = make_mesh(mesh_dim)
    assert dict(mesh.shape) == expected and mesh.axis_names == tuple(expected)


@pytest.mark.parametrize('mesh_dim, says', [
    ('2,2,1', "mesh_dim='2,2,1' does not multiply to the 8 devices.*1,4,2"),
    ('3,-1,1', 'does not multiply to the 8 devices'),
    ('-1,-1,1', 'more than one -1'),
    ('4,2', 'three mesh axes once each'),
    ('dp:1,fsdp:8', 'three mesh axes once each'),
    ('dp:1,dp:8,mp:1', 'three mesh axes once each'),
    ('1,x,1', 'no whole number'),
    ('0,8,1', 'does not multiply'),
])
def test_bad_mesh_dim_is_refused_with_the_remedy(mesh_dim, says):
    with pytest.raises(ValueError, match=says):
        make_mesh(mesh_dim)


@pytest.mark.parametrize('change, says', [
    (dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8), 'num_attention_heads=6 .* over mp=4'),
    (dict(num_attention_heads=12, num_key_value_heads=3, head_dim=8), 'num_key_value_heads=3 .* over mp=4'),
    (dict(vocab_size=258), 'embedding: V=258 is not divisible by mp=4'),
    (dict(hidden_size=63, head_dim=8), 'embedding: M=63 is not divisible by fsdp=2'),
])
def test_model_that_the_mesh_does_not_divide_is_refused(change, says):
    with pytest.raises(ValueError, match=re.compile(says)):
        check_divisible(dataclasses.replace(TINY, **change), make_mesh('1,2,4'))


def random_batch(seed: int) -> Batch:
    """8 rows of 32 tokens: two packed segments and padding in each, loss on some positions, one row of weight 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (8, 32)).astype(np.int32)
    segments = np.repeat(np.array([[1] * 13 + [2] * 15 + [0] * 4], np.int32), 8, axis=0)
    positions = np.sort(rng.permuted(np.tile(np.arange(28), (8, 1)), axis=1)[:, :6]).astype(np.int32)
    weight = np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32)
    return Batch(tokens, segments, positions, rng.integers(0, 256, (8, 6)).astype(np.int32),
                 (rng.random((8, 6)) < 0.8).astype(np.float32), weight)


def twenty_steps(mesh, accumulate: int):
    """(losses of 20 steps of the parameter-scaled optimizer, parameters after 5) from the same random weights."""
    hyper = AdamW(lr=0.002, end_lr=0.0002, lr_warmup_steps=1, lr_decay_steps=20, weight_decay=0.01, bf16_momentum=True,
                  multiply_by_parameter_scale=True)
    state = init_state(init_params(TINY, mesh, 0), TINY, hyper, accumulate, mesh)
    train_step = step.make_train_step(TINY, Compute(), hyper, accumulate, mesh).lower(
        state, put(random_batch(0), mesh)).compile(compiler_options=QUICK)
    losses = []
    for n in range(20):
        state, metrics = train_step(state, put(random_batch(n), mesh))
        losses.append([float(metrics[name]) for name in ('loss', 'accuracy', 'gradient_norm', 'param_norm')])
        if n == 4:
            params = jax.device_get(state.params)
    return np.array(losses), params


@pytest.fixture(scope='module')
def on_one_device():
    return {accumulate: twenty_steps(one_device(), accumulate) for accumulate in (1, 2)}


@pytest.mark.parametrize('mesh_dim, accumulate', [(mesh, 1) for mesh in MESHES] + [('1,4,2', 2)])
def test_loss_and_update_on_8_devices_equal_1(on_one_device, mesh_dim, accumulate):
    """Loss, accuracy and norms of 20 steps within 1e-5 relative, every parameter after 5 within 1e-5 of the largest.
    Rows are packed: two segments and padding, loss on some positions.
    """
    losses, params = twenty_steps(make_mesh(mesh_dim), accumulate)
    expected_losses, expected_params = on_one_device[accumulate]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_initial_weights_do_not_depend_on_the_mesh():
    a, b = (jax.device_get(init_params(TINY, make_mesh(mesh), 7)) for mesh in ('1,8,1', '2,1,4'))
    jax.tree.map(np.testing.assert_array_equal, a, b)
