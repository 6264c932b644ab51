"""Our own checkpoints: bit-exact, on any mesh, whole or not there at all, and never loaded when corrupt."""
import logging
import os
import resource
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint import native, shards
from model.partition import make_mesh


def put(value, *partition, mesh='1,4,2'):
    return jax.device_put(value, NamedSharding(make_mesh(mesh), P(*partition)))


def state(scale=1.0):
    """One array of each kind a training state holds: stacked, split, bf16, integer, scalar, bool, empty, minus zero."""
    values = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32) * scale
    return {'params.layers.w_q': put(values, None, 'fsdp', 'mp'), 'params.head': put(values[0], 'mp', 'fsdp'),
            'momentum.head': put(values[0].astype(jnp.bfloat16), 'mp'), 'step': put(jnp.int32(7)),
            'rng': put(jax.random.key_data(jax.random.key(3))), 'flags': put(np.array([True, False])),
            'empty': put(np.zeros((0, 4), np.float32)), 'minus_zero': put(-np.zeros(8, np.float32), 'fsdp')}


def small(step):
    return {name: array for name, array in state(scale=step).items() if name in ('momentum.head', 'step')}


def targets(arrays, mesh='2,1,4'):
    """The same arrays wanted on another mesh, split along the last axis only."""
    split = {name: P(*[None] * (a.ndim - 1), 'mp') if a.ndim > 1 else P() for name, a in arrays.items()}
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(make_mesh(mesh), split[name]))
            for name, a in arrays.items()}


def save(directory, step, arrays=None, keep=10):
    return native.save(directory, step, arrays or state(), {'cursor': step}, {'tokenizer.model': b'abc'}, keep)


def equal_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize('chunk_bytes', [1 << 25, 64])
def test_round_trip_is_bit_exact_on_another_mesh(tmp_path, monkeypatch, chunk_bytes):
    """Saved from mesh 1,4,2 and restored on 2,1,4: every bit and sharding as asked, one file per array or many."""
    monkeypatch.setattr(native, 'CHUNK_BYTES', chunk_bytes)
    arrays = state()
    save(tmp_path, 5, arrays)
    restored = native.Step(tmp_path).restore(targets(arrays))
    for name, array in arrays.items():
        assert equal_bits(array, restored[name]), name
        assert restored[name].sharding == targets(arrays)[name].sharding
    step = native.Step(tmp_path)
    assert step.number == 5 and step.meta == {'cursor': 5} and step.read_file('tokenizer.model') == b'abc'


def test_every_device_reads_its_own_slice_only(tmp_path, monkeypatch):
    """The parts that are read add up to one copy of the array, though eight devices hold two copies."""
    arrays = {'w': state()['params.layers.w_q']}
    save(tmp_path, 1, arrays)
    sizes, fill_stack = [], shards.fill_stack
    monkeypatch.setattr(shards, 'fill_stack', lambda target, read: fill_stack(
        target, lambda *part: sizes.append((array := read(*part)).size) or array))
    native.Step(tmp_path, 1).restore(targets(arrays))
    assert sizes == [16 * 8 // 4] * 3 * 4


class Killed(BaseException):
    """Stands for kill -9: nothing after it may run, so nothing is cleaned up."""


def save_and_die(monkeypatch, directory, step, keep, after):
    """A save that dies at its `after`-th fsync, rename or deletion; returns False if it ended before."""
    count = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > after:
                raise Killed
            return function(*args, **kwargs)
        return call

    with monkeypatch.context() as patch:
        patch.setattr(native.os, 'fsync', dying(native.os.fsync))
        patch.setattr(native.os, 'rename', dying(native.os.rename))
        patch.setattr(native.shutil, 'rmtree', dying(native.shutil.rmtree))
        try:
            save(directory, step, small(step), keep)
        except Killed:
            return True
    return False


def test_a_save_killed_at_any_point_leaves_the_newest_complete_step_loadable(tmp_path, monkeypatch):
    """Killed at each fsync, rename and deletion in turn, what loads is all of the old step or all of the new one."""
    seen, after = set(), 0
    while True:
        directory = tmp_path / str(after)
        save(directory, 1, small(1))
        if not save_and_die(monkeypatch, directory, 2, 1, after):
            break
        step = native.latest_step(directory)
        expected = small(step)
        restored = native.Step(directory).restore(targets(expected))
        assert all(equal_bits(expected[name], restored[name]) for name in expected)
        seen.add(step)
        after += 1
    assert seen == {1, 2} and after > 15 and native.steps(directory) == [2]


def test_all_is_synced_before_the_rename_and_the_directory_before_a_deletion(tmp_path, monkeypatch):
    """At the rename every file and folder of the step has been synced; the older step is touched after DIR was, too."""
    save(tmp_path, 1, small(1))
    synced, fsync, rename, unsynced = set(), os.fsync, os.rename, []

    def checked_rename(source, target):
        needed = {source, *source.rglob('*')} if source.name.startswith('step_00000002.tmp') else {tmp_path}
        unsynced.extend(sorted(needed - synced))
        synced.discard(tmp_path)
        rename(source, target)

    monkeypatch.setattr(os, 'fsync', lambda fd: (synced.add(Path(os.readlink(f'/proc/self/fd/{fd}'))), fsync(fd)))
    monkeypatch.setattr(os, 'rename', checked_rename)
    save(tmp_path, 2, small(2), keep=1)
    assert unsynced == [] and native.steps(tmp_path) == [2]


def test_leftovers_of_a_killed_save_are_reported_and_removed(tmp_path, monkeypatch, caplog):
    """The next save names the temporary directory in the log and deletes it; it never counts as a step."""
    save(tmp_path, 1)
    assert save_and_die(monkeypatch, tmp_path, 2, 10, after=5)
    leftover, = tmp_path.glob('step_00000002.tmp-*')
    assert native.steps(tmp_path) == [1]
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 2)
    assert str(leftover) in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ['step_00000001', 'step_00000002']


def test_a_flipped_bit_in_any_file_is_named_and_the_previous_step_offered(tmp_path):
    """One bit of each file of step 2 in turn: restoring it fails, naming that file and step 1."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    files = [file for file in path.rglob('*') if file.is_file()]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f'{file}.*corrupt.*step 1 is complete'):
            native.Step(tmp_path, 2).restore(targets(state()))
            native.Step(tmp_path, 2).read_file('tokenizer.model')
        file.write_bytes(content)
    native.Step(tmp_path, 2).restore(targets(state()))
    manifest = path / 'manifest.json'
    manifest.write_text(manifest.read_text().replace('"cursor": 2', '"cursor": 3'))
    with pytest.raises(ValueError, match=f'{manifest} is missing or corrupt; step 1 is complete'):
        native.Step(tmp_path, 2)


def test_a_truncated_or_missing_file_makes_a_step_incomplete(tmp_path):
    """Without one byte or one file, step 2 is no candidate for the newest; asked for by number, it names the file."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / 'arrays/params.head/c/0/0'
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1]), file.unlink):
        damage()
        assert native.latest_step(tmp_path) == 1
        with pytest.raises(ValueError, match=f'{file} has .* bytes instead of'):
            native.Step(tmp_path, 2).restore(targets(state()))


def test_only_the_newest_steps_are_kept(tmp_path):
    """keep=2 leaves two complete steps after every save; a step saved behind later ones deletes none of them."""
    for step, left in ((1, [1]), (2, [1, 2]), (3, [2, 3]), (40, [3, 40])):
        save(tmp_path, step, small(step), keep=2)
        assert native.steps(tmp_path) == left
    save(tmp_path, 20, small(20), keep=1)
    assert native.steps(tmp_path) == [20, 40]


def test_milestones_stay(tmp_path):
    """keep=1, keep_every=10: 10 and 20 stay for good, of the others only the newest."""
    for step, left in ((5, [5]), (10, [10]), (15, [10, 15]), (20, [10, 20]), (25, [10, 20, 25]), (27, [10, 20, 27])):
        native.save(tmp_path, step, small(step), {}, {}, keep=1, keep_every=10)
        assert native.steps(tmp_path) == left


def test_a_spared_step_stays_until_another_one_is_spared(tmp_path):
    """keep=1: 2 is spared at 3 and 4; at 5, which is better, it goes."""
    for step, spare, left in ((1, 1, [1]), (2, 2, [2]), (3, 2, [2, 3]), (4, 2, [2, 4]), (5, 5, [5]), (6, 5, [5, 6])):
        native.save(tmp_path, step, small(step), {}, {}, keep=1, spare=spare)
        assert native.steps(tmp_path) == left


@pytest.mark.parametrize('chunk_bytes', [1 << 25, 64])
def test_streamed_arrays_are_equal_to_those_in_memory(tmp_path, monkeypatch, chunk_bytes):
    """Written two rows at a time, restored to a mesh and read row by row: the same bits; one slice is alive at once."""
    monkeypatch.setattr(native, 'CHUNK_BYTES', chunk_bytes)
    values, alive, most = np.random.default_rng(0).normal(size=(6, 16, 8)).astype(np.float32), [], []

    def slices():
        for start in range(0, 6, 2):
            part = values[start:start + 2].copy()
            alive.append(weakref.ref(part))
            most.append(sum(ref() is not None for ref in alive))
            yield part
            del part

    save(tmp_path, 1, {'w': native.Streamed(values.shape, values.dtype, 2, slices())})
    restored = native.Step(tmp_path, 1).restore(targets({'w': put(values)}))
    assert equal_bits(restored['w'], values) and max(most) <= 2
    reader = native.Step(tmp_path, 1)
    assert reader.arrays == {'w': ((6, 16, 8), 'float32')}
    assert all(equal_bits(reader.read('w', row), values[row]) for row in range(6))
    assert equal_bits(reader.read('w', None), values)


def test_a_streamed_array_keeps_the_guarantees(tmp_path):
    """NaN in its last slice leaves no step; a flipped bit on disk is named when a row is read."""
    save(tmp_path, 1, small(1))
    slices = [np.zeros((1, 4), np.float32), np.full((1, 4), np.nan, np.float32)]
    with pytest.raises(ValueError, match="'w' holds NaN"):
        save(tmp_path, 2, {'w': native.Streamed((2, 4), np.dtype(np.float32), 1, iter(slices))})
    assert [path.name for path in tmp_path.iterdir()] == ['step_00000001']
    path = save(tmp_path, 2, {'w': native.Streamed((2, 4), np.dtype(np.float32), 1, iter(slices[:1] * 2))})
    file = path / 'arrays/w/c/1/0'
    file.write_bytes(b'\1' + file.read_bytes()[1:])
    with pytest.raises(ValueError, match=f'{file}.*corrupt'):
        native.Step(tmp_path, 2).read('w', 0)


def test_a_sound_step_is_never_overwritten_but_a_corrupt_one_may_be(tmp_path):
    """Saving step 1 twice is refused; after a bit of it has flipped, the second save replaces it."""
    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match='exists already'):
        save(tmp_path, 1)
    file = path / 'tokenizer.model'
    file.write_bytes(b'abd')
    save(tmp_path, 1)
    assert file.read_bytes() == b'abc'


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_non_finite_arrays_are_not_saved(tmp_path, value):
    """One NaN or infinity anywhere: the array is named, and the directory is as before."""
    save(tmp_path, 1)
    arrays = state()
    for name in ('momentum.head', 'params.layers.w_q'):
        broken = np.asarray(arrays[name]).copy()
        broken[..., -1, -1] = value
        with pytest.raises(ValueError, match=f'{name}.*NaN or infinity'):
            save(tmp_path, 2, arrays | {name: put(broken, mesh='1,8,1')})
    assert [path.name for path in tmp_path.iterdir()] == ['step_00000001']


def test_a_full_disk_is_an_os_error_and_leaves_the_previous_step(tmp_path, monkeypatch):
    """Too little space is seen before anything is written; a write that is refused half-way leaves no remains."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(native.shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=1000)))
        with pytest.raises(OSError, match='1000 bytes free, the checkpoint of step 2 needs'):
            save(tmp_path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match='big.*too large'):
            save(tmp_path, 2, {'big': put(np.ones(1 << 20, np.float32))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ['step_00000001']


def test_arrays_of_other_shape_or_dtype_are_listed(tmp_path):
    """Up to ten names with what the file has and what was wanted, and how many more."""
    save(tmp_path, 1, {f'a{i:02}': put(np.zeros(4, np.float32)) for i in range(12)})
    wanted = {f'a{i:02}': jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=NamedSharding(make_mesh('1,8,1'), P()))
              for i in range(13)}
    with pytest.raises(ValueError, match=r'a00 got float32\[4\] want bfloat16\[5\].*a09.*and 3 more'):
        native.Step(tmp_path, 1).restore(wanted)
    with pytest.raises(ValueError, match='a12 got nothing'):
        native.Step(tmp_path, 1).restore({'a12': wanted['a12']})


@pytest.mark.parametrize('name', ['../x', 'a/b', '', '.hidden', 'manifest.json', 'arrays'])
def test_names_that_leave_the_directory_are_refused(tmp_path, name):
    """Files and arrays are plain names."""
    with pytest.raises(ValueError, match='checkpoint'):
        native.save(tmp_path, 1, {}, {}, {name: b''}, 1)


def test_a_directory_without_a_complete_step_says_what_it_holds(tmp_path):
    """An empty directory, and one with an interrupted step, are both errors; the second names the step."""
    with pytest.raises(ValueError, match='holds no complete checkpoint'):
        native.Step(tmp_path)
    shutil.move(save(tmp_path, 3), tmp_path / 'step_00000003.tmp-1234')
    with pytest.raises(ValueError, match='incomplete: step_00000003.tmp-1234'):
        native.Step(tmp_path)


def test_restored_memory_is_not_shared_with_numpy():
    """Overwriting the host buffer afterwards changes nothing, though it is aligned as JAX's own memory is."""
    raw = np.zeros(4096 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    buffer = raw[start:start + 4096].view(np.float32)
    sharding = NamedSharding(make_mesh('1,1,1', jax.devices()[:1]), P())
    array = shards.fill(jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=sharding), lambda bounds: buffer)
    buffer[:] = 1
    assert float(array.sum()) == 0


@pytest.mark.parametrize('chunk_bytes', [64, 160, 1 << 25])
def test_no_file_holds_parts_of_two_shards(tmp_path, monkeypatch, chunk_bytes):
    """Two processes may write side by side: 24 rows over 4 devices, in chunks of at most 2, 5 (which does not divide
    a part of 6) or all of its rows."""
    monkeypatch.setattr(native, 'CHUNK_BYTES', chunk_bytes)
    array = put(np.arange(24 * 16, dtype=np.float32).reshape(24, 16), 'fsdp', 'mp')
    path = save(tmp_path, 1, {'w': array}) / 'arrays/w'
    store = native.ts.open(native._store_spec(path), open=True).result()
    files = [file for shard in array.addressable_shards for file in native._chunk_files(path, store, shard.index)]
    assert len(files) == len(set(files)) == len(list(path.glob('c/*/*')))
