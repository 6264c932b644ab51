"""Arrays that are read slice by slice into the devices that hold them.  Users: source.py, native.py.

A process reads what its own devices hold and nothing else; no program runs over several processes.  A large weight of N
layers is a stack on every device, made there, into which one layer after the other is written by a program that is
donated the stack: the host never holds a large stack, nor a whole tensor where the devices hold slices of it.  A small
stack is put together on the host, which spares compiling.
"""
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STACK_BYTES = 1 << 26  # of a device's part of a stack: one with more is written on the device, layer by layer
SLICES = 4  # on the host at a time: one as stored, the same in our layout and dtype, the one before it, its staged copy

Bounds = tuple[tuple[int, int], ...]  # (start, stop) per dimension


def shard_indices(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> dict[Bounds, list]:
    """{bounds of a part: devices of this process that hold it}."""
    parts = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    return parts


def slice_bytes(target: jax.ShapeDtypeStruct, stacked: bool) -> int:
    """The most bytes that are read at a time: a device's part of an array, or of a large stack one layer of that."""
    part = math.prod(target.sharding.shard_shape(target.shape)) * target.dtype.itemsize
    return part // target.shape[0] if stacked and part > STACK_BYTES else part


def fill(target: jax.ShapeDtypeStruct, read: Callable[[Bounds], np.ndarray]) -> jax.Array:
    """An array of the target's shape, dtype and sharding from read(bounds of a part), each part read once."""
    shards = []
    for bounds, devices in shard_indices(target.shape, target.sharding).items():
        part = read(bounds).astype(target.dtype, copy=False)
        shards += [_owned(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


def fill_stack(target: jax.ShapeDtypeStruct, read: Callable[[int, Bounds], np.ndarray],
               by_layer: bool = False) -> jax.Array:
    """Fill a stack [N, ..] likewise, from read(layer, bounds of a part of that layer's tensor).

    by_layer: ask for all parts of a layer before the next one, also of a small stack.
    """
    if not by_layer and slice_bytes(target, stacked=True) == slice_bytes(target, stacked=False):
        return fill(target, lambda bounds: np.stack([read(layer, bounds[1:]).astype(target.dtype, copy=False)
                                                     for layer in range(*bounds[0])]))
    layers, *shape = target.sharding.shard_shape(target.shape)
    assert layers == target.shape[0], f'{target.sharding} splits the layers'
    parts = {bounds[1:]: devices for bounds, devices in shard_indices(target.shape, target.sharding).items()}
    devices = [device for held in parts.values() for device in held]
    end_to_end, write = _writer(tuple(devices))
    stack = jnp.zeros((len(devices) * layers, *shape), target.dtype, device=end_to_end)
    for layer in range(layers):
        slices = []
        for bounds, held in parts.items():
            part = read(layer, bounds).astype(target.dtype, copy=False)
            jax.block_until_ready(slices or stack)  # whatever was read before this has left the host
            slices += [jax.device_put(part, device) for device in held]
        stack = write(stack, jax.make_array_from_single_device_arrays(
            (len(devices) * shape[0], *shape[1:]), end_to_end, slices), layer)
    shards = [shard.data for shard in stack.block_until_ready().addressable_shards]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


@functools.lru_cache
def _writer(devices: tuple):
    """(sharding of arrays that lay the devices' own end to end, write(stacks, slices, layer) -> stacks).

    Compiled once per shape and set of devices; the stacks are donated, so that a device holds its stack once.
    """
    mesh, split = Mesh(np.array(devices), ('device',)), PartitionSpec('device')

    def write(stack, part, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0)

    mapped = jax.shard_map(write, mesh=mesh, in_specs=(split, split, PartitionSpec()), out_specs=split)
    return NamedSharding(mesh, split), jax.jit(mapped, donate_argnums=0)


def _owned(part: np.ndarray, device) -> jax.Array:
    """`part` on a device, complete, in memory of JAX's own, so that it may be donated.

    On a CPU, device_put uses a 64-byte aligned numpy buffer in place, for several devices at once and (jax 0.10) even
    with may_alias=False; a second device_put copies.
    """
    array = jax.device_put(part, device)
    if device.platform == 'cpu':
        array = jax.device_put(array, device, may_alias=False)
    return array.block_until_ready()
