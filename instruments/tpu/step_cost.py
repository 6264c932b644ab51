"""Add up what XLA's own scheduler expects of a program: cycles of every fusion and copy, loops multiplied out.

Each fusion, copy and convolution of the optimised HLO carries `estimated_cycles` of the TensorCore.  Summed over the
entry computation, with a loop's body times its trip count (the constant in its condition), they give the time of
everything but Pallas kernels, whose time is kernel_time/static_cost.py's and of which this file tells how often each
runs, and asynchronous copies and collectives, which have no estimate and are counted by name.  `cost_analysis()` cannot
replace it: its FLOPs count a loop's body once, and its `optimal_seconds` are right for a single kernel only.
"""
import collections
import dataclasses
import re

from instruments.tpu import hlo

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
    """Add up the cost of an optimised module's text (`compile_for(…).text`).  A conditional is its dearest branch.

    Raises:
      ValueError: the text has no entry computation, or a loop's trip count cannot be read.
    """
    module = hlo.parse(text)
    return computation_cost(module, module.entry, {})


def computation_cost(module: hlo.Module, name: str, known: dict[str, StepCost]) -> StepCost:
    if name in known:
        return known[name]
    cost = StepCost()
    for instruction in module.computations[name]:
        opcode, cycles = instruction.opcode, estimated_cycles(instruction)
        if opcode in hlo.CONTROL:
            branches, times = hlo.called(module, instruction)
            cost.add(max((computation_cost(module, branch, known) for branch in branches),
                         key=lambda branch: branch.cycles), times)
        elif is_kernel(instruction):
            cost.kernels[instruction.name] += 1
        elif cycles is not None:
            cost.cycles += cycles
            cost.by_opcode[opcode] += cycles
        elif opcode not in hlo.FREE:
            cost.without_estimate[opcode] += 1
    known[name] = cost
    return cost


def estimated_cycles(instruction: hlo.Instruction) -> int | None:
    found = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
    return int(found[1]) if found else None


def is_kernel(instruction: hlo.Instruction) -> bool:
    """Say whether an instruction is a Pallas kernel."""
    return instruction.opcode == 'custom-call' and PALLAS in instruction.attributes
