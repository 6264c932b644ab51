"""Mix several files of records, each with its share of an epoch.  Before: records.py; after: rows.py.

An epoch has as many rows as all files together, of each file its share, rounded.  A file is gone through in passes,
shuffled anew each: one whose share is more than its size comes again, one whose share is less goes on in the next epoch
where it stopped.
"""
import math
import os
import re

import numpy as np

from data.records import RecordReader
from mistake import Mistake


def split_path(path: str, flag: str) -> list[tuple[str, float]]:
    """Read 'a.jsonl:0.7,b.jsonl:0.3' as [(file, weight), ..]; any other path, and that of a file, is [(path, 1.0)].

    Raises Mistake naming `flag` for several files of which one has no weight above 0, or which name one twice.
    """
    parts = [re.fullmatch(r'(.+):([^:/]+)', part.strip()) for part in path.split(',')]
    if os.path.exists(path) or parts == [None]:
        return [(path, 1.0)]
    try:
        found = [(os.path.expanduser(part[1]), float(part[2])) for part in parts]
    except (TypeError, ValueError):  # one without a weight, or whose weight is no number
        found = []
    if not found or not all(0 < weight < math.inf for _, weight in found):
        raise Mistake(f'{flag}.path={path!r}: of several files each has a weight above 0: a.jsonl:0.7,b.jsonl:0.3')
    if len({file for file, _ in found}) != len(found):
        raise Mistake(f'{flag}.path={path!r} names a file twice: give it once, with the sum of its weights')
    return found


class Mixture:
    """Holds the readers of several files and their weights; `skipped_lines` counts those of all.

    It stands for one reader where a reader's path, flag and processor are wanted.
    """

    def __init__(self, path: str, readers: list[RecordReader], weights: list[float]):
        self.path, self.readers, self.weights = path, readers, weights
        self.flag, self.processor = readers[0].flag, readers[0].processor

    @property
    def skipped_lines(self) -> int:
        return sum(reader.skipped_lines for reader in self.readers)


def quotas(sizes: list[int], weights: list[float]) -> list[int]:
    """Part sum(sizes) by the weights: whole numbers, what is left to the largest remainders."""
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    for number in sorted(range(len(parts)), key=lambda number: parts[number] - exact[number])[:sum(sizes) - sum(parts)]:
        parts[number] += 1
    return parts


def drawn(size: int, first: int, count: int, seed: int, number: int, shuffle: bool) -> np.ndarray:
    """Return draws first .. first + count - 1 of the passes over file `number`, which has `size` rows."""
    draws = []
    while count:
        turn, offset = divmod(first, size)
        rng = np.random.default_rng((seed, turn, number, 1))  # (seed, epoch) shuffles the epoch
        order = rng.permutation(size) if shuffle else np.arange(size)
        draws.append(order[offset:offset + count])
        first, count = first + len(draws[-1]), count - len(draws[-1])
    return np.concatenate(draws)
