"""Dataset (program/settings.py) -> batches of tokens, the template of its records, and a position to go on from."""
import dataclasses
import json
import math
import pathlib
from collections import Counter
from fractions import Fraction

from jax.sharding import Mesh

from checkpoint.source import Source, read_run
from data.batches import read_dataset_state
from data.chat import TABLE
from data.huggingface import HuggingfaceReader
from data.mixture import Mixture, split_path
from data.prompt import PromptTemplate
from data.records import RecordReader, raw_lines
from data.rows import BY_HAND, RowBatches, refuse_beginning
from data.stream import PackedStream
from data.text_processor import TextProcessor, parse
from data.tokenizer import Tokenizer
from mistake import Mistake
from model.partition import check_rows
from program.settings import Dataset

MOST_OF_ONE_LABEL = 0.9  # above which a model that always says it looks good


def open_batches(dataset: Dataset, tokenizer: Tokenizer, mesh: Mesh, seed: int,
                 source: Source | None = None) -> PackedStream | RowBatches:
    """Open the batches of a data set; raises Mistake naming the flag, before anything is tokenized.

    source: the model's checkpoint, whose chat template messages are written with.  Prints how often each label comes.
    """
    rows, flag = dataset.rows, dataset.flag
    check_rows(rows['batch_size'], mesh, f'{flag}.batch_size')
    if dataset.type == 'json':
        if not rows['path']:
            raise Mistake(f'{flag}.path is empty: name a file of JSON lines (prepare_data.py writes them)')
    elif dataset.values['json_dataset']['path']:
        raise Mistake(f"{dataset.name}.json_dataset.path={dataset.values['json_dataset']['path']!r}, but "
                      f"{dataset.name}.type='huggingface': add --{dataset.name}.type=json")
    if rows['batching'] == 'stream' and len(_files(dataset)) > 1:
        raise Mistake(f'{flag}.path={rows["path"]!r} names several files, and batching=stream reads one from its '
                      f'beginning to its end: add --{flag}.batching=packed or rows')
    processor = _open_processor(dataset, tokenizer, source)
    if processor.chat is not None:
        print(f'{dataset.name}: messages are written with the chat template {processor.chat.name}', flush=True)
    if dataset.type == 'json':
        readers = [RecordReader(path, processor, skip_bad_lines=rows['skip_bad_lines'], flag=flag,
                                processes=rows['tokenizer_processes'], chunk_size=rows['tokenizer_parallel_chunk_size'],
                                batch_size=rows['tokenizer_parallel_batch_size']) for path, _ in _files(dataset)]
        reader = readers[0] if len(readers) == 1 else \
            Mixture(rows['path'], readers, [weight for _, weight in _files(dataset)])
    else:
        reader = HuggingfaceReader(rows['path'], rows['name'], rows['split'], rows['streaming'], processor,
                                   skip_bad_lines=rows['skip_bad_lines'], flag=flag)
    sizes = {key: rows[key] for key in ('seq_length', 'batch_size', 'throughput_average_window_size', 'loss_per')
             if key in rows}
    if rows['batching'] == 'stream':
        start = {key: rows[key] for key in BY_HAND if key in rows}
        return PackedStream(reader, always_start_with_bos=rows['always_start_with_bos'], **sizes, **start)
    refuse_beginning(rows, flag)
    batches = RowBatches(reader, seed=seed, too_long=rows['too_long'], packed=rows['batching'] == 'packed', **sizes)
    print(f'{dataset.name}: {batches.counts}, {batches.batches_per_epoch} batches an epoch, {batches.fill:.0%} of the '
          f'positions hold tokens, shapes (T, P) {batches.shapes}', flush=True)
    if len(batches.files) > 1:
        print('\n'.join(f'  {file["path"]}: {file["epoch"]} rows an epoch of its {file["rows"]}'
                        for file in batches.files), flush=True)
    return batches


def _files(dataset: Dataset) -> list[tuple[str, float]]:
    """List the files of a json_dataset with their weights; none of another set."""
    return split_path(dataset.rows['path'], dataset.flag) if dataset.type == 'json' else []


def _open_processor(dataset: Dataset, tokenizer: Tokenizer, source: Source | None) -> TextProcessor:
    """Make the text processor: with the chat template that messages need, and the weights of the labels."""
    settings = dict(dataset.text_processor)
    by_keys, flag = not settings['fields'] and not settings['fields_from_example'], f'{dataset.name}.text_processor'
    name = settings.pop('chat_template')
    if name not in ('', 'none') and not by_keys and dataset.name == 'train_dataset':
        raise Mistake(f'{flag}.chat_template={name} is for records with messages, which are found by their keys: leave '
                      f'out --{flag}.fields={settings["fields"]!r} and fields_from_example')
    if name in ('', 'own') and by_keys:
        own = source and source.chat_template
        if name and not own:
            raise Mistake(f'{flag}.chat_template=own, but no chat template comes with load_checkpoint: choose '
                          f'{", ".join(TABLE)}')
        name = own or ''
    name = name if by_keys and name != 'none' else ''
    weights = weigh_classes(dataset)
    try:
        return TextProcessor(tokenizer=tokenizer, **settings, chat_template=name,
                             weight_field=dataset.rows['weight_field'], class_weights=weights)
    except Mistake as error:
        raise Mistake(f'{dataset.name}: {error}') from None


def weigh_classes(dataset: Dataset) -> dict | None:
    """Count the labels of labelled records, print that, and read class_weights as TextProcessor takes them."""
    flag, given = f'{dataset.name}.class_weights', dataset.values['class_weights']
    template = _template_beside(dataset)
    if template is None:
        if given:
            raise Mistake(f'{flag}={given!r} needs labels_NAME.json beside each NAME.jsonl, as prepare_data.py writes '
                          'it: copy it there, or leave the flag out')
        return None
    counts = count_labels(dataset, template)
    total = sum(counts.values())
    if total:
        name, most = max(counts.items(), key=lambda item: item[1])
        print(f'{dataset.name}: {total} records with a label: ' + ', '.join(f'{key} {n}' for key, n in counts.items())
              + f'; the commonest, {name}, is {most / total:.1%}', flush=True)
        if most / total > MOST_OF_ONE_LABEL:
            print(f'WARNING: {dataset.name}: whoever always says {name!r} is right in {most / total:.1%} of the '
                  f'records, and a model may learn just that: look at the macro F1, and try --{flag}=balanced',
                  flush=True)
    if not given:
        return None
    if given == 'balanced':
        present = sum(count > 0 for count in counts.values())
        weights = [total / present / count if count else 1.0 for count in counts.values()]
    else:
        weights = read_class_weights(given, flag, template.labels)
    print(f'{flag}: ' + ', '.join(f'{name} {weight:.4g}' for name, weight in zip(counts, weights, strict=True)),
          flush=True)
    return dict(template=template.to_dict(), weights=weights)


def read_class_weights(given: str, flag: str, labels: tuple[str, ...]) -> list[float]:
    """Read 'Positive=2,Negative=1' as one weight for each of `labels`, 1 where it names none.

    Raises Mistake for a name that is no label, one that is named twice, and what is no number from 0 on.
    """
    known, weights = {name.strip().lower(): number for number, name in enumerate(labels)}, {}
    for part in given.split(','):
        name, _, value = part.rpartition('=')
        number = known.get(name.strip().lower())
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if number is None or number in weights or not 0 <= weight < math.inf:
            raise Mistake(f'{flag}={given!r}: {part.strip()!r} is no LABEL=NUMBER, with a number from 0 on and each '
                          f'label once; the labels are {", ".join(labels)}; or write balanced')
        weights[number] = weight
    return [weights.get(number, 1.0) for number in range(len(labels))]


def count_labels(dataset: Dataset, template: PromptTemplate) -> dict[str, int]:
    """Count the records of each label, in the order of the labels; records without one are left out."""
    counts = Counter()
    for path, _ in _files(dataset):
        for line in raw_lines(path) if pathlib.Path(path).is_file() else ():  # the reader refuses one that is not there
            example, _ = parse(line.text)
            if example is not None and (label := template.label_of(example)) is not None:
                counts[label] += 1
    return {name: counts[number] for number, name in enumerate(template.labels)}


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
    template, text = _template_beside(dataset), dataset.text_processor
    if template is None and dataset.type == 'json' and (text['fields'] or text['fields_from_example']):
        labels = _labels_of(_files(dataset)[0][0])
        print(f'WARNING: {labels} is not there, so the checkpoint will not know the prompt and the labels of '
              f'{dataset.flag}.path={dataset.rows["path"]!r}: copy it there from where prepare_data.py wrote the '
              'records', flush=True)
    return template


def chat_template_of(batches: PackedStream | RowBatches, source: Source | None) -> str | None:
    """Return the chat template for the checkpoint: the run's, else the one that a checkpoint of ours came with."""
    return batches.reader.processor.chat_template or (source.chat_template if source and source.native else None)


def _labels_of(path: str) -> pathlib.Path:
    return pathlib.Path(path).with_name(f'labels_{pathlib.Path(path).stem}.json')


def _template_beside(dataset: Dataset) -> PromptTemplate | None:
    """Read labels_NAME.json of every file; None unless all have one.  Raises Mistake where they differ."""
    found = {}
    for path, _ in _files(dataset):
        labels = _labels_of(path)
        if not labels.is_file():
            return None
        values = json.loads(labels.read_text(encoding='utf-8'))['template']
        found[labels] = PromptTemplate.from_dict(values, source=str(labels))
    if len(set(found.values())) > 1:
        raise Mistake(f'{" and ".join(map(str, found))} have different templates: prepare the files with the same '
                      '--template and --labels')
    return next(iter(found.values()), None)


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
