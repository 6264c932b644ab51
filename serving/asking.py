"""Ask the engine's thread from asyncio: wait, stream, give up.  Before: thread.py; after: api.py, openai.py.

Tokenising and reading answers is done in one thread beside the event loop, so that a long prompt delays nobody's bytes.
Whoever leaves takes his works along: the engine ends them before its next step, whether they wait or run.
"""
import asyncio
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from fastapi import HTTPException, Request
from starlette.responses import Response

from mistake import Mistake
from serving.guard import openai_error
from serving.metrics import Metrics, tally_of
from serving.work import Cancelled, Delta, EngineFailed, Event, Generate, Generated, QueueFull, Scored, Work

FAILED = "the engine failed and takes no more requests; the server's log says why"
STOPPING = 'the server is stopping'
KEEP_ALIVE_SECONDS = 15.0
GONE = -2  # in the place of a work's index: the client has left


class Refused(HTTPException):
    """A refusal in one line: status, message, and for /v1 the field."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None,
                 code: str | None = None):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


@contextlib.contextmanager
def refusing():
    """Raise Refused for what the engine or a template says of a request."""
    try:
        yield
    except QueueFull as error:
        raise Refused(429, f'{error}: try again later', {'Retry-After': '1'}, code='queue_full') from None
    except (EngineFailed, Cancelled) as error:
        raise Refused(*((503, STOPPING) if isinstance(error, Cancelled) else (500, FAILED))) from None
    except FloatingPointError as error:
        raise Refused(500, str(error)) from None
    except Mistake as error:
        raise Refused(400, str(error)) from None


@dataclasses.dataclass
class Running:
    """The works of one request that the engine has; `events` holds (index of the work, event)."""

    works: list[Work]
    events: asyncio.Queue
    ticket: object = None
    left: int = 0


class Asking:
    """Asks one EngineThread.  seconds: the longest that an answer may take; 0 for no limit."""

    def __init__(self, thread, metrics: Metrics, seconds: float = 0.0):
        self.thread, self._metrics, self._seconds = thread, metrics, seconds
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix='tokenising')

    async def apart(self, function: Callable, *arguments, **named):
        """Call function(...) beside the event loop; what is wrong with the request is raised as Refused."""
        call = functools.partial(function, *arguments, **named)
        with refusing():
            return await asyncio.get_running_loop().run_in_executor(self._tokenising, call)

    async def ask(self, request: Request, works: list[Work]) -> list[Generated | Scored]:
        """Wait for the results of all works, in their order."""
        results: list = [None] * len(works)
        if works:
            async with self._running(request, works) as running:
                while running.left:
                    index, event = await running.events.get()
                    if self._note(request, running, index, event):
                        results[index] = event
        return results

    async def stream(self, request: Request, works: list[Work], write: Callable[[int, Event], Iterable[dict]],
                     first: Iterable[dict] = (), last: Callable[[list], Iterable[dict]] = lambda results: ()):
        """Make the response that tells each event as it comes: write(index, Delta or result) -> what to send.

        first: sent before all; last(results): after all works.  What is refused at once is no stream.
        """
        running = await self._start(request, works)
        return EventStream(self, request, running, write, first, last)

    async def _start(self, request: Request, works: list[Work]) -> Running:
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def on_event(index: int, event: Event) -> None:  # in the engine's thread, which nothing here may end
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return Running(works, events, await self.apart(self.thread.submit, works, on_event), len(works))

    @contextlib.asynccontextmanager
    async def _running(self, request: Request, works: list[Work] | None = None, running: Running | None = None):
        """Have works run for as long as the client is there and the time is not up; then none is left."""
        running = running or await self._start(request, works)
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda _: running.events.put_nowait((GONE, None)))
        try:
            async with asyncio.timeout(self._seconds or None):
                with refusing():
                    yield running
        except TimeoutError:
            raise Refused(503, f'not answered within {self._seconds:g} seconds (--lm_server.request_seconds)') from None
        finally:
            gone.cancel()
            if running.left:
                self.thread.cancel(running.ticket)

    def _note(self, request: Request, running: Running, index: int, event: Event | None) -> bool:
        """Count an event; True for the last one of a work.  Raises what the event says."""
        if index == GONE:
            raise Refused(499, 'the client is gone')
        if isinstance(event, Exception):
            running.left -= index >= 0
            raise event
        tally = tally_of(request.scope)
        if isinstance(event, Delta):
            if tally.first is None:
                tally.first = time.monotonic()
            return False
        running.left -= 1
        work = running.works[index]
        if isinstance(work, Generate):
            tally.add(event.prompt_tokens, event.cached_tokens, len(event.token_ids))
        else:
            tally.add(len(work.prefix_ids) + sum(map(len, work.texts)), event.cached_tokens, 0)
        return True


class EventStream(Response):
    """Server-sent events: `data: JSON` for each thing that is told, a comment while there is nothing, then [DONE]."""

    def __init__(self, asking: Asking, request: Request, running: Running, write, first, last):
        super().__init__(media_type='text/event-stream', headers={'Cache-Control': 'no-store',
                                                                  'X-Accel-Buffering': 'no'})
        del self.headers['content-length']
        self._asking, self._request, self._running = asking, request, running
        self._write, self._first, self._last = write, first, last

    async def __call__(self, scope, receive, send):
        async def tell(data: bytes, more: bool = True) -> None:
            await send(dict(type='http.response.body', body=data, more_body=more))

        async def tell_all(pieces: Iterable[dict]) -> None:
            if data := b''.join(b'data: ' + json_bytes(piece) + b'\n\n' for piece in pieces):
                await tell(data)

        results: list = [None] * len(self._running.works)
        try:
            async with self._asking._running(self._request, running=self._running) as running:
                await send(dict(type='http.response.start', status=200, headers=self.raw_headers))
                await tell_all(self._first)
                while running.left:
                    try:
                        async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                            index, event = await running.events.get()
                    except TimeoutError:
                        await tell(b': waiting\n\n')
                        continue
                    if self._asking._note(self._request, running, index, event):
                        results[index] = event
                    await tell_all(self._write(index, event))
            await tell_all(self._last(results))
            await tell(b'data: [DONE]\n\n', more=False)
        except Refused as refused:
            tally_of(scope).status = refused.status_code
            if refused.status_code != 499:
                error = openai_error(refused.status_code, refused.detail, refused.param, refused.code)
                await tell(b'data: ' + json_bytes(error) + b'\n\n', more=False)


def json_bytes(value) -> bytes:
    """Write JSON without blanks, text as UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':')).encode()


async def _disconnected(request: Request) -> None:
    while (await request.receive())['type'] != 'http.disconnect':
        pass
