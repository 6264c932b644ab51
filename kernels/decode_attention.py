"""Decode attention for TPU in Pallas: one query a sequence against a cache of ragged lengths, in slots or in pages.

    o[h] = softmax(scale * q[h] K[g]ᵀ) V[g]      over the first length[b] slots of row b; g = h // (H / K), g's heads

Decoding reads every filled slot once and does little with it: HBM's bandwidth is the bound.  So the cache is laid out
for the DMA, and the matrix unit does K times the products it needs, which costs no time.  A slot is one row of
E = K D lanes, its heads side by side: a whole number of 128 lanes at most once padded, whatever D is (OpenLLaMA 3B:
3200 = 25 · 128; [S, K, D] would pad 100 to 128 in HBM, and K to the tile).  Each query is spread over the lanes of its
own key/value head, with zeros in the others', and a block of slots is two plain products, in log2 units:

    q̂[h, c] = q[h, c mod D]  where c div D = g, else 0          q̂ = (q R) ∘ M,   R[d, c] = [c mod D = d],  M: own lanes
    s = scale log2(e) q̂ Kᵀ,     m' = max(m, max s),     p = 2^(s - m')
    l' = 2^(m - m') l + Σ p,     ô' = 2^(m - m') ô + p V           online softmax over the blocks
    o = (ô / l ∘ M) Rᵀ                                            each head's own lanes; selections by 0/1 are exact

  operand         memory  shape                     dtype        VMEM at d1: B64 H32 K8 D128, block 256, buffers 8
  layer, lengths  SMEM    [1], [B]                  int32        prefetched scalars, as is the page table [B, P]
  q, o            VMEM    [B / cores, H, D]         q's          2 + 2 windows             1024 KiB
  k, v            HBM     [N, B, S, W]              q's          N layers; W = E to 128 lanes
    or the pool   HBM     [N, pages, 2, page, W]    q's          a page's keys, then its values: one DMA for both
  ring            VMEM    [buffers, 2, block, W]    q's                                    8192
  R (spread)      VMEM    [D, E]                    q's                                     256
  M (own)         VMEM    [H, E]                    f32                                     128
  q̂ (wide)        VMEM    [2, H, E]                 q's          by turns of sequences      128
  s               VMEM    [H, block]                f32          of the next block           32
  m, l; ô (sum)   VMEM    [H, 128] each; [H, E]     f32                              32 + 128   total 9.7 MiB

The whole cache [N layers, …] stays in HBM and `layer` is a scalar, so that no layer's slice is ever copied.  Which
blocks are visited, and how they come into the ring ahead of their use, is kernels/decode_walk.py: read it next.

A turn of the loop scores the following block while it weights the present one: the two are independent, so that one's
matrix products fill the other's latencies.  Values past the length are zeroed in VMEM, for 0 · NaN is NaN; that also
makes a row of length 0 zeros: its hidden scores are all equal, so that l is positive.

docs/KERNELS_LADDER.md has the versions that were tried and their times.
An infinity among the keys makes all heads of its row NaN, not only its own.  Definition: kernels/reference.py.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.decode_walk import LANES, RingWalk, tile_rows

LOG2E = 1.4426950408889634
HIDDEN = -1e30  # score of a slot past the length; finite, since -inf - -inf is NaN
BLOCK_BYTES = 2**20  # of K and V in a block that the default tiles choose
SPARE = 6 * 2**20  # VMEM for spills; on v4 also 4 MiB for an int8 block as bfloat16
INNER, OUTER = ((1,), (0,)), ((1,), (1,))  # x y and x yᵀ


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """Holds sizes that decide speed and memory; they change the result by reassociation only."""
    block: int  # slots that one turn of the loop attends to
    buffers: int = 8  # blocks in VMEM: two being used, the others arriving
    cores: int = 2  # programs that share the sequences: v4 and v5p run two at once; elsewhere 1 is 0.5 to 1.3 % faster

    def __post_init__(self):
        if self.block < 16 or self.block % 16:
            raise ValueError(f'{self.block=} must be a multiple of 16')
        if self.buffers < 3:
            raise ValueError(f'{self.buffers=} must be at least 3: two blocks are in use while another arrives')
        if self.cores < 1:
            raise ValueError(f'{self.cores=} must be at least 1')


def default_tiles(kv_heads: int, D: int, dtype, page: int = 1) -> DecodeTiles:
    """Choose blocks of about BLOCK_BYTES, 64 (int8: 128) to 1024 slots and whole pages: they hide a turn's latency."""
    block = BLOCK_BYTES // (2 * cache_width(kv_heads, D) * jnp.dtype(dtype).itemsize)
    block = min(1024, max(LANES if dtype == jnp.int8 else 64, 1 << block.bit_length() - 1))
    return DecodeTiles(max(block // page, 1) * page)


def round_up(x: int, multiple: int) -> int:
    """Round `x` up to a multiple."""
    return -(-x // multiple) * multiple


def cache_width(kv_heads: int, D: int) -> int:
    """Count the lanes of one slot: the heads side by side, then what is left of the last 128 (never read)."""
    return round_up(kv_heads * D, LANES)


def vmem_bytes(tiles: DecodeTiles, B: int, H: int, kv_heads: int, D: int, dtype, cache_dtype=None) -> int:
    """Sum the VMEM that the kernel asks for, in bytes; the compiler adds what it spills (up to 0.6 MiB seen)."""
    cache_dtype = jnp.dtype(cache_dtype or dtype)
    item, rows, width = jnp.dtype(dtype).itemsize, round_up(H, 16), cache_width(kv_heads, D)
    factors = tiles.buffers * 2 * round_up(kv_heads, 8) * tiles.block * 4
    programs = pl.cdiv(B, sequences := pl.cdiv(B, tiles.cores))
    return sum([
        tiles.buffers * 2 * tiles.block * width * cache_dtype.itemsize,  # the ring: K and V of each block
        factors if cache_dtype == jnp.int8 else 0,
        2 * min(programs, 2) * sequences * rows * round_up(D, LANES) * item,  # q, o of a program, and of the next one
        round_up(D, 16) * width * item,  # spread, 0/1
        2 * rows * width * item,  # q spread, of the sequence at hand and the next
        2 * rows * width * 4,  # own, 0/1; sums
        rows * round_up(tiles.block, LANES) * 4,  # scores of the next block
        2 * rows * LANES * 4])  # m, l


# ---------------------------------------------------------------- the kernel


def product(x, y, dims):
    """Multiply matrices, summing in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def kernel(*refs, scale, paged, quantized, capacity):
    """Attend for all sequences of one program, block after block."""
    layer_ref, lengths_ref, *refs = refs  # prefetch
    table_ref, *refs = refs if paged else (None, *refs)
    *refs, arrived, spread_ref, own_ref, wide_ref, s_ref, m_ref, l_ref, sum_ref = refs
    *refs, factors_ring_ref = refs if quantized else (*refs, None)
    q_ref, *caches, o_ref, ring_ref = refs
    *caches, factors_ref = caches if quantized else (*caches, None)
    sequences, H, D = q_ref.shape
    E = spread_ref.shape[1]
    begin = pl.program_id(0) * sequences
    end = jnp.minimum(begin + sequences, lengths_ref.shape[0])
    walk = RingWalk(lengths_ref, table_ref, caches, factors_ref, ring_ref, factors_ring_ref, arrived, layer_ref[0],
                    begin, end, capacity)

    def widen(b):
        """Make q̂ of a sequence: each query head in the lanes of its key/value head."""
        q_HD = q_ref[jnp.minimum(b, end - 1) - begin]
        wide_ref[b & 1] = (product(q_HD, spread_ref[...], INNER) * own_ref[...]).astype(wide_ref.dtype)

    def score(item):
        b, _, buffer = item
        s_ref[...] = product(wide_ref[b & 1], ring_ref[buffer, 0, :, :E].astype(wide_ref.dtype), OUTER)

    def factors(buffer, which):
        """Read the factors of a block's keys (0) or values (1): for each query head its key/value head's."""
        K, block = factors_ring_ref.shape[2:]
        return jnp.concatenate([jnp.broadcast_to(factors_ring_ref[buffer, which, k:k + 1], (H // K, block))
                                for k in range(K)], axis=0)

    def restart():
        m_ref[...] = jnp.full_like(m_ref, HIDDEN)
        l_ref[...] = jnp.zeros_like(l_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def turn(carry):
        item, ahead = carry
        b, _, buffer = item
        following = walk.after(item)
        walk.fetch(ahead)
        walk.wait(following)
        walk.clear(item)

        s_HS = s_ref[...] * (scale * LOG2E)
        score(following)
        if quantized:
            s_HS *= factors(buffer, 0)
        seen_HS = lax.broadcasted_iota(jnp.int32, s_HS.shape, 1) < walk.filled(item)
        s_HS = jnp.where(seen_HS, s_HS, HIDDEN)
        m = m_ref[...]
        m_new = jnp.maximum(m, s_HS.max(1, keepdims=True))
        p_HS = jnp.exp2(s_HS - m_new[:, :1])
        decay = jnp.exp2(m - m_new)
        m_ref[...] = m_new
        l_ref[...] = l_ref[...] * decay + p_HS.sum(1, keepdims=True)
        if quantized:
            p_HS = jnp.where(seen_HS, p_HS * factors(buffer, 1), 0)
        v_SE = ring_ref[buffer, 1, :, :E].astype(wide_ref.dtype)
        sum_ref[...] = sum_ref[...] * decay[:, :1] + product(p_HS.astype(v_SE.dtype), v_SE, INNER)

        @pl.when(following[0] != b)
        def _():
            o_HE = sum_ref[...] * own_ref[...] * (1 / l_ref[:, :1])
            o_HD = product(o_HE.astype(spread_ref.dtype), spread_ref[...], OUTER)
            o_ref[b - begin] = o_HD.astype(o_ref.dtype)
            widen(b + 2)
            restart()

        return following, walk.after(ahead)

    def fetch_early(_, item):
        walk.fetch(item)
        return walk.after(item)

    first = (begin, 0, 0)
    ahead = lax.fori_loop(0, ring_ref.shape[0] - 1, fetch_early, first)
    lane_DE, lane_HE = (lax.broadcasted_iota(jnp.int32, (rows, E), 1) for rows in (D, H))
    row_DE, row_HE = (lax.broadcasted_iota(jnp.int32, (rows, E), 0) for rows in (D, H))
    spread_ref[...] = (lax.rem(lane_DE, D) == row_DE).astype(spread_ref.dtype)
    own_ref[...] = (lax.div(lane_HE, D) == lax.div(row_HE, H // (E // D))).astype(own_ref.dtype)
    widen(begin)
    widen(begin + 1)
    restart()
    walk.wait(first)
    score(first)
    lax.while_loop(lambda carry: carry[0][0] < end, turn, (first, ahead))


# ---------------------------------------------------------------- the calls


def decode_attention(q_BHD, k_NBSW, v_NBSW, lengths_B, *, kv_heads: int, scale: float, layer=0, factors_NBCKS=None,
                     tiles: DecodeTiles | None = None, interpret=False) -> jax.Array:
    """Compute o_BHD of one query a sequence against the first lengths_B (int32) slots of its row of the cache.

    Args:
      k_NBSW, v_NBSW: the whole cache in q's dtype, bfloat16 or float32, or int8; W = cache_width(kv_heads, D) lanes.
        What lies past a length, in lanes past the heads and in other layers is never used.
      layer: which layer; may be traced.
      factors_NBCKS: of an int8 cache, float32 [N, B, 2 (keys, values), kv_heads, S]: what makes them numbers again.
      tiles: `default_tiles` unless given.

    Rows of length 0 give zeros.  Works inside jax.shard_map, on local shapes.

    Raises:
      ValueError: shapes, dtypes or tiles that do not fit, with what would.
    """
    if k_NBSW.shape != v_NBSW.shape or k_NBSW.ndim != 4 or k_NBSW.shape[1] != q_BHD.shape[0]:
        raise ValueError(f'{k_NBSW.shape=} and {v_NBSW.shape=} must both be [layers, {q_BHD.shape[0]}, slots, width]')
    slots, rows = k_NBSW.shape[2], LANES if factors_NBCKS is not None else tile_rows(k_NBSW.dtype)
    if slots % rows:
        raise ValueError(f'{slots=} of the cache must be a multiple of {rows}: allocate {round_up(slots, rows)}')
    tiles = tiles or default_tiles(kv_heads, q_BHD.shape[2], k_NBSW.dtype)
    return _call(q_BHD, [k_NBSW, v_NBSW], factors_NBCKS, [lengths_B], kv_heads, scale, layer, tiles, slots, interpret)


def paged_decode_attention(q_BHD, pages_NPCRW, table_BP, lengths_B, *, kv_heads: int, scale: float, layer=0,
                           factors_NPCKR=None, tiles: DecodeTiles | None = None, interpret=False) -> jax.Array:
    """Compute the same from a pool: slot s of row b is row s % page of page table_BP[b, s // page].

    Entries of the table past a sequence's length are not read.  An int8 pool's pages are multiples of 128.
    """
    if pages_NPCRW.ndim != 5 or pages_NPCRW.shape[2] != 2:
        raise ValueError(f'{pages_NPCRW.shape=} must be [layers, pages, 2 (keys, values), page, width]')
    page, rows = pages_NPCRW.shape[3], LANES if factors_NPCKR is not None else tile_rows(pages_NPCRW.dtype)
    if page % rows:
        raise ValueError(f'{page=} must be a multiple of {rows} slots')
    if table_BP.shape[0] != q_BHD.shape[0] or table_BP.dtype != jnp.int32:
        raise ValueError(f'{table_BP.shape=} {table_BP.dtype=} must be int32 [{q_BHD.shape[0]}, pages of a sequence]')
    tiles = tiles or default_tiles(kv_heads, q_BHD.shape[2], pages_NPCRW.dtype, page)
    if tiles.block % page:
        raise ValueError(f'{tiles.block=} must be a multiple of {page=}')
    return _call(q_BHD, [pages_NPCRW], factors_NPCKR, [lengths_B, table_BP], kv_heads, scale, layer, tiles,
                 table_BP.shape[1] * page, interpret)


def _call(q_BHD, caches, factors, tables, kv_heads, scale, layer, tiles, capacity, interpret):
    B, H, D = q_BHD.shape
    E, W, quantized = kv_heads * D, cache_width(kv_heads, D), factors is not None
    dtype, cache_dtype = q_BHD.dtype, caches[0].dtype
    if H % kv_heads:
        raise ValueError(f'{H=} query heads must be a multiple of {kv_heads=}')
    if dtype not in (jnp.bfloat16, jnp.float32) or {cache.dtype for cache in caches} != {
            jnp.dtype(jnp.int8) if quantized else dtype}:
        raise ValueError(f'{q_BHD.dtype=} and {cache_dtype=} must both be bfloat16, or both float32, or the cache int8 '
                         'with factors')
    if quantized and (factors.dtype != jnp.float32 or tiles.block % LANES or factors.shape != (
            *caches[0].shape[:2], 2, kv_heads, caches[0].shape[-2])):
        raise ValueError(f'{factors.shape=} {factors.dtype=} {tiles.block=}: an int8 cache of {caches[0].shape} has a '
                         f'float32 for each of {kv_heads=} and slot, and blocks that are multiples of {LANES}')
    if caches[0].shape[-1] != W:
        raise ValueError(f'the cache has {caches[0].shape[-1]} lanes a slot; {kv_heads=} of {D=} take {W}: cache_width')
    if tables[0].shape != (B,) or tables[0].dtype != jnp.int32:
        raise ValueError(f'lengths are {tables[0].dtype}{tables[0].shape}, they must be int32 ({B},)')
    caches = [*caches, factors] if quantized else caches
    sequences = pl.cdiv(B, tiles.cores)
    rows = pl.BlockSpec((sequences, H, D), lambda program, *_: (program, 0, 0))
    factors_ring = [pltpu.VMEM((tiles.buffers, 2, kv_heads, tiles.block), jnp.float32)] if quantized else []
    return pl.pallas_call(
        functools.partial(kernel, scale=scale, paged=len(tables) == 2, quantized=quantized, capacity=capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(tables), grid=(pl.cdiv(B, sequences),),
            in_specs=[rows] + [pl.BlockSpec(memory_space=pl.ANY)] * len(caches), out_specs=rows,
            scratch_shapes=[
                pltpu.VMEM((tiles.buffers, 2, tiles.block, W), cache_dtype), *factors_ring,
                pltpu.SemaphoreType.DMA((tiles.buffers,)), pltpu.VMEM((D, E), dtype), pltpu.VMEM((H, E), jnp.float32),
                pltpu.VMEM((2, H, E), dtype), pltpu.VMEM((H, tiles.block), jnp.float32),
                pltpu.VMEM((H, LANES), jnp.float32), pltpu.VMEM((H, LANES), jnp.float32),
                pltpu.VMEM((H, E), jnp.float32)]),
        out_shape=jax.ShapeDtypeStruct(q_BHD.shape, dtype, manual_axis_type=jax.typeof(q_BHD).manual_axis_type),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel',),
            vmem_limit_bytes=vmem_bytes(tiles, B, H, kv_heads, D, dtype, cache_dtype) + SPARE),
        interpret=interpret, name='decode_attention' if len(tables) == 1 else 'paged_decode_attention',
    )(jnp.reshape(layer, 1).astype(jnp.int32), *tables, q_BHD, *caches)
