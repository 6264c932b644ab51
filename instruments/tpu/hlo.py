"""Read optimised HLO text: computations, their instructions in the order of the text, and what each of them calls.

A module's text is a list of computations; one is the entry.  Where its header says `is_scheduled=true` the order of
the instructions is the order of execution.  Everything that a program spends is a sum over the entry computation in
which a loop's body counts as often as it turns: tpu/step_cost.py sums cycles, tpu/collectives.py what goes over the
interconnect, tpu/estimate.py both, along the schedule.
"""
import math
import re
from typing import NamedTuple

COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([\w\-]+)\(')
ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
NAME = re.compile(r'%([\w.\-]+)')
CONTROL = ('while', 'conditional', 'call')  # they run whole computations
FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast')  # they do nothing


class Instruction(NamedTuple):
    name: str
    type: str  # 'bf16[2,512]{1,0:T(8,128)S(1)}', or a tuple of such
    opcode: str
    arguments: str  # what stands in its parentheses: operands, a constant's value, a parameter's number
    attributes: str  # all that follows
    root: bool  # its value is the computation's

    @property
    def operands(self) -> list[str]:
        """List names of instructions of the same computation."""
        return NAME.findall(self.arguments)


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    hbm: bool  # False: in VMEM or another memory of the core

    @property
    def bytes(self) -> int:
        """Count the bytes of the values, without the padding of a tiled layout; 0 for a token."""
        bits = 8 if self.dtype == 'pred' else int((re.search(r'\d+', self.dtype) or ['0'])[0])
        return math.prod(self.shape) * bits // 8


class Module(NamedTuple):
    computations: dict[str, list[Instruction]]
    entry: str
    scheduled: bool


def parse(text: str) -> Module:
    """Read the computations of a module's text.

    Raises:
      ValueError: there is no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = COMPUTATION.match(line)
        if header:
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            end = closing(line, found.end())
            current.append(Instruction(found[2], found[3], found[4], line[found.end():end], line[end + 1:],
                                       bool(found[1])))
    if entry is None:
        raise ValueError('no ENTRY computation in the text: pass the optimised HLO of a compiled program')
    return Module(computations, entry, 'is_scheduled=true' in text[:text.find('\n')])


def closing(line: str, start: int) -> int:
    """Find where the parenthesis that was opened just before `start` closes."""
    depth = 1
    for place in range(start, len(line)):
        depth += {'(': 1, ')': -1}.get(line[place], 0)
        if depth == 0:
            return place
    return len(line)


def arrays(type_: str) -> list[Array]:
    """List the arrays of a type, those within tuples too."""
    return [Array(dtype, tuple(int(size) for size in shape.split(',') if size), not re.search(r'S\(\d+\)', layout))
            for dtype, shape, layout in ARRAY.findall(type_)]


def size(type_: str) -> int:
    return sum(array.bytes for array in arrays(type_))


def called(module: Module, instruction: Instruction) -> tuple[tuple[str, ...], int]:
    """List the computations of which an instruction runs one (a conditional has several), and how often it does.

    What a reduction, a sort or an all-reduce applies to elements is not listed.

    Raises:
      ValueError: a loop's trip count cannot be read.
    """
    opcode = instruction.opcode.removesuffix('-start')
    if opcode == 'while':
        return (attribute(instruction, 'body'),), trips(module, instruction)
    if opcode == 'conditional':
        branches = NAME.findall((re.search(r'branch_computations=\{(.*?)\}', instruction.attributes) or ['', ''])[1])
        return tuple(branches) or (attribute(instruction, 'true_computation'),
                                   attribute(instruction, 'false_computation')), 1
    if opcode == 'call':
        return (attribute(instruction, 'to_apply'),), 1
    return ((attribute(instruction, 'calls'),), 1) if opcode in ('fusion', 'async') else ((), 0)


def attribute(instruction: Instruction, name: str) -> str:
    return re.search(rf'{name}=%?([\w.\-]+)', instruction.attributes)[1]


def trips(module: Module, loop: Instruction) -> int:
    """Find a loop's trip count: what XLA found out, or the constant that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    constants = [int(instruction.arguments) for instruction in module.computations[attribute(loop, 'condition')]
                 if instruction.opcode == 'constant' and instruction.type.startswith('s32[]')]
    if not constants:
        raise ValueError(f'the trip count of this loop is not in its condition: {loop.name}')
    return max(constants)
