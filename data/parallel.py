"""Tokenize in worker processes: the same results as in one process, in the order of the lines.

A worker is this file run as a program: told the tokenizer and the text settings once, it answers chunks of lines until
its input ends.  It is neither a fork (JAX has threads) nor one of multiprocessing's (which import the main program, and
pickle).  A frame, both ways, is a line of JSON and then as many bytes as its 'bytes' says.

Neighbours: text_processor.py below, records.py above.
"""
import contextlib
import json
import os
import queue
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from data.text_processor import TextProcessor, tokenize
from data.tokenizer import tokenizer_from_bytes

ROOT = Path(__file__).parent.parent


class Workers:
    """Starts processes that tokenize as `processor` does, and ends them at `close()` or with this object.

    Raises ChildProcessError when one of them ends before its time.
    """

    def __init__(self, processor: TextProcessor, processes: int):
        self._processes = [subprocess.Popen([sys.executable, '-m', 'data.parallel'], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, cwd=ROOT, process_group=0)  # Ctrl-C is not theirs
                           for _ in range(processes)]
        self._idle, self._threads = queue.SimpleQueue(), ThreadPoolExecutor(processes, 'tokenize')
        self.close = weakref.finalize(self, _end, self._processes, self._threads)
        tokenizer = processor.tokenizer
        greeting = dict(file_name=tokenizer.file_name, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id,
                        pad=tokenizer.pad_token_id, settings=processor.settings)
        for process in self._processes:
            ready, _ = _ask(process, greeting, tokenizer.source_bytes)
            assert ready['settings'] == processor.settings, 'a worker made another tokenizer of the same bytes'
            self._idle.put(process)

    def outcomes(self, lines: Iterable, chunk_size: int, batch_size: int) -> Iterator[tuple]:
        """Yield (line, `tokenize` of line.text) for each line, in order.

        A worker gets `chunk_size` lines at a time; at most `batch_size` lines, or one chunk for each worker if that
        is more, are read and tokenized ahead of what was taken.
        """
        lines, pending = iter(lines), deque()
        ahead = max(len(self._processes), batch_size // chunk_size)
        try:
            while chunk := list(islice(lines, chunk_size)):
                header, body = {'lengths': [len(line.text) for line in chunk]}, b''.join(line.text for line in chunk)
                pending.append((chunk, self._threads.submit(_ask_idle, self._idle, header, body)))
                if len(pending) == ahead:
                    yield from _answered(*pending.popleft())
            while pending:
                yield from _answered(*pending.popleft())
        finally:
            for _, future in pending:
                future.cancel()


def _answered(chunk: list, future: Future) -> Iterator[tuple]:
    header, body = future.result()
    count = sum(max(length, 0) for length in header['lengths'])
    tokens = np.frombuffer(body, '<i4', count).tolist()
    loss_mask = np.frombuffer(body, 'u1', count, offset=4 * count).astype(float).tolist()
    start = 0
    for line, length, weight, problem in zip(chunk, header['lengths'], header['weights'], header['problems'],
                                             strict=True):
        end = start + max(length, 0)
        yield line, ((None, None, 1.0, problem) if length < 0 else
                     (tokens[start:end], loss_mask[start:end], weight, problem))
        start = end


def _ask_idle(idle: queue.SimpleQueue, header: dict, body: bytes) -> tuple[dict, bytes]:
    process = idle.get()
    try:
        return _ask(process, header, body)
    finally:
        idle.put(process)


def _ask(process: subprocess.Popen, header: dict, body: bytes) -> tuple[dict, bytes]:
    try:
        _write(process.stdin, header, body)
        answer = _read(process.stdout)
    except BrokenPipeError:
        answer = None
    if answer is None:
        raise ChildProcessError(f'a tokenizer process ended with code {process.wait()} (negative: killed by that '
                                'signal; is the memory full?); with tokenizer_processes=1 there are none')
    return answer


def _end(processes: list[subprocess.Popen], threads: ThreadPoolExecutor) -> None:
    for process in processes:
        process.terminate()
    threads.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was not sent yet has nobody to go to
                pipe.close()


def _write(pipe, header: dict, body: bytes) -> None:
    pipe.write(json.dumps(header | {'bytes': len(body)}).encode() + b'\n' + body)
    pipe.flush()


def _read(pipe) -> tuple[dict, bytes] | None:
    """Read the next frame; None where the other side has ended, be it in the middle of one."""
    line = pipe.readline()
    if not line.endswith(b'\n'):
        return None
    header = json.loads(line)
    body = pipe.read(header['bytes'])
    return (header, body) if len(body) == header['bytes'] else None


# ---------------------------------------------------------------- the worker


def main() -> None:
    """Answer frames on standard input until it ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # whatever a library prints must not stand between the frames
    frame = _read(requests)
    if frame is None:
        return
    greeting, source_bytes = frame
    settings = {name: value for name, value in greeting['settings'].items() if name != 'tokenizer'}
    name, ids = greeting['file_name'], (greeting[role] for role in ('bos', 'eos', 'pad'))
    processor = TextProcessor(tokenizer_from_bytes(name, source_bytes, *ids, source=name), **settings)
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the answer any more
        _write(answers, {'settings': processor.settings}, b'')
        while (frame := _read(requests)) is not None:
            header, body = frame
            lengths, weights, problems, tokens, loss_mask, start = [], [], [], [], [], 0
            for length in header['lengths']:
                of_line, mask_of_line, weight, problem = tokenize(processor, body[start:start + length])
                start += length
                weights.append(weight)
                problems.append(problem)
                lengths.append(-1 if of_line is None else len(of_line))
                tokens += of_line or []
                loss_mask += mask_of_line or []
            _write(answers, {'lengths': lengths, 'weights': weights, 'problems': problems},
                   np.array(tokens, '<i4').tobytes() + np.array(loss_mask, 'u1').tobytes())


if __name__ == '__main__':
    main()
