"""Claims about api, guard, metrics and page of serving/, and about serve.py, with a thread that only pretends to have
an engine (fakes.py).  tests/test_serve_easylm.py asks the real one; test_openai.py has the endpoints below /v1.
"""
import asyncio
import dataclasses
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from fakes import LengthTexts, LengthThread
from fastapi.testclient import TestClient

import serve
from program import flags, parse
from serving.api import Options, make_app
from serving.guard import MAX_DEPTH, RequestGuard, parse_json
from serving.work import EngineFailed, RequestError

PROMPTS = ['[Text]: fine\n[Sentiment]:', '[Text]: dull é 😀\n[Sentiment]:']


@pytest.fixture
def texts():
    return LengthTexts()


@pytest.fixture
def thread():
    thread = LengthThread()
    yield thread
    thread.gate.set()


@pytest.fixture
def make(texts, thread):
    """Makes a client of an application with other options."""
    return lambda **options: TestClient(make_app(thread, texts, Options(**options)), base_url='http://127.0.0.1:5007')


@pytest.fixture
def client(make):
    return make(default_temperature=0.5, greedy_until_max_length=70, max_body_bytes=10_000, body_seconds=0.5)


# ---------------------------------------------------------------- answers


def test_generate_answers_as_easylm_with_added_fields(client, texts):
    """prefix_text, output_text and temperature are EasyLM's; truncated and finish_reason come on top."""
    answer = client.post('/generate', json={'prefix_text': PROMPTS, 'temperature': 0})
    assert answer.status_code == 200
    assert answer.json() == {'prefix_text': PROMPTS, 'output_text': [' 25', ' 29'], 'temperature': 0.0,
                             'truncated': [False, False], 'finish_reason': ['stop', 'stop']}


@pytest.mark.parametrize('more', [{}, {'temperature': None}])
def test_a_request_without_temperature_takes_the_default(client, texts, more):
    """Absent and null both mean --lm_server.default_temperature, which the answer names."""
    assert client.post('/generate', json={'prefix_text': ['a']} | more).json()['temperature'] == 0.5
    assert texts.calls == [(['a'], 0.5)]


@pytest.mark.parametrize('more', [{}, {'prefix_text': None}])
def test_loglikelihood_without_prefix_scores_after_nothing(client, more):
    """EasyLM: a missing prefix_text is one empty string per text."""
    assert client.post('/loglikelihood', json={'text': ['abc', 'd']} | more).json() == {
        'prefix_text': ['', ''], 'text': ['abc', 'd'], 'log_likelihood': [-3.0, -1.0], 'is_greedy': [True, True]}


def test_greedy_until_answers_as_easylm_with_added_fields(client, texts):
    """An item of `until` is one stop text or several; max_length is the flag's where the request names none."""
    body = {'prefix_text': PROMPTS, 'until': ['end', ['a', 'b']]}
    assert client.post('/greedy-until', json=body).json() == body | {
        'max_length': 70, 'output_text': ['end', 'a|b'], 'truncated': [False, False],
        'finish_reason': ['length', 'length']}
    assert client.post('/greedy-until', json=body | {'max_length': 5}).json()['max_length'] == 5
    assert texts.calls == [(PROMPTS, [['end'], ['a', 'b']], length) for length in (70, 5)]


def test_rolling_answers_as_easylm(client):
    """Keys of EasyLM, nothing added."""
    assert client.post('/loglikelihood-rolling', json={'text': ['abc', 'd']}).json() == {
        'text': ['abc', 'd'], 'log_likelihood': [-3.0, -1.0], 'is_greedy': [True, True]}


@pytest.mark.parametrize('more', [{}, {'context': ''}])
def test_chat_goes_on_from_the_context_it_returned(client, texts, more):
    """One string grows: context, prompt, response; a missing context is an empty one."""
    first = client.post('/chat', json={'prompt': 'hello', 'temperature': 0.25} | more).json()
    assert first == {'response': ' 5', 'context': 'hello 5', 'temperature': 0.25, 'truncated': False,
                     'finish_reason': 'stop'}
    second = client.post('/chat', json={'prompt': '!' * 30, 'context': first['context']}).json()
    assert second['context'] == 'hello 5' + '!' * 30 + ' 37' and second['truncated'] and second['temperature'] == 0.5
    assert texts.calls == [(['hello'], 0.25), (['hello 5' + '!' * 30], 0.5)]


def test_the_flags_texts_stand_around_what_is_asked_and_not_in_what_is_answered(make, texts):
    """EasyLM's order: prepend, text, append; in a chat all but chat_prepend_text becomes part of the context."""
    client = make(prepend_to_prefix='<p ', append_to_prefix=' p>', prepend_to_text='<t ', append_to_text=' t>',
                  chat_prepend_text='SYSTEM', chat_user_prefix='<user ', chat_user_suffix=' user>',
                  chat_lm_prefix='<lm', chat_lm_suffix=' lm>')
    answers = [client.post(path, json=body).json() for path, body in (
        ('/generate', {'prefix_text': ['a'], 'temperature': 0}),
        ('/greedy-until', {'prefix_text': ['a'], 'until': ['u']}),
        ('/loglikelihood', {'prefix_text': ['a'], 'text': ['b']}),
        ('/loglikelihood', {'text': ['b']}),
        ('/loglikelihood-rolling', {'text': ['b']}),
        ('/chat', {'prompt': 'hi', 'context': 'before ', 'temperature': 0}))]
    assert texts.calls == [
        (['<p a p>'], 0.0), (['<p a p>'], [['u']], 5000), (['<p a p>'], ['<t b t>']), (['<p  p>'], ['<t b t>']),
        ['<t b t>'], (['SYSTEMbefore <user hi user><lm'], 0.0)]
    assert [answer.get('prefix_text') for answer in answers] == [['a'], ['a'], ['a'], [''], None, None]
    assert [answer.get('text') for answer in answers] == [None, None, ['b'], ['b'], ['b'], None]
    assert answers[5]['context'] == 'before <user hi user><lm 30 lm>' and answers[5]['response'] == ' 30'


@pytest.mark.parametrize('logging', [False, True])
def test_only_logging_prints_what_is_asked_and_answered(make, logging, capfd):
    """Request and answer, characters that move a terminal's cursor spelled out; without the flag one line a request."""
    client = make(logging=logging)
    client.post('/generate', json={'prefix_text': ['a \x1b[2J\x9b é'], 'temperature': 0})
    client.post('/chat', json={'prompt': 'my prompt'})
    printed = capfd.readouterr()
    assert printed.err == '' and '\x1b' not in printed.out and '\x9b' not in printed.out
    expected = ['/generate is asked', r"'a \x1b[2J\x9b é'", '/generate answers', "'output_text': [' 9']", 'my prompt']
    assert [text in printed.out for text in expected] == [logging] * 5
    assert (len(printed.out.splitlines()) > 2) == logging


def test_each_request_has_one_line_with_its_id_and_tokens(client, capfd):
    """time, id of X-Request-Id, method, path, status, milliseconds, tokens; no path can forge a line."""
    answers = [client.post('/generate', json=GOOD), client.get('/no%0a12:00:00 x GET /fake 200%1b[2J')]
    ids = [answer.headers['x-request-id'] for answer in answers]
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and len(set(ids)) == 2
    assert re.fullmatch(rf'\d\d:\d\d:\d\d {ids[0]} POST /generate 200 \d+ ms  prompt 2 cached 0 new 1', lines[0])
    assert f'{ids[1]} GET /no\\n12:00:00 x GET /fake 200\\x1b[2J 404' in lines[1]


# ---------------------------------------------------------------- the page


def test_the_page_is_served_from_memory_under_its_policy(make):
    """GET / is index.html; each other file has its own type; own scripts and styles alone; no file beside them."""
    client = make()
    answer = client.get('/')
    assert answer.status_code == 200 and answer.headers['content-type'] == 'text/html; charset=utf-8'
    assert "default-src 'none'" in answer.headers['content-security-policy']
    assert client.get('/page/main.js').headers['content-type'] == 'text/javascript; charset=utf-8'
    paths = '/page/index.html', '/page/', '/page/../api.py', '/page/%2e%2e/api.py'
    assert [client.get(path).status_code for path in paths] == [404] * 4
    assert client.get('/', headers={'Host': 'evil.example'}).status_code == 400


# ---------------------------------------------------------------- refusals

GOOD = {'prefix_text': ['a']}
UNTIL = {'prefix_text': ['a'], 'until': ['.']}
TEMPLATE = {'texts': ['a'], 'template': '{text}:', 'labels': ['x', 'y']}


@pytest.mark.parametrize('path, body, expected', [
    ('/generate', 'hello', 'the body is not JSON'),
    ('/generate', '', 'the body must be a JSON object'),
    ('/generate', '[1]', 'the body must be a JSON object with the fields prefix_text, temperature'),
    ('/generate', 'null', 'the body must be a JSON object'),
    ('/generate', '[' * 5000, ''),
    ('/generate', '{"prefix_text": ["a"], "temperature": ' + '9' * 5000 + '}', ''),
    ('/generate', {}, 'prefix_text must be a list of 1 to'),
    ('/generate', {'prefix_text': []}, 'prefix_text must be a list of 1 to'),
    ('/generate', {'prefix_text': 'a'}, 'prefix_text must be a list of 1 to'),
    ('/generate', {'prefix_text': None}, 'prefix_text must be a list of 1 to'),
    ('/generate', {'prefix_text': ['a', 7]}, 'prefix_text[1]'),
    ('/generate', {'prefix_text': [['a']]}, 'prefix_text[0]'),
    ('/generate', '{"prefix_text": ["\\ud800"]}', 'prefix_text[0]'),
    ('/generate', GOOD | {'temperature': -0.1}, 'temperature must be a finite number from 0 to 100'),
    ('/generate', GOOD | {'temperature': 101}, 'temperature must be a finite number from 0 to 100'),
    ('/generate', GOOD | {'temperature': '1'}, 'temperature must be a finite number from 0 to 100'),
    ('/generate', GOOD | {'temperature': True}, 'temperature must be a finite number from 0 to 100'),
    ('/generate', '{"prefix_text": ["a"], "temperature": NaN}', 'NaN is no JSON number'),
    ('/generate', '{"prefix_text": ["a"], "temperature": -Infinity}', '-Infinity is no JSON number'),
    ('/generate', '{"prefix_text": ["a"], "temperature": 1e999}', 'temperature must be a finite number'),
    ('/classify', {'texts': ['a'], 'labels': ['x', 'y']}, 'template is missing, and the checkpoint has no template'),
    ('/classify', {'texts': ['a'], 'template': '{text}:'}, 'labels is missing'),
    ('/classify', TEMPLATE | {'labels': ['x']}, 'labels must be a list of 2 to 64 different strings'),
    ('/classify', TEMPLATE | {'labels': ['x'] * 2}, 'labels: some are equal'),
    ('/classify', TEMPLATE | {'labels': ['x', 'X ']}, 'labels: two differ in blanks or capitals alone'),
    ('/classify', TEMPLATE | {'labels': ['x', '']}, 'labels[1]'),
    ('/classify', TEMPLATE | {'labels': [f'{n}' for n in range(65)]}, 'labels must be a list of 2 to 64'),
    ('/classify', TEMPLATE | {'template': 'no place'}, 'template must be a string with {text} in it exactly once'),
    ('/classify', TEMPLATE | {'template': '{text}{text}'}, 'template must be a string with {text} in it exactly once'),
    ('/classify', TEMPLATE | {'template': '{text}: '}, 'template ends in a blank'),
    ('/classify', TEMPLATE | {'threshold': 1.5}, 'threshold must be a number from 0 to 1'),
    ('/classify', TEMPLATE | {'threshold': True}, 'threshold must be a number from 0 to 1'),
    ('/generate', GOOD | {'n': 10**9}, "'n' is no field of /generate"),
    ('/generate', GOOD | {'text': ['a']}, "'text' is no field of /generate"),
    ('/loglikelihood', GOOD, 'text must be a list of 1 to'),
    ('/loglikelihood', '[1]', 'the body must be a JSON object with the fields prefix_text, text'),
    ('/loglikelihood', {'text': ['a'], 'temperature': 1}, "'temperature' is no field of /loglikelihood"),
    ('/loglikelihood', {'text': ['a', 'b']} | GOOD, 'prefix_text has 1 items, text 2: they are pairs'),
    ('/loglikelihood-rolling', {}, 'text must be a list of 1 to'),
    ('/loglikelihood-rolling', {'text': ['a']} | GOOD, "'prefix_text' is no field of /loglikelihood-rolling"),
    ('/greedy-until', GOOD, 'until must be a list with one item for each prefix_text'),
    ('/greedy-until', '7', 'a JSON object with the fields prefix_text, until, max_length'),
    ('/greedy-until', UNTIL | {'until': '.'}, 'until must be a list with one item'),
    ('/greedy-until', UNTIL | {'until': None}, 'until must be a list with one item'),
    ('/greedy-until', UNTIL | {'until': ['']}, 'until[0]'),
    ('/greedy-until', UNTIL | {'until': [['']]}, 'until[0]'),
    ('/greedy-until', UNTIL | {'until': [['a', 7]]}, 'until[0]'),
    ('/greedy-until', '{"prefix_text": ["a"], "until": [["\\udfff"]]}', 'until[0]'),
    ('/greedy-until', UNTIL | {'until': ['a' * 1001]}, 'a string of 1 to 1000 characters'),
    ('/greedy-until', UNTIL | {'until': [['a'] * 65]}, 'a list of at most 64 of them'),
    ('/greedy-until', UNTIL | {'until': ['a', 'b']}, 'prefix_text has 1 items, until 2: they are pairs'),
    ('/greedy-until', UNTIL | {'max_length': 0}, 'max_length must be a whole number of at least 1'),
    ('/greedy-until', UNTIL | {'max_length': 1.5}, 'max_length must be a whole number of at least 1'),
    ('/greedy-until', UNTIL | {'max_length': True}, 'max_length must be a whole number of at least 1'),
    ('/greedy-until', UNTIL | {'max_length': 71}, 'max_length must be at most 70 here'),
    ('/greedy-until', UNTIL | {'max_length': 10**30}, 'max_length'),
    ('/greedy-until', UNTIL | {'temperature': 0}, "'temperature' is no field of /greedy-until"),
    ('/chat', {}, 'prompt must be a string of valid Unicode'),
    ('/chat', {'prompt': ['a']}, 'prompt must be a string of valid Unicode'),
    ('/chat', '{"prompt": "\\ud800"}', 'prompt must be a string of valid Unicode'),
    ('/chat', {'prompt': 'a', 'context': None}, 'context must be a string of valid Unicode'),
    ('/chat', '{"prompt": "a", "context": "\\udc00"}', 'context must be a string of valid Unicode'),
    ('/chat', {'prompt': 'a', 'temperature': -1}, 'temperature must be a finite number'),
    ('/chat', {'prompt': 'a', 'history': []}, "'history' is no field of /chat: its fields are prompt, context, temp"),
])
def test_a_bad_body_is_refused_in_one_line_that_names_the_field(client, texts, path, body, expected):
    """400, one line, no traceback; the engine is not called, and serves the next request."""
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(path, content=content, headers={'Content-Type': 'application/json'})
    assert (answer.status_code, list(answer.json())) == (400, ['detail'])
    assert expected in answer.json()['detail'] and '\n' not in answer.json()['detail']
    assert texts.calls == []
    assert client.post('/generate', json=GOOD).status_code == 200


@pytest.mark.parametrize('headers, status', [
    ({'Content-Type': 'text/plain'}, 415),
    ({'Content-Type': 'application/x-www-form-urlencoded'}, 415),
    ({'Content-Encoding': 'gzip'}, 415),
    ({'Host': 'evil.example'}, 400),
    ({'Host': '127.0.0.1.evil.example:5007'}, 400),
    ({'Host': ''}, 400),
    ({'Host': 'localhost'}, 200),
    ({'Host': 'LOCALHOST:5007'}, 200),
    ({'Host': '[::1]:5007'}, 200),
    ({'Content-Type': 'application/json; charset=utf-8'}, 200),
])
def test_headers_of_another_site_are_refused(client, texts, headers, status):
    """A loopback server answers to loopback names only, and to JSON only, which no foreign page can send unasked."""
    answer = client.post('/generate', content=json.dumps(GOOD), headers={'Content-Type': 'application/json'} | headers)
    assert (answer.status_code, len(texts.calls)) == (status, status == 200)


def test_a_body_over_the_cap_is_refused_before_it_is_parsed(client, texts):
    """413 for 10,001 bytes, also when they come in pieces without a length; 200 for 10,000."""
    def pieces():
        yield b'{"prefix_text": ["'
        yield from [b'a' * 1000] * 11
        yield b'"]}'

    def status(content):
        headers = {'Content-Type': 'application/json'}
        return client.post('/generate', content=content, headers=headers).status_code

    assert status(json.dumps({'prefix_text': ['a' * 9_980]})) == status(pieces()) == 413
    assert texts.calls == []
    assert status(json.dumps({'prefix_text': ['a' * 9_979]})) == 200


@pytest.mark.parametrize('pieces, read', [(5, 5), (1000, 17)])
def test_a_body_over_the_cap_is_read_on_before_it_is_refused(pieces, read):
    """A client that still sends would lose the answer: all of 50 bytes is read where 20 are allowed, and 170 of 10,000;
    then the answer is 413."""
    came, sent = [], []

    async def receive():
        came.append(None)
        return {'type': 'http.request', 'body': b'a' * 10, 'more_body': len(came) < pieces}

    async def send(message):
        sent.append((message['type'], message.get('status'), len(came)))

    guard = RequestGuard(None, max_body_bytes=20, body_seconds=5, allowed_hosts=None)
    asyncio.run(guard({'type': 'http', 'method': 'POST', 'path': '/generate',
                       'headers': [(b'content-type', b'application/json')]}, receive, send))
    assert sent[0] == ('http.response.start', 413, read) and len(sent) == 2


def test_a_chat_is_at_most_a_million_characters(make):
    """Of prompt and of context each; a server with a larger body limit would else tokenise without end."""
    client = make()
    for length, status in ((1_000_000, 200), (1_000_001, 400)):
        for body in ({'prompt': 'a' * length}, {'prompt': 'a', 'context': 'a' * length}):
            assert client.post('/chat', json=body).status_code == status


@pytest.mark.parametrize('body', [
    b'[' * MAX_DEPTH + b']' * MAX_DEPTH, b'["' + b'[' * 999 + b'\\"' + b'{' * 99 + b'"]', b'[[]' + b', []' * 99 + b']'])
def test_depth_is_counted_outside_texts(body):
    """32 levels are parsed, 33 are not; brackets in a text and lists beside each other are no depth."""
    assert parse_json(body) == json.loads(body)
    with pytest.raises(json.JSONDecodeError, match='nested deeper than 32'):
        parse_json(b'[' * MAX_DEPTH + body + b']' * MAX_DEPTH)


def test_a_key_that_stands_twice_is_refused(client):
    """JSON leaves open which of them counts; the one that does not would be ignored silently."""
    body = b'{"prefix_text": ["a"], "temperature": 0, "temperature": 1}'
    answer = client.post('/generate', content=body, headers={'Content-Type': 'application/json'})
    assert answer.status_code == 400 and 'a key stands twice in an object' in answer.text
    assert parse_json(b'[{"a": 1}, {"a": {"a": 2}}]') == [{'a': 1}, {'a': {'a': 2}}]


def test_a_body_of_quotes_is_judged_in_linear_time():
    """4 MB of escaped quotes behind 33 brackets: under a second."""
    started = time.monotonic()
    with pytest.raises(json.JSONDecodeError):
        parse_json(b'[]' * 33 + b'"' + b'\\"' * 2_000_000)
    assert time.monotonic() - started < 1


def test_no_other_paths_exist(client):
    """No documentation page (it loads scripts from elsewhere), no method but the right one."""
    paths = ('/docs', '/redoc', '/page.html', '/generate', '/greedy-until', '/v1/completions')
    assert [client.get(path).status_code for path in paths] == [404, 404, 404, 405, 405, 405]
    assert [client.post(path, json={}).status_code for path in ('/', '/ready', '/metrics')] == [405, 405, 405]
    assert client.get('/v1/nothing').json()['error']['type'] == 'invalid_request_error'


def test_the_key_covers_everything_but_health_readiness_and_the_page(make):
    """401 without it, with another one and with another scheme, whether or not the path exists."""
    client = make(key_digest=hashlib.sha256(b'correct horse battery').digest())
    post = lambda **headers: client.post('/generate', json=GOOD, headers=headers).status_code
    assert [post(), post(Authorization='Bearer wrong'), post(Authorization='Basic correct horse battery'),
            post(Authorization='Bearer \xe9'.encode('latin-1')), post(Authorization='Bearer correct horse battery'),
            post(Authorization='bearer correct horse battery')] == [401, 401, 401, 401, 200, 200]
    open_paths = '/health', '/ready', '/', '/page/main.js'
    assert [client.get(path).status_code for path in open_paths] == [200] * 4
    closed = [route.path for route in client.app.routes if route.path not in open_paths and '/page/' not in route.path]
    assert {'/metrics', '/info', '/openapi.json', '/v1/models', '/tokenize', '/classify'} <= set(closed)
    for path in [*closed, '/nothing', '/health/', '/page']:
        answers = client.get(path), client.post(path, json=GOOD)
        assert [answer.status_code for answer in answers] == [401, 401], path
        assert answers[0].headers['www-authenticate'] == 'Bearer'
    assert client.get('/v1/models').json()['error']['code'] == 'invalid_api_key'


def test_the_openapi_document_names_bodies_and_refusals(client):
    """Each POST has a body and 400 to 503; nothing answers 422."""
    document = client.get('/openapi.json').json()
    posts = {path: found['post'] for path, found in document['paths'].items() if 'post' in found}
    assert set(posts) == {'/generate', '/greedy-until', '/chat', '/loglikelihood', '/loglikelihood-rolling',
                          '/classify', '/v1/completions', '/v1/chat/completions', '/tokenize', '/detokenize'}
    for operation in posts.values():
        assert operation['requestBody']['required'] and '422' not in operation['responses']
        assert {'400', '408', '413', '415', '429', '500', '503'} <= set(operation['responses'])
    body = document['components']['schemas']['ClassifyBody']
    assert body['additionalProperties'] is False and body['required'] == ['texts']


# ---------------------------------------------------------------- load and failure


def test_a_full_queue_answers_429(client, thread):
    """With Retry-After, and in words; the next one is served."""
    thread.full = True
    answer = client.post('/generate', json=GOOD)
    assert (answer.status_code, answer.headers['retry-after']) == (429, '1')
    assert answer.json() == {'detail': '2 requests are waiting already: try again later'}
    thread.full = False
    assert client.post('/generate', json=GOOD).status_code == 200


def test_ready_and_health_tell_the_truth(client, thread):
    """503 while programs compile, while the server stops and after a failure; the engine lives until it fails."""
    def state():
        ready, health = client.get('/ready'), client.get('/health')
        return ready.status_code, ready.text, health.status_code

    assert state() == (200, 'Ready!\n', 200)
    thread.ready = False
    assert state() == (503, 'compiling\n', 200)
    thread.closing = True
    assert state() == (503, 'draining\n', 200)
    thread.failure = RuntimeError('secret 0x7ffe')
    assert state() == (503, 'the engine failed\n', 503)


def test_a_draining_server_finishes_what_runs_and_refuses_what_is_new(client, thread):
    """503 with Retry-After for the new one and for /ready; the running one is answered."""
    thread.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, '/generate', json=GOOD)
        assert thread.begun.wait(10)
        client.app.state.metrics.draining = True
        new = client.post('/generate', json=GOOD)
        assert (new.status_code, client.get('/ready').text, not running.done()) == (503, 'draining\n', True)
        assert new.headers['retry-after']
        assert client.app.state.metrics.in_flight == 1
        thread.gate.set()
        assert running.result().status_code == 200
    assert client.app.state.metrics.in_flight == 0


@pytest.mark.parametrize('error, status, message', [
    (RequestError('about tokens'), 400, 'about tokens'),
    (FloatingPointError('not finite'), 500, 'not finite'),
    (EngineFailed(), 500, "the engine failed and takes no more requests; the server's log says why")])
@pytest.mark.parametrize('when', ['error', 'refuse'])
def test_what_the_engine_says_is_told_in_one_line(client, thread, error, status, message, when):
    """At submit and as an event: 400 for the request's mistake, 500 for others; the next request is served."""
    setattr(thread, when, error)
    answer = client.post('/generate', json=GOOD)
    assert (answer.status_code, answer.json()) == (status, {'detail': message})
    setattr(thread, when, None)
    assert client.post('/generate', json=GOOD).status_code == 200


def test_a_fault_of_ours_is_500_without_details(client, texts, capfd):
    """The log, and only the log, has the cause; the answer has an id to find it by."""
    texts.error = KeyError('secret 0x7ffe')
    answer = client.post('/generate', json=GOOD)
    assert answer.status_code == 500 and 'secret' not in answer.text and answer.headers['x-request-id']
    assert 'secret 0x7ffe' in capfd.readouterr().err


def test_an_answer_that_takes_too_long_is_given_up(make, thread):
    """503 that names the flag, and the works are cancelled."""
    thread.gate.clear()
    answer = make(request_seconds=0.05).post('/generate', json=GOOD)
    assert answer.status_code == 503 and '--lm_server.request_seconds' in answer.json()['detail']
    assert thread.cancelled == [1]


def test_the_engines_numbers_are_told_to_prometheus(client):
    """Counters by path and status; a path that does not exist is no label."""
    client.post('/generate', json=GOOD)
    client.post('/generate', json={})
    for n in range(3):
        client.get(f'/nothing{n}')
    lines = client.get('/metrics').text.splitlines()
    assert {'pallama_http_requests_total{path="/generate",status="200"} 1.0',
            'pallama_http_requests_total{path="/generate",status="400"} 1.0',
            'pallama_http_requests_total{path="other",status="404"} 3.0', 'pallama_slots 4.0', 'pallama_active 1.0',
            'pallama_waiting 2.0', 'pallama_in_flight 1.0', 'pallama_jit_compiles_after_ready 0.0',
            'pallama_cached_tokens_total 4.0', 'pallama_works_total{outcome="failed"} 1.0',
            'pallama_request_seconds_count{path="/generate"} 2.0'} <= set(lines)


def status_of(app, *messages, path='/generate'):
    """The status of a POST when the client sends `messages` and then is silent."""
    sent, left = [], iter(messages)

    async def receive():
        return next(left, None) or await asyncio.sleep(5)

    async def send(message):
        sent.append(message)

    scope = dict(type='http', method='POST', path=path, raw_path=path.encode(), query_string=b'',
                 headers=[(b'host', b'localhost'), (b'content-type', b'application/json')])
    asyncio.run(app(scope, receive, send))
    return sent[0]['status']


def test_a_body_that_does_not_arrive_is_given_up(make):
    """A client that stalls in the middle of its body hears 408 after body_seconds."""
    message = dict(type='http.request', body=b'{"prefix_', more_body=True)
    assert status_of(make(body_seconds=0.05).app, message) == 408


def test_the_works_of_a_client_that_leaves_are_cancelled(make, thread):
    """Also when they run already."""
    for ticket in (1, 2):
        thread.gate.clear()
        body = dict(type='http.request', body=json.dumps(GOOD).encode())
        assert status_of(make().app, body, dict(type='http.disconnect')) == 499
        assert thread.cancelled[-1] == ticket


# ---------------------------------------------------------------- serve.py


@pytest.fixture
def start(monkeypatch):
    """serve.main with flags, up to where it would open the model."""
    def no_model(load, compute):
        raise ValueError('reached the model')

    monkeypatch.setattr(serve, 'open_model', no_model)
    return lambda *arguments: serve.main(parse.parse(['serve.py', *arguments], flags.SERVE, ''))


def test_a_taken_port_is_named_before_the_model_is_opened(start):
    """Also when the other program is one of ours that still loads its weights."""
    with serve.listen('127.0.0.1', 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f'lm_server.port={port}: choose another --lm_server.port'):
            start(f'--lm_server.port={port}')


@pytest.mark.parametrize('flag, message', [
    ('--lm_server.port=65536', 'lm_server.port=65536 must be from 0 to 65535'),
    ('--lm_server.port=-1', 'lm_server.port=-1 must be from 0 to 65535'),
    ('--lm_server.host=no such host', "lm_server.host='no such host' is no address or known name"),
    ('--lm_server.host=192.0.2.1', "lm_server.host='192.0.2.1' is no address of this computer"),
    ('--lm_server.default_temperature=-1', 'lm_server.default_temperature=-1.0 must be from 0'),
    ('--lm_server.default_temperature=nan', 'lm_server.default_temperature=nan must be from 0'),
    ('--lm_server.pre_compile=chat,x', r"lm_server.pre_compile='chat,x' names \['x'\]: use a comma list of generate"),
    ('--lm_server.greedy_until_max_length=0', 'lm_server.greedy_until_max_length=0 must be at least 1'),
    ('--num_beams=2', 'num_beams=2 searches and does not draw, but do_sample=True'),
    ('--lm_server.queue_size=-1', 'lm_server.queue_size=-1 must be at least 0'),
    ('--lm_server.max_body_bytes=0', 'lm_server.max_body_bytes=0 must be at least 1'),
    ('--top_p=0', 'top_p=0.0 must be above 0'),
])
def test_wrong_flags_are_named_before_the_model_is_opened(start, flag, message):
    """One line with the flag, its value and the remedy."""
    with pytest.raises(ValueError, match=message):
        start('--lm_server.port=0', '--lm_server.insecure=True', flag)


@pytest.mark.parametrize('pre_compile, names', [
    ('all', ('prefill', 'decode', 'score', 'first')), ('', ()),
    ('loglikelihood,greedy_until', ('score', 'first', 'prefill', 'decode')),
    (' chat , generate', ('prefill', 'decode'))])
def test_pre_compile_takes_easylms_names(pre_compile, names):
    """loglikelihood, generate, greedy_until, chat, in a comma list; all of them; none: the programs that they need."""
    assert serve.programs_of(pre_compile) == names


def test_every_flag_of_the_http_side_reaches_it():
    """The fields of Options that are flags have the flags' names, defaults and values."""
    own = {'body_seconds', 'allowed_hosts', 'key_digest', 'calibration_temperature', 'top_k', 'top_p', 'do_sample',
           'num_beams'}
    assert serve.options_of(parse.parse(['serve.py'], flags.SERVE, '')) == Options(model_name='model')
    names = {field.name for field in dataclasses.fields(Options)} - own
    given = {name: {str: name, bool: True, int: 7, float: 0.5}[type(getattr(Options(), name))] for name in names}
    arguments = [f'--lm_server.{name}={value}' for name, value in given.items()]
    assert serve.options_of(parse.parse(['serve.py', *arguments], flags.SERVE, '')) == Options(**given)


def key_file(tmp_path, text='k' * 16, mode=0o600):
    (tmp_path / 'key').write_text(text)
    (tmp_path / 'key').chmod(mode)
    return f'--lm_server.api_key_file={tmp_path / "key"}'


@pytest.mark.parametrize('host, goes_on', [('127.0.0.1', True), ('localhost', True), ('0.0.0.0', False), ('::', False)])
def test_an_open_address_needs_a_key(start, tmp_path, capsys, host, goes_on):
    """Or --lm_server.insecure, with a warning: everyone on the network could use the model."""
    arguments = '--lm_server.port=0', f'--lm_server.host={host}'
    with pytest.raises(ValueError, match='reached the model' if goes_on else '--lm_server.api_key_file=FILE'):
        start(*arguments)
    if host == '::':
        return  # an address of this computer or not
    with pytest.raises(ValueError, match='reached the model'):
        start(*arguments, key_file(tmp_path))
    assert 'WARNING' not in capsys.readouterr().out
    with pytest.raises(ValueError, match='reached the model'):
        start(*arguments, '--lm_server.insecure=True')
    assert ('there is no API key' in capsys.readouterr().out) == (not goes_on)


@pytest.mark.parametrize('text, message', [
    ('short', 'at least 16 characters'), ('k' * 15 + ' ' + 'k' * 15, 'without blanks'), ('é' * 16, 'not ASCII'),
    ('', 'must hold one key')])
def test_a_file_without_a_key_is_refused(start, tmp_path, text, message):
    """Also one that is not there."""
    with pytest.raises(ValueError, match=message):
        start('--lm_server.port=0', key_file(tmp_path, text))
    (tmp_path / 'key').unlink()
    with pytest.raises(ValueError, match='api_key_file'):
        start('--lm_server.port=0', f'--lm_server.api_key_file={tmp_path / "key"}')


def test_a_key_that_others_can_read_is_warned_about(tmp_path, capsys):
    """The key itself is never printed; white space around it does not count."""
    path = key_file(tmp_path, 'secret' * 4 + '\n', 0o644).partition('=')[2]
    assert serve.read_key(path) == hashlib.sha256(b'secret' * 4).digest()
    printed = capsys.readouterr().out
    assert f'chmod 600 {path}' in printed and 'secret' not in printed


@pytest.mark.parametrize('arguments, message', [
    ([], 'load_checkpoint is empty'),
    (['--load_checkpoint=x', '--tokenizer.vocab_file=y'], "'y' is not the tokenizer that load_checkpoint='x'"),
])
def test_a_model_without_weights_or_with_a_foreign_tokenizer_is_refused(arguments, message):
    """A checkpoint that holds its tokenizer is served with that one."""
    own, given = SimpleNamespace(fingerprint='own'), SimpleNamespace(fingerprint='given')
    model = SimpleNamespace(tokenizer=given, source=SimpleNamespace(tokenizer=own))
    with pytest.raises(ValueError, match=message):
        serve.load_engine(parse.parse(['serve.py', *arguments], flags.SERVE, ''), model)


def test_the_program_serves_1066_prompts_and_ends_cleanly(golden, tmp_path):
    """From start to a SIGTERM in the middle of a request: that request is answered, and the exit code is 0."""
    folder = golden / 'easylm'
    program = subprocess.Popen(
        [sys.executable, 'serve.py', f'--load_llama_config=json::{folder}/model.json', '--lm_server.port=0',
         f'--load_checkpoint=params::{folder}/streaming_params_trained', '--lm_server.batch_size=8',
         f'--tokenizer.vocab_file={folder}/tokenizer.model', '--input_length=16', '--seq_length=24'],
        cwd=golden.parent.parent, stdout=subprocess.PIPE, text=True, env=os.environ | {
            'PALLAMA_CACHE': str(tmp_path), 'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})
    try:
        log = list(itertools.takewhile(lambda line: 'curl' not in line, program.stdout))
        url = next(line for line in log if line.startswith('ready on')).split()[2].rstrip(',')
        assert 'attention reference' in log[0] and log[-2].startswith('compiled ')
        assert httpx.get(f'{url}/ready').text == 'Ready!\n'
        body = json.dumps({'prefix_text': [f'{n} the film .' for n in range(1066)]}).encode()
        sent = threading.Event()

        def content():
            yield body
            sent.set()

        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(httpx.post, f'{url}/generate', content=content(), timeout=60,
                                  headers={'Content-Type': 'application/json'})
            assert sent.wait(10)
            time.sleep(0.3)
            assert not request.done()
            program.send_signal(signal.SIGTERM)
            answer = request.result()
        assert answer.status_code == 200 and len(answer.json()['output_text']) == 1066
        assert program.wait(10) == 0
    finally:
        program.kill()
        program.wait()
