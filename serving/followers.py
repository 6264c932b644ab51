"""Serve with several processes (hosts): process 0 answers requests, the others follow.  Before: engine.py.

A program over the devices of all processes runs when every process has started it, so all must make the same calls of
their engines in the same order.  Process 0 writes each call, a method's name and its arguments as JSON, into the
key-value store of JAX's coordination service before it makes it; the others read it and make it too.  A host's
decisions on the way (batches, growing caches, refusals) follow from the arguments, from the calls before, and from
results that every process holds whole (`Engine._shardings`).

Calls go through the store, not by a broadcast between devices, because a server can be idle for days: devices that
wait in a collective are busy, and some transports give up after a while.  A call costs two round trips.

Nobody is left behind: start.failing_together ends all when one fails, and JAX when one is gone (process 0: at once;
another: when its heartbeat has been missing for start.HEARTBEAT_SECONDS).
"""
import contextlib
import json
import signal
from collections.abc import Callable

import jax
from jax._src.distributed import global_state  # the client of the coordination service has no public name

from serving.engine import Engine, RequestError

METHODS = ('generate', 'greedy_until', 'loglikelihood', 'loglikelihood_rolling')  # of Engine, which process 0 may name
MAX_CALL_BYTES = 64_000_000
MEET_SECONDS = 600  # a follower can be behind by a program it must compile, and process 0 had in its cache
ASK_SECONDS = 30  # for one question to the store, which is asked again


class CallLine:
    """Carries calls from process 0 to the others, one after the other, and at last that there are no more."""

    def __init__(self):
        self._client = global_state.client
        self._count = 0

    # ------------------------------------------------------------ process 0

    def tell(self, method: str, arguments: dict) -> None:
        """Tell every process of the call and wait until it knows.  Raises RequestError, first, for one too large."""
        text = json.dumps([method, arguments], ensure_ascii=False)
        if (size := len(text.encode())) > MAX_CALL_BYTES:
            raise RequestError(f'{size} bytes of text: at most {MAX_CALL_BYTES} can be sent to the other processes')
        self._client.key_value_set(self._key(), text)
        self._meet()
        self._client.key_value_delete(self._key())
        self._count += 1

    def end(self) -> None:
        """Tell the others that there are no more calls."""
        self._client.key_value_set(self._key(), 'null')

    def await_followers(self, closing: Callable[[], bool]) -> None:
        """Wait until all others are ready, or closing() says that nobody needs them any more."""
        for process in range(1, global_state.num_processes):
            while self._get(f'pallama/ready/{process}', 1) is None and not closing():
                pass

    # ------------------------------------------------------------ the others

    def ready(self) -> None:
        """Tell process 0 that this one has compiled its programs."""
        self._client.key_value_set(f'pallama/ready/{global_state.process_id}', '')

    def ended(self) -> bool:
        """Tell whether process 0 has no more calls; ask where a call would have to wait."""
        return self._get(self._key(), 0.01) == 'null'

    def hear(self) -> tuple[str, dict] | None:
        """Wait for (method, arguments) of the next call, however late it comes; None when there are no more."""
        while (text := self._get(self._key(), ASK_SECONDS)) is None:
            pass
        if (call := json.loads(text)) is None:
            return None
        method, arguments = call
        if method not in METHODS:
            raise RuntimeError(f'process 0 names {method!r}, which is none of {METHODS}')
        self._meet()
        self._count += 1
        return method, arguments

    # ------------------------------------------------------------ both

    def _key(self) -> str:
        return f'pallama/calls/{self._count}'

    def _meet(self) -> None:
        self._client.wait_at_barrier('pallama/calls', 1000 * MEET_SECONDS)

    def _get(self, key: str, seconds: float) -> str | None:
        try:
            return self._client.blocking_key_value_get(key, int(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise
            return None


def follow(engine: Engine, warm_up: tuple[str, ...], line: CallLine) -> None:
    """Compile the programs of `warm_up`, then make the calls of process 0 to the end: what every other process does.

    From here on SIGTERM and Ctrl-C mean nothing to this process: process 0 needs it for the requests in line.
    Raises what the engine raises, unless it concerns one request (EngineThread says which errors do).
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for _ in engine.warm_up(warm_up):
        if line.ended():
            return
    line.ready()
    while (call := line.hear()) is not None:
        method, arguments = call
        with contextlib.suppress(RequestError, FloatingPointError):  # process 0 tells the client
            getattr(engine, method)(**arguments)
