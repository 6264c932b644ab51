"""A batch of arrays, and the parts that both ways to make batches share: saved state and its checks, throughput.

stream.py packs all records into one stream of tokens, as EasyLM does; rows.py puts one record in a row, or several
whole ones.  Both are endless and resumable to the bit: `state()` belongs to the batch last returned, and after
`restore(state)` comes the batch that would have followed it.  Both read records from a Reader (below); the training
loop reads them (above).
"""
import json
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from data.huggingface import HuggingfaceReader
from data.mixture import Mixture
from data.records import RecordReader
from mistake import Mistake

Reader = RecordReader | HuggingfaceReader | Mixture
STREAM_STATE = 'start', 'index', 'dropped', 'skipped_lines', 'total_tokens'  # whole numbers of a PackedStream's state
ROWS_STATE = 'epoch', 'batch', 'total_tokens'
DAMAGED = ('the state is damaged, or belongs to other data: continue from another checkpoint or state file, or start '
            'anew')


class Batch(NamedTuple):
    """Holds the arrays that one training step reads.

    tokens_BT int32.  segments_BT int32: 0 for padding, 1.. the record a token belongs to; None: a row is one segment.
    loss_positions_BP int32: the positions t whose next token carries loss, then zeros; None means P = T, all in order.
    targets_BP int32: the token after that position.  loss_mask_BP float32: 1 where it counts, 0 elsewhere.
    row_weight_B float32: 0 for a row that only fills the batch up; the loss is a weighted mean over rows.
    positions_BT int32: a token's place in its record; None: its place in the row.
    loss_share_BP float32: the part of each target in the mean, all together 1; None: the mean over rows of each row's
    mean.  loss_weight_BP float32: the factor of its loss, by which the mean is not divided; None: 1.
    """

    tokens_BT: np.ndarray
    segments_BT: np.ndarray | None
    loss_positions_BP: np.ndarray | None
    targets_BP: np.ndarray
    loss_mask_BP: np.ndarray
    row_weight_B: np.ndarray
    positions_BT: np.ndarray | None = None
    loss_share_BP: np.ndarray | None = None
    loss_weight_BP: np.ndarray | None = None


class Throughput:
    """Measures tokens per second of wall clock, under EasyLM's names; `window` is a number of batches.

    A batch is counted when it is handed out, so there is no figure before the second one: what lies between them
    is the training on the first.
    """

    def __init__(self, window: int):
        self._tokens, self._batches, self._began = 0, 0, None
        self._recent = deque(maxlen=window + 1)  # (time, tokens until then), the oldest begins the window

    def start(self) -> None:
        """Start the clock, unless it runs."""
        if self._began is None:
            self._began = perf_counter()
            self._recent.append((self._began, 0))

    def add(self, tokens: int) -> None:
        """Count a batch that is handed out now."""
        self._tokens, self._batches = self._tokens + tokens, self._batches + 1
        self._recent.append((perf_counter(), self._tokens))

    @property
    def metrics(self) -> dict:
        """Return dataset_accumulated_tps (since the start) and dataset_average_tps (over the window)."""
        if self._batches < 2:
            return {}
        (first, before), (last, tokens) = self._recent[0], self._recent[-1]
        return {'dataset_accumulated_tps': round(tokens / (last - self._began), 1),
                'dataset_average_tps': round((tokens - before) / (last - first), 1)}


def read_dataset_state(path: str) -> dict:
    """Read {'state': what `state()` gave, 'dataset': nested flags of the data set} from JSON (--load_dataset_state).

    Raises Mistake for any other file.  EasyLM's dataset.pkl is never read: give its numbers as flags.
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
    check_state(state, ROWS_STATE if 'epoch' in state else STREAM_STATE, f'load_dataset_state={path!r}')
    return {'state': state, 'dataset': saved['dataset']}


def check_state(state: dict, numbers: tuple[str, ...], where: str) -> None:
    """Raise Mistake unless `state` has `numbers`, whole and not negative, and a source."""
    if not isinstance(state, dict):
        raise Mistake(f'{where}: the saved data state is {state!r}; {DAMAGED}')
    if numbers == STREAM_STATE and 'epoch' in state or numbers == ROWS_STATE and 'dropped' in state:
        other = 'rows' if 'epoch' in state else 'stream'
        raise Mistake(f'{where}: the saved data state is one of batching={other}; continue with that')
    for name in numbers:
        value = state.get(name)
        if type(value) is not int or value < 0:
            raise Mistake(f'{where}: the saved data state has {name}={value!r}, which must be a whole number from 0 '
                          f'on; {DAMAGED}')
    if not isinstance(state.get('source'), dict):
        raise Mistake(f'{where}: the saved data state has source={state.get("source")!r}; {DAMAGED}')


def check_source(saved: dict, ours: dict, reader: Reader) -> None:
    """Raise Mistake naming the first setting of `ours` that the saved run did not share."""
    for name in ours:
        if saved.get(name) != ours[name]:
            raise Mistake(f'{reader.flag}: cannot continue with {reader.path}: {name} was {saved.get(name)}, now it '
                          f'is {ours[name]}; continue with the same records and settings, or start anew')
