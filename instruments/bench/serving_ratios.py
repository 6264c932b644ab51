"""Measure a server against itself: what sharing, slots, abandoned requests and labels cost.  Neighbour: serving.py.

  python -m instruments.bench.serving_ratios --model=CHECKPOINT --reviews=test.jsonl --output=runs/serving_ratios.json

Each ratio is of medians within one run, the two sides in turn, five times:
  together   16 requests of one prompt at a time / one request of 16 prompts
  slots      one prompt where 16 slots are / where one is
  abandoned  a prompt sent when a client of 32 prompts has just left / the same prompt, alone
and the reviews through /generate, through /classify, and in EasyLM's way, which pads every prompt to 1,024 tokens and
computes one at a time: our own engine does 6 reviews so, and the time of all is that multiplied.
"""
import argparse
import concurrent.futures
import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
from model.config import Compute
from model.partition import make_mesh
from serving.engine import make_engine
from serving.texts import Texts

REPEATS = 5


@contextlib.contextmanager
def server(model: str, *flags: str):
    """Run serve.py on a free port until the block ends; yields the port when it is ready."""
    with server_process(model, *flags) as (port, _):
        yield port


@contextlib.contextmanager
def server_process(model: str, *flags: str):
    """The same; yields (port, process)."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, 'serve.py', f'--load_checkpoint={model}', f'--lm_server.port={port}',
                                *flags], stdout=subprocess.DEVNULL)
    try:
        while not ready(port):
            if process.poll() is not None:
                raise SystemExit(f'serve.py ended with {process.returncode}')
            time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        process.wait()


def ready(port: int) -> bool:
    with contextlib.suppress(OSError):
        connection = http.client.HTTPConnection('127.0.0.1', port)
        connection.request('GET', '/ready')
        return connection.getresponse().status == 200
    return False


def post(port: int, path: str, body: dict) -> tuple[dict, float]:
    """Ask: (the answer, seconds)."""
    connection, began = http.client.HTTPConnection('127.0.0.1', port), time.perf_counter()
    connection.request('POST', path, json.dumps(body), {'Content-Type': 'application/json'})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        raise SystemExit(f'{path}: {response.status} {answer}')
    return answer, time.perf_counter() - began


def in_turn(**sides) -> dict[str, list[float]]:
    """Time each side REPEATS times, the order turning; one call of each first, untimed."""
    seconds = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name in list(sides) if repeat % 2 else list(sides)[::-1]:
            found = sides[name]()
            if repeat:
                seconds[name].append(found)
    return seconds


def row(name: str, seconds: dict[str, list[float]], over: str, under: str) -> dict:
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {'name': name, 'ratio': round(medians[over] / medians[under], 3),
            'seconds': {side: [round(value, 3) for value in values] for side, values in seconds.items()}}


def together(port: int, prompts: list[str]) -> dict:
    """Time 16 requests of one prompt beside one of 16."""
    def many() -> float:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            began = time.perf_counter()
            list(pool.map(lambda prompt: post(port, '/generate', {'prefix_text': [prompt], 'temperature': 0}), prompts))
            return time.perf_counter() - began

    one = lambda: post(port, '/generate', {'prefix_text': prompts, 'temperature': 0})[1]
    return row('together', in_turn(many=many, one=one), 'many', 'one')


def slots(port: int, other: int, prompt: str) -> dict:
    """Time one prompt on two servers."""
    ask = lambda to: post(to, '/generate', {'prefix_text': [prompt], 'temperature': 0})[1]
    return row('slots', in_turn(sixteen=lambda: ask(port), one=lambda: ask(other)), 'sixteen', 'one')


def abandoned(port: int, prompts: list[str], prompt: str) -> dict:
    """Time a prompt behind a client that left a second after it asked for 32."""
    alone = lambda: post(port, '/generate', {'prefix_text': [prompt], 'temperature': 0})[1]

    def behind() -> float:
        connection = http.client.HTTPConnection('127.0.0.1', port)
        connection.request('POST', '/generate', json.dumps({'prefix_text': prompts * 2, 'temperature': 0}),
                           {'Content-Type': 'application/json'})
        time.sleep(1)
        connection.close()
        return alone()

    return row('abandoned', in_turn(behind=behind, alone=alone), 'behind', 'alone')


def reviews(port: int, rows: list[dict], prompts: list[str]) -> list[dict]:
    """Time all reviews through /generate and through /classify, and count the right answers."""
    found = []
    answer, seconds = post(port, '/generate', {'prefix_text': prompts, 'temperature': 0})
    labels = [text.split()[0] if text.split() else '' for text in answer['output_text']]
    found.append({'name': '/generate', 'reviews': len(rows), 'seconds': round(seconds, 1),
                  'correct': sum(label == one['label'] for label, one in zip(labels, rows, strict=True))})
    answer, seconds = post(port, '/classify', {'texts': [one['text'] for one in rows]})
    found.append({'name': '/classify', 'reviews': len(rows), 'seconds': round(seconds, 1),
                  'correct': sum(result['label'] == one['label']
                                 for result, one in zip(answer['results'], rows, strict=True))})
    return found


def easylm_way(model: str, prompts: list[str], count: int = 6) -> dict:
    """Time prompts of 1,024 tokens, one at a time; run in this process after the server has gone."""
    source, mesh = checkpoint.open(model), make_mesh('1,1,1')
    texts = Texts(source.tokenizer, source.config, input_length=1024, seq_length=1040)
    engine = make_engine(lambda: source.load_params(source.config, mesh), source.config,
                         Compute(attention='reference'), mesh, source.tokenizer, batch_size=1, length=1040,
                         prefix_reuse=False)
    pad = texts.tokenizer.encode(' the')[0]
    works = []
    for work in texts.generate(prompts[:count + 1]).works:
        ids = (work.prompt_ids[0], *[pad] * (1024 - len(work.prompt_ids)), *work.prompt_ids[1:])
        works.append(type(work)(ids, 8))
    engine.run(works[:1])
    began = time.perf_counter()
    for work in works[1:]:
        engine.run([work])
    seconds = (time.perf_counter() - began) / count
    return {'name': "EasyLM's way", 'reviews': count, 'seconds_each': round(seconds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True, help='fine-tuned checkpoint')
    parser.add_argument('--reviews', required=True, help='{"text", "label"} lines, as evaluation.json has them')
    parser.add_argument('--output', default='runs/serving_ratios.json')
    parser.add_argument('--flag', action='append', default=[], help='more flags for serve.py')
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in Path(arguments.reviews).read_text(encoding='utf-8').splitlines()]
    prompts = [f'[Text]: {one["text"]}\n[Sentiment]:' for one in rows]
    long = [f'{one["text"]} In short, this film' for one in rows[:16]]
    lengths = '--input_length=128', '--seq_length=144'
    found = []
    with server(arguments.model, *lengths, *arguments.flag) as port:
        found += [together(port, long), abandoned(port, long, long[0])]
        with server(arguments.model, *lengths, '--lm_server.batch_size=1', *arguments.flag) as other:
            found.append(slots(port, other, long[0]))
        found += reviews(port, rows, prompts)
    found.append(easylm_way(arguments.model, prompts))
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + '\n')
    for one in found:
        print({key: value for key, value in one.items() if key != 'seconds' or not isinstance(value, dict)})
    print(f'wrote {output}')


if __name__ == '__main__':
    main()
