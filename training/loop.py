"""The loop around the step: batches in, log lines and checkpoints out.  Before: training/step.py."""
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from data.batches import Batch
from model.partition import BATCH
from training.metrics import MetricsWriter
from training.state import TrainState


class Step(Protocol):
    """A training step (training/step.py makes one); metrics are scalars.  compile_seconds: spent compiling so far."""

    compile_seconds: float

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]: ...


class Schedule(NamedTuple):
    """Which micro-steps do what.  Steps count from 0.  save_every: saved at every multiple of one of these; 0 is none
    (the caller saves the end).
    """

    start_step: int
    total_steps: int
    log_every: int
    save_every: tuple[int, ...]


def put(batch: Batch, mesh: Mesh) -> Batch:
    """Put the batch on the mesh, rows split over dp and fsdp.  Every process has all of it and puts its own rows."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows]), batch)


def train(state: TrainState, batches: Iterator[Batch], step: Step, mesh: Mesh, schedule: Schedule,
          writer: MetricsWriter, *, data_position: Callable[[], dict], save: Callable[[TrainState, int], None],
          evaluate: Callable[[TrainState], dict] | None = None) -> TrainState:
    """Run micro-steps start_step..total_steps-1 and return the last state.

    `save(state, n)` is called with the number n of steps done.  `data_position()` is added to each logged row.  One
    step is kept in flight: the host prepares batch n + 1 while the devices compute step n, and never runs further
    ahead.  tokens_per_second counts steps only: compiling, evaluating and saving are left out of its time.
    Raises FloatingPointError, before anything is saved, when a logged loss or gradient norm is not finite.
    """
    start, total = schedule.start_step, schedule.total_steps
    with tqdm(total=total, initial=start, desc='train', unit='step', mininterval=0.5,
              disable=not writer.enabled) as bar:
        began = time.perf_counter()
        since, compiled, tokens, previous = began, step.compile_seconds, 0, None  # of the interval that is logged next
        for n in range(start, total):
            batch = next(batches)
            tokens += batch.tokens_BT.size if batch.segments_BT is None else int(np.count_nonzero(batch.segments_BT))
            position = data_position()
            state, metrics = step(state, put(batch, mesh))
            if previous is not None:
                jax.block_until_ready(previous)
            previous = metrics
            done = n + 1
            if n % schedule.log_every == 0 or done == total:
                row = {name: float(value) for name, value in metrics.items()}
                now = time.perf_counter()
                stepping = now - since - (step.compile_seconds - compiled)
                row |= dict(tokens_per_second=round(tokens / stepping, 1),
                            seconds=round(writer.seconds_before + now - began, 3))
                check_finite(row, n)
                if evaluate:
                    row |= evaluate(state)
                writer.write(n, row | position)
                shown = dict(loss=f'{row["loss"]:.4f}', accuracy=f'{row["accuracy"]:.3f}',
                             lr=f'{row["learning_rate"]:.2g}', tok_s=f'{row["tokens_per_second"]:.0f}')
                shown |= {name: f'{row[name]:.4f}' for name in ('eval_loss', 'eval_accuracy') if name in row}
                bar.set_postfix(shown)
                since, compiled, tokens = time.perf_counter(), step.compile_seconds, 0
            bar.update()
            if done < total and any(every and done % every == 0 for every in schedule.save_every):
                check_finite({name: float(value) for name, value in metrics.items()}, n)
                saving = time.perf_counter()
                save(state, done)
                since += time.perf_counter() - saving
    return state


def check_finite(row: dict, step: int) -> None:
    """Raise FloatingPointError unless loss and norms are finite."""
    bad = [name for name in ('loss', 'gradient_norm', 'param_norm') if not math.isfinite(row[name])]
    if bad:
        raise FloatingPointError(f'step {step}: {bad[0]}={row[bad[0]]}; nothing is saved from here on: start again '
                                 'from the last checkpoint with a lower --optimizer.adamw_optimizer.lr')
