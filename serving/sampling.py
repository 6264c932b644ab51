"""Choose the next token from the logits: greedy, or temperature, then top-k, then top-p, then one draw.

  p = softmax(logits / temperature), restricted to the top_k largest logits, then to the smallest set of the likeliest
  tokens whose probabilities (among those k) sum to at least top_p, then renormalised.  temperature = 0 is argmax.

The order is the one EasyLM's server had through Flax's generation (transformers 4.31: temperature, top-k, top-p).  The
draw of a row depends on its own key alone, and its key on (seed, request, position) alone: neighbours change nothing.
Next: serving/engine.py, which calls this inside its decoding loop.
"""
import jax
import jax.numpy as jnp

# EasyLM's floor under the temperature: logits / 1e-8 is still finite in float32
MIN_TEMPERATURE = 1e-8


def row_keys(seed, requests_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Make one random key per row: fold_in(fold_in(key(seed), request), position)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda request, position: jax.random.fold_in(jax.random.fold_in(key, request), position))(
        requests_B, positions_B)


def restrict(logits_BV: jax.Array, top_k: int, top_p: float) -> tuple[jax.Array, jax.Array]:
    """Keep the logits that top-k and top-p leave, in descending order: (logits_BC float32, tokens_BC int32).

    C = top_k (V where top_k is 0, which switches it off).  Logits outside the top-p set are -inf; the likeliest token
    always stays.
    """
    vocab_size = logits_BV.shape[-1]
    logits_BC, tokens_BC = jax.lax.top_k(logits_BV.astype(jnp.float32), min(top_k, vocab_size) if top_k else vocab_size)
    if top_p < 1.0:
        probabilities_BC = jax.nn.softmax(logits_BC)
        before_BC = jnp.cumsum(probabilities_BC, axis=-1) - probabilities_BC
        logits_BC = jnp.where((before_BC < top_p).at[:, 0].set(True), logits_BC, -jnp.inf)
    return logits_BC, tokens_BC


def choose(logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Choose every row's next token, int32 [B].  Rows with temperature 0 are greedy (the first of equal maxima)."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw():
        scaled_BV = logits_BV.astype(jnp.float32) / jnp.maximum(temperature_B, MIN_TEMPERATURE)[:, None]
        logits_BC, tokens_BC = restrict(scaled_BV, top_k, top_p)
        column_B = jax.vmap(jax.random.categorical)(keys_B, logits_BC)
        drawn_B = jnp.take_along_axis(tokens_BC, column_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where(temperature_B > 0, drawn_B, greedy_B)

    # sorting a vocabulary costs more than the rest of a small model's step: skipped when every row is greedy
    return jax.lax.cond(jnp.any(temperature_B > 0), draw, lambda: greedy_B)
