"""Make the cases of the attention kernels that ours are measured against.

  flash          jax.experimental.pallas.ops.tpu.flash_attention            tiles: queries, keys
  splash         jax.experimental.pallas.ops.tpu.splash_attention           tiles: queries, keys, keys a step
  tokamax        tokamax's splash attention, where installed                tiles: queries, keys, keys a step
  paged          jax.experimental.pallas.ops.tpu.paged_attention            tiles: page, pages a block
  ragged_paged   jax.experimental.pallas.ops.tpu.ragged_paged_attention     tiles: page, pages a block, queries a block

They take [B, H, T, D], and those of the splash family queries that are multiplied by the scale already.  flash has no
grouped queries: keys and values are repeated outside it, in HBM.  The fused backward of the splash family writes one
partial dq for each block of keys; adding them is XLA's, and its HBM traffic is charged to the kernel.
"""
import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from instruments.bench import shapes
from instruments.bench.cases import Case, with_gradient
from instruments.bench.shapes import AttentionShape, DecodeShape


def swap(*arrays):
    """Exchange heads and tokens: [B, T, H, D] <-> [B, H, T, D]."""
    return tuple(x.swapaxes(1, 2) for x in arrays)


def attention_case(forward, backward: bool, **rest) -> Case:
    """Make the case of forward(q_BHTD, k_BKTD, v_BKTD), or of its gradients."""
    restore = (lambda out: swap(*out)) if backward else (lambda out: swap(out)[0])
    return Case(with_gradient(forward, backward), swap, restore, only='bwd|dkv|dq' if backward else '', **rest)


def flash(shape: AttentionShape, backward: bool, tiles: tuple[int, ...]) -> Case:
    """Make a case of JAX's flash attention; tiles: queries, keys."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel
    q, k = tiles
    sizes = kernel.BlockSizes(
        block_b=1, block_q=q, block_k_major=k, block_k=k, block_q_major_dkv=q, block_k_major_dkv=k, block_k_dkv=k,
        block_q_dkv=q, block_k_major_dq=k, block_k_dq=k, block_q_dq=q)

    def forward(q_BHTD, k_BKTD, v_BKTD):
        if shape.H > shape.K:
            k_BKTD, v_BKTD = (jnp.repeat(x, shape.H // shape.K, axis=1) for x in (k_BKTD, v_BKTD))
        return kernel.flash_attention(q_BHTD, k_BKTD, v_BKTD, causal=shape.causal, sm_scale=shape.D ** -0.5,
                                      block_sizes=sizes)

    return attention_case(forward, backward)


def splash(shape: AttentionShape, backward: bool, tiles: tuple[int, ...]) -> Case:
    """Make a case of JAX's splash attention; tiles: queries, keys, keys a step."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    q, k, step = tiles
    sizes = kernel.BlockSizes(block_q=q, block_kv=k, block_kv_compute=step, block_q_dkv=q, block_kv_dkv=k,
                              block_kv_dkv_compute=step, use_fused_bwd_kernel=True)
    mask = (masks.CausalMask if shape.causal else masks.FullMask)((shape.T, shape.T))
    made = kernel.make_splash_mha(mask=masks.MultiHeadMask([mask] * shape.H), head_shards=1, q_seq_shards=1,
                                  block_sizes=sizes)
    return splash_case(made, shape, backward, k)


def tokamax(shape: AttentionShape, backward: bool, tiles: tuple[int, ...]) -> Case:
    """Make a case of tokamax's splash attention; tiles: queries, keys, keys a step."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks
    q, k, step = tiles
    config = kernel.SplashConfig(block_q=q, block_kv=k, block_kv_compute=step, block_q_dkv=q, block_kv_dkv=k,
                                 block_kv_dkv_compute=step)
    mask = (masks.CausalMask if shape.causal else masks.FullMask)((shape.T, shape.T))
    made = kernel.make_splash_mha(mask, config=config, q_seq_shards=1)
    return splash_case(made, shape, backward, k)


def splash_case(made, shape: AttentionShape, backward: bool, block_kv: int) -> Case:
    """Make a case of a kernel of one row, with the bytes of its partial dq: one for each block of keys."""
    mapped = jax.vmap(made) if shape.B > 1 else (lambda q, k, v: made(q[0], k[0], v[0])[None])
    blocks = shape.T // block_kv
    partial = 2 * shape.B * shape.H * shape.T * max(128, shape.D) * (blocks + 1) if backward and blocks > 1 else 0
    return attention_case(lambda q, k, v: mapped(q, k, v), backward, extra_bytes=partial)


def paged(shape: DecodeShape, tiles: tuple[int, ...]) -> Case:
    """Make a case of JAX's paged attention; tiles: tokens of a page, pages of a block."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention_kernel as kernel
    page, block = tiles
    table = shapes.page_table(dataclasses.replace(shape, page=page))

    def arrange(q_BHD, k_BSKD, v_BSKD):
        return q_BHD, *(into_pages(x, table, page).transpose(2, 0, 1, 3) for x in (k_BSKD, v_BSKD))

    def call(q_BHD, k_KPSD, v_KPSD, lengths_B, table):
        return kernel.paged_attention(q_BHD, k_KPSD, v_KPSD, lengths_B, table, pages_per_compute_block=block)

    return Case(call, arrange, integers=(shapes.lengths(shape), table))


def ragged_paged(shape: DecodeShape, tiles: tuple[int, ...]) -> Case:
    """Make a case of JAX's ragged paged attention; tiles: tokens of a page, pages of a block, queries of a block."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel
    page, block, queries = tiles
    table = shapes.page_table(dataclasses.replace(shape, page=page))

    def arrange(q_BHD, k_BSKD, v_BSKD):
        k_PSKD, v_PSKD = (into_pages(x, table, page) for x in (k_BSKD, v_BSKD))
        pairs = jnp.stack([k_PSKD, v_PSKD], axis=3)  # a head's keys, then its values
        return q_BHD, pairs.reshape(*k_PSKD.shape[:2], 2 * shape.K, shape.D)

    def call(q_BHD, kv_pages, lengths_B, table, starts, count):
        return kernel.ragged_paged_attention(q_BHD, kv_pages, lengths_B, table, starts, count, sm_scale=1.0,
                                             num_kv_pages_per_block=block, num_queries_per_block=queries,
                                             vmem_limit_bytes=64 * 2**20)

    integers = (shapes.lengths(shape), table, np.arange(shape.B + 1, dtype=np.int32), np.int32([shape.B]))
    return Case(call, arrange, integers=integers)


def into_pages(x_BSKD, table, page: int):
    """Cut rows into pages [pool, page, K, D]: page n of row b goes to table[b, n]; unused places hold zeros."""
    B, S, K, D = x_BSKD.shape
    pool = jnp.zeros((table.size + 1, page, K, D), x_BSKD.dtype)
    return pool.at[table.ravel()].set(x_BSKD.reshape(-1, page, K, D))


# kernel -> (builder, the grid of tiles that is searched); tiles that do not fit a shape are left out by `grid`
ATTENTION = {
    'flash': (flash, ((512, 512), (1024, 1024))),
    'splash': (splash, ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024))),
    'tokamax': (tokamax, ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024))),
}
DECODE = {
    'paged': (paged, ((16, 8), (16, 32), (64, 8), (128, 8))),
    'ragged_paged': (ragged_paged, ((128, 4, 8), (128, 8, 8), (128, 16, 8), (128, 8, 16), (128, 8, 32))),
}


def installed(name: str) -> bool:
    """Say whether a kernel's package is there."""
    return name != 'tokamax' or importlib.util.find_spec('tokamax') is not None


def grid(name: str, shape: AttentionShape | DecodeShape) -> list[tuple[int, ...]]:
    """List the tiles of a kernel that divide a shape; none where the kernel does not take the shape at all."""
    if isinstance(shape, AttentionShape):
        return [] if shape.segments else [tiles for tiles in ATTENTION[name][1]
                                          if all(shape.T % tile == 0 for tile in tiles)]
    if shape.cache_dtype == 'int8':
        return []
    return [tiles for tiles in DECODE[name][1] if shape.S % (tiles[0] * tiles[1]) == 0]
