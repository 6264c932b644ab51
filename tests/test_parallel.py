"""Tokenizing in worker processes: the same records, errors and order, and no process that outlives the program."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_records import BAD_LINES, GOOD, lines_file, read

from data import records
from data.records import RecordReader
from data.text_processor import TextProcessor
from data.tokenizer import load_tokenizer, tokenizer_from_json

GOLDEN = Path(__file__).parent / 'golden' / 'easylm'
TOKENIZER = load_tokenizer(GOLDEN / 'tokenizer.model')


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """A reader with two processes over 300 lines, good, bad and empty in a fixed mixture."""
    kinds = [GOOD, b'', *(line for line, _ in BAD_LINES), *[b'{"text": "caf\xc3\xa9 number %d"}'] * 30]
    numbers = np.random.default_rng(0).integers(len(kinds), size=300)
    path = lines_file(tmp_path_factory.mktemp('lines'),
                      *(kinds[k] % i if b'%d' in kinds[k] else kinds[k] for i, k in enumerate(numbers)))
    reader = RecordReader(path, TextProcessor(TOKENIZER, fields='text'), skip_bad_lines=True, processes=2,
                          chunk_size=7, batch_size=40)
    yield reader
    reader.close()


def workers_of(reader):
    return [process.pid for process in reader._workers._processes]


def has_ended(pid):
    """No such process, or one that only waits to be counted out."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except FileNotFoundError:
        return True


def test_two_processes_give_what_one_gives(two_processes):
    """The same records in the same order; at each, the same number of skipped lines; in every pass the same processes,
    in which no JAX is loaded, although this one has it.
    """
    alone = read(two_processes.path, skip=True)
    seen = []
    for _ in range(2):
        two_processes.skipped_lines = alone.skipped_lines = 0
        for mine, theirs in zip(two_processes.records(), alone.records(), strict=True):
            assert mine == theirs and two_processes.skipped_lines == alone.skipped_lines
        assert two_processes.skipped_lines == alone.skipped_lines > 20
        seen.append(workers_of(two_processes))
    assert seen[0] == seen[1] and 'jax' in sys.modules
    for pid in seen[0]:
        loaded = Path(f'/proc/{pid}/maps').read_text()
        assert 'sentencepiece' in loaded and 'jaxlib' not in loaded
    assert two_processes.problems[:10] == alone.problems


def test_two_processes_refuse_the_line_that_one_refuses(two_processes, monkeypatch):
    """The good records before it come, and the text is the same; then the processes answer the next pass."""
    monkeypatch.setattr(two_processes, 'skip_bad_lines', False)
    outcomes = []
    for reader in (two_processes, read(two_processes.path)):
        records = []
        with pytest.raises(ValueError) as caught:
            records.extend(reader.records())
        outcomes.append((records, str(caught.value)))
    assert outcomes[0] == outcomes[1]
    monkeypatch.setattr(two_processes, 'skip_bad_lines', True)
    assert list(two_processes.records()) == list(read(two_processes.path, skip=True).records())


def test_reading_ahead_is_bounded(two_processes):
    """Never more than batch_size lines were read beyond the line in hand."""
    next(two_processes.records())
    read_so_far = 0

    def counted():
        nonlocal read_so_far
        for line in records.raw_lines(two_processes.path):
            read_so_far += 1
            yield line

    most = max(read_so_far - line.index for line, _ in two_processes._workers.outcomes(counted(), 7, 40))
    assert 28 < most <= 40


def test_a_process_that_ends_too_early_is_an_error(two_processes):
    """Killed in the middle of a pass: no waiting for ever, and a text that names the way without processes, in that
    pass and, where nobody reads what is written any more, in the next one.
    """
    records = two_processes.records()
    next(records)
    for pid in workers_of(two_processes):
        os.kill(pid, signal.SIGKILL)
    for source in (records, two_processes.records()):
        with pytest.raises(ChildProcessError, match='code -9 .* tokenizer_processes=1'):
            list(source)
    two_processes.close()
    assert list(two_processes.records()) == list(read(two_processes.path, skip=True).records())


def test_processes_rebuild_a_tokenizer_json(tmp_path):
    """The ids of the text of a tokenizer.json, with bos, eos and pad as they were named."""
    tokenizers = pytest.importorskip('tokenizers')
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<b>': 0, '<e>': 1, '?': 2, 'a': 3, 'film': 4}, '?'))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    processor = TextProcessor(tokenizer_from_json(inner.to_str(), '<b>', '<e>', 2), fields='text')
    reader = RecordReader(lines_file(tmp_path, GOOD), processor, processes=2)
    assert [record.tokens for record in reader.records()] == [[0, 3, 2, 4, 1]]
    reader.close()


PROGRAM = """
import sys, time
from data.records import RecordReader
from data.text_processor import TextProcessor
from data.tokenizer import load_tokenizer

_, folder, ending = sys.argv
processor = TextProcessor(load_tokenizer(folder + '/tokenizer.model'), fields='text')
reader = RecordReader(folder + '/train_200.jsonl', processor, processes=2)
for record in reader.records():
    break
print(*(process.pid for process in reader._workers._processes), flush=True)
if ending == 'exception':
    raise KeyError
while ending == 'signal':
    time.sleep(0.01)
"""


@pytest.mark.parametrize('ending, number', [('return', 0), ('exception', 0), ('signal', signal.SIGINT),
                                            ('signal', signal.SIGKILL)])
def test_processes_end_with_the_program(ending, number):
    """At its end, its exception, Ctrl-C and kill -9; none of them says anything about it."""
    program = subprocess.Popen([sys.executable, '-c', PROGRAM, str(GOLDEN), ending], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=GOLDEN.parent.parent.parent,
                               start_new_session=True)
    pids = list(map(int, program.stdout.readline().split()))
    if number:
        assert len(pids) == 2 and not any(map(has_ended, pids))
        (os.killpg if number == signal.SIGINT else os.kill)(program.pid, number)  # Ctrl-C goes to the group
    _, errors = program.communicate(timeout=30)
    until = time.monotonic() + 10
    while not all(map(has_ended, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(pids) == 2 and all(map(has_ended, pids))
    assert errors.count('Traceback') == (ending == 'exception' or number == signal.SIGINT)
