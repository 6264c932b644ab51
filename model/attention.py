"""Which attention runs: chosen by name, never by fallback.  The definition is kernels/reference.py."""
import jax
import jax.numpy as jnp

from kernels import reference

IMPLEMENTATIONS = {'reference': reference.attention}


def check(name: str) -> None:
    """Raises ValueError that lists the implementations when `name` is none of them."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'attention={name!r} is not implemented: use one of {" ".join(IMPLEMENTATIONS)}')


def attend(name: str, q_BTHD, k_BSKD, v_BSKD, *, positions_BT, segments_BT, cached: bool) -> jax.Array:
    """o_BTHD of causal attention within segments, scale 1/sqrt(D), by the implementation `name`.

    Without a cache the keys are the queries' own (S = T).  With one (`cached`), key s is at position s and belongs to
    the row's one sequence: causality alone hides the slots that are not yet written.
    """
    if cached:
        key_positions_BS = jnp.broadcast_to(jnp.arange(k_BSKD.shape[1], dtype=jnp.int32), k_BSKD.shape[:2])
        query_segments_BT, key_segments_BS = jnp.ones_like(positions_BT), jnp.ones_like(key_positions_BS)
    else:
        key_positions_BS, query_segments_BT, key_segments_BS = positions_BT, segments_BT, segments_BT
    return IMPLEMENTATIONS[name](
        q_BTHD, k_BSKD, v_BSKD, scale=q_BTHD.shape[-1] ** -0.5, query_positions_BT=positions_BT,
        key_positions_BS=key_positions_BS, query_segments_BT=query_segments_BT, key_segments_BS=key_segments_BS)
