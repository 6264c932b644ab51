"""Give JAX to one thread, with a bounded line of requests before it.  Before: engine.py; after: api.py."""
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor

from serving.engine import PROGRAMS, RequestError
from serving.followers import CallLine


class QueueFull(Exception):
    """As many requests wait as may wait."""


class EngineFailed(Exception):
    """The engine raised something unforeseen; it takes no more work."""


class EngineThread:
    """Calls the engine from one thread; requests stand in a bounded line before it.

    Work is one call of a method of the engine: `submit('generate', prompts=..., temperature=...)`.  The first work is
    to warm up.  A RequestError or FloatingPointError concerns one request; after any other exception no work is done
    (`failure`).  line: where other processes hear of each call before it is made.
    """

    def __init__(self, engine, queue_size: int, warm_up: tuple[str, ...] = PROGRAMS, line: CallLine | None = None):
        self.failure: BaseException | None = None
        self._engine, self._line = engine, line
        self._closing = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix='engine')
        self._places = threading.BoundedSemaphore(queue_size + 1)  # + the one that is being served
        self._queue_size = queue_size
        self.warm = self._executor.submit(self._warm_up, warm_up)
        self.warm.add_done_callback(self._note_failure)

    @property
    def ready(self) -> bool:
        """Whether it is warmed up, and has not failed, and is not closing."""
        return self.warm.done() and self.failure is None and not self._closing

    def submit(self, method: str, **arguments) -> Future:
        """Queue engine.method(**arguments); the Future carries its result or exception.

        Raises QueueFull or EngineFailed.
        """
        if self.failure is not None:
            raise EngineFailed
        if not self._places.acquire(blocking=False):
            raise QueueFull(f'{self._queue_size} requests are waiting already')
        future = self._executor.submit(self._call, method, arguments)
        future.add_done_callback(lambda _: self._places.release())
        future.add_done_callback(self._note_failure)
        return future

    def _call(self, method: str, arguments: dict):
        if self.failure is not None:
            raise EngineFailed
        if self._line is not None:
            self._line.tell(method, arguments)
        return getattr(self._engine, method)(**arguments)

    def _warm_up(self, programs: tuple[str, ...]) -> None:
        for _ in self._engine.warm_up(programs):
            if self._closing:
                return
        if self._line is not None:
            self._line.await_followers(lambda: self._closing)

    def close(self) -> None:
        """Wait for the work that is under way or in line, not for warming up; submit nothing afterwards."""
        self._closing = True
        self._executor.shutdown(wait=True)
        if self._line is not None:
            self._line.end()

    def _note_failure(self, future: Future) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, RequestError | FloatingPointError | EngineFailed):
            self.failure = error
            traceback.print_exception(error)
