"""Share between formats: the tensors of a model, a part of an array straight from a file, the two rotary orders.

`bounds` name a part: (start, stop) per dimension, or None for the whole.

Rotary embedding turns pairs of coordinates of a head.  Which two make pair i is a convention of the file; scores q . k
do not depend on it as long as q and k agree, so moving the columns of w_q and w_k is exact:

  interleaved   (2i, 2i + 1)      Meta's original LLaMA, EasyLM, llama.cpp's GGUF
  half-split    (i, i + D / 2)    Hugging Face, and this project's w_q and w_k
"""
import math
from pathlib import Path

import jax
import numpy as np

from model.config import LlamaConfig
from model.weights import WeightSpec, weight_specs

BLOCK_BYTES = 1 << 25  # of the file that is mapped at a time

Bounds = tuple[tuple[int, int], ...] | None


def tensors_of(config: LlamaConfig) -> list[tuple[WeightSpec, int | None]]:
    """List [(weight, layer)]: what a reader's `tensor` is asked for, layer None where a weight is not stacked."""
    return [(spec, layer) for spec in jax.tree.leaves(weight_specs(config))
            for layer in (range(spec.shape[0]) if spec.stacked else [None])]


def slices(bounds: Bounds) -> tuple[slice, ...]:
    return (...,) if bounds is None else tuple(slice(*bound) for bound in bounds)


def transposed(bounds: Bounds) -> Bounds:
    return bounds and bounds[::-1]


def read_part(path: Path, dtype: type, shape: tuple[int, ...], offset: int, bounds: Bounds) -> np.ndarray:
    """A part of the array in C order that begins at byte `offset` of a file; of whole rows, or columns of a matrix.

    Rows are read; columns are copied out of mapped blocks of rows, so that other columns' pages are not touched and
    those touched do not pile up in memory.
    """
    rows, *columns = bounds or [(0, size) for size in shape] or [(0, 1)]
    count, row_items = rows[1] - rows[0], math.prod(shape[1:])
    row_bytes = row_items * np.dtype(dtype).itemsize
    if columns == [(0, size) for size in shape[1:]]:
        part = np.fromfile(path, dtype, count * row_items, offset=offset + rows[0] * row_bytes)
        return part.reshape((count, *shape[1:]) if shape else ())
    (first, last), = columns
    part, step = np.empty((count, last - first), dtype), max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, count, step):
        block = min(step, count - start)
        mapped = np.memmap(path, dtype, 'r', offset + (rows[0] + start) * row_bytes, (block, shape[1]))
        part[start:start + block] = mapped[:, first:last]
    return part


def half_split_part(read, bounds: Bounds, head_dim: int) -> np.ndarray:
    """A part of w_q or w_k in half-split rotary order from read(bounds) in interleaved order: by whole heads."""
    if bounds is None:
        return half_split_from_interleaved(read(None), head_dim)
    rows, (first, last) = bounds
    start, stop = first // head_dim * head_dim, -(-last // head_dim) * head_dim
    return half_split_from_interleaved(read((rows, (start, stop))), head_dim)[:, first - start:last - start]


def half_split_from_interleaved(w_MX: np.ndarray, head_dim: int) -> np.ndarray:
    """Move columns of w_q [M, HD] or w_k [M, KD] from interleaved to half-split order, head by head."""
    return w_MX.reshape(len(w_MX), -1, head_dim // 2, 2).swapaxes(2, 3).reshape(w_MX.shape)


def interleaved_from_half_split(w_MX: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo `half_split_from_interleaved`."""
    return w_MX.reshape(len(w_MX), -1, 2, head_dim // 2).swapaxes(2, 3).reshape(w_MX.shape)
