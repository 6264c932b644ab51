"""Attention over a cache block after block, in plain JAX: any number of queries a row, on any platform.

    s = scale q Kᵀ where visible,    m' = max(m, max s),    p = 2^(s - m')           for 128 places at a time
    l' = 2^(m - m') l + Σ p,         o' = 2^(m - m') o + p V                         o / l in the end

(online softmax: arXiv 1805.02867.)  The loop ends behind the furthest query, so no length of the cache is compiled in,
and a block that a query does not see leaves its m, l and o as they are, to the bit: a row's result does not depend on
how far its neighbours are.  Definition: reference.py.  On a TPU one query a row is decode_attention.py's.
"""
import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128
HIDDEN = -1e30  # finite: -inf - -inf is NaN


def cached_attention(q_BTHD, read, positions_BT, *, scale: float, kv_heads: int) -> jax.Array:
    """Compute o_BTHD in q's dtype, float32 inside, of queries that see the places up to their own position.

    read(start, count) -> k_BSKD, v_BSKD of `count` places from `start` on; it must reach a multiple of BLOCK past the
    last position.  What stands in places that a row does not see is never used, be it NaN.
    """
    (B, T, H, D), K = q_BTHD.shape, kv_heads
    scores, weighted = (few_scores, few_weighted) if T == 1 else (many_scores, many_weighted)
    q_BKQD = (q_BTHD.astype(jnp.float32) * scale).reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4).reshape(
        B, K, H // K * T, D)
    positions_BQ = jnp.tile(positions_BT, (1, H // K))

    def block(j, carry):
        m_BKQ, l_BKQ, o_BKQD = carry
        places_S = j * BLOCK + jnp.arange(BLOCK)
        k_BSKD, v_BSKD = read(j * BLOCK, BLOCK)
        seen_BS = places_S <= positions_BT[:, -1:]
        v_BSKD = jnp.where(seen_BS[..., None, None], v_BSKD, 0).astype(jnp.float32)  # 0 * NaN is NaN
        visible_B1QS = (places_S <= positions_BQ[..., None])[:, None]
        s_BKQS = scores(q_BKQD, k_BSKD.astype(jnp.float32))
        s_BKQS = jnp.where(visible_B1QS, s_BKQS, HIDDEN)
        new_BKQ = jnp.maximum(m_BKQ, s_BKQS.max(axis=-1))
        p_BKQS = jnp.where(visible_B1QS, jnp.exp(s_BKQS - new_BKQ[..., None]), 0)
        decay_BKQ = jnp.exp(m_BKQ - new_BKQ)
        return (new_BKQ, l_BKQ * decay_BKQ + p_BKQS.sum(axis=-1),
                o_BKQD * decay_BKQ[..., None] + weighted(p_BKQS, v_BSKD))

    # built from q, so that shard_map knows them as different on each device, as the loop leaves them
    o_BKQD = jnp.zeros_like(q_BKQD) + 0 * q_BKQD
    l_BKQ = o_BKQD[..., 0]
    _, l_BKQ, o_BKQD = lax.fori_loop(0, positions_BT.max() // BLOCK + 1, block, (l_BKQ + HIDDEN, l_BKQ, o_BKQD))
    o_BKGTD = (o_BKQD / l_BKQ[..., None]).reshape(B, K, H // K, T, D)
    return o_BKGTD.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D).astype(q_BTHD.dtype)


def many_scores(q_BKQD, k_BSKD):
    """Multiply matrices: for the queries of many tokens."""
    return jnp.einsum('BKQD,BSKD->BKQS', q_BKQD, k_BSKD)


def many_weighted(p_BKQS, v_BSKD):
    """Multiply matrices: for the queries of many tokens."""
    return jnp.einsum('BKQS,BSKD->BKQD', p_BKQS, v_BSKD)


def few_scores(q_BKQD, k_BSKD):
    """Multiply and sum: for one token's queries a matrix product would first copy the keys into another order, which on
    a CPU takes three times as long."""
    return (q_BKQD.swapaxes(1, 2)[:, None] * k_BSKD[:, :, None]).sum(axis=-1).transpose(0, 3, 2, 1)


def few_weighted(p_BKQS, v_BSKD):
    """Multiply and sum, as `few_scores`."""
    return (p_BKQS.transpose(0, 3, 2, 1)[..., None] * v_BSKD[:, :, None]).sum(axis=1).swapaxes(1, 2)
