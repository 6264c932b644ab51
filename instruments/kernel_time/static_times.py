"""Compute static times of the training kernels at one device's shapes, from a process of their own.

    flash_times('v5e', B=2, T=1024, H=16, K=16, D=100, dtype='bfloat16')   # {'forward': 0.00013, 'backward': 0.00031}

The compiler writes the schedules that a static time is read from only where it is told to before it is loaded, and then
it writes those of everything that the process compiles: gigabytes for a training step.  So a program that compiles
a step asks for its kernels' times here, and `python -m instruments.kernel_time.static_times '{"chip": "v5e", …}'`
compiles them apart.  static_cost.py says what such a time is, and what it is not.
"""
import functools
import json
import os
import pathlib
import subprocess
import sys


@functools.cache
def flash_times(chip: str, B: int, T: int, H: int, K: int, D: int, dtype: str, segments: int = 0) -> dict[str, float]:
    """Compute the seconds of one execution of flash_forward and of flash_backward, causal, with the tuned tiles.

    Args:
      chip: 'v5e', or a slice's name.
      B, H, K: of one device: rows, query heads and key/value heads after sharding.
      segments: examples packed into a row; 0: the kernel is called without segments.

    Raises:
      ValueError: the shapes do not fit each other, libtpu is missing, or the compiler refuses the kernels.
    """
    wanted = dict(chip=chip, B=B, T=T, H=H, K=K, D=D, dtype=str(dtype), segments=segments)
    apart = {name: value for name, value in os.environ.items() if name != 'LIBTPU_INIT_ARGS'} | {'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run([sys.executable, '-m', 'instruments.kernel_time.static_times', json.dumps(wanted)], env=apart,
                          cwd=pathlib.Path(__file__).parent.parent.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f'no static time of flash attention for {wanted}: {done.stderr.strip()[-500:]}')
    return json.loads(done.stdout.splitlines()[-1])


def compile_and_time(chip: str, segments: int, **sizes) -> dict[str, float]:
    """Compute the same in this process, which must not have loaded libtpu yet."""
    from instruments.bench.cases import abstract_inputs, ours
    from instruments.bench.shapes import AttentionShape
    from instruments.kernel_time.static_cost import static_time

    shape = AttentionShape(segments=segments, **sizes)
    case = ours(shape, backward=True)
    static = static_time(chip, case.function, *abstract_inputs(shape, backward=True), *case.integers)
    return {kind: kernel.ms * 1e-3 for kernel in static.kernels for kind in ('forward', 'backward')
            if f'flash_{kind}' in kernel.name}


if __name__ == '__main__':
    print(json.dumps(compile_and_time(**json.loads(sys.argv[1]))))
