"""Claims about serving/openai.py, with a thread that only pretends to have an engine (fakes.py)."""
import json
import threading

import openai
import pytest
from fakes import FakeThread
from fastapi.testclient import TestClient

from data.prompt import PromptTemplate
from data.tokenizer import load_tokenizer
from model.config import config_from_dict
from serving import asking as asking_file
from serving.api import Options, Variant, make_app
from serving.chat import plain_turns
from serving.texts import Texts
from serving.work import Generate, Score

ANSWER = 'the film is fine é😀 .'
HELLO = {'messages': [{'role': 'user', 'content': 'hi'}]}
OPTIONS = Options(model_name='tuned', default_temperature=0.5, chat_user_prefix='U: ', chat_lm_prefix='A: ')


@pytest.fixture(scope='module')
def texts(golden):
    folder = golden / 'easylm'
    config = config_from_dict(json.loads((folder / 'model.json').read_text()), 'model.json')
    return Texts(load_tokenizer(folder / 'tokenizer.model'), config, input_length=64, seq_length=128)


@pytest.fixture
def thread(texts):
    thread = FakeThread(texts.tokenizer, texts.tokenizer.encode(ANSWER))
    yield thread
    thread.gate.set()


@pytest.fixture
def client(texts, thread):
    return TestClient(make_app(thread, texts, OPTIONS, {}, plain_turns(OPTIONS)), base_url='http://localhost')


def events(answer):
    """The data of a stream: whole events, [DONE] at the end."""
    assert answer.headers['content-type'].startswith('text/event-stream')
    *found, done, rest = answer.text.split('\n\n')
    assert (done, rest) == ('data: [DONE]', '')
    return [json.loads(event.removeprefix('data: ')) for event in found]


# ---------------------------------------------------------------- completions


def test_prompts_come_in_four_forms(client, thread, texts):
    """A text gets bos, ids are taken as they are; n answers of each, in order, with seeds that differ."""
    ids = texts.tokenizer.encode('the film')
    for prompt, expected in (('the film', [[1, *ids]]), (['the film', 'the'], [[1, *ids], [1, *ids[:1]]]),
                             (ids, [ids]), ([ids, [5]], [ids, [5]])):
        thread.works.clear()
        answer = client.post('/v1/completions', json={'prompt': prompt, 'n': 2, 'seed': 7}).json()
        assert [list(work.prompt_ids) for work in thread.works] == [ids for ids in expected for _ in range(2)]
        assert [work.sampling.seed for work in thread.works] == [7, 8] * len(expected)
        assert [choice['index'] for choice in answer['choices']] == list(range(2 * len(expected)))
        assert {choice['text'] for choice in answer['choices']} == {ANSWER}
        prompt_tokens, new = sum(map(len, expected)), 2 * len(expected) * len(thread.answer)
        assert answer['usage'] == {
            'prompt_tokens': prompt_tokens, 'completion_tokens': new, 'total_tokens': prompt_tokens + new,
            'prompt_tokens_details': {'cached_tokens': len(expected)}}
        assert (answer['object'], answer['model']) == ('text_completion', 'tuned')


def test_every_field_reaches_the_engine(client, thread):
    """And what is not said has its stated default."""
    client.post('/v1/completions', json={
        'model': 'tuned', 'prompt': 'a', 'temperature': 0.25, 'top_p': 0.9, 'top_k': 3, 'min_p': 0.1, 'seed': 5,
        'stop': ['x', 'y'], 'logit_bias': {'7': -100, '8': 1.5}, 'ignore_eos': True, 'max_tokens': 9, 'logprobs': 4,
        'presence_penalty': 0, 'frequency_penalty': 0.0, 'best_of': 1, 'user': 'me', 'echo': False})
    client.post('/v1/completions', json={'prompt': 'a', 'top_k': -1, 'stop': 'z'})
    full, bare = thread.works
    assert (full.sampling.temperature, full.sampling.top_p, full.sampling.top_k, full.sampling.min_p,
            full.sampling.seed, full.sampling.logit_bias) == (0.25, 0.9, 3, 0.1, 5, ((7, -100.0), (8, 1.5)))
    assert (full.stop, full.ignore_eos, full.max_new_tokens, full.logprobs) == (('x', 'y'), True, 9, 4)
    assert (bare.sampling.temperature, bare.sampling.top_p, bare.sampling.top_k, bare.sampling.min_p,
            bare.sampling.seed) == (0.5, 1.0, 0, 0.0, None)
    assert (bare.stop, bare.ignore_eos, bare.max_new_tokens, bare.logprobs) == (('z',), False, 16, None)


def test_a_prompt_is_scored_as_the_evaluation_harness_asks(client, thread, texts):
    """echo, max_tokens=0, logprobs: one Score and no answer; null first, then each token with the likeliest beside."""
    ids = texts.tokenizer.encode('the film')
    answer = client.post('/v1/completions', json={'prompt': [ids, ids[:1]], 'echo': True, 'max_tokens': 0,
                                                  'logprobs': 2}).json()
    assert thread.works == [Score(tuple(ids[:1]), (tuple(ids[1:]),), 2)]
    scored, short = answer['choices']
    assert scored['text'] == 'the film' and scored['finish_reason'] == 'length'
    logprobs = scored['logprobs']
    assert logprobs['tokens'] == [' the', ' film'] and logprobs['text_offset'] == [0, 3]
    assert logprobs['token_logprobs'] == [None, -0.5]
    assert logprobs['top_logprobs'][0] is None and logprobs['top_logprobs'][1][' film'] == -0.5
    assert len(logprobs['top_logprobs'][1]) == 2
    assert short['logprobs']['token_logprobs'] == [None]
    assert answer['usage']['prompt_tokens'] == len(ids) + 1 and answer['usage']['completion_tokens'] == 0


def test_echo_with_an_answer_joins_both(client, thread, texts):
    """Lists of one length; offsets point at each token's place in the text."""
    choice, = client.post('/v1/completions', json={'prompt': 'the film', 'echo': True, 'logprobs': 0}).json()['choices']
    assert choice['text'] == 'the film' + ANSWER and [type(work) for work in thread.works] == [Generate, Score]
    found = choice['logprobs']
    assert len({len(values) for values in found.values()}) == 1 and len(found['tokens']) == 3 + len(thread.answer)
    for token, offset in zip(found['tokens'], found['text_offset'], strict=True):
        assert token.startswith('token_id:') or choice['text'][offset:].lstrip().startswith(token.lstrip())
    assert [len(top) for top in found['top_logprobs'][1:]] == [1] * (len(found['tokens']) - 1)
    assert found['tokens'].count('token_id:1') == 1  # bos


@pytest.mark.parametrize('more', [{}, {'stop': ' fi'}, {'stop': ['é😀', 'x']}, {'echo': True}, {'n': 3}])
def test_a_stream_tells_what_the_whole_answer_tells(client, more):
    """Texts, reasons, tokens and usage, for each answer of several prompts; no half character."""
    body = {'prompt': ['the', 'a'], 'logprobs': None if 'echo' in more else 1} | more
    whole = client.post('/v1/completions', json=body).json()
    pieces = events(client.post('/v1/completions', json=body | {'stream': True,
                                                               'stream_options': {'include_usage': True}}))
    *pieces, last = pieces
    assert last['choices'] == [] and last['usage'] == whole['usage'] and all(p['usage'] is None for p in pieces)
    assert len({piece['id'] for piece in [*pieces, last]}) == 1 and '\ufffd' not in json.dumps(pieces)
    for expected in whole['choices']:
        mine = [piece['choices'][0] for piece in pieces if piece['choices'][0]['index'] == expected['index']]
        assert ''.join(piece['text'] for piece in mine) == expected['text'] and len(mine) > 2
        assert [piece['finish_reason'] for piece in mine] == [None] * (len(mine) - 1) + [expected['finish_reason']]
        if body['logprobs']:
            for key, values in expected['logprobs'].items():
                told = [value for piece in mine for value in (piece['logprobs'] or {}).get(key, [])]
                assert told == values or key == 'text_offset'


def test_a_choice_is_the_only_thing_that_can_come_out(client, thread, texts):
    """structured_outputs.choice: ids of each choice, and room for the longest."""
    body = {'prompt': 'a', 'structured_outputs': {'choice': ['the film', 'fine']}}
    assert client.post('/v1/completions', json=body).json()['choices'][0]['text'] == 'the film'
    work, = thread.works
    assert len(work.choices) == 2 and work.max_new_tokens == max(map(len, work.choices))
    for field, value in (('max_tokens', 1), ('stop', 'x'), ('ignore_eos', True)):
        answer = client.post('/v1/completions', json=body | {field: value})
        assert (answer.status_code, answer.json()['error']['param']) == (400, field)


# ---------------------------------------------------------------- chat


def test_a_chat_goes_through_the_template(client, thread, texts):
    """Text parts are joined; the answer may take what is left of seq_length; the template's stop texts are added."""
    body = {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'h'}, {'type': 'text', 'text': 'i'}]}],
            'logprobs': True, 'top_logprobs': 2}
    answer = client.post('/v1/chat/completions', json=body).json()
    work, = thread.works
    assert list(work.prompt_ids) == [1, *texts.tokenizer.encode('U: hiA: ')]
    assert work.max_new_tokens == 128 - len(work.prompt_ids) and work.stop == ('U: ',)
    choice, = answer['choices']
    assert choice['message'] == {'role': 'assistant', 'content': ANSWER, 'refusal': None}
    first, *_, last = choice['logprobs']['content']
    assert first['token'] == ' the' and bytes(first['bytes']) == b' the' and len(first['top_logprobs']) == 2
    assert answer['object'] == 'chat.completion' and len(choice['logprobs']['content']) == len(thread.answer)
    assert any(token['bytes'] is None for token in choice['logprobs']['content'])  # a byte of the emoji


def test_a_chat_streams(client):
    """The role first, then contents, then the reason; the same text."""
    first, *middle, last = events(client.post('/v1/chat/completions', json=HELLO | {'stream': True}))
    assert first['choices'][0]['delta'] == {'role': 'assistant', 'content': ''}
    assert ''.join(piece['choices'][0]['delta']['content'] for piece in middle) == ANSWER
    assert last['choices'][0] == {'index': 0, 'delta': {}, 'logprobs': None, 'finish_reason': 'stop'}
    assert {piece['object'] for piece in (first, *middle, last)} == {'chat.completion.chunk'}


@pytest.mark.parametrize('schema', [{'enum': ['film', 'fi"ne']}, {'type': 'string', 'enum': ['film', 'fi"ne']}])
def test_an_enum_is_answered_in_json(client, schema):
    """The content is valid JSON for the schema, as OpenAI's contract has it."""
    form = {'type': 'json_schema', 'json_schema': {'name': 'label', 'strict': True, 'schema': schema}}
    answer = client.post('/v1/chat/completions', json=HELLO | {'response_format': form}).json()
    assert json.loads(answer['choices'][0]['message']['content']) == 'film'


# ---------------------------------------------------------------- refusals

FORMAT = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {'type': 'object'}}}


@pytest.mark.parametrize('path, body, param, words', [
    ('completions', {'prompt': 'a', 'suffix': 'b'}, 'suffix', 'is no field of /v1/completions'),
    ('completions', {'prompt': 'a', 'n': 5}, 'n', 'a whole number from 1 to 4'),
    ('completions', {'prompt': 'a', 'n': True}, 'n', 'a whole number from 1 to 4'),
    ('completions', {'prompt': 'a', 'n': 2, 'best_of': 3}, 'best_of', 'best_of must be n'),
    ('completions', {'prompt': 'a', 'logprobs': 21}, 'logprobs', 'from 0 to 20'),
    ('completions', {'prompt': 'a', 'stop': ['a'] * 9}, 'stop', 'at most 8'),
    ('completions', {'prompt': 'a', 'stop': 'a' * 65}, 'stop', '1 to 64 characters'),
    ('completions', {'prompt': 'a', 'stop': ['']}, 'stop', '1 to 64 characters'),
    ('completions', {'prompt': 'a', 'presence_penalty': 0.1}, 'presence_penalty', 'no penalties here'),
    ('completions', {'prompt': 'a', 'logit_bias': {'x': 1}}, 'logit_bias', 'at most 64 token ids'),
    ('completions', {'prompt': 'a', 'logit_bias': {str(n): 1 for n in range(65)}}, 'logit_bias', 'at most 64'),
    ('completions', {'prompt': 'a', 'temperature': -1}, 'temperature', 'from 0 to 100'),
    ('completions', {'prompt': 'a', 'top_p': 0}, 'top_p', 'above 0'),
    ('completions', {'prompt': 'a', 'max_tokens': 0}, 'max_tokens', 'goes with echo=true'),
    ('completions', {'prompt': 'a', 'max_tokens': -1}, 'max_tokens', 'a whole number from 0'),
    ('completions', {'prompt': 'a', 'max_tokens': 127}, None, 'the prompt has 2 tokens'),
    ('completions', {'prompt': []}, 'prompt', 'a string, a list'),
    ('completions', {'prompt': [-1]}, 'prompt', 'a string, a list'),
    ('completions', {'prompt': [99999], 'echo': True, 'max_tokens': 0}, 'prompt', 'token ids must be from 0 to'),
    ('completions', {'prompt': [1.5]}, 'prompt', 'a string, a list'),
    ('completions', {'prompt': ['a', [1]]}, 'prompt', 'a string, a list'),
    ('completions', {'prompt': ['a'] * 65}, 'prompt', 'a string, a list of 1 to 64'),
    ('completions', {}, 'prompt', 'a string, a list'),
    ('completions', {'prompt': 'a', 'stream_options': {}}, 'stream_options', 'go with stream=true'),
    ('completions', {'prompt': 'a', 'stream': True, 'echo': True, 'logprobs': 1}, 'stream', 'cannot be streamed'),
    ('completions', {'prompt': 'a', 'structured_outputs': {'regex': '.*'}}, 'structured_outputs', '{"choice"'),
    ('completions', {'prompt': 'a', 'structured_outputs': {'choice': []}}, 'structured_outputs', '{"choice"'),
    ('chat/completions', HELLO | {'tools': []}, 'tools', 'is no field of /v1/chat/completions'),
    ('chat/completions', HELLO | {'chat_template': '{{ x }}'}, 'chat_template', 'is no field of'),
    ('chat/completions', HELLO | {'chat_template_kwargs': {}}, 'chat_template_kwargs', 'is no field of'),
    ('chat/completions', HELLO | {'top_logprobs': 1}, 'top_logprobs', 'go with logprobs=true'),
    ('chat/completions', HELLO | {'max_tokens': 1, 'max_completion_tokens': 2}, 'max_completion_tokens', 'differ'),
    ('chat/completions', HELLO | {'response_format': {'type': 'json_object'}}, 'response_format', '{"type": "text"}'),
    ('chat/completions', HELLO | {'response_format': FORMAT}, 'response_format', 'no other schema can be honoured'),
    ('chat/completions', {'messages': []}, 'messages', 'a list of 1 to'),
    ('chat/completions', {'messages': [{'role': 'tool', 'content': 'x'}]}, 'messages', 'role (system, user or'),
    ('chat/completions', {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'messages', 'content'),
    ('chat/completions', {'messages': [{'role': 'user', 'content': 'a', 'audio': {}}]}, 'messages', 'role'),
    ('chat/completions', {'messages': [{'role': 'user'}]}, 'messages', 'content'),
])
def test_what_cannot_be_honoured_is_refused_by_name(client, thread, path, body, param, words):
    """400 in OpenAI's form, in one line; nothing is asked of the engine."""
    answer = client.post(f'/v1/{path}', json=body)
    error = answer.json()['error']
    assert (answer.status_code, error['type'], error['param']) == (400, 'invalid_request_error', param)
    assert words in error['message'] and '\n' not in error['message'] and not thread.works


def test_other_refusals_have_openais_form(client, texts, thread):
    """Another model 404, a full line 429 before a stream begins, no JSON 400, no chat template 400."""
    def status(path='completions', **body):
        answer = client.post(f'/v1/{path}', json={'prompt': 'a'} | body)
        return answer.status_code, answer.json()['error']['code']

    assert status(model='gpt-9') == (404, 'model_not_found')
    thread.full = True
    assert status(stream=True) == (429, 'queue_full')
    bare = TestClient(make_app(thread, texts, OPTIONS), base_url='http://localhost')
    answer = bare.post('/v1/chat/completions', json=HELLO)
    assert answer.status_code == 400 and 'no chat template' in answer.json()['error']['message']
    assert bare.get('/info').json()['chat'] is False and client.get('/info').json()['chat'] is True


def test_a_fault_within_a_stream_is_its_last_event(client, thread):
    """The status is sent already: an error event, and no [DONE]."""
    thread.error = FloatingPointError('not finite')
    thread._stream = lambda ticket, index, work, on_event: on_event(index, thread.error)
    answer = client.post('/v1/completions', json={'prompt': 'a', 'stream': True})
    assert json.loads(answer.text.removeprefix('data: '))['error'] == {
        'message': 'not finite', 'type': 'server_error', 'param': None, 'code': None}


def test_a_silent_stream_is_kept_alive(client, thread, monkeypatch):
    """A comment now and then, which no reader takes for an answer."""
    monkeypatch.setattr(asking_file, 'KEEP_ALIVE_SECONDS', 0.02)
    thread.gate.clear()
    threading.Timer(0.2, thread.gate.set).start()
    text = client.post('/v1/completions', json={'prompt': 'a', 'stream': True}).text
    assert text.count(': waiting\n\n') >= 2 and text.endswith('data: [DONE]\n\n')


def test_tokens_of_a_text_and_back(client, texts):
    """With bos unless it is unwanted; `prompt` and `text` mean the same."""
    ids = texts.tokenizer.encode('the film')
    assert client.post('/tokenize', json={'text': 'the film'}).json() == {'tokens': [1, *ids], 'count': len(ids) + 1}
    assert client.post('/tokenize', json={'prompt': 'the film', 'add_special_tokens': False}).json()['tokens'] == ids
    assert client.post('/detokenize', json={'tokens': [1, *ids]}).json() == {'text': 'the film'}
    for body in ({}, {'text': 'a', 'prompt': 'a'}, {'text': None}):
        assert client.post('/tokenize', json=body).status_code == 400
    assert client.post('/detokenize', json={'tokens': [-1]}).status_code == 400


def test_the_openai_package_works_unchanged(client, texts):
    """Its client over this application: models, completions, chat, a stream, an error of its own kind."""
    ours = openai.OpenAI(base_url='http://localhost/v1', api_key='x', http_client=client, max_retries=0)
    assert [model.id for model in ours.models.list()] == ['tuned']
    assert ours.completions.create(model='tuned', prompt='a', logprobs=1).choices[0].text == ANSWER
    said = ours.chat.completions.create(model='tuned', messages=HELLO['messages'], logprobs=True, top_logprobs=1)
    assert said.choices[0].message.content == ANSWER and said.choices[0].logprobs.content[0].token == ' the'
    stream = ours.chat.completions.create(model='tuned', messages=HELLO['messages'], stream=True)
    assert ''.join(piece.choices[0].delta.content or '' for piece in stream) == ANSWER
    with pytest.raises(openai.BadRequestError, match='tools'):
        ours.chat.completions.create(model='tuned', messages=HELLO['messages'], tools=[])


# ---------------------------------------------------------------- adapters


def test_an_adapter_is_asked_by_its_name(texts, thread):
    """Its works have its number; its template, temperature and chat template are used; the rest is the model's."""
    tickets = PromptTemplate('Ticket: ', '\nTeam:', ' ', ('billing', 'network', 'other'))
    adapters = {'tickets': Variant(1, tickets, 2.0, plain_turns(OPTIONS)), 'bare': Variant(2, None)}
    client = TestClient(make_app(thread, texts, OPTIONS, {}, None, adapters), base_url='http://localhost')
    assert [model['id'] for model in client.get('/v1/models').json()['data']] == ['tuned', 'tickets', 'bare']
    assert client.get('/info').json()['models'] == ['tuned', 'tickets', 'bare']
    message = dict(messages=[dict(role='user', content='the film')])
    for model, number, chats in (('tuned', 0, 400), ('tickets', 1, 200), ('bare', 2, 400)):
        thread.works.clear()
        answer = client.post('/v1/completions', json=dict(prompt='the', model=model, n=2, echo=True, logprobs=1)).json()
        assert answer['model'] == model and {work.adapter for work in thread.works} == {number}
        assert len(thread.works) == 3  # two answers and the prompt's score
        assert client.post('/v1/chat/completions', json=message | dict(model=model)).status_code == chats
        assert {work.adapter for work in thread.works} == {number}
    thread.works.clear()
    found = client.post('/classify', json=dict(texts=['no signal'], model='tickets')).json()
    assert found['labels'] == ['billing', 'network', 'other'] and found['calibration_temperature'] == 2.0
    assert thread.works[0].adapter == 1 and len(thread.works[0].texts) == 3
    assert client.post('/classify', json=dict(texts=['no signal'], model='bare')).status_code == 400
    for path, body in (('/v1/completions', dict(prompt='a')), ('/classify', dict(texts=['a'])),
                       ('/v1/chat/completions', message)):
        answer = client.post(path, json=body | dict(model='other'))
        assert answer.status_code == 404 and "'tuned', 'tickets', 'bare' are served" in answer.text
