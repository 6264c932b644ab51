"""The blocks that a program of the decode kernel visits, and the ring in VMEM that they land in.

The blocks of all its sequences are one list.  DMAs run up to buffers - 1 blocks ahead, across the ends of sequences, so
that HBM is never idle, and bring the filled slots only, rounded up to whole tiles:

    length     b=0: 600 slots            b=1: 40    b=2: 300
    blocks     [256] [256] [88]          [40]       [256] [44]          fetched: 96, 48 and 48 slots of the last ones
    buffer      0     1     2             3          4     5
    at [88]                softmax, p V   q̂ Kᵀ      arriving            then: o of b=0 is written, q̂ of b=2 made

In slots, a block is two DMAs, K's and V's.  In pages, each page is one, since a page's keys and values lie together:

    table[b] = [7, 2, 9, ...]      pool page 7: [2, page, W]  ->  ring[buffer, :, 0:page]         block = 2 pages
                                   pool page 2: [2, page, W]  ->  ring[buffer, :, page:2 page]

One wait covers a block however many DMAs brought it: a semaphore counts bytes.  An int8 cache has a factor for each
slot and head, with slots in lanes; they come with their block.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def tile_rows(dtype) -> int:
    """Return the slots of a tile, in which they are fetched: 16 of bfloat16, 8 of float32, 32 of int8."""
    return 32 // jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class RingWalk:
    """Visits a program's blocks, sequence after sequence; an item is (sequence, block of it, buffer).

    A sequence of length 0 has one block, with nothing in it.
    """
    lengths_ref: jax.Array
    table_ref: jax.Array | None  # of the paged cache
    caches: list  # k and v [N, B, S, W], or one pool [N, pages, 2, page, W], in HBM
    factors_ref: jax.Array | None  # of an int8 cache [N, B, 2, K, S] or [N, pages, 2, K, page], in HBM
    ring_ref: jax.Array  # [buffers, 2, block, W]
    factors_ring_ref: jax.Array | None  # [buffers, 2, K, block]
    arrived: jax.Array  # a semaphore for each buffer
    layer: jax.Array
    begin: jax.Array
    end: jax.Array
    capacity: int  # slots that a sequence can have

    @property
    def block(self) -> int:
        return self.ring_ref.shape[2]

    @property
    def page(self) -> int:
        return self.caches[0].shape[3]

    def whole_tiles(self, slots):
        """Round slots up to whole tiles."""
        rows = tile_rows(self.ring_ref.dtype)
        return pl.multiple_of((slots + rows - 1) & -rows, rows)

    def whole_lanes(self, slots):
        """Round slots up to whole lanes, as the factors need it; pages are brought whole."""
        unit = LANES if self.table_ref is None else self.page
        return pl.multiple_of(pl.cdiv(slots, unit) * unit, LANES)

    def length(self, b):
        """Return the filled slots of sequence `b`."""
        return jnp.minimum(self.lengths_ref[jnp.minimum(b, self.end - 1)], self.capacity)

    def filled(self, item):
        """Count the slots of the item's block that hold keys."""
        b, j, _ = item
        return jnp.clip(self.length(b) - j * self.block, 0, self.block)

    def after(self, item):
        """Return the item that follows."""
        b, j, buffer = item
        last = (j + 1) * self.block >= self.length(b)
        turn = buffer == self.ring_ref.shape[0] - 1
        return jnp.where(last, b + 1, b), jnp.where(last, 0, j + 1), jnp.where(turn, 0, buffer + 1)

    def fetch(self, item):
        """Start the DMAs of an item's block; none past the last."""
        b, j, buffer = item
        filled = self.filled(item)
        copy = lambda source, target: pltpu.make_async_copy(source, target, self.arrived.at[buffer]).start()

        def fetch_page(i, _):
            page, first = self.page, pl.multiple_of(i * self.page, self.page)
            place = self.table_ref[b, j * (self.block // page) + i]
            count = self.whole_tiles(jnp.minimum(filled - first, page))
            copy(self.caches[0].at[self.layer, place, :, pl.ds(0, count)],
                 self.ring_ref.at[buffer, :, pl.ds(first, count)])
            if self.factors_ref is not None:
                copy(self.factors_ref.at[self.layer, place],
                     self.factors_ring_ref.at[buffer, :, :, pl.ds(first, page)])

        def fetch_slots():
            first, count = pl.multiple_of(j * self.block, self.block), self.whole_tiles(filled)
            for i, cache in enumerate(self.caches):
                copy(cache.at[self.layer, b, pl.ds(first, count)], self.ring_ref.at[buffer, i, pl.ds(0, count)])
            if self.factors_ref is not None:
                lanes = self.whole_lanes(filled)
                copy(self.factors_ref.at[self.layer, b, :, :, pl.ds(first, lanes)],
                     self.factors_ring_ref.at[buffer, :, :, pl.ds(0, lanes)])

        @pl.when((b < self.end) & (filled > 0))
        def _():
            if self.table_ref is None:
                fetch_slots()
            else:
                lax.fori_loop(0, pl.cdiv(filled, self.page), fetch_page, None)

    def wait(self, item):
        """Wait until all that `fetch` started for the item is there: a wait counts bytes, whatever brought them."""
        b, _, buffer = item
        filled = self.filled(item)

        @pl.when((b < self.end) & (filled > 0))
        def _():
            landed = [self.ring_ref.at[buffer, :, pl.ds(0, self.whole_tiles(filled))]]
            if self.factors_ref is not None:
                landed += [self.factors_ring_ref.at[buffer, :, :, pl.ds(0, self.whole_lanes(filled))]]
            for place in landed:
                pltpu.make_async_copy(place, place, self.arrived.at[buffer]).wait()

    def clear(self, item):
        """Zero the values past the length, whose weight is 0: what lies there may be NaN, and 0 · NaN is NaN."""
        buffer, filled, rows = item[2], self.filled(item), tile_rows(self.ring_ref.dtype)
        if self.factors_ref is not None:
            return  # int8 has no NaN

        @pl.when(filled < self.block)
        def _():
            edge = pl.ds(pl.multiple_of(filled & -rows, rows), rows)
            v = self.ring_ref[buffer, 1, edge, :]
            real = lax.broadcasted_iota(jnp.int32, v.shape, 0) < (filled & rows - 1)
            self.ring_ref[buffer, 1, edge, :] = jnp.where(real, v, 0)

            def zero(i, _):
                self.ring_ref[buffer, 1, pl.ds(pl.multiple_of(i * rows, rows), rows), :] = jnp.zeros_like(v)

            lax.fori_loop((filled >> rows.bit_length() - 1) + 1, self.block // rows, zero, None)
