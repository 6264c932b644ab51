"""Compute a few rows as if there were more of them, so that a row's numbers do not depend on how many there are.

XLA's CPU compiler sums (and takes exponentials of) 2 rows in another order than 8, because it vectorizes small loops
otherwise.  A server computes as many rows as it has sequences, and their answers must not show how many that was.
"""
import jax
import jax.numpy as jnp
from jax import lax

ENOUGH = 8  # rows from which on the compiler's loops are alike: tests/test_engine.py holds it


def as_many(function, *arrays: jax.Array):
    """Compute function(*arrays), arrays of the same first axis, which `function` keeps; at least ENOUGH rows at a time.
    """
    rows = arrays[0].shape[0]
    if rows >= ENOUGH:
        return function(*arrays)
    padded = [jnp.pad(x, ((0, ENOUGH - rows), *((0, 0),) * (x.ndim - 1))) for x in arrays]
    return jax.tree.map(lambda x: x[:rows], function(*lax.optimization_barrier(padded)))
