"""Choose the attention that runs: by name, never by fallback.

  reference   kernels/reference.py: the definition, in einsum and softmax; writes all scores to memory
  pallas      kernels/flash_attention.py for many tokens, kernels/decode_attention.py for one: TPU kernels.  On any
              other platform they run in Pallas's TPU interpreter, which is for tests: right, and very slow

A cache that is continued by several tokens is kernels/blockwise.py's, and with `reference` also by one.
"""
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from kernels import reference
from kernels.blockwise import cached_attention
from kernels.decode_attention import decode_attention
from kernels.flash_attention import flash_attention
from kernels.tiles import device_kind
from mistake import Mistake
from model import cache as kv_cache

IMPLEMENTATIONS = ('reference', 'pallas')


def resolve(name: str) -> str:
    """Resolve the name that --attention gives; empty means pallas on a TPU and reference elsewhere."""
    if name and name not in IMPLEMENTATIONS:
        raise Mistake(f'attention={name!r} is not implemented: use one of {" ".join(IMPLEMENTATIONS)}')
    return name or ('pallas' if on_tpu() else 'reference')


def on_tpu() -> bool:
    """Tell whether the program is compiled for a TPU."""
    return device_kind().startswith('TPU')


def interpreted(name: str) -> bool:
    """Tell whether that implementation is a TPU kernel that has no TPU to run on."""
    return name == 'pallas' and not on_tpu()


def _interpret():
    return pltpu.InterpretParams() if interpreted('pallas') else False


def attend(name: str, q_BTHD, k_BTKD, v_BTKD, segments_BT) -> jax.Array:
    """Compute o_BTHD of causal attention within segments (0: padding; None: one segment a row), scale 1/sqrt(D)."""
    B, T, _, D = q_BTHD.shape
    if name == 'pallas':
        return flash_attention(q_BTHD, k_BTKD, v_BTKD, segments_BT, scale=D ** -0.5, interpret=_interpret())
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    segments_BT = jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
    o_BTHD = reference.attention(q_BTHD, k_BTKD, v_BTKD, scale=D ** -0.5, query_positions_BT=positions_BT,
                                 key_positions_BS=positions_BT, query_segments_BT=segments_BT,
                                 key_segments_BS=segments_BT)
    return checkpoint_name(o_BTHD, 'o')


def attend_cached(name: str, q_BTHD, k_BTKD, v_BTKD, cache: kv_cache.Cache, layer, rows_B, positions_BT,
                  from_start: bool) -> jax.Array:
    """Compute o_BTHD of queries at `positions_BT` over the places up to their own; k and v are in the cache already.

    rows_B: which row of the cache each row of the batch reads; None: its own number.  from_start: the T tokens are the
    first of their rows, so that their own k and v are all there is to see.  With pallas, whole new rows are the flash
    kernel's and one token of every row the decode kernel's; what stands between them is computed in plain JAX.
    """
    _, T, _, D = q_BTHD.shape
    K = k_BTKD.shape[2]
    if from_start:
        return attend(name, q_BTHD, k_BTKD, v_BTKD, None)
    if name == 'pallas' and T == 1 and rows_B is None:
        return decode_attention(q_BTHD[:, 0], cache.k_NBSW, cache.v_NBSW, positions_BT[:, 0] + 1, kv_heads=K,
                                scale=D ** -0.5, layer=layer, factors_NBCKS=cache.factors_NBCKS,
                                interpret=_interpret())[:, None]
    return cached_attention(q_BTHD, lambda start, count: kv_cache.read(cache, layer, rows_B, start, count, K, D),
                            positions_BT, scale=D ** -0.5, kv_heads=K)
