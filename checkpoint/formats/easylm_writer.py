"""Writes LLaMA weights and train states as EasyLM (August 2023) does.  Format: easylm.py.  Neighbours: writing.py.

One tensor at a time is in memory.  The bytes are those that msgpack and flax.serialization make of it, but its data
go to the file straight from the array.  Keys come in the order in which EasyLM's training writes them: sorted, since a
jitted step returns its dicts so ('10' before '2').  So a file of EasyLM's training that is read and written again is
equal byte for byte.
"""
from collections.abc import Callable
from pathlib import Path

import jax
import msgpack
import numpy as np

from checkpoint.formats.easylm import NAMES
from checkpoint.formats.easylm_train_state import layout
from checkpoint.formats.reading import interleaved_from_half_split, tensors_of
from checkpoint.writing import appears_whole, rounded
from mistake import Mistake
from model.config import LlamaConfig

CHUNK_BYTES = 2**30  # flax.serialization.MAX_CHUNK_SIZE: a larger array is cut
LARGEST_VALUE = 2**32 - 1  # bytes that msgpack's bin can hold
BIN, EXTENSION, FIXED_16 = 0xc4, 0xc7, b'\xd8'  # msgpack's marks; 16 bytes, a float32 scalar, have their own

Tensor = Callable[[str, int | None], np.ndarray]  # our name of a weight, its layer (None: not stacked) -> the array


def write_params(path: Path, tensor: Tensor, config: LlamaConfig, float_dtype: str, replace: bool = False) -> None:
    """EasyLM's `streaming_params` from tensors in our layout and rotary order; float_dtype fp32, bf16, fp16, or ''.

    Raises Mistake, with `path` as it was, for a model that EasyLM cannot compute, values that are no finite numbers
    (in float_dtype), and for a file that exists, unless it may be replaced.
    """
    refuse_unsupported(config)
    with appears_whole(Path(path), replace) as temporary, open(temporary, 'wb') as file:
        _write_tree(file, '', tensor, config, float_dtype)


def write_train_state(path: Path, arrays: dict[str, jax.Array], config: LlamaConfig, step: int, parameter_scale: bool,
                      float_dtype: str, replace: bool = False) -> None:
    """EasyLM's `streaming_train_state` from the arrays of one of our checkpoints, by the names they have there.

    step: micro-steps done.  parameter_scale: optimizer.adamw_optimizer.multiply_by_parameter_scale of the run.
    float_dtype other than fp32 and '' rounds the optimizer's state too, as EasyLM does.  Raises as write_params.
    """
    refuse_unsupported(config)
    accumulated = any(name.startswith('mean_gradient.') for name in arrays)
    scalars = {'step': step, 'count': int(arrays['optimizer.count']), 'micro_step': int(arrays['optimizer.micro_step'])}
    with appears_whole(Path(path), replace) as temporary, open(temporary, 'wb') as file:
        for key, what in layout(parameter_scale, accumulated):
            if what in scalars:
                _write_pair(file, key, np.int32(scalars[what]), '')
            elif what == 'unfactored':
                for source, _, _ in _sorted_keys(config):
                    _write_pair(file, f'{key}/{source}', np.zeros(1, np.float32), float_dtype)
            else:
                _write_tree(file, f'{key}/', gathered(arrays, what), config, float_dtype)


def gathered(arrays: dict[str, jax.Array], prefix: str) -> Tensor:
    """The tensors of arrays named PREFIX.WEIGHT, each layer gathered to the host when it is asked for."""
    def tensor(name: str, layer: int | None) -> np.ndarray:
        array = arrays[f'{prefix}.{name}']
        return np.asarray(array if layer is None else array[layer])
    return tensor


def refuse_unsupported(config: LlamaConfig) -> None:
    """Raises Mistake that lists what EasyLM's model of August 2023 has no place for."""
    wrong = [reason for unsupported, reason in (
        (config.tie_word_embeddings, 'tie_word_embeddings=True (its lm_head is a weight of its own)'),
        (config.num_key_value_heads != config.num_attention_heads,
         f'num_key_value_heads={config.num_key_value_heads} (it has as many as query heads)'),
        (config.rope_theta != 10000, f'rope_theta={config.rope_theta} (it has 10000)'),
        (config.rope_scaling, 'rope_scaling (it has none)'),
        (config.head_dim * config.num_attention_heads != config.hidden_size,
         f'head_dim={config.head_dim} (it has hidden_size / num_attention_heads)')) if unsupported]
    if wrong:
        raise Mistake(f'EasyLM of August 2023 cannot compute this model: {"; ".join(wrong)}; write it as hf or as '
                         'our own checkpoint')


# ---------------------------------------------------------------- the stream


def _sorted_keys(config: LlamaConfig) -> list[tuple[str, str, int | None]]:
    """[(their key, our name, layer)] of all weights, sorted as a nested dict of their keys would be."""
    keys = [(NAMES[spec.name].format(layer), spec.name, layer) for spec, layer in tensors_of(config)]
    return sorted(keys, key=lambda entry: entry[0].split('/'))


def _write_tree(file, root: str, tensor: Tensor, config: LlamaConfig, float_dtype: str) -> None:
    for source, name, layer in _sorted_keys(config):
        array = tensor(name, layer)
        if name == 'head':
            array = array.T
        elif name in ('layers.w_q', 'layers.w_k'):
            array = interleaved_from_half_split(array, config.head_dim)
        _write_pair(file, root + source, array, float_dtype)


def _write_pair(file, key: str, array: np.ndarray, float_dtype: str) -> None:
    parts = _value(rounded(array, float_dtype, key))
    length = sum(len(part) for part in parts)
    if length > LARGEST_VALUE:
        raise Mistake(f'{key} needs {length} bytes, EasyLM\'s format holds {LARGEST_VALUE} in one value: write bf16')
    file.writelines([b'\x92' + msgpack.packb(key.split('/')) + _header(BIN, length), *parts])


def _value(array: np.ndarray) -> list:
    """flax.serialization.to_bytes(array) in parts, of which the large ones are views of the array."""
    if array.nbytes <= CHUNK_BYTES:
        return _extension(array)
    flat, size, packer = array.reshape(-1), CHUNK_BYTES // array.dtype.itemsize, msgpack.Packer()
    chunks = [flat[start:start + size] for start in range(0, flat.size, size)]
    parts = [packer.pack_map_header(3) + packer.pack('__msgpack_chunked_array__') + packer.pack(True)
             + packer.pack('shape') + packer.pack({str(i): n for i, n in enumerate(array.shape)})
             + packer.pack('chunks') + packer.pack_map_header(len(chunks))]
    for i, chunk in enumerate(chunks):
        parts += [packer.pack(str(i)), *_extension(chunk)]
    return parts


def _extension(array: np.ndarray) -> list:
    """An array as msgpack's ext type 1 = [shape, dtype name, bytes]: the headers, and the data."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    inner = b'\x93' + msgpack.packb(array.shape) + msgpack.packb(array.dtype.name) + _header(BIN, len(data))
    length = len(inner) + len(data)
    return [(FIXED_16 if length == 16 else _header(EXTENSION, length)) + b'\x01', inner, data]


def _header(mark: int, length: int) -> bytes:
    """The mark of the least width that holds the length (1, 2 or 4 bytes), and the length."""
    wider = (length >= 1 << 8) + (length >= 1 << 16)
    return bytes([mark + wider]) + length.to_bytes(1 << wider, 'big')
