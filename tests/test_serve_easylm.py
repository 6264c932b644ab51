"""A client of EasyLM meets our server: the requests its LMClient makes, and the answers its server gave (serve.json).

LMClient (EasyLM, August 2023) asks GET /ready until a connection is there, whatever the answer says; then it posts
JSON and reads the named keys of what comes back.  Our server has the model and the lengths that gave those answers.
"""
import json

import helpers
import jax
import numpy as np
import pytest
from fastapi.testclient import TestClient

import checkpoint
from data.tokenizer import load_tokenizer
from model.config import Compute, config_from_dict
from serving.api import Options, make_app
from serving.thread import EngineThread


@pytest.fixture(scope='module')
def cases(golden):
    """[(path, request, EasyLM's response)]"""
    cases = json.loads((golden / 'easylm' / 'serve.json').read_text())
    return [(case['path'], case['request'], case['response']) for case in cases]


@pytest.fixture(scope='module')
def post(golden):
    """What LMClient does with a path and a body."""
    folder = golden / 'easylm'
    config = config_from_dict(json.loads((folder / 'model.json').read_text()), 'model.json')
    jax.config.update('jax_disable_most_optimizations', True)
    params = checkpoint.open(f'params::{folder}/streaming_params_trained').load_params(config, helpers.one_device())
    asker = helpers.Asker(params, config, Compute(), load_tokenizer(folder / 'tokenizer.model'), helpers.one_device(),
                          batch_size=2)
    thread = EngineThread(asker.engine, queue_size=4, warm_up=())
    with TestClient(make_app(thread, asker.texts, Options()), base_url='http://localhost:5007') as client:
        client.get('/ready')
        yield lambda path, body: client.post(path, json=body).json()
    thread.close()
    jax.config.update('jax_disable_most_optimizations', False)


def cleaned(text: str) -> str:
    """`text` as transformers 4.31 decoded it: without the blank before punctuation and some English endings."""
    for ending in ('.', '?', '!', ',', "n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f' {ending}', ending)
    return text.replace(" ' ", "'")


def of(cases, path):
    found = [(request, response) for where, request, response in cases if where == path]
    assert found
    return found


def test_scores_equal_easylms(post, cases):
    """loglikelihood(prefix, text) and loglikelihood_rolling(text): within 1e-3 nats, the same is_greedy; and what was
    asked comes back."""
    for path in ('/loglikelihood', '/loglikelihood-rolling'):
        for request, expected in of(cases, path):
            answer = post(path, request)
            np.testing.assert_allclose(answer['log_likelihood'], expected['log_likelihood'], atol=1e-3, rtol=0)
            assert answer['is_greedy'] == expected['is_greedy']
            assert {key: answer[key] for key in request} == request and set(answer) == set(expected)


def test_greedy_texts_equal_easylms(post, cases):
    """generate(prefix, temperature): the same texts up to the blanks that EasyLM's decoding removed."""
    for request, expected in of(cases, '/generate'):
        answer = post('/generate', request)
        assert [cleaned(text) for text in answer.pop('output_text')] == expected.pop('output_text')
        assert expected.items() <= answer.items()
        assert set(answer) - set(expected) == {'truncated', 'finish_reason'}


def test_chats_equal_easylms(post, cases):
    """chat(prompt, context, temperature): response and context."""
    for request, expected in of(cases, '/chat'):
        answer = post('/chat', request)
        assert {key: cleaned(value) if isinstance(value, str) else value
                for key, value in answer.items() if key in expected} == expected
        assert set(answer) - set(expected) == {'truncated', 'finish_reason'}


def test_greedy_until_equals_easylm_up_to_eos(post, cases):
    """greedy_until(prefix, until): EasyLM writes EOS out as </s> and goes on; we end there."""
    for request, expected in of(cases, '/greedy-until'):
        answer = post('/greedy-until', request)
        texts = expected.pop('output_text')
        assert [cleaned(text) for text in answer.pop('output_text')] == [text.split('</s>')[0] for text in texts]
        assert expected.items() <= answer.items() and answer['max_length'] == 5000
        assert set(answer) - set(expected) == {'truncated', 'finish_reason'}


def test_bodies_as_lmclient_writes_them_are_accepted(post):
    """Its null for a temperature that was not given; stop texts one by one or in lists."""
    assert post('/generate', {'prefix_text': ['a'], 'temperature': None})['temperature'] == 1.0
    assert post('/chat', {'prompt': 'a', 'context': '', 'temperature': None})['temperature'] == 1.0
    one, listed = (post('/greedy-until', {'prefix_text': ['hello'], 'until': until}) for until in (['.'], [['.']]))
    assert one['output_text'] == listed['output_text'] and '.' not in one['output_text'][0]


def test_what_is_too_long_says_so(post):
    """A prompt loses its beginning, in all three endpoints; a pair to score is refused with its token counts."""
    long = 'the ' * 70
    for path, body in (('/generate', {'prefix_text': ['a', long]}),
                       ('/greedy-until', {'prefix_text': ['a', long], 'until': ['x', 'x'], 'max_length': 2})):
        assert post(path, body)['truncated'] == [False, True]
    assert post('/chat', {'prompt': 'a', 'context': long})['truncated'] is True
    assert post('/loglikelihood', {'prefix_text': [long], 'text': [long]}) == {
        'detail': 'prefix_text[0] and text[0] have 72 (with bos) and 71 tokens: at most 129 together (seq_length + 1) '
                  'can be scored'}
