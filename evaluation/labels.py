"""Evaluate reviews with labels: ask in one or two ways, print what came of it, compare with an earlier evaluation.

Neighbours: accuracy.py (what is counted), calibration.py (the probabilities), free_text.py (the other task),
evaluate.py (the program).
"""
import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tqdm import tqdm

from data.labelled import Example
from data.prompt import PromptTemplate
from evaluation import accuracy, calibration
from mistake import Mistake


class Asked(NamedTuple):
    """Holds whom to ask.

    loglikelihood(prefixes, texts, progress) -> [(nats, is greedy)];  generate(prompts, tokens, progress) -> [text];
    encode(text) -> ids, or None where no tokenizer is at hand.
    """

    loglikelihood: Callable
    generate: Callable
    encode: Callable | None


def evaluate(asked: Asked, examples: list[Example], shown: list[Example], template: PromptTemplate,
             methods: tuple[str, ...], max_new_tokens: int, sample_tokens: int, quiet: bool = False) -> dict:
    """{'results': {method: accuracy_report + speed}, 'reviews': one row per example, 'samples': generated texts}.

    quiet: no progress bar.
    """
    names = [*template.labels, 'other']
    reviews = [{'text': example.text, 'label': names[example.label]} for example in examples]
    tokens = sum(len(asked.encode(template.prompt(example.text))) for example in examples) if asked.encode else None
    results, often = {}, 0.5 if sys.stderr.isatty() else 5.0
    for method in methods:
        start = time.perf_counter()
        with tqdm(total=len(examples), desc=method, unit='review', mininterval=often, disable=quiet) as bar:
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
