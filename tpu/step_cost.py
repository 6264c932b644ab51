"""What XLA's own scheduler expects of a whole program: cycles of every fusion and copy, loops multiplied out.

Each fusion, copy and convolution of the optimised HLO carries `estimated_cycles` of the TensorCore.  Summed over the
entry computation, with a loop's body times its trip count (the constant in its condition), they give the time of
everything but Pallas kernels, whose time is tpu/static_cost.py's and of which this file tells how often each runs, and
asynchronous copies and collectives, which have no estimate and are counted by name.  `cost_analysis()` cannot replace
it: its FLOPs count a loop's body once, and its `optimal_seconds` are right for a single kernel only.
"""
import collections
import dataclasses
import re

COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([\w\-]+)\(')
PALLAS = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass
class StepCost:
    cycles: int = 0
    by_opcode: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # cycles
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # executions, by HLO name
    without_estimate: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # executions

    def add(self, other: 'StepCost', times: int) -> None:
        self.cycles += times * other.cycles
        for mine, theirs in ((self.by_opcode, other.by_opcode), (self.kernels, other.kernels),
                             (self.without_estimate, other.without_estimate)):
            mine.update({name: times * count for name, count in theirs.items()})


def step_cost(text: str) -> StepCost:
    """The cost of an optimised module's text (`compile_for(…).text`).

    Raises:
      ValueError: the text has no entry computation, or a loop's trip count cannot be read.
    """
    computations, entry = split_computations(text)
    if entry is None:
        raise ValueError('no ENTRY computation in the text: pass the optimised HLO of a compiled program')
    return computation_cost(computations, entry, {})


def split_computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        match = COMPUTATION.match(line)
        if match:
            current = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif current is not None and ' = ' in line:
            current.append(line)
    return computations, entry


def computation_cost(computations: dict[str, list[str]], name: str, known: dict[str, StepCost]) -> StepCost:
    if name in known:
        return known[name]
    cost = StepCost()
    for line in computations[name]:
        match = INSTRUCTION.match(line)
        if not match:
            continue
        instruction, opcode = match.groups()
        cycles = re.search(r'"estimated_cycles":"?(\d+)', line)
        if opcode == 'while':
            cost.add(computation_cost(computations, called(line, 'body'), known), trips(computations, line))
        elif opcode == 'call':
            cost.add(computation_cost(computations, called(line, 'to_apply'), known), 1)
        elif opcode == 'conditional':  # the dearest branch
            branches = re.findall(r'%([\w.\-]+)', re.search(r'branch_computations=\{(.*?)\}|$', line)[1] or '')
            branches = branches or [called(line, 'true_computation'), called(line, 'false_computation')]
            cost.add(max((computation_cost(computations, branch, known) for branch in branches),
                         key=lambda branch: branch.cycles), 1)
        elif opcode == 'custom-call' and PALLAS in line:
            cost.kernels[instruction] += 1
        elif cycles:
            cost.cycles += int(cycles[1])
            cost.by_opcode[opcode] += int(cycles[1])
        elif opcode not in ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'):
            cost.without_estimate[opcode] += 1
    known[name] = cost
    return cost


def called(line: str, attribute: str) -> str:
    return re.search(rf'{attribute}=%?([\w.\-]+)', line)[1]


def trips(computations: dict[str, list[str]], line: str) -> int:
    """A loop's trip count: what XLA found out, or the constant that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition = ' '.join(computations[called(line, 'condition')])
    constants = [int(number) for number in re.findall(r's32\[\]\S* constant\((\d+)\)', condition)]
    if not constants:
        raise ValueError(f'the trip count of this loop is not in its condition: {line.strip()[:120]}')
    return max(constants)
