"""evaluation/text_metrics.py: what is right, by figures worked out by hand, and how sure a measure is."""
import json
import sys

import numpy as np
import pytest

from evaluation.text_metrics import (
    compare,
    compare_objects,
    errors,
    field_shares,
    fields_of,
    intervals,
    load_rouge,
    measure,
    read_object,
    same_text,
    same_value,
    token_f1,
)


def rows(*pairs, rouge_l=None):
    """Compared answers; what is no text is written as JSON."""
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    return [compare(text(wanted), text(answer), rouge_l) for wanted, answer in pairs]


@pytest.mark.parametrize('wanted, answer, f1', [
    ('Denver Broncos', 'The Denver Broncos!', 1.0),  # articles and punctuation do not count
    ('Saint Bernadette Soubirous', 'Bernadette Soubirous in 1858', 4 / 7),  # 2 common of 3 and 4 words
    ('a copper statue of Christ', 'statue of the Virgin', 2 * 2 / (4 + 3)),  # copper statue of christ; statue of virgin
    ('very very good', 'very good good', 2 * 2 / (3 + 3)),  # bags: very once, good once
    ('very very good', 'very very bad', 2 * 2 / (3 + 3)),  # very twice
    ('theatre', 'atre', 0.0),  # an article is a whole word
    ('gold', 'silver', 0.0), ('gold', 'the', 0.0), ('the', 'An ...', 1.0), ('well-known', 'wellknown', 1.0),
])
def test_token_f1_is_squads(wanted, answer, f1):
    """2 P R / (P + R) = 2 common / (words of both); without words 1 if neither has any, as in SQuAD 2.0."""
    assert token_f1(wanted, answer) == pytest.approx(f1)


def test_an_exact_match_forgives_capitals_and_blanks_and_nothing_else():
    """x > 3 is not x < 3, which SQuAD's normalisation would make equal; raw forgives one blank at the beginning."""
    assert same_text('SELECT a\n  FROM t', ' select a from t ') and not same_text('x > 3', 'x < 3')
    assert not same_text('the cat', 'cat') and not same_text('ab', 'a b')
    found = rows((' Yes', 'Yes'), ('Yes', 'yes'), ('Yes', '  Yes'), ('Yes', 'Yes.'))
    assert [row['raw_match'] for row in found] == [True, False, False, False]
    assert [row['exact_match'] for row in found] == [True, True, True, False]
    assert measure(found)['exact_match'] == 0.75 and measure(found)['raw_match'] == 0.25


def test_rouge_l_is_that_of_the_package():
    """the quick brown jumps the: 5 words in order, of 9 and of 8, 2 * 5 / 17; the cat on mat: 4 of 6 and of 5."""
    rouge_l = load_rouge()
    assert rouge_l('The quick brown fox jumps over the lazy dog', 'The quick brown dog jumps on the log.') == (
        pytest.approx(10 / 17))
    assert rouge_l('the cat sat on the mat', 'the cat on a mat') == pytest.approx(8 / 11)
    assert rouge_l('mat the on sat', 'on the mat') == pytest.approx(2 * 1 / 7)  # the order counts, unlike in token F1
    assert rows(('a b', 'a b'), rouge_l=rouge_l)[0]['rouge_l'] == 1.0 and 'rouge_l' not in rows(('a', 'a'))[0]
    assert measure(rows(('a b', 'a b'), ('a', 'b'), rouge_l=rouge_l))['rouge_l'] == 0.5


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'rouge_score', None)
    monkeypatch.setitem(sys.modules, 'rouge_score.rouge_scorer', None)
    with pytest.raises(ValueError, match=r"^rouge=True needs the extra: pip install -e '.\[text\]', or set --rouge=F"):
        load_rouge()


def test_what_is_no_json_object_is_none():
    """Another value, numbers that are none, words around it, single quotes, an open end, brackets without end."""
    for text in ('', 'null', '[1]', '"a"', '{"a": NaN}', '{"a": -Infinity}', '{"a": 1} and so on', "{'a': 1}",
                 '{"a": 1', '```json\n{"a": 1}\n```', '{"a": ' * 100_000, '{"a": ' + '9' * 5000 + '}'):
        assert read_object(text) is None, text[:40]
    assert read_object(' {"a": 1}\n') == {'a': 1}


def test_a_field_is_the_keys_that_lead_to_a_value():
    """Objects are opened; a list and an empty object are values."""
    assert fields_of({'a': 1, 'b': {'c': 'x', 'd': {'e': None}}, 'f': [{'g': 1}], 'h': {}}) == {
        'a': 1, 'b.c': 'x', 'b.d.e': None, 'f': [{'g': 1}], 'h': {}}


@pytest.mark.parametrize('a, b, same', [
    (1, 1.0, True), (1, True, False), (0, False, False), (True, True, True), ('1', 1, False), (None, False, False),
    ([1, 2], [2, 1], False), ([1, [True]], [1, [1]], False), ({'a': 1, 'b': 2}, {'b': 2, 'a': 1}, True),
    ([{'a': True}], [{'a': 1}], False), ([1], [1, 2], False), ({'a': 1}, {'a': 1, 'b': 2}, False),
    ('Anna', 'anna', False),
])
def test_values_are_compared_as_json(a, b, same):
    assert same_value(a, b) is same


def test_fields_are_right_wrong_missing_or_surplus():
    wanted = {'drug': 'Celaxil', 'dose': '5 mg', 'per_day': 2}
    said = {'dose': '5mg', 'drug': 'Celaxil', 'route': 'oral'}
    assert compare_objects(wanted, said) == {
        'valid': True, 'right': ['drug'], 'wrong': ['dose'], 'missing': ['per_day'], 'surplus': ['route']}
    assert compare_objects(wanted, None) == {
        'valid': False, 'right': [], 'wrong': [], 'missing': ['drug', 'dose', 'per_day'], 'surplus': []}
    found = rows((wanted, said), (wanted, 'Celaxil'), (wanted, wanted), ('a', 'b'))
    assert [errors(row) for row in found] == [3, 4, 0, 0]


def test_fields_are_counted_over_all_records_together():
    """Wanted 2 + 2 + 2 = 6 fields; said 3 (one right, one wrong, one too many) + 0 (no JSON) + 2 (both right): 3 right
    of 5 said and of 6 wanted, F1 2 * 3 / 11.  The fourth wants no object, and changes only what is of all texts."""
    found = rows(({'a': 1, 'b': 2}, {'a': 1, 'b': 3, 'c': 4}), ({'a': 1, 'b': 2}, 'a is 1'),
                 ({'a': 1, 'b': {'c': 2}}, {'b': {'c': 2.0}, 'a': 1}), ('yes', 'yes'))
    values = measure(found)
    assert values == pytest.approx({
        'exact_match': 1 / 4, 'raw_match': 1 / 4, 'token_f1': values['token_f1'], 'json_valid': 2 / 3,
        'all_fields': 1 / 3, 'field_precision': 3 / 5, 'field_recall': 3 / 6, 'field_f1': 6 / 11})
    assert field_shares(found) == {'a': {'right': 2, 'records': 3}, 'b': {'right': 0, 'records': 2},
                                   'b.c': {'right': 1, 'records': 1}}
    assert measure(rows(({'a': 1}, {'a': 1, 'b': 2}), ({'a': 1}, {'a': 1})))['all_fields'] == 0.5
    assert set(measure(found[3:])) == {'exact_match', 'raw_match', 'token_f1'}
    assert measure(rows(({'a': 1}, 'no')))['field_precision'] == 0.0


def test_intervals_of_many_records_are_those_of_the_normal_law():
    """Half of 400 right: 0.5 +- 1.96 sqrt(0.25 / 400) = 0.451 to 0.549.  The seed alone decides."""
    found = rows(*[('a', 'ab'[i % 2]) for i in range(400)])
    low, high = intervals(found, seed=1)['exact_match']
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.008)
    assert intervals(found, seed=1) == intervals(found, seed=1) != intervals(found, seed=2)
    assert intervals(rows(('a', 'a'), ('b', 'b')), seed=1)['exact_match'] == (1.0, 1.0)


def test_the_bootstrap_draws_records_not_fields():
    """One record with nine fields right and one with one wrong: a quarter of the draws has only the second, so F1 goes
    from 0 to 1; ten fields drawn one by one would stay above 0.6 in 97.5 % of the draws."""
    nine = {str(n): n for n in range(9)}
    found = rows((nine, nine), ({'a': 1}, {'a': 2}))
    assert measure(found)['field_f1'] == pytest.approx(0.9)
    np.testing.assert_array_equal(intervals(found, seed=0)['field_f1'], (0.0, 1.0))
