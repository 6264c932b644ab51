"""Attention by its definition, in plain einsum and softmax, float32: what every kernel must equal.

    o = softmax(scale * q kᵀ  where visible, else -inf) v

A query sees a key when the key's position is not after its own and both belong to the same segment; segment 0 is
padding.
"""
import jax
import jax.numpy as jnp


def attention(q_BTHD, k_BSKD, v_BSKD, *, scale: float, query_positions_BT, key_positions_BS, query_segments_BT,
              key_segments_BS) -> jax.Array:
    """Returns o_BTHD in q's dtype; scores, softmax and sums are float32.

    Query head h reads key/value head h // G, G = H / K.  Rows with no visible key (padding) give zeros.
    Positions and segments are int32.  Cost: the [B,H,T,S] scores are written to memory.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKGD = q_BTHD.astype(jnp.float32).reshape(B, T, K, H // K, D)
    s_BKGTS = scale * jnp.einsum('BTKGD,BSKD->BKGTS', q_BTKGD, k_BSKD.astype(jnp.float32))
    visible_BTS = ((key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]) &
                   (key_segments_BS[:, None, :] == query_segments_BT[:, :, None]) & (key_segments_BS[:, None, :] != 0))
    visible_BKGTS = visible_BTS[:, None, None]
    s_BKGTS = jnp.where(visible_BKGTS, s_BKGTS, -1e30)  # finite: a row of -inf would make softmax NaN
    p_BKGTS = jnp.where(visible_BKGTS, jax.nn.softmax(s_BKGTS, axis=-1), 0.0)
    o_BTKGD = jnp.einsum('BKGTS,BSKD->BTKGD', p_BKGTS, v_BSKD.astype(jnp.float32))
    return o_BTKGD.reshape(B, T, H, D).astype(q_BTHD.dtype)
