"""Time a case: by the compiler's schedule, or by the clock on a TPU.  Before: cases.py; next: attention.py, tune.py."""
import collections
import glob
import re
import tempfile

import jax
import numpy as np

from instruments.bench.cases import Case, abstract_inputs, inputs
from instruments.kernel_time.static_cost import static_time
from instruments.tpu import chips
from instruments.tpu.step_cost import step_cost
from mistake import Mistake


def static_row(case: Case, shape, backward: bool, target: str) -> dict:
    """Time a case by the compiler's schedule (kernel_time/static_cost.py), and say what binds it."""
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
    """Time a case's kernels with the device profiler on the attached TPU: median and 90th percentile of the calls, ms.

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
        times = kernel_durations(jax.profiler.ProfileData.from_file(path), names)
    if set(map(len, times.values())) != {repeats} or len(times) != len(names):
        found = {name: len(found) for name, found in times.items()}
        raise Mistake(f'the profile has {found} executions of {names=}, not {repeats} of each')
    calls = np.sum(list(times.values()), axis=0) * 1e-6 + case.extra_bytes / attached_chip().hbm_bandwidth * 1e3
    return dict(method='wall clock', ms=float(np.median(calls)), ms_p90=float(np.percentile(calls, 90)), calls=repeats)


def kernel_durations(profile, names, planes: str = '/device:TPU', lines: str = 'XLA Ops') -> dict[str, list[float]]:
    """Read the nanoseconds of every execution of the named kernels, in order, from a profile of one device."""
    times = collections.defaultdict(list)
    for plane in profile.planes:
        for line in plane.lines if plane.name.startswith(planes) else ():
            for event in line.events if line.name == lines else ():
                name = re.match(r'%?([\w.\-]+)', event.name)
                if name and name[1] in names:
                    times[name[1]].append(event.duration_ns)
    return dict(times)


def attached_chip() -> chips.Chip:
    """Find the chip of this machine.

    Raises:
      ValueError: there is none.
    """
    device = jax.devices()[0]
    if device.platform != 'tpu':
        raise Mistake(f"{device.platform=}: no TPU is attached, and a kernel's time in interpret mode says nothing; "
                         'pass --target=v5e,v6e for static figures')
    return chips.find(device.device_kind)
