"""What a compiled program sends: on the CPU by hand, and read from what the TPU's compiler wrote."""
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from instruments.tpu import hlo
from instruments.tpu.collectives import Collective, bytes_by_axis, collectives, device_groups

N = 64  # elements on each device
RING = [(i, (i + 1) % 4) for i in range(4)]


def a_mesh(sizes=(1, 4, 2), axes=('dp', 'fsdp', 'mp'), order=range(8)) -> Mesh:
    return Mesh(np.array([jax.devices()[i] for i in order]).reshape(sizes), axes)


def compiled(function, mesh, dtype='float32') -> list[Collective]:
    """The collectives of a function of one array, N elements of it on each device."""
    spec = PartitionSpec(mesh.axis_names)
    local = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
    return collectives(jax.jit(local).lower(jax.ShapeDtypeStruct((8 * N,), dtype)).compile().as_text(), mesh)


@pytest.mark.parametrize(('function', 'expected'), [
    (lambda x: lax.psum(x, 'mp'), Collective('all-reduce', ('mp',), 2, 4 * N, 1)),
    (lambda x: lax.psum(x, ('fsdp', 'mp')), Collective('all-reduce', ('fsdp', 'mp'), 8, 4 * N, 1)),
    (lambda x: lax.all_gather(x, 'fsdp', tiled=True), Collective('all-gather', ('fsdp',), 4, 4 * 4 * N, 1)),
    (lambda x: lax.all_gather(x, ('fsdp', 'mp'), tiled=True), Collective('all-gather', ('fsdp', 'mp'), 8, 32 * N, 1)),
    (lambda x: lax.psum_scatter(x, 'fsdp', tiled=True), Collective('reduce-scatter', ('fsdp',), 4, 4 * N, 1)),
    (lambda x: lax.ppermute(x, 'fsdp', RING), Collective('collective-permute', ('fsdp',), 4, 4 * N, 1)),
    (lambda x: lax.all_to_all(x, 'mp', 0, 0, tiled=True), Collective('all-to-all', ('mp',), 2, 4 * N, 1)),
], ids=['psum', 'psum of two axes', 'gather', 'gather of two axes', 'scatter', 'permute', 'all to all'])
def test_each_kind_has_its_axes_devices_and_bytes(function, expected):
    """Bytes are the larger of operand and result: of N floats, what is gathered 4 or 8 times that."""
    assert compiled(function, a_mesh()) == [expected]


def test_what_a_device_sends_follows_the_ring_algorithms():
    """(n-1)/n of the bytes for a gather and a scatter, twice that for an all-reduce, all of them for a permute."""
    sent = lambda kind: Collective(kind, ('x',), 4, 1000, 7).wire_bytes
    assert [sent(kind) for kind in ('all-gather', 'reduce-scatter', 'all-to-all', 'all-reduce', 'collective-permute')] \
        == [750, 750, 750, 1500, 1000]
    found = [Collective('all-gather', ('x',), 4, 1000, 7), Collective('all-reduce', ('x',), 2, 8, 2),
             Collective('all-reduce', ('x', 'y'), 8, 80, 1)]
    assert bytes_by_axis(found) == {'x': 7 * 750 + 2 * 8, 'x,y': 140}


def test_collectives_in_loops_count_as_often_as_the_loops_turn():
    """A permute 5 times, and a psum 5 * 3 times in the scan within the scan."""
    def inner(x, _):
        return lax.psum(x, 'mp') * 0.5, None

    def outer(x, _):
        return lax.scan(inner, lax.ppermute(x, 'fsdp', RING), None, length=3)[0], None

    assert compiled(lambda x: lax.scan(outer, x, None, length=5)[0], a_mesh()) == [
        Collective('all-reduce', ('mp',), 2, 4 * N, 15), Collective('collective-permute', ('fsdp',), 4, 4 * N, 5)]


def test_of_a_conditional_the_branch_that_sends_most_counts():
    branches = [lambda x: x, lambda x: lax.psum(x, 'fsdp'), lambda x: lax.psum(x, 'mp')]
    found = compiled(lambda x: lax.switch(jnp.int32(x[0]), branches, x), a_mesh())
    assert found == [Collective('all-reduce', ('fsdp',), 4, 4 * N, 1)]


def test_reductions_that_were_combined_are_one_collective():
    """The compiler sends x and y[:8] in one all-reduce with a tuple for a result: 4 * (N + 8) bytes, once."""
    found = compiled(lambda x: (lax.psum(x, 'mp'), lax.psum(x[:8] * 2, 'mp')), a_mesh())
    assert found == [Collective('all-reduce', ('mp',), 2, 4 * (N + 8), 1)]


def test_equal_collectives_are_merged_and_bfloat16_travels_as_float32_on_a_cpu():
    """Two gathers of N bfloat16 each: the CPU's compiler converts before it sends."""
    def gathers(x):
        return lax.all_gather(x, 'fsdp', tiled=True), lax.all_gather(jnp.sin(x), 'fsdp', tiled=True)

    assert compiled(gathers, a_mesh(), 'bfloat16') == [Collective('all-gather', ('fsdp',), 4, 4 * 4 * N, 2)]


@pytest.mark.parametrize('mesh', [a_mesh(order=[3, 1, 2, 0, 7, 5, 6, 4]),
                                  a_mesh((1, 2, 4), ('dp', 'mp', 'fsdp')),
                                  a_mesh((2, 2, 2), ('mp', 'dp', 'fsdp'), [7, 6, 5, 4, 3, 2, 1, 0])],
                         ids=['devices out of order', 'mp before fsdp', 'mp first'])
def test_places_in_the_mesh_are_meant_not_ids_of_devices(mesh):
    """A psum over mp is one over mp, whatever the order of devices and axes."""
    found = compiled(lambda x: lax.psum(x, 'mp'), mesh)
    assert found == [Collective('all-reduce', ('mp',), mesh.shape['mp'], 4 * N, 1)]


def test_an_axis_of_one_device_sends_nothing():
    assert compiled(lambda x: lax.psum(x, 'dp') + 1, a_mesh()) == []


@pytest.mark.parametrize(('written', 'groups'), [
    ('replica_groups={{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('source_target_pairs={{0,1},{3,0}}', [[0, 1], [3, 0]]),
    ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ('replica_groups={}', [[0, 1, 2, 3]]),
    ("replica_groups=mesh['fsdp'=2,'mp'=2] {'mp'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['dp'=1,'fsdp'=2,'mp'=2] {'fsdp'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['fsdp'=2,'mp'=2] {'mp','fsdp'}", [[0, 2, 1, 3]]),
    ("replica_groups=mesh['fsdp'=2,'mp'=2], device_ids=(3,1,2,0) {'mp'}", [[3, 1], [2, 0]]),
    ("replica_groups=mesh['fsdp'=2,'mp'=2], device_ids=([2,2]T(1,0)) {'mp'}", [[0, 2], [1, 3]]),
])
def test_groups_are_read_in_each_of_their_forms(written, groups):
    attributes = f', channel_id=1, {written}, use_global_device_ids=true'
    instruction = hlo.Instruction('psum.1', 'f32[]', 'all-reduce', '%x', attributes, False)
    assert device_groups(instruction, 4).tolist() == groups


def test_groups_of_another_mesh_or_of_none_raise():
    reduce = functools.partial(hlo.Instruction, 'psum.1', 'f32[]', 'all-reduce', '%x', root=False)
    with pytest.raises(ValueError, match='the mesh 4 devices: pass the mesh that'):
        device_groups(reduce(', replica_groups={{0,1},{2,4}}'), 4)
    with pytest.raises(ValueError, match='no groups of devices in psum.1'):
        device_groups(reduce(', to_apply=%add'), 4)
    with pytest.raises(ValueError, match='a part of an axis is not known'):
        device_groups(reduce(", replica_groups=mesh['x'=4] {'x':(1)2}"), 4)


ASYNCHRONOUS = """HloModule started, is_scheduled=true

ENTRY %main (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %y = bf16[8,128]{1,0} negate(%x)
  %all-gather-start = ((bf16[8,128]{1,0}, bf16[8,128]{1,0}), (bf16[32,128]{1,0}, bf16[32,128]{1,0})) \
all-gather-start(%x, %y), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, use_global_device_ids=true
  %all-gather-done = (bf16[32,128]{1,0}, bf16[32,128]{1,0}) all-gather-done(%all-gather-start)
  ROOT %result = bf16[32,128]{1,0} get-tuple-element(%all-gather-done), index=0
}
"""


def test_a_start_and_its_done_are_one_collective():
    """Two bf16[8,128] of 4 devices: 4 * 2 * 2048 bytes, at the start; the done adds nothing."""
    assert collectives(ASYNCHRONOUS, a_mesh()) == [Collective('all-gather', ('fsdp',), 4, 4 * 2 * 2048, 1)]


def test_a_tpus_text_is_read(golden):
    """The instructions that tests/golden/tpu/README.md lists, by hand; the chain of three fusions counts once a turn.

    Weights of 3200 x 4320 bfloat16 are 27,648,000 bytes, the padded gradient 3328 * 4320 * 2, activations
    2 * 1024 * 3200 * 2, the slice that is permuted 96 * 4320 * 2, attention's four gradients 4 * 3200 * 1600 * 2.
    """
    assert collectives((golden / 'tpu/step_v5e.txt').read_text(), a_mesh()) == [
        Collective('all-gather', ('fsdp',), 4, 27_648_000, 52),
        Collective('all-reduce', ('fsdp',), 4, 40_960_000, 26),
        Collective('collective-permute', ('fsdp',), 4, 829_440, 26),
        Collective('reduce-scatter', ('fsdp',), 4, 28_753_920, 26),
        Collective('reduce-scatter', ('mp',), 2, 13_107_200, 26)]


@pytest.mark.libtpu
def test_the_tpu_sends_what_the_cpu_sends_in_half_the_bytes():
    """A two-layer scan of gathered weights: the same kinds and times along the same axes, bfloat16 as bfloat16."""
    from instruments.tpu.compile import devices

    M = 256

    def loss(weights_NMF, x_BM):
        def layer(x, w):
            return jnp.tanh(x @ lax.all_gather(w, 'fsdp', tiled=True)), None
        y = lax.scan(layer, x_BM, weights_NMF)[0]
        return lax.psum(jnp.sum(y.astype(jnp.float32)), ('fsdp', 'mp'))

    def text(mesh):
        local = jax.shard_map(jax.grad(loss), mesh=mesh, check_vma=False, out_specs=PartitionSpec(None, 'fsdp'),
                              in_specs=(PartitionSpec(None, 'fsdp'), PartitionSpec(('fsdp', 'mp'))))
        shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, spec))
                  for shape, spec in (((2, M, M), PartitionSpec(None, 'fsdp')), ((512, M), PartitionSpec('fsdp')))]
        return jax.jit(local).lower(*shapes).compile().as_text()

    sent = []
    for mesh in (a_mesh(), Mesh(np.array(devices('v5e:2x4')).reshape(1, 4, 2), ('dp', 'fsdp', 'mp'))):
        by_kind = types.SimpleNamespace(gathered=0, reduced=0)
        for found in collectives(text(mesh), mesh):
            if found.bytes > 1000 and found.axes == ('fsdp',):
                # an all-reduce of a gradient is a reduce-scatter that the TPU's compiler made more of
                part = 'gathered' if found.kind == 'all-gather' else 'reduced'
                setattr(by_kind, part, getattr(by_kind, part) + found.bytes * found.times)
        sent.append(by_kind)
    assert sent[0].gathered == 2 * sent[1].gathered > 0 and sent[0].reduced == 2 * sent[1].reduced > 0
