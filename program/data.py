"""Dataset (program/settings.py) -> batches of tokens, the template of its records, and a position to go on from."""
import dataclasses
import json
import pathlib
from fractions import Fraction

from jax.sharding import Mesh

from checkpoint.source import read_run
from data.batches import read_dataset_state
from data.huggingface import HuggingfaceReader
from data.prompt import PromptTemplate
from data.records import RecordReader
from data.rows import BY_HAND, RowBatches, refuse_beginning
from data.stream import PackedStream
from data.text_processor import TextProcessor
from data.tokenizer import Tokenizer
from mistake import Mistake
from model.partition import check_rows
from program.settings import Dataset


def open_batches(dataset: Dataset, tokenizer: Tokenizer, mesh: Mesh, seed: int) -> PackedStream | RowBatches:
    """Open the batches of a data set; raises Mistake naming the flag, before anything is tokenized."""
    rows, flag = dataset.rows, dataset.flag
    check_rows(rows['batch_size'], mesh, f'{flag}.batch_size')
    if dataset.type == 'json':
        if not rows['path']:
            raise Mistake(f'{flag}.path is empty: name a file of JSON lines (prepare_data.py writes them)')
    elif dataset.values['json_dataset']['path']:
        raise Mistake(f"{dataset.name}.json_dataset.path={dataset.values['json_dataset']['path']!r}, but "
                      f"{dataset.name}.type='huggingface': add --{dataset.name}.type=json")
    try:
        processor = TextProcessor(tokenizer=tokenizer, **dataset.text_processor)
    except Mistake as error:
        raise Mistake(f'{dataset.name}: {error}') from None
    if dataset.type == 'json':
        reader = RecordReader(rows['path'], processor, skip_bad_lines=rows['skip_bad_lines'], flag=flag,
                              processes=rows['tokenizer_processes'], chunk_size=rows['tokenizer_parallel_chunk_size'],
                              batch_size=rows['tokenizer_parallel_batch_size'])
    else:
        reader = HuggingfaceReader(rows['path'], rows['name'], rows['split'], rows['streaming'], processor,
                                   skip_bad_lines=rows['skip_bad_lines'], flag=flag)
    sizes = {key: rows[key] for key in ('seq_length', 'batch_size', 'throughput_average_window_size') if key in rows}
    if rows['batching'] == 'stream':
        start = {key: rows[key] for key in BY_HAND if key in rows}
        return PackedStream(reader, always_start_with_bos=rows['always_start_with_bos'], **sizes, **start)
    refuse_beginning(rows, flag)
    batches = RowBatches(reader, seed=seed, too_long=rows['too_long'], **sizes)
    print(f'{dataset.name}: {batches.counts}, {batches.batches_per_epoch} batches an epoch, {batches.fill:.0%} of the '
          f'positions hold tokens, shapes (T, P) {batches.shapes}', flush=True)
    return batches


def epoch_length(batches: PackedStream | RowBatches, dataset: Dataset) -> Fraction:
    """Count the batches of an epoch, a pass over the records: of a stream what its tokens fill, with a part of one.

    A stream is counted by tokenizing it once; the next pass begins where this one ends, in the same order (rows are
    shuffled each epoch).  Raises Mistake for a data set that is read from afar while training.
    """
    if not isinstance(batches, PackedStream):
        return Fraction(batches.batches_per_epoch)
    if dataset.rows.get('streaming'):
        raise Mistake(f'{dataset.flag}.streaming=True: how long an epoch of it is would only be known after reading '
                      'all of it; give --total_steps, and --evaluate_every in steps')
    tokens = batches.pass_tokens()
    length = Fraction(tokens, batches.batch_size * batches.seq_length)
    print(f'{dataset.name}: {tokens} tokens a pass, {float(length):.2f} batches an epoch, in file order each time',
          flush=True)
    return length


def read_template(dataset: Dataset) -> PromptTemplate | None:
    """Read the template that prepare_data.py noted beside its records, in labels_NAME.json; None without it."""
    if dataset.type != 'json':
        return None
    path = pathlib.Path(dataset.rows['path'])
    labels = path.with_name(f'labels_{path.stem}.json')
    if labels.is_file():
        return PromptTemplate.from_dict(json.loads(labels.read_text(encoding='utf-8'))['template'], source=str(labels))
    print(f'WARNING: {labels} is not there, so the checkpoint will not know the prompt and the labels of '
          f'{dataset.flag}.path={dataset.rows["path"]!r}: copy it there from where prepare_data.py wrote the records',
          flush=True)
    return None


def continued(dataset: Dataset, path: str) -> tuple[Dataset, dict]:
    """Read --load_dataset_state, a dataset.json or a checkpoint: (its data set instead, its position).

    Raises Mistake for a file that is no dataset state, EasyLM's dataset.pkl by name.
    """
    if pathlib.Path(path).is_dir():
        flags, position = read_run(path)
        values = flags['train_dataset']
    else:
        saved = read_dataset_state(path)
        values, position = saved['dataset'], saved['state']
    if unknown := _unknown(values, dataset.values):
        raise Mistake(f'load_dataset_state={path!r}: its flags are none of train_dataset ({unknown}); begin the data '
                      'anew, or give the position as --train_dataset.json_dataset.start_seek_loc and its like')
    print(f'load_dataset_state={path!r} replaces the train_dataset flags', flush=True)
    return dataclasses.replace(dataset, values=_replaced(dataset.values, values)), position


def _unknown(values: dict, known: dict, prefix: str = '') -> str:
    """Name the first value that is none of the known flags, or of another type; '' if there is none."""
    for key, value in values.items():
        if key not in known or isinstance(value, dict) != isinstance(known[key], dict) or \
                not isinstance(value, dict) and type(value) is not type(known[key]):
            return f'{prefix}{key}={value!r}'
        if isinstance(value, dict) and (found := _unknown(value, known[key], f'{prefix}{key}.')):
            return found
    return ''


def _replaced(known: dict, values: dict) -> dict:
    return known | {key: _replaced(known[key], value) if isinstance(value, dict) else value
                    for key, value in values.items()}
