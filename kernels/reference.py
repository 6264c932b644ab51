"""Attention by its definition, in plain einsum and softmax, float32: what every kernel must equal.

    o = softmax(scale * q kᵀ  where visible, else -inf) v

A query sees a key when the key's position is not after its own and both belong to the same segment; segment 0 is
padding.
"""
import jax
import jax.numpy as jnp


def attention(q_BTHD, k_BSKD, v_BSKD, *, scale: float, query_positions_BT, key_positions_BS, query_segments_BT,
              key_segments_BS, dtype=jnp.float32) -> jax.Array:
    """Compute o_BTHD in q's dtype; scores, softmax and sums are float32 (in another `dtype`: to see what that loses).

    Query head h reads key/value head h // G, G = H / K.  Rows with no visible key (padding) give zeros.
    Positions and segments are int32.  Cost: the [B,H,T,S] scores are written to memory.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKGD = q_BTHD.astype(dtype).reshape(B, T, K, H // K, D)
    s_BKGTS = scale * jnp.einsum('BTKGD,BSKD->BKGTS', q_BTKGD, k_BSKD.astype(dtype))
    visible_BTS = ((key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]) &
                   (key_segments_BS[:, None, :] == query_segments_BT[:, :, None]) & (key_segments_BS[:, None, :] != 0))
    visible_BKGTS = visible_BTS[:, None, None]
    s_BKGTS = jnp.where(visible_BKGTS, s_BKGTS, -1e30)  # finite: a row of -inf would make softmax NaN
    p_BKGTS = jnp.where(visible_BKGTS, jax.nn.softmax(s_BKGTS, axis=-1), 0.0)
    o_BTKGD = jnp.einsum('BKGTS,BSKD->BTKGD', p_BKGTS, v_BSKD.astype(dtype))
    return o_BTKGD.reshape(B, T, H, D).astype(q_BTHD.dtype)


def decode_attention(q_BHD, k_BSKD, v_BSKD, lengths_B, *, scale: float) -> jax.Array:
    """Compute o_BHD of one query a sequence, which sees the first lengths_B keys of its row; zeros without any."""
    (B, H, D), (_, S, K, _) = q_BHD.shape, k_BSKD.shape
    seen_B11S = (jnp.arange(S)[None] < jnp.reshape(lengths_B, (B, 1)))[:, None, None]
    v_BSKD = jnp.where(seen_B11S[:, 0, 0, :, None, None], v_BSKD, 0).astype(jnp.float32)  # there may be NaN after them
    q_BKGD = q_BHD.astype(jnp.float32).reshape(B, K, H // K, D)
    s_BKGS = jnp.where(seen_B11S, scale * jnp.einsum('BKGD,BSKD->BKGS', q_BKGD, k_BSKD.astype(jnp.float32)), -1e30)
    p_BKGS = jnp.where(seen_B11S, jax.nn.softmax(s_BKGS, axis=-1), 0.0)
    return jnp.einsum('BKGS,BSKD->BKGD', p_BKGS, v_BSKD).reshape(B, H, D).astype(q_BHD.dtype)
