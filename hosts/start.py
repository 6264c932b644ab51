"""Start the processes of one run together, and end them together.  Neighbour: processes.py.

Programs call `start_processes(flags)` before any other use of JAX; decorate main with `@failing_together()`.
"""
import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax._src import distributed  # the coordination service's client has no public name
from ml_collections import ConfigDict

from hosts import processes
from mistake import Mistake

MEETING_SECONDS = 300  # within which all processes of a run must have started
HEARTBEAT_SECONDS = 60  # a process that is silent so long is dead, and JAX ends the others
FAILURES = 'pallama/failures'  # in the coordination service: what ended a process


def start_processes(flags: ConfigDict) -> None:
    """Call jax.distributed.initialize as the jax_distributed flags say, before any other use of JAX.

    Afterwards only process 0 prints, unless --log_all_worker, and all processes have the same flags.  Raises Mistake
    naming the flag when they do not meet within MEETING_SECONDS.  A second call does nothing.
    """
    values = flags.jax_distributed.to_dict()
    wanted = values.pop('initialize_jax_distributed') or flags.get('initialize_jax_distributed', False)
    given = {name: value for name, value in values.items() if value is not None}
    if given and not wanted:
        raise Mistake(f'jax_distributed.{next(iter(given))} has no effect without '
                      '--jax_distributed.initialize_jax_distributed=True')
    if not wanted or jax.distributed.is_initialized():
        return
    if 'local_device_ids' in given:
        ids = given['local_device_ids'].split(',')
        if not all(number.strip().isdecimal() for number in ids):
            raise Mistake(f'jax_distributed.local_device_ids={given["local_device_ids"]!r} must be numbers with '
                          "commas between: '0,1,2'")
        given['local_device_ids'] = [int(number) for number in ids]
    if given.keys() >= {'coordinator_address', 'num_processes', 'process_id'}:
        meet(given['coordinator_address'], given['num_processes'], given['process_id'], MEETING_SECONDS)
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM, and the process would stay
    try:
        jax.distributed.initialize(**given, initialization_timeout=MEETING_SECONDS,
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise Mistake(f'jax_distributed: {error} (outside TPU pods, GKE, Slurm and Open MPI give '
                      '--jax_distributed.coordinator_address, --jax_distributed.num_processes and '
                      '--jax_distributed.process_id)') from None
    if processes.count() == 1:
        return
    threading.Thread(target=_end_with_the_others, daemon=True).start()
    with failing_together():
        refuse_other_flags(flags)
    if processes.index() and not flags.get('log_all_worker', False):
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')


def meet(address: str, count: int, index: int, seconds: float) -> None:
    """Call the roll of all processes at `address`, where JAX's coordination service will listen after it.

    JAX itself aborts the process, without naming a flag, when one is missing or two have the same number.  Process 0
    listens; each of the others says {"num_processes": .., "process_id": ..} in a line and gets {"error": text or null}.
    Raises Mistake on all of them naming the flag that is wrong.
    """
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Mistake(f'jax_distributed.coordinator_address={address!r} must be HOST:PORT of process 0')
    if not 0 <= index < count:
        raise Mistake(f'jax_distributed.process_id={index} must be from 0 to num_processes-1: '
                      f'jax_distributed.num_processes={count}')
    if count == 1:
        return
    error = _call_the_roll(int(port), count, seconds) if index == 0 else \
        _answer_the_roll((host.strip('[]'), int(port)), count, index, seconds)
    if error:
        raise Mistake(error)


def _call_the_roll(port: int, count: int, seconds: float) -> str | None:
    """Wait for the others, as process 0, and tell them what is wrong, or None."""
    deadline = time.monotonic() + seconds
    try:
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(('', port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=count,
                                      dualstack_ipv6=both)
    except OSError as error:
        return (f'jax_distributed.coordinator_address: process 0 cannot listen on port {port}: {error}; choose another '
                'port')
    missing, connections, error = set(range(1, count)), [], None
    with server:
        while missing and not error:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                error = (f'jax_distributed.num_processes={count}, but of 0..{count - 1} these did not come within '
                         f'{seconds:g} s: {sorted(missing)}; start them with the same coordinator_address, or lower '
                         '--jax_distributed.num_processes')
                break
            said = _read_line(connection, 5)
            if not isinstance(said, dict) or set(said) != {'num_processes', 'process_id'}:
                connection.close()  # not one of ours
                continue
            connections.append(connection)
            if said['num_processes'] != count:
                error = (f'jax_distributed.num_processes={count} on process 0, but {said["num_processes"]} on process '
                         f'{said["process_id"]}: give all processes the same number')
            elif said['process_id'] not in missing:
                error = (f'jax_distributed.process_id={said["process_id"]} was given to two processes: number them '
                         f'0..{count - 1}')
            missing.discard(said['process_id'])
    for connection in connections:
        with connection:
            connection.sendall(json.dumps(dict(error=error)).encode() + b'\n')
    return error


def _answer_the_roll(address: tuple[str, int], count: int, index: int, seconds: float) -> str | None:
    """Report to process 0, as one of the others, and return what it says is wrong, or None."""
    deadline, reason = time.monotonic() + seconds, 'nothing came back'
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=max(0.001, deadline - time.monotonic())) as connection:
                connection.sendall(json.dumps(dict(num_processes=count, process_id=index)).encode() + b'\n')
                verdict = _read_line(connection, max(0.001, deadline - time.monotonic()) + 5)
            if isinstance(verdict, dict) and 'error' in verdict:
                return verdict['error']
            reason = 'what listens there is not process 0 of a run that waits for its processes'
        except OSError as error:
            reason = str(error)
        time.sleep(0.1)
    return (f"jax_distributed.coordinator_address='{address[0]}:{address[1]}': process {index} did not reach process 0 "
            f'there within {seconds:g} s: {reason}; start process 0, or correct the address')


def _read_line(connection: socket.socket, seconds: float):
    """Read the JSON of one line; None for anything else."""
    connection.settimeout(seconds)
    try:
        return json.loads(connection.makefile('rb').readline(4096))
    except (OSError, ValueError):
        return None


def refuse_other_flags(flags: ConfigDict) -> None:
    """Raise Mistake on every process, naming a flag that two of them do not share."""
    own = {name: repr(value) for name, value in _flat(flags.to_dict()).items()
           if name not in ('jax_distributed.process_id', 'jax_distributed.local_device_ids')}
    theirs = [json.loads(text) for text in processes.exchange(json.dumps(own))]
    for process, other in enumerate(theirs):
        for name in sorted(own):
            if other.get(name) != theirs[0].get(name):
                raise Mistake(f'{name} is {theirs[0].get(name)} on process 0 and {other.get(name)} on process '
                              f'{process}: start all processes with the same flags')


def _flat(values: dict, prefix: str = '') -> dict:
    return {name: leaf for key, value in values.items() for name, leaf in
            (_flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}).items()}


@contextmanager
def failing_together() -> Iterator[None]:
    """End all processes within seconds of an exception in one of them; decorates a program's main.

    JAX would leave the others waiting in a collective, and the failed one waiting for them in its exit.
    """
    try:
        yield
    except BaseException as error:
        if processes.count() > 1:
            code = 2 if isinstance(error, Mistake | OSError) else 130 if isinstance(error, KeyboardInterrupt) else 1
            atexit.register(_leave, code)  # after the error has been printed, and before JAX's farewell to all
            what = ' '.join(str(error).split())[:1000] or type(error).__name__
            try:
                distributed.global_state.client.key_value_set(
                    f'{FAILURES}/{processes.index()}', f'process {processes.index()} failed: {what}')
            except RuntimeError:
                pass  # process 0 is gone, and the service with it: the others have noticed
        raise


def _end_with_the_others() -> None:
    """Look every second, in a thread, whether another process has failed; then end this one: exit code 2."""
    while True:
        try:
            failures = distributed.global_state.client.key_value_dir_get(FAILURES)
        except (AttributeError, RuntimeError):
            return  # the run is over, or process 0 is gone: JAX says so
        if any(name.endswith(f'/{processes.index()}') for name, _ in failures):
            return  # this one has failed itself, and leaves in its own way
        if failures:
            print(f'\n{os.path.basename(sys.argv[0])}: {failures[0][1]}; so process {processes.index()} ends too',
                  file=sys.stderr)
            _leave(2)
        time.sleep(1)


def _leave(code: int) -> None:
    """End this process at once; process 0 a little later, for the service through which the others learn ends too."""
    sys.stdout.flush()
    sys.stderr.flush()
    if processes.index() == 0:
        time.sleep(3)
    os._exit(code)
