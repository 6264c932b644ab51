"""Records -> batches of arrays.  Two ways, both endless and resumable to the bit:

`PackedStream`: EasyLM's.  All records in file order form one stream of tokens, cut into batch_size rows of seq_length
tokens; targets are the same stream one token later.  Records straddle rows, and attention crosses records.

`Rows`: one record a row, padded on the right to one of a few bucket lengths; only the positions that carry loss are
listed, so that the network need not compute logits for the others.  Shuffled every epoch, each record once.

`state()` belongs to the batch last returned: after `restore(state)` comes the batch that would have followed it.
`read_dataset_state` reads one from a file.  Both read records from a RecordReader or a HuggingfaceReader.
Neighbours: records.py and huggingface.py below, the training loop above.
"""
import hashlib
import json
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.huggingface import HuggingfaceReader
from data.records import Record, RecordReader
from mistake import Mistake

Reader = RecordReader | HuggingfaceReader
STREAM_STATE = 'start', 'index', 'dropped', 'skipped_lines', 'total_tokens'  # whole numbers of a PackedStream's state
ROWS_STATE = 'epoch', 'batch', 'total_tokens'


class Batch(NamedTuple):
    """What one training step reads.

    tokens_BT int32.  segments_BT int32: 0 for padding, 1.. the record a token belongs to; None: a row is one segment.
    loss_positions_BP int32: the positions t whose next token carries loss, then zeros; None means P = T, all in order.
    targets_BP int32: the token after that position.  loss_mask_BP float32: 1 where it counts, 0 elsewhere.
    row_weight_B float32: 0 for a row that only fills the batch up; the loss is a weighted mean over rows.
    """

    tokens_BT: np.ndarray
    segments_BT: np.ndarray | None
    loss_positions_BP: np.ndarray | None
    targets_BP: np.ndarray
    loss_mask_BP: np.ndarray
    row_weight_B: np.ndarray


class PackedStream:
    """Batches of EasyLM's token stream (its data.py, August 2023), number for number.

    With C = batch_size * seq_length, a batch takes tokens [0, C) of the buffer as inputs and [1, C] as targets with
    their masks, then drops C tokens; records are read until more than C + 1 tokens wait.  `always_start_with_bos`
    overwrites column 0 of the inputs, not of the targets.  `start_seek_loc` (a byte where a line begins),
    `example_index_at_start` and `tokens_count_at_start` begin elsewhere by hand.  `metrics` averages the throughput
    over `throughput_average_window_size` batches.
    """

    def __init__(self, reader: Reader, *, seq_length: int, batch_size: int, always_start_with_bos: bool = False,
                 start_seek_loc: int = 0, example_index_at_start: int = 0, tokens_count_at_start: int = 0,
                 throughput_average_window_size: int = 200):
        _check_sizes(reader, seq_length, batch_size)
        if min(start_seek_loc, example_index_at_start, tokens_count_at_start) < 0:
            raise Mistake(f'{reader.flag}: {start_seek_loc=}, {example_index_at_start=} and '
                             f'{tokens_count_at_start=} must not be negative')
        reader.check_start(start_seek_loc)
        self.reader, self.batch_size, self.seq_length = reader, batch_size, seq_length
        self.always_start_with_bos = always_start_with_bos
        self.total_tokens = tokens_count_at_start
        self._throughput = Throughput(reader, throughput_average_window_size)
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
        if self.always_start_with_bos:
            inputs[:, 0] = self.reader.processor.tokenizer.bos_token_id
        self._drop(count)
        self._throughput.add(count)
        return Batch(inputs, None, None, targets, loss_mask, np.ones(self.batch_size, np.float32))

    @property
    def metrics(self) -> dict:
        """The reader's place after the last batch, by EasyLM's names: byte (of a file only), record (from 0), tokens
        so far; and the tokens per second of wall clock, the training between the batches included.
        """
        place = {'dataset_file_loc': self._file_loc} if self.reader.positions_are_bytes else {}
        return place | {'dataset_example_index': self._example_index,
                        'dataset_total_tokens': self.total_tokens} | self._throughput.metrics

    def state(self) -> dict:
        """JSON-able: the line that began the tokens still waiting and how many of its tokens are gone."""
        start, index, skipped, dropped = self._head()
        return {'start': start, 'index': index, 'dropped': dropped, 'skipped_lines': skipped,
                'total_tokens': self.total_tokens, 'source': self._source}

    def restore(self, state: dict) -> None:
        """Continue after the batch whose `state()` this is.  Raises Mistake when file or text settings differ."""
        _check_state(state, STREAM_STATE, self.reader.flag)
        _check_source(state['source'], self._source, self.reader)
        self.reader.check_start(state['start'])
        self.total_tokens = state['total_tokens']
        self._begin(state['start'], state['index'])
        self.reader.skipped_lines = state['skipped_lines']
        if state['dropped']:
            head = next(self._records)
            if head.start != state['start'] or len(head.tokens) <= state['dropped']:
                raise Mistake(f'{self.reader.flag}: no record of {self.reader.path} with more than '
                                 f'{state["dropped"]} tokens begins at {state["start"]}; {_DAMAGED}')
            self._append(head)
            self._drop(state['dropped'])

    def _begin(self, start: int, index: int) -> None:
        self._tokens, self._loss_mask = [], []
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
        self._file_loc, self._example_index = record.end, record.index

    def _drop(self, count: int) -> None:
        del self._tokens[:count], self._loss_mask[:count]
        while count:
            head = self._waiting[0]
            taken = min(count, head[3])
            head[3] -= taken
            head[4] += taken
            count -= taken
            if not head[3]:
                self._waiting.popleft()

    def _head(self) -> tuple[int, int, int, int]:
        if not self._waiting:  # only before the first batch: each batch leaves at least two tokens waiting
            return self._file_loc, self._example_index, self.reader.skipped_lines, 0
        start, index, skipped, _, dropped = self._waiting[0]
        return start, index, skipped, dropped


class Rows:
    """Batches with one record a row.  The whole set is tokenized once, at construction.

    A row reads tokens[:-1] of its record and predicts tokens[1:].  Lengths T are `bucket_lengths` (default: 32, 40,
    48, 56, 64, 80, .. up to seq_length) and P(T) is a function of T, so the number of different shapes, each one
    compilation, is at most that of the buckets; `shapes` lists them.  An epoch is a permutation by (seed, epoch):
    each bucket's rows in that order form full batches, what remains joins the next longer bucket, and the last batch
    is filled up with rows of weight 0; then the batches are shuffled.  So every record comes exactly once an epoch,
    in ceil(n / batch_size) batches.

    A record with more than seq_length + 1 tokens is refused ('error'), left out ('drop'), or cut ('truncate'): tokens
    after bos go, so that the answer at the end stays; where the prompt is shorter than the cut, the record is
    refused.  A record without a target is a bad line.  `counts` tells what happened to how many.  The three `_start`
    settings of PackedStream are refused.
    """

    def __init__(self, reader: Reader, *, seq_length: int, batch_size: int, seed: int = 42, shuffle: bool = True,
                 too_long: str = 'error', bucket_lengths: tuple[int, ...] = (), progress: bool = True,
                 start_seek_loc: int = 0, example_index_at_start: int = 0, tokens_count_at_start: int = 0,
                 throughput_average_window_size: int = 200):
        _check_sizes(reader, seq_length, batch_size)
        if start_seek_loc or example_index_at_start or tokens_count_at_start:
            raise Mistake(f'{reader.flag}: {start_seek_loc=}, {example_index_at_start=} and '
                             f'{tokens_count_at_start=} must be 0 where batching=rows: rows are shuffled, so no place '
                             'of the file begins the rest; resume the run, or set batching=stream')
        if too_long not in ('error', 'truncate', 'drop'):
            raise Mistake(f'{reader.flag}.{too_long=} must be error, truncate or drop')
        self.edges = np.array(bucket_lengths or default_buckets(seq_length))
        if self.edges[-1] != seq_length or np.any(np.diff(self.edges) <= 0) or self.edges[0] < 1:
            raise Mistake(f'{bucket_lengths=} must rise and end with {seq_length=}')
        self.reader, self.batch_size, self.seq_length, self.seed = reader, batch_size, seq_length, seed
        self.shuffle, self.too_long = shuffle, too_long
        self.counts = {'rows': 0, 'truncated': 0, 'dropped': 0, 'skipped_lines': 0}
        self._read(progress)
        reader.close()
        self._widths = self._target_widths()
        self._source = {'rows_sha256': self._fingerprint(), 'seed': seed, 'shuffle': shuffle, 'batch_size': batch_size,
                        'bucket_lengths': self.edges.tolist()}
        self.epoch, self.batch, self.total_tokens = 0, 0, 0
        self._throughput = Throughput(reader, throughput_average_window_size)
        self._planned = None

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        self._throughput.start()
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        if self._planned != self.epoch:
            self._plan, self._planned = self._epoch_plan(self.epoch), self.epoch
        rows = self._plan[self.batch]
        self.batch += 1
        batch, count = self._build(rows), sum(len(self.tokens[row]) - 1 for row in rows)
        self.total_tokens += count
        self._throughput.add(count)
        return batch

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.tokens) // self.batch_size)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every (T, P) a batch can have."""
        return [(int(edge), width) for edge, width in zip(self.edges, self._widths, strict=True) if width]

    @property
    def fill(self) -> float:
        """Tokens over padded tokens, in epoch 0: what is left after the waste of padding."""
        padded = sum(self.batch_size * self._length(rows) for rows in self._epoch_plan(0))
        return sum(len(tokens) - 1 for tokens in self.tokens) / padded

    @property
    def metrics(self) -> dict:
        """Where the last batch stood, and the tokens per second as PackedStream has them."""
        return {'dataset_epoch': self.epoch, 'dataset_batch': self.batch,
                'dataset_total_tokens': self.total_tokens} | self._throughput.metrics

    def state(self) -> dict:
        """JSON-able; the permutation follows from it."""
        return {'epoch': self.epoch, 'batch': self.batch, 'total_tokens': self.total_tokens, 'source': self._source}

    def restore(self, state: dict) -> None:
        """Continue after the batch whose `state()` this is.  Raises Mistake when records or settings differ."""
        _check_state(state, ROWS_STATE, self.reader.flag)
        _check_source(state['source'], self._source, self.reader)
        if state['batch'] > self.batches_per_epoch:
            raise Mistake(f'{self.reader.flag}: the saved data state has batch={state["batch"]} of '
                             f'{self.batches_per_epoch}; {_DAMAGED}')
        self.epoch, self.batch, self.total_tokens = state['epoch'], state['batch'], state['total_tokens']

    def _read(self, progress: bool) -> None:
        self.tokens, self.positions = [], []  # of each row: its tokens, its positions with loss
        hide = None if progress else True  # None: shown on a terminal only
        for record in tqdm(self.reader.records(), 'tokenizing', unit=' records', disable=hide):
            record = self._fit(record)
            if record is None:
                continue
            positions = np.flatnonzero(record.loss_mask[1:]).astype(np.int32)
            if not len(positions):
                self.reader.bad(record.index, 'no token of the record carries loss; check text_processor.fields')
                continue
            self.tokens.append(np.array(record.tokens, np.int32))
            self.positions.append(positions)
        self.counts.update(rows=len(self.tokens), skipped_lines=self.reader.skipped_lines)
        if not self.tokens:
            raise Mistake(f'{self.reader.path}: no usable record in it, {self.counts}; check '
                             f'--{self.reader.flag}.path')

    def _fit(self, record: Record) -> Record | None:
        extra = len(record.tokens) - (self.seq_length + 1)
        if extra <= 0:
            return record
        where = self.reader.place(record.index)
        if self.too_long == 'error':
            raise Mistake(f'{where}: {len(record.tokens) - 1} tokens do not fit {self.reader.flag}.seq_length='
                             f'{self.seq_length}; raise it, or set --{self.reader.flag}.too_long=truncate or drop')
        if self.too_long == 'drop':
            self.counts['dropped'] += 1
            return None
        keep = int(record.tokens[0] == self.reader.processor.tokenizer.bos_token_id and not record.loss_mask[0])
        prompt = (record.loss_mask + [1.0]).index(1.0, keep) - keep
        if 0 < prompt < extra + 1 - keep:  # something must stay in front of the first target
            raise Mistake(f'{where}: the part with loss alone does not fit {self.reader.flag}.seq_length='
                             f'{self.seq_length}; raise it, or set --{self.reader.flag}.too_long=drop')
        self.counts['truncated'] += 1
        return record._replace(tokens=record.tokens[:keep] + record.tokens[keep + extra:],
                               loss_mask=record.loss_mask[:keep] + record.loss_mask[keep + extra:])

    def _target_widths(self) -> list[int]:
        """P of each bucket: the most targets of a row that fits it, up to a power of two, at most T; 0: no row."""
        counts, buckets, widths = np.array([len(p) for p in self.positions]), self._buckets(), []
        for number, edge in enumerate(self.edges):
            most = int(counts[buckets <= number].max(initial=1))
            widths.append(min(int(edge), 1 << (most - 1).bit_length()) if number in buckets else 0)
        return widths

    def _buckets(self) -> np.ndarray:
        return np.searchsorted(self.edges, [len(tokens) - 1 for tokens in self.tokens])

    def _length(self, rows: list[int]) -> int:
        return int(self.edges[np.searchsorted(self.edges, max(len(self.tokens[row]) for row in rows) - 1)])

    def _epoch_plan(self, epoch: int) -> list[list[int]]:
        """The rows of every batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.tokens)) if self.shuffle else np.arange(len(self.tokens))
        buckets, batches, rest = self._buckets()[order], [], []
        for number in range(len(self.edges)):
            rows = rest + order[buckets == number].tolist()
            full = len(rows) // self.batch_size * self.batch_size
            batches += [rows[i:i + self.batch_size] for i in range(0, full, self.batch_size)]
            rest = rows[full:]
        if rest:
            batches.append(rest)
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def _build(self, rows: list[int]) -> Batch:
        batch, length = self.batch_size, self._length(rows)
        width = self._widths[np.searchsorted(self.edges, length)]
        tokens_BT = np.full((batch, length), self.reader.processor.tokenizer.pad_token_id, np.int32)
        segments_BT = np.zeros((batch, length), np.int32)
        positions_BP, targets_BP = np.zeros((batch, width), np.int32), np.zeros((batch, width), np.int32)
        loss_mask_BP, row_weight_B = np.zeros((batch, width), np.float32), np.zeros(batch, np.float32)
        for b, row in enumerate(rows):
            tokens, positions = self.tokens[row], self.positions[row]
            tokens_BT[b, :len(tokens) - 1] = tokens[:-1]
            segments_BT[b, :len(tokens) - 1] = 1
            positions_BP[b, :len(positions)] = positions
            targets_BP[b, :len(positions)] = tokens[positions + 1]
            loss_mask_BP[b, :len(positions)] = 1
            row_weight_B[b] = 1
        return Batch(tokens_BT, segments_BT, positions_BP, targets_BP, loss_mask_BP, row_weight_B)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tokens, positions in zip(self.tokens, self.positions, strict=True):
            digest.update(np.int32([len(tokens), len(positions)]).tobytes() + tokens.tobytes() + positions.tobytes())
        return digest.hexdigest()


class Throughput:
    """Tokens per second of wall clock from the first `start()` to the last `add(tokens)`, under EasyLM's names."""

    def __init__(self, reader: Reader, window: int):
        if window < 1:
            raise Mistake(f'{reader.flag}.throughput_average_window_size={window} must be at least 1 batch')
        self._tokens, self._began = 0, None
        self._recent = deque(maxlen=window + 1)  # (time, tokens until then), the oldest begins the window

    def start(self) -> None:
        if self._began is None:
            self._began = perf_counter()
            self._recent.append((self._began, 0))

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        self._recent.append((perf_counter(), self._tokens))

    @property
    def metrics(self) -> dict:
        """dataset_accumulated_tps: since the start; dataset_average_tps: over the window.  Empty before any batch."""
        if not self._tokens:
            return {}
        (first, before), (last, tokens) = self._recent[0], self._recent[-1]
        return {'dataset_accumulated_tps': round(tokens / (last - self._began), 1),
                'dataset_average_tps': round((tokens - before) / (last - first), 1)}


def read_dataset_state(path: str) -> dict:
    """{'state': what `state()` gave, 'dataset': flags of the data set, nested} from JSON (--load_dataset_state).

    Raises Mistake for another file, EasyLM's dataset.pkl among them: its numbers can be given as flags.
    """
    file = Path(path)
    if not file.is_file():
        raise Mistake(f'load_dataset_state={path!r} is no file; it must name a dataset state that a run wrote')
    raw = file.read_bytes()
    if file.suffix in ('.pkl', '.pickle') or raw.startswith(b'\x80'):
        raise Mistake(
            f'load_dataset_state={path!r}: pickles are never read. Give its numbers as flags, from the metrics that '
            "EasyLM logged: --train_dataset.json_dataset.start_seek_loc=(dataset_file_loc), "
            '--train_dataset.json_dataset.example_index_at_start=(dataset_example_index + 1), '
            '--train_dataset.json_dataset.tokens_count_at_start=(dataset_total_tokens). As with EasyLM, tokens that '
            'were read but not yet in a batch are left out')
    try:
        saved = json.loads(raw.decode('utf-8'))
    except (ValueError, RecursionError) as error:
        raise Mistake(f'load_dataset_state={path!r} holds no valid JSON: {error}') from None
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), dict) for name in ('state', 'dataset')):
        raise Mistake(f'load_dataset_state={path!r} must hold {{"state": {{..}}, "dataset": {{..}}}}, as a run '
                         'writes it')
    state = saved['state']
    _check_state(state, ROWS_STATE if 'epoch' in state else STREAM_STATE, f'load_dataset_state={path!r}')
    return {'state': state, 'dataset': saved['dataset']}


def default_buckets(seq_length: int) -> tuple[int, ...]:
    """32, 40, 48, 56, 64, 80, 96, .. (four an octave) below seq_length, then seq_length; above 32 a row fills 4/5."""
    edges = [quarters << power for power in range(3, 30) for quarters in (4, 5, 6, 7)]
    return (*(edge for edge in edges if edge < seq_length), seq_length)


def _check_sizes(reader: Reader, seq_length: int, batch_size: int) -> None:
    if seq_length < 1 or batch_size < 1:
        raise Mistake(f'{reader.flag}: {seq_length=} and {batch_size=} must be at least 1')


_DAMAGED = ('the state is damaged, or belongs to other data: continue from another checkpoint or state file, or start '
            'anew')


def _check_state(state: dict, numbers: tuple[str, ...], where: str) -> None:
    """Raises Mistake unless `state` has `numbers`, whole and not negative, and a source."""
    if not isinstance(state, dict):
        raise Mistake(f'{where}: the saved data state is {state!r}; {_DAMAGED}')
    if numbers == STREAM_STATE and 'epoch' in state or numbers == ROWS_STATE and 'dropped' in state:
        other = 'rows' if 'epoch' in state else 'stream'
        raise Mistake(f'{where}: the saved data state is one of batching={other}; continue with that')
    for name in numbers:
        value = state.get(name)
        if type(value) is not int or value < 0:
            raise Mistake(f'{where}: the saved data state has {name}={value!r}, which must be a whole number from 0 '
                             f'on; {_DAMAGED}')
    if not isinstance(state.get('source'), dict):
        raise Mistake(f'{where}: the saved data state has source={state.get("source")!r}; {_DAMAGED}')


def _check_source(saved: dict, ours: dict, reader: Reader) -> None:
    for name in ours:
        if saved.get(name) != ours[name]:
            raise Mistake(f'{reader.flag}: cannot continue with {reader.path}: {name} was {saved.get(name)}, now it '
                             f'is {ours[name]}; continue with the same records and settings, or start anew')
