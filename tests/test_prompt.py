"""Claims about data/prompt.py."""
import json

import pytest

from data.prompt import PromptTemplate


def test_record_is_the_one_of_the_article():
    """'[Text]: ' + text + '\\n[Sentiment]:' + ' Positive'."""
    assert PromptTemplate().record('a fine film', 1) == '[Text]: a fine film\n[Sentiment]: Positive'
    assert PromptTemplate().record('a dull film', 0) == '[Text]: a dull film\n[Sentiment]: Negative'


def test_record_is_prompt_then_answer():
    """What training reads begins with what serving is asked."""
    template = PromptTemplate(prefix='Q: ', suffix=' A:', answer_prefix='\t', labels=('no', 'yes', 'maybe'))
    for label in range(3):
        assert template.record('x', label) == template.prompt('x') + template.answer(label)
    assert template.answer(2) == '\tmaybe'


def test_a_task_writes_its_own_template():
    """A literal backslash-n is a line's end, other braces are text; the labels are kept."""
    written = PromptTemplate.written(r'Ticket {no}: {text}\nTeam:', ('a', 'b'))
    assert written == PromptTemplate('Ticket {no}: ', '\nTeam:', ' ', ('a', 'b'))
    assert written.record('x', 1) == 'Ticket {no}: x\nTeam: b'


@pytest.mark.parametrize('template, message', [
    ('Ticket:', 'exactly once'), ('{text} {text}:', 'exactly once'), ('', 'exactly once'),
    ('Ticket: {text} Team: ', 'ends in a blank')])
def test_a_template_without_one_place_for_the_text_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate.written(template, ('a', 'b'))


def test_template_survives_json():
    """from_dict(to_dict) is the same template, by value and by hash."""
    template = PromptTemplate(prefix='Q: ', labels=('no', 'yes'))
    copy = PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict())))
    assert copy == template and hash(copy) == hash(template)


@pytest.mark.parametrize('values', [{}, 'text', {**PromptTemplate().to_dict(), 'extra': 1},
                                    {**PromptTemplate().to_dict(), 'labels': 'ab'},
                                    {**PromptTemplate().to_dict(), 'prefix': 3}])
def test_from_dict_refuses_other_keys(values):
    """A template out of a checkpoint has exactly its keys, of the right types."""
    with pytest.raises(ValueError):
        PromptTemplate.from_dict(values, source='manifest.json')


@pytest.mark.parametrize('labels', [(), ('one',), ('Yes', 'yes'), ('a', 'A', 'b'), ('a', ' '), ('a', 'b', 3),
                                    ['a', 'b']])
def test_labels_are_at_least_two_different_names(labels):
    """Two labels that differ only in case could not be told apart in an answer."""
    with pytest.raises(ValueError, match='labels='):
        PromptTemplate(labels=labels)


@pytest.mark.parametrize('label', [-1, 2])
def test_label_outside_the_names_is_refused(label):
    """-1, the label of unlabelled sets, is not the last name."""
    with pytest.raises(ValueError, match='label='):
        PromptTemplate().answer(label)
