"""metrics.jsonl, and the optional writers beside it."""
import json
import sys
import types

import pytest

from training.metrics import MetricsWriter


def rows(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def test_rows_are_on_disk_as_soon_as_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(0, dict(loss=2.5, seconds=1.0))
    assert rows(tmp_path) == [dict(step=0, loss=2.5, seconds=1.0)]


def test_resuming_drops_the_rows_after_the_checkpoint_and_continues_the_clock(tmp_path):
    """Rows 0..4 of an attempt that died, resumed from step 3: rows 0..2 stay, and seconds go on from row 2's."""
    writer = MetricsWriter(tmp_path)
    for step in range(5):
        writer.write(step, dict(seconds=10.0 * step))
    writer.close()
    writer = MetricsWriter(tmp_path, resume_step=3)
    assert writer.seconds_before == 20.0 and [row['step'] for row in rows(tmp_path)] == [0, 1, 2]


def test_a_fresh_run_begins_a_fresh_file(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "seconds": 9}\n')
    assert MetricsWriter(tmp_path).seconds_before == 0.0 and rows(tmp_path) == []


def test_a_kill_while_a_resumed_run_opens_its_log_loses_no_row(tmp_path, monkeypatch):
    """The rows that stay are written beside the file, which is replaced when they are whole."""
    (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "seconds": 9}\n{"step": 1, "seconds": 10}\n')
    monkeypatch.setattr('os.replace', lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resume_step=1)
    assert [row['step'] for row in rows(tmp_path)] == [0, 1]


def test_tensorboard_receives_the_numbers(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write(7, dict(loss=2.5, seconds=1.0))
    writer.close()
    file, = (tmp_path / 'tensorboard').iterdir()
    assert b'loss' in file.read_bytes()


def test_wandb_receives_the_numbers(tmp_path, monkeypatch):
    """With a stand-in for the package: init's arguments, each row with its step, and finish."""
    calls = []
    log, finish = lambda row, step: calls.append((step, row)), lambda: calls.append('finished')
    run = types.SimpleNamespace(log=log, finish=finish)
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    writer = MetricsWriter(tmp_path, wandb=dict(project='p'))
    writer.write(1, dict(loss=2.5, note='text'))
    writer.close()
    assert calls == [dict(project='p'), (1, dict(loss=2.5)), 'finished']


@pytest.mark.parametrize('module, arguments, says', [
    ('tensorboardX', dict(tensorboard=True), 'logger.tensorboard=True needs the extra'),
    ('wandb', dict(wandb={}), 'logger.online=True needs the extra'),
])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, arguments, says):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=says):
        MetricsWriter(tmp_path, **arguments)
