"""Claims about api, guard, thread and page of serving/, and about serve.py, mostly with an engine that only pretends:
answers and failures at will.  tests/test_serve_easylm.py asks the real one.
"""
import asyncio
import base64
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
from fastapi.testclient import TestClient

import serve
from program import flags, parse
from serving.api import Options, make_app
from serving.engine import Generation, RequestError
from serving.thread import EngineFailed, EngineThread

PROMPTS = ['[Text]: fine\n[Sentiment]:', '[Text]: dull é 😀\n[Sentiment]:']


class FakeEngine:
    """Answers with the length of the prompt.  `gate` holds every prompt back until it is set; `calls` is what came."""

    def __init__(self):
        self.gate, self.warm_gate, self.busy = threading.Event(), threading.Event(), threading.Event()
        self.calls, self.error = [], None
        self.gate.set()
        self.warm_gate.set()

    def warm_up(self, programs):
        assert self.warm_gate.wait(10)
        yield

    def generate(self, prompts, temperature):
        self.busy.set()
        assert self.gate.wait(10)
        self.calls.append((prompts, temperature))
        if self.error is not None:
            raise self.error
        return [Generation(f' {len(prompt)}', [len(prompt)], 2, 'stop', len(prompt) > 30) for prompt in prompts]

    def greedy_until(self, prompts, stops, max_length):
        self.calls.append((prompts, stops, max_length))
        return [Generation('|'.join(stop), [1], 2, 'length', len(prompt) > 30)
                for prompt, stop in zip(prompts, stops, strict=True)]

    def loglikelihood_rolling(self, texts):
        self.calls.append(texts)
        return [(-float(len(text)), True) for text in texts]

    def loglikelihood(self, prefixes, texts):
        self.calls.append((prefixes, texts))
        return [(-float(len(prefix + text)), prefix == '') for prefix, text in zip(prefixes, texts, strict=True)]


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def served(engine):
    """(client, thread) of an app whose queue holds two requests besides the running one."""
    thread = EngineThread(engine, queue_size=2)
    options = Options(default_temperature=0.5, greedy_until_max_length=70, max_body_bytes=10_000, body_seconds=0.5)
    with TestClient(make_app(thread, options), base_url='http://127.0.0.1:5007') as client:
        yield client, thread
    engine.gate.set()
    thread.close()


@pytest.fixture
def client(served):
    served[1].warm.result(10)
    return served[0]


# ---------------------------------------------------------------- answers


def test_generate_answers_as_easylm_with_added_fields(client, engine):
    """prefix_text, output_text and temperature are EasyLM's; truncated and finish_reason come on top."""
    answer = client.post('/generate', json={'prefix_text': PROMPTS, 'temperature': 0})
    assert answer.status_code == 200
    assert answer.json() == {'prefix_text': PROMPTS, 'output_text': [' 25', ' 29'], 'temperature': 0.0,
                             'truncated': [False, False], 'finish_reason': ['stop', 'stop']}


@pytest.mark.parametrize('more', [{}, {'temperature': None}])
def test_a_request_without_temperature_takes_the_default(client, engine, more):
    """Absent and null both mean --lm_server.default_temperature, which the answer names."""
    assert client.post('/generate', json={'prefix_text': ['a']} | more).json()['temperature'] == 0.5
    assert engine.calls == [(['a'], 0.5)]


@pytest.mark.parametrize('more', [{}, {'prefix_text': None}])
def test_loglikelihood_without_prefix_scores_after_nothing(client, more):
    """EasyLM: a missing prefix_text is one empty string per text."""
    assert client.post('/loglikelihood', json={'text': ['abc', 'd']} | more).json() == {
        'prefix_text': ['', ''], 'text': ['abc', 'd'], 'log_likelihood': [-3.0, -1.0], 'is_greedy': [True, True]}


def test_greedy_until_answers_as_easylm_with_added_fields(client, engine):
    """An item of `until` is one stop text or several; max_length is the flag's where the request names none."""
    body = {'prefix_text': PROMPTS, 'until': ['end', ['a', 'b']]}
    assert client.post('/greedy-until', json=body).json() == body | {
        'max_length': 70, 'output_text': ['end', 'a|b'], 'truncated': [False, False],
        'finish_reason': ['length', 'length']}
    assert client.post('/greedy-until', json=body | {'max_length': 5}).json()['max_length'] == 5
    assert engine.calls == [(PROMPTS, [['end'], ['a', 'b']], length) for length in (70, 5)]


def test_rolling_answers_as_easylm(client):
    """Keys of EasyLM, nothing added."""
    assert client.post('/loglikelihood-rolling', json={'text': ['abc', 'd']}).json() == {
        'text': ['abc', 'd'], 'log_likelihood': [-3.0, -1.0], 'is_greedy': [True, True]}


@pytest.mark.parametrize('more', [{}, {'context': ''}])
def test_chat_goes_on_from_the_context_it_returned(client, engine, more):
    """One string grows: context, prompt, response; a missing context is an empty one."""
    first = client.post('/chat', json={'prompt': 'hello', 'temperature': 0.25} | more).json()
    assert first == {'response': ' 5', 'context': 'hello 5', 'temperature': 0.25, 'truncated': False,
                     'finish_reason': 'stop'}
    second = client.post('/chat', json={'prompt': '!' * 30, 'context': first['context']}).json()
    assert second['context'] == 'hello 5' + '!' * 30 + ' 37' and second['truncated'] and second['temperature'] == 0.5
    assert engine.calls == [(['hello'], 0.25), (['hello 5' + '!' * 30], 0.5)]


def test_the_flags_texts_stand_around_what_is_asked_and_not_in_what_is_answered(engine):
    """EasyLM's order: prepend, text, append; in a chat all but chat_prepend_text becomes part of the context."""
    options = Options(prepend_to_prefix='<p ', append_to_prefix=' p>', prepend_to_text='<t ', append_to_text=' t>',
                      chat_prepend_text='SYSTEM', chat_user_prefix='<user ', chat_user_suffix=' user>',
                      chat_lm_prefix='<lm', chat_lm_suffix=' lm>')
    thread = EngineThread(engine, queue_size=2)
    client = TestClient(make_app(thread, options), base_url='http://localhost')
    answers = [client.post(path, json=body).json() for path, body in (
        ('/generate', {'prefix_text': ['a'], 'temperature': 0}),
        ('/greedy-until', {'prefix_text': ['a'], 'until': ['u']}),
        ('/loglikelihood', {'prefix_text': ['a'], 'text': ['b']}),
        ('/loglikelihood', {'text': ['b']}),
        ('/loglikelihood-rolling', {'text': ['b']}),
        ('/chat', {'prompt': 'hi', 'context': 'before ', 'temperature': 0}))]
    assert engine.calls == [
        (['<p a p>'], 0.0), (['<p a p>'], [['u']], 5000), (['<p a p>'], ['<t b t>']), (['<p  p>'], ['<t b t>']),
        ['<t b t>'], (['SYSTEMbefore <user hi user><lm'], 0.0)]
    assert [answer.get('prefix_text') for answer in answers] == [['a'], ['a'], ['a'], [''], None, None]
    assert [answer.get('text') for answer in answers] == [None, None, ['b'], ['b'], ['b'], None]
    assert answers[5]['context'] == 'before <user hi user><lm 30 lm>' and answers[5]['response'] == ' 30'
    thread.close()


@pytest.mark.parametrize('logging', [False, True])
def test_only_logging_prints_what_is_asked_and_answered(engine, logging, capfd):
    """Request and answer, characters that move a terminal's cursor spelled out; without the flag nothing at all."""
    thread = EngineThread(engine, queue_size=2)
    client = TestClient(make_app(thread, Options(logging=logging)), base_url='http://localhost')
    client.post('/generate', json={'prefix_text': ['a \x1b[2J\x9b é'], 'temperature': 0})
    client.post('/chat', json={'prompt': 'my prompt'})
    printed = capfd.readouterr()
    assert printed.err == '' and '\x1b' not in printed.out and '\x9b' not in printed.out
    expected = ['/generate is asked', r"'a \x1b[2J\x9b é'", '/generate answers', "'output_text': [' 9']", 'my prompt']
    assert [text in printed.out for text in expected] == [logging] * 5 and bool(printed.out) == logging
    thread.close()


# ---------------------------------------------------------------- the page


def test_the_page_shows_the_notes_as_text_and_runs_its_own_script_alone(engine):
    """The policy's hashes are those of the one script and the one style; markup in the notes is escaped."""
    thread = EngineThread(engine, queue_size=2)
    notes = '</div><script>alert(1)</script> & "[TEMPERATURE]"'
    client = TestClient(make_app(thread, Options(notes=notes, default_temperature=0.25)), base_url='http://localhost')
    answer = client.get('/')
    page, policy = answer.text, answer.headers['content-security-policy']
    assert answer.status_code == 200 and answer.headers['content-type'] == 'text/html; charset=utf-8'
    assert '&lt;/div&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;[TEMPERATURE]&quot;' in page
    assert 'value="0.25"' in page and '[NOTES]' not in page
    for tag in ('script', 'style'):
        source, = re.findall(f'<{tag}.*?>(.*?)</{tag}>', page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "connect-src 'self';" in policy and 'unsafe' not in policy
    assert not re.search(r'\b(?:src|href|action|style|on\w+)=', page) and '//' not in page.split('<script>')[0]
    assert 'innerHTML' not in page and len(page) < 8_000
    assert client.get('/', headers={'Host': 'evil.example'}).status_code == 400
    thread.close()


# ---------------------------------------------------------------- refusals

GOOD = {'prefix_text': ['a']}
UNTIL = {'prefix_text': ['a'], 'until': ['.']}


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
    ('/generate', '{"prefix_text": ["a"], "temperature": NaN}', 'temperature must be a finite number'),
    ('/generate', '{"prefix_text": ["a"], "temperature": Infinity}', 'temperature must be a finite number'),
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
def test_a_bad_body_is_refused_in_one_line_that_names_the_field(client, engine, path, body, expected):
    """400, one line, no traceback; the engine is not called, and serves the next request."""
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(path, content=content, headers={'Content-Type': 'application/json'})
    assert (answer.status_code, list(answer.json())) == (400, ['detail'])
    assert expected in answer.json()['detail'] and '\n' not in answer.json()['detail']
    assert engine.calls == []
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
def test_headers_of_another_site_are_refused(client, engine, headers, status):
    """A loopback server answers to loopback names only, and to JSON only, which no foreign page can send unasked."""
    answer = client.post('/generate', content=json.dumps(GOOD), headers={'Content-Type': 'application/json'} | headers)
    assert (answer.status_code, len(engine.calls)) == (status, status == 200)


def test_a_body_over_the_cap_is_refused_before_it_is_read(client, engine):
    """413 for 10,001 bytes, also when they come in pieces without a length; 200 for 10,000."""
    def pieces():
        yield b'{"prefix_text": ["'
        yield from [b'a' * 1000] * 11
        yield b'"]}'

    def status(content):
        headers = {'Content-Type': 'application/json'}
        return client.post('/generate', content=content, headers=headers).status_code

    assert status(json.dumps({'prefix_text': ['a' * 9_980]})) == status(pieces()) == 413
    assert engine.calls == []
    assert status(json.dumps({'prefix_text': ['a' * 9_979]})) == 200


def test_a_chat_is_at_most_a_million_characters(engine):
    """Of prompt and of context each; a server with a larger body limit would else tokenise without end."""
    thread = EngineThread(engine, queue_size=2)
    client = TestClient(make_app(thread, Options()), base_url='http://localhost')
    for length, status in ((1_000_000, 200), (1_000_001, 400)):
        for body in ({'prompt': 'a' * length}, {'prompt': 'a', 'context': 'a' * length}):
            assert client.post('/chat', json=body).status_code == status
    thread.close()


def test_no_other_paths_exist(client):
    """No documentation page (it loads scripts from elsewhere), no method but the right one."""
    paths = ('/docs', '/openapi.json', '/page.html', '/generate', '/greedy-until', '/chat')
    assert [client.get(path).status_code for path in paths] == [404, 404, 404, 405, 405, 405]
    assert [client.post(path, json={}).status_code for path in ('/', '/ready')] == [405, 405]


# ---------------------------------------------------------------- load and failure


def test_a_full_queue_answers_429_and_those_in_line_are_served(served, engine):
    """One running and two waiting fill the house: the fourth hears 429 with Retry-After, the three get answers."""
    client, thread = served
    thread.warm.result(10)
    engine.gate.clear()
    line = [thread.submit('generate', prompts=['a' * n], temperature=0.0) for n in (1, 2, 3)]
    answer = client.post('/generate', json=GOOD)
    assert (answer.status_code, answer.headers['retry-after']) == (429, '1')
    engine.gate.set()
    assert [future.result(10)[0].token_ids for future in line] == [[1], [2], [3]]
    assert client.post('/generate', json=GOOD).status_code == 200


def test_ready_tells_the_truth(engine):
    """503 before the programs are compiled, EasyLM's text afterwards, 503 again once the engine has failed."""
    engine.warm_gate.clear()
    thread = EngineThread(engine, queue_size=2)
    client = TestClient(make_app(thread, Options()), base_url='http://localhost')
    assert (client.get('/ready').status_code, client.get('/ready').text) == (503, 'compiling\n')
    engine.warm_gate.set()
    thread.warm.result(10)
    assert (client.get('/ready').status_code, client.get('/ready').text) == (200, 'Ready!\n')
    engine.error = RuntimeError('secret 0x7ffe')
    client.post('/generate', json=GOOD)
    assert (client.get('/ready').status_code, client.get('/ready').text) == (503, 'the engine failed\n')
    thread.close()


@pytest.mark.parametrize('error', [RuntimeError('secret 0x7ffe'), ValueError('secret 0x7ffe')])
def test_an_engine_failure_is_500_without_details_for_all_in_line(served, engine, error, capfd):
    """The running, the waiting and later requests get 500; the log, and only the log, has the cause."""
    client, thread = served
    engine.error = error
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.post, '/generate', json=GOOD)
        assert engine.busy.wait(10)
        waiting = thread.submit('generate', prompts=['b'], temperature=0.0)
        engine.gate.set()
    answers = [running.result(), client.post('/generate', json=GOOD)]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert not any('secret' in answer.text for answer in answers)
    assert isinstance(waiting.exception(10), EngineFailed) and len(engine.calls) == 1
    assert 'secret 0x7ffe' in capfd.readouterr().err


@pytest.mark.parametrize('error, status', [(RequestError, 400), (FloatingPointError, 500)])
def test_what_concerns_one_request_harms_no_other(client, engine, error, status):
    """What only the engine can know (lengths in tokens, logits that are not finite) is said in the engine's words."""
    engine.error = error('about tokens')
    answer = client.post('/generate', json=GOOD)
    assert (answer.status_code, answer.json()) == (status, {'detail': 'about tokens'})
    engine.error = None
    assert client.post('/generate', json=GOOD).status_code == client.get('/ready').status_code == 200


def status_of(thread, *messages):
    """The status of POST /generate when the client sends `messages` and then is silent."""
    sent, left = [], iter(messages)

    async def receive():
        return next(left, None) or await asyncio.sleep(5)

    async def send(message):
        sent.append(message)

    scope = dict(type='http', method='POST', path='/generate', raw_path=b'/generate', query_string=b'',
                 headers=[(b'host', b'localhost'), (b'content-type', b'application/json')])
    asyncio.run(make_app(thread, Options(body_seconds=0.05))(scope, receive, send))
    return sent[0]['status']


def test_a_body_that_does_not_arrive_is_given_up(served):
    """A client that stalls in the middle of its body hears 408 after body_seconds."""
    assert status_of(served[1], dict(type='http.request', body=b'{"prefix_', more_body=True)) == 408


def test_a_client_that_leaves_the_line_is_forgotten(served, engine):
    """Its place is free again and the engine never hears of it; those around it are served."""
    _, thread = served
    thread.warm.result(10)
    engine.gate.clear()
    line = [thread.submit('generate', prompts=['a' * n], temperature=0.0) for n in (1, 2)]
    for _ in range(3):
        assert status_of(thread, dict(type='http.request', body=json.dumps({'prefix_text': ['gone']}).encode()),
                         dict(type='http.disconnect')) == 499
    engine.gate.set()
    assert [future.result(10)[0].token_ids for future in line] == [[1], [2]]
    thread.submit('generate', prompts=['last'], temperature=0.0).result(10)
    assert engine.calls == [(['a'], 0.0), (['aa'], 0.0), (['last'], 0.0)]


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
        start('--lm_server.port=0', flag)


@pytest.mark.parametrize('pre_compile, names', [
    ('all', ('generate', 'greedy_until', 'chat', 'loglikelihood')), ('', ()),
    ('loglikelihood,greedy_until', ('loglikelihood', 'greedy_until')), (' chat , generate', ('chat', 'generate'))])
def test_pre_compile_takes_easylms_names(pre_compile, names):
    """loglikelihood, generate, greedy_until, chat, in a comma list; all of them; none."""
    assert serve.programs_of(pre_compile) == names


def test_every_flag_of_the_http_side_reaches_it():
    """The fields of Options that are flags have the flags' names, defaults and values."""
    own = {'body_seconds', 'allowed_hosts'}
    assert serve.options_of(parse.parse(['serve.py'], flags.SERVE, '').lm_server) == Options()
    names = {field.name for field in dataclasses.fields(Options)} - own
    given = {name: {str: name, bool: True, int: 7, float: 0.5}[type(getattr(Options(), name))] for name in names}
    arguments = [f'--lm_server.{name}={value}' for name, value in given.items()]
    assert serve.options_of(parse.parse(['serve.py', *arguments], flags.SERVE, '').lm_server) == Options(**given)


@pytest.mark.parametrize('host, warns', [('127.0.0.1', False), ('localhost', False), ('0.0.0.0', True)])
def test_an_open_address_is_warned_about(start, capsys, host, warns):
    """Everyone on the network could use the model: there is no authentication."""
    with pytest.raises(ValueError, match='reached the model'):
        start('--lm_server.port=0', f'--lm_server.host={host}')
    assert ('there is no authentication' in capsys.readouterr().out) == warns


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
        assert 'attention reference' in log[0] and 'compiled 3 programs' in log[-2]
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
