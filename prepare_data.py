"""Turn a labelled set into records for training and files for evaluation.

    python prepare_data.py --input=reviews.json --output=prepared
    python prepare_data.py --input=rotten_tomatoes --split=train --sample_ratio=0.5 --output=prepared

For a part NAME (the split, or the input's file name without its ending) it writes into the output directory

    NAME.jsonl        one record a line: {"text": "[Text]: a fine film\\n[Sentiment]: Positive"}; train.py reads it with
                      --train_dataset.text_processor.fields=text, or, when it was written with
                      --record_fields=text,prompt,answer, with fields='[prompt],answer' for loss on the label alone
    eval_NAME.json    {"prefix_text": ["[Text]: a fine film\\n[Sentiment]:", ..]}, a body for POST /generate
    labels_NAME.json  the label of each prompt, the template, and where they come from

The prompts of eval_NAME.json are those of the records, in the same order: evaluate on another split than you train on.
"""
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

from data.labelled import Example, labelled_files, read_labelled, sample
from data.prompt import PromptTemplate
from mistake import Mistake
from program import flags, parse


def main(config) -> None:
    if not config.output:
        raise Mistake('output=\'\' must name a directory to write to, for example --output=prepared')
    template = PromptTemplate(labels=tuple(name.strip() for name in config.labels.split(',')))
    files = labelled_files(config.input, config.split)
    all_examples = read_labelled(config.input, config.split, config.text_field, config.label_field, template.labels)
    chosen = sample(all_examples, ratio=config.sample_ratio, size=config.sample_size, seed=config.seed,
                    stratified=config.stratified, shuffle=config.shuffle)
    counts = class_counts(chosen, template)
    print(f'{len(all_examples)} examples in {", ".join(map(str, files))}: {class_counts(all_examples, template)}')
    print(f'{len(chosen)} examples chosen: {counts}')
    for warning in warnings(chosen, template):
        print(f'WARNING: {warning}', file=sys.stderr)

    name, output = config.split or files[0].stem, Path(config.output)
    if any(file.resolve() == (output / f'{name}.jsonl').resolve() for file in files):
        raise Mistake(f'output={config.output!r} holds the input {files[0]}, which would be replaced; choose '
                         'another directory')
    output.mkdir(parents=True, exist_ok=True)
    keys = config.record_fields.split(',')
    lines = (json.dumps(record(example, template, keys), ensure_ascii=False) + '\n' for example in chosen)
    prompts = {'prefix_text': [template.prompt(example.text) for example in chosen]}
    labels = {'labels': [example.label for example in chosen], 'template': template.to_dict(), 'counts': counts,
              'source': [{'file': str(file), 'sha256': sha256(file)} for file in files],
              'sample': {key: config[key] for key in ('sample_ratio', 'sample_size', 'seed', 'stratified', 'shuffle')}}
    write(output / f'{name}.jsonl', ''.join(lines))
    write(output / f'eval_{name}.json', json.dumps(prompts, ensure_ascii=False) + '\n')
    write(output / f'labels_{name}.json', json.dumps(labels, ensure_ascii=False) + '\n')


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
    """What is suspicious about a sample: labels without examples, texts that come more than once."""
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


def write(path: Path, text: str) -> None:
    """Write a whole file or none, and say where."""
    unfinished = path.with_name(path.name + '.unfinished')
    unfinished.write_text(text, encoding='utf-8', newline='\n')
    os.replace(unfinished, path)
    print(f'wrote {path} ({path.stat().st_size} bytes)')


if __name__ == '__main__':
    parse.run(main, flags.PREPARE)
