"""Compile our kernels at every shape of instruments/bench/shapes.py, forward and backward, for every chip, with no TPU.

    python -m instruments.bench.compile_all --target=v4,v5e,v5p,v6e

Prints one line each (code and temporary bytes, or the compiler's error) and fails if any was refused.
"""
import itertools

import jax
from absl import flags

from instruments.bench import command_line, shapes
from instruments.bench.cases import abstract_inputs, ours, takes
from instruments.bench.shapes import AttentionShape, DecodeShape
from instruments.tpu.compile import compile_for


def compile_shape(name: str, shape: AttentionShape | DecodeShape, backward: bool, target: str) -> str | None:
    """Compile our kernel at a shape; returns the compiler's error, or None."""
    case = ours(shape, backward)
    arranged = jax.eval_shape(case.arrange, *abstract_inputs(shape, backward))
    try:
        compiled = compile_for(target, case.function, *arranged, *case.integers)
    except jax.errors.JaxRuntimeError as error:
        return str(error)[:300]
    if 'tpu_custom_call' not in compiled.text:
        return 'the program has no Pallas kernel'
    kind = 'decode' if isinstance(shape, DecodeShape) else 'backward' if backward else 'forward'
    print(f'{target:4s} {name:20s} {kind:8s} code {compiled.code_bytes:>9,d} B  '
          f'temporaries {compiled.temporary_bytes:>13,d} B', flush=True)
    return None


def main() -> None:
    jax.config.update('jax_platforms', 'cpu')  # only compiled for
    refused = []
    wanted = [*shapes.ATTENTION.items(), *shapes.DECODE.items()]
    wanted = [(name, shape) for name, shape in wanted if not flags.FLAGS.shapes or name in flags.FLAGS.shapes]
    for target, (name, shape), backward in itertools.product(flags.FLAGS.target, wanted, (False, True)):
        if not takes(shape, backward):
            continue
        error = compile_shape(name, shape, backward, target)
        if error:
            refused.append(f'{target} {name} {"backward" if backward else "forward"}: {error}')
            print(refused[-1], flush=True)
    if refused:
        raise SystemExit(f'{len(refused)} refused:\n' + '\n'.join(refused))


if __name__ == '__main__':
    flags.DEFINE_list('target', ['v4', 'v5e', 'v5p', 'v6e'], 'chips to compile for')
    flags.DEFINE_list('shapes', [], 'names of instruments/bench/shapes.py; empty: all')
    command_line.run(main)
