"""Claims about data/records.py."""
import base64
import json
from pathlib import Path

import numpy as np
import pytest

from data import records
from data.records import RecordReader, TextProcessor, json_lines
from data.tokenizer import load_tokenizer

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


def test_missing_file_names_the_flag(tmp_path):
    """--eval_dataset.json_dataset.path, if that is where it came from."""
    with pytest.raises(ValueError, match='eval_dataset.json_dataset.path='):
        RecordReader(tmp_path / 'none.jsonl', TextProcessor(TOKENIZER, fields='text'), flag='eval_dataset.json_dataset')
