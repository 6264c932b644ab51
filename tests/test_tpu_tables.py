"""The integers that decide what a kernel does are found by tracing the program."""
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from instruments.kernel_time import static_cost
from instruments.kernel_time.tables import scalar_tables

X = jax.ShapeDtypeStruct((32, 128), jnp.float32)


def gather(order, x, name='gather'):
    """Block i of the result is block order[i] of x."""
    def kernel(order_ref, x_ref, o_ref):
        o_ref[...] = x_ref[...]

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(4,), in_specs=[pl.BlockSpec((8, 128), lambda i, order_ref: (order_ref[i], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, order_ref: (i, 0)))
    return pl.pallas_call(kernel, grid_spec=spec, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name=name)(order, x)


def test_what_follows_from_arrays_and_constants_is_known():
    """2 * order + (1, 2, 3, 4), through jit and a gradient rule; what follows from a shape is not."""
    order = np.array([0, 5, 1, 2], np.int32)
    program = jax.jit(lambda order, x: gather(2 * order + jnp.arange(1, 5, dtype=jnp.int32), x))
    (name, (table,)), = scalar_tables(program, order, X)
    assert name == 'gather' and list(table) == [1, 12, 5, 8]
    assert scalar_tables(program, jax.ShapeDtypeStruct((4,), jnp.int32), X) == [('gather', [None])]


def test_every_kernel_has_its_own_tables():
    """Two kernels of one program, one inside a custom_vjp's forward, one in its backward pass."""
    @jax.custom_vjp
    def call(order, x):
        return gather(order, x, 'forward')

    call.defvjp(lambda order, x: (call(order, x), order), lambda order, dy: (None, gather(3 - order, dy, 'backward')))
    order = np.array([0, 0, 1, 2], np.int32)
    found = scalar_tables(lambda order, x: jax.grad(lambda x: call(order, x).sum())(x), order, X)
    assert [(name, list(table)) for name, (table,) in found] == [('forward', [0, 0, 1, 2]), ('backward', [3, 3, 2, 1])]
    assert list(static_cost.tables_of('backward.3', found)[0]) == [3, 3, 2, 1]


def test_kernels_of_one_name_take_their_tables_in_order():
    calls = [('gather', ['first']), ('gather_all', ['other']), ('gather', ['second'])]
    assert [static_cost.tables_of(name, calls) for name in ('gather.1', 'gather_all.4', 'gather.2')] == [
        ['first'], ['other'], ['second']]
