"""Plan how the flash attention kernels cut their work: tiles, what follows from them, and the VMEM they take.

Letters: kernels/flash_attention.py, which reads this.  Tuned tiles: kernels/tuned.py.
"""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.tuned import tuned_tiles

MIB = 2**20
CHIPS = {  # the kind of a device, as JAX has it -> (the chip's name, bytes of VMEM of a TensorCore)
    'TPU v4': ('v4', 16 * MIB), 'TPU v5 lite': ('v5e', 128 * MIB), 'TPU v5e': ('v5e', 128 * MIB),
    'TPU v5': ('v5p', 64 * MIB), 'TPU v5p': ('v5p', 64 * MIB), 'TPU v6 lite': ('v6e', 128 * MIB),
    'TPU v6e': ('v6e', 128 * MIB), 'TPU7x': ('v7x', 64 * MIB)}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Holds how a kernel cuts its work: it decides speed and memory; results differ by the order of additions only."""
    heads: int  # query heads of a grid step: a divisor of H / K or a multiple of it
    block: int  # longest side of a square of scores, in tokens; a shorter row is one square
    strip: int  # queries (backward: keys) of one item of the pipelined program
    diagonal: int  # side of the tiles that the diagonal is cut into
    turn: int  # keys of one turn of the loop through a square off the diagonal

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f'{self.heads=} must be at least 1')
        for large, small in (('block', 'strip'), ('strip', 'diagonal'), ('block', 'turn'), ('turn', 'diagonal')):
            if getattr(self, large) % getattr(self, small):
                raise ValueError(f'{large}={getattr(self, large)} must be a multiple of {small}={getattr(self, small)}')
        if self.diagonal < 128 or self.diagonal % 128:
            raise ValueError(f'{self.diagonal=} must be a multiple of 128, the lanes of a TPU register')


class FlashTiles(NamedTuple):
    """Holds the tiles of both kernels."""
    forward: Tiles
    backward: Tiles


@dataclasses.dataclass(frozen=True)
class FlashPlan:
    """Holds what is static in one kernel: sizes (flash_attention.py has the letters), tiles, and what follows."""
    B: int
    T: int
    H: int
    K: int
    D: int
    causal: bool
    segments: bool
    dtype: jnp.dtype
    tiles: Tiles

    def __post_init__(self):
        group, heads = self.H // self.K, self.tiles.heads
        if heads not in possible_heads(self.H, self.K):
            raise ValueError(f'{heads=} of the tiles must divide H/K={group}, or be a multiple of it that divides '
                             f'H={self.H}: one of {possible_heads(self.H, self.K)}')

    @property
    def n(self) -> int:
        """Squares on the diagonal."""
        return pl.cdiv(self.T, self.tiles.block)

    @property
    def R(self) -> int:
        """Side of the squares: the row's even share, rounded up to tiles of the diagonal."""
        return pl.cdiv(pl.cdiv(self.T, self.n), self.tiles.diagonal) * self.tiles.diagonal

    @property
    def turn(self) -> int:
        """Keys of a loop turn: what divides R and is nearest to the tiles' turn."""
        sizes = [size for size in range(self.tiles.diagonal, self.R + 1, self.tiles.diagonal) if self.R % size == 0]
        return min(sizes, key=lambda size: abs(size - self.tiles.turn))

    @property
    def kv_heads(self) -> int:
        """Key/value heads of a grid step."""
        return max(1, self.tiles.heads * self.K // self.H)

    @property
    def passes(self) -> int:
        """Grid steps that share a key/value head."""
        return max(1, self.H // self.K // self.tiles.heads)

    @property
    def strips(self) -> list[tuple[int, int]]:
        """(start, size) of the strips of a square."""
        return [(a, min(self.tiles.strip, self.R - a)) for a in range(0, self.R, self.tiles.strip)]

    def kv_head(self, head: int) -> int:
        """Return the key/value head that query head `head` reads, both counted within a grid step."""
        return head * self.kv_heads // self.tiles.heads


def possible_heads(H: int, K: int) -> list[int]:
    """List how many query heads a grid step can take."""
    return [h for h in range(1, H + 1) if H % h == 0 and ((H // K) % h == 0 or h % (H // K) == 0)]


def vmem_bytes(plan: FlashPlan, backward: bool) -> int:
    """Bound the VMEM that a kernel takes, in bytes, from above; it is compiled with this as its limit."""
    lanes, item = pl.cdiv(plan.D, 128) * 128, plan.dtype.itemsize
    heads, kv_heads, R, T = plan.tiles.heads, plan.kv_heads, plan.R, plan.n * plan.R
    query, key = heads * R * lanes * item, kv_heads * R * lanes * item
    row, ids = heads * 8 * R * 4, 8 * R * 4  # [1, R] may take 8 sublanes
    if backward:
        windows = 3 * query + 4 * key + 2 * row  # q, do, dq; k, v, dk, dv; lse, D_i
        sums = (heads * plan.D + 2 * kv_heads * lanes) * T * 4  # dq_DT; dk, dv
        strip = plan.tiles.strip
        scores, size = strip * (max(strip, plan.turn, R - strip) if plan.causal else R), 20
    else:
        windows = 2 * query + 2 * key + row  # q, o; k, v; lse
        sums = (heads * plan.D * R * 4 + 2 * row) * (plan.n > 1)  # o_DT; m, l
        scores, size = plan.tiles.strip * R, 10
    # in flight: s (and dp) of the item ahead, in the softmax's hands, and p (and ds) of the item behind
    return 2 * (windows + 2 * ids * plan.segments) + sums + min(scores, R * R) * size * item // 2 + MIB


def device_kind() -> str:
    """Name the kind of device that is compiled for: that of the mesh, which may be described only, or the first."""
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def make_plan(*, backward: bool, B: int, T: int, H: int, K: int, D: int, dtype, causal: bool, segments: bool,
              tiles: FlashTiles | None, interpret) -> FlashPlan:
    """Plan a kernel with the tiles given, or with the device's (`device_kind`) tuned ones, made smaller until they fit.

    Raises:
      ValueError: the tiles do not fit the sizes, no tiles are known for the device, or VMEM cannot hold so long a row.
    """
    with_tiles = functools.partial(FlashPlan, B, T, H, K, D, causal, segments, dtype)
    if tiles is not None:
        return with_tiles(tiles.backward if backward else tiles.forward)
    kind = 'TPU v5e' if interpret else device_kind()
    if kind not in CHIPS:
        raise ValueError(f'{kind=} of the device is no TPU that tiles are known for ({", ".join(CHIPS)}); compile '
                         'under jax.set_mesh of a mesh of these, pass tiles=, or interpret=')
    chip, vmem = CHIPS[kind]
    wanted = Tiles(**tuned_tiles('flash_backward' if backward else 'flash_forward', chip, T=T, D=D, group=H // K,
                                 causal=causal, segments=segments))
    if dtype == jnp.float32:  # a product takes six passes, thus six times the code, and twice the memory
        wanted = dataclasses.replace(wanted, heads=1, block=512, strip=256, turn=256)
    for block in (wanted.block >> shift for shift in range(8) if wanted.block >> shift >= wanted.diagonal):
        for heads in (h for h in reversed(possible_heads(H, K)) if h <= wanted.heads):
            smaller = dataclasses.replace(wanted, heads=heads, block=block, strip=min(wanted.strip, block),
                                          turn=min(wanted.turn, block))
            plan = with_tiles(smaller)
            if vmem_bytes(plan, backward) <= vmem:
                return plan
    raise ValueError(f'{T=} is too long for {chip}: the backward pass keeps dq, dk, dv of a row in VMEM and takes '
                     f'{vmem_bytes(plan, backward) / MIB:.0f} of {vmem // MIB} MiB; '
                     'split the sequence over devices')
