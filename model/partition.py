"""The mesh, and every collective of the network as a before -> after string.  Before: model/weights.py.

Mesh axes: dp splits the batch; fsdp splits the batch and the storage of weights; mp splits heads, ffn columns, the
vocabulary, and the sequence between blocks.  A collective names its axis in the notation of the weights' lines:
`all_gather(w, 'M/fsdp HD/mp -> M HD/mp')`.  Idea: MatX's seqax.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from mistake import Mistake
from model.config import Compute

AXES = ('dp', 'fsdp', 'mp')
BATCH = PartitionSpec(('dp', 'fsdp'))  # of every array whose first dimension is the batch
DTYPES = {'fp32': jnp.float32, 'float32': jnp.float32, 'bf16': jnp.bfloat16, 'bfloat16': jnp.bfloat16,
          'fp16': jnp.float16, 'float16': jnp.float16}


def pytree(cls):
    """Make `cls` a frozen dataclass and a JAX tree of its fields (of those that are not `static`)."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static():
    """Mark a field of a pytree as part of its structure: hashable, no array."""
    return dataclasses.field(metadata=dict(static=True))


# ---------------------------------------------------------------- collectives, inside shard_map


def _changed_dimension(before: str, after: str) -> tuple[int, str]:
    """('B T/mp M', 'B T M') -> (1, 'mp'): the one dimension that loses its axis, and the axis."""
    changed = [(i, b) for i, (b, a) in enumerate(zip(before.split(), after.split(), strict=True)) if b != a]
    (dimension, sharded), = changed
    return dimension, sharded.split('/')[1]


def all_gather(x: jax.Array, rewrite: str) -> jax.Array:
    """Gather 'B T/mp M -> B T M': every device receives the whole T.  Its transpose is the reduce-scatter below."""
    dimension, axis = _changed_dimension(*rewrite.split(' -> '))
    if lax.axis_size(axis) == 1:  # XLA's CPU would copy it, in another layout
        return x
    return lax.all_gather(x, axis, axis=dimension, tiled=True)


def reduce_scatter(x: jax.Array, rewrite: str) -> jax.Array:
    """Reduce 'B T M -> B T/mp M': sum over the axis, each device keeping its part of T.  Transpose of all_gather."""
    before, after = rewrite.split(' -> ')
    dimension, axis = _changed_dimension(after, before)
    if lax.axis_size(axis) == 1:
        return x
    return lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)


def varies(x: jax.Array) -> tuple[str, ...]:
    """List the mesh axes along which `x` differs from device to device, as shard_map tracks them."""
    return tuple(axis for axis in AXES if axis in jax.typeof(x).manual_axis_type.varying)


def varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Cast `x` to differ along `axes` (lax.pcast for those along which it does not yet): its transpose is a psum."""
    missing = tuple(axis for axis in axes if axis not in varies(x))
    return lax.pcast(x, missing, to='varying') if missing else x


def gather_weight(w: jax.Array, rewrite: str, x: jax.Array, compute: Compute) -> jax.Array:
    """Cast `w` to the compute dtype and all-gather it as `rewrite` says ('M -> M': not at all), to multiply with `x`.

    It is cast first, so that few bytes travel.  The gradient comes back in w's dtype and sharding: it is cast to
    compute.reduce_gradients, reduce-scattered over the gathered axis, and then (the part that is left, not the gathered
    whole) summed over the axes along which x differs and the weight does not: dp; for a norm fsdp and mp too.
    """
    dtype, reduce_dtype = DTYPES[compute.dtype], DTYPES[compute.reduce_gradients or compute.dtype]
    before, after = rewrite.split(' -> ')
    dimension, axis = _changed_dimension(before, after) if before != after else (None, None)
    over = tuple(axis for axis in varies(x) if axis not in varies(w))

    @jax.custom_vjp
    def gather(w):
        if w.dtype != dtype:
            # XLA:TPU (bfloat16-propagation) would otherwise round all layers before the loop over them, and hold that
            # copy of the model through the step.  It cannot round bits behind a barrier.
            bits = lax.bitcast_convert_type(w, jnp.uint32 if w.dtype.itemsize == 4 else jnp.uint16)
            bits = lax.optimization_barrier(bits)
            w = lax.bitcast_convert_type(bits, w.dtype).astype(dtype)
        w = varying(w, over)
        if axis is None or lax.axis_size(axis) == 1:
            return w
        whole = lax.all_gather(w, axis, axis=dimension)
        return whole.reshape(*w.shape[:dimension], -1, *w.shape[dimension + 1:])

    def transpose(_, gradient):
        gradient = gradient.astype(reduce_dtype)
        if axis is not None and lax.axis_size(axis) > 1:
            parts = gradient.reshape(*w.shape[:dimension], lax.axis_size(axis), *w.shape[dimension:])
            gradient = lax.psum_scatter(parts, axis, scatter_dimension=dimension)
        return ((lax.psum(gradient, over) if over else gradient).astype(w.dtype),)

    gather.defvjp(lambda w: (gather(w), None), transpose)
    return gather(w)


# ---------------------------------------------------------------- the mesh


def make_mesh(mesh_dim: str, devices: list | None = None) -> Mesh:
    """Make a mesh over ('dp', 'fsdp', 'mp') from EasyLM's grammar.

    '1,4,2' positional; 'dp:1,mp:2,fsdp:4' named, all three in any order, the order being the mesh's own; one -1 takes
    what is left; a leading '!' keeps the devices in plain order instead of the order that suits the chip's links.
    Raises Mistake that names the device count and the factorizations that fit.
    """
    devices = jax.devices() if devices is None else devices
    text = mesh_dim.removeprefix('!')
    names, sizes = _read_mesh_dim(mesh_dim, text)
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and known and len(devices) % known == 0:
        sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise Mistake(f'{mesh_dim=} does not multiply to the {len(devices)} devices of this run; '
                         f'valid for dp,fsdp,mp: {" ".join(factorizations(len(devices)))}')
    if mesh_dim.startswith('!'):
        grid = np.array(devices).reshape(sizes)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, names)


def _read_mesh_dim(mesh_dim: str, text: str) -> tuple[tuple[str, ...], list[int]]:
    remedy = "write three sizes 'dp,fsdp,mp' such as '1,4,2', or 'dp:1,fsdp:4,mp:2'; one of them may be -1"
    parts = text.split(',')
    names = [part.partition(':')[0].strip() for part in parts] if ':' in text else list(AXES)
    if sorted(names) != sorted(AXES) or len(parts) != 3:
        raise Mistake(f'{mesh_dim=} does not name the three mesh axes once each: {remedy}')
    try:
        sizes = [int(part.rpartition(':')[2]) for part in parts]
    except ValueError:
        raise Mistake(f'{mesh_dim=} holds something that is no whole number: {remedy}') from None
    if sizes.count(-1) > 1:
        raise Mistake(f'{mesh_dim=} holds more than one -1: {remedy}')
    return tuple(names), sizes


def factorizations(devices: int) -> list[str]:
    """List every --mesh_dim of so many devices, as 'dp,fsdp,mp'."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    splits = [(dp, fsdp) for dp in divisors for fsdp in divisors if devices % (dp * fsdp) == 0]
    return [f'{dp},{fsdp},{devices // dp // fsdp}' for dp, fsdp in splits]


# ---------------------------------------------------------------- the batch's rows


def rows_unit(mesh: Mesh | AbstractMesh) -> int:
    """Return dp * fsdp: a batch has a multiple of so many rows."""
    return mesh.shape['dp'] * mesh.shape['fsdp']


def check_rows(rows: int, mesh: Mesh | AbstractMesh, flag: str) -> None:
    """Raise Mistake, naming the flag that says `rows`, unless every device gets as many of them, at least one."""
    if rows < 1 or rows % rows_unit(mesh):
        raise Mistake(f'{flag}={rows} must be divisible by dp*fsdp={rows_unit(mesh)} of the mesh '
                      f'{dict(mesh.shape)}: change it or --mesh_dim')
