"""Measure the machine beside a run, and what a server's processes take of it: /proc, no package but numpy."""
import concurrent.futures
import os
import pathlib
import platform
import threading
import time

import numpy as np

TICK, PAGE = os.sysconf('SC_CLK_TCK'), os.sysconf('SC_PAGE_SIZE')


def cpu_model() -> str:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')),
                platform.processor())


def read_speed(threads: int, megabytes: int = 256, repeats: int = 5) -> float:
    """GB/s at which so many threads together read arrays that no cache holds; the best of the repeats."""
    arrays = [np.ones(megabytes * 2**20 // 8) for _ in range(threads)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, arrays))
        best = 0.0
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - began) / 1e9)
    return best


def multiply_speed(size: int = 1536, repeats: int = 5) -> float:
    """GFLOP/s of a float32 product of matrices; the best of the repeats."""
    a = np.ones((size, size), np.float32)
    a @ a
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def machine() -> dict:
    """The CPU, how busy it is, and how fast it reads and multiplies now."""
    load = os.getloadavg()[0]  # before we make load ourselves
    threads = len(os.sched_getaffinity(0))
    return {'cpu': cpu_model(), 'cores': threads, 'loadavg': round(load, 2),
            'read_gb_s': round(read_speed(threads), 2), 'f32_gflop_s': round(multiply_speed(), 1)}


def tree(pid: int) -> list[int]:
    """The process and all below it."""
    found, todo = [], [pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        for children in pathlib.Path(f'/proc/{pid}/task').glob('*/children'):
            try:
                todo += map(int, children.read_text().split())
            except OSError:
                continue  # the thread ended
    return found


def taken(pid: int) -> tuple[int, float]:
    """(resident bytes, CPU seconds) of the process and all below it."""
    memory, seconds = 0, 0.0
    for each in tree(pid):
        try:
            fields = pathlib.Path(f'/proc/{each}/stat').read_text().rpartition(')')[2].split()
        except OSError:
            continue
        memory += int(fields[21]) * PAGE
        seconds += (int(fields[11]) + int(fields[12])) / TICK
    return memory, seconds


class Watch:
    """Between entering and leaving: `peak_rss` (bytes, looked at ten times a second), `cpu_seconds` of the server and
    `client_cpu_seconds` of this process."""

    def __init__(self, pid: int):
        self.pid, self.peak_rss, self.cpu_seconds, self.client_cpu_seconds = pid, 0, 0.0, 0.0

    def __enter__(self) -> 'Watch':
        self._stop = threading.Event()
        self.peak_rss, self._before = taken(self.pid)
        self._own = time.process_time()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            self.peak_rss = max(self.peak_rss, taken(self.pid)[0])

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        memory, seconds = taken(self.pid)
        self.peak_rss, self.cpu_seconds = max(self.peak_rss, memory), seconds - self._before
        self.client_cpu_seconds = time.process_time() - self._own

    def figures(self, tokens: int) -> dict:
        return {'peak_rss': self.peak_rss, 'cpu_seconds': round(self.cpu_seconds, 2),
                'client_cpu_seconds': round(self.client_cpu_seconds, 2),
                'cpu_seconds_per_1000_tokens': round(1e3 * self.cpu_seconds / tokens, 3) if tokens else None}
