"""Count what a mesh asks of a host.  Before: one_mesh.py."""
import math

import jax
from jax.sharding import Mesh

from checkpoint import source
from model.config import LlamaConfig
from model.lora import Lora
from model.weights import WeightSpec
from training.state import trained_specs


def host_devices(mesh: Mesh) -> list[jax.Device]:
    """List the devices of the mesh that are attached to the host of its first."""
    return [device for device in mesh.devices.flat if device.process_index == mesh.devices.flat[0].process_index]


def host_needs(sizes: LlamaConfig, mesh: Mesh, lora: Lora | None = None) -> int:
    """Count the bytes that loading (checkpoint/source.py) or saving takes of a host at most, one process on each.

    Saving (checkpoint/native.py) holds the host's part of one array, all layers of it, and what is on its way to disk.
    With lora the base is loaded in its dtype, and the adapters are saved.
    """
    def part(spec: WeightSpec) -> int:  # no part is held twice
        pieces = min(len(host_devices(mesh)), math.prod(mesh.shape[axis] for axis in spec.axes))
        return spec.size // math.prod(mesh.shape[axis] for axis in spec.axes) * pieces

    loading = source.host_bytes(sizes, mesh, lora.base_dtype if lora else 'fp32')
    return max(loading, 2 * 4 * max(part(spec) for spec in jax.tree.leaves(trained_specs(sizes, lora))))
