"""Look up the tiles that the tuner found best: tuned_tiles.json, written by instruments/bench/tune.py.

Each row of the file: kernel, chip, the sizes that decide (T, D, group = H / K, causal, segments), the tiles, the static
time and the code size they had.  The file says with which versions and when it was made.
"""
import functools
import json
import math
import pathlib

PATH = pathlib.Path(__file__).with_name('tuned_tiles.json')
# a chip that nothing was tuned for takes the tiles of one with the same matrix unit
ALIKE = {'v4': 'v5e', 'v5p': 'v5e', 'v7x': 'v6e'}


@functools.cache
def table() -> tuple[dict, ...]:
    """Read the rows of tuned_tiles.json."""
    return tuple(json.loads(PATH.read_text())['rows'])


def tuned_tiles(kernel: str, chip: str, *, T: int, D: int, group: int, causal: bool = True,
                segments: bool = False) -> dict:
    """Return the tiles of the row whose sizes are nearest: T, D and group by the ratio, another mask like one octave.

    Raises:
      ValueError: the kernel was not tuned for the chip, nor for one like it.
    """
    rows = [row for row in table() if row['kernel'] == kernel]
    rows = [row for row in rows if row['chip'] == chip] or [row for row in rows if row['chip'] == ALIKE.get(chip)]
    if not rows:
        raise ValueError(f'{PATH.name} has no tiles of {kernel} for {chip=}: python -m instruments.bench.tune '
                         f'--target={chip}, or pass tiles')

    def distance(row):
        octaves = (abs(math.log2(size / row[name])) for name, size in (('T', T), ('D', D), ('group', group)))
        return sum(octaves) + (row['causal'] != causal) + (row['segments'] != segments)

    return dict(min(rows, key=distance)['tiles'])
