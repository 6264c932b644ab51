"""Let the processes of one run (often one a host) agree on a value, or fail together.  Neighbour: start.py.

Everything goes through the key-value store of JAX's coordination service, which process 0 hosts
(start.start_processes connects to it), so nothing here touches a device.  With one process there is nobody to ask,
and each function returns at once.  All processes must make the same calls in the same order.
"""
import itertools
import json
import time
from collections.abc import Callable

from jax._src import distributed  # the client of the coordination service has no public name

from mistake import Mistake

KINDS = (Mistake, OSError)  # of errors that another process may see as its own
PATIENCE_SECONDS = 600  # how long one process waits for the others at one point; a dead one is noticed earlier
_calls = itertools.count()


def count() -> int:
    """Return the number of processes of the run.  (jax.process_count would start the devices.)"""
    return distributed.global_state.num_processes


def index() -> int:
    """Return the number of this process; 0 leads: it writes what is written once."""
    return distributed.global_state.process_id


def exchange(text: str) -> list[str]:
    """Give a text and get those of all processes, in order.  Raises OSError naming who did not come in time."""
    if count() == 1:
        return [text]
    client, call, texts = distributed.global_state.client, next(_calls), []
    deadline = time.monotonic() + PATIENCE_SECONDS
    client.key_value_set(f'pallama/{call}/{index()}', text)
    for process in range(count()):
        try:
            left = max(0, deadline - time.monotonic())
            texts.append(client.blocking_key_value_get(f'pallama/{call}/{process}', int(1000 * left)))
        except RuntimeError as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise
            raise OSError(f'process {index()}: process {process} did not come to the same point within '
                          f'{PATIENCE_SECONDS} s: its own log says why') from None
    if call:
        client.key_value_delete(f'pallama/{call - 1}/{index()}')  # all have read it: they have come here
    return texts


def agree(work: Callable[[], object], undo: Callable[[], object] = lambda: None) -> list:
    """Do `work` on every process and return all results [of process 0, of 1, ..], JSON values; fail on all if on one.

    An exception is raised again where it happened; elsewhere as Mistake, OSError or (a fault of the code)
    RuntimeError, naming the process.  Every process has called `undo` before, and waited for the others' `undo`.
    """
    result = failed = None
    try:
        result = work()
    except Exception as error:
        failed = error
    if count() == 1:
        if failed:
            undo()
            raise failed
        return [result]
    said = f'{type(failed).__name__}: {failed}' if failed else None
    kind = next((kind.__name__ for kind in KINDS if isinstance(failed, kind)), None)
    answers = [json.loads(text) for text in exchange(json.dumps([said, kind, result]))]
    faults = [(process, said, kind) for process, (said, kind, _) in enumerate(answers) if said]
    if faults:
        undo()
        exchange('undone')
        if failed:
            raise failed
        process, said, kind = faults[0]
        kinds = {kind.__name__: kind for kind in KINDS}
        raise kinds.get(kind, RuntimeError)(f'process {process} failed: {said}')
    return [result for _, _, result in answers]


def refuse_difference(what: str, value: str, remedy: str) -> None:
    """Raise Mistake on every process unless all of them give the same value."""
    values = exchange(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise Mistake(f'{what} is {values[0]} on process 0 and {other} on process {process}: {remedy}')
