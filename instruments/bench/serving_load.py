"""Put load on a server that streams, and measure it: closed loop, open loop (Poisson), clients that leave.

Plain asyncio, HTTP/1.1 by hand, so that the client takes little of the cores that it shares with the server.  The names
of the figures are those of vLLM's BenchmarkMetrics: TTFT, time to the first token; TPOT, time per token after it; ITL,
time between two pieces of the stream; E2EL, end-to-end latency.  Tokens are those that the server counts at the end of
a stream, never pieces of it; a stream of another length than was asked for is a failure.  Next: serving_mixes.py.
"""
import asyncio
import dataclasses
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple
from urllib.parse import urlsplit


class Ask(NamedTuple):
    """prompt: token ids; text: the same as text.  tokens: of the answer, no more, no less.  leaves: after so many
    pieces of the stream the client goes away; None: it stays."""

    prompt: tuple[int, ...]
    text: str
    tokens: int
    leaves: int | None = None


class Piece(NamedTuple):
    """Of a stream: text; tokens of the whole answer where the server tells them (at the end), else None."""

    text: str
    tokens: int | None = None


class Protocol(NamedTuple):
    """How a server is asked: path, body(ask) -> JSON, read(event) -> Piece."""

    path: str
    body: Callable[[Ask], dict]
    read: Callable[[dict], Piece]


@dataclasses.dataclass
class Outcome:
    """What came of an Ask.  status: of HTTP, 0 where none came.  times: of the pieces with text, since `start`."""

    ask: Ask
    start: float
    status: int = 0
    error: str = ''
    left: bool = False
    times: list[float] = dataclasses.field(default_factory=list)
    end: float = 0.0
    tokens: int = 0
    text: str = ''

    @property
    def completed(self) -> bool:
        return self.status == 200 and not self.error and not self.left

    @property
    def ttft(self) -> float:
        return self.times[0]

    @property
    def tpot(self) -> float:
        return (self.end - self.times[0]) / max(self.tokens - 1, 1)

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


# ---------------------------------------------------------------- one request


async def ask_one(url: str, protocol: Protocol, ask: Ask, timeout: float = 600.0) -> Outcome:
    """Send an Ask and read its stream."""
    outcome = Outcome(ask, time.perf_counter())
    try:
        async with asyncio.timeout(timeout):
            await _stream(url, protocol, ask, outcome)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
        outcome.error = f'{type(error).__name__}: {error}'
    outcome.end = time.perf_counter() - outcome.start
    if outcome.completed and outcome.tokens != ask.tokens:
        outcome.error = f'{outcome.tokens} tokens, not {ask.tokens}'
    elif outcome.completed and not outcome.times:
        outcome.times = [outcome.end]  # tokens that make no text
    return outcome


async def _stream(url: str, protocol: Protocol, ask: Ask, outcome: Outcome) -> None:
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**22)
    try:
        body = json.dumps(protocol.body(ask)).encode()
        writer.write(f'POST {protocol.path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n'
                     f'Content-Length: {len(body)}\r\nConnection: close\r\n\r\n'.encode() + body)
        await writer.drain()
        outcome.status, chunked = await _head(reader)
        if outcome.status != 200:
            outcome.error = (await reader.read(300)).decode('utf-8', 'replace')
            return
        async for event in _events(reader, chunked):
            piece = protocol.read(event)
            if piece.text:
                outcome.times.append(time.perf_counter() - outcome.start)
                outcome.text += piece.text
            if piece.tokens is not None:
                outcome.tokens = piece.tokens
            if ask.leaves is not None and len(outcome.times) >= ask.leaves:
                outcome.left = True
                return
    finally:
        writer.transport.abort() if outcome.left else writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the body comes in chunks)."""
    lines = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').lower().split('\r\n')
    return int(lines[0].split()[1]), any(line.replace(' ', '') == 'transfer-encoding:chunked' for line in lines)


async def _events(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[dict]:
    """The JSON of each `data:` line, up to [DONE] or the end."""
    rest = b''
    while part := await _part(reader, chunked):
        *lines, rest = (rest + part).split(b'\n')
        for line in lines:
            if line.startswith(b'data:') and (data := line[5:].strip()) != b'[DONE]':
                yield json.loads(data)


async def _part(reader: asyncio.StreamReader, chunked: bool) -> bytes:
    if not chunked:
        return await reader.read(2**16)
    size = int((await reader.readline()).split(b';')[0] or b'0', 16)
    return (await reader.readexactly(size + 2))[:-2] if size else b''


# ---------------------------------------------------------------- many requests


async def closed_loop(url: str, protocol: Protocol, asks: Iterable[Ask], concurrency: int) -> list[Outcome]:
    """So many clients, each of which asks again as soon as it is answered.  Outcomes stand in the order of asks."""
    asks = list(enumerate(asks))
    found = [None] * len(asks)
    todo = iter(asks)

    async def client() -> None:
        for number, ask in todo:
            found[number] = await ask_one(url, protocol, ask)

    await asyncio.gather(*(client() for _ in range(min(concurrency, len(asks)))))
    return found


async def open_loop(url: str, protocol: Protocol, asks: Iterable[Ask], rate: float, seed: int = 0) -> list[Outcome]:
    """Poisson arrivals, `rate` a second, whatever the server does."""
    draw, tasks, due = random.Random(seed), [], time.perf_counter()
    for ask in asks:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask_one(url, protocol, ask)))
        due += draw.expovariate(rate)
    return list(await asyncio.gather(*tasks))


# ---------------------------------------------------------------- figures


def percentile(values: list[float], share: float) -> float:
    """Linear between the two nearest values, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: list[float], name: str) -> dict[str, float]:
    """{'mean_NAME_ms', 'median_..', 'p90_..', 'p99_..'} of seconds; nothing where there are none."""
    if not values:
        return {}
    figures = {'mean': statistics.fmean(values), 'median': statistics.median(values),
               'p90': percentile(values, 0.9), 'p99': percentile(values, 0.99)}
    return {f'{kind}_{name}_ms': round(1e3 * value, 3) for kind, value in figures.items()}


def summary(outcomes: list[Outcome], slo: tuple[float, float] | None = None) -> dict:
    """vLLM's figures of a run.  slo: (TTFT, TPOT) in seconds that a good request keeps."""
    done = [outcome for outcome in outcomes if outcome.completed]
    begun = min(outcome.start for outcome in outcomes)
    duration = max(outcome.start + outcome.end for outcome in outcomes) - begun
    inputs, outputs = sum(len(o.ask.prompt) for o in done), sum(o.tokens for o in done)
    figures = {
        'completed': len(done), 'failed': sum(not o.completed and not o.left for o in outcomes),
        'left': sum(o.left for o in outcomes), 'refused': sum(o.status == 429 for o in outcomes),
        'duration': round(duration, 3), 'total_input_tokens': inputs, 'total_output_tokens': outputs,
        'request_throughput': round(len(done) / duration, 4), 'output_throughput': round(outputs / duration, 3),
        'total_token_throughput': round((inputs + outputs) / duration, 3)}
    if slo:
        good = sum(o.ttft <= slo[0] and o.tpot <= slo[1] for o in done)
        figures['request_goodput'] = round(good / duration, 4)
        figures['good_share'] = round(good / len(outcomes), 4)
    figures |= spread([o.ttft for o in done], 'ttft') | spread([o.tpot for o in done if o.tokens > 1], 'tpot')
    figures |= spread([gap for o in done for gap in o.itl], 'itl') | spread([o.end for o in done], 'e2el')
    if errors := sorted({o.error for o in outcomes if o.error and o.status != 429}):
        figures['errors'] = errors[:5]
    return figures
