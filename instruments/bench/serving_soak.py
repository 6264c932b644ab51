"""Ask a server ordinary things for twenty minutes, and see whether its memory grows.  Neighbour: serving_bad_bodies.py.

  python -m instruments.bench.serving_soak --model=CHECKPOINT --reviews=test.jsonl --output=runs/serving_soak.json

Eight clients ask and then rest as long as the answer took, so that the server has about half of what it can do however
busy the machine is: four in ten /generate, three /classify of one to four reviews, three /v1/completions streamed.  One
in ten leaves while it is answered.  Resident memory of serve.py and what it has started is read out of /proc every ten
seconds; its slope is that of a straight line, by least squares, over the requests of all but the first quarter of the
time.
"""
import argparse
import collections
import concurrent.futures
import http.client
import json
import random
import threading
import time
from pathlib import Path
from typing import NamedTuple

from instruments.bench.serving_machine import taken
from instruments.bench.serving_ratios import server_process

CLIENTS, LEAVING, PATIENCE = 8, 0.1, 300.0
KINDS = ('/generate',) * 4 + ('/classify',) * 3 + ('/v1/completions',) * 3
WARM_UP = 0.25  # of the time, whose samples do not count for the slope


class Ask(NamedTuple):
    """One request.  leaves: seconds after which the client goes away, or None."""

    path: str
    body: dict
    leaves: float | None = None


class Sample(NamedTuple):
    """What was seen at a moment: seconds since the start, requests that had ended, resident bytes."""

    seconds: float
    requests: int
    rss: int


def ask_of(draw: random.Random, reviews: list[str], labels: list[str]) -> Ask:
    """Draw a request."""
    path, leaves = draw.choice(KINDS), draw.uniform(0.05, 0.5) if draw.random() < LEAVING else None
    template = '[Text]: {text}\n[Sentiment]:'
    prompt = template.replace('{text}', draw.choice(reviews))
    if path == '/generate':
        return Ask(path, {'prefix_text': [prompt], 'temperature': draw.choice((0, 1.0))}, leaves)
    if path == '/classify':
        return Ask(path, {'texts': draw.sample(reviews, draw.randint(1, 4)), 'template': template, 'labels': labels},
                   leaves)
    return Ask(path, {'prompt': prompt, 'max_tokens': draw.randint(1, 24), 'stream': True,
                      'temperature': draw.choice((0, 1.0)), 'logprobs': draw.choice((None, 2))}, leaves)


def outcome(port: int, ask: Ask) -> str:
    """Send it: 'left', the HTTP status, or the kind of error of a client that stayed."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE)
    try:
        connection.request('POST', ask.path, json.dumps(ask.body), {'Content-Type': 'application/json'})
        if ask.leaves is not None:
            time.sleep(ask.leaves)
            return 'left'
        response = connection.getresponse()
        text = response.read()
        whole = ask.path != '/v1/completions' or response.status != 200 or text.rstrip().endswith(b'[DONE]')
        return str(response.status) if whole else 'cut stream'
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def gauges(port: int) -> dict[str, float]:
    """Read /metrics: the numbers without labels."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE)
    connection.request('GET', '/metrics')
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    pairs = (line.split() for line in lines if not line.startswith('#') and '{' not in line)
    return {name.removeprefix('pallama_'): float(value) for name, value in pairs}


def slope(samples: list[Sample]) -> float:
    """MB (10^6 bytes) for 1,000 requests, by least squares."""
    x, y = [sample.requests / 1e3 for sample in samples], [sample.rss / 1e6 for sample in samples]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    squares = sum((each - mean_x) ** 2 for each in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / squares


def report(samples: list[Sample], outcomes: dict[str, int], end: dict[str, float]) -> dict:
    """Write the row.  end: gauges of /metrics when all had ended."""
    counted = [sample for sample in samples if sample.seconds >= WARM_UP * samples[-1].seconds]
    return {'minutes': round(samples[-1].seconds / 60, 1), 'requests': sum(outcomes.values()),
            'outcomes': dict(sorted(outcomes.items())),
            'errors': sum(count for name, count in outcomes.items() if name not in ('200', 'left', '429')),
            'rss_mb': [round(sample.rss / 1e6, 1) for sample in (samples[0], counted[0], samples[-1])],
            'slope_minutes': round((counted[-1].seconds - counted[0].seconds) / 60, 1),
            'slope_requests': counted[-1].requests - counted[0].requests,
            'mb_per_1000_requests': round(slope(counted), 3), 'slots_leaked': int(end['active']),
            'waiting_leaked': int(end['waiting']), 'in_flight_leaked': int(end['in_flight']) - 1,  # /metrics itself
            'jit_compiles_after_ready': int(end['jit_compiles_after_ready']),
            'samples': [[round(sample.seconds), sample.requests, round(sample.rss / 1e6, 1)] for sample in samples]}


def soak(port: int, pid: int, new_ask, seconds: float, every: float = 10.0) -> tuple[list[Sample], dict[str, int]]:
    """Ask for so long: (samples, how often each outcome was).  new_ask() -> Ask, for one thread at a time."""
    outcomes, samples, lock = collections.Counter(), [], threading.Lock()
    began = time.monotonic()

    def client() -> None:
        while time.monotonic() - began < seconds:
            with lock:
                ask = new_ask()
            asked = time.monotonic()
            what = outcome(port, ask)
            with lock:
                outcomes[what] += 1
            time.sleep(time.monotonic() - asked)

    def sample() -> None:
        samples.append(Sample(time.monotonic() - began, outcomes.total(), taken(pid)[0]))
        seconds, requests, rss = samples[-1]
        print(f'{seconds:.0f} s  {requests} requests  {rss / 1e6:.1f} MB', flush=True)

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        while (now := time.monotonic() - began) < seconds:
            sample()
            time.sleep(min(every - now % every, seconds - now))
    for each in clients:
        each.result()
    sample()
    return samples, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True, help='checkpoint')
    parser.add_argument('--reviews', required=True, help='{"text": ...} lines')
    parser.add_argument('--minutes', type=float, default=20.0)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', default='runs/serving_soak.json')
    parser.add_argument('--flag', action='append', default=[], help='more flags for serve.py')
    arguments = parser.parse_args()
    texts = [json.loads(line)['text'] for line in Path(arguments.reviews).read_text(encoding='utf-8').splitlines()]
    draw = random.Random(arguments.seed)
    new_ask = lambda: ask_of(draw, texts, ['Negative', 'Positive'])
    flags = '--input_length=128', '--seq_length=152', *arguments.flag
    with server_process(arguments.model, *flags) as (port, process):
        samples, outcomes = soak(port, process.pid, new_ask, 60 * arguments.minutes)
        time.sleep(5)  # for the server to see the last clients leave
        found = report(samples, outcomes, gauges(port))
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found) + '\n')
    print({key: value for key, value in found.items() if key != 'samples'})


if __name__ == '__main__':
    main()
