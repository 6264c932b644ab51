"""The `openai` package, unchanged, against a server (pip install openai).

PALLAMA_OPENAI_URL=http://127.0.0.1:5007 puts the same questions to a server that runs (serve.py of a chat model);
without it they go to one that answers as OpenAI's documents say, so that the questions themselves are held to the
package.
"""
import http.server
import json
import os
import threading

import pytest

openai = pytest.importorskip('openai', reason='pip install openai')


class Fake(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer({'object': 'list', 'data': [{'id': 'm', 'object': 'model', 'created': 1, 'owned_by': 'me'}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if body['model'] != 'm':
            return self.answer({'error': {'message': 'no such model', 'type': 'invalid_request_error', 'param': 'model',
                                          'code': None}}, 404)
        chat = self.path == '/v1/chat/completions'
        words = ['one', ' two', ' three'][:body['max_tokens']]
        usage = {'prompt_tokens': 4, 'completion_tokens': len(words), 'total_tokens': 4 + len(words)}
        common = {'id': 'x', 'created': 1, 'model': 'm'}
        name = 'chat.completion' if chat else 'text_completion'

        def choice(text, end, field='message'):
            said = {field: {'role': 'assistant', 'content': text}} if chat else {'text': text}
            return {'index': 0, 'finish_reason': end, 'logprobs': None, **said}

        if not body.get('stream'):
            choices = [choice(''.join(words), 'length')]
            return self.answer({**common, 'object': name, 'usage': usage, 'choices': choices})
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.end_headers()
        events = [{'choices': [choice(word, 'length' if word is words[-1] else None, 'delta')]} for word in words]
        events += [{'choices': [], 'usage': usage}]
        for event in events:
            event = {**common, 'object': name + '.chunk' * chat, **event}
            self.wfile.write(f'data: {json.dumps(event)}\n\n'.encode())
        self.wfile.write(b'data: [DONE]\n\n')

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope='module')
def client():
    server = None
    url = os.environ.get('PALLAMA_OPENAI_URL')
    if not url:
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Fake)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
    with openai.OpenAI(base_url=f'{url}/v1', api_key=os.environ.get('PALLAMA_OPENAI_KEY', 'none'),
                       max_retries=0) as made:
        yield made
    if server:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope='module')
def model(client):
    return client.models.list().data[0].id


def test_a_stream_of_a_completion_is_its_text(client, model):
    asked = dict(model=model, prompt='One two three', max_tokens=3, temperature=0)
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True, stream_options={'include_usage': True}))
    assert whole.choices[0].text and whole.object == 'text_completion'
    assert ''.join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage == whole.usage and whole.usage.completion_tokens <= 3
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[0].finish_reason


def test_a_stream_of_a_chat_is_its_text(client, model):
    asked = dict(model=model, messages=[{'role': 'user', 'content': 'Say three words.'}], max_tokens=3, temperature=0)
    whole = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(**asked, stream=True))
    said = ''.join(part.choices[0].delta.content or '' for part in parts if part.choices)
    assert said == whole.choices[0].message.content and whole.choices[0].message.role == 'assistant'
    assert parts[0].object == 'chat.completion.chunk'


def test_a_refusal_is_the_package_s_own_error(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model='no such model', prompt='One', max_tokens=1)
    assert error.value.body['type'] == 'invalid_request_error'
