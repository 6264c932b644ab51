"""The table of tuned tiles: how it is written, and which of its rows a call takes."""
import json

import pytest

from instruments.bench import shapes, tune
from kernels import tuned


def row(chip='v5e', T=1024, D=128, group=1, **rest):
    return dict(kernel='flash_forward', chip=chip, T=T, D=D, group=group, causal=True, segments=False) | rest


@pytest.fixture
def path(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, 'PATH', tmp_path / 'tuned_tiles.json')
    tuned.table.cache_clear()
    yield tuned.PATH
    tuned.table.cache_clear()


def test_a_call_takes_the_row_of_the_nearest_sizes(path):
    """T 900 is nearer to 1024 than to 4096, D 100 to 128; a chip without rows takes its like's."""
    tune.merge([row(tiles=dict(heads=1)), row(T=4096, tiles=dict(heads=2)), row(D=64, group=3, tiles=dict(heads=3)),
                row(chip='v6e', tiles=dict(heads=4)), row(kernel='flash_backward', tiles=dict(heads=5))], path)
    take = lambda chip, T, D, group: tuned.tuned_tiles('flash_forward', chip, T=T, D=D, group=group)['heads']
    assert [take('v5e', 900, 100, 1), take('v5e', 8192, 128, 4), take('v5e', 1024, 64, 4)] == [1, 2, 3]
    assert take('v5p', 1024, 128, 1) == 1 and take('v7x', 4096, 64, 8) == 4
    with pytest.raises(ValueError, match='python -m instruments.bench.tune --target=v5e'):
        tuned.tuned_tiles('decode', 'v5e', T=1024, D=128, group=1)


def test_of_tiles_within_five_percent_the_least_code_wins():
    trials = [dict(ms=1.00, bundles=9000), dict(ms=1.04, bundles=3000), dict(ms=1.06, bundles=100)]
    assert tune.choose(trials) == trials[1]
    with pytest.raises(ValueError, match='no tiles'):
        tune.choose([])


def test_a_new_row_takes_the_place_of_the_old_and_leaves_the_others(path):
    tune.merge([row(tiles=dict(heads=1)), row(T=4096, tiles=dict(heads=2))], path)
    tune.merge([row(tiles=dict(heads=8))], path)
    rows = json.loads(path.read_text())['rows']
    assert [(r['T'], r['tiles']['heads']) for r in rows] == [(1024, 8), (4096, 2)]
    assert all(r['jax'] and r['date'] for r in rows)


def test_the_grids_hold_tiles_that_differ_for_the_shape():
    """A row of one block has no turns: s3's four blocks are tried with each turn, s1's one block with one."""
    long, short = (tune.grid('flash_forward', shapes.ATTENTION[name]) for name in ('s3', 's1'))
    assert len(long) == len(set(long)) == 2 * len(short) and len({tiles.turn for tiles in short}) == 1
