"""Count what an instruction of optimised HLO computes and moves: FLOPs of its matrix products, bytes to and from HBM.

A TPU's text has products as `convolution` and a CPU's as `dot`, mostly inside fusions; a Pallas kernel's FLOPs are
what its cost_estimate says.  The bytes are the least an instruction moves: its operands once and its results once,
where they are in HBM (an array in VMEM says so in its layout, "S(1)").  Of an operand that is only sliced or gathered
from the slice counts, of one that is updated in place the update, and what is handed on unread does not count.
"""
import collections
import re

import numpy as np

from instruments.tpu import hlo
from instruments.tpu.collectives import CHAIN, KINDS, starts
from instruments.tpu.step_cost import is_kernel

SLICES = ('dynamic-slice', 'gather', 'slice')  # they read of their first operand as much as they result in
VIEWS = ('bitcast', 'get-tuple-element', 'reshape', 'tuple')  # no bytes are moved by the instruction itself


def flops(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> int:
    """Count the FLOPs of one execution's matrix products, those of fused computations included, loops not entered."""
    if instruction.opcode == 'fusion':
        fused = hlo.attribute(instruction, 'calls')
        return sum(flops(module, fused, inside) for inside in module.computations[fused])
    if is_kernel(instruction):
        found = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
        return int(found[1]) if found else 0
    if instruction.opcode not in ('convolution', 'dot'):
        return 0
    types = {other.name: other.type for other in module.computations[computation]}
    left, right = (hlo.arrays(types[name])[0].shape for name in instruction.operands[:2])
    result = hlo.arrays(instruction.type)[0].shape
    return (of_dot if instruction.opcode == 'dot' else of_convolution)(instruction.attributes, left, right, result)


def of_dot(attributes: str, left, right, result) -> int:
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', attributes)[1]
    return 2 * int(np.prod(result)) * int(np.prod([left[int(dim)] for dim in contracted.split(',') if dim]))


def of_convolution(attributes: str, left, right, result) -> int:
    """Count two for every product of an element of the input, no padding or hole, with one of the kernel."""
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes).groups()
    size = lambda array, shape, label: shape[labels[array].index(label)]
    window = dict(part.split('=') for part in (re.search(r'window=\{([^}]*)\}', attributes) or ['', ''])[1].split())
    spatial = sum(label.isdigit() for label in labels[2])
    values = lambda name, default: window.get(name, 'x'.join([default] * spatial)).split('x')
    total = 2 * size(2, result, 'b') * size(2, result, 'f') * size(1, right, 'i')
    for dim in range(spatial):
        stride, hole, spread = (int(values(name, '1')[dim]) for name in ('stride', 'lhs_dilate', 'rhs_dilate'))
        low = int(values('pad', '0_0')[dim].split('_')[0])
        place = (np.arange(size(2, result, str(dim)))[:, None] * stride - low
                 + np.arange(size(1, right, str(dim))) * spread)
        inside = (place >= 0) & (place <= (size(0, left, str(dim)) - 1) * hole) & (place % hole == 0)
        total *= int(inside.sum())
    return total


def hbm_bytes(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> int:
    """Count the bytes that one execution reads from and writes to HBM, at the least; loops are not entered."""
    opcode = instruction.opcode
    if opcode in (*hlo.CONTROL, *hlo.FREE, *VIEWS, 'partition-id', 'replica-id') \
            or opcode == 'custom-call' and not is_kernel(instruction):
        return 0
    types = {other.name: other.type for other in module.computations[computation]}
    read = collections.Counter()
    for place, name in enumerate(instruction.operands):
        read[name] += 0 if opcode.endswith('-done') else read_of(module, computation, instruction, place)
    return (sum(min(in_hbm(types[name]), bytes_) for name, bytes_ in read.items())
            + (0 if opcode.endswith('-start') else written(module, computation, instruction)))


def in_hbm(type_: str) -> int:
    return sum(array.bytes for array in hlo.arrays(type_) if array.hbm)


def read_of(module: hlo.Module, computation: str, instruction: hlo.Instruction, place: int) -> int:
    """Count the bytes that an instruction reads of its operand number `place`."""
    types = {other.name: other.type for other in module.computations[computation]}
    opcode, whole = instruction.opcode, hlo.size(types[instruction.operands[place]])
    if opcode.removesuffix('-start') in SLICES and place == 0:
        return hlo.arrays(instruction.type)[1 if opcode.endswith('-start') else 0].bytes
    updated = opcode in ('dynamic-update-slice', 'scatter') and place == 0
    if updated or opcode == 'tuple' or advances(module, computation, instruction):
        return 0
    if opcode == 'fusion':
        fused = hlo.attribute(instruction, 'calls')
        inside = next(other for other in module.computations[fused]
                      if other.opcode == 'parameter' and other.arguments == str(place))
        return min(whole, uses(module, fused, inside.name))
    if opcode in VIEWS:
        return min(whole, uses(module, computation, instruction.name))
    return whole


def uses(module: hlo.Module, computation: str, name: str) -> int:
    """Count the bytes that the instructions of a fused computation read of one of its values."""
    return sum(read_of(module, computation, user, place) for user in module.computations[computation]
               for place, operand in enumerate(user.operands) if operand == name)


def written(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> int:
    """Count the bytes of an instruction's results that it writes to HBM."""
    if instruction.opcode != 'fusion':
        return update(module, computation, instruction) if in_hbm(instruction.type) else 0
    fused = hlo.attribute(instruction, 'calls')
    values = {inside.name: inside for inside in module.computations[fused]}
    root = next(inside for inside in module.computations[fused] if inside.root)
    results = [values[name] for name in root.operands] if root.opcode == 'tuple' else [root]
    total = 0
    for result, array in zip(results, hlo.arrays(instruction.type), strict=False):
        while result.opcode == 'bitcast':
            result = values[result.operands[0]]
        if array.hbm and result.opcode != 'parameter':
            total += update(module, fused, result)
    return total


def update(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> int:
    """Count the bytes that an instruction writes, wherever its result is."""
    types = {other.name: other.type for other in module.computations[computation]}
    if instruction.opcode == 'dynamic-update-slice':
        return hlo.size(types[instruction.operands[1]])
    if instruction.opcode == 'scatter':
        return hlo.size(types[instruction.operands[-1]])
    return 0 if advances(module, computation, instruction) else hlo.size(instruction.type)


def advances(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> bool:
    """Say whether an instruction goes on with a collective that an earlier one started, which has its bytes."""
    return instruction.opcode in KINDS and CHAIN in instruction.attributes \
        and not starts(module.computations[computation])
