"""Reads LLaMA weights that EasyLM (August 2023) saved.  Neighbours: easylm_writer.py, easylm_train_state.py.

Format facts (EasyLM's checkpoint.py; flax.serialization): a streaming file is a sequence of msgpack values

    [key, value]     key: array of strings      value: bin = flax.serialization.to_bytes(array)

and flax writes an array as msgpack ext type 1 = [shape, dtype name, raw bytes in C order], or, above 1 GiB, as a dict
{'__msgpack_chunked_array__': True, 'shape': {'0': ..}, 'chunks': {'0': array, ..}}.  Three kinds of file:

  params              keys ('transformer', 'h', '0', 'attention', 'wq', 'kernel'), one tensor each
  trainstate          the whole TrainState; the weights' keys begin with ('params', 'params').  trainstate_params is
                      the same file, of which only the weights are wanted
  flax_params         no stream: one msgpack value, a nested dict, read as a whole

A streaming file is indexed once by seeking over the values; then a tensor, or a part of one, is read at a time; one in
chunks is read whole.  Linear layers are [in, out] as ours, lm_head is [M, V] where ours is [V, M], q and k are in
interleaved rotary order.  The file states no configuration.  (The pickles that EasyLM writes beside it, metadata.pkl
and dataset.pkl, are never opened.)
"""
import copy
import io
import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from checkpoint.formats.huggingface import refuse_placeholder
from checkpoint.formats.reading import Bounds, half_split_part, read_part, slices, transposed
from mistake import Mistake

# our name -> their key; {} is the layer
NAMES = {
    'embedding': 'transformer/wte/embedding',
    'layers.attention_norm': 'transformer/h/{}/attention_norm/kernel',
    'layers.w_q': 'transformer/h/{}/attention/wq/kernel',
    'layers.w_k': 'transformer/h/{}/attention/wk/kernel',
    'layers.w_v': 'transformer/h/{}/attention/wv/kernel',
    'layers.w_o': 'transformer/h/{}/attention/wo/kernel',
    'layers.ffn_norm': 'transformer/h/{}/ffn_norm/kernel',
    'layers.w_gate': 'transformer/h/{}/feed_forward/w1/kernel',
    'layers.w_up': 'transformer/h/{}/feed_forward/w3/kernel',
    'layers.w_down': 'transformer/h/{}/feed_forward/w2/kernel',
    'final_norm': 'transformer/ln_f/kernel',
    'head': 'lm_head/kernel',
}
ROOTS = {'params': '', 'trainstate': 'params/params/', 'trainstate_params': 'params/params/', 'flax_params': ''}
DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16, 'int32': np.int32}


class Entry(NamedTuple):
    """Where a value lies in a streaming file: offset and length in bytes of flax's serialization."""

    offset: int
    length: int


class Reader:
    """An EasyLM file of one `kind` (see ROOTS), opened for reading.

    head_dim: the caller's, since the file does not state it (it may be set later).  keys: all of the file.  names:
    those of its weights.
    Raises Mistake for a broken file and for one of another kind.
    """

    config = None

    def __init__(self, path: str, kind: str, head_dim: int | None = None):
        self.path, self.notes, self.head_dim = Path(path), [], head_dim
        if self.path.is_dir():
            raise Mistake(f'{path} is a directory: name the file in it, such as {self.path / "streaming_params"}')
        refuse_placeholder(self.path)
        self._arrays = _read_blob(self.path) if kind == 'flax_params' else {}
        self._entries = {} if kind == 'flax_params' else index(self.path)
        self.keys = self._arrays.keys() | self._entries.keys()
        self._set_root(ROOTS[kind])
        if kind.startswith('trainstate') and not self.names:
            raise Mistake(f'{self.path} holds no train state (no key under params/params): use params::')
        if kind == 'params' and any(key.startswith('params/params/') for key in self.keys):
            raise Mistake(f'{self.path} holds a whole train state: use trainstate_params:: for its weights, or '
                             'trainstate:: to train on from it')

    def _set_root(self, root: str) -> None:
        self._root = root
        self.names = {key.removeprefix(root) for key in self.keys if key.startswith(root)}

    def under(self, root: str) -> 'Reader':
        """Return a Reader of the tensors that lie below `root` shaped like the weights, as momenta do."""
        other = copy.copy(self)
        other._set_root(root)
        return other

    def source(self, name: str, layer: int | None) -> str:
        """The file's own key of our tensor, joined with '/', for messages and for `names`."""
        return NAMES[name].format(layer)

    def shape(self, name: str, layer: int | None) -> tuple[int, ...] | None:
        """The shape `tensor` would return, from the value's header alone; None if the file has no such tensor."""
        source = self.source(name, layer)
        if source not in self.names:
            return None
        header = _read_header(self.path, self._entries[self._root + source]) if self._entries else None
        shape = header[1] if header else self.array(self._root + source).shape  # one in chunks is read for it
        return shape[::-1] if name == 'head' else shape

    def array(self, key: str, bounds: Bounds = None) -> np.ndarray:
        """Read the array under a key of the file (joined with '/'), as stored, or the part of it within `bounds`."""
        if key not in self.keys:
            raise Mistake(f'{self.path}: no tensor {key!r}')
        if self._entries:
            return _read_array(self.path, self._entries[key], bounds)
        return self._arrays[key][slices(bounds)]

    def tensor(self, name: str, layer: int | None, bounds: Bounds = None) -> np.ndarray:
        """One tensor, or the part of it within `bounds`, float32, in our layout and rotary order."""
        def read(bounds: Bounds) -> np.ndarray:
            array = self.array(self._root + self.source(name, layer), bounds)
            if array.dtype == np.int32:
                raise Mistake(f'{self.path}: {self.source(name, layer)!r} holds whole numbers where weights must '
                                 'stand')
            return array.astype(np.float32, copy=False)

        if name == 'head':
            return read(transposed(bounds)).T
        if name in ('layers.w_q', 'layers.w_k'):
            return half_split_part(read, bounds, self.head_dim)
        return read(bounds)


def index(path: Path) -> dict[str, Entry]:
    """{key joined with '/': Entry} of a streaming file; reads keys and lengths, and seeks over the values."""
    entries = {}
    size = path.stat().st_size
    with open(path, 'rb') as file:
        while (start := file.tell()) < size:
            try:
                unpacker = msgpack.Unpacker(io.BytesIO(file.read(4096)), max_buffer_size=4096)
                if unpacker.read_array_header() != 2:
                    raise Mistake('not a pair')
                key = '/'.join(unpacker.unpack())
                file.seek(start + unpacker.tell())
                length = _bin_length(file)
            except (ValueError, TypeError, msgpack.UnpackException) as error:
                raise Mistake(f'{path} at byte {start} holds no (key, value) of an EasyLM streaming file ({error}); '
                                 'a file saved by flax in one piece is read with flax_params::') from None
            if length > size - file.tell():
                raise Mistake(f'{path} is cut off: {key} needs {length} bytes, {size - file.tell()} are left')
            if key in entries:
                raise Mistake(f'{path}: {key} occurs twice')
            entries[key] = Entry(file.tell(), length)
            file.seek(length, 1)
    return entries


def _bin_length(file) -> int:
    """Reads the header of a msgpack bin value; the file then stands at its first byte."""
    width = {b'\xc4': 1, b'\xc5': 2, b'\xc6': 4}.get(file.read(1))
    if width is None:
        raise Mistake('the value is not of type bin')
    return int.from_bytes(file.read(width), 'big')


def _read(path: Path, entry: Entry, most: int) -> bytes:
    with open(path, 'rb') as file:
        file.seek(entry.offset)
        return file.read(min(most, entry.length))


def _read_array(path: Path, entry: Entry, bounds: Bounds = None) -> np.ndarray:
    """The array of a value: the part that is wanted straight from the file; one in chunks is unpacked as a whole."""
    header = _read_header(path, entry)
    return read_part(path, *header, bounds) if header else \
        _array(path, _unpack(path, _read(path, entry, entry.length)))[slices(bounds)]


def _read_header(path: Path, entry: Entry) -> tuple[type, tuple[int, ...], int] | None:
    """(dtype, shape, offset of the data in the file) of an ordinary array; None for a value of another kind."""
    head = _read(path, entry, 128)
    start = {0xc7: 3, 0xc8: 4, 0xc9: 6}.get(head[0], 2 if 0xd4 <= head[0] <= 0xd8 else None) if head else None
    if start is None:
        return None
    try:
        if head[start - 1] != 1:
            raise Mistake(f'extension type {head[start - 1]}')
        unpacker = msgpack.Unpacker(io.BytesIO(head[start:]), max_buffer_size=4096)
        if unpacker.read_array_header() != 3:
            raise Mistake('not (shape, dtype, data)')
        shape, dtype = tuple(unpacker.unpack()), _dtype(unpacker.unpack())
        data = io.BytesIO(head)
        data.seek(start + unpacker.tell())
        length = _bin_length(data)
        if length != math.prod(shape) * np.dtype(dtype).itemsize or data.tell() + length != entry.length:
            raise Mistake(f'{length} bytes are no {np.dtype(dtype).name}{list(shape)}')
    except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
        raise Mistake(f'{path} at byte {entry.offset}: no array as flax writes it ({error})') from None
    return dtype, shape, entry.offset + data.tell()


def _dtype(name) -> type:
    if name not in DTYPES:
        raise Mistake(f'dtype {name!r}; supported: {" ".join(DTYPES)}')
    return DTYPES[name]


def _unpack(path: Path, data: bytes):
    """flax's msgpack with arrays as numpy arrays; nothing else than type 1 (ndarray) is accepted as extension."""

    def extension(code: int, data: bytes) -> np.ndarray:
        if code != 1:
            raise Mistake(f'extension type {code}')
        shape, dtype, buffer = msgpack.unpackb(data)
        return np.frombuffer(buffer, _dtype(dtype)).reshape(shape)

    try:
        return msgpack.unpackb(data, ext_hook=extension, strict_map_key=True, max_bin_len=len(data))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Mistake(f'{path} holds a value that is no array as flax writes it: {error}') from None


def _array(path: Path, value) -> np.ndarray:
    """An array as it stands, or joined from flax's chunks."""
    if isinstance(value, dict) and '__msgpack_chunked_array__' in value:
        shape, chunks = value['shape'], value['chunks']
        value = np.concatenate([chunks[str(i)] for i in range(len(chunks))])
        return value.reshape([shape[str(i)] for i in range(len(shape))])
    if not isinstance(value, np.ndarray):
        raise Mistake(f'{path}: {type(value).__name__} where an array must stand')
    return value


def _read_blob(path: Path) -> dict[str, np.ndarray]:
    """A flax_params file as {key joined with '/': array}, with or without a root 'params'."""
    tree = _unpack(path, path.read_bytes())
    if not isinstance(tree, dict):
        raise Mistake(f'{path} holds no dict of parameters: a streaming file is read with params::')
    if set(tree) == {'params'}:
        tree = tree['params']
    arrays = {}

    def walk(prefix: str, node) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and '__msgpack_chunked_array__' not in value:
                walk(f'{prefix}{key}/', value)
            else:
                arrays[prefix + key] = _array(path, value)

    walk('', tree)
    return arrays
