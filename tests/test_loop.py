"""The loop around the step: what its figures count, when it evaluates, saves and stops."""
import dataclasses
import json
import time
import types
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_device

from data.batches import Batch
from model.config import MODELS, LlamaConfig
from training import loop
from training.best import Best
from training.flops import step_flops
from training.metrics import MetricsWriter

TOKENS = 2 * 8


STATE = types.SimpleNamespace(params=None)


class FakeStep:
    """Take 0.02 s a step, after 0.5 s of compiling the first."""

    compile_seconds = 0.0

    def __call__(self, state, batch):
        if not self.compile_seconds:
            time.sleep(0.5)
            self.compile_seconds = 0.5
        time.sleep(0.02)
        return state, {name: jnp.float32(1) for name in ('loss', 'accuracy', 'learning_rate', 'gradient_norm',
                                                          'param_norm')}


def batches():
    tokens = np.zeros((2, 8), np.int32)
    while True:
        yield Batch(tokens, None, None, tokens, np.ones((2, 8), np.float32), np.ones(2, np.float32))


def test_tokens_per_second_counts_steps_alone(tmp_path):
    """Compiling, evaluating and saving half a second each would make it 30 tokens/s or less; 5 steps take 0.1 s."""
    rest = lambda *arguments: time.sleep(0.5) or {}
    writer = MetricsWriter(tmp_path)
    loop.train(STATE, batches(), FakeStep(), one_device(), loop.Schedule(0, 10, 5, (2,)), writer,
               data_position=dict, save=rest, evaluate=rest)
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [0, 5, 9]
    for row in rows:
        assert 0.2 * TOKENS / 0.02 < row['tokens_per_second'] < TOKENS / 0.02
    assert rows[-1]['seconds'] > 0.5 * (1 + 2 + 4)  # of the run, all of it counts


class QuickStep:
    """Take no time, and compile nothing."""

    compile_seconds = 0.0

    def __call__(self, state, batch):
        return state, {name: jnp.float32(1) for name in ('loss', 'accuracy', 'learning_rate', 'gradient_norm',
                                                          'param_norm')}


def train(tmp_path, total: int, every: Fraction, values: list[float], best: Best | None = None, **more):
    """(steps measured, steps saved, steps done, rows) of a run whose evaluations give `values` one after the other."""
    measured, saved, left = [], [], list(values)

    def measure(state, done):
        measured.append(done)
        return dict(label_accuracy=left.pop(0), label_loss=1.0)

    writer = MetricsWriter(tmp_path)
    _, done = loop.train(STATE, batches(), QuickStep(), one_device(), loop.Schedule(0, total, 100, (), every), writer,
                         data_position=dict, save=lambda state, done: saved.append(done), measure=measure, best=best,
                         **more)
    writer.close()
    return measured, saved, done, [json.loads(line) for line in
                                   (tmp_path / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('every, steps', [(Fraction(4), [4, 8, 10]), (Fraction(5, 2), [3, 5, 8, 10]),
                                          (Fraction(20), [10]), (Fraction(0), [])])
def test_evaluations_fall_on_multiples_rounded_up_and_on_the_end(tmp_path, every, steps):
    """2.5 steps are half an epoch of five: the end of an epoch is always one.  Each is a row of the log."""
    measured, _, done, rows = train(tmp_path, 10, every, [0.5] * 9)
    assert (measured, done) == (steps, 10)
    assert [row['step'] + 1 for row in rows if 'label_accuracy' in row] == steps
    assert [row['step'] + 1 for row in rows] == sorted({1, 10, *steps})


def test_a_better_evaluation_is_saved_and_the_run_stops_when_patience_ends(tmp_path):
    """0.7 is better than 0.5, 0.6 and another 0.7 are not: the second of these ends the run."""
    measured, saved, done, rows = train(tmp_path, 10, Fraction(2), [0.5, 0.7, 0.6, 0.7, 0.9], Best('accuracy', 2))
    assert (measured, saved, done) == ([2, 4, 6, 8], [2, 4], 8)
    assert rows[-1]['step'] == 7


def test_a_lower_loss_is_better_and_the_best_goes_on_from_its_mark():
    best = Best('loss', 3)
    assert [best.add(step, dict(label_loss=loss)) for step, loss in ((1, 0.5), (2, 0.4), (3, 0.4), (4, 0.6))] == [
        True, True, False, False]
    assert (best.step, best.waited, best.exhausted) == (2, 2, False)
    again = dataclasses.replace(Best('loss', 3), **json.loads(json.dumps(best.mark)))
    assert again == best and not again.add(5, dict(label_loss=0.4)) and again.exhausted


# ---------------------------------------------------------------- MFU


def test_flops_of_a_step_are_those_worked_out_by_hand():
    """Two layers of width 4 with one head, ffn of 6, 10 tokens: matrices 2 (4 * 16 + 3 * 24) = 272, head 40.

    Two rows of 8: 6 (272 + 40) 16 + 12 * 2 * 4 * (64 + 64) = 29,952 + 12,288.  As rows of 5 and 3 tokens with 2 and 1
    losses: 6 (272 * 8 + 40 * 3) + 96 (25 + 9) = 13,776 + 3,264.  EasyLM's 3B, 8 rows of 1,024: 6 * 3.324e9 * 8,192 and
    12 * 26 * 3,200 * 1,024 * 8,192.
    """
    config = LlamaConfig(10, 4, 6, 2, 1)
    batch = next(batches())
    assert step_flops(config, batch) == 29_952 + 12_288
    segments = np.array([[1] * 5 + [0] * 3, [1] * 3 + [0] * 5])
    mask = np.array([[1, 1], [1, 0]], np.float32)
    short = batch._replace(segments_BT=segments, loss_positions_BP=np.zeros((2, 2), np.int32), loss_mask_BP=mask)
    assert step_flops(config, short) == 13_776 + 3_264
    tokens = np.zeros((8, 1024), np.int32)
    large = Batch(tokens, None, None, tokens, np.ones_like(tokens, np.float32), np.ones(8, np.float32))
    matrices = 26 * (4 * 3200 * 3200 + 3 * 3200 * 8640) + 32000 * 3200
    assert step_flops(MODELS['3b'], large) == 6 * matrices * 8192 + 12 * 26 * 3200 * 1024 * 8192


def test_segments_of_a_row_attend_apart():
    """Segments of 2 and 3 tokens in one row cost 4 + 9, not 25."""
    config, batch = LlamaConfig(10, 4, 6, 2, 1), next(batches())
    segments = np.array([[1, 1, 2, 2, 2, 0, 0, 0], [0] * 8])
    assert step_flops(config, batch._replace(segments_BT=segments)) == 6 * 312 * 5 + 96 * 13


def test_mfu_is_the_time_at_the_peak_over_the_time_it_took(tmp_path):
    """20 ms a step, of which the devices' peak would need 5: 0.25, less what the loop itself takes."""
    writer = MetricsWriter(tmp_path)
    loop.train(STATE, batches(), FakeStep(), one_device(), loop.Schedule(0, 6, 3, ()), writer, data_position=dict,
               save=lambda *arguments: None, peak_seconds=lambda batch: 0.005)
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert all(0.05 < row['mfu'] < 0.25 for row in rows), rows
