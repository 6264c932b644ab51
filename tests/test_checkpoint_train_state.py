"""EasyLM's whole train state, made with optax 0.1.7 and flax 0.7.0: read, continued, and written again."""
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint_easylm import flax_array, pack_stream

import checkpoint
from checkpoint.formats import easylm_writer
from checkpoint.formats.easylm import NAMES, index
from checkpoint.formats.reading import tensors_of
from model.config import LlamaConfig
from model.partition import make_mesh
from model.weights import abstract_params, by_name, partitions, weight_specs
from training import optimizer
from training.state import TrainState, state_partitions
from training.step import accumulated_update

CONFIG = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
HYPER = dict(init_lr=0.001, lr=0.02, end_lr=0.002, lr_warmup_steps=2, lr_decay_steps=10, weight_decay=0.01)
CASES = {  # name -> (multiply_by_parameter_scale, bf16_momentum, accumulate, micro-steps done)
    'param_scale': (True, True, 1, 3), 'adamw': (False, False, 1, 3), 'accumulate': (True, True, 3, 4)}


def targets(scale, bf16, accumulate, mesh):
    """{name in a checkpoint: ShapeDtypeStruct}, as train.py asks for them."""
    params = by_name(abstract_params(CONFIG, mesh), CONFIG, 'params')
    tree = lambda prefix, dtype: {name.replace('params', prefix): jax.ShapeDtypeStruct(x.shape, dtype,
                                                                                       sharding=x.sharding)
                                  for name, x in params.items()}
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    wanted = params | tree('momentum', jnp.bfloat16 if bf16 else jnp.float32) | tree('second_moment', jnp.float32)
    wanted |= {'optimizer.count': scalar, 'optimizer.micro_step': scalar}
    return wanted | (tree('mean_gradient', jnp.float32) if accumulate > 1 else {})


def read(golden, case, mesh='1,4,2', suffix='', **changes):
    scale, bf16, accumulate, _ = CASES[case]
    flags = dict(scale=scale, bf16=bf16, accumulate=accumulate) | changes
    source = checkpoint.open(f'trainstate::{golden}/easylm/train_state_{case}{suffix}')
    return source.load_train_state(CONFIG, targets(**flags, mesh=make_mesh(mesh)), flags['scale'])


def gradients(seed, mesh, path):
    """What the golden run used at a micro-step: by sorted key from numpy's frozen generator, in EasyLM's layout."""
    random, shapes = np.random.RandomState(seed), {}
    for spec, layer in tensors_of(CONFIG):
        shape = spec.shape[1:] if spec.stacked else spec.shape
        shapes[tuple(NAMES[spec.name].format(layer).split('/'))] = shape[::-1] if spec.name == 'head' else shape
    pack_stream(path, [(key, flax_array((0.05 * random.standard_normal(shapes[key])).astype(np.float32)))
                       for key in sorted(shapes)])
    return checkpoint.open(f'params::{path}').load_params(CONFIG, mesh)


@pytest.mark.parametrize('case', CASES)
def test_two_more_steps_are_those_of_easylm(golden, tmp_path, case):
    """Read on mesh 1,4,2 and continued by our optimizer with the same gradients: EasyLM's weights within 1e-6."""
    scale, bf16, accumulate, done = CASES[case]
    hyper = optimizer.AdamW(**HYPER, bf16_momentum=bf16, multiply_by_parameter_scale=scale)
    mesh, specs, arrays = make_mesh('1,4,2'), weight_specs(CONFIG), read(golden, case)
    assert checkpoint.open(f'trainstate::{golden}/easylm/train_state_{case}').step == done
    assert int(arrays['optimizer.count']) == done // accumulate
    assert int(arrays['optimizer.micro_step']) == done % accumulate
    structure = jax.tree.structure(abstract_params(CONFIG, mesh))
    tree = lambda prefix: structure.unflatten([x for name, x in arrays.items() if name.startswith(prefix + '.')])
    state = TrainState(tree('params'), optimizer.OptimizerState(
        arrays['optimizer.count'], tree('momentum'), tree('second_moment')), arrays['optimizer.micro_step'],
        tree('mean_gradient') if accumulate > 1 else None)

    def step(state, grads):
        if accumulate > 1:
            return accumulated_update(state, grads, accumulate, hyper, specs)
        params, inner = optimizer.update(state.params, grads, state.optimizer, hyper, specs)
        return TrainState(params, inner, state.micro_step, None)

    split = state_partitions(CONFIG, accumulate)
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(split, partitions(CONFIG)), out_specs=split))
    for n in range(done, done + 2):
        state = step(state, gradients(100 + n, mesh, tmp_path / 'gradients'))
    expected = checkpoint.open(f'params::{golden}/easylm/train_state_{case}_after').load_params(CONFIG, mesh)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize('case', CASES)
def test_arrays_come_in_the_dtype_and_on_the_sharding_of_their_targets(golden, case):
    """Bfloat16 momentum is bfloat16, all else float32 or int32, each as train.py laid it out."""
    scale, bf16, accumulate, _ = CASES[case]
    wanted, arrays = targets(scale, bf16, accumulate, make_mesh('2,2,2')), read(golden, case, mesh='2,2,2')
    assert list(arrays) == list(wanted)
    for name, target in wanted.items():
        got = arrays[name]
        assert (got.shape, got.dtype, got.sharding) == (target.shape, target.dtype, target.sharding), name


def test_a_bfloat16_file_is_the_rounded_state(golden):
    """EasyLM's default float_dtype rounds all of it; the momentum, bfloat16 anyway, loses nothing."""
    exact, rounded = read(golden, 'param_scale'), read(golden, 'param_scale', suffix='_bf16')
    for name, array in exact.items():
        np.testing.assert_array_equal(rounded[name], array.astype(jnp.bfloat16).astype(array.dtype), err_msg=name)
    assert any((rounded[name] != exact[name]).any() for name in exact if name.startswith('second_moment'))


def test_weights_alone_are_read_by_three_names(golden):
    """trainstate:: as load_checkpoint of serve.py and evaluate.py means the weights, as trainstate_params:: does."""
    path, mesh = golden / 'easylm/train_state_adamw', make_mesh('8,1,1')
    weights = [checkpoint.open(f'{kind}::{path}').load_params(CONFIG, mesh)
               for kind in ('trainstate', 'trainstate_params')]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    arrays = read(golden, 'adamw')
    for name, array in by_name(weights[0], CONFIG, 'params').items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize('case, changes, flag', [
    ('param_scale', dict(scale=False), 'multiply_by_parameter_scale=True'),
    ('adamw', dict(scale=True), 'multiply_by_parameter_scale=False'),
    ('accumulate', dict(accumulate=1), 'accumulate_gradient_steps above 1'),
    ('adamw', dict(accumulate=2), 'accumulate_gradient_steps=1')])
def test_a_state_of_another_optimizer_is_refused_with_its_flag(golden, case, changes, flag):
    """The second moment of one is none of the other; the message says what to set, and the other way out."""
    with pytest.raises(ValueError, match=f'was saved with optimizer.*{flag}: set the flag.*trainstate_params::'):
        read(golden, case, **changes)


@pytest.mark.parametrize('case, float_dtype', [*((case, 'fp32') for case in CASES), ('param_scale', 'bf16')])
def test_a_state_written_again_is_easylms_file_byte_for_byte(golden, tmp_path, case, float_dtype):
    """Every key, in EasyLM's order, with EasyLM's bytes."""
    scale, _, _, done = CASES[case]
    path = tmp_path / 'streaming_train_state'
    easylm_writer.write_train_state(path, read(golden, case), CONFIG, done, scale, float_dtype)
    easylms = golden / f'easylm/train_state_{case}{"_bf16" if float_dtype == "bf16" else ""}'
    assert list(index(path)) == list(index(easylms)) and path.read_bytes() == easylms.read_bytes()


def test_no_cast_keeps_each_dtype(golden, tmp_path):
    """float_dtype='': float32 weights beside bfloat16 momentum, as EasyLM's '' leaves them."""
    path = tmp_path / 'state'
    easylm_writer.write_train_state(path, read(golden, 'param_scale'), CONFIG, 3, True, '')
    dtypes = {'/'.join(key): msgpack.unpackb(msgpack.unpackb(value).data)[1]
              for key, value in msgpack.Unpacker(open(path, 'rb'), max_buffer_size=0)}
    for key, dtype in dtypes.items():
        expected = 'int32' if key.endswith(('count', 'step')) else 'bfloat16' if '/ema/' in key else 'float32'
        assert dtype == expected, key


def test_the_step_of_a_file_that_is_no_train_state(golden):
    """The message names the type to use; 0 stands for files that have no step."""
    with pytest.raises(ValueError, match='holds no train state.*use params::'):
        print(checkpoint.open(f'trainstate::{golden}/easylm/streaming_params_fp32').step)
    assert checkpoint.open(f'params::{golden}/easylm/streaming_params_fp32').step == 0
