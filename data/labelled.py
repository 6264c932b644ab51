"""Labelled sets: texts and labels out of the rows of a file.

The columns of text and label are found by their names, the labels in the data, unless both are named.  A label is a
word or a number; 1.0 is 1, and upper and lower case are one label.  A row without text or label is refused with its
place, or skipped and counted.  Neighbours: tables.py (rows of files) below, parts.py (samples of a set) above.
"""
import csv
import itertools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data.prompt import PromptTemplate
from data.tables import labelled_files, rows
from mistake import Mistake

TEXT_COLUMNS = ('text', 'review', 'sentence', 'ticket', 'content', 'message', 'comment', 'body', 'document', 'question',
                'query', 'utterance', 'post', 'tweet')
LABEL_COLUMNS = ('label', 'labels', 'class', 'category', 'sentiment', 'team', 'stars', 'rating', 'target', 'tag',
                 'topic', 'intent', 'emotion', 'polarity')
NUMBER = re.compile(r'[+-]?\d+(\.\d+)?')


class Example(NamedTuple):
    """One labelled text; `label` is its class, 0 .. number of labels - 1."""

    text: str
    label: int


class Labels(NamedTuple):
    """The names of the labels, and the numbers that stand for them.

    names: as the model answers them, class 0 first.  numbers: what stands for each in the data, for example ('1', '2');
    empty: '0', '1', .., unless a name is a number itself.
    """

    names: tuple[str, ...]
    numbers: tuple[str, ...] = ()


class Labelled(NamedTuple):
    """A set that was read.

    examples: in file order.  labels: their names.  origin: where the names come from, in words.  columns: of text and
    of label.  skipped: the rows left out, where and why.
    """

    examples: list[Example]
    labels: tuple[str, ...]
    origin: str
    columns: tuple[str, str]
    skipped: list[str]


def parse_labels(flag: str) -> Labels:
    """Read --labels: 'bad,good' names 0, 1, ..; '1=bad,2=good' says which number is which; quoted as in CSV.

    Raises Mistake unless these are at least two different names, all or none with a number.
    """
    try:
        names = [name.strip() for name in next(csv.reader([flag], skipinitialspace=True, strict=True), ())]
    except csv.Error as error:
        raise Mistake(f'labels={flag!r}: {error}; write a name with a comma as "one, two"') from None
    numbered = [re.fullmatch(r'(\d+)\s*=\s*(.+)', name) for name in names]
    numbers = tuple(match[1] for match in numbered if match)
    if numbers and not len(set(numbers)) == len(numbers) == len(names):
        raise Mistake(f'labels={flag!r}: give each name a number of its own (1=bad,2=good), or none a number')
    labels = tuple(match[2] if match else name for match, name in zip(numbered, names, strict=True))
    if len(labels) < 2 or len({name.lower() for name in labels} - {''}) != len(labels):
        raise Mistake(f'labels={flag!r} must be at least two different names')
    return Labels(labels, numbers)


def read_labelled(path: str | os.PathLike, split: str = '', text_column: str = '', label_column: str = '',
                  labels: Labels | None = None, skip_bad_rows: bool = False) -> Labelled:
    """The examples of a file, or of one split of a directory, in file order.

    An empty column is found by name (`find_columns`); no `labels` are those of the data (`labels_of`).  Raises Mistake
    with the file and line (or row) for a row without text or label, or with a label that is none of `labels`, unless
    `skip_bad_rows`; and names the flag for a bad path.
    """
    found, skipped, files = [], [], labelled_files(path, split)
    columns = find_columns(files[0], text_column, label_column)

    def bad(place: str, problem: str) -> None:
        if not skip_bad_rows:
            raise Mistake(f'{place}: {problem} (prepare_data.py --skip_bad_rows=True skips and counts such rows)')
        skipped.append(f'{place}: {problem}')

    for file in files:
        for place, row in rows(file, columns):
            text, label, problem = _text_and_label(row, *columns)
            if problem:
                bad(place, problem)
            else:
                found.append((place, text, label))
    if not found:
        raise Mistake(f'{path}: no examples in it, {len(skipped)} rows skipped')
    seen = [label for _, _, label in found]
    names = labels or Labels(labels_of(seen, columns[1]))
    origin = 'as named' if labels else 'as they stand there; --labels names others'
    if not labels and set(seen) & {'0', '1'} and names.names == PromptTemplate().labels:
        origin = 'for the numbers 0 and 1; --labels names others'
    classes, examples = _classes(names, set(seen)), []
    for place, text, label in found:
        if label.lower() in classes:
            examples.append(Example(text, classes[label.lower()]))
        else:
            bad(place, f'{columns[1]}={label!r:.40} is no label; use {", ".join(sorted(classes))}, or set --labels')
    if not examples:
        raise Mistake(f'{path}: no examples in it, {len(skipped)} rows skipped')
    return Labelled(examples, names.names, origin, columns, skipped)


def find_columns(file: Path, text_column: str = '', label_column: str = '') -> tuple[str, str]:
    """The columns of text and of label: those named, else `text` and `label`, else the only one with a usual name, else
    the other one of two.  Raises Mistake that lists the columns, each with an example, where that decides nothing."""
    present = {}
    for _, row in itertools.islice(rows(file), 100):
        for name, value in row.items():
            present[name] = present.get(name) or value
    if not present:
        raise Mistake(f'{file}: no examples in it')
    chosen = {'text': text_column, 'label': label_column}
    for kind, usual in (('text', TEXT_COLUMNS), ('label', LABEL_COLUMNS)):
        if chosen[kind] and chosen[kind] not in present:
            raise Mistake(f'{file}: field {chosen[kind]!r} is missing, the row has {", ".join(map(repr, present))}; '
                          f'set --{kind}_field=NAME')
        free = [name for name in present if name not in chosen.values()]
        named = [name for name in free if name.lower() in usual]
        if exact := [name for name in named if name.lower() == kind]:
            named = exact
        if not chosen[kind] and len(named) == 1:
            chosen[kind] = named[0]
    for kind, other in (('text', 'label'), ('label', 'text')):
        if not chosen[kind] and chosen[other] and len(present) == 2:
            chosen[kind] = next(name for name in present if name != chosen[other])
    if missing := [kind for kind in chosen if not chosen[kind]]:
        if set(present) == {'text', 'prompt', 'answer'}:
            raise Mistake(f'{file}: these are records of prepare_data.py without their labels: labels_{file.stem}.json '
                          'must stand beside them')
        listed = ', '.join(f'{name!r} (for example {str(value)!r:.40})' for name, value in present.items())
        raise Mistake(f'{file}: which column holds the {" and which the ".join(missing)}? It has {listed}; choose with '
                      + ' and '.join(f'--{kind}_field=NAME' for kind in missing))
    return chosen['text'], chosen['label']


def labels_of(found: list[str], column: str = 'label') -> tuple[str, ...]:
    """The labels in a column, class 0 first: numbers in ascending order, else names in alphabetical order, each in its
    commonest spelling.  0 and 1 are Negative and Positive, as the article has them, if there are no others."""
    spellings = {}
    for label, count in Counter(found).items():
        spellings.setdefault(label.lower(), Counter())[label] = count
    article = PromptTemplate().labels
    if set(spellings) & {'0', '1'} and set(spellings) <= {'0', '1', *map(str.lower, article)}:
        return article
    if len(spellings) < 2:
        raise Mistake(f'{column!r}: all {len(found)} rows have the label {found[0]!r}; two are needed: name them with '
                      '--labels, or choose another --label_field')
    if len(spellings) > max(20, len(found) // 10):
        raise Mistake(f'{column!r} has {len(spellings)} different values in {len(found)} rows, for example '
                      f'{found[0]!r:.40}: no labels; choose another --label_field, or name the labels with --labels')
    numeric = all(NUMBER.fullmatch(key) for key in spellings)
    return tuple(spellings[key].most_common(1)[0][0] for key in sorted(spellings, key=float if numeric else str))


def _text_and_label(row: dict, text_column: str, label_column: str) -> tuple[str, str, str]:
    """(text, label, '') of a row, or ('', '', what is wrong with it)."""
    for flag, name in (('text_field', text_column), ('label_field', label_column)):
        if name not in row:
            return '', '', (f'field {name!r} is missing, the row has {", ".join(map(repr, row))}; set --{flag}=NAME')
    text, label = row[text_column], row[label_column]
    if not isinstance(text, str) or not text.strip() or text != text.encode('utf-8', 'ignore').decode('utf-8'):
        return '', '', f'field {text_column!r} must be text that is not blank, this is {text!r:.40}'
    if label is None or isinstance(label, float) and not math.isfinite(label) or not str(label).strip():
        return '', '', f'field {label_column!r} holds no label, this is {label!r}'
    if isinstance(label, list | dict | bytes):
        return '', '', f'field {label_column!r} must be a word or a number, this is {label!r:.40}'
    return text, re.sub(r'^([+-]?\d+)\.0+$', r'\1', ' '.join(str(label).split())), ''


def _classes(labels: Labels, found: set[str]) -> dict[str, int]:
    """{a label as it stands in the data, in lower case: its class}.

    Raises Mistake where numbers would be taken for the wrong names: they begin at 1, and nobody said which is which.
    """
    names = {name.lower(): number for number, name in enumerate(labels.names)}
    if not labels.numbers and any(NUMBER.fullmatch(name) for name in names):
        return names
    numbers = labels.numbers or [str(number) for number in range(len(names))]
    counted = {int(label) for label in found - set(names) if label.isdecimal()}
    if not labels.numbers and counted and min(counted) > 0 and max(counted) > 1:
        said = ','.join(f'{min(counted) + n}={name}' for n, name in enumerate(labels.names))
        raise Mistake(f'labels={",".join(labels.names)!r}: the data has the numbers {min(counted)} .. {max(counted)} '
                      f'and no 0, so which is which? Say it: --labels={said}')
    spoken = {'false': 0, 'true': 1} if len(names) == 2 and not labels.numbers else {}
    return {**spoken, **{number: n for n, number in enumerate(numbers)}, **names}


def read_prepared(path: str | os.PathLike) -> tuple[list[Example], PromptTemplate] | None:
    """The examples and the template of a NAME.jsonl that prepare_data.py wrote; None without labels_NAME.json beside
    it.  Raises Mistake where the two do not belong together."""
    path = Path(path)
    notes = path.with_name(f'labels_{path.stem}.json')
    if path.suffix != '.jsonl' or not path.is_file() or not notes.is_file():
        return None
    try:
        noted = json.loads(notes.read_text(encoding='utf-8'))
        labels, template = noted['labels'], PromptTemplate.from_dict(noted['template'], source=str(notes))
        records = list(rows(path))
        if len(records) != len(labels):
            raise Mistake(f'{path} has {len(records)} records, {notes} {len(labels)} labels: prepare them again')
        ends = [template.suffix + template.answer(label) for label in labels]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise Mistake(f'{notes}: not as prepare_data.py writes it ({error!r})') from None
    examples = []
    for (place, record), label, end in zip(records, labels, ends, strict=True):
        text = str(record.get('text')).removeprefix(template.prefix).removesuffix(end)
        if record.get('text') != template.record(text, label):
            raise Mistake(f'{place}: does not fit the label and template in {notes}: prepare them again')
        examples.append(Example(text, label))
    return examples, template
