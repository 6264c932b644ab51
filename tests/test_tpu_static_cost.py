"""The static time of kernels: the DMA model and the units by hand, and one kernel compiled whose time is known."""
import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from instruments.kernel_time import static_cost
from instruments.kernel_time.schedule import parse
from instruments.kernel_time.static_cost import LATENCY, Transfers
from instruments.tpu import chips
from instruments.tpu.step_cost import step_cost

V5E = chips.CHIPS['v5e']
GRANULES = 1000  # of 32 bytes


def test_transfers_share_the_bandwidth_one_after_the_other():
    """Two DMAs started together: one arrives after bytes / bandwidth + latency, the other bytes / bandwidth later."""
    transfers = Transfers(V5E)
    for flag in (1, 2):
        transfers.start(0.0, 'hbm_to_vmem', 0, GRANULES, 0, flag)
    cycles = 32 * GRANULES / 819e9 * 1.503e9  # 58.7
    assert transfers.wait(0.0, 1, GRANULES, 0) == pytest.approx(cycles + 600e-9 * 1.503e9, rel=1e-3)
    assert transfers.wait(0.0, 2, GRANULES, 0) == pytest.approx(2 * cycles + 600e-9 * 1.503e9, rel=1e-3)
    assert transfers.hbm_bytes == 2 * 32 * GRANULES and transfers.count == 2


def test_a_transfer_within_the_core_does_not_queue():
    transfers = Transfers(V5E, latency=0.0)
    transfers.start(0.0, 'hbm_to_vmem', 0, 100 * GRANULES, 0, 1)
    transfers.start(0.0, 'vmem_to_vmem', 0, GRANULES, 0, 2)
    assert transfers.wait(0.0, 2, GRANULES, 0) == transfers.wait(0.0, 1, 100 * GRANULES, 0) / 100
    assert transfers.hbm_bytes == 100 * 32 * GRANULES


def test_a_late_wait_costs_nothing_and_half_of_a_pair_is_not_enough():
    transfers = Transfers(V5E, latency=0.0)
    transfers.start(0.0, 'hbm_to_vmem', 0, GRANULES, 0, 1)
    assert transfers.wait(1e6, 1, GRANULES, 0) == 0.0
    transfers.add_flag(1e6, 1, -GRANULES)  # what the program does after its wait
    with pytest.raises(ValueError, match='waits for 1000 granules'):
        transfers.wait(1e6, 1, GRANULES, 0)
    transfers.set_flag(1e6, 1, 0)
    transfers.start(1e6, 'hbm_to_vmem', 0, GRANULES // 2, 0, 1)
    with pytest.raises(ValueError, match='gets 500'):
        transfers.wait(1e6, 1, GRANULES, 0)


def test_two_cores_have_half_of_the_bandwidth_each():
    chip = chips.CHIPS['v5p']
    assert Transfers(chip).bytes_per_cycle == pytest.approx(2765e9 / 2 / chip.clock)


def test_a_matrix_unit_is_busy_for_the_least_distance_between_its_operations():
    """Four multiplications on mxu0, eight cycles apart at the closest, in 40 cycles: 32 / 40."""
    lines = ['{}'] * 40
    for place in (0, 8, 16, 30):
        lines[place] = f'{{ %{place} = vmatmul.bf16.gmra.mxu0 %v{place}_v1 }}'
    bundles = parse('\n'.join(f'{place:#x} : {line}' if place else f'0 : {line}' for place, line in enumerate(lines)))
    units = static_cost.matrix_units(bundles, [3] * 40, [(0, 40)])
    assert units == {'MXU': 32 / 40, 'MXUpush': 0.0, 'XLU': 0.0}
    used = [[0, 0, 2, 0, 0, 0, 0, 1, 0, 0]] * 40
    hot = static_cost.hottest(bundles, [3] * 40, [(0, 40)], [4, 3, 4, 2, 1, 3, 3, 1, 1, 2], used)
    assert hot.units['VALU'] == 0.5 and hot.units['VSTORE'] == 1.0 and hot.bound == 'VSTORE'
    assert hot.empty == 36 / 40 and hot.executions == 3


def test_sections_begin_after_delay_slots_and_at_targets():
    text = '\n'.join(f'{place:#x} : {line}' if place else f'0 : {line}' for place, line in enumerate(
        ['{}', '{}', '{ %1 = sbr.rel (%p0) target bundleno = 1 (0x1), region = 2 }', '{}', '{}']))
    assert static_cost.sections_of(parse(text), 1) == [(0, 1), (1, 4), (4, 5)]


def test_the_other_files_of_a_schedule_are_read():
    text = '== CAPACTIY:\nMXU, XLU\n 4 3 4\n== UTILIZATION:\n0 1 0\n2 0 1\n'
    assert static_cost.parse_slots(text) == ([4, 3, 4], [[0, 1, 0], [2, 0, 1]])
    windows = '#a [space=vmem, size = 0x1000, offset = 0x800, scoped]\n#b [space=vmem, size = 16, offset = 0]\n'
    assert static_cost.scoped_vmem(windows + '#c [space=smem, size = 9, offset = 9999999]') == 0x1800


HLO = """
%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
  %attend.2 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={}
}
%condition (arg: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(26)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %while.3 = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  %copy.4 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"7"}
  %attend.5 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  %all-reduce.6 = f32[8]{0} all-reduce(%x), replica_groups={}
}
"""


def test_a_loop_counts_as_often_as_it_turns():
    """26 turns of a fusion of 100 cycles and a copy of 7; the kernel inside runs 26 times, the one outside once."""
    cost = step_cost(HLO)
    assert cost.cycles == 26 * 100 + 7 and cost.by_opcode == {'fusion': 2600, 'copy': 7}
    assert cost.kernels == {'attend.2': 26, 'attend.5': 1} and cost.without_estimate == {'all-reduce': 1}
    with pytest.raises(ValueError, match='no ENTRY'):
        step_cost('not HLO')


def copy(x):
    """Every block is read once and written once, with next to no work."""
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] + 1

    block = pl.BlockSpec((512, 1024), lambda i: (i, 0))
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(x.shape[0] // 512,),
                          in_specs=[block], out_specs=block, name='copy')(x)


@pytest.mark.libtpu
@pytest.mark.parametrize('name', ['v5e', 'v6e', 'v7x'])
def test_a_copy_takes_as_long_as_its_bytes(name):
    """33.5 MB in and 33.5 MB out: bytes / bandwidth + two latencies, within 5 %, and at least the bytes."""
    static = static_cost.static_time(name, copy, jax.ShapeDtypeStruct((8192, 1024), jnp.float32))
    seconds = 2 * 8192 * 1024 * 4 / static.chip.hbm_bandwidth
    assert static.hbm_bytes == 2 * 8192 * 1024 * 4 and static.kernels[0].dmas == 32
    assert seconds <= static.ms * 1e-3 <= 1.05 * (seconds + 2 * LATENCY)
    assert static.vmem_bytes == 4 * 512 * 1024 * 4 and static.mxu == 0.0 and static.outside_ms == 0.0


@pytest.mark.libtpu
def test_a_kernel_in_a_loop_is_timed_once_a_turn():
    x = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)
    static = static_cost.static_time('v5e', lambda x: jax.lax.fori_loop(0, 3, lambda _, x: copy(x), x), x)
    kernel, = static.kernels
    assert kernel.executions == 3 and static.ms == pytest.approx(3 * kernel.ms)


@pytest.mark.libtpu
def test_the_figure_of_a_shipped_kernel_is_the_known_one():
    """jax's flash attention with tiles of 1024 at B8 H32 T1024 D128 on v5e: 0.966 ms, as the first instrument gave."""
    if importlib.metadata.version('libtpu') != '0.0.42.1':
        pytest.skip('the figure belongs to libtpu 0.0.42.1')
    from instruments.bench import anchors, shapes
    case = anchors.flash(shapes.ATTENTION['s1'], False, (1024, 1024))
    x = jax.ShapeDtypeStruct((8, 32, 1024, 128), jnp.bfloat16)
    static = static_cost.static_time('v5e', case.function, x, x, x)
    assert round(static.ms, 3) == 0.966 and not static.warnings
    assert round(static.hot.units['MXU'], 2) == 0.73 and static.spills == 3499


@pytest.mark.libtpu
def test_a_program_without_a_kernel_has_no_static_time():
    with pytest.raises(ValueError, match='no Pallas kernel'):
        static_cost.static_time('v5e', jnp.sin, jax.ShapeDtypeStruct((8, 128), jnp.float32))
