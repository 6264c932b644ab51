"""The loop around the step: what its figures count."""
import json
import time

import jax.numpy as jnp
import numpy as np
from helpers import one_device

from data.batches import Batch
from training import loop
from training.metrics import MetricsWriter

TOKENS = 2 * 8


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
    loop.train(None, batches(), FakeStep(), one_device(), loop.Schedule(0, 10, 5, (2,)), writer,
               data_position=dict, save=rest, evaluate=rest)
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [0, 5, 9]
    for row in rows:
        assert 0.2 * TOKENS / 0.02 < row['tokens_per_second'] < TOKENS / 0.02
    assert rows[-1]['seconds'] > 0.5 * (1 + 2 + 4)  # of the run, all of it counts
