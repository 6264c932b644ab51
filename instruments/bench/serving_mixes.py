"""The mixes of load, M1 to M9: what each asks, and the figures it gives.

A mix is a function (bench, running) -> rows, each {'point': .., figures ..}; `running` is a contender that is up; M9
starts it itself.  `scale` 1 is the full size (M3: 5 minutes a rate); a smaller one shortens all.
Neighbours: serving_load.py puts the load, serving.py runs the mixes and writes the rows.
"""
import asyncio
import dataclasses
import math
import random
import tempfile
import time
import urllib.request
from collections.abc import Callable

from evaluation.client import Server
from instruments.bench.contenders.contender import Contender, Running, Settings
from instruments.bench.serving_load import Ask, Outcome, ask_one, closed_loop, open_loop, summary
from instruments.bench.serving_machine import Watch
from mistake import Mistake

SLO = 2.0, 0.150  # seconds: TTFT, TPOT
CONCURRENCY = 2, 4, 8, 16
SHARES = 0.25, 0.5, 0.75, 1.0, 1.25


@dataclasses.dataclass
class Bench:
    """ids: of a long text, from which prompts are cut; decode: ids to text.  weights: how many the model reads a token.
    read_gb_s: measured.  capacity: requests/s of M3's kind that a contender can do, from its M2; by name.
    texts: pieces of text for M5."""

    ids: list[int]
    decode: Callable[[list[int]], str]
    weights: int
    read_gb_s: float
    scale: float
    capacity: dict[str, float]
    texts: list[str]
    seed: int = 0

    def asks(self, count: int, input_tokens: Callable[[random.Random], int], output_tokens, seed: int) -> list[Ask]:
        """So many prompts, each from a place of its own; the same for the same seed."""
        draw = random.Random(f'{self.seed} {seed}')
        found = []
        for _ in range(count):
            size, tokens = input_tokens(draw), output_tokens(draw)
            at = draw.randrange(len(self.ids) - size)
            prompt = tuple(self.ids[at:at + size])
            found.append(Ask(prompt, self.decode(list(prompt)), tokens))
        return found

    def count(self, full: int, least: int = 2) -> int:
        return max(least, round(full * self.scale))


def fixed(tokens: int):
    return lambda draw: tokens


def lognormal(low: int, high: int):
    """Lengths whose logarithm is normal about the middle of the two, cut at both; the middle 95 % lie between them."""
    middle, wide = math.log(low * high) / 2, math.log(high / low) / 4
    return lambda draw: min(high, max(low, round(draw.lognormvariate(middle, wide))))


def measured(running: Running, load) -> tuple[list[Outcome], dict]:
    """(outcomes, figures of the processes) of a load."""
    with Watch(running.pid) as watch:
        outcomes = asyncio.run(load)
    return outcomes, watch.figures(sum(outcome.tokens for outcome in outcomes))


def warm(bench: Bench, running: Running) -> None:
    """Ask twice; raises Mistake with the contender's words where it does not answer."""
    outcomes = asyncio.run(closed_loop(running.url, running.protocol, bench.asks(2, fixed(64), fixed(8), seed=99), 1))
    if failed := [outcome.error for outcome in outcomes if not outcome.completed]:
        raise Mistake(f'{running.contender.name} does not answer: {failed[0]}')


# ---------------------------------------------------------------- the mixes


def single(bench: Bench, running: Running) -> list[dict]:
    """M1: one stream, 128 in, 128 out; MBU is the weights' bytes over TPOT and the measured bandwidth."""
    asks = bench.asks(bench.count(20, 3), fixed(128), fixed(128), seed=1)
    outcomes, taken = measured(running, closed_loop(running.url, running.protocol, asks, 1))
    figures = summary(outcomes)
    if 'median_tpot_ms' in figures:
        read = bench.weights * running.contender.bits / 8
        figures['mbu'] = round(read / (figures['median_tpot_ms'] / 1e3) / (bench.read_gb_s * 1e9), 4)
    return [{'point': 1, **figures, **taken}]


def batch(bench: Bench, running: Running) -> list[dict]:
    """M2: closed loop of 2, 4, 8 and 16 clients, 128 in, 128 out."""
    rows = []
    for clients in CONCURRENCY:
        asks = bench.asks(bench.count(8 * clients, clients), fixed(128), fixed(128), seed=20 + clients)
        outcomes, taken = measured(running, closed_loop(running.url, running.protocol, asks, clients))
        rows.append({'point': clients, **summary(outcomes), **taken})
    return rows


MIXED = lognormal(16, 512), lognormal(16, 256)


def capacity_of(batch_rows: list[dict]) -> float:
    """Requests a second of M3's kind at M2's best throughput; its prompts take part by their tokens, as M2's do."""
    best = max(row['total_token_throughput'] for row in batch_rows)
    draw = random.Random(0)
    mean = sum(part(draw) for _ in range(2000) for part in MIXED) / 2000
    return best / mean


def mixed(bench: Bench, running: Running) -> list[dict]:
    """M3: Poisson arrivals at shares of the capacity, lengths of every kind."""
    rows, seconds = [], 300 * bench.scale
    for share in SHARES:
        rate = share * bench.capacity[running.contender.name]
        asks = bench.asks(max(4, round(rate * seconds)), *MIXED, seed=300)
        outcomes, taken = measured(running, open_loop(running.url, running.protocol, asks, rate))
        rows.append({'point': share, 'rate': round(rate, 4), **summary(outcomes, SLO), **taken})
    return rows


def shared(bench: Bench, running: Running) -> list[dict]:
    """M4: 512 tokens shared and 32 of one's own, 8 clients; serving.py runs it with reuse and without."""
    head = tuple(bench.ids[:512])
    asks = [ask._replace(prompt=head + ask.prompt, text=bench.decode(list(head + ask.prompt)))
            for ask in bench.asks(bench.count(64, 8), fixed(32), fixed(16), seed=4)]
    before = counter(running, 'cached_tokens_total')
    outcomes, taken = measured(running, closed_loop(running.url, running.protocol, asks, 8))
    saved = counter(running, 'cached_tokens_total')
    figures = {} if saved is None else {'cached_tokens': saved - (before or 0)}
    return [{'point': 'reuse' if running.settings.reuse else 'none', **summary(outcomes), **figures, **taken}]


def endings(bench: Bench) -> tuple[list[str], list[str]]:
    """M5's pairs: each context four times, with four endings."""
    count, draw = bench.count(500, 8), random.Random(5)
    prefixes, texts = [], []
    for _ in range(count):
        context = draw.choice(bench.texts)
        prefixes += [context] * 4
        texts += [' ' + ' '.join(draw.choice(bench.texts).split()[:draw.randint(2, 8)]) for _ in range(4)]
    return prefixes, texts


def scoring(bench: Bench, running: Running) -> list[dict]:
    """M5: contexts with four endings through POST /loglikelihood, eight contexts a request."""
    prefixes, texts = endings(bench)
    with Watch(running.pid) as watch:
        began = time.perf_counter()
        found = Server(running.url, batch_size=32).loglikelihood(prefixes, texts)
        seconds = time.perf_counter() - began
    scores = [nats for nats, _ in found]
    row = {'point': 'http', 'duration': round(seconds, 3), 'items_per_second': round(len(texts) / 4 / seconds, 3),
           **watch.figures(0)}
    row['scores'] = [round(score, 6) for score in scores]
    return [row]


def intruder(bench: Bench, running: Running) -> list[dict]:
    """M6: four streams, and a prompt of 1,500 tokens that comes when they run; the worst gap of the four."""
    async def load() -> list[Outcome]:
        streams = [asyncio.create_task(ask_one(running.url, running.protocol, ask))
                   for ask in bench.asks(4, fixed(64), fixed(bench.count(160, 96)), seed=6)]
        await asyncio.sleep(2.0)
        long = bench.asks(1, fixed(min(1500, running.settings.input_length)), fixed(8), seed=61)[0]
        return [await ask_one(running.url, running.protocol, long), *await asyncio.gather(*streams)]

    outcomes, taken = measured(running, load())
    gaps = [gap for outcome in outcomes[1:] for gap in outcome.itl]
    long = {'long_ttft_ms': round(1e3 * outcomes[0].ttft, 1)} if outcomes[0].completed else {}
    worst = {'worst_itl_ms': round(1e3 * max(gaps), 1)} if gaps else {}
    return [{'point': '4 + 1', **summary(outcomes[1:]), **worst, **long, **taken}]


def overload(bench: Bench, running: Running) -> list[dict]:
    """M7: four times the capacity for a minute; then how long until one request is served as if nothing had been."""
    rate, seconds = 4 * bench.capacity[running.contender.name], max(10.0, 60 * bench.scale)
    asks = bench.asks(max(8, round(rate * seconds)), *MIXED, seed=7)
    alone = bench.asks(1, fixed(64), fixed(8), seed=71)[0]
    usual = asyncio.run(ask_one(running.url, running.protocol, alone)).end
    outcomes, taken = measured(running, open_loop(running.url, running.protocol, asks, rate))
    began = time.perf_counter()
    while asyncio.run(ask_one(running.url, running.protocol, alone)).end > 1.5 * usual:
        if time.perf_counter() - began > 120:
            break
    figures = summary(outcomes, SLO)
    return [{'point': 4, 'rate': round(rate, 4), **figures, 'refused_share': round(figures['refused'] / len(asks), 4),
             'recovery_seconds': round(time.perf_counter() - began, 2), **taken}]


def churn(bench: Bench, running: Running) -> list[dict]:
    """M8: three of ten clients leave within their answer; the others' texts must be those of a run without."""
    asks = bench.asks(bench.count(200, 10), fixed(64), fixed(64), seed=8)
    draw = random.Random(8)
    leaving = [ask._replace(leaves=draw.randint(1, 40)) if draw.random() < 0.3 else ask for ask in asks]
    stay = [n for n, ask in enumerate(leaving) if ask.leaves is None]
    quiet = asyncio.run(closed_loop(running.url, running.protocol, [asks[n] for n in stay], 1))
    outcomes, taken = measured(running, closed_loop(running.url, running.protocol, leaving, 8))
    changed = sum(outcomes[n].text != alone.text for n, alone in zip(stay, quiet, strict=True))
    row = {'point': 0.3, **summary(outcomes), 'changed_texts': changed, **taken}
    time.sleep(1.0)
    active = counter(running, 'active')
    return [row if active is None else {**row, 'slots_leaked': active}]


def start(bench: Bench, contender: Contender, settings: Settings) -> list[dict]:
    """M9: seconds to ready and to the first token, with nothing compiled before and then with everything."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for point in ('cold', 'warm'):
            began = time.perf_counter()
            with Running(contender, settings, {'PALLAMA_CACHE': cache}) as running:
                first = asyncio.run(ask_one(running.url, running.protocol, bench.asks(
                    1, fixed(64), fixed(8), seed=9)[0]))
                row = {'point': point, 'ready_seconds': round(running.seconds, 2)}
                if first.completed:
                    row['first_token_seconds'] = round(first.start + first.ttft - began, 2)
                compiled = counter(running, 'jit_compiles_after_ready')
                rows.append(row if compiled is None else {**row, 'compiles_after_ready': compiled})
    return rows


MIXES = {'M1': single, 'M2': batch, 'M3': mixed, 'M4': shared, 'M5': scoring, 'M6': intruder, 'M7': overload,
         'M8': churn, 'M9': start}


# ---------------------------------------------------------------- what the server tells of itself


def counter(running: Running, name: str) -> float | None:
    """A figure of GET /metrics whose name ends so, None where the server tells none."""
    if not running.contender.metrics:
        return None
    with urllib.request.urlopen(f'{running.url}/metrics', timeout=30) as response:
        return read_counter(response.read().decode(), name)


def read_counter(text: str, name: str) -> float | None:
    """The figure in the text form of Prometheus; summed over its labels."""
    found = [line.rsplit(' ', 1) for line in text.splitlines() if line and not line.startswith('#')]
    values = [float(value) for key, value in found
              if key.partition('{')[0] == name or key.partition('{')[0].endswith(f'_{name}')]
    return sum(values) if values else None
