"""Find the best tiles of flash attention by their static time, and write kernels/tuned_tiles.json.

    python -m instruments.bench.tune --target=v5e,v6e --shapes=s1,s2,s3,s4 --kernels=flash_forward,flash_backward

Every combination of the grid below that the kernel accepts is compiled and timed (kernel_time/static_cost.py: the
compiler's schedule, not a measurement).  Gaps under 5 % are no gaps: of the tiles that close to the fastest, those with
the least code win.  A trial is kept in --output/trials.jsonl and not repeated while the sources (the kernel's and the
instruments') and the versions stay the same.  Rows for other chips and shapes in the table stay.
"""
import dataclasses
import datetime
import itertools
import json
import pathlib

import jax
from absl import flags

from instruments.bench import command_line, shapes
from instruments.bench.attention import OURS, TIMED_BY
from instruments.bench.cases import ours
from instruments.bench.timing import static_row
from instruments.sources import digest, version
from kernels import tuned
from kernels.tiles import FlashTiles, Tiles
from mistake import Mistake

TIE = 1.05
# kernel -> (tiles' class, the values of each field); combinations that the class or the kernel refuses are left out
GRIDS = {
    'flash_forward': (Tiles, dict(heads=(1, 2, 3, 4), block=(1024,), strip=(256, 512), diagonal=(128, 256),
                                  turn=(512, 1024))),
    'flash_backward': (Tiles, dict(heads=(1, 2, 3), block=(1024,), strip=(256, 512), diagonal=(128, 256),
                                   turn=(512,))),
}


def grid(kernel: str, shape) -> list:
    """List the tiles to try, without those that are no tiles.  A row of one block has no turns: one value is tried."""
    make, fields = GRIDS[kernel]
    found = []
    for values in itertools.product(*fields.values()):
        named = dict(zip(fields, values, strict=True))
        if shape.T <= named['block'] and named['turn'] != fields['turn'][0]:
            continue
        try:
            found.append(make(**named))
        except ValueError:
            continue
    return found


def trial(kernel: str, shape, target: str, tiles) -> dict:
    """Compute the static time of a kernel with these tiles, or say why it cannot be had."""
    backward = kernel == 'flash_backward'
    try:
        case = ours(shape, backward, tiles=FlashTiles(tiles, tiles))
        row = static_row(case, shape, backward, target)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return dict(error=str(error)[:200])
    return {name: row[name] for name in ('ms', 'bundles', 'spills', 'vmem_bytes')}


def search(kernel: str, name: str, target: str, path: pathlib.Path) -> dict:
    """Find the best tiles of a kernel for a shape, as a row of the table.

    Raises:
      ValueError: nothing of the grid compiles.
    """
    shape = shapes.ATTENTION[name]
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    trials = []
    for tiles in grid(kernel, shape):
        about = dict(kernel=kernel, shape=name, target=target, tiles=dataclasses.asdict(tiles), jax=jax.__version__,
                     libtpu=version('libtpu'), source=digest(*TIMED_BY, *OURS))
        row = next((row for row in known if about.items() <= row.items()), None)
        if row is None:
            row = about | trial(kernel, shape, target, tiles)
            with path.open('a') as file:
                file.write(json.dumps(row) + '\n')
            print(target, name, kernel, row['tiles'], row.get('ms', row.get('error')), flush=True)
        trials.append(row)
    best = choose([row for row in trials if 'error' not in row])
    return dict(kernel=kernel, chip=target, T=shape.T, D=shape.D, group=shape.H // shape.K, causal=shape.causal,
                segments=bool(shape.segments), tiles=best['tiles'], ms=round(best['ms'], 4), bundles=best['bundles'],
                spills=best['spills'])


def choose(trials: list[dict]) -> dict:
    """Take the least code among the trials within TIE of the fastest.

    Raises:
      ValueError: there are none.
    """
    if not trials:
        raise Mistake('no tiles of the grid compile for this shape; widen GRIDS')
    fastest = min(row['ms'] for row in trials)
    return min((row for row in trials if row['ms'] <= TIE * fastest), key=lambda row: row['bundles'])


def merge(rows: list[dict], path: pathlib.Path) -> None:
    """Write a table: these rows, and those of the file that are about something else."""
    about = lambda row: tuple(row[name] for name in ('kernel', 'chip', 'T', 'D', 'group', 'causal', 'segments'))
    old = json.loads(path.read_text())['rows'] if path.exists() else []
    merged = {about(row): row for row in old + rows}
    stamp = dict(date=datetime.date.today().isoformat(), jax=jax.__version__, libtpu=version('libtpu'))
    stamped = {about(row) for row in rows}
    lines = [json.dumps(row | stamp if about(row) in stamped else row) for row in
             (merged[key] for key in sorted(merged))]
    path.write_text('{"method": "static time, kernel_time/static_cost.py", "rows": [\n' + ',\n'.join(lines) + '\n]}\n')


def main() -> None:
    jax.config.update('jax_platforms', 'cpu')  # only compiled for
    flag = flags.FLAGS
    unknown = (set(flag.kernels) - set(GRIDS)) | (set(flag.shapes) - set(shapes.ATTENTION))
    if unknown:
        raise Mistake(f'{sorted(unknown)} is none of {list(GRIDS)=}, {list(shapes.ATTENTION)=}')
    output = pathlib.Path(flag.output)
    output.mkdir(parents=True, exist_ok=True)
    for target, name, kernel in itertools.product(flag.target, flag.shapes, flag.kernels):
        merge([search(kernel, name, target, output / 'trials.jsonl')], tuned.PATH)


if __name__ == '__main__':
    flags.DEFINE_list('target', ['v5e', 'v6e'], 'chips to tune for')
    flags.DEFINE_list('shapes', ['s1', 's2', 's3', 's4'], 'names of instruments/bench/shapes.py')
    flags.DEFINE_list('kernels', list(GRIDS), 'kernels to tune')
    flags.DEFINE_string('output', 'runs/tune', 'folder of the trials')
    command_line.run(main)
