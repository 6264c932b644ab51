"""The TPU chips that programs are compiled for: what each can do, and the names of its slices.

Figures are of one JAX device.  That is a chip (v4 and v5p run their two TensorCores as one device, "megacore"), but on
v7x it is one of the chip's two TensorCores, with half its bandwidth.

Sources.  Peak and HBM bandwidth: Google's system architecture pages of each generation
(cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x).  Number and size of the matrix units (MXU) and VMEM: those pages
and jax._src.pallas.mosaic.tpu_info of jax 0.10.2.  Branch delay slots and the DMA granule: read off the schedules that
libtpu 0.0.42.1 prints.  The clock is not published for all: it follows from peak = cores * mxus * operations * clock.

Interconnect (ICI): bytes/s of one link in one direction, as 'How To Scale Your Model' uses them in its examples (jax-ml
scaling-book, Sharding): 4.5e10 on v5e, a tenth below Google's nominal figures per chip and both directions (v5e 400,
v6e 800, v5p 1200 GB/s over 4, 4 and 6 links); the others get the same tenth off.  v7x has v5p's 1200 GB/s for its two
devices; each is given half.  v5e and v6e form a plane whose sides have wrap-around links where they are 16 long;
the others a torus with wrap-around links from a cube of 4x4x4 on (the same chapter; Google's page of v5p).
"""
import dataclasses

from mistake import Mistake


@dataclasses.dataclass(frozen=True)
class Chip:
    """Holds the figures of one kind of chip."""
    name: str
    topology: str  # a small slice, by the name that libtpu gives it
    kinds: tuple[str, ...]  # what JAX calls the device
    peak_flops: float  # bfloat16 FLOP/s
    hbm_bandwidth: float  # bytes/s
    cores: int  # TensorCores of a device
    mxus: int  # matrix units of a TensorCore
    mxu_flops: int  # bfloat16 FLOPs of one in a cycle: 128 x 128 cells; from v6e 256 x 256 of two multiply-adds
    vmem_bytes: int  # of a TensorCore
    link_bandwidth: float  # bytes/s of one interconnect link in one direction
    wrap: int  # a slice with sides of multiples of this has wrap-around links along them
    branch_delay: int = 4  # bundles after a branch that are still executed
    dma_granule: int = 32  # bytes; a DMA's size is counted in these

    @property
    def clock(self) -> float:
        """TensorCore cycles per second."""
        return self.peak_flops / (self.cores * self.mxus * self.mxu_flops)


MIB = 2**20
CHIPS = {chip.name: chip for chip in (
    Chip('v4', 'v4:2x2x1', ('TPU v4',), peak_flops=275e12, hbm_bandwidth=1228e9, cores=2, mxus=4,
         mxu_flops=2 * 128 * 128, vmem_bytes=16 * MIB, link_bandwidth=45e9, wrap=4, branch_delay=1, dma_granule=512),
    Chip('v5e', 'v5e:2x4', ('TPU v5 lite', 'TPU v5e'), peak_flops=197e12, hbm_bandwidth=819e9, cores=1, mxus=4,
         mxu_flops=2 * 128 * 128, vmem_bytes=128 * MIB, link_bandwidth=45e9, wrap=16),
    Chip('v5p', 'v5p:2x2x1', ('TPU v5', 'TPU v5p'), peak_flops=459e12, hbm_bandwidth=2765e9, cores=2, mxus=4,
         mxu_flops=2 * 128 * 128, vmem_bytes=64 * MIB, link_bandwidth=90e9, wrap=4),
    Chip('v6e', 'v6e:2x4', ('TPU v6 lite', 'TPU v6e'), peak_flops=918e12, hbm_bandwidth=1640e9, cores=1, mxus=2,
         mxu_flops=4 * 256 * 256, vmem_bytes=128 * MIB, link_bandwidth=90e9, wrap=16),
    Chip('v7x', 'tpu7x:2x2x1', ('TPU7x',), peak_flops=1153.5e12, hbm_bandwidth=3690e9, cores=1, mxus=2,
         mxu_flops=4 * 256 * 256, vmem_bytes=64 * MIB, link_bandwidth=45e9, wrap=4),
)}

PLANES = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x4', '8x8x8', '8x8x12', '8x8x16', '8x16x16',
         '12x12x12', '16x16x16')


def find(name: str) -> Chip:
    """Find a chip by its name ('v5e'), that of a slice ('v5e:4x8', 'tpu7x:2x2x1') or of a device ('TPU v5 lite').

    Raises:
      Mistake: there is no such chip here; the message lists them.
    """
    prefix = name.split(':')[0]
    for chip in CHIPS.values():
        if prefix in (chip.name, chip.topology.split(':')[0], *chip.kinds):
            return chip
    raise Mistake(f'{name=} names no chip: one of {", ".join(CHIPS)}')


def topologies(chip: Chip) -> list[str]:
    """List the slices of a chip that are sold, smallest first, by the names that libtpu gives them.

    libtpu knows others too: any with sides that the 2x2 chips of a host divide.  '1x1' and '1x1x1' are a single chip.
    """
    platform, sides = chip.topology.split(':')
    if sides.count('x') == 1:
        return [f'{platform}:{slice_}' for slice_ in ('1x1', *PLANES)]
    return [f'{platform}:{slice_}' for slice_ in ('1x1x1', *CUBES)]
