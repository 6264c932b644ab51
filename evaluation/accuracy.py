"""How often a model labels reviews as their first labeller did, and how sure that figure is.

A label is found in one of two ways.  By log-likelihood: the label whose answer the model finds likeliest after the
prompt, argmax_y log p(answer(y) | prompt(text)).  By generation: greedy decoding, and what it says is read by
`parse_answer`.  What is no label (another text, or two labels exactly alike) is counted in a column of its own,
`other`, and is wrong.

The interval is Wilson's (E. B. Wilson, JASA 22, 1927): the accuracies p for which the observed share differs from p by
less than z standard errors sqrt(p (1 - p) / n).  It stays inside [0, 1], and says something for 0 or n correct, too.

Neighbours: evaluate.py (the program), client.py (the same questions to a server), data/prompt.py (prompt and answers).
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data.labelled import Example
from data.prompt import PromptTemplate
from evaluation.calibration import measures
from mistake import Mistake


class Prediction(NamedTuple):
    """label: a class, or the number of classes for `other`.

    scores: the log-likelihood of each class, in nats; text: what was generated.  One of the two is there.
    """

    label: int
    scores: list[float] | None = None
    text: str | None = None


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """(low, high) of the share `correct` / `total`; z = 1.96 makes it a 95 % interval."""
    if not 0 <= correct <= total or total < 1:
        raise Mistake(f'{correct=} of {total=}: a share needs at least one case and no more correct ones than cases')
    share, spread = correct / total, z * z / total
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # for 0 and for all correct, centre and half are equal but for rounding
    low = 0.0 if correct == 0 else (centre - half) / (1 + spread)
    high = 1.0 if correct == total else (centre + half) / (1 + spread)
    return low, high


def parse_answer(text: str, labels: tuple[str, ...]) -> int:
    """The class whose name is the first word of `text`, whatever its case; len(labels) when none is.

    The word must end there: 'Positive.' is Positive; 'Positively', 'non-positive' and 'a Positive' are not.
    """
    text = text.strip().lower()
    for number in sorted(range(len(labels)), key=lambda number: -len(labels[number])):
        name = labels[number].strip().lower()
        rest = text[len(name):]
        if text.startswith(name) and not (rest and (rest[0].isalnum() or rest[0] in "-_'’")):
            return number
    return len(labels)


def score_by_loglikelihood(loglikelihood: Callable, examples: list[Example], template: PromptTemplate,
                           answers: list[str], progress: Callable[[int], None] = lambda done: None) -> list[Prediction]:
    """One Prediction per example; the label with the highest log-likelihood, `other` when two share it.

    loglikelihood(prefixes, texts, progress) -> [(log p(text | prefix), is greedy)].  answers: of each class, how its
    answer is handed over (`answer_texts`).  Raises Mistake when a log-likelihood is not a number.
    """
    classes, asked = len(answers), 0

    def count(pairs: int) -> None:
        nonlocal asked
        before, asked = asked // classes, asked + pairs
        progress(asked // classes - before)

    prefixes = [template.prompt(example.text) for example in examples for _ in answers]
    found = loglikelihood(prefixes, answers * len(examples), count)
    predictions = []
    for index in range(len(examples)):
        scores = [float(score) for score, _ in found[index * classes:(index + 1) * classes]]
        if any(math.isnan(score) or score == math.inf for score in scores):
            raise Mistake(f'review {index} {examples[index].text[:60]!r}: the log-likelihoods {scores} are no '
                             'probabilities; the weights may be damaged (--load_checkpoint)')
        best = max(scores)
        predictions.append(Prediction(scores.index(best) if scores.count(best) == 1 else classes, scores=scores))
    return predictions


def score_by_generation(generate: Callable, examples: list[Example], template: PromptTemplate,
                        progress: Callable[[int], None] = lambda done: None) -> list[Prediction]:
    """One Prediction per example from what generate(prompts, progress) -> [text] says."""
    texts = generate([template.prompt(example.text) for example in examples], progress)
    return [Prediction(parse_answer(text, template.labels), text=text) for text in texts]


def answer_texts(template: PromptTemplate, encode: Callable[[str], list[int]] | None, text: str) -> list[str]:
    """How each class's answer is handed to loglikelihood, which tokenizes prefix and text apart and joins the ids.

    Training tokenized prompt and answer as one text.  A sentencepiece tokenizer puts a blank before every text by
    itself, so there the answer must come without its own.  Of the two spellings the one is taken whose ids, behind
    those of the prompt, are the ids of the whole; `text` is any review.  Without a tokenizer (`encode` None) the answer
    is left as it is.
    """
    answers = [template.answer(label) for label in range(len(template.labels))]
    if encode is None:
        return answers
    prompt = template.prompt(text)
    for spelling in (answers, [answer.lstrip() for answer in answers]):
        if all(encode(prompt) + encode(apart) == encode(prompt + whole)
               for apart, whole in zip(spelling, answers, strict=True)):
            return spelling
    raise Mistake(f'the tokenizer joins the end of the prompt, {template.suffix!r}, with the answer {answers[0]!r}: '
                     'answers cannot be scored apart; use --method=generate, or a template that parts them by a blank')


def confusion_matrix(labels: list[int], predictions: list[int], classes: int) -> np.ndarray:
    """counts_CP int64: rows are the original labels, columns the predicted ones; the last column is `other`."""
    counts = np.zeros((classes, classes + 1), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def accuracy_report(examples: list[Example], predictions: list[Prediction], template: PromptTemplate) -> dict:
    """The figures of one method, JSON-able: accuracy with its 95 % interval, the share of the commonest label (what a
    constant answer would reach), `per_label` and `macro_f1` (`label_scores`), `loss` (`label_loss`), the confusion
    matrix and the indices of the misclassified reviews."""
    labels = [example.label for example in examples]
    counts = confusion_matrix(labels, [prediction.label for prediction in predictions], len(template.labels))
    correct = int(np.trace(counts))
    return {
        'total': len(examples), 'correct': correct, 'accuracy': correct / len(examples),
        'interval_95': list(wilson_interval(correct, len(examples))),
        'majority_baseline': int(counts.sum(axis=1).max()) / len(examples),
        **label_scores(counts, template.labels), 'loss': label_loss(labels, predictions),
        'rows_original': list(template.labels), 'columns_predicted': [*template.labels, 'other'],
        'confusion': counts.tolist(),
        'misclassified': [i for i, (label, p) in enumerate(zip(labels, predictions, strict=True)) if label != p.label],
    }


def label_scores(counts_CP: np.ndarray, labels: tuple[str, ...]) -> dict:
    """{'per_label': {name: {precision, recall, f1, cases}}, 'macro_f1'} of a confusion matrix.

    precision: of the reviews given a label, the share that have it; recall: of those that have it, the share that were
    given it; f1 = 2 right / (given + having), their harmonic mean.  A share of nothing is None.  macro_f1 is the mean
    f1 of the labels that occur, original or predicted, as scikit-learn has it.
    """
    scores = {}
    for label, name in enumerate(labels):
        right, given, having = int(counts_CP[label, label]), int(counts_CP[:, label].sum()), int(counts_CP[label].sum())
        scores[name] = {'precision': right / given if given else None, 'recall': right / having if having else None,
                        'f1': 2 * right / (given + having) if given + having else None, 'cases': having}
    f1 = [score['f1'] for score in scores.values() if score['f1'] is not None]
    return {'per_label': scores, 'macro_f1': sum(f1) / len(f1) if f1 else None}


def label_loss(labels: list[int], predictions: list[Prediction]) -> float | None:
    """The mean over reviews of -log p(label) in nats, p being normalised over the labels as /classify has it: log 2 for
    a model that does not know two labels apart, however long their answers.  None where there are no scores, or none
    that say anything (an answer that the model holds for impossible)."""
    if any(prediction.scores is None or not math.isfinite(max(prediction.scores)) for prediction in predictions):
        return None
    return measures([prediction.scores for prediction in predictions], labels, 1.0)['nll']


def report_text(report: dict) -> str:
    """The report as the program prints it: figures, a table of labels and the confusion matrix."""
    low, high = report['interval_95']
    columns = report['columns_predicted']
    width = max(9, *map(len, columns)) + 2
    share = lambda value: '-' if value is None else f'{value:.1%}'
    lines = [f"accuracy {report['accuracy']:.2%}  ({report['correct']} of {report['total']}; 95 % interval {low:.2%} "
             f"to {high:.2%}); always the commonest label: {report['majority_baseline']:.2%}",
             ' ' * width + ''.join(f'{name:>11}' for name in ('precision', 'recall', 'F1', 'cases'))]
    for name, score in report['per_label'].items():
        lines.append(f'{name:>{width}}' + ''.join(f'{share(score[key]):>11}' for key in ('precision', 'recall', 'f1'))
                     + f"{score['cases']:>11}")
    lines += [f'{"macro F1":>{width}}{share(report["macro_f1"]):>33}']
    if report['loss'] is not None:
        lines += [f'{"loss":>{width}}{report["loss"]:>33.4f}']
    lines += ['', ' ' * width + ''.join(f'{name:>{width}}' for name in columns) + '   <- predicted']
    for name, row in zip(report['rows_original'], report['confusion'], strict=True):
        lines.append(f'{name:>{width}}' + ''.join(f'{count:>{width}}' for count in row))
    return '\n'.join(lines)


def before_after_table(rows: list[dict], before: str = 'Before', after: str = 'After') -> str:
    """A Markdown table of reviews with their label and what was generated for them before and after fine-tuning.

    rows: {'text', 'label', 'before', 'after'}, all text.  Line ends are shown as blanks; long texts end in an ellipsis.
    """
    def cell(text: str) -> str:
        text = ' '.join(text.split()).replace('|', '\\|')
        return text if len(text) <= 160 else text[:159].rstrip() + '…'

    lines = [f'| Text | Sentiment (original) | {before} | {after} |', '|---|---|---|---|']
    lines += ['| ' + ' | '.join(cell(row[key]) for key in ('text', 'label', 'before', 'after')) + ' |' for row in rows]
    return '\n'.join(lines)


def draw_confusion(reports: dict[str, dict], path, subtitle: str = '') -> None:
    """A PNG with one confusion matrix per method of `reports` {method: accuracy_report}, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, so that figures need no matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * len(reports), 4.6), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    for axes, (method, report) in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports.items(), strict=True):
        _draw_matrix(axes, report)
        low, high = report['interval_95']
        axes.set_title(f"Accuracy {report['accuracy']:.1%}  (95 % interval {low:.1%} – {high:.1%})\n"
                       f"{report['total']:,} reviews, label by {method}", fontsize=11)
    if subtitle:
        figure.supxlabel(subtitle, fontsize=8, color='0.4')
    figure.savefig(path)


def _draw_matrix(axes, report: dict) -> None:
    counts = np.array(report['confusion'])
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    for row, column in np.ndindex(*counts.shape):
        axes.text(column, row, f'{counts[row, column]:,}\n{share[row, column]:.1%}', ha='center', va='center',
                  color='white' if share[row, column] > 0.5 else '0.15', fontsize=12)
    axes.set_xticks(range(counts.shape[1]), report['columns_predicted'])
    axes.set_yticks(range(counts.shape[0]), report['rows_original'], rotation=90, va='center')
    axes.set_xlabel('predicted label')
    axes.set_ylabel('original label')
    axes.set_xticks(np.arange(1, counts.shape[1]) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, counts.shape[0]) - 0.5, minor=True)
    axes.grid(which='minor', color='white', linewidth=3)
    axes.tick_params(which='both', length=0)
    axes.spines[:].set_visible(False)
