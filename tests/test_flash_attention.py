"""Flash attention, forward and backward, in Pallas's TPU interpreter, whose memory holds NaN until it is written.

The bound on a bfloat16 result or gradient x, of kernel x_k, reference x_32, and the same reference computed in bfloat16
x_16:   max|x_k - x_32| <= 2 max|x_16 - x_32| + 1 ulp;  for float32, 16 ulps.  Inputs are of order 1: an ulp is the
type's epsilon times max|x_32|, or times 1 if that is more.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from instruments.bench.shapes import AttentionShape, attention_inputs
from kernels import flash_attention as flash
from kernels import reference
from kernels.tiles import FlashPlan, FlashTiles, Tiles, make_plan, vmem_bytes

NAN_FILLED = pltpu.InterpretParams(uninitialized_memory='nan')
RACES = pltpu.InterpretParams(uninitialized_memory='nan', detect_races=True)
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
SQUARES = Tiles(heads=1, block=128, strip=128, diagonal=128, turn=128)  # rows longer than 128 take several squares
STRIPS = Tiles(heads=2, block=512, strip=256, diagonal=128, turn=256)  # rows up to 512 are one square
bfloat16 = functools.partial(AttentionShape, B=1, K=1)
CASES = {  # every branch of the kernels: one square or several, causal or full, segments, tails, shared heads
    't1_d128': (bfloat16(T=1, H=1, D=128), dataclasses.replace(STRIPS, heads=1)),
    'strips_tail_group_in_a_step_d100': (bfloat16(T=300, H=2, D=100), STRIPS),
    'full_tail_d256': (bfloat16(T=129, H=1, D=256, causal=False), SQUARES),
    'float32_segments_tail_two_groups_in_a_step_d80': (bfloat16(T=97, H=4, K=2, D=80, segments=4, dtype='float32'),
                                                       dataclasses.replace(STRIPS, heads=4)),
    'squares_tail_group_in_two_passes_d64': (bfloat16(T=300, H=2, D=64), SQUARES),
    'squares_segments_tail_d96': (bfloat16(T=500, H=1, D=96, segments=5), SQUARES),
    'squares_full_segments_tail_d64': (bfloat16(T=300, H=1, D=64, segments=4, causal=False), SQUARES),
}
LONG = ('squares_segments_tail_d96', 'float32_segments_tail_two_groups_in_a_step_d80')  # in the interpreter
NAMES = ('o', 'dq', 'dk', 'dv')


def arrays(shape, seed=0):
    """q, k, v, the cotangent do, and segment ids or None."""
    q, k, v, segments_BT = attention_inputs(shape, seed)
    return q, k, v, np.random.default_rng(seed + 1).standard_normal(q.shape).astype(q.dtype), segments_BT


def with_gradients(shape, tiles, interpret=NAN_FILLED):
    """(q, k, v, do, segments) -> (o, dq, dk, dv)"""
    def call(q, k, v, do, segments_BT=None):
        attend = functools.partial(flash.flash_attention, scale=shape.D ** -0.5, causal=shape.causal,
                                   tiles=FlashTiles(tiles, tiles), interpret=interpret)
        o, gradients = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BT), q, k, v)
        return o, *gradients(do)
    return call


@functools.cache
def compiled(*case, **options):
    return quick_jit(with_gradients(*case, **options))


def kernel(shape, tiles, inputs, **options):
    return [np.asarray(x) for x in compiled(shape, tiles, **options)(*inputs)]


def expected(shape, inputs, dtype=jnp.float32):
    """(o, dq, dk, dv) of the reference, computed in `dtype`."""
    q, k, v, do, segments_BT = inputs
    positions_BT = np.broadcast_to(np.arange(shape.T, dtype=np.int32), (shape.B, shape.T))
    ids_BT = np.ones_like(positions_BT) if segments_BT is None else segments_BT
    attend = functools.partial(
        reference.attention, scale=shape.D ** -0.5, dtype=dtype, key_positions_BS=positions_BT, key_segments_BS=ids_BT,
        query_positions_BT=positions_BT if shape.causal else np.full_like(positions_BT, shape.T),
        query_segments_BT=ids_BT)
    o, gradients = jax.vjp(attend, *(jnp.asarray(x, dtype) for x in (q, k, v)))
    return [np.asarray(x, np.float32) for x in (o, *gradients(jnp.asarray(do, dtype)))]


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in CASES])
def test_errors_are_at_most_twice_those_of_the_reference_in_bfloat16(name):
    """The file's bound, for the output and the three gradients against a random cotangent; rows of padding are zero."""
    shape, tiles = CASES[name]
    inputs = arrays(shape)
    found, truth, rounded = kernel(shape, tiles, inputs), expected(shape, inputs), expected(shape, inputs, jnp.bfloat16)
    for what, x, x_32, x_16 in zip(NAMES, found, truth, rounded, strict=True):
        ulp = float(jnp.finfo(shape.dtype).eps) * max(1, np.abs(x_32).max())
        bound = 16 * ulp if shape.dtype == 'float32' else 2 * np.abs(x_16 - x_32).max() + ulp
        error = np.abs(x.astype(np.float32) - x_32).max()
        assert error <= bound, f'{what}: error {error:.2e} is {100 * error / bound:.0f} % of its bound'
        if shape.segments:
            assert not x[inputs[-1] == 0].any() and (inputs[-1] == 0).any()


def test_result_is_bitwise_repeatable_and_without_races():
    """Twice the same bits, and the interpreter's detector sees no access to a window that is still being copied."""
    shape, tiles = CASES['squares_tail_group_in_two_passes_d64']
    inputs = arrays(shape)
    first = kernel(shape, tiles, inputs)
    for again in (kernel(shape, tiles, inputs), kernel(shape, tiles, inputs, interpret=RACES)):
        for x, y in zip(first, again, strict=True):
            np.testing.assert_array_equal(x, y)
    assert not interpreter.races.races_found


@pytest.mark.parametrize('name', ['squares_segments_tail_d96', 'squares_full_segments_tail_d64'])
def test_a_segment_does_not_depend_on_another(name):
    """Other keys, values, queries and cotangents in segment 2: not a bit changes in the others' rows."""
    shape, tiles = CASES[name]
    inputs, others = arrays(shape), arrays(shape, seed=7)
    second_BT = inputs[-1] == 2
    mixed = [np.where(second_BT[..., None, None], y, x) for x, y in zip(inputs[:4], others[:4], strict=True)]
    for x, y in zip(kernel(shape, tiles, inputs), kernel(shape, tiles, (*mixed, inputs[-1])), strict=True):
        np.testing.assert_array_equal(x[~second_BT], y[~second_BT])
        assert (x[second_BT] != y[second_BT]).any()


def test_heads_over_mp_under_shard_map():
    """One of eight heads a device, varying axes checked: what one device gives, but for the rounding of D_i's sum."""
    shape = bfloat16(T=128, H=8, K=8, D=64)
    inputs = arrays(shape)[:4]
    spec = PartitionSpec(None, None, 'mp')
    sharded = jax.shard_map(with_gradients(shape, SQUARES), mesh=Mesh(np.array(jax.devices()), ('mp',)), in_specs=spec,
                            out_specs=spec, check_vma=True)
    for x, y in zip(quick_jit(sharded)(*inputs), kernel(shape, SQUARES, inputs), strict=True):
        x, y = np.asarray(x, np.float32), y.astype(np.float32)
        assert np.abs(x - y).max() <= float(jnp.finfo(jnp.bfloat16).eps) * np.abs(y).max()


# ---------------------------------------------------------------- the reference's own witnesses


def test_reference_equals_two_tokens_by_hand():
    """q = k = 1, 2 and scale ln 3 give the second token scores 2 ln 3 and 4 ln 3: weights 1/10 and 9/10."""
    line = lambda *x: jnp.array(x, jnp.float32)[None, :, None, None]
    at = dict(query_positions_BT=jnp.arange(2)[None], key_positions_BS=jnp.arange(2)[None],
              query_segments_BT=jnp.ones((1, 2), int), key_segments_BS=jnp.ones((1, 2), int))
    o = reference.attention(line(1, 2), line(1, 2), line(10, 20), scale=np.log(3), **at)
    np.testing.assert_allclose(o.ravel(), [10, 0.1 * 10 + 0.9 * 20], rtol=1e-6)


def test_reference_gradients_equal_finite_differences():
    """Central differences of sum(do * o) along a random direction in q, k and v."""
    shape = bfloat16(T=5, H=4, K=2, D=3, dtype='float32')
    q, k, v, do, _ = inputs = arrays(shape)
    loss = lambda *x: float((expected(shape, (*x, do, None))[0].astype(np.float64) * do).sum())
    for i, gradient in enumerate(expected(shape, inputs)[1:]):
        step = np.random.default_rng(i).standard_normal(gradient.shape).astype(np.float32) * 1e-2
        ahead, behind = ([x + sign * step if i == n else x for n, x in enumerate((q, k, v))] for sign in (1, -1))
        np.testing.assert_allclose((loss(*ahead) - loss(*behind)) / 2, (gradient * step).sum(), rtol=2e-2, atol=2e-5)


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize('tiles, message', [
    (dict(heads=0), 'self.heads=0'), (dict(diagonal=64), 'self.diagonal=64 must be a multiple of 128'),
    (dict(strip=384), 'block=512 must be a multiple of strip=384'), (dict(turn=192), 'turn=192'),
    (dict(turn=384), 'block=512 must be a multiple of turn=384'),
    (dict(strip=64), 'strip=64 must be a multiple of diagonal=128'),
])
def test_bad_tiles_are_refused(tiles, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**dict(heads=1, block=512, strip=256, diagonal=128, turn=256) | tiles)


def test_wrong_arguments_are_refused_before_compilation():
    """The message names the argument and what it should be."""
    q, k = jnp.zeros((2, 128, 6, 64)), jnp.zeros((2, 128, 2, 64))
    call = functools.partial(flash.flash_attention, scale=1.0, tiles=FlashTiles(SQUARES, SQUARES), interpret=NAN_FILLED)
    for arguments, options, message in (
            ((q, k[:, :64], k), {}, 'must be .B,T,H,D.'), ((q, k[:, :64], k[:, :64]), {}, 'must be .B,T,H,D.'),
            ((q[:, :, :5], k, k), {}, 'H a multiple of K'),
            ((q, k, k.astype(jnp.bfloat16)), {}, 'must all be bfloat16'),
            ((q, k, k, jnp.ones((2, 128))), {}, 'and int32'),
            ((q, k, k), dict(tiles=FlashTiles(two := Tiles(2, 128, 128, 128, 128), two)),
             'heads=2 of the tiles must divide H/K=3')):
        with pytest.raises(ValueError, match=message):
            call(*arguments, **options)
    with pytest.raises(ValueError, match="kind='cpu' of the device is no TPU that tiles are known for"):
        call(q, k, k, tiles=None, interpret=False)


def plan(T, H, K, D, tiles, causal=True, segments=False, B=1, dtype=jnp.bfloat16):
    return FlashPlan(B, T, H, K, D, causal, segments, jnp.dtype(dtype), tiles)


def test_vmem_sum_equals_arithmetic_by_hand():
    """Shape s1, bfloat16: a head's 1024 x 128 block is 1/4 MiB, a [1, 1024] row 32 KiB, a float32 sum 1/2 MiB."""
    s1 = plan(1024, 32, 32, 128, Tiles(heads=2, block=1024, strip=512, diagonal=128, turn=512))
    in_kib = lambda backward: vmem_bytes(s1, backward) / 1024
    # two buffers of q, o, k, v and lse for two heads; 512 x 1024 scores at 10 bytes; 1 MiB to spare
    assert in_kib(False) == 2 * (2 * 4 * 256 + 2 * 32) + 5120 + 1024
    # two buffers of q, do, dq, k, v, dk, dv, lse, D_i; sums of dq, dk, dv; 512 x 512 scores at 20 bytes
    assert in_kib(True) == 2 * (2 * 7 * 256 + 4 * 32) + 2 * 3 * 512 + 5120 + 1024


def test_squares_above_the_diagonal_and_of_strange_segments_are_not_visited():
    """Four blocks of one segment, each its own: after each diagonal square nothing else is needed, nor fetched."""
    short = plan(512, 1, 1, 64, SQUARES)
    own_P1, other_P = flash.squares(short, None, by_query=True)
    assert list(zip(own_P1.tolist(), other_P.tolist(), strict=False)) == [
        (0, 0), (1, 1), (1, 0), (2, 2), (2, 0), (2, 1), (3, 3), (3, 0), (3, 1), (3, 2)]
    packed = plan(512, 1, 1, 64, SQUARES, segments=True)
    segments_BT = jnp.repeat(jnp.array([[1, 2, 2, 3]], jnp.int32), 128, axis=1)
    *_, fetched_BP, needed_BP = flash.squares(packed, segments_BT, by_query=True)
    assert needed_BP.tolist() == [1, 1, 0, 1, 0, 1, 1, 0, 0, 0]
    assert fetched_BP.tolist() == [0, 1, 2, 2, 1, 1, 3, 3, 3, 3]


def test_a_row_just_longer_than_a_block_is_cut_evenly():
    """1025 tokens with blocks of 1024 are two squares of 640, not of 1024; none of its divisors is nearer to 512."""
    cut = plan(1025, 1, 1, 64, Tiles(heads=1, block=1024, strip=512, diagonal=128, turn=512))
    assert (cut.n, cut.R, cut.turn, cut.strips) == (2, 640, 640, [(0, 512), (512, 128)])


def default_plan(backward, T, H, K, D, dtype=jnp.bfloat16):
    return make_plan(backward=backward, B=1, T=T, H=H, K=K, D=D, dtype=jnp.dtype(dtype), causal=True, segments=False,
                     tiles=None, interpret=NAN_FILLED)


def test_default_tiles_fit_every_shape():
    """Head counts that no tile divides, groups of 1 to 32 and rows up to 40,960 tokens find tiles within VMEM: for long
    rows fewer heads, then smaller blocks; float32 takes smaller ones in any case; a row beyond is refused.
    """
    for T, H, K, D in ((1, 1, 1, 64), (1024, 9, 3, 64), (1024, 32, 32, 100), (4096, 32, 1, 128), (16384, 28, 4, 128),
                       (4096, 8, 8, 256), (1025, 7, 7, 80)):
        for backward in (False, True):
            for dtype in (jnp.bfloat16, jnp.float32):
                found = default_plan(backward, T, H, K, D, dtype)
                assert vmem_bytes(found, backward) <= 128 * 2**20 and found.tiles.heads <= 4
    tiles = lambda T: default_plan(True, T, 8, 8, 256).tiles
    assert (tiles(20_000).heads, tiles(20_000).block) == (1, 1024)
    assert (tiles(40_960).heads, tiles(40_960).block, tiles(40_960).strip) == (1, 256, 256)
    with pytest.raises(ValueError, match='T=49152 is too long for v5e'):
        tiles(49_152)
    exact = default_plan(False, 4096, 8, 8, 128, jnp.float32).tiles
    assert (exact.heads, exact.block) == (1, 512)


@pytest.mark.libtpu
@pytest.mark.parametrize('block', [512, 256], ids=['one_square', 'three_squares'])
def test_vmem_sum_bounds_the_compiler_s_figure(block):
    """Kernels are compiled with the sum as their limit; what the compiler then allocates is at least a quarter of it.

    (At the benchmark's shapes it is 0.6 to 0.85; operands that XLA itself places in VMEM need no window.)
    """
    from instruments.kernel_time.static_cost import static_time
    shape = bfloat16(B=256, T=512, H=2, K=1, D=128)
    tiles = Tiles(heads=2, block=block, strip=256, diagonal=128, turn=256)
    q, k = (jax.ShapeDtypeStruct((shape.B, shape.T, heads, shape.D), jnp.bfloat16) for heads in (shape.H, shape.K))
    static = static_time('v5e', with_gradients(shape, tiles, interpret=False), q, k, k, q)
    cut = FlashPlan(shape.B, shape.T, shape.H, shape.K, shape.D, True, False, jnp.dtype(jnp.bfloat16), tiles)
    assert len(static.kernels) == 2
    for kernel in static.kernels:
        assert 0.25 <= kernel.vmem_bytes / vmem_bytes(cut, backward='backward' in kernel.name) <= 1, kernel.name
