"""The estimate of a step: links, FLOPs, bytes and waiting by hand, and a piece of a real step."""
import dataclasses
import json
import multiprocessing
import types
from concurrent import futures

import jax
import numpy as np
import pytest

from instruments.kernel_time import static_times
from instruments.tpu import hlo, interconnect, operations
from instruments.tpu.chips import CHIPS
from instruments.tpu.collectives import Collective, collectives
from instruments.tpu.estimate import Estimate, estimate
from instruments.tpu.step_cost import step_cost
from training.state import abstract_batch, abstract_state

V5E = CHIPS['v5e']
LINK = 45e9  # bytes/s, one way


def a_mesh(*sizes: int, axes=('dp', 'fsdp', 'mp'), places=None):
    """A mesh of described devices; by default on a plane whose x is the last axis of the mesh and y the one before."""
    places = places or [(x, y, 0) for y in range(sizes[-2]) for x in range(sizes[-1])]
    devices = np.empty(len(places), object)
    devices[:] = [types.SimpleNamespace(coords=place) for place in places]
    return types.SimpleNamespace(devices=devices.reshape(sizes), axis_names=axes)


def time_of(kind, size, groups, mesh, chip=V5E) -> float:
    groups = np.array(groups)
    devices = groups.shape[1] if kind != 'collective-permute' else len(groups)
    return interconnect.seconds(Collective(kind, ('x',), devices, size, 1), groups, interconnect.network(mesh, chip))


# ---------------------------------------------------------------- links


def test_a_gather_over_a_line_of_four_takes_what_is_published():
    """bf16[2048, 8192] over 4 of v5e's 4x8: the ends receive 3/4 of it over one link, 560 us by the scaling book."""
    mesh = a_mesh(1, 4, 8)
    line = np.arange(32).reshape(4, 8).T
    assert time_of('all-gather', 2048 * 8192 * 2, line, mesh) == pytest.approx(560e-6, rel=2e-3)


@pytest.mark.parametrize(('groups', 'sizes', 'links'), [
    ([[0, 1], [2, 3], [4, 5], [6, 7]], (1, 4, 2), 1),
    ([[0, 1, 2, 3], [4, 5, 6, 7]], (1, 4, 2), 2),
    ([list(range(8))], (1, 4, 2), 2),
    (np.arange(256).reshape(16, 16), (1, 16, 16), 2),
    ([list(range(256))], (1, 16, 16), 4),
    (np.arange(128).reshape(8, 16).T, (1, 8, 16), 1),
], ids=['pairs', 'squares', 'a block without wrap-around', 'rings', 'a torus', 'the side without rings'])
def test_the_device_with_the_fewest_neighbours_sets_the_bandwidth(groups, sizes, links):
    """(n-1)/n of 2**30 bytes over so many links; on v5e a side of 16 closes to a ring."""
    n = len(groups[0])
    assert time_of('all-gather', 2**30, groups, a_mesh(*sizes)) == pytest.approx((n - 1) / n * 2**30 / (links * LINK))


def test_groups_that_lie_between_each_other_share_links():
    """On a line of 8, rings over the even and over the odd devices both go over the links in the middle."""
    mesh = a_mesh(1, 8, 1)
    found = time_of('all-gather', 2**30, [[0, 2, 4, 6], [1, 3, 5, 7]], mesh)
    assert found == pytest.approx(2 * 3 / 4 * 2**30 / LINK)


def test_a_permute_waits_for_its_most_used_link():
    """A shift by one around a line has the way back to itself; a shift by two has two senders on a link."""
    mesh, line = a_mesh(1, 8, 1), np.arange(8)
    shift = lambda by: np.stack([line, np.roll(line, -by)], axis=1)
    assert time_of('collective-permute', 2**30, shift(1), mesh) == pytest.approx(2**30 / LINK)
    assert time_of('collective-permute', 2**30, shift(2), mesh) == pytest.approx(2 * 2**30 / LINK)


def test_small_messages_take_the_hops_of_the_longest_way():
    """3 us for a gather over a line of 4 (the scaling book's own figure), twice that for an all-reduce."""
    line = [[0, 1, 2, 3]]
    assert time_of('all-gather', 64, line, a_mesh(1, 4, 1)) == pytest.approx(3e-6)
    assert time_of('all-reduce', 64, line, a_mesh(1, 4, 1)) == pytest.approx(6e-6)


@pytest.mark.parametrize(('name', 'sides', 'wraps'), [
    ('v5e', (8, 16, 1), (False, True, False)), ('v6e', (16, 16, 1), (True, True, False)),
    ('v5p', (4, 4, 8), (True, True, True)), ('v4', (2, 4, 4), (False, False, False))])
def test_which_sides_have_wrap_around_links(name, sides, wraps):
    places = [(x, y, z) for x in range(sides[0]) for y in range(sides[1]) for z in range(sides[2])]
    net = interconnect.network(a_mesh(len(places), 1, 1, places=places), CHIPS[name])
    assert net.sides == sides and net.wraps == wraps


def test_links_are_those_of_the_published_tables():
    """Bytes/s one way; v7x is half a chip."""
    assert {name: chip.link_bandwidth for name, chip in CHIPS.items()} == \
        {'v4': 45e9, 'v5e': 45e9, 'v5p': 90e9, 'v6e': 90e9, 'v7x': 45e9}


def test_a_mesh_without_coordinates_raises():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('x',))
    with pytest.raises(ValueError, match='tpu.compile.devices'):
        interconnect.network(mesh, V5E)


# ---------------------------------------------------------------- what an instruction computes and moves


def counted(text: str, name: str) -> tuple[int, int]:
    """(FLOPs, bytes of HBM) of the named instruction of the entry computation."""
    module = hlo.parse(text)
    instruction = next(found for found in module.computations[module.entry] if found.name == name)
    return tuple(count(module, module.entry, instruction) for count in (operations.flops, operations.hbm_bytes))


@pytest.mark.parametrize(('left', 'right', 'result', 'attributes'), [
    ('2,1024,3200', '3200,4320,1', '2,1024,4320', 'window={size=1}, dim_labels=0bf_io0->0bf'),
    ('2,1024,3200', '2,1024,4320', '3200,4320,1', 'window={size=2}, dim_labels=0fb_0io->bf0'),
    ('2,1024,4320,1', '4320,32,100,1', '2,1024,32,100',
     'window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f'),
    ('2,1024,43,100', '43,100,3200,1', '2,1024,3200,1', 'window={size=1x43}, dim_labels=0b1f_1io0->0bf1'),
    ('2,1024,4300', '4300,3200', '2,1024,3200', 'lhs_contracting_dims={2}, rhs_contracting_dims={0}'),
])
def test_flops_of_products_as_each_compiler_writes_them(left, right, result, attributes):
    """Two for each of the result's elements and each one summed over, of padding none: 2 * 2048 * 3200 * 4320 etc."""
    opcode = 'dot' if 'contracting' in attributes else 'convolution'
    text = (f'ENTRY %main (x: f32[]) -> f32[] {{\n  %x = bf16[{left}]{{0}} parameter(0)\n'
            f'  %y = bf16[{right}]{{0}} parameter(1)\n'
            f'  ROOT %product = bf16[{result}]{{0}} {opcode}(%x, %y), {attributes}\n}}\n')
    summed = {'2,1024,3200': 2048 * 3200 * 4320, '2,1024,4320,1': 2048 * 4320 * 3200}.get(left, 2048 * 4300 * 3200)
    assert counted(text, 'product')[0] == 2 * summed


MOVES = """HloModule moves, is_scheduled=true

%slicing (p.0: f32[26,800], p.1: s32[]) -> f32[1,800] {
  %p.0 = f32[26,800]{1,0} parameter(0)
  %p.1 = s32[]{:S(6)} parameter(1)
  %cast = f32[26,800]{1,0} bitcast(%p.0)
  ROOT %slice.1 = f32[1,800]{1,0:S(1)} dynamic-slice(%cast, %p.1, %p.1), dynamic_slice_sizes={1,800}
}

%updating (p.2: f32[26,800], p.3: bf16[1,800], p.4: s32[]) -> f32[26,800] {
  %p.2 = f32[26,800]{1,0} parameter(0)
  %p.3 = bf16[1,800]{1,0:S(1)} parameter(1)
  %p.4 = s32[]{:S(6)} parameter(2)
  %wide = f32[1,800]{1,0} convert(%p.3)
  ROOT %update.1 = f32[26,800]{1,0} dynamic-update-slice(%p.2, %wide, %p.4, %p.4)
}

%handing_on (p.5: f32[26,800], p.6: f32[8]) -> (f32[26,800], f32[8]) {
  %p.5 = f32[26,800]{1,0} parameter(0)
  %p.6 = f32[8]{0} parameter(1)
  %twice = f32[8]{0} add(%p.6, %p.6)
  ROOT %both = (f32[26,800]{1,0}, f32[8]{0}) tuple(%p.5, %twice)
}

ENTRY %main (x: f32[26,800], y: f32[8]) -> f32[26,800] {
  %x = f32[26,800]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %turn = s32[]{:S(6)} constant(3)
  %sliced = f32[1,800]{1,0:S(1)} fusion(%x, %turn), kind=kLoop, calls=%slicing
  %small = bf16[1,800]{1,0:S(1)} convert(%sliced)
  %updated = f32[26,800]{1,0} fusion(%x, %small, %turn), kind=kLoop, calls=%updating
  %pair = (f32[26,800]{1,0}, f32[8]{0}) fusion(%updated, %y), kind=kLoop, calls=%handing_on
  %copy-start = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = f32[8]{0:S(1)} copy-done(%copy-start)
  %slice-start = ((f32[26,800]{1,0}), f32[2,800]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:800]}
  %alike = f32[26,800]{1,0} add(%x, %x)
  ROOT %result = f32[26,800]{1,0} get-tuple-element(%pair), index=0
}
"""


@pytest.mark.parametrize(('name', 'expected'), [
    ('sliced', 4 * 800),  # reads the slice, writes to VMEM
    ('small', 0),  # from VMEM to VMEM
    ('updated', 4 * 800),  # writes the update alone
    ('pair', 2 * 4 * 8),  # y read once, its double written; x is handed on
    ('copy-start', 4 * 8), ('copy-done', 0), ('slice-start', 4 * 2 * 800),  # read from HBM, written to VMEM
    ('alike', 2 * 4 * 26 * 800),  # both operands are one array
    ('result', 0)])
def test_bytes_are_the_least_that_cross_hbm(name, expected):
    assert counted(MOVES, name)[1] == expected


# ---------------------------------------------------------------- waiting

SCHEDULE = """HloModule schedule, is_scheduled=true

%condition (c: (s32[])) -> pred[] {
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (c: (s32[])) -> (s32[]) {
  %x = bf16[1000,1000]{1,0:S(1)} parameter(0)
  INSTRUCTIONS
  ROOT %result = (s32[]) tuple(%x)
}

ENTRY %main (c: (s32[])) -> (s32[]) {
  %c = (s32[]) parameter(0)
  ROOT %loop = (s32[]) while(%c), condition=%condition, body=%body
}
"""
GROUPS = dict(fsdp='replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, dimensions={0}',
              mp='replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true, dimensions={0}')
START = '%{name} = (bf16[1000,1000]{{1,0:S(1)}}, bf16[4000,1000]{{1,0:S(1)}}) all-gather-start(%x), {groups}'
GATHER = dict(fsdp=3 * 2e6 / LINK, mp=2e6 / LINK)  # seconds of a gather of x over either axis


def body(*lines: str) -> str:
    """Ten turns of these: 'work US' (so many microseconds), 'start NAME AXIS', 'done NAME', 'gather NAME AXIS'."""
    written = []
    for place, line in enumerate(lines):
        kind, name, *axis = line.split()
        if kind == 'work':
            cycles = round(float(name) * 1e-6 * V5E.clock)
            written.append(f'%work.{place} = bf16[8]{{0:S(1)}} fusion(%x), kind=kLoop, '
                           f'backend_config={{"estimated_cycles":"{cycles}"}}, calls=%nothing')
        elif kind == 'start':
            written.append(START.format(name=name, groups=GROUPS[axis[0]]))
        elif kind == 'done':
            written.append(f'%{name}-done = bf16[4000,1000]{{1,0:S(1)}} all-gather-done(%{name})')
        else:
            written.append(f'%{name} = bf16[4000,1000]{{1,0:S(1)}} all-gather(%x), {GROUPS[axis[0]]}')
    nothing = '\n%nothing (p: bf16[1000,1000]) -> bf16[8] {\n  %p = bf16[1000,1000]{1,0:S(1)} parameter(0)\n' \
              '  ROOT %s = bf16[8]{0:S(1)} slice(%p), slice={[0:8]}\n}\n'
    return SCHEDULE.replace('INSTRUCTIONS', '\n  '.join(written)).replace('\n%body', nothing + '\n%body')


@pytest.mark.parametrize(('lines', 'exposed'), [
    (['gather a fsdp', 'work 50'], GATHER['fsdp']),
    (['start a fsdp', 'work 50', 'done a'], GATHER['fsdp'] - 50e-6),
    (['start a fsdp', 'work 500', 'done a'], 0),
    (['work 500', 'start a fsdp', 'done a'], GATHER['fsdp']),
    (['start a fsdp', 'start b fsdp', 'work 50', 'done a', 'done b'], 2 * GATHER['fsdp'] - 50e-6),
    (['start a fsdp', 'start b mp', 'work 50', 'done a', 'done b'], GATHER['fsdp'] - 50e-6),
    (['start a fsdp', 'gather b mp', 'done a'], GATHER['fsdp']),
    (['start a fsdp', 'gather b fsdp', 'done a'], 2 * GATHER['fsdp']),
    (['start a fsdp', 'work 50'], GATHER['fsdp'] - 50e-6),
], ids=['synchronous', 'partly hidden', 'hidden', 'too late', 'two on one axis', 'two on two axes',
        'another goes on meanwhile', 'the same links must wait', 'never waited for: at the end of the turn'])
def test_only_what_no_computation_hides_is_exposed(lines, exposed):
    """Ten turns; a gather of 2 MB takes 133 us over a line of 4 and 44 us over a pair; links of two axes are apart."""
    found = estimate(body(*lines), a_mesh(1, 4, 2), V5E, {})
    assert found.exposed_seconds == pytest.approx(10 * exposed, abs=1e-8)
    work = sum(float(line.split()[1]) for line in lines if line.startswith('work'))
    assert found.seconds == pytest.approx(10 * (exposed + work * 1e-6), abs=1e-7)
    assert found.compute_seconds == pytest.approx(10 * work * 1e-6, abs=1e-7)


def test_the_interconnects_bound_is_that_of_the_busiest_dimension():
    """One gather over y and two over x: all three one after another, or as long as y is busy."""
    found = estimate(body('gather a fsdp', 'gather b mp', 'gather c mp'), a_mesh(1, 4, 2), V5E, {})
    assert found.interconnect_seconds == pytest.approx(10 * (GATHER['fsdp'] + 2 * GATHER['mp']))
    assert found.bounds['interconnect'] == pytest.approx(10 * GATHER['fsdp']) and found.binds == 'interconnect'
    assert found.wire_bytes == {'fsdp': 10 * 6_000_000, 'mp': 10 * 2 * 2_000_000}


# ---------------------------------------------------------------- a real step


def test_a_piece_of_a_real_step(golden):
    """tests/golden/tpu: 26 turns of what its README lists; every figure by hand.

    Products: three of 2 * 2048 * 3200 * 4320.  Cycles: those in the text.  Hidden: of the chain's gather (a line of 4:
    3/4 of 27,648,000 bytes over one link, 460.8 us) the 456,007 cycles of the product that advances it, of the permute
    (18.4 us) all.  On v5e:2x4 in plain order fsdp is a line of 4 and mp a pair.
    """
    text, kernel = (golden / 'tpu/step_v5e.txt').read_text(), 100e-6
    found = estimate(text, a_mesh(1, 4, 2), V5E, {'flash': 1.0, 'flash_forward': kernel})
    cycles = 456_007 + 448_572 + 98_828 + 8_918 + 529_136
    gather, scatter, pair = 0.75 * 27_648_000 / LINK, 0.75 * 28_753_920 / LINK, 0.5 * 13_107_200 / LINK
    reduce = 1.5 * 40_960_000 / LINK
    assert step_cost(text).cycles == 26 * cycles
    assert found.compute_seconds == pytest.approx(26 * (cycles / 1.50299e9 + kernel), rel=1e-5)
    assert found.flops == 26 * (3 * 2 * 2048 * 3200 * 4320 + 6_710_886_400)
    assert found.interconnect_seconds == pytest.approx(26 * (2 * gather + scatter + pair + reduce + 829_440 / LINK))
    hidden = 456_007 / 1.50299e9 + 829_440 / LINK
    assert found.exposed_seconds == pytest.approx(found.interconnect_seconds - 26 * hidden, rel=1e-5)
    assert found.bounds['compute'] == pytest.approx(found.flops / 197e12)
    assert found.bounds['hbm'] == pytest.approx(found.hbm_bytes / 819e9)
    assert found.bounds['interconnect'] == pytest.approx(found.interconnect_seconds - 26 * pair)
    assert found.binds == 'interconnect'
    assert Estimate(**dataclasses.asdict(found)) == found  # it can be kept as JSON


def test_a_kernel_without_a_time_and_a_text_without_a_schedule_raise(golden):
    text = (golden / 'tpu/step_v5e.txt').read_text()
    with pytest.raises(ValueError, match='no time of the Pallas kernel flash_forward.8'):
        estimate(text, a_mesh(1, 4, 2), V5E, {'flash_backward': 1.0})
    with pytest.raises(ValueError, match='is_scheduled=true'):
        estimate(text.replace('is_scheduled=true', ''), a_mesh(1, 4, 2), V5E, {})
    assert estimate(text, a_mesh(1, 4, 2), V5E, lambda name: 1.0 if name == 'flash_forward.8' else 0).seconds > 26


def debug_step():
    """(the debug model, the mesh's positions of devices, the text of its training step on them)."""
    from instruments.tpu.compile import devices
    from model.config import MODELS, Compute
    from model.partition import make_mesh
    from training import step
    from training.optimizer import AdamW

    config, mesh = MODELS['debug'], make_mesh('1,4,2', devices('v5e:2x4'))
    compute = Compute(dtype='bf16', remat_block='nothing_saveable')
    with jax.set_mesh(mesh):
        lowered = step.make_train_step(config, compute, AdamW(), 1, mesh).lower(
            abstract_state(config, AdamW(), 1, mesh), abstract_batch(mesh, 8, 128))
    return config, [tuple(device.coords) for device in mesh.devices.flat], lowered.compile().as_text()


@pytest.mark.libtpu
def test_a_training_step_sends_and_computes_what_its_sizes_say(monkeypatch):
    """The debug model's step in bfloat16 on fsdp 4, mp 2, nothing_saveable.

    FLOPs: 2 a token for every weight of a product, forward, backward twice, and in layers once more but for the last
    product.  Over fsdp a device receives half of every weight, a layer's twice, and gives away every gradient once.
    """
    monkeypatch.delenv('LIBTPU_INIT_ARGS', raising=False)  # another process, which writes no schedules
    with futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as apart:
        config, places, text = apart.submit(debug_step).result()
    mesh, tokens = a_mesh(1, 4, 2, places=places), 8 * 128
    M, F, N, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    layer = 4 * M * M + 3 * M * F
    attention = 4 * N * 8 * config.num_attention_heads * 128 * 128 * config.head_dim * (1 + 1 + 2)
    found = estimate(text, mesh, V5E, {})
    assert 8 * found.flops == pytest.approx((8 * N * layer - 2 * N * M * F + 6 * V * M) * tokens + attention, rel=0.01)
    large = [(collective.kind == 'all-gather', collective.bytes * collective.times)
             for collective in collectives(text, mesh) if collective.axes == ('fsdp',) and collective.bytes > 4096]
    assert sum(bytes_ for gathered, bytes_ in large if gathered) == 2 * N * layer + 2 * V * M
    assert sum(bytes_ for gathered, bytes_ in large if not gathered) == N * layer + 2 * V * M
    assert found.compute_seconds > found.bounds['compute'] and np.isfinite(found.seconds)


# ---------------------------------------------------------------- the kernels' times

SIZES = dict(B=1, T=512, H=2, K=1, D=64, dtype='bfloat16', segments=0)


def test_kernels_are_timed_once_in_a_process_that_is_not_told_to_write_schedules_elsewhere(monkeypatch):
    """One process for equal shapes, without this one's LIBTPU_INIT_ARGS; its last line is the answer."""
    asked = []

    def run(command, env, **options):
        asked.append((json.loads(command[-1]), 'LIBTPU_INIT_ARGS' in env, env['JAX_PLATFORMS']))
        return types.SimpleNamespace(returncode=0, stdout='a note\n{"forward": 1e-05, "backward": 3e-05}\n')

    monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_jf_dump_to=/nowhere')
    monkeypatch.setattr(static_times.subprocess, 'run', run)
    static_times.flash_times.cache_clear()
    for _ in range(2):
        assert static_times.flash_times('v5e', **SIZES) == dict(forward=1e-05, backward=3e-05)
    assert asked == [(dict(chip='v5e', **SIZES), False, 'cpu')]
    static_times.flash_times.cache_clear()


def test_kernels_that_cannot_be_timed_raise_with_the_reason(monkeypatch):
    failed = types.SimpleNamespace(returncode=1, stdout='', stderr='…\nValueError: libtpu is not installed\n')
    monkeypatch.setattr(static_times.subprocess, 'run', lambda *arguments, **options: failed)
    static_times.flash_times.cache_clear()
    with pytest.raises(ValueError, match="(?s)'H': 2.*libtpu is not installed"):
        static_times.flash_times('v5e', **SIZES)


@pytest.mark.libtpu
def test_kernels_timed_apart_take_what_they_take_here():
    """Static times are deterministic; the backward pass has 5 products where the forward pass has 2."""
    static_times.flash_times.cache_clear()
    apart = static_times.flash_times('v5e', **SIZES)
    assert apart == static_times.compile_and_time('v5e', **SIZES)
    assert 0 < apart['forward'] < apart['backward'] < 1e-4
