"""Claims about prepare_data.py and the part of it that others use too, data/labelled.py."""
import builtins
import hashlib
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

import prepare_data
from data.labelled import Example, read_labelled, sample
from data.records import RecordReader
from data.text_processor import TextProcessor
from program import flags, parse

ROWS = [{'text': 'a fine film', 'label': 1}, {'text': 'dull , "flat" and long', 'label': 0},
        {'text': 'café', 'label': 1}]
EXAMPLES = [Example(row['text'], row['label']) for row in ROWS]
MANY = [Example(f'good {i}', 1) for i in range(40)] + [Example(f'bad {i}', 0) for i in range(20)]  # sorted by label


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_text(path, text):
    path.write_bytes(text.encode('utf-8'))
    return path


def write_jsonl(path, rows):
    return write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))


def prepare(*arguments):
    prepare_data.main(parse.parse(['prepare_data.py', *arguments], flags.PREPARE, prepare_data.__doc__))


def counts(examples):
    return dict(Counter(example.label for example in examples))


# reading


@pytest.mark.parametrize('name, text', [
    ('a.json', json.dumps(ROWS)), ('b.json', json.dumps({'data': ROWS}, indent=1)),
    ('c.json', '\ufeff' + json.dumps(ROWS)),
    ('d.jsonl', '\n'.join(map(json.dumps, ROWS))), ('e.txt', '\r\n'.join(map(json.dumps, ROWS)) + '\r\n'),
    ('f.csv', 'label,text\n1,a fine film\n0,"dull , ""flat"" and long"\n1,café\n'),
    ('g.csv', '\ufefftext,label,id\r\na fine film,POSITIVE,1\r\n"dull , ""flat"" and long", negative,2\r\n'
              'café,1,3\r\n'),
])
def test_kinds_of_files_hold_the_same_examples(tmp_path, name, text):
    """JSON, JSON lines and CSV, with or without byte order mark, labels by number or by name."""
    assert read_labelled(write_text(tmp_path / name, text)) == EXAMPLES


@pytest.mark.parametrize('name', ['data/test-00000-of-00001.parquet', 'test.parquet', 'test.jsonl'])
def test_directories_are_read_by_split(tmp_path, name):
    """The layouts of rotten_tomatoes on the hub; other splits beside it are not touched."""
    write = write_parquet if name.endswith('.parquet') else write_jsonl
    write(tmp_path / name, ROWS)
    write_jsonl(tmp_path / 'train.jsonl', ROWS[:1])
    assert read_labelled(tmp_path, 'test') == EXAMPLES


def test_shards_are_read_in_order_and_completely(tmp_path):
    """data/train-00000-of-00002 and -00001-; one missing is an error, not half a set."""
    write_parquet(tmp_path / 'data' / 'train-00001-of-00002.parquet', ROWS[1:])
    with pytest.raises(ValueError, match='1 shards'):
        read_labelled(tmp_path, 'train')
    write_parquet(tmp_path / 'data' / 'train-00000-of-00002.parquet', ROWS[:1])
    assert read_labelled(tmp_path, 'train') == EXAMPLES


def test_fields_and_labels_have_names(tmp_path):
    """text_field, label_field and the names of any number of labels."""
    path = write_jsonl(tmp_path / 'a.jsonl', [{'review': 'x', 'mood': 'Mixed'}, {'review': 'y', 'mood': 0}])
    assert read_labelled(path, '', 'review', 'mood', ('bad', 'good', 'mixed')) == [('x', 2), ('y', 0)]


@pytest.mark.parametrize('row', [{'text': 'x'}, {'text': 'x', 'label': None}, {'label': 1}, {'text': ' \n', 'label': 1},
                                 {'text': 5, 'label': 1}, {'text': 'x', 'label': 2}, {'text': 'x', 'label': -1},
                                 {'text': 'x', 'label': 'great'}, {'text': 'x', 'label': True},
                                 {'text': 'x', 'label': 1.0}, {'text': '\ud800', 'label': 1}])
def test_row_that_does_not_fit_is_refused_with_its_place(tmp_path, row):
    """Missing or blank text, missing or unknown label: file:line for JSON lines, the entry for JSON."""
    path = write_jsonl(tmp_path / 'a.jsonl', [ROWS[0], row])
    with pytest.raises(ValueError, match=r'a\.jsonl:2: '):
        read_labelled(path)
    with pytest.raises(ValueError, match=r'a\.json: entry 2: '):
        read_labelled(write_text(tmp_path / 'a.json', json.dumps([ROWS[0], row])))


@pytest.mark.parametrize('name, text, message', [
    ('a.json', '[{"text": 1},\n{', r'a\.json:2: no valid JSON'), ('a.json', '5', 'must hold a list'),
    ('a.json', '[]', 'no examples'), ('a.json', '[5]', 'entry 1 must be an object'),
    ('a.jsonl', '{"text": "x", "label": 1}\n{\n', r'a\.jsonl:2: no valid JSON'),
    ('a.csv', 'text,label\nx,1\nx,1,2\n', r'a\.csv:3: more columns'),
    ('a.csv', 'text,label\nx\n', r"a\.csv:2: field 'label'"), ('a.csv', 'text,label\n"x', 'unexpected end of data'),
    ('a.parquet', 'junk', 'no readable parquet file'), ('a.xml', '', "ends in '.xml'"),
])
def test_damaged_file_is_named(tmp_path, name, text, message):
    """Half a file, another format under the name, an unknown ending."""
    with pytest.raises(ValueError, match=message):
        read_labelled(write_text(tmp_path / name, text))


def test_missing_column_of_parquet_is_named(tmp_path):
    """... with the columns that are there."""
    path = write_parquet(tmp_path / 'a.parquet', [{'text': 'x', 'stars': 1}])
    with pytest.raises(ValueError, match="'label' is missing, the row has 'text', 'stars'; set --label_field"):
        read_labelled(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    """pip install '.[parquet]'."""
    path, real = write_parquet(tmp_path / 'a.parquet', ROWS), builtins.__import__
    monkeypatch.setattr(builtins, '__import__', lambda name, *rest: real(
        'no_such_module' if name.startswith('pyarrow') else name, *rest))
    with pytest.raises(ValueError, match=r"pip install '\.\[parquet\]'"):
        read_labelled(path)


@pytest.mark.parametrize('path, split, message', [
    ('', '', "input='' does not exist"), ('none', '', 'does not exist; --input must name'), ('.', '', 'is a directory'),
    ('.', 'train', 'check --split and --input'), ('a.jsonl', 'train', 'leave --split out'),
])
def test_bad_path_names_the_flag(tmp_path, path, split, message):
    """Nothing given, nothing there, a directory without a split, a file with one."""
    write_jsonl(tmp_path / 'a.jsonl', ROWS)
    with pytest.raises(ValueError, match=message):
        read_labelled(path and tmp_path / path, split)


# sampling


@pytest.mark.parametrize('ratio, expected', [(1.0, {1: 40, 0: 20}), (0.5, {1: 20, 0: 10}), (0.1, {1: 4, 0: 2}),
                                             (0.33, {1: 13, 0: 7})])
def test_stratified_ratio_rounds_each_class(ratio, expected):
    """round(ratio * count) of each."""
    assert counts(sample(MANY, ratio=ratio)) == expected


@pytest.mark.parametrize('size, expected', [(60, {1: 40, 0: 20}), (10, {1: 7, 0: 3}), (11, {1: 7, 0: 4}), (1, {1: 1})])
def test_stratified_size_is_exact(size, expected):
    """Shares by largest remainder: 10 of 40:20 are 6.67:3.33, so 7 and 3."""
    assert counts(sample(MANY, size=size)) == expected


def test_sample_is_seeded_without_repetition_and_nested():
    """Same seed, same sample; a smaller one lies in a larger one; no example twice; another seed, another sample."""
    half, tenth = sample(MANY, ratio=0.5), sample(MANY, ratio=0.1)
    assert half == sample(MANY, ratio=0.5) != sample(MANY, ratio=0.5, seed=1)
    assert len(set(half)) == 30 and set(tenth) <= set(half) and half != sorted(half, key=MANY.index)


def test_head_of_a_sorted_file_has_one_class():
    """Neither stratified nor shuffled: the first half of the file, as in the article (4265 of 8530, all positive)."""
    assert sample(MANY, ratio=0.5, stratified=False, shuffle=False) == MANY[:30]
    article = [Example(str(i), int(i < 4265)) for i in range(8530)]
    assert counts(sample(article, ratio=0.5, stratified=False, shuffle=False)) == {1: 4265}
    assert counts(sample(article, ratio=0.4, shuffle=False)) == {1: 1706, 0: 1706}


def test_unstratified_shuffle_takes_any():
    """The number is round(ratio * all); the classes are as they come."""
    assert len(sample(MANY, ratio=0.5, stratified=False)) == 30
    assert len({counts(sample(MANY, ratio=0.5, stratified=False, seed=seed))[0] for seed in range(10)}) > 1


@pytest.mark.parametrize('settings, message', [
    ({'ratio': 0.0}, 'sample_ratio=0.0'), ({'ratio': 1.1}, 'sample_ratio=1.1'),
    ({'ratio': float('nan')}, 'sample_ratio=nan'), ({'size': 61}, 'sample_size=61'), ({'size': -1}, 'sample_size=-1'),
    ({'size': 5, 'ratio': 0.5}, 'only one'), ({'ratio': 0.001}, 'is none'),
])
def test_impossible_sample_is_refused(settings, message):
    """By the flag's name and value."""
    with pytest.raises(ValueError, match=message):
        sample(MANY, **settings)


# the program


def test_files_are_those_of_the_article(tmp_path, capsys):
    """NAME.jsonl, eval_NAME.json and labels_NAME.json, in one order, and where they are is printed."""
    rows = [*ROWS, {'text': 'dull', 'label': 0}]
    path = write_jsonl(tmp_path / 'train.jsonl', rows)
    prepare(f'--input={tmp_path}', '--split=train', f'--output={tmp_path / "out"}', '--shuffle=False')
    written = (tmp_path / 'out' / 'train.jsonl').read_text(encoding='utf-8').splitlines()
    assert written[0] == '{"text": "[Text]: a fine film\\n[Sentiment]: Positive"}'
    assert json.loads(written[2]) == {'text': '[Text]: café\n[Sentiment]: Positive'}
    prompts = json.loads((tmp_path / 'out' / 'eval_train.json').read_text())
    assert prompts == {'prefix_text': [f'[Text]: {row["text"]}\n[Sentiment]:' for row in rows]}
    labels = json.loads((tmp_path / 'out' / 'labels_train.json').read_text())
    assert labels['labels'] == [1, 0, 1, 0] and labels['counts'] == {'Negative': 2, 'Positive': 2}
    assert labels['source'] == [{'file': str(path), 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}]
    assert labels['template']['suffix'] == '\n[Sentiment]:'
    printed = capsys.readouterr()
    assert all(f'wrote {tmp_path / "out" / name}' in printed.out
               for name in ('train.jsonl', 'eval_train.json', 'labels_train.json')) and not printed.err


def test_prompt_and_answer_records_train_the_label_alone(tmp_path, golden):
    """With --record_fields=text,prompt,answer, fields='[prompt],answer' has loss on the answer and eos only."""
    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(golden / 'easylm' / 'tokenizer.model')
    prepare(f'--input={write_jsonl(tmp_path / "a.jsonl", ROWS[:1])}', f'--output={tmp_path / "out"}',
            '--record_fields=text,prompt,answer')
    processor = TextProcessor(tokenizer, fields='[prompt],answer')
    record = next(RecordReader(tmp_path / 'out' / 'a.jsonl', processor).records())
    with_loss = [token for token, mask in zip(record.tokens, record.loss_mask, strict=True) if mask]
    assert with_loss == tokenizer.encode(' Positive') + [2]


def test_sample_of_one_class_warns_loudly(tmp_path, capsys):
    """The head of a file sorted by label: the model would learn one answer to everything."""
    path = write_jsonl(tmp_path / 'a.jsonl', [example._asdict() for example in MANY])
    arguments = f'--input={path}', f'--output={tmp_path / "out"}', '--sample_ratio=0.5'
    prepare(*arguments, '--stratified=False', '--shuffle=False')
    assert 'WARNING: ALL 30 EXAMPLES ARE POSITIVE' in capsys.readouterr().err
    prepare(*arguments)
    printed = capsys.readouterr()
    assert not printed.err and "30 examples chosen: {'Negative': 10, 'Positive': 20}" in printed.out


def test_repeated_texts_are_counted(tmp_path, capsys):
    """Two copies and one contradiction."""
    rows = [*ROWS, ROWS[0], ROWS[1], {**ROWS[0], 'label': 0}]
    prepare(f'--input={write_jsonl(tmp_path / "a.jsonl", rows)}', f'--output={tmp_path / "out"}')
    assert '3 examples repeat the text of another; 1 texts come with several labels' in capsys.readouterr().err


def test_input_is_never_overwritten(tmp_path):
    """--output must not be where NAME.jsonl is the input itself; nothing is written without --output either."""
    path = write_jsonl(tmp_path / 'a.jsonl', ROWS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match='would be replaced'):
        prepare(f'--input={path}', f'--output={tmp_path}')
    with pytest.raises(ValueError, match='output='):
        prepare(f'--input={path}')
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ['a.jsonl']
