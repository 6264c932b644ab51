"""Read records from a data set that the `datasets` library loads: the hub's, or a local directory of jsonl or parquet.

The reader is used as records.RecordReader is; a place is the index of an example, not a byte.
"""
import hashlib
import json
from collections.abc import Iterator
from itertools import islice

from data.records import Record, refuse_or_count
from data.text_processor import TextProcessor
from mistake import Mistake


class HuggingfaceReader:
    """Reads the records of `datasets.load_dataset(path, name, split=split, streaming=streaming)`, in the set's order.

    name: '' for none.  flag, skip_bad_lines, skipped_lines, problems: as in RecordReader; an example that lacks a
    field, or holds something else than text in it, is a bad one.  Raises Mistake for a set that cannot be loaded
    and where the library is not installed.
    """

    positions_are_bytes = False

    def __init__(self, path: str, name: str, split: str, streaming: bool, processor: TextProcessor, *,
                 skip_bad_lines: bool = False, flag: str = 'train_dataset.huggingface_dataset'):
        if not path or not split:
            raise Mistake(f'{flag}: {path=} and {split=} must both be given, for example '
                          f'--{flag}.path=allenai/c4 --{flag}.split=train')
        try:
            import datasets
        except ImportError:
            raise Mistake(f"{flag}.{path=} needs the datasets library: pip install -e '.[huggingface]'") from None
        try:
            self._dataset = datasets.load_dataset(path, name or None, split=split, streaming=streaming)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise Mistake(f'{flag}: {path=} {name=} {split=} cannot be loaded: {error}; check the three (name is '
                          "'' for a set without configurations), and the network unless path is a local directory"
                          ) from error
        self.path, self.processor, self.skip_bad_lines, self.flag = path, processor, skip_bad_lines, flag
        self.skipped_lines, self.problems = 0, []
        self._named = {'path': path, 'name': name, 'split': split}
        self._rows = None if streaming else len(self._dataset)

    def records(self, start: int = 0, index: int = 0) -> Iterator[Record]:
        """Yield the records from example `start` (equal to `index`) to the end: one pass."""
        for number, example in enumerate(self._dataset.skip(start) if start else self._dataset, start):
            try:
                tokens, loss_mask = self.processor(example)
                weight = self.processor.weight(example)
            except ValueError as error:
                refuse_or_count(self, number, str(error))
            else:
                yield Record(tokens, loss_mask, number, number + 1, number, weight)

    def place(self, index: int) -> str:
        """Name the place of a record, for messages."""
        return f'{self.path}[{index}]'

    def identity(self) -> dict:
        """Return the set's names, its length (None: streaming) and a digest of its first 100 examples.

        The library's own fingerprint would not do: it changes with the date of a local file.
        """
        digest = hashlib.sha256()
        for example in islice(self._dataset, 100):
            digest.update(json.dumps(example, sort_keys=True, default=lambda value: type(value).__name__).encode())
        return self._named | {'rows': self._rows, 'sha256_of_first_100': digest.hexdigest()}

    def check_start(self, start: int) -> None:
        """Raise Mistake for an example beyond the end (which streaming cannot know)."""
        if self._rows is not None and start > self._rows:
            raise Mistake(f'{self.flag}: example {start} is beyond the end of {self.path}, which has {self._rows}')

    def close(self) -> None:
        """Do nothing: examples are tokenized in this process."""
