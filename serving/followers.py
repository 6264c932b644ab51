"""Serve with several processes (hosts): process 0 answers requests, the others follow.  Before: engine.py.

A program over the devices of all processes runs when every process has started it, so all engines must make the same
turns.  Process 0 writes what came since the last one (works and cancellations, as JSON) into the key-value store of
JAX's coordination service before each turn; the others read it and make the turn too.  All that an engine decides
follows from that, from the turns before, and from results that every process holds whole (`Programs._shardings`).

Turns go through the store, not by a broadcast between devices, because a server can be idle for days: devices that wait
in a collective are busy, and some transports give up after a while.  A turn costs one round trip, or one for each part
of a large one; every MEET_EVERY parts all meet, and what was heard is deleted.

Nobody is left behind: start.failing_together ends all when one fails, and JAX when one is gone (process 0: at once;
another: when its heartbeat has been missing for start.HEARTBEAT_SECONDS).
"""
import dataclasses
import json
import signal
from collections.abc import Callable

import jax
from jax._src.distributed import global_state  # the client of the coordination service has no public name

from serving.engine import Engine
from serving.work import Generate, Sampling, Score, Work

MEET_EVERY = 256  # parts
PART_BYTES = 64_000_000  # at most, of one value in the store
MORE, LAST, END = '+', '.', 'end'  # how a part begins that others follow, or none; what stands where no turn comes
MEET_SECONDS = 600  # a follower can be behind by a program it must compile, and process 0 had in its cache
ASK_SECONDS = 30  # for one question to the store, which is asked again


class CallLine:
    """Carries turns from process 0 to the others, one after the other, and at last that there are no more."""

    def __init__(self):
        self._client = global_state.client
        self._count = 0

    # ------------------------------------------------------------ process 0

    def tell(self, news: list) -> None:
        """Tell every process of a turn."""
        text = json.dumps(news)  # ASCII: as many bytes as characters
        for begin in range(0, len(text), PART_BYTES):
            part = text[begin:begin + PART_BYTES]
            self._client.key_value_set(self._key(), (MORE if begin + len(part) < len(text) else LAST) + part)
            self._next(delete=True)

    def end(self) -> None:
        """Tell the others that there are no more turns."""
        self._client.key_value_set(self._key(), END)

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
        """Tell whether process 0 has no more turns; ask where a turn would have to wait."""
        return self._get(self._key(), 0.01) == END

    def hear(self) -> list | None:
        """Wait for the news of the next turn, however late it comes; None when there are no more."""
        text, mark = '', MORE
        while mark == MORE:
            while (part := self._get(self._key(), ASK_SECONDS)) is None:
                pass
            if part == END:
                return None
            self._next(delete=False)
            mark, text = part[0], text + part[1:]
        return json.loads(text)

    # ------------------------------------------------------------ both

    def _key(self) -> str:
        return f'pallama/calls/{self._count}'

    def _next(self, delete: bool) -> None:
        self._count += 1
        if self._count % MEET_EVERY == 0:
            self._client.wait_at_barrier(f'pallama/calls/{self._count}', 1000 * MEET_SECONDS)
            if delete:
                for count in range(self._count - MEET_EVERY, self._count):
                    self._client.key_value_delete(f'pallama/calls/{count}')

    def _get(self, key: str, seconds: float) -> str | None:
        try:
            return self._client.blocking_key_value_get(key, int(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise
            return None


def to_json(work: Work) -> dict:
    """Write a work as JSON-able values."""
    return {'kind': type(work).__name__, **dataclasses.asdict(work)}


def from_json(values: dict) -> Work:
    """Read what `to_json` wrote."""
    kind = {'Generate': Generate, 'Score': Score}[values.pop('kind')]
    tuples = lambda value: tuple(map(tuples, value)) if isinstance(value, list) else value
    values = {name: tuples(value) for name, value in values.items()}
    if kind is Generate:
        values['sampling'] = Sampling(**{name: tuples(value) for name, value in values['sampling'].items()})
    return kind(**values)


def apply(engine: Engine, news: list, tickets: dict[int, int], handlers) -> None:
    """Tell the engine what came since the last turn: what every process of a server does alike."""
    for kind, ticket, works in news:
        if kind == 'submit':
            tickets[ticket] = engine.submit(works, *handlers(ticket))
        elif ticket in tickets:
            engine.cancel(tickets.pop(ticket))
    for ticket in [ticket for ticket, own in tickets.items() if not engine.knows(own)]:
        del tickets[ticket]


def follow(engine: Engine, warm_up: tuple[str, ...], num_beams: int, line: CallLine) -> None:
    """Compile the programs of `warm_up`, then make the turns of process 0 to the end: what every other process does.

    From here on SIGTERM and Ctrl-C mean nothing to this process: process 0 needs it for the requests in line.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for _ in engine.warm_up(warm_up, num_beams):
        if line.ended():
            return
    line.ready()
    tickets: dict[int, int] = {}
    while (news := line.hear()) is not None:
        news = [(kind, ticket, works and [from_json(work) for work in works]) for kind, ticket, works in news]
        apply(engine, news, tickets, lambda ticket: (lambda index, event: None, lambda: None))
        if not engine.idle:
            engine.tick()
