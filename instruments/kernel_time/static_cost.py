"""Compute the static time of Pallas kernels: what the compiler's schedule says, with no TPU.

    static = static_time('v5e', attention, q, k, v)        # abstract or concrete arguments
    static.ms, static.stall_ms, static.hbm_bytes, static.kernels[0].hot.units

libtpu compiles the function and writes each kernel's schedule; schedule.py executes the scalar program, with the
tables that tables.py finds; this file adds what a DMA costs and counts what occupies the units.  The model of DMA
has one queue: transfers between HBM and the core follow each other at the HBM's bandwidth, and each arrives LATENCY
after its last byte is sent; transfers within the core do not queue.  A kernel's time is that of its bundles plus the
cycles that they wait for DMAs.  The latency is the one figure that is assumed.

This is not a measurement.  Against published times of one kernel family on v7x the model is off by -13 to +17 %; on
v5e and v6e nothing comparable is published.  Rank variants with it, quote ratios within one chip, and take gaps of
less than 15 % for ties.  Not modelled: instruction fetch (long straight-line code), VMEM bank conflicts, loss on
strided DMAs, a kernel's launch (microseconds), interconnect.  It says nothing of numerics.  It is deterministic.

On v4 and v5p, whose two cores run one program together, the time is that of one core with half the bandwidth, which
does half of the grid where a dimension is 'parallel', and all of it otherwise.
"""
import collections
import dataclasses
import pathlib
import re
import tempfile

import numpy as np

from instruments.kernel_time import schedule
from instruments.kernel_time.tables import scalar_tables
from instruments.tpu import chips
from instruments.tpu.compile import Compiled, compile_for, mesh, prepare
from instruments.tpu.step_cost import StepCost, step_cost

LATENCY = 600e-9  # seconds from the last byte of a DMA to its semaphore; assumed
SLOTS = ('MXU', 'XLU', 'VALU', 'VPOP', 'EUP', 'VLOAD', 'FILL', 'VSTORE', 'SPILL', 'SALU')  # of the utilization file
NO_INTERVAL = 99


class Transfers:
    """Hold DMAs and their semaphores, which keep (time, amount) pairs.  Times are in cycles."""

    def __init__(self, chip: chips.Chip, latency: float = LATENCY):
        self.granule, self.bytes_per_cycle = chip.dma_granule, chip.hbm_bandwidth / chip.clock / chip.cores
        self.latency = latency * chip.clock
        self.free = 0.0  # when the queue is empty
        self.bytes, self.count, self.stalls = collections.Counter(), 0, collections.Counter()
        self.flags = collections.defaultdict(list)
        self.fill = None  # what a DMA to SMEM brings: set by the program

    def start(self, time, kind, source, granules, destination, flag) -> float:
        self.count += 1
        if kind.endswith('_to_smem'):
            self.fill(source, destination)
        if 'host' in kind:
            return 0.0
        size = granules * self.granule
        end = max(time, self.free if 'hbm' in kind else time) + size / self.bytes_per_cycle
        if 'hbm' in kind:
            self.free = end
        self.bytes[kind] += size
        self.flags[flag].append((end + self.latency, granules))
        return 0.0

    def wait(self, time, flag, granules, place) -> float:
        """Count the cycles until the semaphore holds so many granules."""
        events = sorted(self.flags[flag])
        held, when = sum(amount for _, amount in events if amount < 0), None  # what earlier waits took
        if held >= granules:
            when = 0.0
        for arrival, amount in events:
            if when is None and amount > 0:
                held += amount
                when = arrival if held >= granules else None
        if when is None:
            raise ValueError(f'bundle {place:#x} waits for {granules} granules on semaphore {flag:#x}, it gets {held}')
        if len(events) > 64 and all(arrival <= time for arrival, _ in events):
            self.flags[flag] = [(0.0, sum(amount for _, amount in events))]
        stall = max(0.0, when - time)
        self.stalls[place] += stall
        return stall

    def set_flag(self, time, flag, amount) -> None:
        self.flags[flag] = [(0.0, amount)] if amount else []

    def add_flag(self, time, flag, amount) -> None:
        self.flags[flag].append((time, schedule.wrap(amount)))

    @property
    def hbm_bytes(self) -> int:
        return sum(size for kind, size in self.bytes.items() if 'hbm' in kind)


@dataclasses.dataclass(frozen=True)
class Section:
    """Describe a stretch of bundles without a branch: its share of all cycles, and how busy it keeps each unit."""
    share: float
    executions: int
    bundles: int
    empty: float  # share of its cycles in which nothing is issued
    units: dict[str, float]  # MXU, MXUpush, XLU, VALU, EUP, VLOAD, VSTORE, SALU: share of what it can do

    @property
    def bound(self) -> str:
        return max(self.units, key=self.units.get)


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str  # of the HLO instruction
    executions: int  # in one run of the program
    ms: float  # of one execution
    stall_ms: float
    hbm_bytes: int
    dmas: int
    dma_ms: float  # hbm_bytes at full bandwidth
    bundles: int  # code size
    spills: int  # registers spilled to VMEM, by bundle of the code
    fills: int
    vmem_bytes: int
    mxu: float  # share of the time in which the fullest matrix unit multiplies
    hot: Section
    warnings: dict[str, int]


@dataclasses.dataclass(frozen=True)
class StaticTime:
    """Hold `ms` and the sums below of the Pallas kernels; `outside_ms` is XLA's estimate of all else."""
    chip: chips.Chip
    kernels: tuple[Kernel, ...]
    compiled: Compiled
    outside: StepCost

    def total(self, field: str) -> float:
        return sum(getattr(kernel, field) * kernel.executions for kernel in self.kernels)

    @property
    def ms(self) -> float:
        return self.total('ms')

    @property
    def stall_ms(self) -> float:
        return self.total('stall_ms')

    @property
    def dma_ms(self) -> float:
        return self.total('dma_ms')

    @property
    def hbm_bytes(self) -> int:
        return int(self.total('hbm_bytes'))

    @property
    def outside_ms(self) -> float:
        return self.outside.cycles / self.chip.clock * 1e3

    @property
    def bundles(self) -> int:
        return sum(kernel.bundles for kernel in self.kernels)

    @property
    def spills(self) -> int:
        return sum(kernel.spills for kernel in self.kernels)

    @property
    def vmem_bytes(self) -> int:
        return max(kernel.vmem_bytes for kernel in self.kernels)

    @property
    def mxu(self) -> float:
        return float(np.average([kernel.mxu for kernel in self.kernels],
                                weights=[kernel.ms * kernel.executions for kernel in self.kernels]))

    @property
    def hot(self) -> Section:
        return max(self.kernels, key=lambda kernel: kernel.ms * kernel.executions).hot

    @property
    def warnings(self) -> dict[str, int]:
        return {name: count for kernel in self.kernels for name, count in kernel.warnings.items()}


def static_time(name: str, function, *arguments, over=None, only: str = '', latency: float = LATENCY) -> StaticTime:
    """Compile `function(*arguments)` for a chip and time its Pallas kernels by their schedules.

    Args:
      name, arguments, over: as compile_for's.  Where arguments decide what a kernel does (lengths, page tables,
        segments), pass arrays; for the others shapes do.
      only: regular expression; kernels whose name has no match are left out.

    Raises:
      ValueError: no kernel is found, libtpu is missing or was loaded without schedules.
    """
    chip = chips.find(name)
    prepare(schedules=True)
    over = over or mesh(name)
    calls = scalar_tables(function, *arguments, over=over)
    with tempfile.TemporaryDirectory(prefix='tpu-schedule-') as folder:
        compiled = compile_for(name, function, *arguments, over=over, dump=folder)
        outside = step_cost(compiled.text)
        kernels = [time_schedule(pathlib.Path(folder), kernel, executions, chip, tables_of(kernel, calls), latency)
                   for kernel, executions in outside.kernels.items() if re.search(only, kernel)]
    if not kernels:
        raise ValueError(f'no Pallas kernel matches {only=}; the program has {list(outside.kernels)}')
    return StaticTime(chip, tuple(kernels), compiled, outside)


def tables_of(kernel: str, calls: list[tuple[str, list]]) -> list:
    """Find the scalar operands of a kernel: those of the next Pallas call whose name its HLO name begins with."""
    longest = max((len(name) for name, _ in calls if kernel.startswith(name)), default=0)
    matching = [call for call in calls if kernel.startswith(call[0]) and len(call[0]) == longest] or calls
    if len(matching) > 1:
        calls.remove(matching[0])
    return matching[0][1]


def time_schedule(folder: pathlib.Path, name: str, executions: int, chip: chips.Chip, tables, latency) -> Kernel:
    """Run the schedule of one kernel that the compiler left in `folder`."""
    bundles = schedule.parse(written(folder, name, 'packed-bundles-post-ra'))
    program, transfers = schedule.Program(bundles, chip.branch_delay, tables), Transfers(chip, latency)
    execution = program.run(transfers)
    cycles = max(execution.cycles, transfers.free)  # the last transfers out end after the program
    capacity, used = parse_slots(written(folder, name, 'pre-delay_hlo-static-per-bundle-utilization'))
    sections = sections_of(bundles, chip.branch_delay)
    milliseconds = 1e3 / chip.clock
    return Kernel(
        name=name, executions=executions, ms=cycles * milliseconds,
        stall_ms=(cycles - sum(execution.counts)) * milliseconds, hbm_bytes=transfers.hbm_bytes, dmas=transfers.count,
        dma_ms=transfers.hbm_bytes / transfers.bytes_per_cycle * milliseconds, bundles=len(bundles),
        spills=sum(row[SLOTS.index('SPILL')] for row in used), fills=sum(row[SLOTS.index('FILL')] for row in used),
        vmem_bytes=scoped_vmem(written(folder, name, 'post-delay-converter')),
        mxu=matrix_units(bundles, execution.counts, sections)['MXU'] * sum(execution.counts) / cycles,
        hot=hottest(bundles, execution.counts, sections, capacity, used), warnings=dict(program.warnings))


def written(folder: pathlib.Path, name: str, kind: str) -> str:
    """Read the text of a kernel's file: TIME-NAME-PASS-KIND.txt."""
    for path in folder.iterdir():
        if re.fullmatch(rf'\d+-{re.escape(name)}-\d+-{kind}\.txt', path.name):
            return path.read_text()
    left = sorted(path.name for path in folder.iterdir())
    raise ValueError(f'the compiler left no {kind} of kernel {name!r}; there are {left}')


def parse_slots(text: str) -> tuple[list[int], list[list[int]]]:
    """Read how many operations of each of SLOTS a bundle can hold, and how many each bundle holds."""
    rows = [[int(number) for number in line.split()] for line in text.splitlines()
            if line.strip() and not line.startswith(('==', 'MXU'))]
    return rows[0], rows[1:]


def scoped_vmem(text: str) -> int:
    """Count the bytes of VMEM up to the end of the last allocation: windows, scratch and spills."""
    ends = [int(size, 0) + int(offset, 0) for size, offset in
            re.findall(r'space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)', text)]
    return max(ends, default=0)


# ---------------------------------------------------------------- what occupies the units

def sections_of(bundles, branch_delay: int) -> list[tuple[int, int]]:
    """List [start, end) of the stretches between branches and branch targets."""
    starts = {0}
    for place, bundle in enumerate(bundles):
        for operation in bundle.operations:
            if operation.opcode.startswith('sbr'):
                starts.add(place + branch_delay + 1)
                starts |= {int(target) for target in re.findall(r'bundleno = (\d+)', operation.operands)}
    starts = sorted(start for start in starts if start < len(bundles))
    return list(zip(starts, [*starts[1:], len(bundles)], strict=True))


def hottest(bundles, counts, sections, capacity, used) -> Section:
    """Find the section in which the kernel spends most cycles."""
    start, end = max(sections, key=lambda section: sum(counts[slice(*section)]))
    cycles = max(1, sum(counts[start:end]))
    issued = [sum(row[slot] * count for row, count in zip(used[start:end], counts[start:end], strict=False))
              for slot in range(len(SLOTS))]
    slots = {name: issued[slot] / (capacity[slot] * cycles) for slot, name in enumerate(SLOTS)
             if name in ('VALU', 'EUP', 'VLOAD', 'VSTORE', 'SALU')}
    units = matrix_units(bundles, counts, [(start, end)]) | slots
    empty = sum(counts[place] for place in range(start, end) if not bundles[place].operations)
    return Section(share=cycles / max(1, sum(counts)), executions=max(counts[start:end]), bundles=end - start,
                   empty=empty / cycles, units={name: round(share, 3) for name, share in units.items()})


def matrix_units(bundles, counts, sections) -> dict[str, float]:
    """Compute the busy share of the fullest MXU (products, weights) and of the fullest XLU (transposes, reductions).

    An operation occupies its unit for as long as the compiler keeps away the next one of its kind: the least distance
    seen between two of them.
    """
    issued, interval = collections.Counter(), collections.defaultdict(lambda: NO_INTERVAL)
    for start, end in sections:
        last = {}
        for place in range(start, end):
            for operation in bundles[place].operations:
                unit = re.search(r'\.(mxu\d|xlu\d)$', operation.opcode)
                if not unit or operation.opcode.startswith('vpop') or not kind_of(operation.opcode):
                    continue
                key = kind_of(operation.opcode), without_registers(operation.opcode), unit[1]
                if place > last.get(key, place):
                    interval[key[:2]] = min(interval[key[:2]], place - last[key])
                last[key] = place
                issued[key] += counts[place]
    busy = collections.Counter()
    for (kind, opcode, unit), count in issued.items():
        cycles = interval[kind, opcode]
        busy[kind, unit] += count * (cycles if cycles < NO_INTERVAL else 1)
    total = max(1, sum(sum(counts[slice(*section)]) for section in sections))
    return {name: max((cycles for (kind, _), cycles in busy.items() if kind == name), default=0) / total
            for name in ('MXU', 'MXUpush', 'XLU')}


def kind_of(opcode: str) -> str | None:
    if 'matmul' in opcode:
        return 'MXU'
    if 'matpush' in opcode:
        return 'MXUpush'
    return 'XLU' if 'xlu' in opcode and 'matprep' not in opcode and 'vdwg' not in opcode else None


def without_registers(opcode: str) -> str:
    """Shorten vmatmul.bf16.gmra.mxu0 to vmatmul.bf16: what decides how long it takes."""
    names = ('msra', 'msrb', 'gmra', 'gmrb', 'vlgmr', 'vlgmrb', 'msk')
    return '.'.join(part for part in opcode.split('.')[:-1] if part not in names)
