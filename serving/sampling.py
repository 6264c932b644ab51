"""Choose the next token from the logits: bias, then greedy, or temperature, top-k, top-p, min-p, and one draw.

  z = (logits + bias) / temperature;   p = softmax(z), restricted to the top_k largest z, then to the smallest set of
  the likeliest tokens whose probabilities (among those k) sum to at least top_p, then to p >= min_p * max p.
  The token is argmax(z + g) over what is left, g = -log(-log(u)) drawn for each id of the vocabulary (Gumbel-max).

temperature 0 is argmax(logits + bias).  The order is the one EasyLM's server had through Flax's generation
(transformers 4.31: temperature, top-k, top-p); min-p is arXiv 2407.01082's.  A row's draw depends on its own seed and
position alone, because g belongs to (seed, position, id): neighbours, and what they ask for, change nothing.
Next: serving/programs.py, which calls this behind the network.
"""
import jax
import jax.numpy as jnp
from jax import lax

from model.partition import pytree

FEW = 128  # so many logits are sorted where every row's filters need no more
MIN_TEMPERATURE = 1e-8  # EasyLM's floor under the temperature: logits / 1e-8 is still finite in float32


@pytree
class Choice:
    """How each row's token is chosen, [R] each; `listed` ids have [R, A].

    seed, position: of the draw.  listed_RA: ids, -1 where there is none; bias_RA is added to their logits.
    only_R: nothing but these ids may come out.
    """

    temperature_R: jax.Array
    top_k_R: jax.Array
    top_p_R: jax.Array
    min_p_R: jax.Array
    seed_R: jax.Array
    position_R: jax.Array
    listed_RA: jax.Array
    bias_RA: jax.Array
    only_R: jax.Array


def row_keys(seed_R: jax.Array, position_R: jax.Array) -> jax.Array:
    """Make one random key a row: fold_in(key(seed), position)."""
    return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seed_R, position_R)


def biased(logits_RV: jax.Array, choice: Choice) -> jax.Array:
    """Add the biases; -inf for what is not listed, in rows that allow only that."""
    def apply():
        rows_R1 = jnp.arange(logits_RV.shape[0])[:, None]
        known_RA = choice.listed_RA >= 0
        ids_RA = jnp.where(known_RA, choice.listed_RA, logits_RV.shape[1])  # out of range: dropped
        listed_RV = jnp.zeros(logits_RV.shape, bool).at[rows_R1, ids_RA].set(True, mode='drop')
        z_RV = logits_RV.at[rows_R1, ids_RA].add(jnp.where(known_RA, choice.bias_RA, 0), mode='drop')
        return jnp.where(choice.only_R[:, None] & ~listed_RV, -jnp.inf, z_RV)

    return lax.cond((choice.listed_RA >= 0).any(), apply, lambda: logits_RV)


def restrict(z_RV: jax.Array, choice: Choice, sort: int) -> jax.Array:
    """Make -inf of the logits that top-k, top-p and min-p exclude.  sort: how many of the largest are looked at.

    Of equal logits at the edge of top-k the smaller id stays.  The likeliest token always stays.
    """
    V = z_RV.shape[1]
    largest_RC, ids_RC = lax.top_k(z_RV, sort)
    ranks_1C = jnp.arange(sort)[None]
    k_R1 = jnp.where(choice.top_k_R > 0, jnp.minimum(choice.top_k_R, V), V)[:, None]
    among_RC = jnp.where(ranks_1C < k_R1, largest_RC, -jnp.inf)
    p_RC = jax.nn.softmax(among_RC)
    before_RC = jnp.cumsum(p_RC, axis=-1) - p_RC
    kept_R1 = (((before_RC < choice.top_p_R[:, None]) | (choice.top_p_R[:, None] >= 1)) & (ranks_1C < k_R1)).sum(
        axis=-1, keepdims=True)
    last_R1 = jnp.maximum(kept_R1, 1) - 1
    edge_R1, edge_id_R1 = (jnp.take_along_axis(x, last_R1, axis=-1) for x in (largest_RC, ids_RC))
    inside_RV = (z_RV > edge_R1) | ((z_RV == edge_R1) & (jnp.arange(V)[None] <= edge_id_R1))
    filtered_R1 = (choice.top_k_R > 0)[:, None] | (choice.top_p_R < 1)[:, None]
    z_RV = jnp.where(inside_RV | ~filtered_R1, z_RV, -jnp.inf)
    floor_R1 = largest_RC[:, :1] + jnp.log(choice.min_p_R)[:, None]  # p / max p = exp(z - max z)
    return jnp.where(z_RV >= floor_R1, z_RV, -jnp.inf)


def choose(logits_RV: jax.Array, choice: Choice) -> jax.Array:
    """Choose every row's next token, int32 [R], from float32 logits.  Greedy takes the first of equal maxima."""
    z_RV = biased(logits_RV, choice)
    greedy_R = jnp.argmax(z_RV, axis=-1).astype(jnp.int32)
    V = z_RV.shape[1]

    def draw(sort: int):
        scaled_RV = z_RV / jnp.maximum(choice.temperature_R, MIN_TEMPERATURE)[:, None]
        scaled_RV = restrict(scaled_RV, choice, sort)
        keys_R = row_keys(choice.seed_R, choice.position_R)
        noise_RV = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys_R)
        drawn_R = jnp.argmax(scaled_RV + noise_RV, axis=-1).astype(jnp.int32)
        return jnp.where(choice.temperature_R > 0, drawn_R, greedy_R)

    # sorting a vocabulary costs more than the rest of a small model's step: only where a row needs it
    draws_R = choice.temperature_R > 0
    wide_R = draws_R & (choice.top_p_R < 1) & ((choice.top_k_R == 0) | (choice.top_k_R > FEW)) | draws_R & (
        choice.top_k_R > FEW)
    few = min(FEW, V)
    return lax.cond(draws_R.any(), lambda: lax.cond(wide_R.any(), lambda: draw(V), lambda: draw(few)),
                    lambda: greedy_R)
