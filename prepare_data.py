r"""Turn a labelled set into records for training and files for evaluation.

    python prepare_data.py --input=reviews.csv --output=data --split_ratios=0.8,0.1,0.1
    python prepare_data.py --input=tickets.csv --output=data --split_ratios=0.8,0.2 --template='Ticket: {text}\nTeam:'
    python prepare_data.py --input=rotten_tomatoes --split=train --sample_ratio=0.5 --output=data

For a part NAME (train, validation and test of --split_ratios; else the split, or the input's file name without its
ending) it writes into the output directory

    NAME.jsonl        a record a line: {"text": "[Text]: a fine film\n[Sentiment]: Positive", "prompt": .., ..};
                      train.py reads it with --train_dataset.text_processor.fields=text, or with
                      fields='[prompt],answer' for loss on the label alone; evaluate.py reads it with --input
    eval_NAME.json    {"prefix_text": ["[Text]: a fine film\n[Sentiment]:", ..]}, a body for POST /generate
    labels_NAME.json  the label of each prompt, the template, and where they come from

The prompts of eval_NAME.json are those of the records, in the same order: evaluate on another part than you train on.
"""
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

from data.labelled import Example, Labelled, parse_labels, read_labelled
from data.parts import part, sample
from data.prompt import PromptTemplate
from data.tables import labelled_files
from mistake import Mistake
from program import flags, parse


def main(config) -> None:
    if not config.output:
        raise Mistake('output=\'\' must name a directory to write to, for example --output=data')
    ratios = read_ratios(config.split_ratios)
    if config.template:
        PromptTemplate.written(config.template, ('a', 'b'))  # refused before the set is read
    files = labelled_files(config.input, config.split)
    found = read_labelled(config.input, config.split, config.text_field, config.label_field,
                          parse_labels(config.labels) if config.labels else None, config.skip_bad_rows)
    template = (PromptTemplate.written(config.template, found.labels) if config.template
                else PromptTemplate(labels=found.labels))
    print_found(found, template, files)
    chosen = sample(found.examples, ratio=config.sample_ratio, size=config.sample_size, seed=config.seed,
                    stratified=config.stratified, shuffle=config.shuffle)
    print(f'{len(chosen)} examples chosen: {class_counts(chosen, template)}')
    for warning in warnings(chosen, template):
        print(f'WARNING: {warning}', file=sys.stderr)
    parts = {config.split or files[0].stem: chosen}
    if ratios:
        parts = dict(zip(ratios, part(chosen, tuple(ratios.values()), config.seed), strict=True))
        for name, examples in parts.items():
            print(f'  {name}: {len(examples)}: {class_counts(examples, template)}')
            if missing := [label for label, count in class_counts(examples, template).items() if not count]:
                print(f'WARNING: {name} has no example of {", ".join(missing)}', file=sys.stderr)

    source = {'source': [{'file': str(file), 'sha256': sha256(file)} for file in files],
              'sample': {key: config[key] for key in ('sample_ratio', 'sample_size', 'seed', 'stratified', 'shuffle',
                                                      'split_ratios')}}
    contents = {}
    for name, examples in parts.items():
        contents |= file_contents(name, examples, template, config.record_fields.split(','), source)
    output = Path(config.output)
    if over := [file for file in files if file.resolve() in [(output / name).resolve() for name in contents]]:
        raise Mistake(f'output={config.output!r} holds the input {over[0]}, which would be replaced; choose '
                         'another directory')
    write_all(output, contents, config.overwrite)


def read_ratios(flag: str) -> dict[str, float]:
    """--split_ratios as {part: its ratio}; empty when the flag is.  Raises Mistake unless two or three positive numbers
    sum to 1."""
    if not flag:
        return {}
    try:
        ratios = [float(ratio) for ratio in flag.split(',')]
    except ValueError:
        ratios = []
    if len(ratios) not in (2, 3) or not all(0 < ratio < 1 for ratio in ratios) or abs(sum(ratios) - 1) > 1e-6:
        raise Mistake(f'split_ratios={flag!r} must be two or three positive numbers that sum to 1: 0.8,0.2 for train '
                      'and test, 0.8,0.1,0.1 for train, validation and test')
    return dict(zip(('train', 'test') if len(ratios) == 2 else ('train', 'validation', 'test'), ratios, strict=True))


def print_found(found: Labelled, template: PromptTemplate, files: list[Path]) -> None:
    """Say what was read: rows skipped, columns, labels and where their names come from, and how a record looks."""
    if found.skipped:
        print(f'{len(found.skipped)} rows skipped:')
        print('\n'.join(f'  {problem}' for problem in found.skipped[:5]))
        if len(found.skipped) > 5:
            print(f'  and {len(found.skipped) - 5} more')
    counts = class_counts(found.examples, template)
    print(f'{len(found.examples)} examples in {", ".join(map(str, files))}: {counts}')
    print(f'texts from column {found.columns[0]!r}, labels from column {found.columns[1]!r}: {",".join(counts)} '
          f'({found.origin})')
    print(f'the first record: {template.record(*found.examples[0])!r}')


def file_contents(name: str, examples: list[Example], template: PromptTemplate, keys: list[str],
                  source: dict) -> dict[str, str]:
    """{file name: its text} of the three files of a part."""
    lines = (json.dumps(record(example, template, keys), ensure_ascii=False) + '\n' for example in examples)
    prompts = {'prefix_text': [template.prompt(example.text) for example in examples]}
    labels = {'labels': [example.label for example in examples], 'template': template.to_dict(),
              'counts': class_counts(examples, template), **source}
    return {f'{name}.jsonl': ''.join(lines), f'eval_{name}.json': json.dumps(prompts, ensure_ascii=False) + '\n',
            f'labels_{name}.json': json.dumps(labels, ensure_ascii=False) + '\n'}


def record(example: Example, template: PromptTemplate, keys: list[str]) -> dict:
    """The record of an example with the given keys, out of text, prompt and answer."""
    values = {'text': template.record(*example), 'prompt': template.prompt(example.text),
              'answer': template.answer(example.label)}
    return {key: values[key] for key in keys}


def class_counts(examples: list[Example], template: PromptTemplate) -> dict[str, int]:
    """How many examples each label's name has."""
    counts = Counter(example.label for example in examples)
    return {name: counts[label] for label, name in enumerate(template.labels)}


def warnings(examples: list[Example], template: PromptTemplate) -> list[str]:
    """Find what is suspicious about a sample: labels without examples, texts that come more than once."""
    found = []
    counts = class_counts(examples, template)
    present = [name for name, count in counts.items() if count]
    if len(present) == 1:
        found.append(f'ALL {len(examples)} EXAMPLES ARE {present[0].upper()}. A model trained on them learns to answer '
                     f'{present[0]!r} to everything. The input may be sorted by label: leave out '
                     '--stratified=False and --shuffle=False, or choose another sample.')
    elif len(present) < len(counts):
        found.append(f'no example is {", ".join(name for name in counts if not counts[name])}')
    labels_of = {}
    for text, label in examples:
        labels_of.setdefault(text, []).append(label)
    if repeated := len(examples) - len(labels_of):
        contradictions = sum(len(set(labels)) > 1 for labels in labels_of.values())
        found.append(f'{repeated} examples repeat the text of another; {contradictions} texts come with several labels')
    return found


def sha256(file: Path) -> str:
    with open(file, 'rb') as content:
        return hashlib.file_digest(content, 'sha256').hexdigest()


def write_all(output: Path, contents: dict[str, str], overwrite: bool) -> None:
    """Write {file name: text} into a directory, each file whole, and say where.

    Raises Mistake before anything is written when a file of that name holds something else, unless `overwrite`.
    """
    for name, text in contents.items():
        path = output / name
        if path.exists() and not overwrite and path.read_bytes() != text.encode():
            raise Mistake(f'output={str(output)!r} holds {name} of another preparation: choose another directory, or '
                          'write over it with --overwrite=True')
    output.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        path, unfinished = output / name, output / f'{name}.unfinished'
        unfinished.write_text(text, encoding='utf-8', newline='\n')
        os.replace(unfinished, path)
        print(f'wrote {path} ({path.stat().st_size} bytes)')


if __name__ == '__main__':
    parse.run(main, flags.PREPARE)
