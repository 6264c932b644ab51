"""Read a kernel's schedule as libtpu prints it, and execute its scalar program.

A TensorCore executes one bundle of operations a cycle, in the order in which the compiler packed them: there is no
hardware that reorders or stalls, except when a bundle waits for a DMA.  `*-packed-bundles-post-ra.txt` is that order,
one line a cycle with empty bundles where an operation's result is not ready yet:

    0x45   : > { %s9_s3 = sadd.s32 1, %s7_s2  ;;  %33 = dma.hbm_to_vmem [thread:$0]  (!%p8_p0), %s4_s1, 4096, … }

(`*-final_bundles.txt` has the empty bundles squeezed out, so its line count is not a cycle count.)  Which bundles run,
how often, and which DMAs they start depends on scalar operations alone: loop counters, index maps, predicates, tables
in SMEM.  `Program` executes exactly these; vector and matrix operations only occupy their cycles.  What a DMA costs is
the business of the transfers object that it is given (static_cost.py).

A register is the end of a name: %s8238_s8 is scalar register 8, %p278_p2 predicate 2.  Within a bundle every operation
reads what the registers held before it.  A branch takes effect after the chip's delay slots.
"""
import collections
import dataclasses
import operator
import re

import numpy as np

LINE = re.compile(r'^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{(.*)\}\s*$')
OPERATION = re.compile(r'^(%\w+(?:,\s*%\w+)*) = (.*)$', re.DOTALL)
REGISTER = re.compile(r'^%(?:\w*_)?([sp])(\d+)$')
PREDICATE = re.compile(r'^\((!?%\w+)\)\s*,?\s*(.*)$', re.DOTALL)
PREDICATES = 64  # predicate n is register 64 + n
MASK = 0xffffffff
# no effect on control flow or DMA; sphi names values that meet in one register; shalt is a bounds check
WITHOUT_EFFECT = ('vwait', 'vsyncmov', 'sfence', 'sphi', 'shalt', 'vtrace', 'setrngseed', 'vsettm', 'vdelay', 'snop',
                  'sdelay')


@dataclasses.dataclass(frozen=True)
class Operation:
    result: str | None
    opcode: str
    operands: str


@dataclasses.dataclass(frozen=True)
class Bundle:
    depth: int  # of loops
    operations: tuple[Operation, ...]


def parse(text: str) -> list[Bundle]:
    """Read the bundles of a schedule, in order.

    Raises:
      ValueError: the lines' numbers have a gap: this libtpu prints another format.
    """
    bundles = []
    for line in without_comments(text).splitlines():
        match = LINE.match(line)
        if not match:
            continue
        if int(match[1], 0) != len(bundles):
            raise ValueError(f'bundle {match[1]} follows bundle {len(bundles) - 1:#x}: not a schedule as known here')
        operations = (part.strip() for part in match[4].split(';;'))
        bundles.append(Bundle(match[3].count('>'), tuple(parse_operation(part) for part in operations if part)))
    return bundles


def without_comments(text: str) -> str:
    """Remove comments; they nest."""
    kept, depth, start = [], 0, 0
    for match in re.finditer(r'/\*|\*/', text):
        if match[0] == '/*':
            if depth == 0:
                kept.append(text[start:match.start()])
            depth += 1
        elif depth:
            depth -= 1
            start = match.end()
    return ''.join([*kept, text[start:]])


def parse_operation(text: str) -> Operation:
    match = OPERATION.match(text)
    opcode, _, operands = (match[2] if match else text).strip().partition(' ')
    return Operation(match[1] if match else None, opcode, operands.strip())


def wrap(x: int) -> int:
    """Return the signed number of the lowest 32 bits."""
    return ((x + 0x80000000) & MASK) - 0x80000000


BINARY = {
    'sadd': operator.add, 'ssub': operator.sub, 'smul': operator.mul,
    'sand': operator.and_, 'sor': operator.or_, 'sxor': operator.xor,
    'sshll': lambda a, b: a << (b & 31), 'sshra': lambda a, b: a >> (b & 31),
    'sshrl': lambda a, b: (a & MASK) >> (b & 31), 'sdiv': lambda a, b: a // max(1, b),
    'smulhi': lambda a, b: (a & MASK) * (b & MASK) >> 32, 'smin': min, 'smax': max,
}
LOGIC = {
    'pmov': lambda a: a, 'pneg': operator.not_,
    'por': lambda a, b: a or b, 'pand': lambda a, b: a and b, 'pxor': operator.ne,
    'pnor': lambda a, b: not (a or b), 'pnand': lambda a, b: not (a and b),
}
COMPARE = {'eq': operator.eq, 'ne': operator.ne, 'lt': operator.lt, 'le': operator.le, 'gt': operator.gt,
           'ge': operator.ge}


@dataclasses.dataclass
class Block:
    """Hold bundles that are always executed one after the other, as closures over the machine's state."""
    start: int
    length: int
    actions: list  # (bundle's offset, action(state, time) -> cycles that it stalls)
    branch: object  # predicate(state), or None
    target: int  # of the branch
    following: int


@dataclasses.dataclass
class Machine:
    transfers: object
    registers: list = dataclasses.field(default_factory=lambda: [0] * (2 * PREDICATES))
    memory: dict = dataclasses.field(default_factory=dict)  # SMEM, by word
    taken: bool = False  # whether the block's branch is


@dataclasses.dataclass
class Execution:
    cycles: float
    counts: list[int]  # how often each bundle was executed


class Program:
    """Hold the scalar program of a schedule.

    Args:
      bundles: `parse`'s.
      branch_delay: bundles after a branch that are still executed.
      tables: the values of the kernel's first operands, those that it reads as scalars (tables.py).  An operand
        that is read as scalars and not given holds zeros, and `warnings` says so.
    """

    def __init__(self, bundles: list[Bundle], branch_delay: int, tables=()):
        self.bundles, self.branch_delay, self.tables = bundles, branch_delay, list(tables)
        self.warnings = collections.Counter()
        self.allocations, self.operands, self.blocks = {}, {}, {}
        self.targets = {int(place) for bundle in bundles for operation in bundle.operations
                        if operation.opcode.startswith('sbr')
                        for place in re.findall(r'bundleno = (\d+)', operation.operands)}

    def run(self, transfers, most_cycles: float = 3e10) -> Execution:
        """Execute from the first bundle to past the last.

        Raises:
          ValueError: it did not end within `most_cycles`, or waits for a DMA that nothing starts.
        """
        state, time, place, times = Machine(transfers), 0.0, 0, collections.Counter()
        transfers.fill = lambda source, destination: self.fill(state, source, destination)
        while place < len(self.bundles):
            block = self.blocks.get(place) or self.blocks.setdefault(place, self.block(place, state))
            times[place] += 1
            stalls = 0.0
            for offset, action in block.actions:
                stalls += action(state, time + stalls + offset)
            time += stalls + block.length
            place = block.target if block.branch and state.taken else block.following
            if time > most_cycles:
                raise ValueError(f'the kernel still runs after {most_cycles=}; {dict(self.warnings)}')
        counts = [0] * len(self.bundles)
        for place, count in times.items():
            block = self.blocks[place]
            for bundle in range(place, place + block.length):
                counts[bundle] += count
        return Execution(time, counts)

    # ---- values: each becomes a closure over the state

    def value(self, text: str):
        text = text.strip()
        negated, text = text.startswith('!'), text.lstrip('!')
        register = REGISTER.match(text)
        if register:
            place = int(register[2]) + (PREDICATES if register[1] == 'p' else 0)
            return (lambda state: not state.registers[place]) if negated else (lambda state: state.registers[place])
        if text.startswith('['):
            return self.address(text)
        if text.startswith('#'):
            constant = self.allocations.setdefault(text, (len(self.allocations) + 1) << 20)
        elif re.fullmatch(r'-?\d+', text):
            constant = wrap(int(text))
        elif re.fullmatch(r'\$?0x[0-9a-f]+', text):
            constant = wrap(int(text.lstrip('$'), 16))
        elif text in ('true', 'false'):
            constant = text == 'true'
        else:
            self.warnings[f'value {text[:30]}'] += 1
            constant = 0
        return lambda state: constant

    def address(self, text: str):
        """Read an address, [smem:[#allocation6 + $0x1]]: the sum of its parts."""
        text = re.sub(r'^\[?smem:', '', text.strip()).strip('[] ')
        parts = [self.value(part) for part in text.split('+')]
        return parts[0] if len(parts) == 1 else lambda state: sum(part(state) for part in parts)

    def predicate(self, operands: str):
        """Read a leading (%p3) or (!%p3): a closure that tells whether the operation happens, and other operands."""
        operands = re.sub(r'^\[thread:\$\d+\]\s*', '', operands)
        match = PREDICATE.match(operands)
        return (self.value(match[1]), match[2]) if match else (None, operands)

    def expression(self, operation: Operation, state: Machine):
        """Make the closure of what a scalar operation gives; None where it is not known."""
        opcode, old = operation.opcode, self.value(operation.result.split(',')[0])
        happens, rest = self.predicate(operation.operands)
        name, *kind = opcode.split('.')
        unsigned = bool(kind) and kind[-1].startswith('u')
        if name == 'sld':
            place, given = re.match(r'^(\[.*\])\s*(\(!?%\w+\))?$', operation.operands).groups()
            happens, address = self.predicate(given or '')[0], self.address(place)
            result = lambda state: state.memory.get(address(state), 0)
        elif name == 'inlined_call_operand':
            result = self.operand(opcode, rest, state)
        elif name == 'scalar_lea':
            parts = [self.value(part) for part in split(re.sub(r'\s+\[#\w+\]$', '', rest))]
            result = lambda state: wrap(sum(part(state) for part in parts))
        elif name == 'int_to_ptr':
            result = self.value(re.sub(r'^\[[^\]]*\]\s*', '', rest))
        elif name == 'smov' and rest.startswith('('):  # smov (%p1, %s2), 5: 5 where p1, else s2
            (condition, otherwise), (chosen,) = split(rest[1:rest.index(')')]), split(rest[rest.index(')') + 2:])
            result = choose(self.value(condition), self.value(chosen), self.value(otherwise))
        elif name in ('smov', 'copy') or opcode == 'sor.b':
            result = self.value(rest)
        elif name == 'scalar_select':
            result = choose(*map(self.value, split(rest)))
        elif name == 'scmp':
            compare, (a, b) = COMPARE[kind[0]], map(self.value, split(rest))
            mask = MASK if kind[1].startswith('u') else -1
            result = lambda state: compare(a(state) & mask, b(state) & mask)
        elif opcode == 'sc.u32':  # the carry of an addition
            a, b = map(self.value, split(rest))
            result = lambda state: (a(state) & MASK) + (b(state) & MASK) > MASK
        elif name in LOGIC:
            logic, values = LOGIC[name], [self.value(part) for part in split(rest)]
            result = lambda state: logic(*(value(state) for value in values))
        elif name in BINARY:
            compute, (a, b) = BINARY[name], map(self.value, split(rest))
            mask = MASK if unsigned and name in ('smin', 'smax') else -1
            result = lambda state: wrap(compute(a(state) & mask, b(state) & mask))
        else:
            self.warnings[f'operation {opcode}'] += 1
            return None
        return choose(happens, result, old) if happens else result

    # ---- operands

    def operand(self, opcode: str, description: str, state: Machine):
        """Find where inlined_call_operand.hbm [shape: s32[8,16], index: 0, kind: input, …] is, or a scalar's value."""
        index, kind = re.search(r'index: (\d+), kind: (\w+)', description).groups()
        shape = re.search(r'shape: (\w+)\[([\d,]*)\]', description)
        space = opcode.split('.', 1)[1]
        base = (len(self.operands) + 1) << 21
        table = self.table(int(index), shape) if kind == 'input' else None
        self.operands[f'{kind} {index}'] = base, table
        if table is None and (space == 'smem' or space.startswith('<no')):
            self.warnings[f'{kind} {index} is read as scalars and not given: zeros'] += 1
        elif space == 'smem':
            self.write(state, table, base)
        if space.startswith('<no'):  # passed by value
            constant = int(table.ravel()[0]) if table is not None else 0
            return lambda state: constant
        return lambda state: base

    def table(self, index: int, shape) -> np.ndarray | None:
        """Look up the values of an operand, if they are given and as many as its shape says."""
        if index >= len(self.tables) or self.tables[index] is None:
            return None
        dimensions = [int(number) for number in shape[2].split(',') if number]
        if int(shape[1].strip('su')) != 8 * self.tables[index].dtype.itemsize or (
                self.tables[index].size != np.prod(dimensions)):
            raise ValueError(f'operand {index} is {shape[0]}, its table {self.tables[index].dtype} of '
                             f'{self.tables[index].shape}')
        return self.tables[index].reshape(dimensions)

    def fill(self, state: Machine, source: int, destination: int) -> None:
        """Write what a DMA from HBM to SMEM brings."""
        for name, (base, table) in self.operands.items():
            if base in (source, source >> 4):
                if table is None:
                    self.warnings[f'{name} is read as scalars and not given: zeros'] += 1
                else:
                    self.write(state, table, destination)
                return
        self.warnings['a DMA to SMEM from an unknown place: zeros'] += 1

    def write(self, state: Machine, table: np.ndarray, place: int) -> None:
        state.memory.update(enumerate(smem_words(table).tolist(), place))

    # ---- blocks

    def block(self, start: int, state: Machine) -> Block:
        """Make the block from `start` to the next branch's last delay slot, or to the next branch's target."""
        actions, branch, target, end, place = [], None, 0, None, start
        while place < len(self.bundles):
            assignments, effects, last = [], [], []
            for operation in self.bundles[place].operations:
                if operation.opcode.startswith('sbr'):
                    happens, rest = self.predicate(operation.operands)
                    branch, end = happens or (lambda state: True), place + self.branch_delay
                    target = int(re.search(r'bundleno = (\d+)', rest)[1])
                    effects.append(take(branch))
                elif operation.opcode.startswith(('vsyncpa', 'vsyncadd')):
                    last.append(self.flag(operation))
                elif operation.opcode.startswith('dma.'):
                    effects.append(self.transfer(operation, place))
                elif operation.opcode == 'sst':
                    effects.append(self.store(operation))
                elif not operation.opcode.startswith(WITHOUT_EFFECT):
                    assignments += self.assignment(operation, state)
            if assignments or effects or last:
                actions.append((place - start, bundle_action(assignments, effects, last)))
            place += 1
            if place - 1 == end or (end is None and place in self.targets):
                break
        return Block(start, place - start, actions, branch, target, place)

    def assignment(self, operation: Operation, state: Machine) -> list:
        """List [(register, closure)] of an operation that writes a scalar or predicate register."""
        register = operation.result and REGISTER.match(operation.result.split(',')[0])
        if not register:
            return []
        if operation.opcode.startswith('int_to_ptr'):  # renames a register within the bundle, or copies it
            source = REGISTER.match(operation.operands.split()[-1])
            if source and source.groups() == register.groups():
                return []
        if operation.opcode.startswith(('vpop', 'spop', 'sfpop')):
            self.warnings[f'a vector becomes a scalar: {operation.opcode}'] += 1
            return []
        expression = self.expression(operation, state)
        place = int(register[2]) + (PREDICATES if register[1] == 'p' else 0)
        return [] if expression is None else [(place, expression)]

    def transfer(self, operation: Operation, place: int):
        """Read dma.hbm_to_vmem source, granules, destination, flag, …   or   dma.done.wait flag, granules."""
        happens, rest = self.predicate(operation.operands)
        values = [self.value(part) for part in split(rest)]
        if operation.opcode == 'dma.done.wait':
            flag, granules = values[:2]
            effect = lambda state, time: state.transfers.wait(time, flag(state), granules(state), place)
        else:
            kind = operation.opcode.removeprefix('dma.')
            effect = lambda state, time: state.transfers.start(time, kind, *(value(state) for value in values[:4]))
        return lambda state, time: effect(state, time) if happens is None or happens(state) else 0.0

    def flag(self, operation: Operation):
        """Read vsyncpa, which sets a semaphore, or vsyncadd, which adds to it."""
        happens, rest = self.predicate(operation.operands)
        flag, amount = map(self.value, split(rest)[:2])
        adds = operation.opcode.startswith('vsyncadd')

        def effect(state, time):
            if happens is None or happens(state):
                change = state.transfers.add_flag if adds else state.transfers.set_flag
                change(time, flag(state), amount(state))
        return effect

    def store(self, operation: Operation):
        place, given, rest = re.match(r'^(\[smem:\[.*?\]\])\s*(\(!?%\w+\))?\s*,?\s*(.*)$', operation.operands).groups()
        address, happens, value = self.address(place), self.predicate(given or '')[0], self.value(rest)

        def effect(state, time):
            if happens is None or happens(state):
                state.memory[address(state)] = value(state)
            return 0.0
        return effect


def split(operands: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    return [part.strip() for part in re.split(r',(?![^\[(]*[\])])', operands) if part.strip()]


def choose(condition, chosen, otherwise):
    return lambda state: chosen(state) if condition(state) else otherwise(state)


def take(branch):
    def effect(state, time):
        state.taken = branch(state)
        return 0.0
    return effect


def bundle_action(assignments, effects, last):
    """Join a bundle's actions: all read the registers as they were; semaphores change when its waits are over."""
    def action(state, time):
        values = [value(state) for _, value in assignments]
        stall = 0.0
        for effect in effects:
            stall += effect(state, time + stall)
        for (register, _), value in zip(assignments, values, strict=True):
            state.registers[register] = value
        for effect in last:
            effect(state, time + stall)
        return stall
    return action


def smem_words(table: np.ndarray) -> np.ndarray:
    """Write an integer array as the int32 words that lie in SMEM.

    32 bits: a vector as it is, else rows padded to 128 columns.  Narrower types, k to a word: a vector in groups of 128
    k (the words' first parts, then their second …); else tiles of (8, 128) whose words hold k rows.
    """
    k = 4 // table.dtype.itemsize
    if table.ndim <= 1:
        flat = np.pad(table.ravel(), (0, -table.size % (128 * k))) if k > 1 else np.ascontiguousarray(table.ravel())
        return (flat.reshape(-1, k, 128).swapaxes(1, 2).copy() if k > 1 else flat).view(np.int32).ravel()
    rows, columns = table.shape[-2:]
    table = table.reshape(-1, rows, columns)
    if k == 1:
        return np.pad(table, ((0, 0), (0, 0), (0, -columns % 128))).view(np.int32).ravel()
    tiles = np.pad(table, ((0, 0), (0, -rows % 8), (0, -columns % 128)))
    tiles = tiles.reshape(len(tiles), -1, 8 // k, k, (columns + 127) // 128, 128).transpose(0, 1, 4, 2, 5, 3)
    return tiles.copy().view(np.int32).ravel()
