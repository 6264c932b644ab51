"""Tables on disk: the rows of a file as dicts, each with its place.

Read are .json (a list of objects, or {"data": [..]}), .jsonl and .txt (one object a line), .csv and .tsv (with a
header), .parquet, and one split of a directory laid out as the Hugging Face hub keeps `rotten_tomatoes`
(data/train-00000-of-00001.parquet, train.parquet or train.jsonl).  Nothing is repaired: a file that is damaged is
refused with the place.  Neighbours: records.py (the line reader) below, labelled.py (texts and labels) above.
"""
import codecs
import csv
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from data.records import raw_lines
from data.text_processor import parse
from mistake import Mistake


def labelled_files(path: str | os.PathLike, split: str = '') -> list[Path]:
    """The files that hold `path` (and `split`, when it is a directory): one, or the shards of a split in order."""
    given, path = str(path), Path(path)
    if path.is_file():
        if split:
            raise Mistake(f'{split=} chooses within a directory, input={str(path)!r} is a file: leave --split out '
                          '(prepare_data.py --split_ratios=0.8,0.1,0.1 parts a file into train, validation and test)')
        return [path]
    if not given or not path.is_dir():
        raise Mistake(f'input={given!r} does not exist; --input must name a .csv, .tsv, .json, .jsonl, .txt or '
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


def rows(file: Path, columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row; a row is a dict of the values present.  .parquet reads `columns` only, when given."""
    readers = {'.json': _json_rows, '.jsonl': _json_line_rows, '.txt': _json_line_rows, '.csv': _csv_rows,
               '.tsv': _csv_rows}
    kind = file.suffix.lower()
    if kind == '.parquet':
        return _parquet_rows(file, columns)
    if kind in ('.xlsx', '.xls', '.ods', '.numbers'):
        raise Mistake(f'input={str(file)!r} is a spreadsheet: save the sheet as CSV (UTF-8) and give that file')
    if kind not in readers:
        raise Mistake(f'input={str(file)!r} ends in {file.suffix!r}; use .csv, .tsv, .json, .jsonl, .txt or .parquet')
    return readers[kind](file)


def _text(file: Path) -> str:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as error:
        line = content.count(b'\n', 0, error.start) + 1
        encoding = 'UTF-16' if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else 'ISO-8859-1'
        raise Mistake(f'{file}:{line}: byte {content[error.start]:#x} is not UTF-8, the file may be {encoding}: save '
                      f'it as CSV UTF-8, or convert it: iconv -f {encoding} -t UTF-8 {file} > NEW') from None


def _json_line_rows(file: Path):
    for line in raw_lines(file):
        place, (example, problem) = f'{file}:{line.index + 1}', parse(line.text)
        if line.problem or problem:
            raise Mistake(f'{place}: {line.problem or problem}')
        if example is not None:
            yield place, example


def _json_rows(file: Path):
    try:
        found = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise Mistake(f'{file}:{error.lineno}: no valid JSON: {error.msg}; if it holds one object a line, rename it '
                         'to .jsonl') from None
    except RecursionError as error:
        raise Mistake(f'{file}: no valid JSON: {error}') from None
    if isinstance(found, dict):
        found = found.get('data')
    if not isinstance(found, list):
        raise Mistake(f'{file}: must hold a list of objects, or {{"data": [..]}}')
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise Mistake(f'{file}: entry {number} must be an object, this is {type(row).__name__}')
        yield f'{file}: entry {number}', row


def _csv_rows(file: Path):
    """The rows of a table whose columns are parted by tabs (.tsv), else by whichever of , ; tab | gives the header the
    most columns, a comma when several do.  The place of a row is its first line."""
    text = _text(file)
    first = next((line for line in text.splitlines() if line.strip()), '')
    marks = '\t' if file.suffix.lower() == '.tsv' else ',;\t|'
    mark = max(marks, key=lambda mark: len(next(csv.reader([first], delimiter=mark), ())))
    reader, line, header = csv.reader(io.StringIO(text, newline=''), delimiter=mark, strict=True), 1, None
    try:
        for row in reader:
            place, line = f'{file}:{line}', reader.line_num + 1
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                if twice := [name for name in header if name and header.count(name) > 1]:
                    raise Mistake(f'{place}: two columns are named {twice[0]!r}; rename one')
                continue
            if len(row) > len(header):
                raise Mistake(f'{place}: more columns than the header has')
            yield place, dict(itertools.zip_longest(header, row))
    except csv.Error as error:
        raise Mistake(f'{file}:{line}: {error}') from None


def _parquet_rows(file: Path, columns: tuple[str, ...] | None):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Mistake(f"{file}: .parquet needs pyarrow: pip install '.[data]', or give .jsonl or .csv") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=columns and list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield f'{file}: row {number}', row
    except (pyarrow.ArrowException, OSError) as error:
        raise Mistake(f'{file}: no readable parquet file: {error}') from None
