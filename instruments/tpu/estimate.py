"""Estimate a compiled step: its time, and the bounds that the chip's peaks set to it.  Nothing is measured.

    text = step.lower(state, batch).compile().as_text()                 # for tpu.compile.devices('v5e:2x4')
    estimate(text, mesh, chips.find('v5e'), {'flash_forward': 0.9e-3, 'flash_backward': 1.9e-3})

The scheduled text is walked in the order of execution, a loop's body once and taken as often as it turns:
  - computation takes XLA's own estimated cycles (tpu/step_cost.py) and the time handed in for each Pallas kernel
    (kernel_time/static_times.py);
  - a collective takes what tpu/interconnect.py says, after those before it along the same dimension of the grid;
    a synchronous one keeps the core waiting, an asynchronous one only if it is not through where its result is needed.
    That waiting is `exposed_seconds`.
Not modelled: waiting for asynchronous copies between HBM and VMEM (XLA schedules them ahead), launches of kernels,
the host, hosts that are not in step, networks between slices.  XLA's cycles are an estimate of XLA's, made for ranking
its own choices.  So compare meshes and rematerialisations with it; expect a real step to take longer.

Bounds: `compute` is the FLOPs of the matrix products at the chip's peak; `hbm` the least bytes that the instructions
move (tpu/operations.py) at full bandwidth; `interconnect` the time for which the busiest dimension of the grid is busy.
"""
import collections
import dataclasses
import re
from collections.abc import Callable

from jax.sharding import Mesh

from instruments.tpu import hlo, interconnect, operations
from instruments.tpu.chips import Chip
from instruments.tpu.collectives import CHAIN, bytes_by_axis, collectives, device_groups, of_instruction
from instruments.tpu.step_cost import estimated_cycles, is_kernel


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Hold the estimate of one device, in one run of the program."""
    flops: float  # of matrix products, those of Pallas kernels as their cost_estimate says
    hbm_bytes: float
    wire_bytes: dict[str, int]  # sent along each mesh axis; 'fsdp,mp': by collectives over both
    compute_seconds: float  # XLA's estimated cycles, and the kernels
    interconnect_seconds: float  # of all collectives, one after the other
    exposed_seconds: float  # in which the core waits for a collective
    bounds: dict[str, float]  # seconds: compute, hbm, interconnect

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    @property
    def binds(self) -> str:
        """Name the largest bound."""
        return max(self.bounds, key=self.bounds.get)


def estimate(text: str, mesh: Mesh, chip: Chip, kernel_seconds: Callable[[str], float] | dict[str, float]) -> Estimate:
    """Estimate the time of an optimised, scheduled module's text.

    Args:
      mesh: that the program was compiled for, of devices with coordinates.
      kernel_seconds: the time of one execution of a Pallas kernel by its HLO name ('flash_forward.8'), or a dict of
        what those names contain ('flash_forward'); the longest that fits counts.

    Raises:
      ValueError: the text is not scheduled or has no entry, a trip count cannot be read, a kernel has no time, or the
        mesh is not the program's.
    """
    module = hlo.parse(text)
    if not module.scheduled:
        raise ValueError('the text is not scheduled (no is_scheduled=true in its first line): pass '
                         'compiled.as_text() of a program compiled for a TPU')
    spent = Schedule(module, mesh, chip, kernel_seconds).run(module.entry)
    bounds = dict(compute=spent.flops / chip.peak_flops, hbm=spent.hbm_bytes / chip.hbm_bandwidth,
                  interconnect=max(spent.links.values(), default=0.0))
    return Estimate(spent.flops, spent.hbm_bytes, bytes_by_axis(collectives(text, mesh)), spent.compute,
                    spent.interconnect, spent.exposed, bounds)


@dataclasses.dataclass
class Spent:
    """Hold what one run of a computation spends; times in seconds."""
    flops: int = 0
    hbm_bytes: int = 0
    compute: float = 0.0
    interconnect: float = 0.0
    exposed: float = 0.0
    links: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # busy, by dimension

    def add(self, other: 'Spent', times: int) -> None:
        for field in ('flops', 'hbm_bytes', 'compute', 'interconnect', 'exposed'):
            setattr(self, field, getattr(self, field) + times * getattr(other, field))
        self.links.update({dimension: times * busy for dimension, busy in other.links.items()})

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


class Schedule:
    """Go through the schedule of a module's computations and add up what they spend."""

    def __init__(self, module: hlo.Module, mesh: Mesh, chip: Chip, kernel_seconds):
        self.module, self.mesh, self.chip, self.kernel_seconds = module, mesh, chip, kernel_seconds
        self.network, self.known = interconnect.network(mesh, chip), {}

    def run(self, name: str) -> Spent:
        """Add up what a computation spends; each is gone through once."""
        if name in self.known:
            return self.known[name]
        spent = Spent()
        free = collections.Counter()  # when the links along a dimension are free
        flying = {}  # when an asynchronous collective is through
        for instruction in self.module.computations[name]:
            if instruction.opcode in hlo.CONTROL:
                branches, times = hlo.called(self.module, instruction)
                spent.add(max((self.run(branch) for branch in branches), key=lambda branch: branch.seconds), times)
                continue
            spent.flops += operations.flops(self.module, name, instruction)
            spent.hbm_bytes += operations.hbm_bytes(self.module, name, instruction)
            spent.compute += self.compute_seconds(instruction)
            for collective, key, groups in self.started(name, instruction):
                took = interconnect.seconds(collective, groups, self.network)
                along = interconnect.dimensions(groups, self.network)
                end = max([spent.seconds, *(free[dimension] for dimension in along)]) + took
                free.update({dimension: end - free[dimension] for dimension in along})
                spent.links.update(dict.fromkeys(along, took))
                spent.interconnect += took
                flying[key] = end
            for key in self.awaited(instruction):
                if key in flying:  # else an earlier turn of the loop started it and waited at its end
                    spent.exposed += max(0.0, flying.pop(key) - spent.seconds)
        spent.exposed += max(0.0, max(flying.values(), default=0.0) - spent.seconds)
        self.known[name] = spent
        return spent

    def compute_seconds(self, instruction: hlo.Instruction) -> float:
        """Look up the seconds that the core computes for an instruction: XLA's estimate, or a kernel's time."""
        if not is_kernel(instruction):
            return (estimated_cycles(instruction) or 0) / self.chip.clock
        if not isinstance(self.kernel_seconds, dict):
            return self.kernel_seconds(instruction.name)
        names = [name for name in self.kernel_seconds if name in instruction.name]
        if not names:
            raise ValueError(f'no time of the Pallas kernel {instruction.name} in kernel_seconds='
                             f'{self.kernel_seconds}: add an entry that its name contains')
        return self.kernel_seconds[max(names, key=len)]

    def started(self, computation: str, instruction: hlo.Instruction) -> list[tuple]:
        """List what an instruction starts, in a fusion too: (collective, its key in `awaited`, its groups)."""
        inside = hlo.attribute(instruction, 'calls') if instruction.opcode == 'fusion' else computation
        candidates = self.module.computations[inside] if instruction.opcode == 'fusion' else [instruction]
        found = [(of_instruction(self.module, inside, candidate, self.mesh), candidate) for candidate in candidates]
        return [(collective, chain(candidate) or instruction.name, device_groups(candidate, self.mesh.devices.size))
                for collective, candidate in found if collective is not None]

    def awaited(self, instruction: hlo.Instruction) -> list[str]:
        """List the keys of the collectives that are through when an instruction is."""
        if instruction.opcode.endswith('-done'):
            return instruction.operands[:1]
        if instruction.opcode != 'fusion':
            return [] if instruction.opcode.endswith('-start') else [instruction.name]
        fused = self.module.computations[hlo.attribute(instruction, 'calls')]
        ends = any('custom_call_target="AsyncCollectiveDone"' in inside.attributes for inside in fused)
        return [chain(inside) for inside in fused if chain(inside)] if ends else [instruction.name]


def chain(instruction: hlo.Instruction) -> str | None:
    """Name what the fusions that start, advance and end an asynchronous collective have in common."""
    found = re.search(r'chain_id="(\d+)"', instruction.attributes)
    return f'chain {found[1]}' if found and CHAIN in instruction.attributes else None
