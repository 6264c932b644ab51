"""Writes a LLaMA as a Hugging Face directory.  Format: huggingface.py.  Neighbours: writing.py, ../source.py.

A safetensors file is 8 bytes with the length of its header, the header (JSON: name -> dtype, shape, place of its data),
and the data.  All of the header follows from the configuration, so it goes first and then one tensor after the other:
memory holds one.  config.json is written in transformers 4's spelling (rope_theta, rope_scaling), which 5 reads too.
"""
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece

from checkpoint.formats.huggingface import DTYPES, NAMES
from checkpoint.formats.reading import tensors_of
from checkpoint.writing import FLOATS, appears_whole, rounded
from data.tokenizer import Tokenizer
from model.config import LlamaConfig

Entry = tuple[str, str, int | None, tuple[int, ...]]  # their name, our name, layer, their shape


def write(path: Path, tensor: Callable[[str, int | None], np.ndarray], config: LlamaConfig, tokenizer: Tokenizer | None,
          add_bos_token: bool | None, float_dtype: str, max_shard_bytes: int) -> None:
    """The directory `path` from tensors in our layout: tensor(name of a weight, layer or None) -> array.

    One file, or several of at most max_shard_bytes (a larger tensor has a file of its own) and their index.
    Raises Mistake, with nothing left, if `path` exists and for values that are no finite numbers in float_dtype.
    """
    shards = _shards(_entries(config), np.dtype(FLOATS[float_dtype]).itemsize, max_shard_bytes)
    names = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' if len(shards) > 1 else 'model.safetensors'
             for i in range(len(shards))]
    with appears_whole(Path(path)) as temporary:
        temporary.mkdir()
        for file, entries in zip(names, shards, strict=True):
            _write_shard(temporary / file, entries, tensor, float_dtype)
        if len(shards) > 1:
            total = sum(_size(entry) for entries in shards for entry in entries)
            write_json(temporary / 'model.safetensors.index.json', dict(
                metadata=dict(total_parameters=total, total_size=total * np.dtype(FLOATS[float_dtype]).itemsize),
                weight_map={entry[0]: file for file, entries in zip(names, shards, strict=True) for entry in entries}))
        bos, eos = (tokenizer or config).bos_token_id, (tokenizer or config).eos_token_id
        if tokenizer:
            write_tokenizer(temporary, tokenizer, config.max_sequence_length, add_bos_token)
        write_json(temporary / 'config.json', _config(config, float_dtype) | dict(bos_token_id=bos, eos_token_id=eos))
        write_json(temporary / 'generation_config.json', dict(bos_token_id=bos, eos_token_id=eos))


def _config(config: LlamaConfig, float_dtype: str) -> dict:
    scaling = config.rope_scaling
    return dict(
        architectures=['LlamaForCausalLM'], model_type='llama', torch_dtype=np.dtype(FLOATS[float_dtype]).name,
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim,
        max_position_embeddings=config.max_sequence_length, rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta, rope_scaling=dict(rope_type='llama3', **vars(scaling)) if scaling else None,
        tie_word_embeddings=config.tie_word_embeddings, initializer_range=config.initializer_range,
        hidden_act='silu', attention_bias=False, mlp_bias=False, use_cache=True)


def write_tokenizer(path: Path, tokenizer: Tokenizer, max_length: int, add_bos_token: bool | None) -> None:
    """The tokenizer's own file, and tokenizer_config.json that names its special tokens, into the directory `path`."""
    (path / tokenizer.file_name).write_bytes(tokenizer.source_bytes)
    if tokenizer.file_name == 'tokenizer.model':
        kind = 'LlamaTokenizer'
        piece = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.source_bytes).id_to_piece
    else:
        import tokenizers
        kind = 'PreTrainedTokenizerFast'
        piece = tokenizers.Tokenizer.from_str(tokenizer.source_bytes.decode()).id_to_token
    values = dict(tokenizer_class=kind, model_max_length=max_length,
                  bos_token=piece(tokenizer.bos_token_id), eos_token=piece(tokenizer.eos_token_id),
                  pad_token=piece(tokenizer.pad_token_id), clean_up_tokenization_spaces=False)
    if kind == 'LlamaTokenizer':
        values |= dict(unk_token=piece(tokenizer.pad_token_id), legacy=True, add_eos_token=False)
    if add_bos_token is not None:
        values |= dict(add_bos_token=add_bos_token)
    write_json(path / 'tokenizer_config.json', values)


# ---------------------------------------------------------------- safetensors


def _entries(config: LlamaConfig) -> list[Entry]:
    """All tensors, layer by layer."""
    entries = []
    for spec, layer in tensors_of(config):
        source, transposed = NAMES[spec.name]
        shape = spec.shape[1:] if spec.stacked else spec.shape
        entries.append((source.format(layer), spec.name, layer, shape[::-1] if transposed else shape))
    return sorted(entries, key=lambda entry: -1 if entry[2] is None else entry[2])


def _size(entry: Entry) -> int:
    return math.prod(entry[3])


def _shards(entries: list[Entry], item_bytes: int, max_shard_bytes: int) -> list[list[Entry]]:
    shards, filled = [[]], 0
    for entry in entries:
        size = _size(entry) * item_bytes
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def _write_shard(path: Path, entries: list[Entry], tensor, float_dtype: str) -> None:
    def get(name: str, layer: int | None) -> np.ndarray:
        array = tensor(name, layer)
        return array.T if NAMES[name][1] else array

    write_safetensors(path, [(source, shape, functools.partial(get, name, layer))
                             for source, name, layer, shape in entries], float_dtype)


def write_safetensors(path: Path, tensors: list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
                      float_dtype: str) -> None:
    """Write a file of (name, shape, function that gives the array), asking for one array after the other."""
    header, end, dtype = {'__metadata__': {'format': 'pt'}}, 0, np.dtype(FLOATS[float_dtype])
    stored = next(name for name in DTYPES if DTYPES[name] == dtype)
    for name, shape, _ in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=stored, shape=shape, data_offsets=[start, end])
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # the format's alignment of the data
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name, shape, get in tensors:
            array = np.ascontiguousarray(rounded(get(), float_dtype, name))
            assert array.shape == shape, (name, array.shape, shape)
            file.write(array.reshape(-1).view(np.uint8).data)


def write_json(path: Path, values: dict) -> None:
    """Write an object as Hugging Face's libraries do."""
    path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
