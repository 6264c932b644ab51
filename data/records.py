"""Read a file of one JSON object a line as records: token ids with a loss mask, line after line.

A file has one policy for bad lines (no JSON object, invalid UTF-8, longer than 16 MiB, a field missing, of the wrong
type or blank): refuse the first with its file:line, or skip and count them all.  Empty lines are no records; a byte
order mark and CRLF are accepted.  Neighbours: text_processor.py (one object) and parallel.py (in several processes)
below; huggingface.py (records from elsewhere), stream.py and rows.py (records -> arrays), labelled.py above.
"""
import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from data.parallel import Workers
from data.text_processor import TextProcessor, tokenize
from mistake import Mistake

MAX_LINE_BYTES = 1 << 24


class RawLine(NamedTuple):
    """A line: its bytes [start, end), its index (from 0), and its text (without a byte order mark) or what is wrong."""

    start: int
    end: int
    index: int
    text: bytes
    problem: str


class Record(NamedTuple):
    """One tokenized record; loss_mask is 0.0 or 1.0 per token.  start, end, index: its line, as in RawLine.

    weight: the factor of its part of the loss.
    """

    tokens: list[int]
    loss_mask: list[float]
    start: int
    end: int
    index: int
    weight: float = 1.0


def raw_lines(path: str | os.PathLike, start: int = 0, index: int = 0) -> Iterator[RawLine]:
    """Yield the lines of a file from byte `start` (where line `index` begins), in memory bounded by MAX_LINE_BYTES."""
    with open(path, 'rb') as file:
        file.seek(start)
        while line := file.readline(MAX_LINE_BYTES + 1):
            problem = ''
            if len(line) > MAX_LINE_BYTES and not line.endswith(b'\n'):
                problem = f'the line is longer than {MAX_LINE_BYTES} bytes'
                while line and not line.endswith(b'\n'):
                    line = file.readline(MAX_LINE_BYTES)
                line = b''
            end = file.tell()
            yield RawLine(start, end, index, line.removeprefix(b'\xef\xbb\xbf') if start == 0 else line, problem)
            start, index = end, index + 1


class RecordReader:
    """Reads the records of a JSON-lines file, in file order, with one policy for bad lines.

    flag: where the options stand on the command line, for messages.  skipped_lines: number of bad lines, in all passes;
    problems: the first ten of them, with file:line.  processes: 1 tokenizes here, more in that many processes, with the
    same records, errors and counts.  chunk_size, batch_size: as in Workers.outcomes.
    """

    positions_are_bytes = True  # start and end of a Record

    def __init__(self, path: str | os.PathLike, processor: TextProcessor, *, skip_bad_lines: bool = False,
                 flag: str = 'train_dataset.json_dataset', processes: int = 1, chunk_size: int = 32,
                 batch_size: int = 1024):
        if not os.path.isfile(path):
            raise Mistake(f'{flag}.path={str(path)!r} is no file; it must name a file with one JSON object a line')
        self.path, self.processor, self.skip_bad_lines, self.flag = str(path), processor, skip_bad_lines, flag
        self.skipped_lines, self.problems = 0, []
        self._processes, self._chunk_size, self._batch_size = processes, chunk_size, batch_size
        self._workers = None

    def records(self, start: int = 0, index: int = 0) -> Iterator[Record]:
        """Yield the records from byte `start` (the beginning of line `index`) to the end of the file: one pass."""
        for line, (tokens, loss_mask, weight, problem) in self._outcomes(raw_lines(self.path, start, index)):
            if line.problem or problem:
                refuse_or_count(self, line.index, line.problem or problem)
            elif tokens is not None:
                yield Record(tokens, loss_mask, line.start, line.end, line.index, weight)

    def place(self, index: int) -> str:
        """Name the place of a record, for messages."""
        return f'{self.path}:{index + 1}'

    def identity(self) -> dict:
        """Return its size and a digest of its first MiB: enough to notice that the file was replaced or edited."""
        with open(self.path, 'rb') as file:
            start = hashlib.sha256(file.read(1 << 20)).hexdigest()
            return {'size': file.seek(0, 2), 'sha256_of_first_MiB': start}

    def check_start(self, start: int) -> None:
        """Raise Mistake, with the next place that is one, unless a line begins at byte `start` or the file ends."""
        with open(self.path, 'rb') as file:
            size = file.seek(0, 2)
            if start > size:
                raise Mistake(f'{self.flag}.start_seek_loc={start} is beyond the end of {self.path}, which has '
                              f'{size} bytes; give a dataset_file_loc that was logged for this file')
            file.seek(max(start - 1, 0))
            if start in (0, size) or file.read(1) == b'\n':
                return
            file.readline()
            raise Mistake(f'{self.flag}.start_seek_loc={start} is in the middle of a line of {self.path}; the next '
                          f'line begins at byte {file.tell()}')

    def close(self) -> None:
        """End the tokenizer processes; `records` would start them again."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _outcomes(self, lines: Iterator[RawLine]) -> Iterator[tuple[RawLine, tuple]]:
        if self._processes == 1:
            return ((line, tokenize(self.processor, line.text)) for line in lines)
        if self._workers is None:
            self._workers = Workers(self.processor, self._processes)
        return self._workers.outcomes(lines, self._chunk_size, self._batch_size)


def refuse_or_count(reader, index: int, problem: str) -> None:
    """Raise Mistake for a bad record, or count it where the reader's `skip_bad_lines` says so."""
    where = f'{reader.place(index)}: {problem}'
    if not reader.skip_bad_lines:
        raise Mistake(f'{where} (--{reader.flag}.skip_bad_lines=True skips and counts such lines)')
    reader.skipped_lines += 1
    if len(reader.problems) < 10:
        reader.problems.append(where)
