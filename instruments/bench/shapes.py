"""Name the shapes for the tests, the tuner and the benchmark of the attention kernels.

The benchmark's shapes (causal, bfloat16):

  s1  B8 H32 K32 T1024 D128    a 7B model's layer at the length of the article's run
  s2  s1 with D100             the same of OpenLLaMA 3B, whose head dimension fits no tile
  s3  B4 H32 K8 T4096 D128     a grouped-query model (Llama 3 8B, Mistral 7B) on long rows
  s4  B8 H9 K3 T1024 D64       SmolLM2-135M, the quickstart's model
  d1  B64 H32 K8 S2048 D128    decoding with every slot of the cache full
  d2  d1 with ragged lengths   the same as a server meets it: lengths uniform in 64..2048

`_full`: not causal.  `_segments`: rows packed from several examples.  `_ragged`: a length that no tile divides.
`_paged`: the cache is a pool of pages.  `_int8`: the cache is int8 with scales.  Names that begin with `tiny_` are for
tests: the lengths 1, 97, 129, 1025, every head dimension, and every sharing of key/value heads.
"""
import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Describe self attention over [B, T] tokens: H query heads share K key/value heads of dimension D."""
    B: int
    T: int
    H: int
    K: int
    D: int
    causal: bool = True
    segments: int = 0  # examples packed into a row; 0: rows are one example without padding
    dtype: str = 'bfloat16'

    def __post_init__(self):
        if self.K < 1 or self.H % self.K:
            raise ValueError(f'{self.H=} must be a multiple of {self.K=}: a key/value head serves H / K query heads')
        if min(self.B, self.T, self.D) < 1 or not 0 <= self.segments < max(self.T, 1):
            raise ValueError(f'{self.B=}, {self.T=}, {self.D=} must be at least 1 and {self.segments=} below T')


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Describe one query a sequence against a cache of S positions; each sequence has filled its own length."""
    B: int
    S: int
    H: int
    K: int
    D: int
    lengths: str = 'full'  # 'full': all S. 'uniform': 64..S. 'edges': 0, 1, S-1 and S by turns, then uniform in 1..S
    page: int = 0  # positions in a page; 0: each sequence has S positions of its own
    dtype: str = 'bfloat16'
    cache_dtype: str = 'bfloat16'

    def __post_init__(self):
        if self.K < 1 or self.H % self.K:
            raise ValueError(f'{self.H=} must be a multiple of {self.K=}: a key/value head serves H / K query heads')
        if self.lengths not in ('full', 'uniform', 'edges'):
            raise ValueError(f"{self.lengths=} must be 'full', 'uniform' or 'edges'")
        if self.lengths == 'uniform' and self.S < 64:
            raise ValueError(f"{self.S=} must be at least 64 for {self.lengths=}; 'edges' suits short caches")
        if self.page and self.S % self.page:
            raise ValueError(f'{self.S=} must be a multiple of {self.page=}')


S1 = AttentionShape(B=8, T=1024, H=32, K=32, D=128)
S2 = AttentionShape(B=8, T=1024, H=32, K=32, D=100)
S3 = AttentionShape(B=4, T=4096, H=32, K=8, D=128)
S4 = AttentionShape(B=8, T=1024, H=9, K=3, D=64)
D1 = DecodeShape(B=64, S=2048, H=32, K=8, D=128)
D2 = dataclasses.replace(D1, lengths='uniform')
vary = dataclasses.replace

ATTENTION = {
    's1': S1,
    's2': S2,
    's3': S3,
    's4': S4,
    's1_full': vary(S1, causal=False),
    's3_full': vary(S3, causal=False),
    's4_full': vary(S4, causal=False),
    's1_segments': vary(S1, segments=6),
    's3_segments': vary(S3, segments=12),
    's4_segments': vary(S4, segments=20),  # reviews of about 50 tokens
    's1_ragged': vary(S1, T=1025),
    's2_ragged': vary(S2, T=1025),
    's3_ragged': vary(S3, T=4000),
    's4_ragged': vary(S4, T=1025),

    'tiny_t1': AttentionShape(B=2, T=1, H=2, K=2, D=128),
    'tiny_t97': AttentionShape(B=2, T=97, H=2, K=1, D=64),
    'tiny_t129': AttentionShape(B=1, T=129, H=4, K=2, D=128),
    'tiny_t1025': AttentionShape(B=1, T=1025, H=2, K=1, D=128),
    'tiny_d64': AttentionShape(B=1, T=256, H=3, K=1, D=64),
    'tiny_d80': AttentionShape(B=1, T=256, H=2, K=2, D=80),
    'tiny_d96': AttentionShape(B=1, T=256, H=2, K=2, D=96),
    'tiny_d100': AttentionShape(B=2, T=256, H=4, K=4, D=100),
    'tiny_d256': AttentionShape(B=1, T=256, H=2, K=1, D=256),
    'tiny_mha': AttentionShape(B=2, T=256, H=4, K=4, D=128),
    'tiny_gqa': AttentionShape(B=2, T=256, H=6, K=2, D=128),
    'tiny_mqa': AttentionShape(B=2, T=256, H=4, K=1, D=64),
    'tiny_f32': AttentionShape(B=1, T=256, H=4, K=2, D=128, dtype='float32'),
    'tiny_f32_d100': AttentionShape(B=1, T=129, H=2, K=1, D=100, dtype='float32'),
    'tiny_full': AttentionShape(B=2, T=256, H=4, K=2, D=128, causal=False),
    'tiny_full_t129': AttentionShape(B=1, T=129, H=2, K=2, D=64, causal=False),
    'tiny_segments': AttentionShape(B=2, T=512, H=4, K=2, D=128, segments=5),
    'tiny_segments_full': AttentionShape(B=2, T=256, H=2, K=2, D=64, causal=False, segments=3),
    'tiny_segments_t97': AttentionShape(B=2, T=97, H=2, K=1, D=100, segments=4, dtype='float32'),
    'tiny_long': AttentionShape(B=1, T=2048, H=2, K=1, D=64),
}

DECODE = {
    'd1': D1,
    'd2': D2,
    'd1_paged': vary(D1, page=128),
    'd2_paged': vary(D2, page=128),
    'd1_int8': vary(D1, cache_dtype='int8'),
    'd2_int8': vary(D2, cache_dtype='int8'),
    'd2_smollm2': DecodeShape(B=64, S=2048, H=9, K=3, D=64, lengths='uniform'),
    'd2_openllama': DecodeShape(B=64, S=2048, H=32, K=32, D=100, lengths='uniform'),

    'tiny_full': DecodeShape(B=2, S=256, H=4, K=2, D=128),
    'tiny_edges': DecodeShape(B=6, S=256, H=4, K=2, D=128, lengths='edges'),
    'tiny_s97': DecodeShape(B=4, S=97, H=2, K=1, D=64, lengths='edges'),
    'tiny_s129': DecodeShape(B=5, S=129, H=2, K=2, D=100, lengths='edges'),
    'tiny_s1': DecodeShape(B=3, S=1, H=2, K=2, D=128, lengths='edges'),
    'tiny_s1025': DecodeShape(B=2, S=1025, H=2, K=1, D=128, lengths='uniform'),
    'tiny_d80': DecodeShape(B=2, S=128, H=4, K=2, D=80, lengths='edges'),
    'tiny_d96': DecodeShape(B=2, S=128, H=4, K=4, D=96, lengths='edges'),
    'tiny_d256': DecodeShape(B=2, S=128, H=4, K=2, D=256, lengths='edges'),
    'tiny_mqa': DecodeShape(B=3, S=128, H=8, K=1, D=64, lengths='edges'),
    'tiny_smollm2': DecodeShape(B=4, S=192, H=9, K=3, D=64, lengths='uniform'),
    'tiny_f32': DecodeShape(B=4, S=128, H=4, K=2, D=128, lengths='edges', dtype='float32', cache_dtype='float32'),
    'tiny_int8': DecodeShape(B=5, S=256, H=4, K=2, D=128, lengths='edges', cache_dtype='int8'),
    'tiny_paged': DecodeShape(B=6, S=256, H=4, K=2, D=128, lengths='edges', page=16),
    'tiny_paged_d100': DecodeShape(B=3, S=128, H=2, K=2, D=100, lengths='edges', page=32),
    'tiny_paged_f32': DecodeShape(B=3, S=128, H=4, K=1, D=64, lengths='uniform', page=32, dtype='float32',
                                  cache_dtype='float32'),
}


def attention_inputs(shape: AttentionShape, seed: int = 0):
    """Draw (q_BTHD, k_BTKD, v_BTKD, segments_BT): normal numbers; int32, or None where a row is one example."""
    random = np.random.default_rng(seed)
    q_BTHD, k_BTKD, v_BTKD = (normal(random, (shape.B, shape.T, heads, shape.D), shape.dtype)
                              for heads in (shape.H, shape.K, shape.K))
    return q_BTHD, k_BTKD, v_BTKD, segment_ids(shape, seed) if shape.segments else None


def segment_ids(shape: AttentionShape, seed: int = 0) -> np.ndarray:
    """Draw [B, T] int32: a row's `segments` examples, numbered from 1, lie end to end; 0 fills what is left.

    The lengths are what uniformly drawn, different cuts of the row leave; the last part is the padding.
    """
    random = np.random.default_rng((seed, 1))
    rows = []
    for _ in range(shape.B):
        cuts = np.sort(random.choice(shape.T, shape.segments, replace=False)) + 1  # where each example ends
        segments_T = 1 + np.searchsorted(cuts, np.arange(shape.T), side='right')
        rows.append(np.where(segments_T > shape.segments, 0, segments_T))
    return np.stack(rows).astype(np.int32)


def decode_inputs(shape: DecodeShape, seed: int = 0):
    """Draw (q_BHD, k_BSKD, v_BSKD, lengths_B): normal numbers in `dtype`; an int8 cache is made from them.

    Positions at or past a sequence's length hold numbers too, which no kernel may use.
    """
    random = np.random.default_rng(seed)
    q_BHD = normal(random, (shape.B, shape.H, shape.D), shape.dtype)
    k_BSKD, v_BSKD = (normal(random, (shape.B, shape.S, shape.K, shape.D), shape.dtype) for _ in range(2))
    return q_BHD, k_BSKD, v_BSKD, lengths(shape, seed)


def lengths(shape: DecodeShape, seed: int = 0) -> np.ndarray:
    """Draw [B] int32: how many positions of each sequence are filled."""
    random = np.random.default_rng((seed, 2))
    if shape.lengths == 'full':
        lengths_B = np.full(shape.B, shape.S)
    elif shape.lengths == 'uniform':
        lengths_B = random.integers(64, shape.S, shape.B, endpoint=True)
    else:
        lengths_B = random.integers(1, shape.S, shape.B, endpoint=True)
        edges = np.array([0, 1, shape.S - 1, shape.S])[:shape.B]
        lengths_B[:len(edges)] = edges
    return lengths_B.astype(np.int32)


def page_table(shape: DecodeShape, seed: int = 0, spare: int = 1) -> np.ndarray:
    """Draw [B, S / page] int32: where page n of a sequence lies in a shuffled pool of B * S / page + `spare` pages."""
    if not shape.page:
        raise ValueError(f'{shape.page=}: this shape has contiguous slots; take one with pages')
    pages = shape.S // shape.page
    places = np.random.default_rng((seed, 3)).permutation(shape.B * pages + spare)[:shape.B * pages]
    return places.reshape(shape.B, pages).astype(np.int32)


def normal(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32).astype(jnp.dtype(dtype))


def attention_flops(shape: AttentionShape, backward: bool = False) -> float:
    """Count useful FLOPs: 2 D for each of q kᵀ and p v, for every (query, key) pair up to the diagonal (or every pair).

    Segments are not taken off.  The backward pass counts 2.5 times the forward: five products instead of two.
    """
    pairs = shape.T * (shape.T + 1) // 2 if shape.causal else shape.T ** 2
    return 4.0 * shape.B * shape.H * shape.D * pairs * (2.5 if backward else 1.0)


def attention_bytes(shape: AttentionShape, backward: bool = False) -> int:
    """Count the bytes of the least HBM traffic.

    Forward reads q, k, v and writes o; backward reads those and do and the rows' statistics (one float32), and writes
    dq, dk, dv.
    """
    item = jnp.dtype(shape.dtype).itemsize
    q, k = (shape.B * shape.T * heads * shape.D * item for heads in (shape.H, shape.K))
    return 4 * q + 4 * k + 4 * shape.B * shape.T * shape.H if backward else 2 * q + 2 * k


def decode_flops(shape: DecodeShape, seed: int = 0) -> float:
    return 4.0 * shape.H * shape.D * int(lengths(shape, seed).sum())


def decode_bytes(shape: DecodeShape, seed: int = 0) -> int:
    """Count the least bytes of HBM: q, o, filled keys and values once (int8: a float32 scale a head and position)."""
    positions = int(lengths(shape, seed).sum())
    row = shape.D * jnp.dtype(shape.cache_dtype).itemsize + (4 if shape.cache_dtype == 'int8' else 0)
    return 2 * positions * shape.K * row + 2 * shape.B * shape.H * shape.D * jnp.dtype(shape.dtype).itemsize
