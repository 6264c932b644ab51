"""Labelled sets: read one, and take a sample of it.

Read from .json (a list of objects, or {"data": [..]}), .jsonl and .txt (one object a line), .csv (with a header),
.parquet, or a directory laid out as the Hugging Face hub keeps `rotten_tomatoes` (data/train-00000-of-00001.parquet,
train.parquet or train.jsonl).  A label is the number of its class or its name.  Nothing is repaired: the first row
that does not fit is refused with its place in the file.  Neighbours: records.py (the line reader), prepare_data.py
(the program).
"""
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.records import json_lines
from mistake import Mistake


class Example(NamedTuple):
    """One labelled text; `label` is its class, 0 .. number of labels - 1."""

    text: str
    label: int


def read_labelled(path: str | os.PathLike, split: str = '', text_field: str = 'text', label_field: str = 'label',
                  labels: tuple[str, ...] = ('Negative', 'Positive')) -> list[Example]:
    """The examples of a file, or of one split of a directory, in file order.

    A label is accepted as class number (0, '0') or as a name out of `labels`, whatever its case.  Raises Mistake
    with the file and line (or row) for a missing field, a blank text and any other label, and names the flag for a
    bad path.
    """
    names = {name.strip().lower(): number for number, name in enumerate(labels)}
    if len(labels) < 2 or len(names) != len(labels) or '' in names:
        raise Mistake(f'{labels=} must be at least two different names')
    numbers = {str(number): number for number in range(len(labels))}
    examples = []
    for file in labelled_files(path, split):
        for place, row in _rows(file, (text_field, label_field)):
            for flag, field in (('text_field', text_field), ('label_field', label_field)):
                if row.get(field) is None:
                    present = ', '.join(repr(key) for key in row if key is not None)
                    raise Mistake(f'{place}: field {field!r} is missing, the row has {present}; set --{flag}=NAME')
            text, label = row[text_field], row[label_field]
            if not isinstance(text, str) or not text.strip() or text != text.encode('utf-8', 'ignore').decode('utf-8'):
                raise Mistake(f'{place}: field {text_field!r} must be text that is not blank, this is {text!r:.40}')
            key = str(label).strip().lower()
            number = names.get(key, numbers.get(key))
            if number is None:
                known = ', '.join(f'{n} or {name}' for n, name in enumerate(labels))
                raise Mistake(f'{place}: {label_field}={label!r:.40} is no label; use {known}, or set --labels')
            examples.append(Example(text, number))
    if not examples:
        raise Mistake(f'{path}: no examples in it')
    return examples


def labelled_files(path: str | os.PathLike, split: str = '') -> list[Path]:
    """The files that hold `path` (and `split`, when it is a directory): one, or the shards of a split in order."""
    given, path = str(path), Path(path)
    if path.is_file():
        if split:
            raise Mistake(f'{split=} chooses within a directory, input={str(path)!r} is a file: leave --split out')
        return [path]
    if not given or not path.is_dir():
        raise Mistake(f'input={given!r} does not exist; --input must name a .json, .jsonl, .txt, .csv or '
                         '.parquet file, or a directory with train.parquet and the like')
    if not split:
        raise Mistake(f'input={str(path)!r} is a directory: choose a part of it, for example --split=train')
    shards = sorted((path / 'data').glob(f'{split}-[0-9]*-of-[0-9]*.parquet'))
    if shards:
        if len(shards) != int(shards[0].stem.rpartition('-')[2]):
            raise Mistake(f'{path}/data: {len(shards)} shards of {split=} found, {shards[0].name} says otherwise')
        return shards
    for name in (f'{split}.parquet', f'{split}.jsonl'):
        if (path / name).is_file():
            return [path / name]
    raise Mistake(f'{split=}: input={str(path)!r} holds neither data/{split}-00000-of-00001.parquet nor '
                     f'{split}.parquet nor {split}.jsonl; check --split and --input')


def sample(examples: list[Example], *, ratio: float = 1.0, size: int = 0, seed: int = 42, stratified: bool = True,
           shuffle: bool = True) -> list[Example]:
    """A part of `examples` without repetition: `ratio` of them, or `size` of them (0: as the ratio says).

    The order is that of a permutation seeded by `seed`, or file order when not `shuffle`; the sample is the beginning
    of it.  So smaller samples are contained in larger ones of the same seed.  `stratified`: each class has its
    share of the whole, which is round(ratio * n) or `size` exactly, by largest remainder.
    """
    if not 0 < ratio <= 1:
        raise Mistake(f'sample_ratio={ratio} must be above 0 and at most 1')
    if not 0 <= size <= len(examples):
        raise Mistake(f'sample_size={size} must be between 0 (all) and {len(examples)}, the number of examples')
    if size and ratio != 1:
        raise Mistake(f'sample_ratio={ratio} and sample_size={size}: set only one of them')
    groups = [example.label if stratified else 0 for example in examples]
    counts = np.bincount(groups) if groups else np.zeros(1, int)
    quota = _shares(counts, size or int(ratio * len(examples) + 0.5))
    order = np.random.default_rng(seed).permutation(len(examples)) if shuffle else range(len(examples))
    chosen = []
    for i in order:
        if quota[groups[i]] > 0:
            quota[groups[i]] -= 1
            chosen.append(examples[i])
    if not chosen:
        raise Mistake(f'sample_ratio={ratio} of {len(examples)} examples is none; raise --sample_ratio')
    return chosen


def _shares(counts: np.ndarray, size: int) -> np.ndarray:
    """`size` divided in proportion to `counts` by largest remainder, in integers: nothing is rounded."""
    shares, remainders = np.divmod(counts.astype(np.int64) * size, counts.sum())
    for group in sorted(range(len(counts)), key=lambda group: -remainders[group])[:size - int(sum(shares))]:
        shares[group] += 1
    return shares


def _rows(file: Path, fields: tuple[str, str]) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row of a file; a row is a dict with at least the keys present."""
    readers = {'.json': _json_rows, '.jsonl': _json_line_rows, '.txt': _json_line_rows, '.csv': _csv_rows}
    if file.suffix == '.parquet':
        return _parquet_rows(file, fields)
    if file.suffix not in readers:
        raise Mistake(f'input={str(file)!r} ends in {file.suffix!r}; use .json, .jsonl, .txt, .csv or .parquet')
    return readers[file.suffix](file)


def _json_line_rows(file: Path):
    for line in json_lines(file):
        if line.problem:
            raise Mistake(f'{file}:{line.index + 1}: {line.problem}')
        if line.example is not None:
            yield f'{file}:{line.index + 1}', line.example


def _json_rows(file: Path):
    try:
        rows = json.loads(file.read_bytes().decode('utf-8-sig'))
    except json.JSONDecodeError as error:
        raise Mistake(f'{file}:{error.lineno}: no valid JSON: {error.msg}; if it holds one object a line, rename it '
                         'to .jsonl') from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise Mistake(f'{file}: no valid JSON: {error}') from None
    if isinstance(rows, dict):
        rows = rows.get('data')
    if not isinstance(rows, list):
        raise Mistake(f'{file}: must hold a list of objects, or {{"data": [..]}}')
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise Mistake(f'{file}: entry {number} must be an object, this is {type(row).__name__}')
        yield f'{file}: entry {number}', row


def _csv_rows(file: Path):
    with open(file, encoding='utf-8-sig', newline='') as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise Mistake(f'{file}:{reader.line_num}: more columns than the header has')
                yield f'{file}:{reader.line_num}', row
        except (csv.Error, UnicodeDecodeError) as error:
            raise Mistake(f'{file}:{reader.line_num + 1}: {error}') from None


def _parquet_rows(file: Path, fields: tuple[str, str]):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Mistake(f"{file}: .parquet needs pyarrow: pip install '.[parquet]', or give .jsonl or .csv") from None
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        present = parquet.schema_arrow.names
        if not set(fields) <= set(present):
            yield f'{file}: row 1', dict.fromkeys(present, '')  # all rows lack the same field
            return
        rows = parquet.read(columns=list(fields)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise Mistake(f'{file}: no readable parquet file: {error}') from None
    for number, row in enumerate(rows, 1):
        yield f'{file}: row {number}', row
