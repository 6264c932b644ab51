"""Count and log what is served: one line a request, /metrics for Prometheus.  Before: api.py.

  12:00:01 3f9c2b7a1d04 POST /v1/completions 200 412 ms  prompt 31 cached 24 new 64

Nothing of a request but its method and path is printed, control characters of a path spelled out.
"""
import dataclasses
import secrets
import time
import traceback

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serving.guard import refusal

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = {  # EngineThread.stats() -> what it is
    'slots': 'places in which prompts run', 'active': 'places that are taken', 'waiting': 'requests without a place',
    'jit_compiles_after_ready': 'programs compiled after the server was ready: 0'}
COUNTERS = {
    'prompt_tokens': 'tokens of prompts', 'cached_tokens': 'of these, those that a slot held already',
    'generation_tokens': 'tokens of answers', 'decode_steps': 'decoding steps', 'prefill_pieces': 'pieces of prompts'}


@dataclasses.dataclass
class Tally:
    """Count one request: `started` and `first` (the first piece of an answer, where it was streamed) in seconds."""

    id: str
    started: float
    status: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first: float | None = None

    def add(self, prompt: int, cached: int, new: int) -> None:
        self.prompt_tokens, self.cached_tokens = self.prompt_tokens + prompt, self.cached_tokens + cached
        self.new_tokens += new


def tally_of(scope) -> Tally:
    return scope.setdefault('pallama.tally', Tally('', time.monotonic()))


class Metrics:
    """The numbers of one server, in a registry of its own.  paths: those that are counted by name."""

    def __init__(self, thread, paths: frozenset[str] = frozenset()):
        self.thread, self.paths, self.in_flight, self.draining = thread, paths, 0, False
        self._registry = CollectorRegistry()
        self._requests = Counter('pallama_http_requests', 'requests answered', ('path', 'status'),
                                 registry=self._registry)
        self._first = Histogram('pallama_time_to_first_token_seconds', 'streams: until the first piece of the answer',
                                buckets=SECONDS, registry=self._registry)
        self._each = Histogram('pallama_time_per_output_token_seconds', 'streams: between two tokens, mean of one',
                               buckets=SECONDS, registry=self._registry)
        self._whole = Histogram('pallama_request_seconds', 'until the whole answer was sent', ('path',),
                                buckets=SECONDS, registry=self._registry)
        self._registry.register(self)

    def collect(self):
        """Yield what the engine counts itself (called by the registry)."""
        stats = self.thread.stats()
        for name, meaning in GAUGES.items():
            yield GaugeMetricFamily(f'pallama_{name}', meaning, stats[name])
        for name, meaning in COUNTERS.items():
            yield CounterMetricFamily(f'pallama_{name}', meaning, stats[f'{name}_total'])
        works = CounterMetricFamily('pallama_works', 'prompts and texts, by how they ended', labels=('outcome',))
        for outcome, count in stats['works'].items():
            works.add_metric((outcome,), count)
        yield works
        yield GaugeMetricFamily('pallama_in_flight', 'requests that are being answered', self.in_flight)
        yield GaugeMetricFamily('pallama_ready', '1 if /ready is 200', self.thread.ready and not self.draining)

    def write(self) -> tuple[bytes, str]:
        """Return (the text of /metrics, its Content-Type)."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def note(self, method: str, path: str, tally: Tally) -> None:
        """Count one answered request and print its line."""
        now, known = time.monotonic(), path if path in self.paths else 'other'
        self._requests.labels(known, tally.status).inc()
        self._whole.labels(known).observe(now - tally.started)
        if tally.first is not None:
            self._first.observe(tally.first - tally.started)
            if tally.new_tokens > 1:
                self._each.observe((now - tally.first) / (tally.new_tokens - 1))
        tokens = (f'  prompt {tally.prompt_tokens} cached {tally.cached_tokens} new {tally.new_tokens}'
                  if tally.prompt_tokens else '')
        where = repr(path)[1:-1] if path.isprintable() else ascii(path)[1:-1]
        print(f'{time.strftime("%H:%M:%S")} {tally.id} {method} {where[:200]} {tally.status} '
              f'{1000 * (now - tally.started):.0f} ms{tokens}', flush=True)


class Access:
    """ASGI middleware, the outermost: an id and a line for each request, and 500 for what nobody caught."""

    def __init__(self, app, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        tally = scope['pallama.tally'] = Tally(secrets.token_hex(6), time.monotonic())
        started = False

        async def sending(message):
            nonlocal started
            if message['type'] == 'http.response.start':
                started, tally.status = True, message['status']
                message['headers'] = [*message.get('headers', ()), (b'x-request-id', tally.id.encode())]
            await send(message)

        self.metrics.in_flight += 1
        try:
            await self.app(scope, receive, sending)
        except Exception as error:  # a fault of ours; the client hears no more than that
            traceback.print_exception(error)
            if not started:
                answer = refusal(scope['path'], 500, "the server failed at this request; the server's log says why")
                await answer(scope, receive, sending)
            tally.status = 500
        finally:
            self.metrics.in_flight -= 1
            self.metrics.note(scope['method'], scope['path'], tally)
