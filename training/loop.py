"""The loop around the step: batches in, log lines and checkpoints out.  Before: training/step.py."""
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from data.batches import Batch
from model.partition import BATCH
from model.weights import Llama
from training.best import Best
from training.metrics import MetricsWriter
from training.profile import Trace
from training.state import TrainState


class Step(Protocol):
    """A training step (training/step.py makes one); metrics are scalars.  compile_seconds: spent compiling so far."""

    compile_seconds: float

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]: ...


class Schedule(NamedTuple):
    """Which micro-steps do what.  Steps count from 0.  save_every: saved at every multiple of one of these; 0 is none
    (the caller saves the end).  measure_every: measured after every multiple of it, rounded up, and at the end; 0 is
    never.
    """

    start_step: int
    total_steps: int
    log_every: int
    save_every: tuple[int, ...]
    measure_every: Fraction = Fraction(0)

    def measures(self, done: int) -> bool:
        """Tell whether the state after `done` steps is measured."""
        every = self.measure_every
        return every > 0 and (done == self.total_steps or done // every > (done - 1) // every)


def put(batch: Batch, mesh: Mesh) -> Batch:
    """Put the batch on the mesh, rows split over dp and fsdp.  Every process has all of it and puts its own rows."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows]), batch)


def train(state: TrainState, batches: Iterator[Batch], step: Step, mesh: Mesh, schedule: Schedule,
          writer: MetricsWriter, *, data_position: Callable[[], dict], save: Callable[[TrainState, int], None],
          weights_of: Callable[[TrainState], Llama] = lambda state: state.params,
          evaluate: Callable[[Llama], dict] | None = None, measure: Callable[[Llama, int], dict] | None = None,
          best: Best | None = None, peak_seconds: Callable[[Batch], float] | None = None,
          trace: Trace | None = None) -> tuple[TrainState, int]:
    """Run micro-steps start_step..total_steps-1 and return the last state and how many steps are done then.

    `save(state, n)` is called with the number n of steps done.  `data_position()` is added to each logged row, and so
    is `evaluate(weights)`; `measure(weights, n)` when the schedule says so, which logs a row too; `weights_of(state)`
    are those to evaluate.  best: told of what was measured; a better one is saved, and when its patience ends, so does
    the run.  peak_seconds: the time that a batch would take at the devices' peak; MFU is their sum over the time it
    took.  One step is kept in flight: the host prepares batch n + 1 while the devices compute step n, and never runs
    further ahead.  tokens_per_second counts steps only: compiling, evaluating and saving are left out of its time.
    Raises FloatingPointError, before anything is saved, when a logged loss or gradient norm is not finite.
    """
    start, total = schedule.start_step, schedule.total_steps
    traced = trace.step if trace else lambda n, before: contextlib.nullcontext()
    with tqdm(total=total, initial=start, desc='train', unit='step', mininterval=0.5,
              disable=not writer.enabled) as bar:
        began = time.perf_counter()
        since, compiled, tokens, peak, previous = began, step.compile_seconds, 0, 0.0, None  # of what is logged next
        done, stop = start, False
        while done < total and not stop:
            n, done, better = done, done + 1, False
            batch = next(batches)
            tokens += batch.tokens_BT.size if batch.segments_BT is None else int(np.count_nonzero(batch.segments_BT))
            peak += peak_seconds(batch) if peak_seconds else 0.0
            position = data_position()
            with traced(n, previous):
                state, metrics = step(state, put(batch, mesh))
            if previous is not None:
                jax.block_until_ready(previous)
            previous = metrics
            if trace:
                trace.end(n, metrics)
            measures = measure is not None and schedule.measures(done)
            if n % schedule.log_every == 0 or done == total or measures:
                row = {name: float(value) for name, value in metrics.items()}
                now = time.perf_counter()
                stepping = now - since - (step.compile_seconds - compiled)
                row |= dict(tokens_per_second=round(tokens / stepping, 1),
                            seconds=round(writer.seconds_before + now - began, 3))
                if peak_seconds:
                    row['mfu'] = round(peak / stepping, 4)
                check_finite(row, n)
                if evaluate:
                    row |= evaluate(weights_of(state))
                if measures:
                    measured = measure(weights_of(state), done)
                    row |= measured
                    better = best is not None and best.add(done, measured)
                    stop = best is not None and best.exhausted
                writer.write(n, row | position)
                bar.set_postfix(shown(row))
                since, compiled, tokens, peak = time.perf_counter(), step.compile_seconds, 0, 0.0
            bar.update()
            due = done < total and not stop and any(every and done % every == 0 for every in schedule.save_every)
            if due or better:
                check_finite({name: float(value) for name, value in metrics.items()}, n)
                saving = time.perf_counter()
                save(state, done)
                since += time.perf_counter() - saving
    if trace:
        trace.close()
    return state, done


def shown(row: dict) -> dict[str, str]:
    """Choose and write what the bar shows of a row."""
    names = dict(loss='loss', accuracy='accuracy', learning_rate='lr', tokens_per_second='tok_s', mfu='mfu',
                 eval_loss='eval_loss', eval_accuracy='eval_accuracy', label_accuracy='label_accuracy',
                 label_f1='label_f1', label_loss='label_loss', text_exact_match='exact_match',
                 text_token_f1='token_f1', text_field_f1='field_f1')
    spelling = dict(accuracy='.3f', learning_rate='.2g', tokens_per_second='.0f', mfu='.1%', label_accuracy='.1%')
    return {short: f'{row[name]:{spelling.get(name, ".4f")}}' for name, short in names.items() if name in row}


def check_finite(row: dict, step: int) -> None:
    """Raise FloatingPointError unless loss and norms are finite."""
    bad = [name for name in ('loss', 'gradient_norm', 'param_norm') if not math.isfinite(row[name])]
    if bad:
        raise FloatingPointError(f'step {step}: {bad[0]}={row[bad[0]]}; nothing is saved from here on: start again '
                                 'from the last checkpoint with a lower --optimizer.adamw_optimizer.lr')
