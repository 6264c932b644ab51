"""List the slices of each TPU chip that are sold."""
from kernels.chips import Chip

PLANES = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x4', '8x8x8', '8x8x12', '8x8x16', '8x16x16',
         '12x12x12', '16x16x16')


def topologies(chip: Chip) -> list[str]:
    """List the slices of a chip that are sold, smallest first, by the names that libtpu gives them.

    libtpu knows others too: any with sides that the 2x2 chips of a host divide.  '1x1' and '1x1x1' are a single chip.
    """
    platform, sides = chip.topology.split(':')
    if sides.count('x') == 1:
        return [f'{platform}:{slice_}' for slice_ in ('1x1', *PLANES)]
    return [f'{platform}:{slice_}' for slice_ in ('1x1x1', *CUBES)]
