"""Decode attention in Pallas's TPU interpret mode, whose memory holds NaN until it is written, and as compiled."""
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

from instruments.bench import caches, shapes
from kernels import decode_attention as decode
from kernels import reference
from kernels.decode_attention import DecodeTiles

NAN_FILLED = pltpu.InterpretParams(uninitialized_memory='nan')
RACES = pltpu.InterpretParams(uninitialized_memory='nan', detect_races=True)
SMALL = DecodeTiles(block=32, buffers=3, cores=1)
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
make_cache, quantize = quick_jit(caches.make_cache), quick_jit(caches.quantize)
make_pages = quick_jit(caches.make_pages, static_argnums=3)


@functools.cache
def compiled(shape, tiles, interpret=NAN_FILLED):
    """jit of (q, caches, tables, layer, …) -> o: (k, v) and (lengths,), or (pages,) and (table, lengths)."""
    def call(q, caches, tables, layer, **factors):
        function = decode.paged_decode_attention if shape.page else decode.decode_attention
        return function(q, *caches, *tables, layer=layer, kv_heads=shape.K, scale=shape.D ** -0.5, tiles=tiles,
                        interpret=interpret, **factors)
    return quick_jit(call)


def attend(shape, tiles, q, k, v, lengths, **options):
    factors = {}
    if shape.cache_dtype == 'int8':  # factors that no slot uses are NaN
        (k, k_BKS), (v, v_BKS) = quantize(k), quantize(v)
        unused_B11S = np.arange(shape.S) >= lengths[:, None, None, None]
        factors_NBCKS = jnp.where(unused_B11S, jnp.nan, jnp.stack([k_BKS, v_BKS], axis=1))[None]
        factors = dict(factors_NBCKS=factors_NBCKS)
    caches, tables = (make_cache(k), make_cache(v)), (lengths,)
    if shape.page:
        table = shapes.page_table(shape)
        caches, tables = (make_pages(k, v, table, shape.page),), (table, lengths)
        if factors:
            in_pages = factors_NBCKS.reshape(shape.B, 2, shape.K, -1, shape.page).transpose(0, 3, 1, 2, 4)
            pool = jnp.full((1, caches[0].shape[1], *in_pages.shape[2:]), jnp.nan)
            factors = dict(factors_NPCKR=pool.at[0, table.ravel()].set(in_pages.reshape(-1, *in_pages.shape[2:])))
    return np.asarray(compiled(shape, tiles, **options)(q, caches, tables, 0, **factors))


def numbers(x_BSKD):
    """What an int8 cache of x holds."""
    integers, factors_BKS = quantize(x_BSKD)
    return np.asarray(integers, np.float32) * np.asarray(factors_BKS).swapaxes(1, 2)[..., None]


def by_hand(q_BHD, k_BSKD, v_BSKD, lengths_B, scale):
    """The definition in float64, head by head."""
    o_BHD = np.zeros(q_BHD.shape)
    for b, length in enumerate(lengths_B):
        for h in range(q_BHD.shape[1]):
            head = h * k_BSKD.shape[2] // q_BHD.shape[1]
            k_SD, v_SD = (np.asarray(x[b, :length, head], np.float64) for x in (k_BSKD, v_BSKD))
            p_S = np.exp(scale * k_SD @ np.asarray(q_BHD[b, h], np.float64))
            o_BHD[b, h] = p_S @ v_SD / p_S.sum() if length else 0
    return o_BHD


@functools.partial(quick_jit, static_argnames='scale')
def in_dtype(q_BHD, k_BSKD, v_BSKD, lengths_B, scale):
    """The definition with every intermediate result rounded to the dtype of q."""
    k_BSHD, v_BSHD = (jnp.repeat(x, q_BHD.shape[1] // k_BSKD.shape[2], axis=2) for x in (k_BSKD, v_BSKD))
    s_BHS = jnp.einsum('BHD,BSHD->BHS', q_BHD, k_BSHD) * jnp.asarray(scale, q_BHD.dtype)
    seen_B1S = np.arange(k_BSKD.shape[1])[None, None] < lengths_B[:, None, None]
    p_BHS = jnp.where(seen_B1S, jax.nn.softmax(jnp.where(seen_B1S, s_BHS, -1e30), axis=-1), 0)
    return jnp.einsum('BHS,BSHD->BHD', p_BHS.astype(q_BHD.dtype), v_BSHD)


# ---------------------------------------------------------------- the definition


def test_two_keys_by_hand():
    """q k = (0, ln 3) / scale: weights 1/4 and 3/4; the second row sees one key, the third none."""
    q_BHD = np.float32([[[2.0, 0.0]]] * 3)
    k_BSKD = np.float32([[[[0.0, 5.0]], [[np.log(3), -7.0]]]] * 3)
    v_BSKD = np.float32([[[[4.0, 8.0]], [[8.0, 0.0]]]] * 3)
    o_BHD = reference.decode_attention(q_BHD, k_BSKD, v_BSKD, np.int32([2, 1, 0]), scale=0.5)
    np.testing.assert_allclose(o_BHD[:, 0], [[7, 2], [4, 8], [0, 0]], rtol=1e-6)


RAGGED = shapes.DecodeShape(B=6, S=80, H=4, K=2, D=100, lengths='edges')  # 200 of 256 lanes are keys
IN_PAGES = dataclasses.replace(RAGGED, page=16)
NUMERICS = {name: shape for name, shape in shapes.DECODE.items() if name.startswith('tiny') and
            name not in ('tiny_full', 'tiny_edges')}  # tiny_paged has their heads and lengths
NUMERICS['tiny_paged_int8'] = dataclasses.replace(shapes.DECODE['tiny_int8'], page=128)


@pytest.mark.parametrize('name', NUMERICS)
def test_error_is_at_most_twice_that_of_the_definition_in_the_same_dtype(name):
    """max |o - truth| <= 2 max |o_dtype - truth| + 2 ulp of the largest value; lengths 0, 1, S-1, S among them."""
    shape = NUMERICS[name]
    q, k, v, lengths = shapes.decode_inputs(shape)
    given = k, v
    if shape.cache_dtype == 'int8':
        k, v = numbers(k), numbers(v)
    truth = by_hand(q, k, v, lengths, shape.D ** -0.5)
    exact = quick_jit(functools.partial(reference.decode_attention, scale=shape.D ** -0.5))(
        *(np.float32(x) for x in (q, k, v)), lengths)
    np.testing.assert_allclose(exact, truth, atol=2e-6)
    error = lambda o: np.abs(np.asarray(o, np.float64) - truth).max()
    bound = 2 * error(in_dtype(q, *(x.astype(q.dtype) for x in (k, v)), lengths, scale=shape.D ** -0.5))
    bound += 2 * float(jnp.finfo(shape.dtype).eps) * np.abs(truth).max()
    o = attend(shape, DecodeTiles(128 if 'int8' in name else 64, buffers=3), q, *given, lengths)
    assert error(o) <= bound, f'{error(o) / bound:.2f} of the tolerance'
    assert o.dtype == q.dtype and not o[lengths == 0].any()


# ---------------------------------------------------------------- what must not matter


@functools.cache
def ragged():
    """(q, k, v, lengths, o): lengths 0, 1, 79, 80, 32 (a whole block), 49."""
    q, k, v, lengths = shapes.decode_inputs(RAGGED)
    lengths[4:] = 32, 49
    return q, k, v, lengths, attend(RAGGED, SMALL, q, k, v, lengths)


def garbage(x_BSKD, lengths):
    """NaN from each length on."""
    return jnp.where(np.arange(x_BSKD.shape[1])[:, None, None] < lengths[:, None, None, None], x_BSKD, jnp.nan)


def test_other_slots_lanes_and_layers_do_not_matter():
    """Slots past the length, lanes past the heads and the layers before and after are NaN: the bits are the same."""
    q, k, v, lengths, o = ragged()
    def among_nan(x):
        cache = caches.make_cache(garbage(x, lengths)).at[..., RAGGED.K * RAGGED.D:].set(jnp.nan)
        return jnp.concatenate([jnp.full_like(cache, jnp.nan), cache, jnp.full_like(cache, jnp.nan)])
    np.testing.assert_array_equal(compiled(RAGGED, SMALL)(q, (among_nan(k), among_nan(v)), (lengths,), 1), o)


def test_pages_give_bitwise_what_slots_give_wherever_they_lie():
    """Two tables, NaN in every page and slot that no sequence uses, no page's number in the table's unused entries."""
    q, k, v, lengths, o = ragged()
    used = np.arange(RAGGED.S // IN_PAGES.page) * IN_PAGES.page < lengths[:, None]
    for seed in (0, 1):
        table = shapes.page_table(IN_PAGES, seed)
        pages = caches.make_pages(garbage(k, lengths), garbage(v, lengths), table, IN_PAGES.page)
        pages = pages.at[:, np.setdiff1d(np.arange(pages.shape[1]), table[used])].set(jnp.nan)
        table = np.where(used, table, 2**30).astype(np.int32)
        np.testing.assert_array_equal(compiled(IN_PAGES, SMALL)(q, (pages,), (table, lengths), 0), o)


def test_a_length_beyond_the_cache_counts_as_all_of_it():
    q, k, v, lengths, o = ragged()
    beyond = np.where(lengths == RAGGED.S, 2**20, lengths).astype(np.int32)
    np.testing.assert_array_equal(attend(RAGGED, SMALL, q, k, v, beyond), o)


def test_buffers_and_cores_change_nothing_and_blocks_only_the_order_of_sums():
    """Six sequences over four programs: two each, so that three have any."""
    q, k, v, lengths, o = ragged()
    np.testing.assert_array_equal(attend(RAGGED, DecodeTiles(32, buffers=5, cores=4), q, k, v, lengths), o)
    whole = np.float32(attend(RAGGED, DecodeTiles(80, buffers=3), q, k, v, lengths))
    np.testing.assert_allclose(whole, np.float32(o), atol=2 * 2**-8 * np.abs(whole).max())


@pytest.mark.parametrize('shape', [RAGGED, IN_PAGES], ids=['slots', 'pages'])
def test_no_race_and_bitwise_repeatable(shape):
    """The interpreter's detector sees no access to the ring without a wait between, and the result is the same."""
    q, k, v, lengths, o = ragged()
    np.testing.assert_array_equal(attend(shape, SMALL, q, k, v, lengths, interpret=RACES), o)
    assert not interpreter.races.races_found


def test_key_value_heads_over_mp_under_shard_map():
    """2 of 4 key/value heads a device, with their queries: what one device gives for all."""
    shape = shapes.DecodeShape(B=4, S=32, H=8, K=4, D=64, lengths='edges')
    q, k, v, lengths = shapes.decode_inputs(shape)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('dp', 'mp'))

    def local(q_BHD, k_BSKD, v_BSKD, lengths_B):
        return decode.decode_attention(q_BHD, caches.make_cache(k_BSKD), caches.make_cache(v_BSKD), lengths_B,
                                       kv_heads=k_BSKD.shape[2], scale=shape.D ** -0.5, tiles=SMALL,
                                       interpret=NAN_FILLED)

    rows, heads = PartitionSpec('dp', 'mp'), PartitionSpec('dp', None, 'mp')
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, heads, heads, PartitionSpec('dp')), out_specs=rows)
    np.testing.assert_array_equal(jax.jit(mapped, compiler_options=QUICK)(q, k, v, lengths),
                                  attend(shape, SMALL, q, k, v, lengths))


# ---------------------------------------------------------------- what is refused


def test_bad_arguments_raise():
    q, k = jnp.zeros((2, 6, 64), jnp.bfloat16), jnp.zeros((1, 2, 32, 128), jnp.bfloat16)
    pages, table, lengths = jnp.zeros((1, 5, 2, 16, 128), jnp.bfloat16), jnp.zeros((2, 2), jnp.int32), jnp.int32([3, 4])
    byte, factors = jnp.zeros((1, 2, 128, 128), jnp.int8), jnp.zeros((1, 2, 2, 2, 128))
    slots = functools.partial(decode.decode_attention, scale=1.0, kv_heads=2)
    in_pages = functools.partial(decode.paged_decode_attention, scale=1.0, kv_heads=2)
    for wrong, message in (
            (lambda: DecodeTiles(block=100), 'multiple of 16'), (lambda: DecodeTiles(128, buffers=2), 'at least 3'),
            (lambda: DecodeTiles(128, cores=0), 'at least 1'),
            (lambda: slots(q, k[:, :, :17], k[:, :, :17], lengths), 'allocate 32'),
            (lambda: slots(q, k[:, :1], k[:, :1], lengths), r'\[layers, 2, slots, width\]'),
            (lambda: slots(q, k, k, lengths, kv_heads=4), 'multiple of kv_heads=4'),
            (lambda: slots(q, k, k, lengths, kv_heads=3), 'take 256'),
            (lambda: slots(q, k.astype(jnp.float32), k.astype(jnp.float32), lengths), 'both be bfloat16'),
            (lambda: slots(q, k.astype(jnp.int8), k.astype(jnp.int8), lengths), 'int8 with factors'),
            (lambda: slots(q, k.astype(jnp.int8), k.astype(jnp.int8), lengths, factors_NBCKS=factors), 'allocate 128'),
            (lambda: slots(q, byte, byte, lengths, factors_NBCKS=factors[:, :, :1]), 'float32 for each'),
            (lambda: slots(q, byte, byte, lengths, factors_NBCKS=factors, tiles=DecodeTiles(64)), 'multiples of 128'),
            (lambda: slots(q, k, k, lengths.astype(jnp.float32)), 'must be int32'),
            (lambda: in_pages(q, k, table, lengths), 'keys, values'),
            (lambda: in_pages(q, pages[:, :, :, :8], table, lengths), 'page=8'),
            (lambda: in_pages(q, pages, table[:1], lengths), 'pages of a sequence'),
            (lambda: in_pages(q, jnp.zeros((1, 5, 2, 32, 128), jnp.bfloat16), table, lengths, tiles=DecodeTiles(48)),
             'multiple of page=32')):
        with pytest.raises(ValueError, match=message):
            wrong()


# ---------------------------------------------------------------- as compiled


def test_default_tiles_and_their_vmem_by_hand():
    """d1: 256 slots of 2 · 2 KiB are 1 MiB, eight of them 8.  OpenLLaMA 3B's slots have 3200 lanes, SmolLM2's 256."""
    tiles = decode.default_tiles(8, 128, 'bfloat16')
    assert (tiles.block, tiles.buffers) == (256, 8)
    assert decode.default_tiles(32, 100, 'bfloat16').block == 64
    assert decode.default_tiles(3, 64, 'bfloat16').block == 1024
    assert decode.default_tiles(8, 128, 'bfloat16', page=96).block == 192
    kib = 8192 + 2 * 512 + 256 + 2 * 64 + 2 * 128 + 32 + 2 * 16  # ring; q, o; spread; wide; own, sums; scores; m, l
    assert decode.vmem_bytes(tiles, 64, 32, 8, 128, 'bfloat16') == kib * 1024


@pytest.mark.libtpu
@pytest.mark.parametrize('name', ['d2', 'd2_paged'])
def test_time_is_that_of_the_real_lengths_bytes(name):
    """v6e's schedule takes at most 1.15 times the DMA of the filled slots, fetches at most 16 slots a sequence more,
    makes no copy of the cache, and its VMEM is the sum and what it spills."""
    from instruments.kernel_time.static_cost import static_time
    shape = shapes.DECODE[name]
    lengths = shapes.lengths(shape)
    q, kv = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((64, 32, 128), (64, 2048, 8, 128)))
    if shape.page:
        table = shapes.page_table(shape)
        pages = jax.eval_shape(lambda k, v: caches.make_pages(k, v, table, shape.page), kv, kv)
        function, arguments = decode.paged_decode_attention, (pages, table, lengths)
    else:
        cache = jax.eval_shape(caches.make_cache, kv)
        function, arguments = decode.decode_attention, (cache, cache, lengths)
    static = static_time('v6e', functools.partial(function, kv_heads=8, scale=0.1), q, *arguments)
    real = 2 * 2 * 8 * 128 * int(lengths.sum())
    assert static.ms <= 1.15 * real / 1640e9 * 1e3
    assert real <= static.hbm_bytes <= real + 64 * 15 * 4096 + 2 * 64 * 32 * 128 * 2 + 2**16
    assert static.compiled.temporary_bytes < 2**20
    asked = decode.vmem_bytes(decode.default_tiles(8, 128, 'bfloat16'), 64, 32, 8, 128, 'bfloat16')
    assert asked <= static.vmem_bytes <= asked + 4096 * static.spills + 2**16
