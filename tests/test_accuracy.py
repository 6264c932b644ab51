"""evaluation/accuracy.py: what counts as a label, what is counted, and how sure the figure is."""
import math

import numpy as np
import pytest

from data.labelled import Example
from data.prompt import PromptTemplate
from data.tokenizer import load_tokenizer
from evaluation import accuracy
from evaluation.accuracy import (
    Prediction,
    accuracy_report,
    answer_texts,
    before_after_table,
    confusion_matrix,
    draw_confusion,
    parse_answer,
    report_text,
    score_by_generation,
    score_by_loglikelihood,
    wilson_interval,
)

LABELS = ('Negative', 'Positive')
EXAMPLES = [Example('good', 1), Example('bad', 0), Example('odd', 1)]


@pytest.mark.parametrize('correct, total, low, high', [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718),
])
def test_wilson_intervals_are_the_published_ones(correct, total, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_solve_their_equation_and_mirror():
    """(p - share)^2 = z^2 p (1 - p) / n at both ends; right and wrong answers exchanged mirror the interval."""
    low, high = wilson_interval(930, 1066)
    for p in (low, high):
        assert (p - 930 / 1066) ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / 1066)
    assert wilson_interval(136, 1066) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(20, 20)[1] == 1.0 and wilson_interval(0, 20)[0] == 0.0


@pytest.mark.parametrize('correct, total', [(0, 0), (3, 2), (-1, 2)])
def test_a_share_of_nothing_is_refused(correct, total):
    """No interval without cases."""
    with pytest.raises(ValueError, match='a share needs'):
        wilson_interval(correct, total)


@pytest.mark.parametrize('text, label', [
    ('Positive', 1), (' positive\n[Text]: next', 1), ('NEGATIVE.', 0), ('Positive, I think', 1), ('\n\nNegative', 0),
    ('Positively', 2), ('Positive-ish', 2), ('non-positive', 2), ('a Positive', 2), ('', 2), ('Posit', 2),
])
def test_a_label_is_the_first_word_of_an_answer(text, label):
    """2 is `other`."""
    assert parse_answer(text, LABELS) == label


def test_the_longest_label_name_wins():
    """'not good' is not 'not'."""
    assert [parse_answer(text, ('not', 'not good')) for text in ('Not good at all', 'not bad')] == [1, 0]


def test_confusion_rows_are_original_and_columns_predicted():
    """The last column takes what is no label; nothing is lost."""
    counts = confusion_matrix([0, 0, 0, 1, 1], [0, 1, 1, 2, 1], 2)
    np.testing.assert_array_equal(counts, [[1, 2, 0], [0, 1, 1]])


def fake_loglikelihood(scores):
    """A model that knows {prompt + answer: log-likelihood}."""
    def loglikelihood(prefixes, texts, progress):
        progress(len(texts))
        return [(scores[prefix + text], False) for prefix, text in zip(prefixes, texts, strict=True)]
    return loglikelihood


def test_the_likelier_answer_is_the_label_and_a_tie_is_other():
    """Each review is asked with each answer; equal log-likelihoods decide nothing."""
    template = PromptTemplate(prefix='', suffix=':')
    scores = {'good: Positive': -1.0, 'good: Negative': -2.0, 'bad: Positive': -9.0, 'bad: Negative': -8.0,
              'odd: Positive': -3.0, 'odd: Negative': -3.0}
    done, answers = [], [' Negative', ' Positive']
    found = score_by_loglikelihood(fake_loglikelihood(scores), EXAMPLES, template, answers, done.append)
    assert found == [Prediction(1, [-2.0, -1.0]), Prediction(0, [-8.0, -9.0]), Prediction(2, [-3.0, -3.0])]
    assert sum(done) == 3


def test_a_log_likelihood_that_is_no_number_names_the_review():
    """NaN never becomes a label."""
    scores = {f'{text}:{answer}': -1.0 for text in ('good', 'bad', 'odd') for answer in (' Negative', ' Positive')}
    scores['bad: Negative'] = math.nan
    with pytest.raises(ValueError, match="review 1 'bad': the log-likelihoods .*nan.*--load_checkpoint"):
        score_by_loglikelihood(fake_loglikelihood(scores), EXAMPLES, PromptTemplate(prefix='', suffix=':'),
                               [' Negative', ' Positive'])


def test_generated_texts_are_read_in_the_order_of_the_reviews():
    """The prompt is the template's."""
    def generate(prompts, progress):
        assert prompts[0] == '[Text]: good\n[Sentiment]:'
        return ['Positive', 'Positive', 'well']
    found = score_by_generation(generate, EXAMPLES, PromptTemplate())
    assert [prediction.label for prediction in found] == [1, 1, 2]


def test_answers_scored_apart_have_the_ids_of_the_whole_text(golden):
    """A sentencepiece tokenizer adds a blank of its own, one of bytes does not; without a tokenizer nothing changes."""
    template, of_bytes = PromptTemplate(), lambda text: list(text.encode())
    encode = load_tokenizer(golden / 'easylm' / 'tokenizer.model').encode
    prompt = template.prompt('a fine film')
    assert encode(prompt) + encode(' Positive') != encode(prompt + ' Positive')
    apart = answer_texts(template, encode, 'a fine film')
    assert encode(prompt) + encode(apart[1]) == encode(prompt + ' Positive')
    assert answer_texts(template, of_bytes, 'a') == answer_texts(template, None, 'a') == [' Negative', ' Positive']


def test_an_answer_that_melts_into_the_prompt_is_refused():
    """A tokenizer for which no answer can be parted from the prompt."""
    with pytest.raises(ValueError, match='cannot be scored apart; use --method=generate'):
        answer_texts(PromptTemplate(), lambda text: [len(text), 0], 'a')


def test_the_report_counts_and_lists_the_misclassified():
    """Two of three right; a constant answer reaches the share of the commoner label."""
    report = accuracy_report(EXAMPLES, [Prediction(1), Prediction(0), Prediction(2)], PromptTemplate())
    assert (report['correct'], report['total'], report['misclassified']) == (2, 3, [2])
    assert report['accuracy'] == report['majority_baseline'] == 2 / 3
    assert report['confusion'] == [[1, 0, 0], [0, 1, 1]]
    assert report['interval_95'] == list(wilson_interval(2, 3))
    lines = report_text(report).splitlines()
    assert lines[0] == ('accuracy 66.67%  (2 of 3; 95 % interval 20.77% to 93.85%); '
                        'always the commonest label: 66.67%')
    assert lines[-1].split() == ['Positive', '0', '1', '1']
    assert [line.split() for line in lines[1:5]] == [
        ['precision', 'recall', 'F1', 'cases'], ['Negative', '100.0%', '100.0%', '100.0%', '1'],
        ['Positive', '100.0%', '50.0%', '66.7%', '2'], ['macro', 'F1', '83.3%']]


def test_the_loss_is_of_the_label_among_the_labels():
    """Scores -2, -1 for the second label, and a tie: log(1 + 1/e) and log 2, whatever both answers cost; none without
    scores, or where every answer is impossible."""
    of = lambda *scores: Prediction(0, list(scores))
    expected = (math.log1p(math.exp(-1)) + math.log(2)) / 2
    assert accuracy.label_loss([1, 0], [of(-2.0, -1.0), of(-7.0, -7.0)]) == pytest.approx(expected, rel=1e-12)
    assert accuracy.label_loss([1, 0], [of(-22.0, -21.0), of(-9.0, -9.0)]) == pytest.approx(expected, rel=1e-12)
    assert accuracy.label_loss([1], [Prediction(1, text='x')]) is None
    assert accuracy.label_loss([1], [of(-math.inf, -math.inf)]) is None
    report = accuracy_report(EXAMPLES[:2], [of(-1.0, -2.0), of(-7.0, -7.0)], PromptTemplate())
    assert f'loss{report["loss"]:>33.4f}' in report_text(report)


def test_scores_of_each_label_are_those_of_scikit_learn():
    """12 reviews: one label never occurs, one is never predicted, one prediction is no label.  The figures are those of
    classification_report of version 1.9.1 for the labels that occur (a share of nothing is 0 there, None here)."""
    truth = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    said = [0, 0, 1, 4, 1, 1, 0, 0, 1, 1, 0, 0]
    found = accuracy.label_scores(confusion_matrix(truth, said, 4), ('a', 'b', 'c', 'd'))
    assert found['per_label'] == {
        'a': {'precision': 2 / 6, 'recall': 0.5, 'f1': 0.4, 'cases': 4},
        'b': {'precision': 0.4, 'recall': 2 / 3, 'f1': 0.5, 'cases': 3},
        'c': {'precision': None, 'recall': 0.0, 'f1': 0.0, 'cases': 5},
        'd': {'precision': None, 'recall': None, 'f1': None, 'cases': 0}}
    assert found['macro_f1'] == pytest.approx(0.3)


def test_the_picture_shows_every_count(tmp_path, monkeypatch):
    """One panel a method, each cell with its count, each title with accuracy, interval, number and method."""
    seen = []
    draw = accuracy._draw_matrix
    monkeypatch.setattr(accuracy, '_draw_matrix', lambda axes, report: (draw(axes, report), seen.append(axes)))
    report = accuracy_report(EXAMPLES, [Prediction(1), Prediction(0), Prediction(2)], PromptTemplate())
    draw_confusion({'loglikelihood': report, 'generate': report}, tmp_path / 'c.png')
    assert (tmp_path / 'c.png').read_bytes().startswith(b'\x89PNG')
    cells = [text.get_text() for text in seen[0].texts]
    assert cells == ['1\n100.0%', '0\n0.0%', '0\n0.0%', '0\n0.0%', '1\n50.0%', '1\n50.0%']
    assert seen[1].get_title() == 'Accuracy 66.7%  (95 % interval 20.8% – 93.9%)\n3 reviews, label by generate'


def test_the_before_after_table_has_one_line_a_review():
    """Line ends and bars of a generated text stay inside their cell."""
    row = {'text': 'a | b', 'label': 'Positive', 'before': 'I\nknew ' + 'x' * 200, 'after': 'Positive'}
    lines = before_after_table([row]).splitlines()
    assert lines[:2] == ['| Text | Sentiment (original) | Before | After |', '|---|---|---|---|']
    assert lines[2].startswith(r'| a \| b | Positive | I knew xxx') and lines[2].endswith('x… | Positive |')
    assert len(lines) == 3
