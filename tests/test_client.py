"""evaluation/client.py: batches, order, and errors that name the server."""
import http.server
import json
import threading

import pytest

from evaluation.client import Server


@pytest.fixture
def served():
    """(url, state): a server that answers with state['reply'](path, body), and notes what it was asked."""
    state = {'asked': [], 'busy': 0, 'reply': None}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            state['asked'].append((self.path, body))
            code, answer = (503, 'starting') if state['busy'] else state['reply'](self.path, body)
            state['busy'] = max(0, state['busy'] - 1)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(code)
            self.send_header('Retry-After', '0')
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.handle_error = lambda request, address: None  # a client that gave up is part of a test
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', state
    server.shutdown()
    server.server_close()


def lengths(path, body):
    """A model whose log-likelihood of a text is minus its length, and that answers with the prompt in capitals."""
    if path == '/generate':
        return 200, {'output_text': [text.upper() for text in body['prefix_text']]}
    texts = body['text']
    return 200, {'log_likelihood': [-float(len(text)) for text in texts], 'is_greedy': [False] * len(texts)}


def test_requests_are_batches_in_order(served):
    """Three texts in batches of two are two requests; temperature 0 is asked for."""
    url, state = served
    state['reply'], done = lengths, []
    server = Server(url + '/', batch_size=2)
    assert server.loglikelihood(['p', 'q', 'r'], ['a', 'bb', 'ccc'], done.append) == [
        (-1.0, False), (-2.0, False), (-3.0, False)]
    assert server.generate(['p', 'q', 'r']) == ['P', 'Q', 'R']
    assert state['asked'] == [('/loglikelihood', {'prefix_text': ['p', 'q'], 'text': ['a', 'bb']}),
                              ('/loglikelihood', {'prefix_text': ['r'], 'text': ['ccc']}),
                              ('/generate', {'prefix_text': ['p', 'q'], 'temperature': 0.0}),
                              ('/generate', {'prefix_text': ['r'], 'temperature': 0.0})]
    assert done == [2, 1]


def test_a_busy_server_is_asked_again(served):
    """503 and 429 are waited for, as long as Retry-After says."""
    url, state = served
    state['reply'], state['busy'] = lengths, 2
    assert Server(url, 4).generate(['p']) == ['P']
    assert len(state['asked']) == 3


@pytest.mark.parametrize('answer, message', [
    ((400, {'detail': 'too long'}), 'refused /generate: 400 Bad Request .*too long'),
    ((200, 'hello'), "answered /generate with no JSON: b'hello'"),
    ((200, {'output_text': ['one']}), "answered /generate without 2 'output_text'"),
    ((200, {'output_text': ['one', None]}), "answered /generate without 2 'output_text'"),
    ((200, ['one', 'two']), "answered /generate without 2 'output_text'"),
])
def test_an_answer_that_is_no_answer_names_the_server(served, answer, message):
    """One line with url, path and what came."""
    url, state = served
    state['reply'] = lambda path, body: answer
    with pytest.raises(ValueError, match=f"url='{url}' {message}"):
        Server(url, 4).generate(['p', 'q'])


def test_a_server_that_is_not_there_or_too_slow_is_named(served):
    """A refused connection and a timeout say what to look at."""
    with pytest.raises(ValueError, match=r"url='http://127.0.0.1:9' gave no answer to /generate: .*serve.py"):
        Server('http://127.0.0.1:9', 1).generate(['p'])
    url, state = served
    stop = threading.Event()
    state['reply'] = lambda path, body: (stop.wait(5), (200, {}))[1]
    with pytest.raises(ValueError, match='timed out.*within 0.2 s'):
        Server(url, 1, timeout=0.2).generate(['p'])
    stop.set()


def test_what_is_no_url_is_refused():
    """A missing scheme is found before anything is sent."""
    with pytest.raises(ValueError, match="url='localhost:5007' must begin with http://"):
        Server('localhost:5007', 1)


def test_answers_say_whether_they_were_cut_and_prompts_whether_they_lost_something(served):
    """Ours says both; EasyLM's says neither, which is None."""
    url, state = served
    ours = {'finish_reason': ['stop', 'length'], 'truncated': [False, True]}
    for added, told in ((ours, [(False, False), (True, True)]), ({}, [(None, None)] * 2)):
        state['reply'] = lambda path, body, added=added: (200, {'output_text': ['A', 'B']} | added)
        state['asked'], done = [], []
        found = Server(url, batch_size=2).continued(['a', 'b'], [[], ['.']], 7, done.append)
        assert found == [(text, *said) for text, said in zip('AB', told, strict=True)] and done == [2]
        assert state['asked'] == [('/greedy-until', {'prefix_text': ['a', 'b'], 'until': [[], ['.']], 'max_length': 7})]
