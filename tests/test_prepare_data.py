"""Claims about prepare_data.py and what it reads and parts with: data/tables.py, data/labelled.py, data/parts.py."""
import builtins
import hashlib
import json
import pathlib
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

import prepare_data
from data.labelled import Example, Labels, parse_labels, read_labelled, read_prepared
from data.parts import part, sample
from data.prompt import PromptTemplate
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
    assert read_labelled(write_text(tmp_path / name, text)).examples == EXAMPLES


@pytest.mark.parametrize('name', ['data/test-00000-of-00001.parquet', 'test.parquet', 'test.jsonl'])
def test_directories_are_read_by_split(tmp_path, name):
    """The layouts of rotten_tomatoes on the hub; other splits beside it are not touched."""
    write = write_parquet if name.endswith('.parquet') else write_jsonl
    write(tmp_path / name, ROWS)
    write_jsonl(tmp_path / 'train.jsonl', ROWS[:1])
    assert read_labelled(tmp_path, 'test').examples == EXAMPLES


def test_shards_are_read_in_order_and_completely(tmp_path):
    """data/train-00000-of-00002 and -00001-; one missing is an error, not half a set."""
    write_parquet(tmp_path / 'data' / 'train-00001-of-00002.parquet', ROWS[1:])
    with pytest.raises(ValueError, match='1 shards'):
        read_labelled(tmp_path, 'train')
    write_parquet(tmp_path / 'data' / 'train-00000-of-00002.parquet', ROWS[:1])
    assert read_labelled(tmp_path, 'train').examples == EXAMPLES


def test_fields_and_labels_have_names(tmp_path):
    """text_field, label_field and the names of any number of labels."""
    path = write_jsonl(tmp_path / 'a.jsonl', [{'review': 'x', 'mood': 'Mixed'}, {'review': 'y', 'mood': 0}])
    found = read_labelled(path, '', 'review', 'mood', Labels(('bad', 'good', 'mixed')))
    assert found.examples == [('x', 2), ('y', 0)] and found.labels == ('bad', 'good', 'mixed')


@pytest.mark.parametrize('row', [{'text': 'x'}, {'text': 'x', 'label': None}, {'label': 1}, {'text': ' \n', 'label': 1},
                                 {'text': 5, 'label': 1}, {'text': 'x', 'label': 2}, {'text': 'x', 'label': -1},
                                 {'text': 'x', 'label': 'great'}, {'text': 'x', 'label': 0.5},
                                 {'text': 'x', 'label': [1]}, {'text': '\ud800', 'label': 1}])
def test_row_that_does_not_fit_is_refused_with_its_place(tmp_path, row):
    """Missing or blank text, missing or unknown label: file:line for JSON lines, the entry for JSON."""
    path = write_jsonl(tmp_path / 'a.jsonl', [ROWS[1], row])
    labels = Labels(('Negative', 'Positive'))
    with pytest.raises(ValueError, match=r'a\.jsonl:2: '):
        read_labelled(path, labels=labels)
    with pytest.raises(ValueError, match=r'a\.json: entry 2: '):
        read_labelled(write_text(tmp_path / 'a.json', json.dumps([ROWS[1], row])), labels=labels)


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
        read_labelled(path, label_column='label')


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    """pip install '.[data]'."""
    path, real = write_parquet(tmp_path / 'a.parquet', ROWS), builtins.__import__
    monkeypatch.setattr(builtins, '__import__', lambda name, *rest: real(
        'no_such_module' if name.startswith('pyarrow') else name, *rest))
    with pytest.raises(ValueError, match=r"pip install '\.\[data\]'"):
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


# columns and labels that nobody named


@pytest.mark.parametrize('name, text', [
    ('a.tsv', 'Review\tStars\tid\na fine film\t5\t1\n"dull, long"\t1\t2\n'),
    ('b.csv', 'id;Review;Stars\n1;a fine film;5\n2;dull, long;1\n'),
    ('c.csv', 'id|Review|Stars\n1|a fine film|5\n2|dull, long|1\n'),
    ('d.csv', 'Review,"good, or bad"\na fine film,5\n"dull, long",1\n'),
    ('e.csv', '\n Review , opinion \n\na fine film,5\n"dull, long",1\n'),
    ('f.jsonl', '{"verdict": 5, "review": "a fine film"}\n{"verdict": 1, "review": "dull, long"}\n'),
    ('g.json', '[{"whole": "a fine film", "stars": 5.0}, {"whole": "dull, long", "stars": "1.0"}]'),
])
def test_columns_are_found_by_name_or_as_the_other_of_two(tmp_path, name, text):
    """Commas, semicolons, tabs and bars; upper case, blanks and commas in a name; a column unknown beside one known."""
    found = read_labelled(write_text(tmp_path / name, text))
    assert found.examples == [('a fine film', 1), ('dull, long', 0)] and found.labels == ('1', '5')


def test_parquet_reads_the_columns_that_were_found(tmp_path):
    """Shards and stars as floats; a column that is not asked for is not read."""
    rows = [{'ticket': 'x', 'stars': 2.0, 'vector': [0.1]}, {'ticket': 'y', 'stars': 10.0, 'vector': [0.2]}]
    found = read_labelled(write_parquet(tmp_path / 'a.parquet', rows))
    assert found.examples == [('x', 0), ('y', 1)] and found.labels == ('2', '10')


@pytest.mark.parametrize('header, arguments, message', [
    ('a,b', {}, r"which column holds the text and which the label\? It has 'a' \(for example 'x'\), 'b' \(for example "
                r"'1'\); choose with --text_field=NAME and --label_field=NAME"),
    ('text,b,c', {}, r'which column holds the label\? .*; choose with --label_field=NAME'),
    ('text,stars,topic', {}, r'which column holds the label\?'),
    ('review,comment,label', {}, 'which column holds the text'),
    ('text,label', {'text_column': 'txt'}, "field 'txt' is missing, the row has 'text', 'label'; set --text_field"),
    ('text,b,text', {}, "a.csv:1: two columns are named 'text'"),
])
def test_columns_that_cannot_be_told_are_listed_with_an_example(tmp_path, header, arguments, message):
    """No usual name, several of them, a name that is not there, one name twice."""
    path = write_text(tmp_path / 'a.csv', f'{header}\nx,1,2\n' if header.count(',') == 2 else f'{header}\nx,1\n')
    with pytest.raises(ValueError, match=message):
        read_labelled(path, **arguments)


@pytest.mark.parametrize('labels, names, classes', [
    ([0, 1, 0], ('Negative', 'Positive'), [0, 1, 0]), (['1', '1'], ('Negative', 'Positive'), [1, 1]),
    ([0.0, 1.0], ('Negative', 'Positive'), [0, 1]), ([True, False], ('False', 'True'), [1, 0]),
    ([10, 2, 1], ('1', '2', '10'), [2, 1, 0]), ([-1, 0, 1], ('-1', '0', '1'), [0, 1, 2]),
    (['4.5', '12', '4.5'], ('4.5', '12'), [0, 1, 0]),
    (['spam', ' Ham', 'ham ', 'ham'], ('ham', 'spam'), [1, 0, 0, 0]),
    (['good,  really', 'bad'], ('bad', 'good, really'), [1, 0]), ([2, 'b', 'A'], ('2', 'A', 'b'), [0, 2, 1]),
])
def test_labels_are_those_of_the_data(tmp_path, labels, names, classes):
    """0 and 1 are the article's; numbers ascend, words are alphabetical in their commonest spelling; 1.0 is 1."""
    rows = [{'text': f'text {i}', 'label': label} for i, label in enumerate(labels)]
    for path in (write_jsonl(tmp_path / 'a.jsonl', rows), write_text(tmp_path / 'a.json', json.dumps(rows))):
        found = read_labelled(path)
        assert (found.labels, [example.label for example in found.examples]) == (names, classes)


@pytest.mark.parametrize('labels, message', [
    (['x', 'x', 'X'], "'label': all 3 rows have the label 'x'; two are needed"),
    ([f'name {i}' for i in range(30)], "'label' has 30 different values in 30 rows"),
])
def test_a_column_that_is_none_of_labels_is_refused(tmp_path, labels, message):
    """One value, or nearly as many as rows."""
    with pytest.raises(ValueError, match=message):
        read_labelled(write_jsonl(tmp_path / 'a.jsonl', [{'text': 't', 'label': label} for label in labels]))


def test_labels_are_named_as_in_csv_with_a_number_or_without():
    assert parse_labels('bad, "good, really"') == Labels(('bad', 'good, really'))
    assert parse_labels('1=ham,2=not=ham') == Labels(('ham', 'not=ham'), ('1', '2'))


@pytest.mark.parametrize('flag, message', [
    ('one', 'at least two different'), ('a,A', 'at least two different'), ('a,', 'at least two different'),
    ('1=a,b', 'a number of its own'), ('1=a,1=b', 'a number of its own'), ('a,"b', 'unexpected end of data'),
])
def test_labels_that_name_nothing_clearly_are_refused(flag, message):
    with pytest.raises(ValueError, match=message):
        parse_labels(flag)


@pytest.mark.parametrize('flag, values, classes', [
    ('ham,neg,pos', [0, 2, 'neg'], [0, 2, 1]), ('1=ham,2=spam', [1, 2.0, 'spam'], [0, 1, 1]),
    ('1,2,3', [3, 1], [2, 0]), ('no,yes', [True, False, 1], [1, 0, 1]), ('2=b,0=a', [0, 2], [1, 0]),
])
def test_named_labels_stand_for_their_numbers(tmp_path, flag, values, classes):
    """By order from 0, or as the flag says; a name that is a number is that number."""
    path = write_jsonl(tmp_path / 'a.jsonl', [{'text': 'x', 'label': value} for value in values])
    assert [label for _, label in read_labelled(path, labels=parse_labels(flag)).examples] == classes


@pytest.mark.parametrize('flag, values, message', [
    ('ham,neg,pos', [1, 2], 'numbers 1 .. 2 and no 0, so which is which. Say it: --labels=1=ham,2=neg,3=pos'),
    ('1,2,3', [0, 1], "a.jsonl:1: label='0' is no label; use 1, 2, 3"), ('1=a,2=b', [0, 1], "label='0' is no label"),
])
def test_numbers_are_never_taken_for_the_next_name(tmp_path, flag, values, message):
    """Classes counted from 1 would silently shift by one."""
    path = write_jsonl(tmp_path / 'a.jsonl', [{'text': 'x', 'label': value} for value in values])
    with pytest.raises(ValueError, match=message):
        read_labelled(path, labels=parse_labels(flag))


@pytest.mark.parametrize('name, text, message', [
    ('a.csv', 'text,label\nx,1\n"y\nz",\n', r"a\.csv:3: field 'label' holds no label"),
    ('a.csv', 'text,label\n"x\ny",1\n,0\n', r"a\.csv:4: field 'text' must be text"),
    ('a.jsonl', '{"text": "x", "label": null}', r"a\.jsonl:1: field 'label' holds no label, this is None"),
    ('a.jsonl', '{"text": "x", "label": NaN}', r"a\.jsonl:1: field 'label' holds no label, this is nan"),
    ('a.jsonl', '{"text": "x"\n', r'a\.jsonl:1: no valid JSON: .* at column 13'),
    ('a.xlsx', '', 'is a spreadsheet: save the sheet as CSV'),
])
def test_a_message_has_the_true_line_and_cause(tmp_path, name, text, message):
    """Texts of several lines, null, an object that is not closed, a spreadsheet."""
    with pytest.raises(ValueError, match=message):
        read_labelled(write_text(tmp_path / name, text))


@pytest.mark.parametrize('encoding, line, named', [('latin-1', 3, 'ISO-8859-1'), ('utf-16', 1, 'UTF-16')])
def test_another_encoding_is_refused_with_the_line_and_the_remedy(tmp_path, encoding, line, named):
    path = tmp_path / 'a.csv'
    path.write_bytes('text,label\nx,0\ncafé,1\n'.encode(encoding))
    with pytest.raises(ValueError, match=rf'a\.csv:{line}: byte 0x.. is not UTF-8, .*iconv -f {named} -t UTF-8'):
        read_labelled(path)


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path, capsys):
    """A blank text, no label, a label that is none of those named; without the flag the message names it."""
    path = write_text(tmp_path / 'a.csv', 'text,label\nx,yes\n ,yes\ny,\nz,no\nw,maybe\n')
    with pytest.raises(ValueError, match=r'a\.csv:3: .* \(prepare_data.py --skip_bad_rows=True skips and counts'):
        prepare(f'--input={path}', f'--output={tmp_path / "out"}')
    prepare(f'--input={path}', f'--output={tmp_path / "out"}', '--skip_bad_rows=True', '--labels=no,yes')
    said = capsys.readouterr().out
    assert '3 rows skipped:' in said and all(f'{path}:{line}: ' in said for line in (3, 4, 6))
    assert "2 examples in" in said and "{'no': 1, 'yes': 1}" in said
    with pytest.raises(ValueError, match='no examples in it, 2 rows skipped'):
        read_labelled(write_text(path, 'text,label\nx,\n,1\n'), skip_bad_rows=True)


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


# parting


def test_parts_have_each_class_in_proportion_and_lose_nothing():
    """40 and 20 examples by 0.7, 0.1, 0.2: exact, in the order given, seeded."""
    parts = part(MANY, (0.7, 0.1, 0.2))
    assert [counts(found) for found in parts] == [{1: 28, 0: 14}, {1: 4, 0: 2}, {1: 8, 0: 4}]
    assert sorted(sum(parts, []), key=MANY.index) == MANY
    assert all(found == sorted(found, key=MANY.index) for found in parts)
    assert parts == part(MANY, (0.7, 0.1, 0.2)) != part(MANY, (0.7, 0.1, 0.2), seed=1)


@pytest.mark.parametrize('seed', range(5))
def test_the_same_text_is_never_on_two_sides(seed):
    """Copies that differ in case and blanks, with contradicting labels too; the proportions stay."""
    copies = [Example(text.upper().replace(' ', '  \n') + ' ', 1 - label) for text, label in MANY[:30]]
    parts = part(MANY + copies + MANY[:5], (0.5, 0.25, 0.25), seed)
    seen = [{' '.join(text.lower().split()) for text, _ in found} for found in parts]
    assert sum(map(len, seen)) == len(MANY) and [len(found) for found in parts] == [47, 24, 24]


def test_split_ratios_write_three_parts_that_can_be_evaluated(tmp_path, capsys):
    """Nine files; the records of each part give its texts, labels and template back."""
    path = write_jsonl(tmp_path / 'a.jsonl', [example._asdict() for example in MANY])
    prepare(f'--input={path}', f'--output={tmp_path / "out"}', '--split_ratios=0.8,0.1,0.1', '--labels=bad,good',
            r'--template=Say {text}\nMood:')
    files = sorted(file.name for file in (tmp_path / 'out').iterdir())
    assert files == sorted(name for part in ('train', 'validation', 'test')
                           for name in (f'{part}.jsonl', f'eval_{part}.json', f'labels_{part}.json'))
    assert "  test: 6: {'bad': 2, 'good': 4}" in capsys.readouterr().out
    found = [read_prepared(tmp_path / 'out' / f'{name}.jsonl') for name in ('train', 'validation', 'test')]
    assert {template for _, template in found} == {PromptTemplate('Say ', '\nMood:', labels=('bad', 'good'))}
    assert sorted(sum((examples for examples, _ in found), [])) == sorted(MANY)
    prepare(f'--input={path}', f'--output={tmp_path / "two"}', '--split_ratios=.75,.25')
    assert sorted(file.stem for file in (tmp_path / 'two').glob('*.jsonl')) == ['test', 'train']


@pytest.mark.parametrize('ratios', ['0.8', '0.8,0.3', '0.8,0.2,0', 'a,b', '0.4,0.3,0.2,0.1', 'nan,1', '1.5,-0.5'])
def test_split_ratios_that_part_nothing_are_refused(tmp_path, ratios):
    with pytest.raises(ValueError, match='split_ratios=.* must be two or three positive numbers that sum to 1'):
        prepare(f'--input={write_jsonl(tmp_path / "a.jsonl", ROWS)}', f'--output={tmp_path / "out"}',
                f'--split_ratios={ratios}')


def test_a_part_without_a_label_is_said(tmp_path, capsys):
    path = write_jsonl(tmp_path / 'a.jsonl', [example._asdict() for example in [*MANY, Example('rare', 2)]])
    prepare(f'--input={path}', f'--output={tmp_path / "out"}', '--split_ratios=0.8,0.2')
    assert 'WARNING: test has no example of 2' in capsys.readouterr().err


# the program


def test_files_are_those_of_the_article(tmp_path, capsys):
    """NAME.jsonl, eval_NAME.json and labels_NAME.json, in one order, and where they are is printed."""
    rows = [*ROWS, {'text': 'dull', 'label': 0}]
    path = write_jsonl(tmp_path / 'train.jsonl', rows)
    prepare(f'--input={tmp_path}', '--split=train', f'--output={tmp_path / "out"}', '--shuffle=False',
            '--record_fields=text')
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
    """As records are written by default, fields='[prompt],answer' has loss on the answer and eos only."""
    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(golden / 'easylm' / 'tokenizer.model')
    prepare(f'--input={write_jsonl(tmp_path / "a.jsonl", ROWS[:1])}', f'--output={tmp_path / "out"}')
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
    prepare(*arguments, '--overwrite=True')
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


def test_another_preparation_is_not_written_over(tmp_path):
    """Other labels into the same directory are refused before anything changes; the same again, or --overwrite, not."""
    arguments = f'--input={write_jsonl(tmp_path / "a.jsonl", ROWS)}', f'--output={tmp_path / "out"}'
    prepare(*arguments)
    before = {file.name: file.read_bytes() for file in (tmp_path / 'out').iterdir()}
    with pytest.raises(ValueError, match=r'holds a\.jsonl of another preparation: choose .*--overwrite=True'):
        prepare(*arguments, '--labels=good,bad')
    prepare(*arguments)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / 'out').iterdir()}
    prepare(*arguments, '--labels=good,bad', '--overwrite=True')
    assert ' bad' in (tmp_path / 'out' / 'a.jsonl').read_text() and len(list((tmp_path / 'out').iterdir())) == 3


def test_what_was_found_is_said(tmp_path, capsys):
    """Columns, labels with counts, where their names come from, and the first record."""
    path = write_text(tmp_path / 'a.csv', 'ticket,team\nx,billing\ny,"ship, slow"\nz,billing\n')
    prepare(f'--input={path}', f'--output={tmp_path / "a"}', r'--template=Ticket: {text}\nTeam:')
    said = capsys.readouterr().out
    assert "{'billing': 2, 'ship, slow': 1}" in said and r"the first record: 'Ticket: x\nTeam: billing'" in said
    assert "texts from column 'ticket', labels from column 'team': billing,ship, slow (as they stand there" in said
    prepare(f'--input={write_jsonl(tmp_path / "b.jsonl", ROWS)}', f'--output={tmp_path / "b"}')
    assert 'Negative,Positive (for the numbers 0 and 1; --labels names others)' in capsys.readouterr().out


@pytest.mark.parametrize('change, message', [
    (lambda notes: notes['labels'].pop(), 'has 3 records, .* 2 labels: prepare them again'),
    (lambda notes: notes['labels'].reverse(), r'out/a\.jsonl:1: does not fit the label and template'),
    (lambda notes: notes['template'].update(suffix='?'), r'out/a\.jsonl:1: does not fit the label and template'),
    (lambda notes: notes['labels'].__setitem__(0, 2), 'label=2 must be one of'),
    (lambda notes: notes.pop('labels'), r'labels_a\.json: not as prepare_data.py writes it'),
])
def test_records_and_labels_that_do_not_belong_together_are_refused(tmp_path, change, message):
    """A label less, in another order, another template, no such class, no labels."""
    rows = [{'text': 'x', 'label': 0}, ROWS[1], ROWS[0]]
    prepare(f'--input={write_jsonl(tmp_path / "a.jsonl", rows)}', f'--output={tmp_path / "out"}', '--shuffle=False')
    path = tmp_path / 'out' / 'labels_a.json'
    notes = json.loads(path.read_text())
    change(notes)
    path.write_text(json.dumps(notes))
    with pytest.raises(ValueError, match=message):
        read_prepared(tmp_path / 'out' / 'a.jsonl')


def test_records_that_lost_their_labels_are_known(tmp_path):
    """A copy of NAME.jsonl alone is no labelled set, and the message says what is missing."""
    prepare(f'--input={write_jsonl(tmp_path / "a.jsonl", ROWS)}', f'--output={tmp_path / "out"}')
    (tmp_path / 'out' / 'labels_a.json').unlink()
    assert read_prepared(tmp_path / 'out' / 'a.jsonl') is None
    with pytest.raises(ValueError, match=r'without their labels: labels_a\.json must stand beside'):
        read_labelled(tmp_path / 'out' / 'a.jsonl')


def test_the_worked_example_has_four_labels_in_unequal_shares(tmp_path):
    """docs/examples/tickets.csv: 480 tickets of 8 to 40 words, no text twice."""
    found = read_labelled(pathlib.Path(__file__).parent.parent / 'docs' / 'examples' / 'tickets.csv')
    assert found.columns == ('ticket', 'team') and found.labels == ('account', 'billing', 'shipping', 'technical')
    assert counts(found.examples) == {0: 72, 1: 192, 2: 120, 3: 96}
    assert len({' '.join(text.lower().split()) for text, _ in found.examples}) == 480
    assert all(8 <= len(text.split()) <= 40 for text, _ in found.examples)
