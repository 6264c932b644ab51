"""Send a server 10,000 bodies that it should refuse: none fails or hangs.  Neighbour: serving_soak.py.

  pip install --target=DIR schemathesis
  python -m instruments.bench.serving_bad_bodies --schemathesis=DIR --output=runs/serving_bad_bodies.json

serve.py of this checkout serves the small model of tests/golden/easylm.  Every POST endpoint of its /openapi.json gets
as many bodies: in five parts one is what schemathesis makes against the endpoint's schema (each body once), the others
are valid bodies with one mistake, drawn from MUTATIONS; some remain valid (a long text is no mistake) and are answered.
schemathesis is no dependency of the project: without --schemathesis all bodies are mutations.

Reported: answers for each status; bodies that got 5xx, no answer within 60 s, or a refusal that is not one line of JSON
in the form the server promises; /ready, programs compiled and places still taken afterwards; resident memory after the
valid bodies alone, after the first half and at the end.  The same seed gives the same bodies.
"""
import argparse
import collections
import concurrent.futures
import copy
import functools
import http.client
import json
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

from instruments.bench.serving_machine import taken
from instruments.bench.serving_ratios import server_process
from instruments.bench.serving_soak import gauges
from mistake import Mistake

GOLDEN = 'tests/golden/easylm'
MODEL = f'params::{GOLDEN}/streaming_params_trained'
FLAGS = (f'--load_llama_config=json::{GOLDEN}/model.json', f'--tokenizer.vocab_file={GOLDEN}/tokenizer.model',
         '--lm_server.chat_template=plain', '--input_length=64', '--seq_length=80')
PATIENCE, CLIENTS = 60.0, 8
JSON = {'Content-Type': 'application/json'}
VALID = {
    '/generate': [{'prefix_text': ['a fine film', 'dull'], 'temperature': 0.5}],
    '/greedy-until': [{'prefix_text': ['a film', 'b'], 'until': ['.', ['\n', ' the']], 'max_length': 8}],
    '/chat': [{'prompt': 'hello', 'context': 'before', 'temperature': 0.0}],
    '/loglikelihood': [{'prefix_text': ['a fine'], 'text': [' film']}, {'text': ['a', 'b']}],
    '/loglikelihood-rolling': [{'text': ['a fine film', 'b']}],
    '/classify': [{'texts': ['fine', 'dull'], 'labels': ['Negative', 'Positive'], 'template': 'T: {text}\nS:',
                   'threshold': 0.5}],
    '/v1/completions': [
        {'prompt': 'a fine film', 'max_tokens': 4, 'temperature': 0.7, 'top_p': 0.9, 'top_k': 5, 'seed': 1, 'n': 2,
         'stop': ['.', '!'], 'logit_bias': {'7': -5}, 'logprobs': 2, 'echo': True},
        {'prompt': [[5, 6], [7]], 'max_tokens': 3, 'stream': True, 'stream_options': {'include_usage': True}},
        {'prompt': ['a'], 'structured_outputs': {'choice': [' yes', ' no']}, 'min_p': 0.1, 'ignore_eos': None}],
    '/v1/chat/completions': [
        {'messages': [{'role': 'system', 'content': 'be short'}, {'role': 'user', 'content': 'hello'}],
         'max_tokens': 4, 'temperature': 0, 'logprobs': True, 'top_logprobs': 2},
        {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}], 'response_format': {
            'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': {'enum': ['yes', 'no']}}}}],
    '/tokenize': [{'text': 'a fine film', 'add_special_tokens': True}],
    '/detokenize': [{'tokens': [5, 6, 7]}],
}


class Case(NamedTuple):
    """A request.  sent: bytes of the body after which the client goes away; None: it waits for the answer."""

    path: str
    kind: str
    headers: dict[str, str]
    body: bytes
    sent: int | None = None


# ---------------------------------------------------------------- mutations


class Raw(str):
    """A text that stands in the JSON as it is, without quotation marks."""


def written(value) -> bytes:
    """Write JSON, Raw texts as they are."""
    raws = []

    def marked(value):
        if isinstance(value, Raw):
            raws.append(value)
            return f'<raw {len(raws) - 1}>'
        if isinstance(value, dict):
            return {key: marked(one) for key, one in value.items()}
        return [marked(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(marked(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"<raw {number}>"', raw)
    return text.encode()


def places(value, at=()) -> list[tuple]:
    """The path of every value inside; () is the whole."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


def found(body, place: tuple):
    return functools.reduce(lambda value, key: value[key], place, body)


def replaced(body, place: tuple, value):
    """A copy with another value at a place."""
    if not place:
        return value
    body = copy.deepcopy(body)
    found(body, place[:-1])[place[-1]] = value
    return body


def anywhere(values):
    """The mutation that puts one of `values(draw)` in the place of any value."""
    def mutation(body, draw: random.Random) -> dict:
        return {'body': written(replaced(body, draw.choice(places(body)), values(draw)))}
    return mutation


def another_type(draw: random.Random):
    return draw.choice([None, True, False, 0, 1, -1, 0.5, '', 'x', '1', [], {}, [None], [[]], ['x'], [1], {'x': 1},
                        {'': None}, [['x']], [{}], '\x00', '\ufeff', '{text}'])


def strange_number(draw: random.Random):
    return draw.choice([2**31, 2**32, 2**53 + 1, 2**63, -2**63, 10**30, 10**400, -1, -0.0, 1e-320, 1.5, 101,
                        Raw('1e999'), Raw('-1e999'), Raw('9' * 5000), Raw('0.' + '3' * 5000), Raw('1E400'), Raw('01'),
                        Raw('+1'), Raw('1.'), Raw('.5'), Raw('0x10'), Raw('1_000')])


def no_number(draw: random.Random):
    return Raw(draw.choice(['NaN', 'Infinity', '-Infinity', 'nan', 'undefined', 'None', 'True', "'x'"]))


def nested(draw: random.Random):
    depth, open_, close = draw.choice([8, 31, 33, 100, 1000, 50_000]), *draw.choice([('[', ']'), ('{"a":', '}')])
    return Raw(open_ * depth + draw.choice(['0', '"x"', 'null']) + close * draw.choice([depth, depth, 0]))


def long_value(draw: random.Random):
    size = draw.choice([65, 1001, 5000, 20_000])
    return draw.choice([lambda: 'x' * size, lambda: 'ab ' * size, lambda: '\u4f60' * size, lambda: '\n' * size,
                        lambda: [0] * size, lambda: [[]] * size, lambda: {str(key): 0 for key in range(size)},
                        lambda: Raw('"' + '\\u0041' * size + '"'), lambda: '{text}' * size])()


def strange_text(draw: random.Random):
    return Raw('"' + draw.choice(['\\ud800', '\\udc00x', '\\ud83d', '\\u0000', '\\ud83d\\ude00', '\\uZZZZ', '\\x41',
                                  '\t', '\\', '<|im_end|>', '<|im_start|>system\\n', '</s>', '{{7*7}}', '%s%n',
                                  '../../etc/passwd', '\\u202e', 'e' + '\u0301' * 500]) + '"')


def broken_utf8(body, draw: random.Random) -> dict:
    raw = written(body)
    place = draw.randrange(len(raw))
    return {'body': raw[:place] + draw.choice([b'\xff', b'\xfe\xff', b'\xc0\xaf', b'\xed\xa0\x80', b'\x80',
                                               b'\xf4\x90\x80\x80', b'\xe4\xbd']) + raw[place:]}


def other_encoding(body, draw: random.Random) -> dict:
    text = written(body).decode()
    return {'body': text.encode(draw.choice(['utf-16', 'utf-16-le', 'utf-32', 'utf-8-sig', 'utf-7', 'cp037']))}


def truncated(body, draw: random.Random) -> dict:
    raw = written(body)
    return {'body': raw[:draw.randrange(len(raw))]}


def doubled(body, draw: random.Random) -> dict:
    """The whole twice, or more behind it."""
    raw = written(body)
    return {'body': raw + draw.choice([raw, b',', b'}', b'\x00', b'\n{}', b' null', b'//'])}


def flipped(body, draw: random.Random) -> dict:
    raw = bytearray(written(body))
    for _ in range(draw.randint(1, 4)):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return {'body': bytes(raw)}


def noise(body, draw: random.Random) -> dict:
    return {'body': draw.randbytes(draw.choice([0, 1, 10, 1000]))}


def key_again(body, draw: random.Random) -> dict:
    """A key twice, with another value."""
    key = draw.choice(list(body))
    return {'body': b'{' + json.dumps(key).encode() + b': ' + written(another_type(draw)) + b', ' + written(body)[1:]}


def key_gone(body, draw: random.Random) -> dict:
    key = draw.choice(list(body))
    return {'body': written({other: value for other, value in body.items() if other != key})}


def key_more(body, draw: random.Random) -> dict:
    owners = [place for place in places(body) if isinstance(found(body, place), dict)]
    place = draw.choice(owners)
    key = draw.choice(['', 'x', '__proto__', '__class__', 'model', 'self', 'body', 'request', 'k' * 1000, '\n', 'é',
                       'n', 'user', 'stream', 'best_of', 'suffix', 'tools', 'guided_json', 'presence_penalty'])
    return {'body': written(replaced(body, place, found(body, place) | {key: another_type(draw)}))}


def wrong_headers(body, draw: random.Random) -> dict:
    return {'headers': draw.choice([
        {}, {'Content-Type': ''}, {'Content-Type': 'text/plain'}, {'Content-Type': 'application/xml'},
        {'Content-Type': 'application/x-www-form-urlencoded'}, {'Content-Type': 'multipart/form-data; boundary=x'},
        {'Content-Type': 'application/jsonp'}, {'Content-Type': 'application/json;'},
        {'Content-Type': 'application/json; charset=utf-16'}, JSON | {'Content-Encoding': 'gzip'},
        JSON | {'Content-Encoding': 'br'}, JSON | {'Accept': 'text/html'}, JSON | {'Host': 'evil.example'},
        JSON | {'Host': ''}, JSON | {'Transfer-Encoding': 'gzip'}, JSON | {'Expect': '100-continue'},
        JSON | {'Authorization': 'Bearer x'}, JSON | {'X': 'y' * 15_000}, JSON | {'X': 'y' * 40_000}])}


def too_large(body, draw: random.Random) -> dict:
    """More than the server's 4,000,000 bytes."""
    return {'body': written(body) + b' ' * 4_000_001}


def gone(body, draw: random.Random) -> dict:
    """The client leaves before it has sent all."""
    return {'sent': draw.randrange(len(written(body)))}


MUTATIONS = {
    'another type': anywhere(another_type), 'strange number': anywhere(strange_number),
    'no JSON number': anywhere(no_number), 'nested deep': anywhere(nested), 'long': anywhere(long_value),
    'strange text': anywhere(strange_text), 'broken UTF-8': broken_utf8, 'other encoding': other_encoding,
    'truncated': truncated, 'more behind it': doubled, 'bytes flipped': flipped, 'noise': noise,
    'key twice': key_again, 'key missing': key_gone, 'key unknown': key_more, 'headers': wrong_headers,
    'too large': too_large, 'client leaves': gone}
RARE = {'too large': 0.3}  # beside 1 of the others


def mutations(path: str, count: int, seed: int) -> list[Case]:
    """Make so many bodies with a mistake for an endpoint."""
    draw, cases = random.Random(f'{seed} {path}'), []
    kinds = draw.choices(list(MUTATIONS), [RARE.get(kind, 1.0) for kind in MUTATIONS], k=count)
    for kind in kinds:
        body = draw.choice(VALID[path])
        cases.append(Case(path, kind, **({'headers': JSON, 'body': written(body)} | MUTATIONS[kind](body, draw))))
    return cases


def schema_cases(document: dict, path: str, count: int, seed: int, where: str) -> list[Case]:
    """Make bodies against the schema of an endpoint, each once; fewer where schemathesis finds no more.

    where: the directory of schemathesis.
    """
    sys.path.append(where)  # not PYTHONPATH: the server has its own packages
    try:
        import hypothesis
        import schemathesis
    except ImportError:
        raise Mistake(f'schemathesis is not in {where!r}: pip install --target={where} schemathesis') from None
    bodies = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=2 * count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(schemathesis.openapi.from_dict(document)[path]['POST'].as_strategy(
        generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def keep(case):
        body = case.body if isinstance(case.body, bytes) else json.dumps(
            None if isinstance(case.body, schemathesis.core.NotSet) else case.body).encode()
        bodies[body] = None

    keep()
    return [Case(path, 'schemathesis', JSON, body) for body in list(bodies)[:count]]


# ---------------------------------------------------------------- asking


class Answer(NamedTuple):
    """What came: the status, 0 without one; what is wrong with it, '' where nothing is; seconds."""

    status: int
    fault: str = ''
    seconds: float = 0.0


def ask(port: int, case: Case) -> Answer:
    """Send a case and judge the answer."""
    began = time.monotonic()
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE)
    try:
        connection.putrequest('POST', case.path, skip_host='Host' in case.headers, skip_accept_encoding=True)
        for name, value in case.headers.items():
            connection.putheader(name, value)
        connection.putheader('Content-Length', str(len(case.body)))
        connection.endheaders()
        try:
            connection.send(case.body[:case.sent])
        except ConnectionError:
            pass  # refused before it was read: the answer says so
        if case.sent is not None:
            return Answer(0)
        response = connection.getresponse()
        kind, body = response.getheader('Content-Type', ''), response.read()
        fault = judged(case, response.status, kind, body)
        return Answer(response.status, fault, time.monotonic() - began)
    except TimeoutError:
        return Answer(0, f'no answer within {PATIENCE:g} s', time.monotonic() - began)
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, type(error).__name__, time.monotonic() - began)
    finally:
        connection.close()


def judged(case: Case, status: int, kind: str, body: bytes) -> str:
    """Say what is wrong with an answer; '' where nothing is."""
    if status >= 500:
        return f'status {status}'
    if kind.startswith('text/event-stream'):
        events = [line for line in body.split(b'\n') if line.startswith(b'data:')]
        whole = events and events[-1] == b'data: [DONE]' and not any(event[5:].strip().startswith(b'{"error"')
                                                                     for event in events)
        return '' if whole else 'a stream without its end'
    if kind == 'text/plain; charset=utf-8' and status == 400 and body == b'Invalid HTTP request received.':
        return ''  # of uvicorn: what was sent is not HTTP
    try:
        content = json.loads(body)
    except ValueError:
        return 'an answer that is no JSON'
    if status < 300:
        return ''
    message = content.get('error', {}).get('message') if case.path.startswith('/v1/') else content.get('detail')
    if not isinstance(message, str) or not message or '\n' in message or len(message) > 1000:
        return 'a refusal that is not one line'
    return ''


def report(cases: list[Case], answers: list[Answer]) -> dict:
    """Count statuses (of all, of each kind of case) and faults; give the first case of each fault."""
    kinds, faults = collections.defaultdict(collections.Counter), {}
    for case, answer in zip(cases, answers, strict=True):
        status = 'left' if case.sent is not None else str(answer.status)
        kinds[case.kind][status] += 1
        if answer.fault:
            first = faults.setdefault(answer.fault, {'count': 0, 'path': case.path, 'kind': case.kind,
                                                     'headers': case.headers, 'bytes': len(case.body),
                                                     'body': repr(case.body[:300])})
            first['count'] += 1
    statuses = sum(kinds.values(), collections.Counter())
    return {'bodies': len(cases), 'endpoints': len({case.path for case in cases}),
            'statuses': dict(sorted(statuses.items())), 'faults': faults,
            'slowest_seconds': round(max(answer.seconds for answer in answers), 2),
            'kinds': {kind: dict(sorted(counts.items())) for kind, counts in sorted(kinds.items())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--count', type=int, default=10_000, help='bodies in all')
    parser.add_argument('--schemathesis', default='', help='directory of schemathesis; empty: mutations alone')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', default='runs/serving_bad_bodies.json')
    arguments = parser.parse_args()
    with server_process(MODEL, *FLAGS) as (port, process):
        connection = http.client.HTTPConnection('127.0.0.1', port)
        connection.request('GET', '/openapi.json')
        document = json.loads(connection.getresponse().read())
        paths = [path for path, methods in document['paths'].items() if 'post' in methods]
        if set(paths) != set(VALID):
            raise Mistake(f'POST endpoints {sorted(set(paths) ^ set(VALID))} are in VALID or in /openapi.json alone')
        for path, bodies in VALID.items():
            for body in bodies:
                if (answer := ask(port, Case(path, 'valid', JSON, written(body)))).status != 200 or answer.fault:
                    raise Mistake(f'{path} answers {answer} to the valid body {body}')
        cases = []
        for path in paths:
            each = arguments.count // len(paths)
            where = arguments.schemathesis
            made = schema_cases(document, path, each // 5, arguments.seed, where) if where else []
            cases += [*made, *mutations(path, each - len(made), arguments.seed)]
            print(f'{path}: {len(made)} bodies of schemathesis, {each - len(made)} mutations', flush=True)
        random.Random(arguments.seed).shuffle(cases)
        rss, answers, began = [taken(process.pid)[0]], [], time.monotonic()
        for part in cases[:len(cases) // 2], cases[len(cases) // 2:]:
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                answers += pool.map(functools.partial(ask, port), part)
            rss.append(taken(process.pid)[0])
            print(f'{len(answers)} answers in {time.monotonic() - began:.0f} s', flush=True)
        time.sleep(5)  # for the server to see the last clients leave
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE)
        connection.request('GET', '/ready')
        end = gauges(port)
        row = {**report(cases, answers), 'minutes': round((time.monotonic() - began) / 60, 1),
               'ready_after': connection.getresponse().status,
               'jit_compiles_after_ready': int(end['jit_compiles_after_ready']), 'slots_leaked': int(end['active']),
               'waiting_leaked': int(end['waiting']), 'in_flight_leaked': int(end['in_flight']) - 1,  # /metrics itself
               'rss_mb': [round(each / 1e6, 1) for each in rss]}
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(row, indent=1) + '\n')
    print({key: value for key, value in row.items() if key != 'kinds'})


if __name__ == '__main__':
    main()
