"""The benchmark of the training step: both sides are given the same work, and the ratio is theirs of the same turn."""
import io
import json
import math
import sys

import jax
import numpy as np
import pytest

from instruments.bench import cpu_training as benchmark
from instruments.bench import torch_loop
from instruments.bench.cpu_training import Child
from model.config import LlamaConfig

RECORDS = benchmark.make_records(2, 5, 24, 100)
FAKE = """
import json, sys
seconds, tokens = json.loads(sys.argv[1]), json.loads(sys.stdin.readline())['tokens']
print(json.dumps(dict(versions={sys.argv[2]: '1'}, parameters=int(sys.argv[3]), tokens=tokens)), flush=True)
for line in sys.stdin:
    print(f'{sys.argv[2]} {line.strip()}', file=sys.stderr, flush=True)
    print(json.dumps(dict(seconds=seconds.pop(0), loss=0.5)), flush=True)
"""
WORK = dict(records=RECORDS, tokens=[50, 70])


def fake(name: str, seconds: list[float], parameters: int = 7) -> Child:
    """A side that needs the given seconds in its turns."""
    return Child(name, [sys.executable, '-S', '-c', FAKE, json.dumps(seconds), name, str(parameters)], {})


def test_records_are_of_the_lengths_of_reviews_and_depend_on_the_seed_alone():
    """n + 1 tokens with n from 20 to the length, all of them drawn; a length below 20 is every record's."""
    records = benchmark.make_records(4, 50, 24, 100)
    assert (len(records), {len(rows) for rows in records}) == (4, {50})
    assert {len(tokens) - 1 for rows in records for tokens in rows} == {20, 21, 22, 23, 24}
    assert {token for rows in records for tokens in rows for token in tokens} == set(range(100))
    assert records == benchmark.make_records(4, 50, 24, 100) != benchmark.make_records(4, 50, 24, 100, seed=1)
    assert {len(tokens) - 1 for tokens in benchmark.make_records(1, 50, 6, 100)[0]} == {6}


@pytest.mark.parametrize('loss', benchmark.LOSSES)
def test_both_sides_train_on_the_same(loss):
    """The padded tokens, what is padding, and the target of every position that carries loss are those of torch."""
    for records in RECORDS:
        batch = benchmark.make_batch(records, 24, loss)
        input_ids, attention_mask, labels = map(np.array, torch_loop.padded(records, 24, loss))
        np.testing.assert_array_equal(batch.tokens_BT, input_ids)
        np.testing.assert_array_equal(batch.segments_BT, attention_mask)
        assert np.count_nonzero(batch.segments_BT) == sum(len(tokens) - 1 for tokens in records)
        b, p = np.nonzero(batch.loss_mask_BP)
        targets_BT = np.full_like(labels, -100)
        targets_BT[b, batch.loss_positions_BP[b, p]] = batch.targets_BP[b, p]
        np.testing.assert_array_equal(targets_BT, labels)


@pytest.mark.parametrize('loss', benchmark.LOSSES)
def test_a_batch_is_as_the_data_pipeline_has_it(loss):
    """A record of 3 tokens and one of 5 in rows of 4: int32, padding in segment 0, zeros after the last position."""
    batch = benchmark.make_batch([[7, 8, 9], [1, 2, 3, 4, 5]], 4, loss)
    assert [x.dtype.name for x in batch[:6]] == ['int32'] * 4 + ['float32'] * 2 and set(batch[6:]) == {None}
    assert batch.tokens_BT.tolist() == [[7, 8, 0, 0], [1, 2, 3, 4]]
    assert batch.segments_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    answer = loss == 'answer'
    assert batch.loss_positions_BP.tolist() == ([[1], [3]] if answer else [[0, 1, 0, 0], [0, 1, 2, 3]])
    assert batch.targets_BP.tolist() == ([[9], [5]] if answer else [[8, 9, 0, 0], [2, 3, 4, 5]])
    assert batch.loss_mask_BP.tolist() == ([[1], [1]] if answer else [[1, 1, 0, 0], [1, 1, 1, 1]])
    assert batch.row_weight_B.tolist() == [1, 1]


def test_our_side_trains(monkeypatch, capsys):
    """Told what to do on stdin, it counts weights and real tokens, and its first loss is that of random weights: ln V
    within 0.2, as logits of a network of this size with weights of 0.02 are nearly 0; it falls over 20 steps.
    """
    config = LlamaConfig(64, 16, 32, 1, 2, max_sequence_length=8, tie_word_embeddings=True)
    work = benchmark.make_work(config, 1, 4, 6, 'all', threads=1)
    work['records'] *= 20
    lines = [json.dumps(message) + '\n' for message in (work, dict(steps=1), dict(steps=20))]
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''.join(lines)))
    jax.config.update('jax_disable_most_optimizations', True)  # compiles in half the time
    try:
        benchmark.child()
    finally:
        jax.config.update('jax_disable_most_optimizations', False)
    known, first, second = map(json.loads, capsys.readouterr().out.splitlines())
    weights = 64 * 16 + (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    assert (known['parameters'], known['tokens']) == (weights, [24] * 20)
    assert abs(first['loss'] - math.log(64)) < 0.2 and second['loss'] < first['loss']
    assert first['seconds'] > 0 and second['seconds'] > 0


def test_the_sides_take_turns(capfd):
    """Two counted turns after one that is not: the order turns round each time, and time is divided by the steps."""
    with fake('torch', [90.0, 2.0, 4.0]) as theirs, fake('ours', [100.0, 3.0, 4.0]) as ours:
        known, rows = benchmark.take_turns([theirs, ours], WORK, turns=2)
    out, order = capfd.readouterr()
    assert order.splitlines() == [f'{name} {{"steps": 2}}' for name in ('ours', 'torch', 'torch', 'ours', 'ours',
                                                                        'torch')]
    assert known == dict(versions=dict(torch='1', ours='1'), parameters=7, tokens=[50, 70])
    assert [(row['turn'], row['name'], row['seconds_per_step'], row['tokens_per_second']) for row in rows] == [
        (1, 'torch', 1.0, 60.0), (1, 'ours', 1.5, 40.0), (2, 'ours', 2.0, 30.0), (2, 'torch', 2.0, 30.0)]
    assert len(out.splitlines()) == 6 and out.count('not counted') == 2


def test_the_ratio_is_the_median_of_the_turns():
    """Of the turns' own ratios 1.5, 0.5 and 0.75, not of the medians (2 / 2) nor of the sums."""
    times = dict(torch=[2.0, 8.0, 2.0], ours=[3.0, 4.0, 1.5])
    rows = [dict(turn=turn, name=name, seconds_per_step=x, tokens_per_second=60 / x)
            for turn in range(3) for name, seconds in times.items() for x in seconds[turn:turn + 1]]
    summary = benchmark.summarize(rows, 'torch')
    assert list(summary) == ['torch', 'ours'] and summary['torch']['ratio'] == 1
    assert summary['ours'] == dict(ratio=0.75, ratios=[1.5, 0.5, 0.75], seconds_per_step=3.0, tokens_per_second=20.0)


def test_sides_that_do_not_train_the_same_are_refused():
    with fake('torch', []) as theirs, fake('ours', [], parameters=8) as ours:
        with pytest.raises(ValueError, match="do not train the same: .*'parameters': 7.*'parameters': 8"):
            benchmark.take_turns([theirs, ours], WORK, turns=1)


def test_a_side_that_ends_is_named():
    """In its turn (the fake has no second time to tell), or at once, with work that a pipe does not hold."""
    with fake('torch', [1.0, 2.0]) as theirs, fake('ynn', [1.0]) as ours:
        with pytest.raises(ValueError, match='ynn: the process ended with exit code 1 before it answered'):
            benchmark.take_turns([theirs, ours], WORK, turns=1)
    with Child('ours', [sys.executable, '-S', '-c', 'raise SystemExit(3)'], {}) as side:
        with pytest.raises(ValueError, match='ours: the process ended with exit code 3'):
            side.ask(dict(records=[[0] * 1000] * 1000))


def test_an_interpreter_without_torch_is_refused():
    """-S: no installed package is found, whatever this interpreter has."""
    with Child('torch', [sys.executable, '-S', str(benchmark.TORCH_LOOP)], {}) as side:
        with pytest.raises(ValueError, match="torch: No module named 'torch': --torch_python=.* pip install -e"):
            side.ask(WORK)


def test_variants_are_sides_of_their_own():
    """The value may hold colons and spaces; no flags at all is a variant too; a name is given once."""
    variants = benchmark.read_variants('--a=1', ['ynn:--b=LIBRARY:DOT --c=2', 'plain:'])
    assert variants == dict(ours='--a=1', ynn='--b=LIBRARY:DOT --c=2', plain='')
    for wrong in (['ynn'], [':--b=1'], ['--xla_b=1:2'], ['torch:--b=1'], ['ours:--b=1'], ['x:', 'x:--b=1']):
        with pytest.raises(ValueError, match='--variant=.*NAME:XLA_FLAGS'):
            benchmark.read_variants('', wrong)
