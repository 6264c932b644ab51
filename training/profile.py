"""Trace some steps with JAX's profiler, for TensorBoard.  Next: loop.py, which calls it.

The names in a trace are the code's own: attention and ffn (with qkv, rope, gate_up, ..) of model/llama.py, loss and
optimizer of training/step.py; `transpose(jvp(ffn))` is the backward pass of ffn.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


class Trace:
    """Write a trace of the micro-steps `steps` to `directory`.  say: receives the line that tells where it is."""

    def __init__(self, directory: Path, steps: range, say: Callable[[str], None]):
        self._directory, self._steps, self._say, self._running = directory, steps, say, False

    @contextmanager
    def step(self, n: int, before) -> Iterator[None]:
        """Surround micro-step n, which is the first one to be traced or a later one; before: results to wait for."""
        if n in self._steps and not self._running:
            jax.block_until_ready(before)  # the step in flight belongs to no trace
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's own calls would be most of the file
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._running = True
        with jax.profiler.StepTraceAnnotation('train', step_num=n):
            yield

    def end(self, n: int, results) -> None:
        """Write the trace if step n, whose results these are, is its last."""
        if self._running and n == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Write the trace if it is running: also of a run that stops in its middle."""
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._steps = False, range(0)
            self._say(f'wrote a profile to {self._directory}: tensorboard --logdir={self._directory} shows it '
                      '(pip install tensorboard xprof)')
