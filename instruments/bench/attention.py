"""Time the attention kernels, ours and the shipped ones, each checked first, and write rows, a table and a roofline.

    python -m instruments.bench.attention --target=v5e,v6e       static figures, on any machine (needs libtpu)
    python -m instruments.bench.attention                                    wall clock, on a machine with a TPU
    python -m instruments.bench.attention --target=v5e --shapes=s1,s4 --kernels=ours,splash --passes=forward

Static figures are the compiler's schedule, not a measurement (tpu/static_cost.py states the model and its error).  Wall
clock is the device profiler's time of the kernels alone, the median of many calls; that part has not been run: it was
written on a machine without a TPU.  The time of a kernel in interpret mode is never taken.

Before ours is timed it must agree with kernels/reference.py on a small version of the shape: on the TPU, or else in
interpret mode.  The shipped kernels are checked on a TPU only.  They are timed with every tiling of a stated grid
(kernels/anchors.py), ours with the tuned tiles; the table shows the best.

FLOPs are the useful ones: causal forward 4 B H D T (T+1) / 2, backward 2.5 times that; a kernel that multiplies masked
scores gets nothing for it.  Bytes are the least that must cross HBM.  `rows.jsonl` in --output has one row for each
kernel, shape, pass, tiling and chip; a row that is there already, of the same source and versions, is not timed again.
"""
import collections
import dataclasses
import datetime
import glob
import hashlib
import importlib.metadata
import json
import pathlib
import re
import tempfile

import jax
import numpy as np
from absl import app, flags
from jax.experimental.pallas import tpu as pltpu

from instruments.bench import anchors, caches, report, shapes
from instruments.bench.anchors import Case, with_gradient
from instruments.bench.shapes import AttentionShape, DecodeShape
from instruments.kernel_time.static_cost import static_time
from instruments.tpu.step_cost import step_cost
from kernels import chips
from kernels import decode_attention as decode
from kernels.flash_attention import flash_attention
from kernels.reference import attention, decode_attention
from mistake import Mistake

SHAPES = [name for name in (*shapes.ATTENTION, *shapes.DECODE) if not name.startswith('tiny')]
KERNELS = ['ours', *anchors.ATTENTION, *anchors.DECODE]
PASSES = ['forward', 'backward']
NOT_FORWARD = '^(?!.*(fwd|forward))'  # a gradient's program runs the forward kernel too
MOST_ERROR = 0.01  # relative RMS; bfloat16 attention is at 0.002 to 0.004, a wrong mask or scale at 0.05 and more


def ours(shape: AttentionShape | DecodeShape, backward: bool, interpret=False, tiles=None) -> Case:
    """Our kernel at a shape, with its tuned tiles or others."""
    scale = shape.D ** -0.5
    if isinstance(shape, AttentionShape):
        def forward(q, k, v, segments_BT=None):
            return flash_attention(q, k, v, segments_BT, scale=scale, causal=shape.causal, tiles=tiles,
                                   interpret=interpret)

        integers = (shapes.segment_ids(shape),) if shape.segments else ()
        return Case(with_gradient(forward, backward), integers=integers, only=NOT_FORWARD if backward else '')
    lengths_B, options = shapes.lengths(shape), dict(kv_heads=shape.K, scale=scale, tiles=tiles, interpret=interpret)
    if not shape.page:
        return Case(lambda q, k, v, lengths_B: decode.decode_attention(q, k, v, lengths_B, **options),
                    arrange=lambda q, k, v: (q, caches.make_cache(k), caches.make_cache(v)), integers=(lengths_B,))
    table_BP = shapes.page_table(shape)
    return Case(lambda q, pages, *integers: decode.paged_decode_attention(q, pages, *integers, **options),
                arrange=lambda q, k, v: (q, caches.make_pages(k, v, table_BP, shape.page)),
                integers=(table_BP, lengths_B))


def make_case(kernel: str, shape, backward: bool, tiles) -> Case:
    if kernel == 'ours':
        return ours(shape, backward)
    if isinstance(shape, AttentionShape):
        return anchors.ATTENTION[kernel][0](shape, backward, tiles)
    return anchors.DECODE[kernel][0](shape, tiles)


def tilings(kernel: str, shape, backward: bool) -> list:
    """The tiles to time; None: those that our kernel chooses itself.  Empty where the kernel does not apply."""
    attends = isinstance(shape, AttentionShape)
    if kernel == 'ours':
        # int8 caches have factors beside them, which no case here makes
        return [None] if attends or not (backward or shape.cache_dtype == 'int8') else []
    if kernel not in (anchors.ATTENTION if attends else anchors.DECODE) or (backward and not attends):
        return []
    return anchors.grid(kernel, shape) if anchors.installed(kernel) else []


# ---------------------------------------------------------------- the check

def small(shape):
    """A shape like the given one that the reference and interpret mode can bear: few rows and heads, not too long."""
    K = min(shape.K, 2)
    heads = dict(B=2 if isinstance(shape, DecodeShape) else 1, H=shape.H // shape.K * K, K=K)
    if isinstance(shape, DecodeShape):
        return dataclasses.replace(shape, S=min(shape.S, 512), **heads)
    return dataclasses.replace(shape, T=shape.T if shape.T <= 1100 else shape.T // 2, **heads)


def expected(shape, arrays, integers):
    """The reference's output, or its gradients, in float32."""
    if isinstance(shape, DecodeShape):
        return decode_attention(*arrays, integers[-1], scale=shape.D ** -0.5)
    # every key is at position 0 where nothing is hidden
    positions_BT = np.tile(np.arange(shape.T, dtype=np.int32), (shape.B, 1))
    forward = reference(shape, positions_BT, integers[0] if shape.segments else None)
    return jax.jit(with_gradient(forward, len(arrays) == 4))(*arrays)


def reference(shape, positions_BT, segments_BT):
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
    """The relative RMS error of a case against the reference; the larger of the gradients'.

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


def inputs(shape, backward: bool):
    """q, k, v, and for the backward pass do."""
    if isinstance(shape, DecodeShape):
        return shapes.decode_inputs(shape)[:3]
    q, k, v, _ = shapes.attention_inputs(shape)
    return (q, k, v, shapes.attention_inputs(shape, seed=1)[0]) if backward else (q, k, v)


def abstract_inputs(shape, backward: bool):
    queries = (shape.B, shape.H, shape.D) if isinstance(shape, DecodeShape) else (shape.B, shape.T, shape.H, shape.D)
    keys = (shape.B, shape.S if isinstance(shape, DecodeShape) else shape.T, shape.K, shape.D)
    return [jax.ShapeDtypeStruct(x, shape.dtype) for x in (queries, keys, keys, queries)[:4 if backward else 3]]


# ---------------------------------------------------------------- the time

def static_row(case: Case, shape, backward: bool, target: str) -> dict:
    """What the compiler's schedule says."""
    arranged = jax.eval_shape(case.arrange, *abstract_inputs(shape, backward))
    static = static_time(target, case.function, *arranged, *case.integers, only=case.only)
    extra = case.extra_bytes / static.chip.hbm_bandwidth * 1e3
    hot = static.hot
    return dict(method='static', ms=static.ms + extra, extra_ms=extra, stall_ms=static.stall_ms, dma_ms=static.dma_ms,
                hbm_bytes=static.hbm_bytes + case.extra_bytes, outside_ms=static.outside_ms, mxu=round(static.mxu, 3),
                bundles=static.bundles, spills=static.spills, vmem_bytes=static.vmem_bytes, warnings=static.warnings,
                hot=dict(share=round(hot.share, 3), bundles=hot.bundles, executions=hot.executions, bound=hot.bound,
                         empty=round(hot.empty, 3), units=hot.units))


def wall_clock_row(case: Case, shape, backward: bool, repeats: int = 50) -> dict:
    """The device profiler's time of a case's kernels on the attached TPU: median and 90th percentile of the calls.

    The calls follow each other on the device; whatever else the program does there (layout copies) is not counted.
    """
    arguments = jax.device_put((*jax.jit(case.arrange)(*inputs(shape, backward)), *case.integers))
    compiled = jax.jit(case.function).lower(*arguments).compile()
    names = [name for name in step_cost(compiled.as_text()).kernels if re.search(case.only, name)]
    jax.block_until_ready(compiled(*arguments))  # the first call loads the program
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(compiled(*arguments))
        path, = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
        times = kernel_times(jax.profiler.ProfileData.from_file(path), names)
    if set(map(len, times.values())) != {repeats} or len(times) != len(names):
        found = {name: len(found) for name, found in times.items()}
        raise Mistake(f'the profile has {found} executions of {names=}, not {repeats} of each')
    calls = np.sum(list(times.values()), axis=0) * 1e-6 + case.extra_bytes / attached_chip().hbm_bandwidth * 1e3
    return dict(method='wall clock', ms=float(np.median(calls)), ms_p90=float(np.percentile(calls, 90)), calls=repeats)


def kernel_times(profile, names, planes: str = '/device:TPU', lines: str = 'XLA Ops') -> dict[str, list[float]]:
    """The nanoseconds of every execution of the named kernels, in order, from a profile of one device."""
    times = collections.defaultdict(list)
    for plane in profile.planes:
        for line in plane.lines if plane.name.startswith(planes) else ():
            for event in line.events if line.name == lines else ():
                name = re.match(r'%?([\w.\-]+)', event.name)
                if name and name[1] in names:
                    times[name[1]].append(event.duration_ns)
    return dict(times)


def attached_chip() -> chips.Chip:
    """The chip of this machine.

    Raises:
      ValueError: there is none.
    """
    device = jax.devices()[0]
    if device.platform != 'tpu':
        raise Mistake(f"{device.platform=}: no TPU is attached, and a kernel's time in interpret mode says nothing; "
                         'pass --target=v5e,v6e for static figures')
    return chips.find(device.device_kind)


# ---------------------------------------------------------------- rows

def sources(*more: str) -> str:
    """What ours consists of: a kernel that was changed is timed again."""
    folder = pathlib.Path(__file__).parent.parent.parent / 'kernels'
    names = ('flash_attention.py', 'tiles.py', 'decode_attention.py', 'decode_walk.py', *more)
    return hashlib.sha256(b''.join((folder / name).read_bytes() for name in names)).hexdigest()[:16]


def describe(name: str, shape, kernel: str, pass_: str, tiles, target: str) -> dict:
    """What a row is about; with the versions and our source it is the row's key."""
    return dict(shape=name, **{'pass': pass_}, kernel=kernel, tiles=list(tiles) if tiles else 'tuned', target=target,
                device=jax.devices()[0].device_kind if target == 'attached' else None,
                dimensions=dataclasses.asdict(shape), jax=jax.__version__, libtpu=version('libtpu'),
                source={'ours': sources('tuned.py', 'tuned_tiles.json'), 'tokamax': version('tokamax')}.get(kernel))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    for name in names:
        shape = shapes.ATTENTION.get(name) or shapes.DECODE[name]
        for pass_ in passes:
            for kernel in kernels:
                for tiles in tilings(kernel, shape, pass_ == 'backward'):
                    for target in targets:
                        about = describe(name, shape, kernel, pass_, tiles, target)
                        row = next((row for row in known if about.items() <= row.items()), None)
                        if row is None:
                            row = about | time_row(shape, kernel, pass_ == 'backward', tiles, target)
                            row['date'] = datetime.date.today().isoformat()
                            with path.open('a') as file:
                                file.write(json.dumps(row) + '\n')
                            print(report.line(row), flush=True)
                        rows.append(row)
    return rows


def main(argv):
    if len(argv) > 1:
        raise Mistake(f'{argv[1:]=}: every argument is a flag, --name=value')
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
    flags.DEFINE_list('shapes', SHAPES, 'names of kernels/shapes.py')
    flags.DEFINE_list('kernels', KERNELS, 'kernels to time')
    flags.DEFINE_list('passes', PASSES, 'forward, backward')
    flags.DEFINE_string('output', 'runs/benchmark', 'folder of rows.jsonl, table.md and roofline.png')
    app.run(main)
