"""Files of records: places, bad lines, and what a line may look like."""
from pathlib import Path

import pytest

from data import records
from data.records import RecordReader, raw_lines
from data.text_processor import TextProcessor
from data.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / 'golden' / 'easylm'
TOKENIZER = load_tokenizer(GOLDEN / 'tokenizer.model')


def read(path, skip=False, fields='text'):
    return RecordReader(path, TextProcessor(TOKENIZER, fields=fields), skip_bad_lines=skip)


def lines_file(tmp_path, *lines):
    path = tmp_path / 'data.jsonl'
    path.write_bytes(b''.join(line + b'\n' for line in lines))
    return path


GOOD = b'{"text": "a fine film"}'
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
    lines = list(raw_lines(path))
    assert [bool(line.problem) for line in lines] == [False, True, False]
    assert 'longer than 64 bytes' in lines[1].problem and lines[2].text == GOOD + b'\n'


def test_a_line_can_be_found_again_by_its_place(tmp_path):
    """Reading from (start, index) of a line gives that line and the rest."""
    path = lines_file(tmp_path, GOOD, b'', '{"text": "caf\u00e9"}'.encode(), GOOD)
    lines = list(raw_lines(path))
    for i, line in enumerate(lines):
        assert list(raw_lines(path, line.start, line.index)) == lines[i:]


def test_missing_file_names_the_flag(tmp_path):
    """--eval_dataset.json_dataset.path, if that is where it came from."""
    with pytest.raises(ValueError, match='eval_dataset.json_dataset.path='):
        RecordReader(tmp_path / 'none.jsonl', TextProcessor(TOKENIZER, fields='text'), flag='eval_dataset.json_dataset')
