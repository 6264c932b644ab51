r"""Flash attention for TPU in Pallas: exact softmax attention that never writes the scores to HBM; forward, backward.

    forward    s = scale * q kᵀ, hidden where the key is after its query or of another segment
               m = max s,  p = exp(s - m),  l = sum p,  o = p v / l,  lse = m + log l
               block by block:  m' = max(m, max s),  l' = l exp(m - m') + sum p,  o l likewise
    backward   p = exp(s - lse),  D_i = rowsum(do * o),  dp = do vᵀ,  ds = p * (dp - D_i)
               dv = pᵀ do,  dk = scale * dsᵀ q,  dq = scale * ds k          (5 products where two kernels need 7)

Letters: B rows, T tokens (S as keys), H query and K key/value heads, D head dimension; R side of a square of scores.
Definition: reference.py.  Tiles and VMEM: tiles.py.  Algorithm: Dao, arXiv 2307.08691.  docs/KERNELS_LADDER.md has the
versions that were tried, their times, and why the layouts are what they are.

Everything is K-major: scores lie as s_ST, keys along sublanes and queries along lanes.  So all that belongs to a query
(m, l, lse, D_i, its segment) is one row [1, T]; o and dq are summed as o_DT, dq_DT and transposed once.  q comes
multiplied by scale * log2(e): exponents are base 2, so is lse.

  operand      HBM            block                 held for           dtype   buffers   VMEM at s1 (backward)
  q, do, dq    [B,H,T,D]      [heads, R, D]         query block        input   2         3 MiB
  k, v         [B,K,T,D]      [kv heads, R, D]      key block          input   2         2 MiB
  dk, dv       [B,K,T,D]      [kv heads, R, D]      key block          input   2         2 MiB
  lse, D_i     [B,H,1,T]      [heads, 1, R]         query block        f32     2         1/4 MiB (8 sublanes)
  segments     [B,1,T] twice  [1, R] each           query, key block   int32   2         -
  m, l, o      scratch        [heads, 1 or D, R]    own query block    f32     1         - (forward, T > R)
  dq           scratch        [heads, D, T]         a pass             f32     1         1 MiB
  dk, dv       scratch        [kv heads, T, D]      all passes         f32     1         2 MiB
  s, p, dp, ds stack          strip x strip         3 items in flight  both    -         5 MiB
                                                                       1 to spare: 16.25 MiB (tiles.vmem_bytes)

A grid step is one square of R x R scores of `heads` heads.  Up to T = block a row is a single square (n = 1):

       queries ->                 A strip of queries is one item of the program.  `left`: all keys before the strip, in
   k   \##|####|####|            one product.  On the diagonal: columns of `diagonal` queries, each as long as it must
   e    \#|####|####|            be; only its last diagonal x diagonal scores are masked.  Nothing below the diagonal
   y     \|####|####|            (key after query) exists.  The softmax of a column sees all its keys at once.
   s       |\###|####|   own query block i    0 | 1 1 | 2 2 2 | 3 3 3 3      longer rows, n = 4 squares a side:
   |       | \##|####|   other (key) block    0 | 1 0 | 2 0 1 | 3 0 1 2      first the diagonal square, then the
   v       |  \#|####|                                                       others by online softmax
The backward has key blocks for own and the query blocks after them for other.  Items are emitted in pipelined order
(`pipelined`), because the compiler keeps to the order of the program.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.tiles import FlashPlan, FlashTiles, make_plan, vmem_bytes

Array = jax.Array
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
HIDDEN = -1e30  # score of a key that the query does not see; finite, because -inf - -inf is NaN
NO_KEY = 1e30  # lse of a query that sees no key: exp2(s - lse) = 0 makes all its gradients zero
PLAIN, BY_ROWS, BY_COLUMNS = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # x y, x yᵀ, xᵀ y


# ---------------------------------------------------------------- the order of the grid


def squares(plan: FlashPlan, segments_BT: Array | None, by_query: bool) -> tuple[Array, ...]:
    """List the squares of the score matrix in the order of the grid's last dimension p: tables for scalar prefetch.

    Squares without a visible score cost neither a step nor a DMA: they are not in the tables, or, where segments hide
    them, stepped over while the next square that is needed is fetched.

    own_P1      the query block (backward: the key block) whose results are being summed; it grows.  Its first square
                is on the diagonal.  One more entry marks the end.
    other_P     the other block of the square.
    With segments, for each row of the batch too, flattened:
    fetched_BP  the other block that VMEM holds: that of the next square that is needed.  So nothing else is fetched.
    needed_BP   whether any segment of one block occurs, by its least and greatest id, in the other.
    """
    others = lambda x: ([j for j in range(plan.n) if j != x] if not plan.causal else
                        range(x) if by_query else range(x + 1, plan.n))
    pairs = [(x, y) for x in range(plan.n) for y in (x, *others(x))]
    own_P, other_P = (jnp.array(blocks, jnp.int32) for blocks in zip(*pairs, strict=True))
    tables = jnp.append(own_P, -1), other_P
    if not plan.segments or plan.n == 1:
        return tables[:2 * (plan.n > 1)]
    ids_BnR = jnp.pad(segments_BT, ((0, 0), (0, plan.n * plan.R - plan.T))).reshape(plan.B, plan.n, plan.R)
    least_Bn = jnp.where(ids_BnR == 0, jnp.iinfo(jnp.int32).max, ids_BnR).min(-1)
    greatest_Bn = ids_BnR.max(-1)
    needed_BP = ((least_Bn[:, own_P] <= greatest_Bn[:, other_P]) & (least_Bn[:, other_P] <= greatest_Bn[:, own_P])
                 | (own_P == other_P)[None])
    P = len(pairs)
    here_BP = jnp.where(needed_BP, jnp.arange(P)[None], P)
    next_BP = lax.cummin(here_BP, axis=1, reverse=True)
    last_B1 = jnp.where(needed_BP, jnp.arange(P)[None], 0).max(1, keepdims=True)
    fetched_BP = other_P[jnp.minimum(next_BP, last_B1)]
    return *tables, fetched_BP.reshape(-1), needed_BP.reshape(-1).astype(jnp.int32)


class Square(NamedTuple):
    """The square of a grid step; block numbers and flags are Python values where a row is one square, else traced."""
    own: Array | int  # block whose results are summed
    other: Array | int
    held: Array | int  # block that VMEM holds in the place of `other`: another one where `other` is not needed
    on_diagonal: Array | bool
    off_diagonal: Array | bool  # and needed
    last: Array | bool  # of its own block


def square_of_step(plan: FlashPlan, tables) -> Square:
    """Look up the square of this grid step in the tables of `squares`."""
    if plan.n == 1:
        return Square(0, 0, 0, on_diagonal=True, off_diagonal=False, last=True)
    p = pl.program_id(3)
    own, other, held, needed = tables[0][p], tables[1][p], tables[1][p], True
    if plan.segments:
        row = pl.program_id(0) * len(tables[1]) + p
        held, needed = tables[2][row], tables[3][row] == 1
    return Square(own, other, held, own == other, (own != other) & needed, tables[0][p + 1] != own)


# ---------------------------------------------------------------- inside the kernels


def dot(x: Array, y: Array, dims, plan: FlashPlan) -> Array:
    """Multiply matrices, summing in float32; float32 operands are multiplied in six passes of bfloat16."""
    precision = lax.Precision.HIGHEST if plan.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def pipelined(items, *stages) -> None:
    """Emit stage k of item i at step i + k: the compiler keeps to the program's order, so units work side by side.

    step       0         1         2         3         the matrix units are in the products of two items
    scores     item 0    item 1    item 2    item 3    (s of the next, o of the last), while the vector units
    softmax              item 0    item 1    item 2    are in the softmax of the one between
    output                         item 0    item 1
    """
    results = [{} for _ in stages]
    for step in range(len(items) + len(stages) - 1):
        for k, stage in enumerate(stages):
            if 0 <= step - k < len(items):
                before = [results[k - 1].pop(step - k)] if k else []
                results[k][step - k] = stage(*items[step - k], *before)


def hide(s_ST: Array, offset: int | None, key_ids_S1: Array | None, query_ids_1T: Array | None) -> Array:
    """Hide the scores of keys after their query, and of keys of another segment.

    `offset` is how far the first query is behind the first key; None: every key is before every query.
    """
    if offset is not None:
        key_ST, query_ST = (lax.broadcasted_iota(jnp.int32, s_ST.shape, axis) for axis in (0, 1))
        s_ST = jnp.where(key_ST <= query_ST + offset, s_ST, HIDDEN)
    return s_ST if key_ids_S1 is None else jnp.where(key_ids_S1 == query_ids_1T, s_ST, HIDDEN)


def fill_tail(plan: FlashPlan, block, *fills) -> None:
    """Overwrite what a block holds behind position T: HBM has nothing there, VMEM anything, and 0 * NaN is NaN.

    fills: (ref, axis of the positions, value).
    """
    if plan.T % plan.R:
        @pl.when(block == plan.n - 1)
        def _():
            for ref, axis, value in fills:
                tail = (slice(None),) * axis + (slice(plan.T % plan.R, None),)
                shape = ref.shape[:axis] + (plan.R - plan.T % plan.R,) + ref.shape[axis + 1:]
                ref[tail] = jnp.full(shape, value, ref.dtype)


def segment_ids(ids):
    """Make two functions (start, size) -> ids: [1, size] of queries, [size, 1] of keys; None without segments.

    ids: references of the query's and the key's block, or nothing.
    """
    of_queries = lambda start, size: ids[0][0, :, start:start + size] if ids else None
    of_keys = lambda start, size: jnp.transpose(ids[1][0, :, pl.ds(start, size)]) if ids else None
    return of_queries, of_keys


# ---------------------------------------------------------------- forward


def forward_kernel(*refs, plan: FlashPlan) -> None:
    """Compute one square of scores: tables | q, k, v, ids | o, lse | m, l and o_DT so far (where T > R)."""
    tables, (q_ref, k_ref, v_ref), ids, (o_ref, lse_ref, *scratch) = split(refs, plan, 3)
    square, (query_ids, key_ids) = square_of_step(plan, tables), segment_ids(ids)
    items = [(h, a, n) for h in range(plan.tiles.heads) for a, n in plan.strips]
    columns = lambda n: range(0, n, plan.tiles.diagonal)
    g = plan.tiles.diagonal
    key = lambda h, start, size: k_ref[0, plan.kv_head(h), pl.ds(start, size), :]
    query = lambda h, start, size: q_ref[0, h, start:start + size, :]
    value = lambda h, start, size: v_ref[0, plan.kv_head(h), pl.ds(start, size), :]
    fill_tail(plan, square.held, (v_ref, 2, 0), *([(ids[1], 2, 0)] if ids else []))

    def write(h, a, n, m_1T, l_1T, o_DT):
        o_DT, lse_1T = o_DT * (1 / l_1T), m_1T + jnp.log2(l_1T)
        if ids:
            o_DT, lse_1T = (jnp.where(query_ids(a, n) != 0, x, y) for x, y in ((o_DT, 0), (lse_1T, NO_KEY)))
        o_ref[0, h, a:a + n, :] = o_DT.astype(plan.dtype).T
        lse_ref[0, h, :, a:a + n] = lse_1T

    def keep(h, a, n, *sums):
        for ref, x in zip(scratch, sums, strict=True):
            ref[h, :, a:a + n] = x

    @pl.when(square.on_diagonal)
    def _():
        left = (lambda a: a) if plan.causal else (lambda a: plan.R)  # keys that all queries of a strip see
        ids_S1 = key_ids(0, plan.R)
        some_ids = lambda start, size: None if ids_S1 is None else ids_S1[start:start + size]

        def scores(h, a, n):
            left_ST = dot(key(h, 0, left(a)), query(h, a, n), BY_ROWS, plan) if left(a) else None
            return left_ST, [dot(key(h, a, c + g), query(h, a + c, g), BY_ROWS, plan)
                             for c in columns(n) if plan.causal]

        def softmax(h, a, n, both):
            left_ST, diagonal_ST = both
            done = []
            for c in columns(n):
                parts = []
                if left(a):
                    parts.append(hide(left_ST[:, c:c + g], None, some_ids(0, left(a)), query_ids(a + c, g)))
                if plan.causal:
                    parts.append(hide(diagonal_ST[c // g], c, some_ids(a, c + g), query_ids(a + c, g)))
                m_1T = functools.reduce(jnp.maximum, [s_ST.max(0, keepdims=True) for s_ST in parts])
                p_ST = [jnp.exp2(s_ST - m_1T) for s_ST in parts]
                done.append((m_1T, sum(p.sum(0, keepdims=True) for p in p_ST), [p.astype(plan.dtype) for p in p_ST]))
            return done

        def output(h, a, n, done):
            if left(a):
                left_DT = dot(value(h, 0, left(a)), jnp.concatenate([p[0] for _, _, p in done], 1), BY_COLUMNS, plan)
            for c, (m_1T, l_1T, p_ST) in zip(columns(n), done, strict=True):
                parts = [left_DT[:, c:c + g]] if left(a) else []
                if plan.causal:
                    parts.append(dot(value(h, a, c + g), p_ST[-1], BY_COLUMNS, plan))
                (write if plan.n == 1 else keep)(h, a + c, g, m_1T, l_1T, sum(parts))

        pipelined(items, scores, softmax, output)

    if plan.n == 1:
        return
    m_ref, l_ref, o_sum_ref = scratch

    @pl.when(square.off_diagonal)
    def _():
        def turn(u, _):
            start = pl.multiple_of(u * plan.turn, plan.turn)
            ids_S1 = key_ids(start, plan.turn)

            def scores(h, a, n):
                return dot(key(h, start, plan.turn), query(h, a, n), BY_ROWS, plan)

            def softmax(h, a, n, s_ST):
                at = h, slice(None), slice(a, a + n)
                s_ST = hide(s_ST, None, ids_S1, query_ids(a, n))
                m_1T = jnp.maximum(m_ref[at], s_ST.max(0, keepdims=True))
                shrink_1T, p_ST = jnp.exp2(m_ref[at] - m_1T), jnp.exp2(s_ST - m_1T)
                m_ref[at], l_ref[at] = m_1T, l_ref[at] * shrink_1T + p_ST.sum(0, keepdims=True)
                return shrink_1T, p_ST.astype(plan.dtype)

            def output(h, a, n, shrink_and_p):
                shrink_1T, p_ST = shrink_and_p
                at = h, slice(None), slice(a, a + n)
                more_DT = dot(value(h, start, plan.turn), p_ST, BY_COLUMNS, plan)
                o_sum_ref[at] = o_sum_ref[at] * shrink_1T + more_DT

            pipelined(items, scores, softmax, output)

        lax.fori_loop(0, plan.R // plan.turn, turn, None)

    @pl.when(square.last)
    def _():
        for h, a, n in items:
            write(h, a, n, *(ref[h, :, a:a + n] for ref in scratch))


# ---------------------------------------------------------------- backward


def backward_kernel(*refs, plan: FlashPlan, scale: float) -> None:
    """Compute one square: tables | q, k, v, do, lse, D_i, ids | dq, dk, dv | the sums dq_DT, dk, dv of the row."""
    tables, (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref), ids, results = split(refs, plan, 6)
    dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref = results
    square, (query_ids, key_ids) = square_of_step(plan, tables), segment_ids(ids)
    own, other = square.own, square.other
    heads, kv_heads, R, g = plan.tiles.heads, plan.kv_heads, plan.R, plan.tiles.diagonal
    first, first_pass, last_pass = pl.program_id(3) == 0, pl.program_id(2) == 0, pl.program_id(2) == plan.passes - 1

    def span(start, size):
        return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, g), size)

    fill_tail(plan, square.held, (q_ref, 2, 0), (do_ref, 2, 0), (lse_ref, 3, NO_KEY), (delta_ref, 3, 0))
    fill_tail(plan, own, (k_ref, 2, 0), (v_ref, 2, 0), *([(ids[1], 2, 0)] if ids else []))

    @pl.when(first)
    def _():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    @pl.when(first & first_pass)
    def _():
        dk_sum_ref[...], dv_sum_ref[...] = jnp.zeros_like(dk_sum_ref), jnp.zeros_like(dv_sum_ref)

    def add_gradients(items, start, size):
        """Add what the items give: head, start (from `start`) and size of keys, start and size of queries, offset."""
        ids_S1 = key_ids(start, size)

        def scores(h, a, w, c, n, offset):
            keys, queries = (0, plan.kv_head(h), span(start + a, w)), (0, h, slice(c, c + n))
            return (dot(k_ref[keys], q_ref[queries], BY_ROWS, plan), dot(v_ref[keys], do_ref[queries], BY_ROWS, plan))

        def softmax(h, a, w, c, n, offset, s_and_dp):
            s_ST, dp_ST = s_and_dp
            row = 0, h, slice(None), slice(c, c + n)
            some_ids = None if ids_S1 is None else ids_S1[a:a + w]
            p_ST = jnp.exp2(hide(s_ST, offset, some_ids, query_ids(c, n)) - lse_ref[row])
            ds_ST = p_ST * (dp_ST - delta_ref[row])
            return p_ST.astype(plan.dtype), ds_ST.astype(plan.dtype)

        def sums(h, a, w, c, n, offset, p_and_ds):
            p_ST, ds_ST = p_and_ds
            queries, at = (0, h, slice(c, c + n)), (plan.kv_head(h), span(own * R + start + a, w))
            dv_sum_ref[at] += dot(p_ST, do_ref[queries], PLAIN, plan)
            dk_sum_ref[at] += dot(ds_ST, q_ref[queries], PLAIN, plan)
            k_SD = k_ref[0, plan.kv_head(h), span(start + a, w)]
            dq_sum_ref[h, :, span(other * R + c, n)] += dot(k_SD, ds_ST, BY_COLUMNS, plan)

        pipelined(items, scores, softmax, sums)

    @pl.when(square.on_diagonal)
    def _():
        items = []
        for kv in range(kv_heads):
            for a, w in plan.strips:
                for h in range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads):
                    if not plan.causal:
                        items.append((h, a, w, 0, R, None))
                    else:
                        items += [(h, c, g, c, a + w - c, 0) for c in range(a, a + w, g)]
                        items += [(h, a, w, a + w, R - a - w, None)] if a + w < R else []
        add_gradients(items, 0, R)

    @pl.when(square.off_diagonal)
    def _():
        def turn(u, _):
            start = pl.multiple_of(u * plan.turn, plan.turn)
            items = [(h, 0, plan.turn, c, n, None) for h in range(heads) for c, n in plan.strips]
            add_gradients(items, start, plan.turn)

        lax.fori_loop(0, R // plan.turn, turn, None)

    @pl.when(square.last & last_pass)
    def _():
        for kv in range(kv_heads):
            dk_ref[0, kv] = (dk_sum_ref[kv, span(own * R, R)] * LN2).astype(plan.dtype)
            dv_ref[0, kv] = dv_sum_ref[kv, span(own * R, R)].astype(plan.dtype)

    @pl.when(square.on_diagonal if plan.causal else own == plan.n - 1)
    def _():
        for h in range(heads):
            dq_ref[0, h] = (dq_sum_ref[h, :, span(other * R, R)] * scale).astype(plan.dtype).T


# ---------------------------------------------------------------- the calls


def split(refs, plan: FlashPlan, inputs: int):
    """Split a kernel's references: (tables, inputs, segment ids of queries and keys, outputs and scratch)."""
    tables = 0 if plan.n == 1 else 4 if plan.segments else 2
    ids = tables + inputs + 2 * plan.segments
    return refs[:tables], refs[tables:tables + inputs], refs[tables + inputs:ids], refs[ids:]


class Blocks:
    """Holds the BlockSpecs of one kernel over the grid (row, key/value heads, pass, square)."""

    def __init__(self, plan: FlashPlan, by_query: bool):
        heads, kv_heads, R, D, passes = plan.tiles.heads, plan.kv_heads, plan.R, plan.D, plan.passes

        def own(b, p, tables):
            return tables[0][p] if tables else 0

        def other(b, p, tables):
            return 0 if not tables else tables[2][b * len(tables[1]) + p] if plan.segments else tables[1][p]

        query, key = (own, other) if by_query else (other, own)
        self.query = pl.BlockSpec((1, heads, R, D), lambda b, c, r, p, *t: (b, c * passes + r, query(b, p, t), 0))
        self.key = pl.BlockSpec((1, kv_heads, R, D), lambda b, c, r, p, *t: (b, c, key(b, p, t), 0))
        self.row = pl.BlockSpec((1, heads, 1, R), lambda b, c, r, p, *t: (b, c * passes + r, 0, query(b, p, t)))
        self.ids = [pl.BlockSpec((1, 1, R), lambda b, c, r, p, *t, block=block: (b, 0, block(b, p, t)))
                    for block in (query, key) if plan.segments]

        def final(b, p, tables):  # the block of dq that is complete after square p
            if plan.n == 1 or plan.causal:
                return own(b, p, tables)
            return jnp.where(own(b, p, tables) == plan.n - 1, tables[1][p], plan.n - 1)

        self.dq = pl.BlockSpec((1, heads, R, D), lambda b, c, r, p, *t: (b, c * passes + r, final(b, p, t), 0))
        self.dkv = pl.BlockSpec((1, kv_heads, R, D),
                                lambda b, c, r, p, *t: (b, c, jnp.where(r == passes - 1, own(b, p, t), 0), 0))


def _call(kernel, plan, backward, segments_BT, inputs, in_specs, outputs, out_specs, scratch, interpret):
    """Call the kernel over the grid (row, key/value heads, pass, square), with tables and segment ids added."""
    tables = squares(plan, segments_BT, by_query=not backward)
    ids = [segments_BT[:, None]] * 2 if plan.segments else []
    axes = jax.typeof(inputs[0]).manual_axis_type  # of shard_map, over which the outputs vary as the inputs do
    scores = plan.B * plan.H * plan.T * plan.T // (1 + plan.causal)
    return pl.pallas_call(
        kernel, name='flash_backward' if backward else 'flash_forward', interpret=interpret,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes) for shape, dtype in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables), in_specs=in_specs, out_specs=out_specs,
            grid=(plan.B, plan.K // plan.kv_heads, plan.passes, len(tables[1]) if tables else 1),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch]),
        cost_estimate=pl.CostEstimate(
            flops=(10 if backward else 4) * scores * plan.D, transcendentals=scores,
            bytes_accessed=sum(x.nbytes for x in inputs) + sum(math.prod(s) * d.itemsize for s, d in outputs)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
            vmem_limit_bytes=vmem_bytes(plan, backward)))(*tables, *inputs, *ids)


# ---------------------------------------------------------------- the public function


def flash_attention(q_BTHD: Array, k_BSKD: Array, v_BSKD: Array, segments_BT: Array | None = None, *, scale: float,
                    causal: bool = True, tiles: FlashTiles | None = None, interpret=False) -> Array:
    """Compute o_BTHD = softmax(scale * q kᵀ) v, each query over the keys it sees; differentiable in q, k and v.

    Args:
      q_BTHD, k_BSKD, v_BSKD: bfloat16 or float32, one type; S = T, any T and D; query head h reads head h // (H / K).
        Float32 is computed to float32's precision (products in six passes of bfloat16).
      segments_BT: int32; tokens see their own segment alone.  0 is padding: such rows give zeros and zero gradients.
      causal: no token sees a later one.
      tiles: of both kernels; by default those of tuned_tiles.json for the device that is compiled for.
      interpret: False for the TPU, pltpu.InterpretParams(...) for its interpreter.

    Inside jax.shard_map (check_vma=True), B and heads may be split; all arguments vary over the same axes.

    Raises:
      ValueError: shapes, types or tiles do not fit; before anything is compiled.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    if k_BSKD.shape != (B, T, K, D) or v_BSKD.shape != k_BSKD.shape or H % K:
        raise ValueError(f'{q_BTHD.shape=}, {k_BSKD.shape=}, {v_BSKD.shape=} must be [B,T,H,D], [B,T,K,D], [B,T,K,D] '
                         'with H a multiple of K')
    if len({q_BTHD.dtype, k_BSKD.dtype, v_BSKD.dtype}) > 1 or q_BTHD.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f'{q_BTHD.dtype=}, {k_BSKD.dtype=}, {v_BSKD.dtype=} must all be bfloat16, or all float32: '
                         'cast before the call')
    if segments_BT is not None and (segments_BT.shape != (B, T) or segments_BT.dtype != jnp.int32):
        raise ValueError(f'{segments_BT.shape=}, {segments_BT.dtype=} must be {(B, T)} and int32')
    if segments_BT is None and not causal:
        segments_BT = jnp.ones((B, T), jnp.int32) if T % 128 else None  # the kernel's padding hides what is behind T
    return _vjp(q_BTHD, k_BSKD, v_BSKD, segments_BT, scale, causal, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _vjp(q_BTHD, k_BSKD, v_BSKD, segments_BT, scale, causal, tiles, interpret):
    """Run flash_attention, after its checks."""
    return _forward(q_BTHD, k_BSKD, v_BSKD, segments_BT, scale, causal, tiles, interpret)[0]


def _forward(q_BTHD, k_BSKD, v_BSKD, segments_BT, scale, causal, tiles, interpret):
    """Transpose, scale q and call the forward kernel: (o_BTHD, what `_backward` needs)."""
    B, T, H, D = q_BTHD.shape
    plan = make_plan(backward=False, B=B, T=T, H=H, K=k_BSKD.shape[2], D=D, dtype=q_BTHD.dtype, causal=causal,
                     segments=segments_BT is not None, tiles=tiles, interpret=interpret)
    q_BTHD = (q_BTHD.astype(jnp.float32) * (scale * LOG2E)).astype(q_BTHD.dtype)
    q_BHTD, k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (q_BTHD, k_BSKD, v_BSKD))
    specs, heads, R = Blocks(plan, by_query=True), plan.tiles.heads, plan.R
    o_BHTD, lse_BH1T = _call(
        functools.partial(forward_kernel, plan=plan), plan, False, segments_BT, (q_BHTD, k_BKSD, v_BKSD),
        [specs.query, specs.key, specs.key, *specs.ids],
        outputs=[(q_BHTD.shape, plan.dtype), ((B, H, 1, T), jnp.dtype(jnp.float32))],
        out_specs=[specs.query, specs.row],
        scratch=[(heads, 1, R), (heads, 1, R), (heads, D, R)] * (plan.n > 1), interpret=interpret)
    o_BHTD, lse_BH1T = checkpoint_name(o_BHTD, 'o'), checkpoint_name(lse_BH1T, 'statistics')  # model/remat.py, SAVEABLE
    return o_BHTD.transpose(0, 2, 1, 3), (q_BHTD, k_BKSD, v_BKSD, o_BHTD, lse_BH1T, segments_BT)


def _backward(scale, causal, tiles, interpret, saved, do_BTHD):
    """Call the backward kernel: (dq_BTHD of the q before scaling, dk_BSKD, dv_BSKD, None for the segments)."""
    q_BHTD, k_BKSD, v_BKSD, o_BHTD, lse_BH1T, segments_BT = saved
    B, H, T, D = q_BHTD.shape
    plan = make_plan(backward=True, B=B, T=T, H=H, K=k_BKSD.shape[1], D=D, dtype=q_BHTD.dtype, causal=causal,
                     segments=segments_BT is not None, tiles=tiles, interpret=interpret)
    do_BHTD = do_BTHD.transpose(0, 2, 1, 3)
    delta_BH1T = jnp.sum(do_BHTD.astype(jnp.float32) * o_BHTD.astype(jnp.float32), -1)[:, :, None]
    specs, padded = Blocks(plan, by_query=False), plan.n * plan.R
    gradients = _call(
        functools.partial(backward_kernel, plan=plan, scale=scale), plan, True, segments_BT,
        (q_BHTD, k_BKSD, v_BKSD, do_BHTD, lse_BH1T, delta_BH1T),
        [specs.query, specs.key, specs.key, specs.query, specs.row, specs.row, *specs.ids],
        outputs=[(x.shape, plan.dtype) for x in (q_BHTD, k_BKSD, v_BKSD)], out_specs=[specs.dq, specs.dkv, specs.dkv],
        scratch=[(plan.tiles.heads, D, padded), (plan.kv_heads, padded, D), (plan.kv_heads, padded, D)],
        interpret=interpret)
    return *(x.transpose(0, 2, 1, 3) for x in gradients), None


_vjp.defvjp(_forward, _backward)
