"""Ask for texts and measure them: the task where an answer is no label but a text, such as a JSON object or a summary.

A record is {"prompt": .., "completion": ..}, the answer that is wanted; `answer` is another name of a completion
(prepare_data.py).  train.py learns it with --train_dataset.text_processor.fields='[prompt],completion'.
Neighbours: text_metrics.py (what is measured), labels.py (the other task), evaluate.py (the program).
"""
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.tables import labelled_files, rows
from evaluation import text_metrics
from evaluation.accuracy import wilson_interval
from mistake import Mistake

IN_TRAINING = ('exact_match', 'token_f1', 'rouge_l', 'json_valid', 'field_f1')
MOST_BARS = 30


class Record(NamedTuple):
    """A prompt, as the model sees it, and the text that should follow it."""

    prompt: str
    completion: str


class Answer(NamedTuple):
    """Hold what was generated.  cut_off: the limit of new tokens ended it; truncated: the prompt was too long and lost
    its beginning; None where a server does not say."""

    text: str
    cut_off: bool | None = None
    truncated: bool | None = None


# ---------------------------------------------------------------- the records


def read_records(path: str, split: str = '') -> tuple[list[Path], list[Record]]:
    """Read a file (or a split of a directory) of records: the files, and the records in their order.

    Raises Mistake, with file and line, for a row that is no record, and for a file without any.
    """
    files, records = labelled_files(path, split), []
    for file in files:
        for place, row in rows(file):
            try:
                records.append(read_record(row))
            except Mistake as error:
                raise Mistake(f'{place}: {error}') from None
    if not records:
        raise Mistake(f'input={path!r} holds no records: task=text needs {{"prompt": .., "completion": ..}} a line')
    return files, records


def read_record(row: dict) -> Record:
    """Take the prompt and the wanted text out of a row.  Raises Mistake that says what is not there.

    A row that spells a conversation ({"messages": ..}, whose last turn is the wanted text) would be read here.
    """
    name = 'answer' if 'answer' in row and 'completion' not in row else 'completion'
    for key in ('prompt', name):
        if key not in row:
            raise Mistake(f'field {key!r} is missing, the record has {", ".join(map(repr, row)) or "no keys"}; '
                          'task=text needs prompt and completion (--task=label reads labelled sets)')
        if not isinstance(row[key], str) or not row[key].strip():
            raise Mistake(f'field {key!r} must be text that is not blank, this is {row[key]!r:.40}')
    return Record(row['prompt'], row[name])


def check_stops(records: list[Record], stops: list[str]) -> None:
    """Raise Mistake for a stop text that stands in a wanted one, which could then never be answered."""
    for number, record in enumerate(records):
        for stop in stops:
            if stop in record.completion:
                raise Mistake(f'stop={stop!r} stands in the completion of record {number}, '
                              f'{record.completion[:60]!r}: no answer could be right; choose another --stop')


def check_room(records: list[Record], encode: Callable[[str], list[int]], most: int, flag: str) -> None:
    """Raise Mistake naming `flag` for a wanted text of more than `most` tokens, which no answer could be."""
    longest, worst = max((len(encode(record.completion)), record.completion) for record in records)
    if longest > most:
        raise Mistake(f'{flag}={most}, but the completion {worst[:60]!r} has {longest} tokens, which no answer could '
                      f'reach: raise --{flag}')


# ---------------------------------------------------------------- the evaluation


def measure(generate: Callable[[list[str]], list[str]], records: list[Record],
            rouge_l: Callable[[str, str], float] | None = None) -> dict[str, float]:
    """Measure what `generate` says to the prompts: {'exact_match', 'token_f1', ..}, from 0 to 1; prints nothing.

    generate(prompts) -> texts, in order.  'rouge_l' is there with rouge_l (text_metrics.load_rouge), 'json_valid' and
    'field_f1' where a wanted text is a JSON object.
    """
    answers = generate([record.prompt for record in records])
    found = text_metrics.measure([text_metrics.compare(record.completion, answer, rouge_l)
                                  for record, answer in zip(records, answers, strict=True)])
    return {name: found[name] for name in IN_TRAINING if name in found}


def evaluate(generate: Callable[[list[str], Callable[[int], None]], list[Answer]], records: list[Record],
             rouge_l: Callable[[str, str], float] | None, seed: int, quiet: bool = False) -> dict:
    """Ask and measure: {'results': {'text': report}, 'records': a row for each}, JSON-able.

    generate(prompts, progress) -> answers.  seed: of the bootstrap.  quiet: no progress bar.
    """
    start, often = time.perf_counter(), 0.5 if sys.stderr.isatty() else 5.0
    with tqdm(total=len(records), desc='generate', unit='record', mininterval=often, disable=quiet) as bar:
        answers = generate([record.prompt for record in records], bar.update)
    seconds = time.perf_counter() - start
    compared = [text_metrics.compare(record.completion, answer.text, rouge_l)
                for record, answer in zip(records, answers, strict=True)]
    values, between = text_metrics.measure(compared), text_metrics.intervals(compared, seed)
    wrong = [i for i, row in enumerate(compared)
             if (text_metrics.errors(row) if 'fields' in row else not row['exact_match'])]
    report = {
        'total': len(records),
        'measures': {name: {'value': values[name], 'interval_95': list(between[name])} for name in values},
        'json_records': sum('fields' in row for row in compared), 'fields': {
            name: share | {'interval_95': list(wilson_interval(share['right'], share['records']))}
            for name, share in text_metrics.field_shares(compared).items()},
        'worst_first': sorted(wrong, key=lambda i: (-text_metrics.errors(compared[i]), compared[i]['token_f1'])),
        'cut_off': sum(answer.cut_off is True for answer in answers),
        'truncated_prompts': sum(answer.truncated is True for answer in answers),
        'seconds': round(seconds, 3), 'records_per_second': round(len(records) / seconds, 3)}
    return {'results': {'text': report}, 'records': [
        {'prompt': record.prompt, 'completion': record.completion, 'generated': answer.text, 'cut_off': answer.cut_off,
         'truncated': answer.truncated, **row} for record, answer, row in zip(records, answers, compared, strict=True)]}


# ---------------------------------------------------------------- what is shown


def print_result(result: dict, shown: int) -> None:
    """Print the measures, the shares of the fields and the `shown` worst records."""
    report = result['results']['text']
    print(f"\n{report['total']} records in {report['seconds']:.1f} s, {report['records_per_second']:.2f} records/s, "
          f"compiling included; {report['json_records']} of them want a JSON object")
    print(f'{"":>16}{"value":>10}   95 % interval (bootstrap)')
    for name, found in report['measures'].items():
        low, high = found['interval_95']
        print(f'{name:>16}{found["value"]:>10.2%}   {low:.2%} to {high:.2%}')
    if report['fields']:
        width = max(16, *map(len, report['fields']))
        print(f'{"field":>{width}}{"right":>10}   95 % interval (Wilson)')
    for name, share in report['fields'].items():
        low, high = share['interval_95']
        print(f'{name:>{width}}{share["right"] / share["records"]:>10.2%}   {low:.2%} to {high:.2%}   '
              f'({share["right"]} of {share["records"]})')
    if report['cut_off']:
        print(f"WARNING: {report['cut_off']} answers were cut off at --max_new_tokens")
    if report['truncated_prompts']:
        print(f"WARNING: {report['truncated_prompts']} prompts were longer than the server takes (--input_length) and "
              'lost their beginning')
    worst = report['worst_first']
    for i in worst[:shown]:
        row = result['records'][i]
        print(f"\nrecord {i}, token F1 {row['token_f1']:.2f}{wrong_text(row)}\n  prompt:    {row['prompt']!r}\n"
              f"  wanted:    {row['completion']!r}\n  generated: {row['generated']!r}")
    if len(worst) > shown:
        print(f'\nand {len(worst) - shown} more that are not right in evaluation.json (worst_first)')


def wrong_text(row: dict) -> str:
    """Say what is wrong with the fields of a row: ', no JSON object' or ', wrong: dose, missing: drug'."""
    fields = row.get('fields')
    if fields is None:
        return ''
    if not fields['valid']:
        return ', no JSON object'
    return ''.join(f', {kind}: {", ".join(fields[kind])}' for kind in ('wrong', 'missing', 'surplus') if fields[kind])


def draw_fields(report: dict, path: Path, subtitle: str = '') -> None:
    """Draw a PNG with a bar for each field (the first 30): how often it is right, with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, so that figures need no matplotlib
    from matplotlib.figure import Figure

    names = list(report['fields'])[:MOST_BARS]
    shares = [report['fields'][name] for name in names]
    values = [share['right'] / share['records'] for share in shares]
    ends = [share['interval_95'] for share in shares]
    figure = Figure(figsize=(7.0, 1.8 + 0.42 * len(names)), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(range(len(names)), values, color='#4c86c6', height=0.62)
    axes.hlines(range(len(names)), *zip(*ends, strict=True), color='0.2', linewidth=1.5)
    for place, (value, share) in enumerate(zip(values, shares, strict=True)):
        axes.text(1.03, place, f'{value:.1%}   {share["right"]} of {share["records"]}', va='center', fontsize=9)
    axes.set_yticks(range(len(names)), [name if len(name) <= 30 else name[:29] + '…' for name in names])
    axes.set_xlim(0, 1.01)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ['0 %', '25 %', '50 %', '75 %', '100 %'])
    axes.invert_yaxis()
    axes.spines[['top', 'right']].set_visible(False)
    f1, valid = (report['measures'][name] for name in ('field_f1', 'json_valid'))
    axes.set_title(f"Fields right, of {report['json_records']:,} records\nfield F1 {f1['value']:.1%}  (95 % interval "
                   f"{f1['interval_95'][0]:.1%} – {f1['interval_95'][1]:.1%}), a JSON object {valid['value']:.1%}",
                   fontsize=11)
    if subtitle:
        figure.supxlabel(subtitle, fontsize=8, color='0.4')
    figure.savefig(path)
