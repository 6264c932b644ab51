"""Time the attention kernels, ours and the shipped ones, each checked first, and write rows, a table and a roofline.

    python -m instruments.bench.attention --target=v5e,v6e       static figures, on any machine (needs libtpu)
    python -m instruments.bench.attention                                    wall clock, on a machine with a TPU
    python -m instruments.bench.attention --target=v5e --shapes=s1,s4 --kernels=ours,splash --passes=forward

Static figures are the compiler's schedule, not a measurement (kernel_time/static_cost.py states the model and its
error).  Wall clock is the device profiler's time of the kernels alone, the median of many calls; that part has not been
run: it was written on a machine without a TPU.  The time of a kernel in interpret mode is never taken.

Before ours is timed it must agree with kernels/reference.py on a small version of the shape: on the TPU, or else in
interpret mode.  The shipped kernels are checked on a TPU only.  They are timed with every tiling of a stated grid
(anchors.py), ours with the tuned tiles; the table shows the best.

FLOPs are the useful ones: causal forward 4 B H D T (T+1) / 2, backward 2.5 times that; a kernel that multiplies masked
scores gets nothing for it.  Bytes are the least that must cross HBM.  `rows.jsonl` in --output has one row for each
kernel, shape, pass, tiling and chip; a row that is there already, of the same sources (the kernel's and the
instruments') and versions, is not timed again.
"""
import dataclasses
import datetime
import itertools
import json
import pathlib

import jax
import numpy as np
from absl import flags
from jax.experimental.pallas import tpu as pltpu

from instruments.bench import anchors, command_line, report, shapes
from instruments.bench.cases import Case, inputs, ours, takes, with_gradient
from instruments.bench.shapes import AttentionShape, DecodeShape
from instruments.bench.timing import attached_chip, static_row, wall_clock_row
from instruments.sources import digest, version
from instruments.tpu import chips
from kernels.reference import attention, decode_attention
from mistake import Mistake

SHAPES = [name for name in (*shapes.ATTENTION, *shapes.DECODE) if not name.startswith('tiny')]
KERNELS = ['ours', *anchors.ATTENTION, *anchors.DECODE]
PASSES = ['forward', 'backward']
OURS = ('kernels/flash_attention.py', 'kernels/tiles.py', 'kernels/decode_attention.py', 'kernels/decode_walk.py')
TUNED = 'kernels/tuned.py', 'kernels/tuned_tiles.json'
TIMED_BY = ('kernels/reference.py', 'instruments/tpu', 'instruments/kernel_time',
            'instruments/bench/caches.py', 'instruments/bench/cases.py', 'instruments/bench/shapes.py',
            'instruments/bench/timing.py')
MOST_ERROR = 0.01  # relative RMS; bfloat16 attention is at 0.002 to 0.004, a wrong mask or scale at 0.05 and more


def make_case(kernel: str, shape, backward: bool, tiles) -> Case:
    """Make a kernel's case at a shape."""
    if kernel == 'ours':
        return ours(shape, backward)
    if isinstance(shape, AttentionShape):
        return anchors.ATTENTION[kernel][0](shape, backward, tiles)
    return anchors.DECODE[kernel][0](shape, tiles)


def tilings(kernel: str, shape, backward: bool) -> list:
    """List the tiles to time; None: those that our kernel chooses itself.  Empty where the kernel does not apply."""
    attends = isinstance(shape, AttentionShape)
    if kernel == 'ours':
        return [None] if takes(shape, backward) else []
    if kernel not in (anchors.ATTENTION if attends else anchors.DECODE) or (backward and not attends):
        return []
    return anchors.grid(kernel, shape) if anchors.installed(kernel) else []


# ---------------------------------------------------------------- the check

def small(shape):
    """Make a shape small enough for the reference and interpret mode: few rows and heads, not too long."""
    K = min(shape.K, 2)
    heads = dict(B=2 if isinstance(shape, DecodeShape) else 1, H=shape.H // shape.K * K, K=K)
    if isinstance(shape, DecodeShape):
        return dataclasses.replace(shape, S=min(shape.S, 512), **heads)
    return dataclasses.replace(shape, T=shape.T if shape.T <= 1100 else shape.T // 2, **heads)


def expected(shape, arrays, integers):
    """Compute the reference's output, or its gradients, in float32."""
    if isinstance(shape, DecodeShape):
        return decode_attention(*arrays, integers[-1], scale=shape.D ** -0.5)
    # every key is at position 0 where nothing is hidden
    positions_BT = np.tile(np.arange(shape.T, dtype=np.int32), (shape.B, 1))
    forward = reference(shape, positions_BT, integers[0] if shape.segments else None)
    return jax.jit(with_gradient(forward, len(arrays) == 4))(*arrays)


def reference(shape, positions_BT, segments_BT):
    """Make the function (q, k, v) -> o of kernels/reference.py at a shape."""
    def call(q_BTHD, k_BSKD, v_BSKD):
        B, S = k_BSKD.shape[:2]
        key_positions_BS = np.tile(np.arange(S, dtype=np.int32) * shape.causal, (B, 1))
        ones = lambda length: np.ones((B, length), np.int32)
        return attention(q_BTHD, k_BSKD, v_BSKD, scale=shape.D ** -0.5, query_positions_BT=positions_BT,
                         key_positions_BS=key_positions_BS,
                         query_segments_BT=ones(q_BTHD.shape[1]) if segments_BT is None else segments_BT,
                         key_segments_BS=ones(S) if segments_BT is None else segments_BT)
    return call


def check(case: Case, shape, backward: bool) -> float:
    """Compute the relative RMS error of a case against the reference; of gradients the largest.

    Raises:
      ValueError: it is above MOST_ERROR.
    """
    arrays = inputs(shape, backward)
    out = case.restore(jax.jit(case.function)(*case.arrange(*arrays), *case.integers))
    truth = expected(shape, [np.asarray(x, np.float32) for x in arrays], case.integers)
    errors = [float(np.sqrt(np.mean((np.asarray(x, np.float32) - y) ** 2) / np.mean(np.asarray(y) ** 2)))
              for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(truth), strict=True)]
    if not max(errors) <= MOST_ERROR:  # also NaN
        raise Mistake(f'the kernel differs from kernels/reference.py at {shape}: relative RMS {errors}')
    return max(errors)


# ---------------------------------------------------------------- rows

def sources(kernel: str) -> str:
    """Hash what a kernel's time follows from: its own source, and what makes, checks and times a case."""
    return digest(*TIMED_BY, *((*OURS, *TUNED) if kernel == 'ours' else ('instruments/bench/anchors.py',)))


def describe(name: str, shape, kernel: str, pass_: str, tiles, target: str) -> dict:
    """Say what a row is about; with the versions and the sources it is the row's key."""
    return dict(shape=name, **{'pass': pass_}, kernel=kernel, tiles=list(tiles) if tiles else 'tuned', target=target,
                device=jax.devices()[0].device_kind if target == 'attached' else None,
                dimensions=dataclasses.asdict(shape), jax=jax.__version__, libtpu=version('libtpu'),
                tokamax=version('tokamax') if kernel == 'tokamax' else None, source=sources(kernel))


def time_row(shape, kernel: str, backward: bool, tiles, target: str) -> dict:
    """Check and time one kernel; a kernel that the compiler refuses gives a row with its error."""
    on_tpu = target == 'attached'
    row = {}
    if kernel == 'ours' or on_tpu:
        checked = small(shape) if kernel == 'ours' else dataclasses.replace(shape, B=1)
        interpret = False if on_tpu else pltpu.InterpretParams()
        case = ours(checked, backward, interpret) if kernel == 'ours' else make_case(kernel, checked, backward, tiles)
        row['error_rms'] = check(case, checked, backward)
    case = make_case(kernel, shape, backward, tiles)
    chip = attached_chip() if on_tpu else chips.find(target)
    try:
        row |= wall_clock_row(case, shape, backward) if on_tpu else static_row(case, shape, backward, target)
    except jax.errors.JaxRuntimeError as error:  # most often: the tiles do not fit VMEM
        return row | dict(error=str(error)[:300])
    if isinstance(shape, AttentionShape):
        flops, least = shapes.attention_flops(shape, backward), shapes.attention_bytes(shape, backward)
    else:
        flops, least = shapes.decode_flops(shape), shapes.decode_bytes(shape)
    seconds = row['ms'] * 1e-3
    return row | dict(chip=chip.name, flops=flops, least_bytes=least, tflops=flops / seconds / 1e12,
                      percent_of_peak=100 * flops / seconds / chip.peak_flops,
                      percent_of_hbm=100 * least / seconds / chip.hbm_bandwidth)


def run(names, kernels, passes, targets, output: pathlib.Path) -> list[dict]:
    """Time what is not in `output`/rows.jsonl yet; returns the rows asked for."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / 'rows.jsonl'
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = []
    for name, pass_, kernel in itertools.product(names, passes, kernels):
        shape, backward = shapes.ATTENTION.get(name) or shapes.DECODE[name], pass_ == 'backward'
        for tiles, target in itertools.product(tilings(kernel, shape, backward), targets):
            about = describe(name, shape, kernel, pass_, tiles, target)
            row = next((row for row in known if about.items() <= row.items()), None)
            if row is None:
                row = about | time_row(shape, kernel, backward, tiles, target)
                row['date'] = datetime.date.today().isoformat()
                with path.open('a') as file:
                    file.write(json.dumps(row) + '\n')
                print(report.line(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    flag = flags.FLAGS
    unknown = ((set(flag.shapes) - set(SHAPES)) | (set(flag.kernels) - set(KERNELS)) | (set(flag.passes) - set(PASSES)))
    if unknown:
        raise Mistake(f'{sorted(unknown)} is none of {SHAPES=}, {KERNELS=}, {PASSES=}')
    if flag.target:
        jax.config.update('jax_platforms', 'cpu')  # only compiled for, and checked in interpret mode
    else:
        attached_chip()
    output = pathlib.Path(flag.output)
    rows = run(flag.shapes, flag.kernels, flag.passes, flag.target or ['attached'], output)
    (output / 'table.md').write_text(report.table(rows))
    report.roofline(rows, output / 'roofline.png')
    print((output / 'table.md').read_text())


if __name__ == '__main__':
    flags.DEFINE_list('target', [], 'chips to compile for (static figures); empty: wall clock on the attached TPU')
    flags.DEFINE_list('shapes', SHAPES, 'names of instruments/bench/shapes.py')
    flags.DEFINE_list('kernels', KERNELS, 'kernels to time')
    flags.DEFINE_list('passes', PASSES, 'forward, backward')
    flags.DEFINE_string('output', 'runs/benchmark', 'folder of rows.jsonl, table.md and roofline.png')
    command_line.run(main)
