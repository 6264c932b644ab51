"""Give JAX to one thread, with a bounded line of requests before it.  Before: engine.py; after: api.py."""
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future

from serving.engine import PROGRAMS, Engine
from serving.followers import CallLine, apply, to_json
from serving.work import Cancelled, Delta, EngineFailed, Event, QueueFull, RequestError, Work

OnEvent = Callable[[int, Event], None]


class EngineThread:
    """Runs the engine's ticks in one thread; requests stand in a bounded line before its slots.

    The first work is to warm up.  What an event carries concerns one work; after any other exception no work is done
    (`failure`), and everything that was in line is answered with EngineFailed.  line: where other processes hear of
    each turn before it is made.
    """

    def __init__(self, engine: Engine, queue_size: int, warm_up: tuple[str, ...] = PROGRAMS, num_beams: int = 1,
                 line: CallLine | None = None):
        self.failure: BaseException | None = None
        self.closing = False
        self._engine, self._line = engine, line
        self._queue_size = queue_size
        self._lock = threading.Lock()
        self._waiting = 0  # requests of which no work has a slot yet
        self._open: dict[int, tuple[OnEvent, int]] = {}  # ticket -> (on_event, works without an end)
        self._tickets = itertools.count(1)
        self._news: queue.SimpleQueue = queue.SimpleQueue()
        self._outcomes = {'finished': 0, 'failed': 0, 'cancelled': 0}
        self._compiled = 0
        self.warm: Future = Future()
        self._thread = threading.Thread(target=self._run, args=(warm_up, num_beams), name='engine', daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ any thread

    @property
    def ready(self) -> bool:
        """Whether it is warmed up, and has not failed, and is not closing."""
        return self.warm.done() and self.failure is None and not self.closing

    def submit(self, works: list[Work], on_event: OnEvent) -> int:
        """Queue the works of one request: the ticket by which `cancel` knows it.

        on_event(index of the work, event) is called in the engine's thread: for each work any number of Deltas, then
        one Generated, Scored or exception; (-1, EngineFailed) for all that are left when the engine fails.  An on_event
        that raises is printed, and the request is cancelled.  Raises QueueFull, EngineFailed, Cancelled when it closes,
        and RequestError for a work that the engine cannot do; then none of them is done.
        """
        if not works:
            raise RequestError('there is nothing to do')
        for work in works:
            self._engine.check(work)
        with self._lock:
            if self.failure is not None:
                raise EngineFailed
            if self.closing:
                raise Cancelled
            free = sum(slot.job is None for slot in self._engine.slots)  # who comes has one at the next turn
            if self._waiting >= self._queue_size + free:
                raise QueueFull(f'{self._queue_size} requests are waiting already')
            self._waiting += 1
            ticket = next(self._tickets)
            self._open[ticket] = (on_event, len(works))
        self._news.put(('submit', ticket, works))
        return ticket

    def cancel(self, ticket: int) -> None:
        """End what a request still waits for, before the next turn.  A ticket that has ended is no error."""
        self._news.put(('cancel', ticket, None))

    def close(self, seconds: float | None = None) -> None:
        """Take no more requests and wait for those in line; cancel what is left after `seconds` (None: wait on)."""
        with self._lock:
            self.closing = True
        end = None if seconds is None else time.monotonic() + seconds
        while self._thread.is_alive():
            self._news.put(('close', 0, None))
            self._thread.join(0.05 if end is None else min(0.05, max(end - time.monotonic(), 0.001)))
            if end is not None and time.monotonic() >= end and self._thread.is_alive():
                for ticket in list(self._open):
                    self.cancel(ticket)
                end = None

    def stats(self) -> dict:
        """Count what there is and what was done, for /metrics."""
        engine, compiled = self._engine, self._engine.programs.compilations
        return {'slots': len(engine.slots), 'active': sum(slot.job is not None for slot in engine.slots),
                'waiting': self._waiting, **{f'{name}_total': engine.counts[name] for name in (
                    'prompt_tokens', 'cached_tokens', 'generation_tokens', 'decode_steps', 'prefill_pieces')},
                'jit_compiles_after_ready': compiled - self._compiled if self.warm.done() else 0,
                'works': dict(self._outcomes)}

    # ------------------------------------------------------------ the engine's thread

    def _run(self, warm_up: tuple[str, ...], num_beams: int) -> None:
        try:
            for _ in self._engine.warm_up(warm_up, num_beams):
                if self.closing:
                    break
            if self._line is not None and not self.closing:
                self._line.await_followers(lambda: self.closing)
            self._compiled = self._engine.programs.compilations
            self.warm.set_result(None)
            self._turns()
            if self._line is not None:
                self._line.end()
        except BaseException as error:  # the thread ends with it, and everybody must hear of it
            with self._lock:
                self.failure = error
            traceback.print_exception(error)
            if not self.warm.done():
                self.warm.set_exception(error)
            for ticket, (on_event, left) in list(self._open.items()):
                del self._open[ticket]
                self._outcomes['failed'] += left
                self._tell(ticket, on_event, -1, EngineFailed())
            self._waiting = 0

    def _turns(self) -> None:
        tickets: dict[int, int] = {}  # ours -> the engine's
        closing = False
        while not (closing and self._engine.idle and self._news.empty()):
            news = []
            if self._engine.idle:
                news.append(self._news.get())
            while True:
                try:
                    news.append(self._news.get_nowait())
                except queue.Empty:
                    break
            closing = closing or any(kind == 'close' for kind, _, _ in news)
            news = [item for item in news if item[0] != 'close']
            if self._line is not None and (news or not self._engine.idle):
                self._line.tell([[kind, ticket, works and [to_json(work) for work in works]]
                                 for kind, ticket, works in news])
            apply(self._engine, news, tickets, self._handlers)
            if not self._engine.idle:
                self._engine.tick()

    def _handlers(self, ticket: int) -> tuple[OnEvent, Callable[[], None]]:
        waits = True

        def admitted() -> None:
            nonlocal waits
            if waits:
                with self._lock:
                    self._waiting -= 1
            waits = False

        def on_event(index: int, event: Event) -> None:
            told, left = self._open[ticket]
            if not isinstance(event, Delta):
                admitted()  # a request can end in the line
                kind = 'cancelled' if isinstance(event, Cancelled) else 'failed' if isinstance(
                    event, Exception) else 'finished'
                self._outcomes[kind] += 1
                self._open[ticket] = (told, left - 1)
                if left == 1:
                    del self._open[ticket]
            self._tell(ticket, told, index, event)

        return on_event, admitted

    def _tell(self, ticket: int, on_event: OnEvent, index: int, event: Event) -> None:
        try:
            on_event(index, event)
        except Exception as error:  # a fault of who asked: the others' works go on
            traceback.print_exception(error)
            self.cancel(ticket)
