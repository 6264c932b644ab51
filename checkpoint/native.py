"""The project's own checkpoints: one directory per step, written whole or not at all.  Neighbour: source.py.

    DIR/step_00000123/manifest.json       meta of the caller; shape and dtype of every array; size, sha256 of every file
                      arrays/NAME/...     one tensorstore (zarr3, uncompressed) per array
                      tokenizer.model     files of the caller

Written to DIR/step_00000123.tmp-RANDOM, every file and directory synced, then renamed, then DIR synced: after a kill at
any byte there is either no step_00000123 or all of it.  Older steps are deleted after that, each renamed to a tmp name
first.  The newest checkpoint is the highest step whose manifest is sound and whose files have their sizes; nothing
points to it.  Whatever is restored is first compared with its sha256.  One run at a time writes.

A run of several processes (hosts/processes.py) writes one step together, on a file system that all see: process 0
makes the temporary directory and the stores; each process writes, syncs and hashes the shards it holds (of replicas,
the first); process 0 checks that it sees every file, writes the manifest, renames and deletes.  Each process compares
the files it reads from with their sha256, not those of the others.
"""
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from checkpoint import shards
from checkpoint.writing import sync
from hosts import processes
from mistake import Mistake

MANIFEST = 'manifest.json'
DTYPES = ('float32', 'bfloat16', 'float16', 'bool', 'int8', 'uint8', 'int32', 'uint32', 'int64', 'uint64')
CHUNK_BYTES = 1 << 25  # about the size of one file of an array
_log = logging.getLogger(__name__)


# ---------------------------------------------------------------- save


class Streamed(NamedTuple):
    """An array that need not be in memory as a whole: its slices along the first axis, made as they are written.

    slices: numpy arrays of `dtype` that follow one another, each of `rows` rows (a divisor of shape[0]).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    slices: Iterator[np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def save(directory: str, step: int, arrays: dict[str, jax.Array | Streamed], meta: dict, files: dict[str, bytes],
         keep: int, keep_every: int = 0, spare: int | None = None) -> Path:
    """Writes step `step` and returns its directory; then, of the older complete steps, all but keep - 1 are deleted.

    Milestones, the steps that keep_every divides (0: there are none), and step `spare` are neither deleted nor counted.

    arrays: name -> array of any shape, float32, bfloat16, integer or bool; any sharding of the run's devices; or
    Streamed (by one process only).
    meta: JSON-ready.  files: plain file name -> content.  Blocks until all of it is on disk.
    Raises Mistake, leaving everything as it was, for an array with NaN or infinity, a step that is there already, or
    names that are no plain names; OSError when the disk is full or refuses, the checkpoints before it staying as well.
    With several processes all call it, with the same arguments; what fails on one raises on all, at the latest after
    processes.PATIENCE_SECONDS.
    """
    for name in (*arrays, *files):
        if not name.replace('.', '').replace('_', '').replace('-', '').isalnum() or name.startswith('.'):
            raise ValueError(f'checkpoint entry {name!r} must be a plain name of letters, digits and . _ -')
    if {MANIFEST, 'arrays'} & set(files):
        raise ValueError(f'checkpoint files may not be named {MANIFEST} or arrays')
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f'array {name!r} has dtype {array.dtype.name}; supported: {" ".join(DTYPES)}')
    root, final = Path(directory), step_directory(directory, step)
    suffix, *_ = processes.exchange(secrets.token_hex(4))
    temporary = root / f'{final.name}.tmp-{suffix}'
    leads = processes.index() == 0

    def undo():
        if leads:
            shutil.rmtree(temporary, ignore_errors=True)

    try:
        processes.agree(lambda: _begin(temporary, final, step, arrays, files) if leads else None, undo)
        parts = processes.agree(lambda: _write_shards(temporary, arrays, files), undo)
        sealed = {name: entry for part in parts for name, entry in part.items()}
        assert len(sealed) == sum(len(part) for part in parts), 'two processes wrote the same file: see _chunk_shape'
        processes.agree(lambda: _commit(temporary, final, step, arrays, meta, sealed) if leads else None, undo)
    except BaseException:
        undo()
        raise
    processes.agree(lambda: _delete_older(directory, step, keep, keep_every, spare) if leads else None)
    return final


def _begin(temporary: Path, final: Path, step: int, arrays, files: dict[str, bytes]) -> None:
    """Process 0: the temporary directory with the caller's files and an empty store for every array."""
    root = temporary.parent
    if final.exists() and (manifest := _complete(final)) is not None:  # never replaced, unless it cannot be loaded
        try:
            _verify(final, manifest, manifest['files'])
        except ValueError as error:
            _log.warning('replacing a checkpoint that cannot be loaded: %s', error)
        else:
            raise Mistake(f'{final} exists already: step {step} is not saved over it; choose another directory')
    root.mkdir(parents=True, exist_ok=True)
    sync(root.parent)
    for leftover in sorted(root.glob('step_*.tmp-*')):
        _log.warning('removing %s, left over from a save or deletion that was interrupted', leftover)
        shutil.rmtree(leftover)
    needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(root).free
    if needed > free:
        raise OSError(f'{root} has {free} bytes free, the checkpoint of step {step} needs {needed}: not saved')
    (temporary / 'arrays').mkdir(parents=True)
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    for name, array in arrays.items():
        ts.open(_store_spec(temporary / 'arrays' / name) | dict(
            metadata=dict(shape=list(array.shape), data_type=array.dtype.name, codecs=[dict(name='bytes')],
                          chunk_grid=dict(name='regular', configuration=dict(chunk_shape=_chunk_shape(array))))),
            create=True).result()


def _write_shards(temporary: Path, arrays, files: dict[str, bytes]) -> dict[str, dict]:
    """Every process: its shards, each part of an array written once by one of the devices that hold it.

    Returns {file: size and sha256} of the files written, and on process 0 of those of `_begin` too.
    """
    written = set()
    if processes.index() == 0:
        written = {temporary / name for name in files} | {temporary / 'arrays' / name / 'zarr.json' for name in arrays}
    elif not temporary.is_dir():
        raise Mistake(f'{temporary}, which process 0 made, is not seen by process {processes.index()}: checkpoints '
                         'must lie on a file system that all processes share')
    for name, array in arrays.items():
        path = temporary / 'arrays' / name
        store = ts.open(_store_spec(path) | dict(store_data_equal_to_fill_value=True), open=True).result()
        if isinstance(array, Streamed):
            for i, rows in enumerate(array.slices):
                written |= _write_parts(path, store, [((slice(i * array.rows, (i + 1) * array.rows),), rows)])
        else:
            written |= _write_parts(path, store, [(shard.index, np.asarray(shard.data)) for shard in
                                                  array.addressable_shards if shard.replica_id == 0])
    sealed = {}
    for file in sorted(written):
        sealed[file.relative_to(temporary).as_posix()] = dict(size=file.stat().st_size, sha256=_sha256(file))
        sync(file)
    return sealed


def _commit(temporary: Path, final: Path, step: int, arrays, meta: dict, sealed: dict[str, dict]) -> None:
    """Process 0: the manifest of the files of all processes, and the rename that makes them a step."""
    for name, entry in sealed.items():
        file = temporary / name
        if _size(file) != entry['size']:
            raise OSError(f'{file} was written by another process, but process 0 does not see it with its '
                          f'{entry["size"]} bytes: checkpoints must lie on a file system that all processes share')
    described = {name: dict(shape=list(array.shape), dtype=array.dtype.name) for name, array in arrays.items()}
    content = dict(step=step, meta=meta, arrays=described, files=dict(sorted(sealed.items())))
    (temporary / MANIFEST).write_text(json.dumps(dict(sha256=_sha256_of_json(content), content=content), indent=1))
    sync(temporary / MANIFEST)
    for folder in sorted((folder for folder in temporary.rglob('*') if folder.is_dir()), reverse=True):
        sync(folder)
    sync(temporary)
    if final.exists():  # incomplete or corrupt, as _begin found: nothing is lost
        os.rename(final, temporary.parent / f'{final.name}.tmp-{secrets.token_hex(4)}')
    os.rename(temporary, final)
    sync(final.parent)


def _delete_older(directory: str, step: int, keep: int, keep_every: int, spare: int | None) -> None:
    older = [other for other in steps(directory) if other < step and other != spare
             and not (keep_every and other % keep_every == 0)]
    for old in older[:max(0, len(older) - (keep - 1))]:
        doomed = Path(directory) / f'{step_directory(directory, old).name}.tmp-{secrets.token_hex(4)}'
        os.rename(step_directory(directory, old), doomed)
        shutil.rmtree(doomed)


def _write_parts(path: Path, store: ts.TensorStore, parts: list[tuple]) -> set[Path]:
    """Writes [(index, values)] and returns the files that hold them."""
    floats = jnp.issubdtype(store.dtype.numpy_dtype, jnp.floating)
    if floats and not all(np.isfinite(part).all() for _, part in parts):
        raise Mistake(f'array {path.name!r} holds NaN or infinity: not saved, the checkpoints before it stay')
    for write in [store[index].write(part) for index, part in parts]:
        try:
            write.result()
        except ValueError as error:  # tensorstore's class for whatever the system refuses
            raise OSError(f'writing {path}: {error}') from None
    return {file for index, _ in parts for file in _chunk_files(path, store, index)}


def _chunk_files(path: Path, store: ts.TensorStore, index: tuple[slice, ...]) -> Iterator[Path]:
    """The files of the chunks that `index` touches (leading dimensions are enough): PATH/c/0/2."""
    chunks = []
    shape = store.chunk_layout.read_chunk.shape or ()  # None of a scalar
    for axis, (size, chunk) in enumerate(zip(store.shape, shape, strict=True)):
        start, stop, _ = index[axis].indices(size) if axis < len(index) else (0, size, 1)
        chunks.append(range(start // chunk, -(-stop // chunk)))
    return (path.joinpath('c', *map(str, place)) for place in itertools.product(*chunks))


def _store_spec(path: Path) -> dict:
    return dict(driver='zarr3', kvstore=dict(driver='file', path=f'{path}/'))


def _chunk_shape(array: jax.Array | Streamed) -> list[int]:
    """A part's shape, its leading axes cut until a chunk has at most CHUNK_BYTES: a matrix or a few of a stack.

    Where parts lie side by side the cuts divide a part, so no chunk belongs to two of them: two processes may write.
    """
    part = (array.rows, *array.shape[1:]) if isinstance(array, Streamed) else array.sharding.shard_shape(array.shape)
    shape = [max(size, 1) for size in part]
    for axis, size in enumerate(shape):
        row = array.dtype.itemsize * int(np.prod(shape[axis + 1:]))
        shape[axis] = max(1, min(size, CHUNK_BYTES // row))
        while part[axis] < array.shape[axis] and size % shape[axis]:
            shape[axis] -= 1
    return shape


def check_shared(directory: str) -> None:
    """Make `directory`, with several processes; raise Mistake on all of them unless all see the same one."""
    if processes.count() == 1:
        return
    root = Path(directory)
    processes.agree(lambda: root.mkdir(parents=True, exist_ok=True))
    suffix, *_ = processes.exchange(secrets.token_hex(4))
    mark = root / f'seen-by-all.tmp-{suffix}'
    leads = processes.index() == 0
    processes.agree(lambda: mark.touch() if leads else None)
    seen = processes.agree(mark.exists)
    processes.agree(lambda: mark.unlink() if leads else None)
    if not all(seen):
        raise Mistake(f'{root} of process 0 is another directory than that of process {seen.index(False)}: name one '
                         'on a file system that all processes share')


# ---------------------------------------------------------------- look


def step_directory(directory: str, step: int) -> Path:
    return Path(directory) / f'step_{step:08d}'


def steps(directory: str) -> list[int]:
    """List the complete steps in `directory`, ascending: a sound manifest, and every file there with its size."""
    return [step for step in _listed(directory) if _complete(step_directory(directory, step)) is not None]


def latest_step(directory: str) -> int | None:
    """Return the newest complete step, or None."""
    found = _newest(directory)
    return found and found[0]


def _listed(directory: str) -> list[int]:
    """List the steps that have a directory, complete or not, ascending."""
    numbers = [(path, int(path.name.removeprefix('step_'))) for path in Path(directory).glob('step_*')
               if path.name.removeprefix('step_').isdecimal() and path.is_dir()]
    return sorted(step for path, step in numbers if path == step_directory(directory, step))


def _newest(directory: str) -> tuple[int, dict] | None:
    """Find the newest complete step and its manifest; look again when a run deletes what was just listed."""
    while True:
        for step in reversed(_listed(directory)):
            path = step_directory(directory, step)
            if (manifest := _complete(path)) is not None:
                return step, manifest
            if not path.is_dir():
                break
        else:
            return None


def _sound_manifest(path: Path) -> dict | None:
    """Return the content of a step's manifest if its own sha256 holds and no file of it lies outside the step."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding='utf-8'))
        content = manifest['content']
        outside = any(name.startswith('/') or '..' in name.split('/') for name in content['files'])
        return None if outside or manifest['sha256'] != _sha256_of_json(content) else content
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _complete(path: Path) -> dict | None:
    """Return the manifest if it is sound and every file is there with its size."""
    manifest = _sound_manifest(path)
    whole = manifest and all(_size(path / name) == entry['size'] for name, entry in manifest['files'].items())
    return manifest if whole else None


def _verify(path: Path, manifest: dict, names) -> None:
    """Raise Mistake naming the first of the files `names` whose size or sha256 is not the manifest's."""
    for name in names:
        entry, file = manifest['files'][name], path / name
        if (size := _size(file)) != entry['size']:
            problem = f'has {size} bytes instead of {entry["size"]}'
        elif _sha256(file) != entry['sha256']:
            problem = 'does not have the sha256 of its manifest'
        else:
            continue
        raise Mistake(f'{file} {problem}: the checkpoint is corrupt' + _other_steps(path))


def _other_steps(path: Path) -> str:
    others = [step for step in steps(path.parent) if step_directory(path.parent, step) != path]
    return f'; step {others[-1]} is complete: {step_directory(path.parent, others[-1])}' if others else ''


# ---------------------------------------------------------------- read


class Step:
    """One step opened for reading: its manifest is read once, so whatever comes from a Step was saved together.

    number, path; meta: what `save` was given; arrays: name -> (shape, dtype name); files: name -> size and sha256.
    Raises Mistake if the step (None: the newest complete one) is not there or its manifest is not sound; and later, at
    any read, for a file that is corrupt and for a step that was deleted meanwhile.
    """

    def __init__(self, directory: str, step: int | None = None):
        found = _newest(directory) if step is None else (step, _sound_manifest(step_directory(directory, step)))
        if found is None:
            broken = ' '.join(sorted(path.name for path in Path(directory).glob('step_*')))
            raise Mistake(f'{str(directory)!r} holds no complete checkpoint' + (broken and f'; incomplete: {broken}'))
        self.number, self._manifest = found
        self.path = step_directory(directory, self.number)
        if self._manifest is None:
            raise Mistake(f'{self.path / MANIFEST} is missing or corrupt' + _other_steps(self.path)
                          if self.path.is_dir() else
                          f'{str(directory)!r} holds no step {step}; complete steps: {steps(directory)}')
        self.meta, self.files = self._manifest['meta'], self._manifest['files']
        self._stores, self._verified = {}, set()
        self.arrays = {name: (tuple(entry['shape']), entry['dtype'])
                       for name, entry in self._manifest['arrays'].items()}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Say so if a read failed because the step is gone: a deletion begins with the rename of its directory."""
        try:
            yield
        except (ValueError, OSError):
            if self.path.is_dir():
                raise
            raise Mistake(f'{self.path} was deleted while it was read, by the run that writes there: start again, and '
                          'if it happens again raise --checkpointer.keep of that run or read a copy') from None

    def read_file(self, name: str) -> bytes:
        """Read a file that `save` was given, compared with its sha256."""
        if name not in self.files:
            raise Mistake(f'{self.path} holds no file {name!r}')
        with self._reading():
            _verify(self.path, self._manifest, [name])
            return (self.path / name).read_bytes()

    def read(self, name: str, row: int | None, bounds: shards.Bounds | None = None) -> np.ndarray:
        """Read row `row` of an array, or for None the whole; of either the part within `bounds`, if given.

        The array's files, with bounds those of them that it touches, are compared with their sha256, each once.
        """
        with self._reading():
            path = self.path / 'arrays' / name
            if name not in self._stores:
                self._verify_once([path / 'zarr.json'])
                self._stores[name] = _open_store(path)
            store = self._stores[name]
            rows = () if row is None else (slice(row, row + 1),)
            index = (*rows, *(slice(*part) for part in bounds or ()))
            self._verify_once(_chunk_files(path, store, index if bounds else ()))
            part = store[index].read().result()
            return part if row is None else part[0]

    def _verify_once(self, files: Iterable[Path]) -> None:
        fresh = sorted({file.relative_to(self.path).as_posix() for file in files} - self._verified)
        _verify(self.path, self._manifest, fresh)
        self._verified.update(fresh)

    def restore(self, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Read the arrays named in `targets`, each onto the sharding of its target.

        Every device reads its own part only, whatever the sharding was at save.  The files of the parts that this
        process reads are compared with their sha256 first.  Raises Mistake naming a corrupt file, or up to 10 arrays
        that are missing or differ.
        """
        stored = {name: f'{dtype}{list(shape)}' for name, (shape, dtype) in self.arrays.items()}
        wanted = {name: f'{target.dtype.name}{list(target.shape)}' for name, target in targets.items()}
        if wrong := [f'{name} got {stored.get(name, "nothing")} want {want}' for name, want in wanted.items()
                     if stored.get(name) != want]:
            raise Mistake(f'{self.path} was saved by a model or optimizer of other sizes or dtypes: {shortened(wrong)}')
        with self._reading():
            return {name: self._restore(name, target) for name, target in targets.items()}

    def _restore(self, name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        path = self.path / 'arrays' / name
        _verify(self.path, self._manifest, [f'arrays/{name}/zarr.json'])
        store, parts = _open_store(path), shards.shard_indices(target.shape, target.sharding)
        files = {file for index in parts for file in _chunk_files(path, store, tuple(slice(*part) for part in index))}
        _verify(self.path, self._manifest, [file.relative_to(self.path).as_posix() for file in sorted(files)])
        read = lambda bounds: store[tuple(slice(*bound) for bound in bounds)].read().result()
        if len(target.shape) == 3:  # a stack of matrices
            return shards.fill_stack(target, lambda layer, bounds: read(((layer, layer + 1), *bounds))[0])
        return shards.fill(target, read)


def _open_store(path: Path) -> ts.TensorStore:
    """Open an array for reading.  A chunk that is missing is an error: by itself tensorstore would read zeros."""
    return ts.open(_store_spec(path) | dict(fill_missing_data_reads=False), open=True, read=True).result()


def shortened(lines: list[str], most: int = 10) -> str:
    """The first `most` of a list of faults in one line, and how many more there are."""
    return '; '.join(lines[:most]) + (f'; and {len(lines) - most} more' if len(lines) > most else '')


# ---------------------------------------------------------------- files


def _size(path: Path) -> int | str:
    """Return the bytes of a file, 'no' if there is none (a run may delete it at any moment)."""
    try:
        return path.stat().st_size if path.is_file() else 'no'
    except OSError:
        return 'no'


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _sha256_of_json(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
