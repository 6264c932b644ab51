"""What one training step sends between devices: the literal table, and docs/PARTITIONING.md's formula for it."""
import collections
import dataclasses
import re

import jax
import pytest
from helpers import MESHES, QUICK, TINY

from instruments.tpu.collectives import collectives
from model.config import Compute
from model.lora import TARGETS, Lora, abstract_base, adapter_specs
from model.partition import make_mesh
from model.weights import weight_specs
from training import optimizer, step
from training.state import abstract_batch, abstract_state

HYPER = optimizer.AdamW(lr_warmup_steps=1, lr_decay_steps=8, bf16_momentum=True, multiply_by_parameter_scale=True)
B, T = 8, 32
# mesh: {(collective, axes, bytes on a device): executions}; float32, no remat, TINY (tests/helpers.py), 8 rows of 32
TABLE = {
    '8,1,1': {
        ('all-reduce', 'dp', 115200): 3,  # the gradients of a layer
        ('all-reduce', 'dp', 131336): 1,  # of embedding, head and final norm; with them loss and accuracy
        ('all-reduce', 'dp', 4): 1,  # rows that count
    },
    '1,8,1': {
        ('all-gather', 'fsdp', 4096): 6, ('reduce-scatter', 'fsdp', 4096): 6,  # w_k, w_v; their gradients
        ('all-gather', 'fsdp', 16384): 6, ('reduce-scatter', 'fsdp', 16384): 6,  # w_q, w_o
        ('all-gather', 'fsdp', 24576): 9, ('reduce-scatter', 'fsdp', 24576): 9,  # w_gate, w_up, w_down
        ('all-gather', 'fsdp', 65536): 2, ('reduce-scatter', 'fsdp', 65536): 2,  # embedding, head
        ('all-reduce', 'fsdp', 512): 3,  # gradients of a layer's norms
        ('all-reduce', 'fsdp', 360): 1,  # of the final norm; what the optimizer sums
        ('all-reduce', 'fsdp', 8): 2,
    },
    '1,1,8': {
        ('all-gather', 'mp', 65536): 14, ('reduce-scatter', 'mp', 65536): 14,  # activations
        ('all-gather', 'mp', 4096): 6, ('reduce-scatter', 'mp', 4096): 6,  # w_k, w_v: four devices share a head
        ('all-reduce', 'mp', 1024): 1, ('all-reduce', 'mp', 1028): 2,  # maximum, sum and target of the cross entropy
        ('all-reduce', 'mp', 512): 3,
        ('all-reduce', 'mp', 348): 1, ('all-reduce', 'mp', 8): 1,
    },
    '1,4,2': {
        ('all-gather', 'fsdp', 2048): 6, ('reduce-scatter', 'fsdp', 2048): 6,
        ('all-gather', 'fsdp', 8192): 6, ('reduce-scatter', 'fsdp', 8192): 6,
        ('all-gather', 'fsdp', 12288): 9, ('reduce-scatter', 'fsdp', 12288): 9,
        ('all-gather', 'fsdp', 32768): 2, ('reduce-scatter', 'fsdp', 32768): 2,
        ('all-gather', 'mp', 16384): 14, ('reduce-scatter', 'mp', 16384): 14,
        ('all-reduce', 'fsdp+mp', 512): 3,
        ('all-reduce', 'mp', 256): 1, ('all-reduce', 'mp', 512): 1,
        ('all-reduce', 'fsdp+mp', 320): 1, ('all-reduce', 'fsdp+mp', 36): 1, ('all-reduce', 'fsdp+mp', 4): 2,
        ('all-reduce', 'fsdp', 12): 1,
    },
    '2,2,2': {
        ('all-gather', 'fsdp', 2048): 6, ('reduce-scatter', 'fsdp', 2048): 6,
        ('all-gather', 'fsdp', 8192): 6, ('reduce-scatter', 'fsdp', 8192): 6,
        ('all-gather', 'fsdp', 12288): 9, ('reduce-scatter', 'fsdp', 12288): 9,
        ('all-gather', 'fsdp', 32768): 2, ('reduce-scatter', 'fsdp', 32768): 2,
        ('all-gather', 'mp', 16384): 14, ('reduce-scatter', 'mp', 16384): 14,
        ('all-reduce', 'dp', 28672): 3, ('all-reduce', 'dp', 32768): 1,  # of gradients that are scattered already
        ('all-reduce', 'dp+fsdp+mp', 512): 3,
        ('all-reduce', 'mp', 256): 1, ('all-reduce', 'mp', 512): 1,
        ('all-reduce', 'dp+fsdp+mp', 256): 1, ('all-reduce', 'fsdp+mp', 64): 1, ('all-reduce', 'fsdp+mp', 36): 1,
        ('all-reduce', 'fsdp+mp', 4): 2, ('all-reduce', 'dp+fsdp', 12): 1,
    },
}
# the same of adapters of rank 4 on w_q and w_v, by the dtype of the frozen base, on 1,4,2
LORA = Lora(rank=4, alpha=8)
ACTIVATIONS_AND_ADAPTERS = {
    ('all-gather', 'mp', 16384): 13, ('reduce-scatter', 'mp', 16384): 14,  # the embedding's gradient has no use
    ('all-reduce', 'fsdp+mp', 2048): 3, ('all-reduce', 'fsdp', 640): 3,  # a layer's gradients: of both A; of both B
    ('all-reduce', 'mp', 256): 1, ('all-reduce', 'mp', 512): 1,  # the cross entropy
    ('all-reduce', 'mp', 28): 1, ('all-reduce', 'mp', 4): 1, ('all-reduce', 'fsdp', 12): 1,  # scalars
}
LORA_TABLE = {
    'fp32': {
        ('all-gather', 'fsdp', 2048): 6, ('all-gather', 'fsdp', 8192): 6, ('all-gather', 'fsdp', 12288): 9,
        ('all-gather', 'fsdp', 32768): 2,
    } | ACTIVATIONS_AND_ADAPTERS,
    'int8': {
        ('all-gather', 'fsdp', 512): 6, ('all-gather', 'fsdp', 2048): 6, ('all-gather', 'fsdp', 3072): 9,
        ('all-gather', 'fsdp', 256): 6,  # factors of w_o and w_down
        ('all-gather', 'fsdp', 32768): 2,
    } | ACTIVATIONS_AND_ADAPTERS,
}


def compiled_collectives(mesh_dim: str, lora: Lora | None = None, **compute) -> dict:
    mesh = make_mesh(mesh_dim)
    base = [abstract_base(TINY, mesh, lora.base_dtype)] if lora else []
    lowered = step.make_train_step(TINY, Compute(**compute), HYPER, 1, mesh, lora).lower(
        abstract_state(TINY, HYPER, 1, mesh, lora), abstract_batch(mesh, B, T), *base)
    found = collectives(lowered.compile(compiler_options=QUICK).as_text(), mesh)
    return {(one.kind, '+'.join(one.axes), one.bytes): one.times for one in found}


def predicted(mesh_dim: str, remat: bool) -> dict:
    """docs/PARTITIONING.md: bytes of one device by (collective, axes), of everything above 2 KB; float32."""
    dp, fsdp, mp = map(int, mesh_dim.split(','))
    N, M, K, D = TINY.num_hidden_layers, TINY.hidden_size, TINY.num_key_value_heads, TINY.head_dim
    matrices = [spec for spec in jax.tree.leaves(weight_specs(TINY)) if spec.init == 'normal']
    layers, ends = (4 * sum(spec.size for spec in matrices if spec.stacked is stacked) for stacked in (True, False))
    activation = 4 * B // (dp * fsdp) * T * M
    shared = 4 * N * 2 * M * K * D if mp > K else 0
    total = collections.Counter()
    if fsdp > 1:
        total['all-gather', 'fsdp'] = ((1 + remat) * layers + ends) // mp
        total['reduce-scatter', 'fsdp'] = (layers + ends) // mp
    if dp > 1:
        total['all-reduce', 'dp'] = (layers + ends) // (fsdp * mp)
    if mp > 1:
        total['all-gather', 'mp'] = ((4 + 2 * remat) * N + 2) * activation + (1 + remat) * shared
        total['reduce-scatter', 'mp'] = ((4 + remat) * N + 2) * activation + shared
    return total


@pytest.fixture(scope='module')
def found():
    return {mesh_dim: compiled_collectives(mesh_dim) for mesh_dim in MESHES}


@pytest.mark.parametrize('mesh_dim', MESHES)
def test_collectives_of_one_step_are_these(found, mesh_dim):
    assert found[mesh_dim] == TABLE[mesh_dim]


@pytest.mark.parametrize('mesh_dim, remat', [(mesh_dim, False) for mesh_dim in MESHES] + [('2,2,2', True)])
def test_the_formula_predicts_their_bytes(found, mesh_dim, remat):
    """Exactly, but for the norms' gradients and scalars: these are all below 2 KB."""
    total = collections.Counter()
    rows = compiled_collectives(mesh_dim, remat_block='nothing_saveable') if remat else found[mesh_dim]
    for (kind, axes, size), times in rows.items():
        if size >= 2048:
            total[kind, axes] += size * times
    if mesh_dim == '8,1,1':  # combined with those of matrices: norms' gradients and two scalars
        total['all-reduce', 'dp'] -= 3 * 512 + 256 + 8
    assert total == predicted(mesh_dim, remat)


@pytest.mark.parametrize('dtype', LORA_TABLE)
def test_adapters_gather_the_base_in_its_dtype_and_sum_their_own_gradients(dtype):
    """No reduce-scatter along fsdp: no weight has a gradient, and the adapters' is summed whole."""
    assert compiled_collectives('1,4,2', dataclasses.replace(LORA, base_dtype=dtype)) == LORA_TABLE[dtype]


def predicted_of_adapters(lora: Lora, mesh_dim: str, remat: bool) -> dict:
    """docs/PARTITIONING.md, With adapters: bytes of one device by (collective, axes); products in float32."""
    dp, fsdp, mp = map(int, mesh_dim.split(','))
    N, M = TINY.num_hidden_layers, TINY.hidden_size
    matrices = [spec for spec in jax.tree.leaves(weight_specs(TINY)) if spec.init == 'normal']
    layers, ends = (sum(spec.size for spec in matrices if spec.stacked is stacked) for stacked in (True, False))
    width, factors = (1, 2 * N * M * 4) if lora.base_dtype == 'int8' else (4, 0)
    activation = 4 * B // (dp * fsdp) * T * M
    total = collections.Counter({
        ('all-gather', 'fsdp'): (1 + remat) * (layers * width // mp + factors) + ends * 4 // mp,
        ('all-gather', 'mp'): ((4 + 2 * remat) * N + 1) * activation,
        ('reduce-scatter', 'mp'): ((4 + remat) * N + 2) * activation})
    for spec in jax.tree.leaves(adapter_specs(TINY, lora)):
        split = 'mp' in spec.axes
        total['all-reduce', 'fsdp' if split else 'fsdp+mp'] += 4 * spec.size // (mp if split else 1)
    return total


@pytest.mark.parametrize('dtype, targets, remat', [('fp32', LORA.targets, False), ('int8', TARGETS, True)])
def test_the_formula_predicts_the_bytes_of_adapters(dtype, targets, remat):
    """Exactly, but for scalars and the cross entropy, which are below 1 KB."""
    lora, total = Lora(4, 8, targets, base_dtype=dtype), collections.Counter()
    rows = compiled_collectives('1,4,2', lora, remat_block='nothing_saveable') if remat else LORA_TABLE[dtype]
    for (kind, axes, size), times in rows.items():
        if kind == 'all-gather' or size >= 640:
            total[kind, axes] += size * times
    assert total == predicted_of_adapters(lora, '1,4,2', remat)


def test_programs_do_not_grow_with_depth():
    """2 and 20 layers lower to programs of the same length: layers are a loop, in the forward pass and the backward."""
    mesh = make_mesh('1,4,2')

    def lines(layers):
        config = dataclasses.replace(TINY, num_hidden_layers=layers)
        return len(step.make_train_step(config, Compute(), HYPER, 1, mesh).lower(
            abstract_state(config, HYPER, 1, mesh), abstract_batch(mesh, B, T)).as_text().splitlines())

    assert lines(2) == lines(20)


@pytest.mark.parametrize('reduce_gradients, in_float32', [('', 0), ('bf16', 0), ('fp32', 9)])
def test_gradients_are_summed_in_the_dtype_of_the_flag(reduce_gradients, in_float32):
    """With bfloat16 products: the reduce-scatters of a layer's seven matrices, embedding and head; weights travel as
    bfloat16 in any case.
    """
    mesh = make_mesh('2,4,1')
    text = step.make_train_step(TINY, Compute('bf16', reduce_gradients=reduce_gradients), HYPER, 1, mesh).lower(
        abstract_state(TINY, HYPER, 1, mesh), abstract_batch(mesh, B, T)).as_text()
    results = lambda name: re.findall(rf'stablehlo\.{name}"?\(.*?\) -> \(?tensor<[\dx]*?(bf16|f32)>', text, re.DOTALL)
    assert set(results('all_gather')) == {'bf16'}
    assert results('reduce_scatter').count('f32') == in_float32
