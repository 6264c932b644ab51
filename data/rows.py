"""Make batches with one record a row, padded on the right to one of a few bucket lengths.

Only the positions that carry loss are listed, so that the network need not compute logits for the others.  Rows are
shuffled every epoch; each record comes once.  Neighbours: batches.py below; stream.py, the other way.
"""
import hashlib

import numpy as np
from tqdm import tqdm

from data.batches import DAMAGED, ROWS_STATE, Batch, Reader, Throughput, check_source, check_state
from data.records import Record, refuse_or_count
from mistake import Mistake


class RowBatches:
    """Yields batches with one record a row.  The whole set is tokenized once, at construction.

    A row reads tokens[:-1] of its record and predicts tokens[1:].  Lengths T are `bucket_lengths` (default: 32, 40,
    48, 56, 64, 80, .. up to seq_length) and P(T) is a function of T, so the number of different shapes, each one
    compilation, is at most that of the buckets (`shapes`).  An epoch is a permutation by (seed, epoch):
    each bucket's rows in that order form full batches, what remains joins the next longer bucket, and the last batch
    is filled up with rows of weight 0; then the batches are shuffled.  So every record comes exactly once an epoch,
    in ceil(n / batch_size) batches.

    A record with more than seq_length + 1 tokens is refused ('error'), left out ('drop'), or cut ('truncate'): tokens
    after bos go, so that the answer at the end stays; where the prompt is shorter than the cut, the record is
    refused.  A record without a target is a bad line.  `counts` tells what happened to how many.
    """

    def __init__(self, reader: Reader, *, seq_length: int, batch_size: int, seed: int = 42, shuffle: bool = True,
                 too_long: str = 'error', bucket_lengths: tuple[int, ...] = (), progress: bool = True,
                 throughput_average_window_size: int = 200):
        self.edges = np.array(bucket_lengths or default_buckets(seq_length))
        if self.edges[-1] != seq_length or np.any(np.diff(self.edges) <= 0) or self.edges[0] < 1:
            raise Mistake(f'{bucket_lengths=} must rise and end with {seq_length=}')
        self.reader, self.batch_size, self.seq_length, self.seed = reader, batch_size, seq_length, seed
        self.shuffle, self.too_long = shuffle, too_long
        self.counts = {'rows': 0, 'truncated': 0, 'dropped': 0, 'skipped_lines': 0}
        self._read(progress)
        reader.close()
        self._buckets = np.searchsorted(self.edges, [len(tokens) - 1 for tokens in self.tokens])  # of each row
        self._widths = self._target_widths()
        self._source = {'rows_sha256': self._fingerprint(), 'seed': seed, 'shuffle': shuffle, 'batch_size': batch_size,
                        'bucket_lengths': self.edges.tolist()}
        self.epoch, self.batch, self.total_tokens = 0, 0, 0
        self._throughput = Throughput(throughput_average_window_size)
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
        """Number of batches in which every record comes once."""
        return -(-len(self.tokens) // self.batch_size)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """List every (T, P) a batch can have."""
        return [(int(edge), width) for edge, width in zip(self.edges, self._widths, strict=True) if width]

    @property
    def fill(self) -> float:
        """The share of positions that hold tokens, in epoch 0; the rest is padding."""
        padded = sum(self.batch_size * self.edges[self._buckets[rows].max()] for rows in self._epoch_plan(0))
        return sum(len(tokens) - 1 for tokens in self.tokens) / padded

    @property
    def metrics(self) -> dict:
        """The place of the last batch, and the throughput as PackedStream has it."""
        return {'dataset_epoch': self.epoch, 'dataset_batch': self.batch,
                'dataset_total_tokens': self.total_tokens} | self._throughput.metrics

    def state(self) -> dict:
        """Return the place, JSON-able; the permutation follows from it."""
        return {'epoch': self.epoch, 'batch': self.batch, 'total_tokens': self.total_tokens, 'source': self._source}

    def restore(self, state: dict) -> None:
        """Continue after the batch whose `state()` this is.  Raise Mistake when records or settings differ."""
        check_state(state, ROWS_STATE, self.reader.flag)
        check_source(state['source'], self._source, self.reader)
        if state['batch'] > self.batches_per_epoch:
            raise Mistake(f'{self.reader.flag}: the saved data state has batch={state["batch"]} of '
                          f'{self.batches_per_epoch}; {DAMAGED}')
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
                refuse_or_count(self.reader, record.index,
                                'no token of the record carries loss; check text_processor.fields')
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
        """Return P of each bucket: most targets of a row that fits it, up to a power of two, at most T; 0: no row."""
        counts, widths = np.array([len(p) for p in self.positions]), []
        for number, edge in enumerate(self.edges):
            most = int(counts[self._buckets <= number].max(initial=1))
            widths.append(min(int(edge), 1 << (most - 1).bit_length()) if number in self._buckets else 0)
        return widths

    def _epoch_plan(self, epoch: int) -> list[list[int]]:
        """List the rows of every batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.tokens)) if self.shuffle else np.arange(len(self.tokens))
        buckets, batches, rest = self._buckets[order], [], []
        for number in range(len(self.edges)):
            rows = rest + order[buckets == number].tolist()
            full = len(rows) // self.batch_size * self.batch_size
            batches += [rows[i:i + self.batch_size] for i in range(0, full, self.batch_size)]
            rest = rows[full:]
        if rest:
            batches.append(rest)
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def _build(self, rows: list[int]) -> Batch:
        bucket = self._buckets[rows].max()
        batch, length, width = self.batch_size, self.edges[bucket], self._widths[bucket]
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


def default_buckets(seq_length: int) -> tuple[int, ...]:
    """Return 32, 40, 48, 56, 64, 80, 96, .. (four an octave) below seq_length, then seq_length.

    A row longer than 32 fills at least 4/5 of its bucket.
    """
    edges = [quarters << power for power in range(3, 30) for quarters in (4, 5, 6, 7)]
    return (*(edge for edge in edges if edge < seq_length), seq_length)


BY_HAND = 'start_seek_loc', 'example_index_at_start', 'tokens_count_at_start'  # flags that say where a stream begins


def refuse_beginning(options, flag: str) -> None:
    """Raise Mistake for a flag that says where a stream begins, next to batching=rows."""
    for name in BY_HAND:
        if options.get(name):
            raise Mistake(f'{flag}.{name}={options[name]} must be 0 where batching=rows: rows are shuffled, so no '
                          'place of the file begins the rest; resume the run, or set batching=stream')
