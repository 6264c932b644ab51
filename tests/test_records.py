"""Claims about data/records.py."""
import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import records
from data.records import RecordReader, TextProcessor, json_lines
from data.tokenizer import load_tokenizer, tokenizer_from_json

GOLDEN = Path(__file__).parent / 'golden' / 'easylm'
TOKENIZER = load_tokenizer(GOLDEN / 'tokenizer.model')
EXAMPLE = {'prompt': 'a fine film', 'answer': ' Positive', 'extra': '7', 'fields': '[prompt],answer',
           'junk': 'BQAA*AA==', 'short': 'BQAA',
           'raw': base64.b64encode(np.array([5, 300], '<i4').tobytes()).decode()}
ENCODE = TOKENIZER.encode


def process(fields, **settings):
    return TextProcessor(TOKENIZER, fields=fields, **settings)(EXAMPLE)


def read(path, skip=False, fields='text'):
    return RecordReader(path, TextProcessor(TOKENIZER, fields=fields), skip_bad_lines=skip)


def lines_file(tmp_path, *lines):
    path = tmp_path / 'data.jsonl'
    path.write_bytes(b''.join(line + b'\n' for line in lines))
    return path


GOOD = b'{"text": "a fine film"}'


def test_fields_are_tokenized_alone_with_their_masks():
    """bos mask 0, [prompt] mask 0, answer mask 1, eos mask 1."""
    prompt, answer = ENCODE('a fine film'), ENCODE(' Positive')
    mask = [0.0] * (1 + len(prompt)) + [1.0] * (len(answer) + 1)
    assert process('[prompt],answer') == ([1, *prompt, *answer, 2], mask)


def test_plus_joins_texts_before_tokenizing():
    """'prompt+extra' is one text with the separator between, which is not the tokens of both put together."""
    assert process('prompt+extra', subfield_separator=' | ')[0] == [1, *ENCODE('a fine film | 7'), 2]


def test_special_tokens_and_raw_tokens():
    """<|bos|>, <|eos|>, <|17|> and {key} are token ids, with the mask of their field."""
    tokens, mask = process('<|bos|>,[<|17|>],{raw},[<|eos|>]', add_bos_token=False, add_eos_token=False)
    assert (tokens, mask) == ([1, 17, 5, 300, 2], [1.0, 0.0, 1.0, 1.0, 0.0])


def test_prepend_text_goes_to_the_first_field_only():
    """... and only if that is text."""
    assert process('prompt,answer', prepend_text='Q: ')[0] == [1, *ENCODE('Q: a fine film'), *ENCODE(' Positive'), 2]
    assert process('<|17|>,answer', prepend_text='Q: ')[0] == [1, 17, *ENCODE(' Positive'), 2]


def test_fields_from_example_names_the_key_with_the_fields():
    """The record's own 'fields' is what --fields would have said."""
    assert TextProcessor(TOKENIZER, fields_from_example='fields')(EXAMPLE) == process('[prompt],answer')


@pytest.mark.parametrize('settings, message', [
    ({}, 'exactly one'), ({'fields': 'a', 'fields_from_example': 'b'}, 'exactly one'),
    ({'fields': 'a', 'base64_token_dtype': 'nonsense'}, 'base64_token_dtype'),
    ({'fields': 'a', 'base64_token_dtype': 'f4'}, 'integer dtype'),
])
def test_settings_without_sense_are_refused(settings, message):
    """Before any data is read."""
    with pytest.raises(ValueError, match=message):
        TextProcessor(TOKENIZER, **settings)


@pytest.mark.parametrize('fields, message', [
    ('absent', "field 'absent' is missing; the record has 'prompt', 'answer'"), ('<|begin|>', 'no token'),
    ('<|640|>', 'token id 640'), ('{prompt}', 'base64'), ('{junk}', 'base64'), ('{short}', 'holds 3 bytes'),
])
def test_record_that_does_not_fit_names_its_field(fields, message):
    """Missing field (with the keys present), unknown token, id outside the vocabulary, broken base64."""
    with pytest.raises(ValueError, match=message):
        process(fields)


BAD_LINES = [
    (b'{broken', 'no valid JSON'), (b'[1, 2]', 'must be a JSON object, this is list'),
    (b'{"other": "x"}', "'text' is missing"), (b'{"text": 5}', 'must be text, this is int'),
    (b'{"text": " \\n"}', 'blank'), (b'{"text": "\xff"}', 'invalid UTF-8'), (b'{"text": "a\x00b"}', 'no valid JSON'),
    (b'{"text": "\\ud800"}', 'surrogate'), (b'[' * 100_000, 'no valid JSON'), (b'1' * 5000, 'no valid JSON'),
]


@pytest.mark.parametrize('line, message', BAD_LINES)
def test_bad_line_is_refused_with_its_place_and_the_flag(tmp_path, line, message):
    """path:line: what is wrong (which flag skips such lines)."""
    path = lines_file(tmp_path, GOOD, b'', line, GOOD)
    with pytest.raises(ValueError, match=message) as caught:
        list(read(path).records())
    assert str(caught.value).startswith(f'{path}:3: ')
    assert '--train_dataset.json_dataset.skip_bad_lines=True' in str(caught.value)


def test_skipped_lines_are_counted(tmp_path):
    """With skip_bad_lines the good records come, and every bad line is counted and the first ten described."""
    path = lines_file(tmp_path, *(part for line, _ in BAD_LINES for part in (line, GOOD, b'')))
    reader = read(path, skip=True)
    assert len(list(reader.records())) == len(BAD_LINES) == reader.skipped_lines == len(reader.problems)
    assert reader.problems[1].startswith(f'{path}:4: ')


def test_golden_file_has_one_broken_line():
    """records.jsonl: 62 lines, one empty, line 12 broken, so 60 records."""
    reader = read(GOLDEN / 'records.jsonl', skip=True)
    assert len(list(reader.records())) == 60 and reader.skipped_lines == 1
    with pytest.raises(ValueError, match=r'records\.jsonl:12: '):
        list(read(GOLDEN / 'records.jsonl').records())


def test_byte_order_mark_crlf_and_a_missing_last_newline_are_accepted(tmp_path):
    """The same records as from the plain file."""
    path = tmp_path / 'windows.jsonl'
    path.write_bytes(b'\xef\xbb\xbf' + GOOD + b'\r\n\r\n' + GOOD)
    plain = [record.tokens for record in read(lines_file(tmp_path, GOOD, GOOD)).records()]
    assert [record.tokens for record in read(path).records()] == plain


def test_overlong_line_is_bad_and_never_in_memory_whole(tmp_path, monkeypatch):
    """The line ends where the next begins; what was read of it is bounded."""
    monkeypatch.setattr(records, 'MAX_LINE_BYTES', 64)
    path = lines_file(tmp_path, GOOD, b'{"text": "' + b'x' * 1000 + b'"}', GOOD)
    lines = list(json_lines(path))
    assert [bool(line.problem) for line in lines] == [False, True, False]
    assert 'longer than 64 bytes' in lines[1].problem and lines[2].example == json.loads(GOOD)


def test_a_line_can_be_found_again_by_its_place(tmp_path):
    """Reading from (start, index) of a line gives that line and the rest."""
    path = lines_file(tmp_path, GOOD, b'', '{"text": "caf\u00e9"}'.encode(), GOOD)
    lines = list(json_lines(path))
    for i, line in enumerate(lines):
        assert list(json_lines(path, line.start, line.index)) == lines[i:]


# Several processes


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
from data.records import RecordReader, TextProcessor
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


@pytest.mark.parametrize('setting, flag', [('processes', 'tokenizer_processes'),
                                           ('chunk_size', 'tokenizer_parallel_chunk_size'),
                                           ('batch_size', 'tokenizer_parallel_batch_size')])
def test_numbers_of_processes_and_lines_are_positive(setting, flag):
    """Refused by flag and value."""
    with pytest.raises(ValueError, match=f'{flag}=0 .*at least 1'):
        RecordReader(GOLDEN / 'records.jsonl', TextProcessor(TOKENIZER, fields='text'), **{setting: 0})


def test_bucket_path_names_the_command_that_copies_it():
    """gs:// is no local file."""
    with pytest.raises(ValueError, match='gcloud storage cp gs://bucket/data.jsonl'):
        read('gs://bucket/data.jsonl')


def test_missing_file_names_the_flag(tmp_path):
    """--eval_dataset.json_dataset.path, if that is where it came from."""
    with pytest.raises(ValueError, match='eval_dataset.json_dataset.path='):
        RecordReader(tmp_path / 'none.jsonl', TextProcessor(TOKENIZER, fields='text'), flag='eval_dataset.json_dataset')
