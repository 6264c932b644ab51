"""How well a checkpoint, or a running server, labels the reviews of a labelled set.

    python evaluate.py --load_checkpoint=runs/tuned --input=data/test.jsonl
    python evaluate.py --load_checkpoint=runs/tuned --input=rotten_tomatoes --split=test
    python evaluate.py --load_checkpoint=runs/tuned --input=rotten_tomatoes --split=test --before=base/evaluation.json
    python evaluate.py --url=http://127.0.0.1:5007 --input=reviews.json --method=both

It prints the accuracy with its 95 % interval, precision, recall and F1 of each label, the confusion matrix,
misclassified reviews and what the model generates for a few reviews; with --before, that beside what it generated then,
and how many reviews changed sides.  Everything is in evaluation.json in --output_dir, the confusion matrix also in
confusion_matrix.png.  A NAME.jsonl that prepare_data.py wrote has its labels and template beside it, in
labels_NAME.json; else the template is the checkpoint's, or the article's with the labels of the data.
"""
import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from checkpoint import Source
from checkpoint.adapter import describe_adapter
from data.labelled import Example, Labels, parse_labels, read_labelled, read_prepared
from data.parts import sample
from data.prompt import PromptTemplate
from data.tables import labelled_files
from data.tokenizer import load_tokenizer
from evaluation import accuracy, calibration
from evaluation.client import Server
from hosts import processes
from hosts.start import failing_together, start_processes
from mistake import Mistake
from model.partition import check_rows
from program import flags, parse, settings
from program.model import describe, open_model, open_source
from serving.engine import make_engine
from serving.texts import Texts

PACKAGES = ('jax', 'jaxlib', 'numpy', 'sentencepiece', 'tokenizers')


class Asked(NamedTuple):
    """Whom to ask.

    loglikelihood(prefixes, texts, progress) -> [(nats, is greedy)];  generate(prompts, tokens, progress) -> [text];
    encode(text) -> ids, or None where no tokenizer is at hand.
    """

    loglikelihood: Callable
    generate: Callable
    encode: Callable | None


@failing_together()
def main(config) -> None:
    output = output_directory(config)
    start_processes(config)
    load = settings.read_load(config)
    source = open_source(load)
    if config.calibrate and not (source and source.native):
        raise Mistake(f'load_checkpoint={config.load_checkpoint!r} cannot keep a temperature: convert it first '
                      '(convert.py --format=native)')
    files, examples, template = read_input(config, source)
    if config.sample_size:
        examples = sample(examples, size=config.sample_size, seed=config.seed)
    before = read_before(config.before, examples, template, methods(config)) if config.before else None
    shown = ([Example(row['text'], template.labels.index(row['label'])) for row in before['samples']] if before
             else examples[:config.samples])
    asked = open_server(config) if config.url else open_engine(config, template, examples + shown, source)
    result = evaluate(asked, examples, shown, template, methods(config), config.max_new_tokens, config.sample_tokens)
    if processes.index() > 0:
        return  # every process asks the engine, process 0 says what came of it
    print_result(result, before)
    if directory := source and source.native and Path(source.native.path):
        add_calibration(result, examples, calibration.read_temperature(directory), config.calibrate)
    result = {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
              'flags': json.loads(config.to_json()),
              'data': [{'file': str(file), 'sha256': hashlib.sha256(file.read_bytes()).hexdigest()} for file in files],
              'adapter': describe_adapter(source) if source and source.adapter else None,
              'template': template.to_dict(), 'versions': versions(), **result}
    output.mkdir(parents=True, exist_ok=True)
    (output / 'evaluation.json').write_text(
        json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + '\n', encoding='utf-8')
    named = [config.url or config.load_checkpoint, config.adapter, Path(config.input).name, config.split,
             result['date'][:10]]
    accuracy.draw_confusion(result['results'], output / 'confusion_matrix.png', ' · '.join(filter(None, named)))
    print(f'wrote {output}/evaluation.json and {output}/confusion_matrix.png')
    if config.calibrate:
        found = result['results']['loglikelihood']['calibration']
        path = calibration.write(directory, {**found, 'date': result['date'], 'data': result['data'],
                                             'reviews': len(examples)})
        print(f'wrote {path}: serve.py uses its temperature')


# ---------------------------------------------------------------- what the flags say


def methods(config) -> tuple[str, ...]:
    return ('loglikelihood', 'generate') if config.method == 'both' else (config.method,)


def output_directory(config) -> Path:
    """Where to write; also refuses flags that cannot go together, before any work."""
    if bool(config.url) == bool(config.load_checkpoint):
        raise Mistake(f'url={config.url!r} and load_checkpoint={config.load_checkpoint!r}: name exactly one of them')
    if config.url and config.adapter:
        raise Mistake(f'adapter={config.adapter!r} has no effect on the server of url={config.url!r}: start serve.py '
                      'with it')
    output = Path(config.output_dir or f'runs/evaluation-{datetime.datetime.now():%Y%m%d-%H%M%S}')
    if config.calibrate and (config.url or config.method == 'generate'):
        raise Mistake(f'{config.calibrate=} needs log-likelihoods and a checkpoint to keep the temperature in: use '
                      '--load_checkpoint=DIRECTORY and --method=loglikelihood')
    if (output / 'evaluation.json').exists():
        raise Mistake(f'output_dir={str(output)!r} holds an evaluation.json already: choose another --output_dir')
    return output


def read_input(config, source: Source | None) -> tuple[list[Path], list[Example], PromptTemplate]:
    """Read the files, the examples in them, and the template to ask with.

    The template is the checkpoint's, and what the flag `labels` or the labels_NAME.json of a prepared file say must
    agree with it.  Without a checkpoint that has one it is that of labels_NAME.json, else the article's with the labels
    that are named or stand in the data.
    """
    stored = source and source.template
    labels = parse_labels(config.labels) if config.labels else None
    trained = stored and f'load_checkpoint={config.load_checkpoint!r} was trained to answer {",".join(stored.labels)}'
    if stored and labels and stored.labels != labels.names:
        raise Mistake(f'labels={config.labels!r}, but {trained}: leave --labels out')
    files = labelled_files(config.input, config.split)
    prepared = None if config.text_field or config.label_field else read_prepared(files[0])
    if prepared:
        examples, template = prepared
        if stored and stored != template:
            raise Mistake(f'input={config.input!r} was prepared for {template.prompt("..")!r} and the labels '
                          f'{",".join(template.labels)}, but {trained} to {stored.prompt("..")!r}: prepare it with the '
                          '--template and --labels of the training records')
        if labels and labels.names != template.labels:
            raise Mistake(f'labels={config.labels!r}, but input={config.input!r} was prepared with the labels '
                          f'{",".join(template.labels)}: leave --labels out')
        return [*files, files[0].with_name(f'labels_{files[0].stem}.json')], examples, template
    found = read_labelled(config.input, config.split, config.text_field, config.label_field,
                          labels or (Labels(stored.labels) if stored else None))
    return files, found.examples, stored or PromptTemplate(labels=found.labels)


def read_before(path: str, examples: list[Example], template: PromptTemplate, wanted: tuple[str, ...]) -> dict:
    """An earlier evaluation.json, which must be of these reviews or a part of them, by one of these methods."""
    try:
        before = json.loads(Path(path).read_text(encoding='utf-8'))
        reviews = {(row['text'], row['label']) for row in before['reviews']}
        known = set(before['results']) & set(wanted)
        unknown = {row['label'] for row in before['samples']} - set(template.labels)
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f'before={path!r} is no evaluation.json of evaluate.py ({error!r})') from None
    if unknown or not reviews <= {(example.text, template.labels[example.label]) for example in examples}:
        raise Mistake(f'before={path!r} evaluated reviews that are not among these {len(examples)}: use the same '
                         '--input and --split, and no smaller --sample_size')
    if not known:
        raise Mistake(f'before={path!r} has results of {", ".join(before["results"])} and none of method '
                         f'{", ".join(wanted)}: choose --method accordingly')
    return before


# ---------------------------------------------------------------- whom to ask


def open_server(config) -> Asked:
    server = Server(config.url, config.batch_size)
    encode = load_tokenizer(config.tokenizer.vocab_file).encode if config.tokenizer.vocab_file else None
    return Asked(server.loglikelihood, lambda prompts, tokens, progress: server.generate(prompts, progress), encode)


def open_engine(config, template: PromptTemplate, examples: list[Example], source: Source | None = None) -> Asked:
    """An engine of the checkpoint with room for the longest of `examples`."""
    model = open_model(settings.read_load(config), settings.read_compute(config), source)
    encode, most = model.tokenizer.encode, model.config.max_sequence_length
    lengths = [len(encode(template.prompt(example.text))) + 1 for example in examples]  # and bos
    answer = max(len(encode(template.answer(label))) for label in range(len(template.labels)))
    new = max(config.max_new_tokens, config.sample_tokens, answer)
    if max(lengths) + new > most:
        worst = examples[lengths.index(max(lengths))].text
        raise Mistake(f'review {worst[:60]!r} has {max(lengths)} tokens, with {new} new ones more than the model\'s '
                         f'{most}: leave it out, or lower --sample_tokens')
    beside = f' and adapter {config.adapter}' if config.adapter else ''
    print(f'{config.load_checkpoint}{beside}: {describe(model)}')
    check_rows(config.batch_size, model.mesh, 'batch_size')
    texts = Texts(model.tokenizer, model.config, input_length=max(lengths), seq_length=max(lengths) + new,
                  add_bos_token=model.add_bos_token, template=template)
    engine = make_engine(lambda: model.load_params(config.seed), model.config, model.compute, model.mesh,
                         model.tokenizer, batch_size=config.batch_size, length=texts.seq_length,
                         weight_dtype=config.weight_dtype, cache_dtype=config.cache_dtype, seed=config.seed)

    def loglikelihood(prefixes: list[str], answers: list[str], progress: Callable[[int], None]):
        question = texts.loglikelihood(prefixes, answers)
        return question.answer(engine.run(question.works, lambda index: progress(len(question.works[index].texts))))

    def generate(prompts: list[str], tokens: int, progress: Callable[[int], None]) -> list[str]:
        question = texts.generate(prompts, max_new_tokens=tokens)
        return [answer.text for answer in question.answer(engine.run(question.works, lambda index: progress(1)))]

    return Asked(loglikelihood, generate, encode)


# ---------------------------------------------------------------- the evaluation


def evaluate(asked: Asked, examples: list[Example], shown: list[Example], template: PromptTemplate,
             methods: tuple[str, ...], max_new_tokens: int, sample_tokens: int) -> dict:
    """{'results': {method: accuracy_report + speed}, 'reviews': one row per example, 'samples': generated texts}."""
    names = [*template.labels, 'other']
    reviews = [{'text': example.text, 'label': names[example.label]} for example in examples]
    tokens = sum(len(asked.encode(template.prompt(example.text))) for example in examples) if asked.encode else None
    results, often = {}, 0.5 if sys.stderr.isatty() else 5.0
    for method in methods:
        start = time.perf_counter()
        with tqdm(total=len(examples), desc=method, unit='review', mininterval=often,
                  disable=processes.index() > 0) as bar:
            try:
                if method == 'loglikelihood':
                    answers = accuracy.answer_texts(template, asked.encode, examples[0].text)
                    predictions = accuracy.score_by_loglikelihood(asked.loglikelihood, examples, template, answers,
                                                                  bar.update)
                else:
                    predictions = accuracy.score_by_generation(
                        lambda prompts, progress: asked.generate(prompts, max_new_tokens, progress), examples, template,
                        bar.update)
            except FloatingPointError as error:  # the engine's word for weights it cannot compute with
                raise Mistake(f'method={method!r}: {error} (--load_checkpoint, --dtype)') from None
        seconds = time.perf_counter() - start
        results[method] = accuracy.accuracy_report(examples, predictions, template) | {
            'seconds': round(seconds, 3), 'reviews_per_second': round(len(examples) / seconds, 3),
            'prompt_tokens': tokens}
        for row, prediction in zip(reviews, predictions, strict=True):
            row[method] = {'prediction': names[prediction.label]}
            if prediction.scores:
                row[method]['log_likelihood'] = [s if math.isfinite(s) else None for s in prediction.scores]
            else:
                row[method]['text'] = prediction.text
    texts = asked.generate([template.prompt(example.text) for example in shown], sample_tokens, lambda done: None)
    samples = [{'text': example.text, 'label': names[example.label], 'generated': text}
               for example, text in zip(shown, texts, strict=True)]
    return {'results': results, 'reviews': reviews, 'samples': samples}


def print_result(result: dict, before: dict | None) -> None:
    listed = {}  # a review that several methods misclassify alike is listed once
    for method, report in result['results'].items():
        tokens = f", {report['prompt_tokens']} prompt tokens" if report['prompt_tokens'] is not None else ''
        print(f"\n{method}: {accuracy.report_text(report)}\n{report['total']} reviews in {report['seconds']:.1f} s, "
              f"{report['reviews_per_second']:.2f} reviews/s, compiling included{tokens}")
        said = {i: result['reviews'][i][method]['prediction'] for i in report['misclassified']}
        wrong = [i for i in said if listed.get(i) != said[i]]
        listed |= said
        if len(wrong) < len(said):
            print(f'  {len(said) - len(wrong)} misclassified reviews are those above')
        for i in wrong[:10]:
            print(f"  {result['reviews'][i]['label']}, not {said[i]}: {result['reviews'][i]['text']}")
        if len(wrong) > 10:
            print(f'  and {len(wrong) - 10} more misclassified reviews in evaluation.json')
        if before and method in before['results']:
            print(change_text(rightness(result, method), rightness(before, method)))
    if before:
        rows = [{**row, 'before': old['generated'], 'after': row['generated']}
                for row, old in zip(result['samples'], before['samples'], strict=True)]
        print('\n' + accuracy.before_after_table(rows))
    else:
        for row in result['samples']:
            print(f"\n{row['text']}\n  original: {row['label']}\n  generated: {row['generated']!r}")


def add_calibration(result: dict, examples: list[Example], temperature: float, fit: bool) -> None:
    """Add and print what the checkpoint's temperature does to the probabilities; with `fit`, one fitted here."""
    if 'loglikelihood' not in result['results']:
        return
    scores = [[-math.inf if score is None else score for score in row['loglikelihood']['log_likelihood']]
              for row in result['reviews']]
    labels = [example.label for example in examples]
    if fit:
        temperature = calibration.fit_temperature(scores, labels)
    found = result['results']['loglikelihood']['calibration'] = calibration.report(scores, labels, temperature)
    before, after = found['before'], found['after']
    where = 'fitted on these reviews' if fit else 'of the checkpoint'
    print(f"\nprobabilities, temperature {temperature:.3f} ({where}): ECE {before['ece']:.3f} -> {after['ece']:.3f}, "
          f"Brier {before['brier']:.3f} -> {after['brier']:.3f}")


def rightness(evaluation: dict, method: str) -> dict[tuple[str, str], bool]:
    """{(text, label): whether the method's prediction was that label} of an evaluation's reviews."""
    return {(row['text'], row['label']): row[method]['prediction'] == row['label'] for row in evaluation['reviews']}


def change_text(now: dict, before: dict) -> str:
    """How the accuracy changed on the reviews that were evaluated before, all of which are in `now`."""
    became_right = sum(now[review] and not was for review, was in before.items())
    became_wrong = sum(was and not now[review] for review, was in before.items())
    then, count = sum(before.values()), len(before)
    change = became_right - became_wrong
    return (f'the {count} reviews evaluated before: accuracy {then / count:.2%} then, '
            f'{(then + change) / count:.2%} now ({100 * change / count:+.2f} points); '
            f'{became_right} became right, {became_wrong} became wrong')


def versions() -> dict[str, str]:
    found = {dist.metadata['Name']: dist.version for dist in importlib.metadata.distributions()}
    return {'python': platform.python_version(), **{name: found[name] for name in PACKAGES if name in found}}


if __name__ == '__main__':
    parse.run(main, flags.EVALUATE)
