"""Beam search: keep each prompt's E likeliest continuations and the best E that have ended.  Before: engine.py.

Each step scores the E * V ways to go on and looks at the best 2E (at most E of them end, so E can go on):

  score(y) = sum_t log p(y_t | y_<t)             of a continuation that goes on
  score(y) / (input_length + tokens before EOS)  of one that has ended: these are compared with each other

A prompt is done when E continuations have ended and the best running score, divided by input_length + tokens, is no
better than the worst of them.  The answer is the best ended one, or the best running one where none has ended.

This is the beam search EasyLM's server had from transformers 4.31 (Flax, length_penalty 1.0, early_stopping False),
whose lengths count the prompt padded to input_length.  There a prompt that was done went on, and could change, until
its whole batch was done; here it stays as it is.  Letters: E beams, C = 2E candidates, W tokens of the longest answer.
"""
import jax
import jax.numpy as jnp
from jax import lax

from model.partition import pytree

NEVER = -1e7  # added to the score of what must not be chosen; no sum of log-probabilities comes near it


@pytree
class Beams:
    """The search of B prompts after `step` tokens.  Both sets are in descending order of their scores.

    tokens_BEW int32 and scores_BE: the running continuations.  ended_BEW, ended_scores_BE (divided by the length),
    has_ended_BE: those that ended; places that none has taken yet are False.  open_B: the prompt is not done.
    """

    tokens_BEW: jax.Array
    scores_BE: jax.Array
    ended_BEW: jax.Array
    ended_scores_BE: jax.Array
    has_ended_BE: jax.Array
    open_B: jax.Array
    step: jax.Array


def start(open_B: jax.Array, num_beams: int, width: int, eos: int) -> Beams:
    """Begin with one running continuation, the empty one (the other E - 1 have score NEVER)."""
    B, E = open_B.shape[0], num_beams
    empty_BEW = jnp.full((B, E, width), eos, jnp.int32)
    scores_BE = jnp.broadcast_to(jnp.where(jnp.arange(E) == 0, 0.0, NEVER), (B, E))
    return Beams(empty_BEW, scores_BE, empty_BEW, jnp.full((B, E), NEVER), jnp.zeros((B, E), bool), open_B,
                 jnp.int32(0))


def advance(beams: Beams, log_probs_BEV: jax.Array, input_length: int, eos: int) -> tuple[Beams, jax.Array]:
    """Take one more token: (the search, parents_BE: which continuation each running one continues)."""
    B, E, V = log_probs_BEV.shape
    scores_BC, index_BC = lax.top_k((beams.scores_BE[..., None] + log_probs_BEV).reshape(B, E * V), 2 * E)
    parents_BC, token_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
    tokens_BCW = lax.dynamic_update_slice(_take(beams.tokens_BEW, parents_BC), token_BC[..., None], (0, 0, beams.step))
    ends_BC = token_BC == eos

    scores_BE, goes_on_BE = lax.top_k(scores_BC + jnp.where(ends_BC, NEVER, 0.0), E)

    ended_scores_BC = scores_BC / (input_length + beams.step) + jnp.where(ends_BC, 0.0, NEVER)
    both = lambda old, new: jnp.concatenate([old, new], axis=1)
    ended_scores_BE, best_BE = lax.top_k(both(beams.ended_scores_BE, ended_scores_BC), E)
    ended_BEW = _take(both(beams.ended_BEW, tokens_BCW), best_BE)
    has_ended_BE = _take(both(beams.has_ended_BE, ends_BC), best_BE)

    kept = lambda new, old: jnp.where(beams.open_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    ended_scores_BE = kept(ended_scores_BE, beams.ended_scores_BE)
    has_ended_BE = kept(has_ended_BE, beams.has_ended_BE)
    better_B = scores_BE[:, 0] / (input_length + beams.step + 1) > ended_scores_BE[:, -1]
    return Beams(_take(tokens_BCW, goes_on_BE), scores_BE, kept(ended_BEW, beams.ended_BEW), ended_scores_BE,
                 has_ended_BE, beams.open_B & (better_B | ~has_ended_BE.all(axis=1)),
                 beams.step + 1), _take(parents_BC, goes_on_BE)


def best(beams: Beams) -> jax.Array:
    """Choose tokens_BW of the answers; what follows EOS is EOS."""
    return jnp.where(beams.has_ended_BE.any(axis=1)[:, None], beams.ended_BEW[:, 0], beams.tokens_BEW[:, 0])


def _take(x: jax.Array, index_BC: jax.Array) -> jax.Array:
    """x[b, index_BC[b, c]] for every b and c."""
    return jax.vmap(lambda x, index: x[index])(x, index_BC)
