"""The two orders of a head's coordinates under rotary embedding.  Users: gguf.py, easylm.py, easylm_writer.py.

Rotary embedding turns pairs of coordinates of a head.  Which two make pair i is a convention of the file:

  interleaved   (2i, 2i + 1)      Meta's original LLaMA, EasyLM, llama.cpp's GGUF
  half-split    (i, i + D / 2)    Hugging Face, and this project's w_q and w_k

Scores q . k do not depend on the order as long as q and k agree, so moving the columns of w_q and w_k is exact.
"""
import numpy as np


def half_split_from_interleaved(w_MX: np.ndarray, head_dim: int) -> np.ndarray:
    """Columns of w_q [M, HD] or w_k [M, KD] moved from interleaved to half-split order, head by head."""
    rows, columns = w_MX.shape
    pairs = w_MX.reshape(rows, columns // head_dim, head_dim // 2, 2)
    return pairs.swapaxes(2, 3).reshape(rows, columns)


def interleaved_from_half_split(w_MX: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse."""
    rows, columns = w_MX.shape
    halves = w_MX.reshape(rows, columns // head_dim, 2, head_dim // 2)
    return halves.swapaxes(2, 3).reshape(rows, columns)
