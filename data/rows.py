"""Make batches with one record a row, padded on the right to one of a few bucket lengths; or with several in a row.

Only the positions that carry loss are listed, so that the network need not compute logits for the others.  Rows are
shuffled every epoch; each record comes once.  Neighbours: batches.py, packing.py and mixture.py below; stream.py, the
other way.
"""
import hashlib

import numpy as np
from tqdm import tqdm

from data.batches import DAMAGED, ROWS_STATE, Batch, Reader, Throughput, check_source, check_state
from data.mixture import Mixture, drawn, quotas
from data.packing import first_fit
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

    With `packed` a row holds several whole records, which do not see each other, and has seq_length positions: which
    records share a row is decided once, by the seed.  With a Mixture a file's rows come as often as its weight says.
    loss_per: 'row' takes the mean over records of each record's mean over its targets, 'token' the mean over all
    targets of a batch.

    A record with more than seq_length + 1 tokens is refused ('error'), left out ('drop'), or cut ('truncate'): tokens
    after bos go, so that the answer at the end stays; where the prompt is shorter than the cut, the record is
    refused.  A record without a target is a bad line.  `counts` tells what happened to how many.
    """

    def __init__(self, reader: Reader, *, seq_length: int, batch_size: int, seed: int = 42, shuffle: bool = True,
                 too_long: str = 'error', bucket_lengths: tuple[int, ...] = (), progress: bool = True,
                 throughput_average_window_size: int = 200, packed: bool = False, loss_per: str = 'row'):
        self.edges = np.array((seq_length,) if packed else bucket_lengths or default_buckets(seq_length))
        if self.edges[-1] != seq_length or np.any(np.diff(self.edges) <= 0) or self.edges[0] < 1:
            raise Mistake(f'{bucket_lengths=} must rise and end with {seq_length=}')
        self.reader, self.batch_size, self.seq_length, self.seed = reader, batch_size, seq_length, seed
        self.shuffle, self.too_long, self.packed, self.loss_per = shuffle, too_long, packed, loss_per
        mixed = isinstance(reader, Mixture)
        self._readers, self._mixed = (reader.readers, reader.weights) if mixed else ([reader], [1.0])
        self.counts = {'rows': 0, 'truncated': 0, 'dropped': 0, 'skipped_lines': 0}
        self._read(progress)
        self._rows = self._place_records()
        lengths = self._sums(len(tokens) - 1 for tokens in self.tokens)
        self._buckets = np.searchsorted(self.edges, lengths)  # of each row
        self._widths = self._target_widths()
        self._source = {'rows_sha256': self._fingerprint(), 'seed': seed, 'shuffle': shuffle, 'batch_size': batch_size,
                        'bucket_lengths': self.edges.tolist()}
        if packed:
            self._source['batching'] = 'packed'
        if len(self._readers) > 1:
            self._source['weights'] = list(self._mixed)
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
        batch = self._build(rows)
        count = sum(len(self.tokens[record]) - 1 for row in rows for record in self._rows[row])
        self.total_tokens += count
        self._throughput.add(count)
        return batch

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which every record comes once."""
        return -(-len(self._rows) // self.batch_size)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """List every (T, P) a batch can have."""
        return [(int(edge), width) for edge, width in zip(self.edges, self._widths, strict=True) if width]

    @property
    def fill(self) -> float:
        """The share of positions that hold tokens, in epoch 0; the rest is padding."""
        plan = self._epoch_plan(0)
        padded = sum(self.batch_size * self.edges[self._buckets[rows].max()] for rows in plan)
        return sum(len(self.tokens[record]) - 1 for rows in plan for row in rows for record in self._rows[row]) / padded

    @property
    def files(self) -> list[dict]:
        """Each file's path, its rows, those an epoch draws of it, and those drawn up to the last batch."""
        if self._planned != self.epoch:
            self._plan, self._planned = self._epoch_plan(self.epoch), self.epoch
        done = np.array([row for rows in self._plan[:self.batch] for row in rows], int)
        return [{'path': str(reader.path), 'rows': size, 'epoch': quota,
                 'drawn': self.epoch * quota + int(((done >= first) & (done < first + size)).sum())}
                for reader, size, quota, first in zip(self._readers, self._sizes, self._quotas, self._firsts,
                                                      strict=True)]

    @property
    def metrics(self) -> dict:
        """The place of the last batch, and the throughput as PackedStream has it."""
        return {'dataset_epoch': self.epoch, 'dataset_batch': self.batch,
                'dataset_total_tokens': self.total_tokens} | self._throughput.metrics

    def state(self) -> dict:
        """Return the place, JSON-able; the permutation follows from it.  Of several files it says where each one is."""
        state = {'epoch': self.epoch, 'batch': self.batch, 'total_tokens': self.total_tokens, 'source': self._source}
        return state | {'files': self.files} if len(self._readers) > 1 else state

    def restore(self, state: dict) -> None:
        """Continue after the batch whose `state()` this is.  Raise Mistake when records or settings differ."""
        check_state(state, ROWS_STATE, self.reader.flag)
        older = {'batching': 'rows', 'weights': None}  # what a state says by leaving it out
        check_source(older | state['source'], older | self._source, self.reader)
        if state['batch'] > self.batches_per_epoch:
            raise Mistake(f'{self.reader.flag}: the saved data state has batch={state["batch"]} of '
                          f'{self.batches_per_epoch}; {DAMAGED}')
        self.epoch, self.batch, self.total_tokens = state['epoch'], state['batch'], state['total_tokens']

    def _read(self, progress: bool) -> None:
        self.tokens, self.positions, self.weights = [], [], []  # of each record: its tokens, those before a target
        self._file_ends = []
        hide = None if progress else True  # None: shown on a terminal only
        for reader in self._readers:
            for record in tqdm(reader.records(), 'tokenizing', unit=' records', disable=hide):
                record = self._fit(record, reader)
                if record is None:
                    continue
                positions = np.flatnonzero(record.loss_mask[1:]).astype(np.int32)
                if not len(positions):
                    refuse_or_count(reader, record.index,
                                    'no token of the record carries loss; check text_processor.fields')
                    continue
                self.tokens.append(np.array(record.tokens, np.int32))
                self.positions.append(positions)
                self.weights.append(record.weight)
            reader.close()
            self.counts.update(rows=len(self.tokens), skipped_lines=self.reader.skipped_lines)
            if len(self.tokens) == (self._file_ends or [0])[-1]:
                raise Mistake(f'{reader.path}: no usable record in it, {self.counts}; check '
                              f'--{self.reader.flag}.path')
            self._file_ends.append(len(self.tokens))

    def _place_records(self) -> list[list[int]]:
        """List the records of each row, the rows of a file together, and say where those begin and how many come."""
        rows, lengths, self._firsts = [], np.array([len(tokens) - 1 for tokens in self.tokens]), []
        for number, end in enumerate(self._file_ends):
            records = np.arange(self._file_ends[number - 1] if number else 0, end)
            self._firsts.append(len(rows))
            if not self.packed:
                rows += [[record] for record in records.tolist()]
                continue
            if self.shuffle:  # neighbours in a file are often of one kind
                records = np.random.default_rng((self.seed, number, 0, 2)).permutation(records)
            rows += [records[row].tolist() for row in first_fit(lengths[records], self.seq_length)]
        self._sizes = np.diff([*self._firsts, len(rows)]).tolist()
        self._quotas = quotas(self._sizes, self._mixed)
        if 0 in self._quotas:
            raise Mistake(f'{self.reader.flag}.path={self.reader.path!r}: of {len(rows)} rows an epoch none would be '
                          f'of {self._readers[self._quotas.index(0)].path}: raise its weight, or leave it out')
        return rows

    def _sums(self, of_records) -> np.ndarray:
        """Sum a number of each record over the records of each row."""
        of_records = list(of_records)
        return np.array([sum(of_records[record] for record in row) for row in self._rows])

    def _fit(self, record: Record, reader: Reader) -> Record | None:
        extra = len(record.tokens) - (self.seq_length + 1)
        if extra <= 0:
            return record
        where = reader.place(record.index)
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
        counts, widths = self._sums(len(positions) for positions in self.positions), []
        for number, edge in enumerate(self.edges):
            most = int(counts[self._buckets <= number].max(initial=1))
            widths.append(min(int(edge), 1 << (most - 1).bit_length()) if number in self._buckets else 0)
        return widths

    def _epoch_plan(self, epoch: int) -> list[list[int]]:
        """List the rows of every batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = np.arange(len(self._rows))
        if len(self._readers) > 1:
            order = np.concatenate([first + drawn(size, epoch * quota, quota, self.seed, number, self.shuffle)
                                    for number, (first, size, quota) in enumerate(
                                        zip(self._firsts, self._sizes, self._quotas, strict=True))])
        order = rng.permutation(order) if self.shuffle else order
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
        places_BT = np.zeros_like(tokens_BT)
        share_BP, weight_BP = np.zeros_like(loss_mask_BP), np.ones_like(loss_mask_BP)
        records = [record for row in rows for record in self._rows[row]]
        targets = sum(len(self.positions[record]) for record in records)
        for b, row in enumerate(rows):
            start, filled = 0, 0
            for segment, record in enumerate(self._rows[row], 1):
                tokens, positions = self.tokens[record], self.positions[record]
                here, there = slice(start, start + len(tokens) - 1), slice(filled, filled + len(positions))
                tokens_BT[b, here] = tokens[:-1]
                segments_BT[b, here] = segment
                places_BT[b, here] = np.arange(len(tokens) - 1)
                positions_BP[b, there] = start + positions
                targets_BP[b, there] = tokens[positions + 1]
                loss_mask_BP[b, there] = 1
                share_BP[b, there] = 1 / (targets if self.loss_per == 'token' else len(records) * len(positions))
                weight_BP[b, there] = self.weights[record]
                start, filled = here.stop, there.stop
            row_weight_B[b] = 1
        return Batch(tokens_BT, segments_BT, positions_BP, targets_BP, loss_mask_BP, row_weight_B,
                     places_BT if self.packed else None,
                     share_BP if self.packed or self.loss_per == 'token' else None,
                     weight_BP if self.reader.processor.weighted else None)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tokens, positions in zip(self.tokens, self.positions, strict=True):
            digest.update(np.int32([len(tokens), len(positions)]).tobytes() + tokens.tobytes() + positions.tobytes())
        if self.reader.processor.weighted:
            digest.update(np.array(self.weights).tobytes())
        return digest.hexdigest()


def default_buckets(seq_length: int) -> tuple[int, ...]:
    """Return 32, 40, 48, 56, 64, 80, 96, .. (four an octave) below seq_length, then seq_length.

    A row longer than 32 fills at least 4/5 of its bucket.
    """
    edges = [quarters << power for power in range(3, 30) for quarters in (4, 5, 6, 7)]
    return (*(edge for edge in edges if edge < seq_length), seq_length)


BY_HAND = 'start_seek_loc', 'example_index_at_start', 'tokens_count_at_start'  # flags that say where a stream begins


def refuse_beginning(options, flag: str) -> None:
    """Raise Mistake for a flag that says where a stream begins, next to batching=rows or packed."""
    for name in BY_HAND:
        if options.get(name):
            raise Mistake(f'{flag}.{name}={options[name]} must be 0 where batching={options.get("batching", "rows")}: '
                          'rows are shuffled, so no place of the file begins the rest; resume the run, or set '
                          'batching=stream')
