"""client.py: a large file put to a server that is busy, goes away and comes back; the file of answers goes on."""
import http.server
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

import client
from mistake import Mistake
from program import flags, parse

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = [f'film {number}' for number in range(10)]


class Fake(http.server.ThreadingHTTPServer):
    """Answers like a model that thinks every film with an even number positive; `fault(n)` may spoil the n-th request:
    an HTTP status, 'drop' for a connection that ends, or None.  `most` is how many requests were under way at once."""

    daemon_threads = True

    def __init__(self):
        self.asked, self.keys, self.fault, self.delay = [], set(), lambda n: None, 0.0
        self.now, self.most, self.guard = 0, 0, threading.Lock()
        super().__init__(('127.0.0.1', 0), Handler)

    def handle_error(self, request, address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        fake, body = self.server, json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with fake.guard:
            fake.asked.append((self.path, body))
            fake.keys.add(self.headers['Authorization'])
            fake.now += 1
            fake.most, number = max(fake.most, fake.now), len(fake.asked)
        time.sleep(fake.delay)
        fault = fake.fault(number)
        with fake.guard:
            fake.now -= 1
        if fault == 'drop':
            self.connection.close()
            return
        if self.path == '/generate':
            answer = {'output_text': [f' {label(prompt)}!' for prompt in body['prefix_text']]}
        else:
            answer = {'results': [{'label': label(text), 'probability': 0.75, 'probabilities': {label(text): 0.75}}
                                  for text in body['texts']]}
        data = json.dumps(answer if fault is None else {'detail': 'no'}).encode()
        self.send_response(fault or 200)
        self.send_header('Retry-After', '0')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def label(text: str) -> str:
    number = int(''.join(filter(str.isdigit, text)))
    return ('Negative', 'Positive')[number % 2 == 0]


@pytest.fixture
def fake():
    server = Fake()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def data(tmp_path):
    """What prepare_data.py writes of ten films, the first five of which are positive: six are labelled rightly."""
    import prepare_data
    source = tmp_path / 'films.jsonl'
    source.write_text(''.join(json.dumps({'text': text, 'label': int(number < 5)}) + '\n'
                              for number, text in enumerate(TEXTS)))
    prepare_data.main(parse.parse(['prepare_data.py', f'--input={source}', f'--output={tmp_path}/data',
                                   '--shuffle=False'], flags.PREPARE, ''))
    return tmp_path / 'data'


def run(fake, file, *arguments):
    client.main(parse.parse(['client.py', f'--input={file}', f'--url=http://127.0.0.1:{fake.server_port}',
                             '--batch_size=3', *arguments], flags.CLIENT, ''))


def answers(file: pathlib.Path) -> tuple[dict, list[dict]]:
    head, *rows = map(json.loads, file.read_text().splitlines())
    return head, sorted(rows, key=lambda row: row['question'])


def test_every_prompt_of_the_article_s_request_is_asked_once(fake, data, capsys):
    """In batches; the answers stand in the file with their numbers, and the labels beside it give the accuracy."""
    run(fake, data / 'eval_films.json', '--temperature=0.5')
    prompts = json.loads((data / 'eval_films.json').read_text())['prefix_text']
    assert sorted(body['prefix_text'] for _, body in fake.asked) == sorted(
        prompts[i:i + 3] for i in range(0, 10, 3))
    assert {body['temperature'] for _, body in fake.asked} == {0.5}
    head, rows = answers(data / 'answers_films.jsonl')
    assert rows == [{'question': n, 'output_text': f' {label(prompts[n])}!'} for n in range(10)]
    assert (head['questions'], head['method']) == (10, 'generate')
    out = capsys.readouterr().out
    assert 'accuracy 60.00% (6 of 10' in out and f'wrote 10 answers to {data}/answers_films.jsonl' in out


def test_records_ask_for_the_same_as_the_request(fake, data, capsys):
    run(fake, data / 'films.jsonl', f'--output={data}/other/a.jsonl')
    run(fake, data / 'eval_films.json')
    assert answers(data / 'other/a.jsonl')[1] == answers(data / 'answers_films.jsonl')[1]


@pytest.mark.parametrize('name', ['films.jsonl', 'eval_films.json'])
def test_classify_sends_texts_with_the_labels_and_the_template_of_the_file(fake, data, capsys, name):
    run(fake, data / name, '--method=classify')
    assert sorted(text for _, body in fake.asked for text in body['texts']) == sorted(TEXTS)
    assert all(path == '/classify' and body['labels'] == ['Negative', 'Positive']
               and body['template'] == '[Text]: {text}\n[Sentiment]:' for path, body in fake.asked)
    assert answers(data / 'classes_films.jsonl')[1][4] == {
        'question': 4, 'label': 'Positive', 'probability': 0.75, 'probabilities': {'Positive': 0.75}}
    assert 'accuracy 60.00%' in capsys.readouterr().out


def test_several_requests_are_under_way_and_no_more_than_said(fake, data):
    fake.delay = 0.1
    run(fake, data / 'eval_films.json', '--batch_size=1', '--parallel=3')
    assert fake.most == 3


def test_a_busy_server_and_a_lost_connection_are_waited_for(fake, data, monkeypatch, capsys):
    """429, 503 and a connection that ends without an answer: all ten answers come once, the waits are told."""
    waited = []
    monkeypatch.setattr('evaluation.client.time.sleep', lambda seconds: waited.append(seconds))
    fake.fault = lambda n: {2: 429, 3: 503, 4: 'drop', 5: 'drop'}.get(n)
    run(fake, data / 'eval_films.json', '--parallel=1')
    assert len(answers(data / 'answers_films.jsonl')[1]) == 10 and len(fake.asked) == 8
    assert [wait for wait in waited if wait] == [4.0, 8.0]  # Retry-After is 0, the lost ones back off: 2 ** attempt
    told = capsys.readouterr().err
    assert '429 Too Many Requests; again in 0 s' in told and 'connection lost' in told


def test_a_server_that_never_answered_is_named_at_once(data):
    with pytest.raises(Mistake, match="url='http://127.0.0.1:9' gave no answer"):
        client.main(parse.parse(['client.py', f'--input={data}/eval_films.json', '--url=http://127.0.0.1:9'],
                                flags.CLIENT, ''))


def test_what_was_answered_is_not_asked_again(fake, data, capsys):
    """A refusal ends the run with the command to go on; the next run asks the rest alone, past a torn last line."""
    fake.fault = lambda n: 400 if n == 3 else None
    with pytest.raises(Mistake, match='refused /generate: 400'):
        run(fake, data / 'eval_films.json', '--parallel=1')
    output = data / 'answers_films.jsonl'
    assert [row['question'] for row in answers(output)[1]] == [0, 1, 2, 3, 4, 5]
    assert f'6 of 10 answers are in {output}; to go on:\n  python ' in capsys.readouterr().err
    with output.open('a') as file:
        file.write('{"question": 6, "outp')
    fake.fault, fake.asked = lambda n: None, []
    run(fake, data / 'eval_films.json')
    assert sorted(len(body['prefix_text']) for _, body in fake.asked) == [1, 3]
    assert [row['question'] for row in answers(output)[1]] == list(range(10))
    assert '4 answers' in capsys.readouterr().out
    fake.asked = []
    run(fake, data / 'eval_films.json')
    assert not fake.asked


@pytest.mark.parametrize('change, says', [
    (lambda data: (data / 'films.jsonl').write_text('{"prompt": "film 1"}\n') and (data / 'labels_films.json').unlink(),
     'its answers are for sha256'),
    (lambda data: (data / 'answers_films.jsonl').write_text('{"a": 1}\n'), 'is no file of answers'),
    (lambda data: (data / 'answers_films.jsonl').write_text('hello\n'), 'is no file of answers'),
    (lambda data: (data / 'answers_films.jsonl').open('a').write('{"question": 3}\n'), 'is no answer of its own'),
])
def test_answers_of_something_else_are_never_gone_on_with(fake, data, change, says):
    run(fake, data / 'films.jsonl')
    change(data)
    before = (data / 'answers_films.jsonl').read_text()
    with pytest.raises(Mistake, match=f'output=.*answers_films.jsonl.*{says}'):
        run(fake, data / 'films.jsonl')
    assert (data / 'answers_films.jsonl').read_text() == before


def test_other_settings_are_another_file(fake, data):
    run(fake, data / 'eval_films.json')
    with pytest.raises(Mistake, match='temperature 0.0, not 1.0'):
        run(fake, data / 'eval_films.json', '--temperature=1')


def test_two_clients_do_not_write_one_file(fake, data):
    with (data / 'answers_films.jsonl').open('a') as file:
        client.lock(file)
        with pytest.raises(Mistake, match='is being written by another client.py'):
            run(fake, data / 'eval_films.json')


def test_the_key_is_read_from_a_file_and_sent(fake, data, tmp_path):
    (tmp_path / 'key').write_text('s3cret\n')
    run(fake, data / 'eval_films.json', f'--api_key_file={tmp_path}/key')
    assert fake.keys == {'Bearer s3cret'}
    (tmp_path / 'key').write_text('two words\n')
    with pytest.raises(Mistake, match='api_key_file=.*one key'):
        run(fake, data / 'eval_films.json', f'--api_key_file={tmp_path}/key', f'--output={tmp_path}/x')


@pytest.mark.parametrize('name, content, method, says', [
    ('a.json', '{"prefix_text": []}', 'generate', 'must be {"prefix_text"'), ('a.json', '[1', 'generate', 'no JSON'),
    ('a.json', '{"prefix_text": ["film 1"]}', 'classify', 'sends texts, these are prompts'),
    ('a.jsonl', '\n{"text": "x"}\n', 'generate', "a.jsonl:2: method='generate' needs a text 'prompt'"),
    ('a.jsonl', '{"text": "x", "prompt": "x", "answer": "y"}', 'classify', 'a.jsonl:1: a record of prepare_data.py'),
    ('a.jsonl', '{', 'generate', 'a.jsonl:1: no JSON'), ('a.jsonl', '\n', 'generate', 'no questions in it'),
])
def test_a_file_without_questions_is_refused_by_line(fake, tmp_path, name, content, method, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(Mistake, match=says):
        run(fake, tmp_path / name, f'--method={method}')
    assert not fake.asked


def test_lines_with_labels_of_their_own_give_an_accuracy(fake, tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text('{"text": "film 2", "label": "Positive"}\n'
                                      '{"text": "film 4", "label": "Negative"}')
    run(fake, tmp_path / 'a.jsonl', '--method=classify')
    assert fake.asked[0][1] == {'texts': ['film 2', 'film 4']}  # the model's own labels
    assert 'accuracy 50.00% (1 of 2' in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(fake, data):
    """The program itself, the file as its only argument; the same command ends the work."""
    fake.fault = lambda n: time.sleep(60) if n > 2 else None
    command = [sys.executable, str(ROOT / 'client.py'), str(data / 'eval_films.json'), '--batch_size=3', '--parallel=1',
               f'--url=http://127.0.0.1:{fake.server_port}']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                               env={**os.environ, 'PYTHONUNBUFFERED': '1'})
    output, end = data / 'answers_films.jsonl', time.monotonic() + 60
    while time.monotonic() < end and len(fake.asked) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and f'6 of 10 answers are in {output}; to go on:\n  python ' in told
    assert [row['question'] for row in answers(output)[1]] == [0, 1, 2, 3, 4, 5]
    fake.fault, fake.asked = lambda n: None, []
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 0 and 'accuracy 60.00%' in ended.stdout and len(fake.asked) == 2
