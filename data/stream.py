"""Make batches as EasyLM does: all records in file order form one stream of tokens.

The stream is cut into batch_size rows of seq_length tokens; targets are the same stream one token later.  Records
straddle rows, and attention crosses records.  Neighbours: batches.py below; rows.py, the other way.
"""
from collections import deque

import numpy as np

from data.batches import DAMAGED, STREAM_STATE, Batch, Reader, Throughput, check_source, check_state
from data.records import Record
from mistake import Mistake


class PackedStream:
    """Yields the batches of EasyLM's token stream (its data.py, August 2023), number for number.

    With C = batch_size * seq_length, a batch takes tokens [0, C) of the buffer as inputs and [1, C] as targets with
    their masks, then drops C tokens; records are read until more than C + 1 tokens wait.  `always_start_with_bos`
    overwrites column 0 of the inputs, not of the targets.  `start_seek_loc` (a byte where a line begins),
    `example_index_at_start` and `tokens_count_at_start` begin elsewhere by hand.  `metrics` averages the throughput
    over `throughput_average_window_size` batches.  loss_per: 'row' is EasyLM's mean over rows of the stream, 'token'
    the mean over all targets of a batch.
    """

    def __init__(self, reader: Reader, *, seq_length: int, batch_size: int, always_start_with_bos: bool = False,
                 start_seek_loc: int = 0, example_index_at_start: int = 0, tokens_count_at_start: int = 0,
                 throughput_average_window_size: int = 200, loss_per: str = 'row'):
        reader.check_start(start_seek_loc)
        self.reader, self.batch_size, self.seq_length = reader, batch_size, seq_length
        self.always_start_with_bos, self.loss_per = always_start_with_bos, loss_per
        self.total_tokens = tokens_count_at_start
        self._throughput = Throughput(throughput_average_window_size)
        self._source = {'records': reader.identity(), 'text_processor': reader.processor.settings}
        self._begin(start_seek_loc, example_index_at_start)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        self._throughput.start()
        shape = self.batch_size, self.seq_length
        count = self.batch_size * self.seq_length
        while len(self._tokens) <= count + 1:
            self._append(next(self._records))
        self.total_tokens += count
        inputs = np.array(self._tokens[:count], np.int32).reshape(shape)
        targets = np.array(self._tokens[1:count + 1], np.int32).reshape(shape)
        loss_mask = np.array(self._loss_mask[1:count + 1], np.float32).reshape(shape)
        weights = np.array(self._weights[1:count + 1], np.float32).reshape(shape)
        share = loss_mask / max(loss_mask.sum(), 1) if self.loss_per == 'token' else None
        if self.always_start_with_bos:
            inputs[:, 0] = self.reader.processor.tokenizer.bos_token_id
        self._drop(count)
        self._throughput.add(count)
        return Batch(inputs, None, None, targets, loss_mask, np.ones(self.batch_size, np.float32), None, share,
                     weights if self.reader.processor.weighted else None)

    def pass_tokens(self) -> int:
        """Count the tokens of one pass over the records, by tokenizing all of them: nothing is kept, no place changes.

        Called before the first batch.
        """
        skipped, problems = self.reader.skipped_lines, list(self.reader.problems)
        tokens = sum(len(record.tokens) for record in self.reader.records())
        self.reader.skipped_lines, self.reader.problems = skipped, problems
        if not tokens:
            raise Mistake(f'{self.reader.path}: no usable record in it; check --{self.reader.flag}.path')
        return tokens

    @property
    def metrics(self) -> dict:
        """The reader's place after the last batch, by EasyLM's names, and the throughput, training time included.

        The place: byte (of a file only), record (from 0), tokens so far.
        """
        place = {'dataset_file_loc': self._file_loc} if self.reader.positions_are_bytes else {}
        return place | {'dataset_example_index': self._example_index,
                        'dataset_total_tokens': self.total_tokens} | self._throughput.metrics

    def state(self) -> dict:
        """Return, JSON-able, the line that began the tokens still waiting and how many of its tokens are gone."""
        start, index, skipped, _, dropped = self._waiting[0] if self._waiting else (  # before the first batch
            self._file_loc, self._example_index, self.reader.skipped_lines, 0, 0)
        return {'start': start, 'index': index, 'dropped': dropped, 'skipped_lines': skipped,
                'total_tokens': self.total_tokens, 'source': self._source}

    def restore(self, state: dict) -> None:
        """Continue after the batch whose `state()` this is.  Raise Mistake when file or text settings differ."""
        check_state(state, STREAM_STATE, self.reader.flag)
        check_source(state['source'], self._source, self.reader)
        self.reader.check_start(state['start'])
        self.total_tokens = state['total_tokens']
        self._begin(state['start'], state['index'])
        self.reader.skipped_lines = state['skipped_lines']
        if state['dropped']:
            head = next(self._records)
            if head.start != state['start'] or len(head.tokens) <= state['dropped']:
                raise Mistake(f'{self.reader.flag}: no record of {self.reader.path} with more than '
                              f'{state["dropped"]} tokens begins at {state["start"]}; {DAMAGED}')
            self._append(head)
            self._drop(state['dropped'])

    def _begin(self, start: int, index: int) -> None:
        self._tokens, self._loss_mask, self._weights = [], [], []
        self._waiting = deque()  # records in the buffer: start, index, lines skipped before, tokens left, tokens gone
        self._file_loc, self._example_index = start, index
        self._records = self._endless(start, index)

    def _endless(self, start: int, index: int):
        while True:
            found = False
            for record in self.reader.records(start, index):
                found = True
                yield record
            if not found and start == 0:
                raise Mistake(f'{self.reader.path}: no usable record in it, {self.reader.skipped_lines} bad lines '
                              f'skipped; check --{self.reader.flag}.path')
            start = index = 0

    def _append(self, record: Record) -> None:
        if record.tokens:
            self._waiting.append([record.start, record.index, self.reader.skipped_lines, len(record.tokens), 0])
        self._tokens += record.tokens
        self._loss_mask += record.loss_mask
        self._weights += [record.weight] * len(record.tokens)
        self._file_loc, self._example_index = record.end, record.index

    def _drop(self, count: int) -> None:
        del self._tokens[:count], self._loss_mask[:count], self._weights[:count]
        while count:
            head = self._waiting[0]
            taken = min(count, head[3])
            head[3] -= taken
            head[4] += taken
            count -= taken
            if not head[3]:
                self._waiting.popleft()
