"""The text processor: EasyLM's `fields` language, and what it refuses."""
import base64
from pathlib import Path

import numpy as np
import pytest

from data.text_processor import TextProcessor
from data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(Path(__file__).parent / 'golden/easylm/tokenizer.model')
EXAMPLE = {'prompt': 'a fine film', 'answer': ' Positive', 'extra': '7', 'fields': '[prompt],answer',
           'junk': 'BQAA*AA==', 'short': 'BQAA',
           'raw': base64.b64encode(np.array([5, 300], '<i4').tobytes()).decode()}
ENCODE = TOKENIZER.encode


def process(fields, **settings):
    return TextProcessor(TOKENIZER, fields=fields, **settings)(EXAMPLE)


def test_fields_are_tokenized_alone_with_their_masks():
    """bos mask 0, [prompt] mask 0, answer mask 1, eos mask 1."""
    prompt, answer = ENCODE('a fine film'), ENCODE(' Positive')
    mask = [0.0] * (1 + len(prompt)) + [1.0] * (len(answer) + 1)
    assert process('[prompt],answer') == ([1, *prompt, *answer, 2], mask)


def test_plus_joins_texts_before_tokenizing():
    """'prompt+extra' is one text with the separator between, which is not the tokens of both put together."""
    assert process('prompt+extra', subfield_separator=' | ')[0] == [1, *ENCODE('a fine film | 7'), 2]


def test_special_tokens_and_raw_tokens():
    """<|bos|>, <|eos|>, <|17|> and {key} are token ids, with the mask of their field."""
    tokens, mask = process('<|bos|>,[<|17|>],{raw},[<|eos|>]', add_bos_token=False, add_eos_token=False)
    assert (tokens, mask) == ([1, 17, 5, 300, 2], [1.0, 0.0, 1.0, 1.0, 0.0])


def test_prepend_text_goes_to_the_first_field_only():
    """... and only if that is text."""
    assert process('prompt,answer', prepend_text='Q: ')[0] == [1, *ENCODE('Q: a fine film'), *ENCODE(' Positive'), 2]
    assert process('<|17|>,answer', prepend_text='Q: ')[0] == [1, 17, *ENCODE(' Positive'), 2]


def test_fields_from_example_names_the_key_with_the_fields():
    """The record's own 'fields' is what --fields would have said."""
    assert TextProcessor(TOKENIZER, fields_from_example='fields')(EXAMPLE) == process('[prompt],answer')


@pytest.mark.parametrize('settings, message', [
    ({'fields': 'a', 'fields_from_example': 'b'}, 'set one of'), ({'chat_template': '{% for %}'}, 'cannot be read'),
    ({'chat_template': 'llama-3'}, 'needs the control tokens'),
    ({'fields': 'a', 'base64_token_dtype': 'nonsense'}, 'base64_token_dtype'),
    ({'fields': 'a', 'base64_token_dtype': 'f4'}, 'integer dtype'),
])
def test_settings_without_sense_are_refused(settings, message):
    """Before any data is read."""
    with pytest.raises(ValueError, match=message):
        TextProcessor(TOKENIZER, **settings)


@pytest.mark.parametrize('fields, message', [
    ('absent', "field 'absent' is missing; the record has 'prompt', 'answer'"), ('<|begin|>', 'no token'),
    ('<|640|>', 'token id 640'), ('{prompt}', 'base64'), ('{junk}', 'base64'), ('{short}', 'holds 3 bytes'),
])
def test_record_that_does_not_fit_names_its_field(fields, message):
    """Missing field (with the keys present), unknown token, id outside the vocabulary, broken base64."""
    with pytest.raises(ValueError, match=message):
        process(fields)
