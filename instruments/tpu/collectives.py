"""List the collectives of a compiled program: kind, mesh axes, bytes, and how often each runs in one execution.

    for collective in collectives(compiled.as_text(), mesh): print(collective, collective.wire_bytes)

Read from the optimised HLO, so it is what the compiler made of the program, not what the program asked for:
  - the CPU's compiler sends bfloat16 as float32 (it has no bfloat16 collectives), the TPU's as bfloat16;
  - neighbours of one kind are combined into one collective with a tuple for a result: one `Collective`, all its bytes;
  - the TPU's compiler may make an all-reduce of a reduce-scatter whose pieces do not fit its tiles, and then cut out
    the piece; in a fusion of its own ("all-reduce-scatter") that still sends what a reduce-scatter does, of the
    padded array, and counts as one;
  - an asynchronous collective is several instructions (start, done, and on a TPU the fusions that advance it); it
    counts once, at its start.
Devices in a text are places in the order of `mesh.devices.flat`, whatever the ids of the devices are.
"""
import collections as counters
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from instruments.tpu import hlo

KINDS = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')
CHAIN = 'async_collective_fusion_config'  # in the attributes of a collective that fusions start, advance and end


class Collective(NamedTuple):
    kind: str  # one of KINDS
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ, in the mesh's order
    devices: int  # in a group
    bytes: int  # the larger of operand and result, on one device
    times: int  # executions in one run of the program

    @property
    def wire_bytes(self) -> int:
        """Count the bytes that a device sends in one execution by the ring algorithms; others send no less."""
        if self.kind == 'collective-permute':
            return self.bytes
        return (2 if self.kind == 'all-reduce' else 1) * self.bytes * (self.devices - 1) // self.devices


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """List the collectives of an optimised module's text, equal ones merged, sorted.

    Of a conditional the branch that sends most is taken.

    Raises:
      ValueError: the text has no entry computation, a trip count cannot be read, or the groups are not the mesh's.
    """
    module = hlo.parse(text)
    found = of_computation(module, module.entry, mesh, {})
    return sorted(collective._replace(times=times) for collective, times in found.items())


def bytes_by_axis(found: list[Collective]) -> dict[str, int]:
    """Add up what a device sends along each mesh axis in one run, in bytes; over two axes it is under 'fsdp,mp'."""
    total = counters.Counter()
    for collective in found:
        total[','.join(collective.axes)] += collective.wire_bytes * collective.times
    return dict(total)


def of_computation(module: hlo.Module, name: str, mesh: Mesh, known: dict) -> counters.Counter:
    """Count {collective with times=1: executions} in one run of a computation."""
    if name not in known:
        total = counters.Counter()
        for instruction in module.computations[name]:
            collective = of_instruction(module, name, instruction, mesh)
            if collective is not None:
                total[collective] += 1
            branches, times = hlo.called(module, instruction)
            dearest = max((of_computation(module, branch, mesh, known) for branch in branches), key=sent, default={})
            total.update({collective: times * count for collective, count in dearest.items()})
        known[name] = total
    return known[name]


def sent(found: counters.Counter) -> int:
    return sum(collective.wire_bytes * count for collective, count in found.items())


def of_instruction(module: hlo.Module, computation: str, instruction: hlo.Instruction, mesh: Mesh) -> Collective | None:
    """Read the collective that an instruction starts, or None; one without partners (groups of one device) is none."""
    kind = instruction.opcode.removesuffix('-start')
    neighbours = module.computations[computation]
    if kind not in KINDS or (CHAIN in instruction.attributes and not starts(neighbours)):
        return None
    if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'
    groups = device_groups(instruction, mesh.devices.size)
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)  # [groups, devices, axes]
    differ = (places != places[:, :1]).any(axis=(0, 1))
    devices = groups.shape[1]
    if kind == 'collective-permute':
        devices = int(np.prod(np.array(mesh.devices.shape)[differ]))
    types = {neighbour.name: neighbour.type for neighbour in neighbours}
    operands = sum(hlo.size(types[name]) for name in instruction.operands)
    if devices == 1:
        return None
    return Collective(kind, tuple(axis for axis, moves in zip(mesh.axis_names, differ, strict=True) if moves), devices,
                      operands * devices if kind == 'all-gather' else operands, 1)


def starts(instructions: list[hlo.Instruction]) -> bool:
    """Say whether a fused computation is the one that starts an asynchronous collective."""
    return any('custom_call_target="AsyncCollectiveStart"' in instruction.attributes for instruction in instructions)


IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # places 0, 1, 2, ... in these sizes, transposed
LIST = r'\{\}|\{\{.*?\}\}'
MESH = rf"mesh\[(.*?)\](?:, device_ids=\((?:{IOTA}|([\d,]+))\))? \{{(.*?)\}}"


def device_groups(instruction: hlo.Instruction, devices: int) -> np.ndarray:
    """Read the groups [groups, devices of a group], places in the mesh: of a permute, [pairs, (source, target)].

    Written as {{0,1},{2,3}}, as an iota [2,2]<=[4] or transposed [2,2]<=[2,2]T(1,0), as axes of a mesh
    mesh['fsdp'=2,'mp'=2] {'mp'} (from jax 0.11 on), or {} for all in one group.

    Raises:
      ValueError: there are no groups in a form that is known, or the mesh has fewer devices than they.
    """
    written = re.search(rf'(?:replica_groups|source_target_pairs)=({LIST}|\[[\d,]+\]<={IOTA}|{MESH})(?=,|\s|$)',
                        instruction.attributes)
    if written is None:
        raise ValueError(f'no groups of devices in {instruction.name}: {instruction.attributes[:200]}')
    written = written[1]
    if iota := re.fullmatch(rf'\[([\d,]+)\]<={IOTA}', written):
        groups = places(iota[2], iota[3]).reshape(numbers(iota[1]))
    elif axes := re.fullmatch(MESH, written):
        groups = along_axes(*axes.groups())
    elif written == '{}':
        groups = np.arange(devices)[None]
    else:
        groups = np.array([numbers(group) for group in re.findall(r'\{([\d,]+)\}', written)])
    if groups.max() >= devices:
        raise ValueError(f'{instruction.name} has groups {written} and the mesh {devices} devices: pass the mesh '
                         'that the program was compiled for')
    return groups


def along_axes(mesh: str, sizes: str | None, order: str | None, ids: str | None, axes: str) -> np.ndarray:
    """Group the devices of a mesh along axes: mesh "'fsdp'=2,'mp'=2", axes "'mp'".

    The devices are 0, 1, 2, ..., or those numbers transposed (`sizes`, `order`, as in `places`), or listed (`ids`).
    """
    shape = {name.strip("'"): int(size) for name, size in (axis.split('=') for axis in mesh.split(','))}
    names, grouped = list(shape), [axis.strip("'") for axis in axes.split(',') if axis]
    if not set(grouped) <= set(names):
        raise ValueError(f'groups along {axes} of mesh[{mesh}] cannot be read: a part of an axis is not known here')
    total = int(np.prod([*shape.values()]))
    devices = np.array(numbers(ids)) if ids else places(sizes or str(total), order)
    last = [names.index(axis) for axis in grouped]
    grid = np.moveaxis(devices.reshape([*shape.values()]), last, range(-len(last), 0))
    return grid.reshape(-1, int(np.prod([shape[axis] for axis in grouped])))


def places(sizes: str, order: str | None) -> np.ndarray:
    """Lay 0, 1, 2, ... out in an array of these sizes, '2,2', and transpose it if there is an order."""
    shape = numbers(sizes)
    return np.arange(np.prod(shape)).reshape(shape).transpose(numbers(order) if order else None)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(',')]
