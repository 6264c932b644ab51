"""A server under test: how it is started and asked.  Each runs alone, as a process group of its own."""
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from instruments.bench.serving_load import Ask, Piece, Protocol
from mistake import Mistake

ROOT = pathlib.Path(__file__).parent.parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every contender is given alike.

    length: tokens of a prompt and its answer together, at most.  input_length: of a prompt.  reuse: keep the cache of a
    prompt's beginning for the next request.  queue: requests that may wait, where the server can be told.
    """

    slots: int = 8
    length: int = 1792
    input_length: int = 1536
    reuse: bool = True
    queue: int = 32
    threads: int = 2


@dataclasses.dataclass(frozen=True)
class Contender:
    """command(port, settings) -> arguments.  bits: of a weight as it is read.  mixes: those that it can take part in.
    scores: it answers EasyLM's POST /loglikelihood.  notes: what a reader must know."""

    name: str
    command: Callable[[int, Settings], list[str]]
    protocol: Callable[[Settings], Protocol]
    bits: float
    ready: str
    mixes: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scores: bool = False
    metrics: bool = False
    notes: str = ''


class Running:
    """A contender's process, between entering and leaving; `seconds` is how long it took to be ready."""

    def __init__(self, contender: Contender, settings: Settings, environment: Mapping[str, str] | None = None,
                 patience: float = 900.0):
        self.contender, self.settings, self.patience = contender, settings, patience
        self.environment = {**os.environ, **contender.environment, **(environment or {})}

    def __enter__(self) -> 'Running':
        port = free_port()
        self.url, self.protocol = f'http://127.0.0.1:{port}', self.contender.protocol(self.settings)
        self.log = tempfile.TemporaryFile('w+', errors='replace')
        began = time.perf_counter()
        self.process = subprocess.Popen(self.contender.command(port, self.settings), cwd=ROOT, env=self.environment,
                                        stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not answers(self.url + self.contender.ready):
                if self.process.poll() is not None or time.perf_counter() - began > self.patience:
                    raise Mistake(f'{self.contender.name} did not become ready: {self.tail()}')
                time.sleep(0.05)
        except BaseException:
            self.__exit__()
            raise
        self.seconds = time.perf_counter() - began
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self) -> str:
        self.log.seek(0)
        return self.log.read()[-1000:]

    def __exit__(self, *error) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
        self.log.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


# ---------------------------------------------------------------- OpenAI's way


def openai_protocol(model: str, as_text: bool = False, **fields) -> Protocol:
    """POST /v1/completions with token ids (or their text), greedy, a stream that ends with its usage."""
    def body(ask: Ask) -> dict:
        return {'model': model, 'prompt': ask.text if as_text else list(ask.prompt), 'max_tokens': ask.tokens,
                'temperature': 0, 'stream': True, 'stream_options': {'include_usage': True}, **fields}

    def read(event: dict) -> Piece:
        if 'error' in event:
            raise ValueError(f'{event["error"]}')
        usage, choices = event.get('usage'), event.get('choices') or [{}]
        return Piece(choices[0].get('text') or '', usage and usage['completion_tokens'])

    return Protocol('/v1/completions', body, read)
