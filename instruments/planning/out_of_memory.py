"""Read from the runtime's errors how much memory a program needs and how much there is.  Next: one_mesh.py."""
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding


class Shortage(NamedTuple):
    """Hold bytes of a device."""

    needed: int
    available: int


UNITS = {'': 1, 'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
SIZE = r'\(?([\d.]+)([BKMGT]?)\)?'
SHORTAGES = (  # the compiler's words; those of older libtpu; the runtime's, of a single allocation
    rf'memory required for HLO temporaries {SIZE} exceeds available HBM {SIZE}',
    rf'Used {SIZE} of {SIZE} hbm',
    rf'Attempting to (?:allocate|reserve) {SIZE}.*?There are {SIZE} free',
)


def out_of_memory(error: Exception) -> Shortage | None:
    """Read from a RESOURCE_EXHAUSTED of HBM what was needed and what there was; None for any other error."""
    for pattern in SHORTAGES:
        if found := re.search(pattern, str(error), re.DOTALL):
            needed, available = (int(float(number) * UNITS[unit]) for number, unit in
                                 (found.groups()[:2], found.groups()[2:]))
            return Shortage(needed, available)
    return None


def usable_hbm(mesh: Mesh) -> int | None:
    """Ask libtpu how many bytes of a TPU a program may use, a described one too; None on other platforms.

    Asked by compiling what cannot fit (0.04 s), for a device of this host: the refusal names the figure.
    """
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    if device.platform != 'tpu':
        return None
    impossible = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(impossible).compile()
    except jax.errors.JaxRuntimeError as error:
        if shortage := out_of_memory(error):
            return shortage.available
        raise
    raise AssertionError(f'{device} takes 4 TiB')
