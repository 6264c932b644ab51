"""Adapters: what they compute, what trains, and that meshes, bases and batches of every kind agree."""
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PLAIN, QUICK, TINY, freeze, merged, one_device
from jax.sharding import PartitionSpec

from data.batches import Batch
from mistake import Mistake
from model import llama, loss, weights
from model.config import Compute
from model.lora import (
    TARGETS,
    Adapted,
    Adapter,
    Lora,
    abstract_base,
    adapted,
    adapted_partitions,
    adapter_specs,
    base_partitions,
)
from model.partition import BATCH, make_mesh
from model.quantized import Int8
from training import optimizer, step
from training.loop import put
from training.state import from_arrays, init_state, to_arrays

ALL = Lora(rank=4, alpha=8, targets=TARGETS)
TWO = dataclasses.replace(ALL, targets=('w_q', 'w_down'))  # one of each kind of line
HYPER = optimizer.AdamW(lr=1e-2, end_lr=1e-3, lr_warmup_steps=1, lr_decay_steps=20, weight_decay=0.0)
ROWS, LENGTH = 8, 32


def batches(count: int, segments: bool = False) -> list[Batch]:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        tokens = draw.integers(0, TINY.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
        parts = np.repeat([[1, 2, 3, 0]], LENGTH // 4, axis=1).repeat(ROWS, axis=0).astype(np.int32)
        found.append(Batch(tokens[:, :-1], parts if segments else None, None, tokens[:, 1:],
                           np.float32(parts > 0 if segments else np.ones_like(parts)), np.ones(ROWS, np.float32)))
    return found


def fresh(mesh, lora: Lora, b: float = 0.0):
    """(base, adapters) of TINY; B is drawn with deviation `b`, since one of zeros hides A."""
    adapters = weights.init_weights(adapter_specs(TINY, lora), mesh, 1, TINY.initializer_range)
    keys = iter(jax.random.split(jax.random.key(2), 7))
    adapters = jax.tree.map(
        lambda one: Adapter(one.a, one.b + b * jax.device_put(jax.random.normal(next(keys), one.b.shape),
                                                              one.b.sharding)),
        adapters, is_leaf=lambda node: isinstance(node, Adapter))
    return freeze(weights.init_params(TINY, mesh, 0), TINY, mesh, lora.base_dtype), adapters


def logits_of(params, specs, tokens):
    def forward(params, tokens_BT):
        h_BTM, _ = llama.hidden_states(params, tokens_BT, None, TINY, PLAIN)
        return loss.logits(params, h_BTM)

    return jax.jit(jax.shard_map(forward, mesh=one_device(), in_specs=(specs, BATCH),
                                 out_specs=PartitionSpec(BATCH[0], None, 'mp')))(params, tokens)


@functools.cache
def train_step(mesh, lora: Lora, compute, accumulate: int, segments: bool):
    made = step.make_train_step(TINY, compute, HYPER, accumulate, mesh, lora)
    base, adapters = fresh(mesh, lora)
    return made.lower(init_state(adapters, TINY, HYPER, accumulate, mesh, lora), put(batches(1, segments)[0], mesh),
                      base).compile(compiler_options=QUICK)


@functools.cache
def run(mesh_dim: str, lora: Lora, count: int = 2, compute=PLAIN, accumulate: int = 1, b: float = 0.0,
        segments: bool = False):
    """Train TINY's adapters: (arrays of the state by name, metrics, base before, base after)."""
    size = int(np.prod([int(part) for part in mesh_dim.split(',')]))
    mesh = make_mesh(mesh_dim, jax.devices()[:size])
    base, adapters = fresh(mesh, lora, b)
    before = jax.tree.map(np.array, base)
    state = init_state(adapters, TINY, HYPER, accumulate, mesh, lora)
    for one in batches(count, segments):
        state, metrics = train_step(mesh, lora, compute, accumulate, segments)(state, put(one, mesh), base)
    arrays = {name: np.array(x) for name, x in to_arrays(state, TINY, lora).items()}
    return arrays, {name: float(x) for name, x in metrics.items()}, before, jax.tree.map(np.array, base)


# ---------------------------------------------------------------- what it computes


def test_an_adapter_derives_from_the_line_of_its_weight():
    lines = {spec.name: (spec.shape, spec.letters, tuple(spec.partition), spec.init)
             for spec in jax.tree.leaves(adapter_specs(TINY, ALL))}
    assert len(lines) == 14 and lines['layers.w_q.a'] == ((3, 64, 4), ('N', 'M', 'R'), (None, None, None), 'fan_in')
    assert lines['layers.w_q.b'] == ((3, 4, 64), ('N', 'R', 'HD'), (None, None, 'mp'), 'zeros')
    assert lines['layers.w_down.a'] == ((3, 96, 4), ('N', 'F', 'R'), (None, 'mp', None), 'fan_in')
    assert lines['layers.w_down.b'] == ((3, 4, 64), ('N', 'R', 'M'), (None, None, None), 'zeros')
    two = adapter_specs(TINY, Lora(4, 8))
    assert [spec.name for spec in jax.tree.leaves(two)] == [f'layers.w_{m}.{x}' for m in 'qv' for x in 'ab']


def test_the_initial_a_is_uniform_with_the_bound_of_its_rows():
    """PEFT's kaiming_uniform(sqrt(5)): ±1/sqrt(in), deviation 1/sqrt(3 in)."""
    _, adapters = fresh(one_device(), Lora(rank=16, alpha=16, targets=('w_down',)))
    a = np.array(adapters.layers.w_down.a)
    bound = 1 / np.sqrt(96)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
    assert np.isclose(a.std(), bound / np.sqrt(3), rtol=0.02) and not np.array(adapters.layers.w_down.b).any()


@pytest.mark.parametrize('dtype', ['fp32', 'int8'])
def test_rank_16_with_b_of_zeros_equals_the_base_to_the_bit(dtype):
    lora = Lora(rank=16, alpha=32, targets=TARGETS, base_dtype=dtype)
    base, adapters = fresh(one_device(), lora)
    tokens = batches(1)[0].tokens_BT
    specs = base_partitions(TINY, dtype)
    with_adapter = logits_of(adapted(base, adapters, lora), adapted_partitions(TINY, lora), tokens)
    np.testing.assert_array_equal(with_adapter, logits_of(base, specs, tokens))


@pytest.mark.parametrize('rslora', [False, True])
def test_merged_equals_unmerged(rslora):
    lora = dataclasses.replace(ALL, rslora=rslora)
    assert lora.scale == (4.0 if rslora else 2.0)
    base, adapters = fresh(one_device(), lora, b=0.05)
    tokens = batches(1)[0].tokens_BT
    specs = weights.partitions(TINY)
    apart = logits_of(adapted(base, adapters, lora), adapted_partitions(TINY, lora), tokens)
    together = logits_of(merged(base, adapters, lora), specs, tokens)
    np.testing.assert_allclose(apart, together, atol=1e-5)
    assert np.abs(apart - logits_of(base, specs, tokens)).max() > 0.1


def test_an_int8_base_is_what_its_factors_say_and_near_the_weights():
    """Half a factor at most, of a channel whose largest weight is 127 factors: 1/254 of it."""
    mesh, params = one_device(), weights.init_params(TINY, one_device(), 0)
    base = freeze(params, TINY, mesh, 'int8')
    assert isinstance(base.layers.w_q, Int8) and base.embedding.dtype == jnp.bfloat16
    w, kept = np.array(params.layers.w_q), base.layers.w_q
    widened = np.array(kept.values) * np.array(kept.factors)[:, None]
    assert (np.abs(widened - w).max(axis=1) <= np.abs(w).max(axis=1) / 254 * 1.001).all()
    tree = jax.tree.map(lambda x: (x.shape, x.dtype), base)
    assert tree == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_base(TINY, mesh, 'int8'))


# ---------------------------------------------------------------- what trains


def test_the_gradients_equal_finite_differences():
    """Along each adapter's own gradient; central differences of step e are off by e² of the third derivative."""
    mesh = one_device()
    base, adapters = fresh(mesh, ALL, b=0.05)
    batch = put(batches(1)[0], mesh)

    def mean_loss(adapters, base, batch):
        return step.batch_loss(adapted(base, adapters, ALL), batch, TINY, PLAIN)[0]

    adapters_lie = jax.tree.map(lambda spec: spec.partition, adapter_specs(TINY, ALL))
    in_specs = adapters_lie, weights.partitions(TINY), BATCH
    on_mesh = jax.shard_map(mean_loss, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec())
    value = jax.jit(on_mesh, compiler_options=QUICK)
    grads = jax.jit(jax.grad(on_mesh), compiler_options=QUICK)(adapters, base, batch)
    leaves, tree = jax.tree.flatten(adapters)
    for n, gradient in enumerate(jax.tree.leaves(grads)):
        size = float(jnp.sqrt((gradient ** 2).sum()))
        assert size > 1e-4
        moved = lambda e, n=n, gradient=gradient, size=size: jax.tree.unflatten(
            tree, [x + e * gradient / size if i == n else x for i, x in enumerate(leaves)])
        difference = float(value(moved(0.02), base, batch)) - float(value(moved(-0.02), base, batch))
        np.testing.assert_allclose(difference / 0.04, size, rtol=0.01, atol=5e-5)


def test_the_base_is_untouched_to_the_bit_after_20_steps():
    arrays, metrics, before, after = run('1,1,1', ALL, count=20)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert np.abs(arrays['params.layers.w_q.b']).max() > 0 and arrays['optimizer.count'] == 20
    names = {name.partition('.')[0] for name in arrays}
    assert names == {'params', 'momentum', 'second_moment', 'optimizer'} and len(arrays) == 3 * 14 + 2


@pytest.mark.parametrize('mesh_dim, dtype', [
    ('1,4,2', 'fp32'), ('1,1,8', 'fp32'), pytest.param('2,2,2', 'fp32', marks=pytest.mark.long),
    pytest.param('1,4,2', 'int8', marks=pytest.mark.long)])
def test_meshes_agree(mesh_dim, dtype):
    lora = dataclasses.replace(ALL, base_dtype=dtype)
    alone, metrics, *_ = run('1,1,1', lora, b=0.05)
    arrays, others, *_ = run(mesh_dim, lora, b=0.05)
    assert metrics.keys() == others.keys()
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, err_msg=name)
    for name in (name for name in alone if name.startswith('params.')):
        np.testing.assert_allclose(arrays[name], alone[name], atol=1e-5, err_msg=name)


def test_remat_changes_nothing_of_dropout_s_masks():
    lora = dataclasses.replace(TWO, dropout=0.25)
    plain, remat = (run('1,1,1', lora, count=1, b=0.05, compute=Compute(remat_block=policy))[0]
                    for policy in ('', 'save:q,k,v,gate'))
    for name, array in plain.items():
        np.testing.assert_allclose(remat[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.long
def test_packed_segments_and_the_kernels():
    compute = Compute(attention='pallas')
    one, metrics, *_ = run('1,1,1', TWO, count=1, b=0.05, segments=True)
    kernels, others, *_ = run('1,1,1', TWO, count=1, b=0.05, segments=True, compute=compute)
    np.testing.assert_allclose(others['loss'], metrics['loss'], rtol=1e-5)
    np.testing.assert_allclose(others['gradient_norm'], metrics['gradient_norm'], rtol=1e-4)


def test_accumulated_micro_steps_equal_their_mean():
    arrays, *_ = run('1,1,1', TWO, count=2, accumulate=2, b=0.05)
    assert arrays['optimizer.count'] == 1 and arrays['optimizer.micro_step'] == 0
    mesh = one_device()
    base, adapters = fresh(mesh, TWO, b=0.05)
    both = jax.tree.map(lambda *x: np.concatenate(x), *batches(2))
    made = step.make_train_step(TINY, PLAIN, HYPER, 1, mesh, TWO)
    state, _ = made(init_state(adapters, TINY, HYPER, 1, mesh, TWO), put(both, mesh), base)
    for name, array in to_arrays(state, TINY, TWO).items():
        if name.startswith(('params', 'momentum')):
            np.testing.assert_allclose(arrays[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_state_is_its_named_arrays():
    mesh = one_device()
    state = init_state(fresh(mesh, ALL)[1], TINY, HYPER, 2, mesh, ALL)
    again = from_arrays(to_arrays(state, TINY, ALL), state, TINY, ALL)
    jax.tree.map(np.testing.assert_array_equal, again, state)


# ---------------------------------------------------------------- dropout


def test_dropout_keeps_the_mean_and_changes_with_the_step():
    x, a, b = jnp.ones((64, 32, 100)), jnp.ones((100, 1)) / 100, jnp.ones((1, 2))
    found = Adapted(jnp.zeros((100, 2)), a, b, jax.random.key(0), dropout=0.25).delta(x)
    assert found.std() > 0.01
    np.testing.assert_allclose(found.mean(), 1.0, atol=4 * np.sqrt(0.25 / 0.75 / (64 * 32 * 100)))
    states = [types.SimpleNamespace(optimizer=types.SimpleNamespace(count=n), micro_step=i)
              for n, i in ((0, 0), (0, 1), (1, 0))]
    keys = [step.dropout_key(state, dataclasses.replace(ALL, dropout=0.5, seed=seed)) for state in states
            for seed in (0, 1)]
    assert len({str(jax.random.key_data(key)) for key in keys}) == 6
    assert step.dropout_key(states[0], ALL) is None


def test_the_devices_of_mp_drop_the_same_numbers():
    lora = dataclasses.replace(ALL, targets=('w_q',), dropout=0.5)
    alone, split = (run(mesh, lora, count=1, b=0.05)[1] for mesh in ('1,1,1', '1,1,8'))
    np.testing.assert_allclose(split['loss'], alone['loss'], rtol=1e-5)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize('given, said', [
    (dict(targets=('w_q', 'w_x')), r"targets='w_q,w_x': 'w_x' is no matrix of a layer \(did you mean w_.\?\); they are "
     'w_q,w_k,w_v,w_o,w_gate,w_up,w_down'),
    (dict(targets=('q_proj',)), "'q_proj' is no matrix of a layer.*they are"),
    (dict(targets=('w_q', 'w_q')), 'each once'),
    (dict(targets=()), 'must name one or more')])
def test_targets_that_are_none_are_named(given, said):
    with pytest.raises(Mistake, match=said):
        Lora(rank=4, alpha=8, **given)


def test_a_rank_above_the_matrix_is_refused():
    with pytest.raises(Mistake, match=r'lora.rank=17 must be at most 16, the smaller side of layers.w_k'):
        adapter_specs(TINY, Lora(rank=17, alpha=8, targets=('w_q', 'w_k')))
    adapter_specs(TINY, Lora(rank=16, alpha=8, targets=('w_q', 'w_k')))
