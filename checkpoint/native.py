"""The project's own checkpoints: one directory per step, written whole or not at all.  Neighbour: load.py.

    DIR/step_00000123/manifest.json       meta of the caller; shape and dtype of every array; size, sha256 of every file
                      arrays/NAME/...     one tensorstore (zarr3, uncompressed) per array
                      tokenizer.model     files of the caller

Written to DIR/step_00000123.tmp-RANDOM, every file and directory synced, then renamed, then DIR synced: after a kill at
any byte there is either no step_00000123 or all of it.  Older steps are deleted after that, each renamed to a tmp name
first.  The newest checkpoint is found by looking: the highest step whose manifest is sound and whose files have their
sizes; nothing points to it.  Whatever is restored is first compared with its sha256.  One process at a time writes,
and holds all shards.  Arrays are known by name here; what they mean is the caller's matter.
"""
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from checkpoint.writing import sync

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
    is_fully_addressable = True

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def save(directory: str, step: int, arrays: dict[str, jax.Array | Streamed], meta: dict, files: dict[str, bytes],
         keep: int, keep_every: int = 0) -> Path:
    """Writes step `step` and returns its directory; then, of the older complete steps, all but keep - 1 are deleted.

    Milestones, the steps that keep_every divides, are neither deleted nor counted (0: there are none).

    arrays: name -> array of any shape, float32, bfloat16, integer or bool; any sharding of this process's devices; or
    Streamed.
    meta: JSON-ready.  files: plain file name -> content.  Blocks until all of it is on disk.
    Raises ValueError, leaving everything as it was, for an array with NaN or infinity, a step that is there already, or
    names that are no plain names; OSError when the disk is full or refuses, the checkpoints before it staying as well.
    """
    if keep < 1:
        raise ValueError(f'{keep=} must be at least 1')
    for name in (*arrays, *files):
        if not name.replace('.', '').replace('_', '').replace('-', '').isalnum() or name.startswith('.'):
            raise ValueError(f'checkpoint entry {name!r} must be a plain name of letters, digits and . _ -')
    if {MANIFEST, 'arrays'} & set(files):
        raise ValueError(f'checkpoint files may not be named {MANIFEST} or arrays')
    root, final = Path(directory), step_directory(directory, step)
    _refuse_existing(final, step)
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f'array {name!r} has dtype {array.dtype.name}; supported: {" ".join(DTYPES)}')
        if not array.is_fully_addressable:
            raise ValueError(f'array {name!r} has shards on other hosts: checkpoints are written by one process')
    root.mkdir(parents=True, exist_ok=True)
    sync(root.parent)
    for leftover in sorted(root.glob('step_*.tmp-*')):
        _log.warning('removing %s, left over from a save or deletion that was interrupted', leftover)
        shutil.rmtree(leftover)
    needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(root).free
    if needed > free:
        raise OSError(f'{root} has {free} bytes free, the checkpoint of step {step} needs {needed}: not saved')
    temporary = root / f'{final.name}.tmp-{secrets.token_hex(4)}'
    try:
        _write(temporary, step, arrays, meta, files)
        if final.exists():  # incomplete or corrupt, as _refuse_existing found: nothing is lost
            os.rename(final, root / f'{final.name}.tmp-{secrets.token_hex(4)}')
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(root)
    older = [other for other in steps(directory) if other < step and not (keep_every and other % keep_every == 0)]
    for old in older[:max(0, len(older) - (keep - 1))]:
        doomed = root / f'{step_directory(directory, old).name}.tmp-{secrets.token_hex(4)}'
        os.rename(step_directory(directory, old), doomed)
        shutil.rmtree(doomed)
    return final


def _refuse_existing(final: Path, step: int) -> None:
    """A sound checkpoint is never replaced; one that cannot be loaded may be."""
    if final.exists() and (manifest := _complete(final)) is not None:
        try:
            _verify(final, manifest, manifest['files'])
        except ValueError as error:
            _log.warning('replacing a checkpoint that cannot be loaded: %s', error)
            return
        raise ValueError(f'{final} exists already: step {step} is not saved over it; choose another directory')


def _write(path: Path, step: int, arrays, meta: dict, files: dict[str, bytes]) -> None:
    (path / 'arrays').mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    described = {}
    for name, array in arrays.items():
        described[name] = dict(shape=list(array.shape), dtype=array.dtype.name)
        _write_array(path / 'arrays' / name, array)
    sealed = {}
    for file in sorted(file for file in path.rglob('*') if file.is_file()):
        sealed[file.relative_to(path).as_posix()] = dict(size=file.stat().st_size, sha256=_sha256(file))
        sync(file)
    content = dict(step=step, meta=meta, arrays=described, files=sealed)
    (path / MANIFEST).write_text(json.dumps(dict(sha256=_sha256_of_json(content), content=content), indent=1))
    sync(path / MANIFEST)
    for folder in sorted((folder for folder in path.rglob('*') if folder.is_dir()), reverse=True):
        sync(folder)
    sync(path)


def _write_array(path: Path, array: jax.Array | Streamed) -> None:
    """One zarr3 store, each part of the array written once, by one of the devices that hold it."""
    store = ts.open(_store_spec(path) | dict(
        metadata=dict(shape=list(array.shape), data_type=array.dtype.name,
                      chunk_grid=dict(name='regular', configuration=dict(chunk_shape=_chunk_shape(array))),
                      codecs=[dict(name='bytes', configuration=dict(endian='little'))] if array.dtype.itemsize > 1 else
                      [dict(name='bytes')]),
        store_data_equal_to_fill_value=True), create=True).result()
    if isinstance(array, Streamed):
        for i, rows in enumerate(array.slices):
            _write_parts(path, store, [(slice(i * array.rows, (i + 1) * array.rows), rows)])
    else:
        _write_parts(path, store, [(shard.index, np.asarray(shard.data)) for shard in array.addressable_shards
                                   if shard.replica_id == 0])


def _write_parts(path: Path, store: ts.TensorStore, parts: list[tuple]) -> None:
    floats = jnp.issubdtype(store.dtype.numpy_dtype, jnp.floating)
    if floats and not all(np.isfinite(part).all() for _, part in parts):
        raise ValueError(f'array {path.name!r} holds NaN or infinity: not saved, the checkpoints before it stay')
    for write in [store[index].write(part) for index, part in parts]:
        try:
            write.result()
        except ValueError as error:  # tensorstore's class for whatever the system refuses
            raise OSError(f'writing {path}: {error}') from None


def _store_spec(path: Path) -> dict:
    return dict(driver='zarr3', kvstore=dict(driver='file', path=f'{path}/'))


def _chunk_shape(array: jax.Array | Streamed) -> list[int]:
    """A part's shape, its leading axes cut until a chunk has at most CHUNK_BYTES: a matrix or a few of a stack."""
    part = (array.rows, *array.shape[1:]) if isinstance(array, Streamed) else array.sharding.shard_shape(array.shape)
    shape = [max(size, 1) for size in part]
    for axis, size in enumerate(shape):
        row = array.dtype.itemsize * int(np.prod(shape[axis + 1:]))
        shape[axis] = max(1, min(size, CHUNK_BYTES // row))
    return shape


# ---------------------------------------------------------------- look


def step_directory(directory: str, step: int) -> Path:
    return Path(directory) / f'step_{step:08d}'


def steps(directory: str) -> list[int]:
    """The complete steps in `directory`, ascending: a sound manifest, and every file there with its size."""
    found = [path for path in Path(directory).glob('step_*') if path.name.removeprefix('step_').isdecimal()]
    return sorted(int(path.name.removeprefix('step_')) for path in found if _complete(path) is not None)


def latest_step(directory: str) -> int | None:
    """The newest complete step, or None."""
    return max(steps(directory), default=None)


def read_manifest(directory: str, step: int | None = None) -> dict:
    """step, meta, arrays (name -> shape, dtype) and files of a step (None: the newest complete one).

    Raises ValueError if there is none, or names what is wrong with the one that was asked for.
    """
    return _read_manifest(step_directory(directory, existing_step(directory, step)))


def read_meta(directory: str, step: int | None = None) -> dict:
    """What `save` was given as meta."""
    return read_manifest(directory, step)['meta']


def read_file(directory: str, step: int | None, name: str) -> bytes:
    """A file that `save` was given, compared with its sha256."""
    step = existing_step(directory, step)
    path = step_directory(directory, step)
    manifest = _read_manifest(path)
    if name not in manifest['files']:
        raise ValueError(f'{path} holds no file {name!r}')
    _verify(path, manifest, [name])
    return (path / name).read_bytes()


def existing_step(directory: str, step: int | None) -> int:
    """`step`, or for None the newest complete one; raises ValueError if it is not there."""
    found = latest_step(directory) if step is None else step
    if found is None:
        broken = ' '.join(sorted(path.name for path in Path(directory).glob('step_*')))
        raise ValueError(f'{str(directory)!r} holds no complete checkpoint'
                         + (f'; incomplete: {broken}' if broken else ''))
    if not step_directory(directory, found).is_dir():
        raise ValueError(f'{str(directory)!r} holds no step {step}; complete steps: {steps(directory)}')
    return found


def _sound_manifest(path: Path) -> dict | None:
    """The content of a step's manifest if its own sha256 holds and no file of it lies outside the step."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding='utf-8'))
        content = manifest['content']
        sound = manifest['sha256'] == _sha256_of_json(content) and not any(
            name.startswith('/') or '..' in name.split('/') for name in content['files'])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if sound else None


def _complete(path: Path) -> dict | None:
    """The manifest if it is sound and every file is there with its size."""
    if (manifest := _sound_manifest(path)) is None:
        return None
    sizes = [(path / name, entry['size']) for name, entry in manifest['files'].items()]
    return manifest if all(file.is_file() and file.stat().st_size == size for file, size in sizes) else None


def _read_manifest(path: Path) -> dict:
    if (manifest := _sound_manifest(path)) is None:
        raise ValueError(f'{path / MANIFEST} is missing or corrupt' + _other_steps(path))
    return manifest


def _verify(path: Path, manifest: dict, names) -> None:
    """Raises ValueError naming the first of the files `names` whose size or sha256 is not the manifest's."""
    for name in names:
        entry, file = manifest['files'][name], path / name
        size = file.stat().st_size if file.is_file() else 'no'
        if size != entry['size']:
            raise ValueError(f'{file} has {size} bytes instead of {entry["size"]}: the checkpoint is corrupt'
                             + _other_steps(path))
        if _sha256(file) != entry['sha256']:
            raise ValueError(f'{file} does not have the sha256 of its manifest: the checkpoint is corrupt'
                             + _other_steps(path))


def _other_steps(path: Path) -> str:
    others = [step for step in steps(path.parent) if step_directory(path.parent, step) != path]
    return f'; step {others[-1]} is complete: {step_directory(path.parent, others[-1])}' if others else ''


# ---------------------------------------------------------------- restore


def restore(directory: str, step: int | None, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays named in `targets`, each on the sharding of its target, from a step (None: the newest complete one).

    Every device reads its own part only, whatever the sharding was at save.  The files of these arrays are compared
    with their sha256 first.  Raises ValueError naming a corrupt file, or up to 10 arrays that are missing or differ.
    """
    step = existing_step(directory, step)
    path = step_directory(directory, step)
    manifest = _read_manifest(path)
    wrong = []
    for name, target in targets.items():
        want = f'{target.dtype.name}{list(target.shape)}'
        entry = manifest['arrays'].get(name)
        got = f'{entry["dtype"]}{entry["shape"]}' if entry else 'nothing'
        if got != want:
            wrong.append(f'{name} got {got} want {want}')
    if wrong:
        raise ValueError(f'{path} was saved by a model or optimizer of other sizes or dtypes: {shortened(wrong)}')
    _verify(path, manifest, [file for file in manifest['files'] if file.startswith('arrays/')
                             and file.split('/')[1] in targets])
    return {name: _restore_array(path / 'arrays' / name, target) for name, target in targets.items()}


def _restore_array(path: Path, target: jax.ShapeDtypeStruct) -> jax.Array:
    store = ts.open(_store_spec(path), open=True, read=True).result()
    parts = shard_indices(target.shape, target.sharding)
    reads = {index: store[tuple(slice(*part) for part in index)].read() for index in parts}
    return from_parts(target, {index: read.result() for index, read in reads.items()})


class ArrayReader:
    """The arrays of one step on the host, as a whole or a row at a time.  arrays: name -> (shape, dtype name)."""

    def __init__(self, directory: str, step: int):
        self._path = step_directory(directory, step)
        self._manifest, self._stores = _read_manifest(self._path), {}
        self.arrays = {name: (tuple(entry['shape']), entry['dtype'])
                       for name, entry in self._manifest['arrays'].items()}

    def read(self, name: str, row: int | None) -> np.ndarray:
        """Row `row` along the first axis, or for None the whole.  Its files are compared with their sha256 once."""
        if name not in self._stores:
            _verify(self._path, self._manifest, [file for file in self._manifest['files']
                                                 if file.startswith(f'arrays/{name}/')])
            self._stores[name] = ts.open(_store_spec(self._path / 'arrays' / name), open=True, read=True).result()
        store = self._stores[name]
        return (store if row is None else store[row]).read().result()


# ---------------------------------------------------------------- arrays from parts, for every loader


def shard_indices(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> dict[tuple, list]:
    """{((start, stop), ..) per dimension: devices of this process that hold this part}."""
    parts = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    return parts


def from_parts(target: jax.ShapeDtypeStruct, parts: dict[tuple, np.ndarray]) -> jax.Array:
    """A sharded array from the host arrays of its distinct parts (keys of `shard_indices`), complete when returned.

    Its memory is JAX's own, so that it may be donated.  On a CPU, device_put uses a 64-byte aligned numpy buffer in
    place, for several devices at once and (jax 0.10) even with may_alias=False; a second device_put copies.
    """
    shards = []
    for bounds, devices in shard_indices(target.shape, target.sharding).items():
        for device in devices:
            shard = jax.device_put(parts[bounds], device)
            shards.append(jax.device_put(shard, device, may_alias=False) if device.platform == 'cpu' else shard)
    array = jax.make_array_from_single_device_arrays(tuple(target.shape), target.sharding, shards)
    return array.block_until_ready()


def shortened(lines: list[str], most: int = 10) -> str:
    """The first `most` of a list of faults in one line, and how many more there are."""
    return '; '.join(lines[:most]) + (f'; and {len(lines) - most} more' if len(lines) > most else '')


# ---------------------------------------------------------------- files


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _sha256_of_json(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
