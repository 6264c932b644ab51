"""Make the benchmark's cases of our own attention kernels; anchors.py makes those of the kernels of others."""
import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from instruments.bench import caches, shapes
from instruments.bench.shapes import AttentionShape, DecodeShape
from kernels import decode_attention as decode
from kernels.flash_attention import flash_attention

NOT_FORWARD = '^(?!.*(fwd|forward))'  # a gradient's program runs the forward kernel too


@dataclasses.dataclass(frozen=True)
class Case:
    """Hold one kernel at one shape, ready to compile.

    `arrange` brings (q_BTHD, k_BSKD, v_BSKD[, do_BTHD]) into the kernel's layout, `function(*arranged, *integers)`
    calls it, `restore` brings what comes out into the layout of q (or of q, k, v) again.
    """
    function: Callable
    arrange: Callable = lambda *arrays: arrays
    restore: Callable = lambda out: out
    integers: tuple[np.ndarray, ...] = ()  # lengths, page tables
    only: str = ''  # regular expression for the names of the kernels that count
    extra_bytes: int = 0  # HBM traffic outside the kernel that its result needs


def with_gradient(forward, backward: bool):
    """Return forward(q, k, v), or the function that gives its vjp for (q, k, v, do)."""
    if not backward:
        return forward
    return lambda q, k, v, do, *rest: jax.vjp(lambda q, k, v: forward(q, k, v, *rest), q, k, v)[1](do)


def ours(shape: AttentionShape | DecodeShape, backward: bool, interpret=False, tiles=None) -> Case:
    """Make the case of our kernel at a shape, with its tuned tiles or others."""
    scale = shape.D ** -0.5
    if isinstance(shape, AttentionShape):
        def forward(q, k, v, segments_BT=None):
            return flash_attention(q, k, v, segments_BT, scale=scale, causal=shape.causal, tiles=tiles,
                                   interpret=interpret)

        integers = (shapes.segment_ids(shape),) if shape.segments else ()
        return Case(with_gradient(forward, backward), integers=integers, only=NOT_FORWARD if backward else '')
    lengths_B, options = shapes.lengths(shape), dict(kv_heads=shape.K, scale=scale, tiles=tiles, interpret=interpret)
    if not shape.page:
        return Case(lambda q, k, v, lengths_B: decode.decode_attention(q, k, v, lengths_B, **options),
                    arrange=lambda q, k, v: (q, caches.make_cache(k), caches.make_cache(v)), integers=(lengths_B,))
    table_BP = shapes.page_table(shape)
    return Case(lambda q, pages, *integers: decode.paged_decode_attention(q, pages, *integers, **options),
                arrange=lambda q, k, v: (q, caches.make_pages(k, v, table_BP, shape.page)),
                integers=(table_BP, lengths_B))


def takes(shape: AttentionShape | DecodeShape, backward: bool) -> bool:
    """Say whether `ours` has a case: decoding has no gradient, and int8 caches have factors that no case makes."""
    return isinstance(shape, AttentionShape) or not (backward or shape.cache_dtype == 'int8')


def inputs(shape, backward: bool):
    """Draw q, k, v, and for the backward pass do."""
    if isinstance(shape, DecodeShape):
        return shapes.decode_inputs(shape)[:3]
    q, k, v, _ = shapes.attention_inputs(shape)
    return (q, k, v, shapes.attention_inputs(shape, seed=1)[0]) if backward else (q, k, v)


def abstract_inputs(shape, backward: bool):
    """Make the shapes and types of `inputs`."""
    queries = (shape.B, shape.H, shape.D) if isinstance(shape, DecodeShape) else (shape.B, shape.T, shape.H, shape.D)
    keys = (shape.B, shape.S if isinstance(shape, DecodeShape) else shape.T, shape.K, shape.D)
    return [jax.ShapeDtypeStruct(x, shape.dtype) for x in (queries, keys, keys, queries)[:4 if backward else 3]]
