"""Run every command that the documents print, as printed and in the order printed.

    python -m instruments.documents.commands                 in a bare clone of HEAD, in a temporary directory
    python -m instruments.documents.commands --here          in the working tree, whose documents are read too
    python -m instruments.documents.commands --list          only say what would run and what would not

The documents are README.md, BUILD.md and docs/*.md.  A command stands in a fence that opens with ```bash; it is one
line, or several joined by a backslash or an open quote.  All commands share one working directory, so a later step
finds what an earlier one wrote, and each must end with exit code 0.  `python` is the interpreter that runs this file.

Words after `bash` in the opening line are marks.  `serve`: its commands start a server, which is up once GET /ready
answers, stays for the commands up to the end of the next fence, and must end with 0 when told to (SIGTERM).  Every
other mark (MARKS) says why the fence is not run here: it is listed in the output, never skipped silently.
"""
import contextlib
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import NamedTuple

from absl import app, flags

from mistake import Mistake

ROOT = pathlib.Path(__file__).parent.parent.parent
MARKS = {
    'ci': '.ci/run runs it by itself',
    'long': 'takes tens of minutes',
    'hours': 'takes hours',
    'python': 'needs another Python',
    'tpu': 'needs a TPU',
    'libtpu': 'needs the TPU compiler (700 MB)',
    'cloud': 'needs a Google Cloud project',
    'cluster': 'needs several machines',
    'torch': 'needs PyTorch and transformers (2 GB)',
    'weights': 'needs weights that are not fetched here',
}
PORT = 5007
TAIL = 30  # lines of a failed command's output


class Fence(NamedTuple):
    """The commands of one fence; line is that of its opening."""

    document: str
    line: int
    marks: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def reasons(self) -> list[str]:
        return [mark for mark in self.marks if mark != 'serve']


# ---------------------------------------------------------------- reading


def documents(root: pathlib.Path) -> list[str]:
    """Names of the documents in reading order."""
    return ['README.md', 'BUILD.md', *sorted(path.relative_to(root).as_posix() for path in root.glob('docs/*.md'))]


def read_fences(document: str, text: str) -> list[Fence]:
    """The bash fences of a document.

    Raises Mistake for an unknown mark, a fence that is not closed, and a command that does not end in its fence.
    """
    fences, opened, language, lines = [], 0, '', []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith('```'):
            lines.append(line)
        elif not opened:
            opened, language, lines = number, line[3:].strip(), []
        else:
            words = language.split()
            if words[:1] == ['bash']:
                place, marks = f'{document}:{opened}', tuple(words[1:])
                if unknown := set(marks) - {'serve', *MARKS}:
                    raise Mistake(f'{place}: {sorted(unknown)} is none of the marks serve, {", ".join(MARKS)}')
                fences.append(Fence(document, opened, marks, split_commands(lines, place)))
            opened = 0
    if opened:
        raise Mistake(f'{document}:{opened}: this fence is not closed')
    return fences


def split_commands(lines: list[str], place: str) -> tuple[str, ...]:
    """The commands of a fence; a line goes on after a backslash and inside quotes, and comment lines are left out."""
    commands, begun = [], ''
    for line in lines:
        if not begun and (not line.strip() or line.lstrip().startswith('#')):
            continue
        begun += line
        if not line.endswith('\\') and quotes_are_closed(begun):
            commands.append(begun)
            begun = ''
        else:
            begun += '\n'
    if begun:
        raise Mistake(f'{place}: the command {begun.strip()[:60]!r} does not end in its fence')
    return tuple(commands)


def quotes_are_closed(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- running


def environment() -> dict[str, str]:
    """The caller's, in which `python` is this interpreter; without what make and an IDE add."""
    left_out = ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'PYTHONPATH')
    values = {name: value for name, value in os.environ.items() if name not in left_out}
    return values | dict(PATH=f'{pathlib.Path(sys.executable).parent}{os.pathsep}{values.get("PATH", os.defpath)}')


def start(command: str, directory: pathlib.Path, log) -> subprocess.Popen:
    """The command in bash, in a process group of its own, with all of its output in `log`."""
    return subprocess.Popen(['bash', '-c', 'set -o pipefail\n' + command], cwd=directory, env=environment(),
                            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def end(process: subprocess.Popen, seconds: float = 60) -> int:
    """Ask the process group to end, kill it where it does not, and return the exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def tail(path: pathlib.Path) -> str:
    """The last lines of an output; of a line drawn over and over (a progress bar) what was drawn last."""
    lines = path.read_text(errors='replace').replace('\r\n', '\n').split('\n')
    return '\n'.join(line.rstrip('\r').rsplit('\r', 1)[-1] for line in lines[-TAIL:])


class Failed(Exception):
    """A command did not do what the documents promise; the text says which and shows its output."""


def failed(command: str, what: str, log: pathlib.Path) -> Failed:
    return Failed(f'{command}\n{what}; its output ends\n{tail(log)}')


class Runner:
    """Runs commands in one directory, and at most one server beside them."""

    def __init__(self, directory: pathlib.Path, logs: pathlib.Path, timeout: float = 1800):
        self.directory, self.timeout, self.ran = directory, timeout, 0
        self._logs = logs  # a directory for the commands' outputs
        self._server = None  # (command, process, log)

    def run(self, command: str) -> None:
        """Raises Failed unless the command ends with 0 within the time limit."""
        began, log = self._begin(command)
        with open(log, 'wb') as file:
            process = start(command, self.directory, file)
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                end(process, 5)
                raise failed(command, f'did not end within {self.timeout:g} s', log) from None
            except BaseException:  # Ctrl-C
                end(process, 5)
                raise
        self._finish(command, began, code, log)

    def serve(self, command: str) -> None:
        """Start a server and wait until it is ready.  Raises Failed when it ends before, or is not in time."""
        self.stop()
        began, log = self._begin(command)
        port = int((re.search(r'--lm_server\.port=(\d+)', command) or [0, PORT])[1])
        with socket.socket() as probe:
            if probe.connect_ex(('127.0.0.1', port)) == 0:
                raise Failed(f'{command}\nanother program listens on port {port} of this machine')
        with open(log, 'wb') as file:
            process = start(command, self.directory, file)
        self._server = command, process, log
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() - began > self.timeout:
                self._server = None
                end(process, 5)
                raise failed(command, f'is not ready after {time.monotonic() - began:.0f} s', log)
            time.sleep(0.2)
        print(f'   ready after {time.monotonic() - began:.1f} s', flush=True)

    def stop(self) -> None:
        """End the server, if there is one.  Raises Failed unless it ends with 0."""
        if self._server:
            (command, process, log), self._server = self._server, None
            died = process.poll() is not None
            code = end(process)
            if died or code:
                raise failed(command, f'ended {"by itself " if died else ""}with exit code {code}', log)
            print(f'   the server ended with {code}: {command.splitlines()[0]}', flush=True)

    def kill(self) -> None:
        if self._server:
            end(self._server[1], 5)
            self._server = None

    def _begin(self, command: str) -> tuple[float, pathlib.Path]:
        print(f'$ {command}', flush=True)
        self.ran += 1
        return time.monotonic(), self._logs / f'{self.ran}.txt'

    def _finish(self, command: str, began: float, code: int, log: pathlib.Path) -> None:
        print(f'   {time.monotonic() - began:.1f} s, exit code {code}', flush=True)
        if code:
            raise failed(command, f'ended with exit code {code}', log)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/ready', timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def run_fences(fences: list[Fence], runner: Runner | None) -> str:
    """Run the fences in order, or without a runner only say what there is; returns the line that sums it up.

    Raises Failed at the first command that fails.
    """
    began, ran, listed, serving = time.monotonic(), 0, Counter(), False
    for fence in fences:
        print(f'\n== {fence.document}:{fence.line}', flush=True)
        for command in fence.commands:
            if fence.reasons:
                listed[fence.reasons[0]] += 1
                print(f'-- not run here ({", ".join(MARKS[mark] for mark in fence.reasons)}): {command}', flush=True)
                continue
            ran += 1
            if runner is None:
                print(f'$ {command}')
            elif 'serve' in fence.marks:
                runner.serve(command)
            else:
                runner.run(command)
        if runner and serving and 'serve' not in fence.marks:
            runner.stop()
        serving = 'serve' in fence.marks and not fence.reasons
    if runner:
        runner.stop()
    why = ', '.join(f'{mark} {count}' for mark, count in listed.items())
    return (f'{ran} commands {"ran" if runner else "to run"}, {listed.total()} listed' + (f' ({why})' if why else '')
            + f', {time.monotonic() - began:.0f} s')


def read_all(root: pathlib.Path, names: list[str]) -> list[Fence]:
    return [fence for name in names for fence in read_fences(name, (root / name).read_text(encoding='utf-8'))]


def clone(root: pathlib.Path, parent: pathlib.Path) -> pathlib.Path:
    """A bare clone of HEAD: nothing that is not committed is in it."""
    if subprocess.run(['git', 'status', '--porcelain'], cwd=root, capture_output=True, text=True, check=True).stdout:
        print('the working tree has changes that are not committed: what runs is HEAD (--here runs the tree itself)')
    subprocess.run(['git', 'clone', '--quiet', str(root), str(parent / 'pallama')], check=True)
    return parent / 'pallama'


def main(argv) -> None:
    flag = flags.FLAGS
    with tempfile.TemporaryDirectory(prefix='pallama_') as temporary:
        temporary, root, runner = pathlib.Path(temporary), ROOT, None
        if not flag.here and not flag.list:
            root = clone(ROOT, temporary)
        if not flag.list:
            (temporary / 'outputs').mkdir()
            runner = Runner(root, temporary / 'outputs', flag.timeout)
        try:
            print(f'\n{run_fences(read_all(root, argv[1:] or documents(root)), runner)}')
        except Mistake as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        except Failed as error:
            print(f'\nFAILED: {error}', file=sys.stderr)
            sys.exit(1)
        finally:
            if runner:
                runner.kill()


if __name__ == '__main__':
    flags.DEFINE_boolean('here', False, 'run in the working tree instead of a bare clone of HEAD')
    flags.DEFINE_boolean('list', False, 'run nothing: only say what would run and what would not')
    flags.DEFINE_float('timeout', 1800, 'seconds that one command may take', 1)
    app.run(main)
