"""Find the integers that decide what a kernel does: the values of its scalar-prefetch operands.

Which blocks a kernel fetches can depend on tables that the program computes from its arguments before the kernel starts
(segment bounds, page tables, block masks).  To run a kernel's scalar program one needs their values.  Here the program
is traced, and whatever follows from concrete arguments and constants alone is evaluated; floats stay abstract.
"""
import contextlib

import jax
import numpy as np
from jax.extend.core import Literal

# equations whose jaxpr takes the equation's own inputs
SAME_ARGUMENTS = ('jit', 'pjit', 'closed_call', 'remat', 'checkpoint', 'custom_jvp_call', 'custom_vjp_call')


def scalar_tables(function, *arguments, over=None) -> list[tuple[str, list[np.ndarray | None]]]:
    """List (kernel's name, its scalar operands in order) for every Pallas call of `function(*arguments)`, in order.

    Arguments are jax.ShapeDtypeStruct, or concrete arrays whose values count.  An operand that depends on an abstract
    argument is None.  `over`: the mesh that the function is compiled for.
    """
    leaves, tree = jax.tree.flatten(arguments)
    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    with jax.set_mesh(over) if over is not None else contextlib.nullcontext():
        traced = jax.make_jaxpr(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))(*plain)
    known = [None if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x) for x in leaves]
    found = []
    evaluate(traced.jaxpr, traced.consts, known, found)
    return found


def evaluate(jaxpr, consts, arguments, found) -> list:
    """Evaluate a jaxpr's outputs, None where unknown; Pallas calls on the way are added to `found`."""
    values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values.get(atom)
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name, out = equation.primitive.name, [None] * len(equation.outvars)
        if name == 'pallas_call':
            count = equation.params['grid_mapping'].num_index_operands
            found.append((equation.params['name'] or '', [x if x is None else np.asarray(x) for x in inputs[:count]]))
        elif name in SAME_ARGUMENTS:
            inner = equation.params.get('jaxpr') or equation.params['call_jaxpr']
            out = evaluate(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', []), inputs, found)
        elif all(x is not None for x in inputs) and not equation.effects:
            result = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
            out = result if equation.primitive.multiple_results else [result]
        else:  # what is inside a loop or a shard_map sees other values on each turn or device
            for inner in inner_jaxprs(equation):
                evaluate(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', []),
                         [None] * len(getattr(inner, 'jaxpr', inner).invars), found)
        values |= dict(zip(equation.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def inner_jaxprs(equation) -> list:
    parameters = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns'))
    return [x for x in parameters if hasattr(x, 'eqns')]

