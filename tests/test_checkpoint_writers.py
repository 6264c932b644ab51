"""What we write for EasyLM and for Hugging Face, read back by other readers than ours, and what is refused."""
import dataclasses
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from test_checkpoint_easylm import flax_array, stream

import checkpoint
from checkpoint import native
from checkpoint.formats import easylm, easylm_writer, huggingface, huggingface_writer
from checkpoint.writing import appears_whole, rounded
from data.tokenizer import load_tokenizer, tokenizer_from_json
from model.config import LlamaConfig, RopeScaling
from model.partition import make_mesh
from model.weights import by_name, weight_specs

SMALL = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=11, num_attention_heads=2)
HUGGING_FACE = ('gqa_tied', 'head_dim_100', 'llama31_rope', 'mha_untied')
NUMPY = {'fp32': np.float32, 'bf16': ml_dtypes.bfloat16, 'fp16': np.float16}


def easylm_config(golden):
    return LlamaConfig(**json.loads((golden / 'easylm/model.json').read_text()))


def random_tensor(config, seed=0):
    """tensor(name, layer) of a random model, and {(name, layer): array} of what it gave."""
    given, random = {}, np.random.default_rng(seed)
    specs = {spec.name: spec for spec in jax.tree.leaves(weight_specs(config))}

    def tensor(name, layer):
        shape = specs[name].shape if layer is None else specs[name].shape[1:]
        given[name, layer] = random.normal(size=shape).astype(np.float32)
        return given[name, layer]

    return tensor, given


def through_native(spec, config, directory):
    """tensor(name, layer) of a native checkpoint saved from the weights of `spec`."""
    params = checkpoint.open(spec).load_params(config, make_mesh('1,2,1', jax.devices()[:2]))
    meta, files = checkpoint.source.describe(config, None, None)
    native.save(directory, 0, by_name(params, config, 'params'), meta, files, keep=1)
    return checkpoint.open(str(directory)).reader(config).tensor


# ---------------------------------------------------------------- EasyLM


def test_a_file_of_easylms_training_comes_back_byte_for_byte(golden, tmp_path):
    """streaming_params_trained -> float32 checkpoint of ours -> bfloat16 stream: the whole file is equal."""
    config, source = easylm_config(golden), golden / 'easylm/streaming_params_trained'
    tensor = through_native(f'params::{source}', config, tmp_path / 'native')
    easylm_writer.write_params(tmp_path / 'out', tensor, config, 'bf16')
    assert (tmp_path / 'out').read_bytes() == source.read_bytes()


@pytest.mark.parametrize('file, float_dtype', [('streaming_params_fp32', 'fp32'), ('streaming_params_fp32', ''),
                                               ('streaming_params_bf16', 'bf16')])
def test_each_tensor_comes_back_byte_for_byte(golden, tmp_path, file, float_dtype):
    """Files that EasyLM wrote outside of training have their keys in another order: the tensors are equal."""
    config, source = easylm_config(golden), golden / 'easylm' / file
    tensor = through_native(f'params::{source}', config, tmp_path / 'native')
    easylm_writer.write_params(tmp_path / 'out', tensor, config, float_dtype)
    ours, theirs = dict(map_keys(stream(tmp_path / 'out'))), dict(map_keys(stream(source)))
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype and ours[key].tobytes() == array.tobytes(), key


def map_keys(pairs):
    return (('/'.join(key), array) for key, array in pairs)


def test_keys_come_sorted_as_text(tmp_path):
    """A jitted step sorts the keys of its dicts: lm_head first, layer 10 before layer 2, wk before wq."""
    tensor, _ = random_tensor(SMALL)
    easylm_writer.write_params(tmp_path / 'out', tensor, SMALL, 'fp32')
    keys = [tuple(key) for key, _ in stream(tmp_path / 'out')]
    assert keys == sorted(keys) and keys[0] == ('lm_head', 'kernel') and len(keys) == 9 * 11 + 3
    assert keys.index(('transformer', 'h', '10', 'attention', 'wq', 'kernel')) < keys.index(
        ('transformer', 'h', '2', 'attention', 'wk', 'kernel'))


@pytest.mark.parametrize('shape, dtype', [
    ((7, 9), 'float32'), ((3, 5, 7), 'bfloat16'), ((26,), 'float32'), ((25,), 'float32'), ((1,), 'float32'),
    ((2,), 'bfloat16'), ((), 'int32'), ((), 'float32'), ((70000,), 'float16'), ((300,), 'float16')])
@pytest.mark.parametrize('limit', [100, 2**30])
def test_values_are_packed_as_msgpack_and_flax_pack_them(tmp_path, monkeypatch, shape, dtype, limit):
    """All widths of msgpack's headers, and flax's chunks above a limit (here 100 bytes), against msgpack itself."""
    monkeypatch.setattr(easylm_writer, 'CHUNK_BYTES', limit)
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 10).astype(dtype)
    value, size = flax_array(array), limit // array.dtype.itemsize
    if array.nbytes > limit:
        chunks = [array.reshape(-1)[start:start + size] for start in range(0, array.size, size)]
        value = {'__msgpack_chunked_array__': True, 'shape': {str(i): n for i, n in enumerate(shape)},
                 'chunks': {str(i): flax_array(chunk) for i, chunk in enumerate(chunks)}}
    with open(tmp_path / 'ours', 'wb') as file:
        easylm_writer._write_pair(file, 'a/b', array, '')
    assert (tmp_path / 'ours').read_bytes() == msgpack.packb((('a', 'b'), msgpack.packb(value)))
    read = easylm.Reader(tmp_path / 'ours', 'params', 2).array('a/b')
    assert read.dtype == array.dtype and read.shape == shape and read.tobytes() == array.tobytes()


@pytest.mark.parametrize('changes, reason', [
    (dict(tie_word_embeddings=True), 'tie_word_embeddings'), (dict(num_key_value_heads=1), 'num_key_value_heads=1'),
    (dict(rope_theta=5e5), 'rope_theta=500000.0'), (dict(head_dim=4), 'head_dim=4'),
    (dict(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)), 'rope_scaling')])
def test_what_easylm_cannot_compute_is_refused(tmp_path, changes, reason):
    """Its format has no place for a tied head, shared key/value heads, another rotary base, scaling or head size."""
    with pytest.raises(ValueError, match=f'EasyLM.* cannot compute this model: {reason}'):
        easylm_writer.write_params(tmp_path / 'out', None, dataclasses.replace(SMALL, **changes), 'fp32')
    assert not list(tmp_path.iterdir())


def test_a_tensor_beyond_msgpacks_limit_is_refused(tmp_path, monkeypatch):
    """4 GiB is the largest value of EasyLM's format: the message says to write bf16."""
    monkeypatch.setattr(easylm_writer, 'LARGEST_VALUE', 100)
    with pytest.raises(ValueError, match='lm_head/kernel needs 1.. bytes.*write bf16'):
        easylm_writer.write_params(tmp_path / 'out', random_tensor(SMALL)[0], SMALL, 'fp32')
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize('case', HUGGING_FACE)
@pytest.mark.parametrize('shard_bytes', [10**12, 300_000])
def test_hugging_face_models_come_back_bit_for_bit(golden, tmp_path, case, shard_bytes):
    """Directory -> checkpoint of ours -> directory: configuration and every tensor, in one file or in several."""
    source = huggingface.Reader(golden / 'huggingface' / case)
    tensor = through_native(f'hf::{source.path}', source.config, tmp_path / 'native')
    huggingface_writer.write(tmp_path / 'out', tensor, source.config, None, None, 'fp32', shard_bytes)
    files, ours = sorted((tmp_path / 'out').glob('*.safetensors')), {}
    for file in files:
        part = load_file(file)
        assert not set(part) & set(ours)
        assert len(part) == 1 or sum(array.nbytes for array in part.values()) <= shard_bytes
        ours |= part
    theirs = load_file(source.path / 'model.safetensors')
    assert set(ours) == set(theirs) and all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert all(ours[name].shape == theirs[name].shape for name in theirs)
    assert huggingface.Reader(tmp_path / 'out').config == source.config
    index = tmp_path / 'out/model.safetensors.index.json'
    assert index.is_file() == (len(files) > 1) == (shard_bytes < 10**6)
    if len(files) > 1:
        assert [file.name for file in files][0] == f'model-00001-of-{len(files):05}.safetensors'
        values = json.loads(index.read_text())
        assert values['metadata']['total_size'] == sum(array.nbytes for array in theirs.values())
        for name, file in values['weight_map'].items():
            assert name in safe_open(tmp_path / 'out' / file, 'np').keys()


@pytest.mark.parametrize('case', ['mha_untied', 'head_dim_100'])
def test_hugging_face_to_easylm_and_back_is_bit_exact(golden, tmp_path, case):
    """The two that EasyLM's format can hold: rotary order and the head's transpose are undone."""
    source = huggingface.Reader(golden / 'huggingface' / case)
    easylm_writer.write_params(tmp_path / 'stream', source.tensor, source.config, 'fp32')
    middle = easylm.Reader(tmp_path / 'stream', 'params', source.config.head_dim)
    huggingface_writer.write(tmp_path / 'out', middle.tensor, source.config, None, None, 'fp32', 10**12)
    ours, theirs = (load_file(path / 'model.safetensors') for path in (tmp_path / 'out', source.path))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs) and set(ours) == set(theirs)


@pytest.mark.parametrize('float_dtype', ['fp32', 'bf16', 'fp16'])
def test_half_precision_is_rounded_to_nearest(tmp_path, float_dtype):
    """Every number is numpy's rounding of the float32; config.json says the dtype; data are aligned to 8 bytes."""
    tensor, given = random_tensor(SMALL)
    huggingface_writer.write(tmp_path / 'out', tensor, SMALL, None, None, float_dtype, 10**12)
    stored = load_file(tmp_path / 'out/model.safetensors')
    for (name, layer), array in given.items():
        source, transposed = huggingface.NAMES[name]
        expected = (array.T if transposed else array).astype(NUMPY[float_dtype])
        got = stored[source.format(layer)]
        assert got.dtype == expected.dtype and np.array_equal(got, expected)
    assert json.loads((tmp_path / 'out/config.json').read_text())['torch_dtype'] == np.dtype(NUMPY[float_dtype]).name
    assert int.from_bytes((tmp_path / 'out/model.safetensors').read_bytes()[:8], 'little') % 8 == 0


@pytest.mark.parametrize('add_bos_token', [None, True, False])
@pytest.mark.parametrize('kind', ['tokenizer.model', 'tokenizer.json'])
def test_the_tokenizer_comes_along(golden, tmp_path, kind, add_bos_token):
    """Same fingerprint (bytes and special ids) from the directory, its ids in config.json, add_bos_token as it was."""
    bpe = dict(type='BPE', vocab={'a': 0, 'b': 1, 'c': 2}, merges=[])
    tokenizer = load_tokenizer(golden / 'easylm/tokenizer.model') if kind == 'tokenizer.model' else \
        tokenizer_from_json(json.dumps(dict(version='1.0', added_tokens=[], model=bpe)), 2, 1, 0)
    huggingface_writer.write(tmp_path / 'out', random_tensor(SMALL)[0], SMALL, tokenizer, add_bos_token, 'fp32', 10**12)
    spec = f'hf::{tmp_path}/out'
    assert checkpoint.open(spec).tokenizer.fingerprint == tokenizer.fingerprint
    assert checkpoint.open(spec).add_bos_token is add_bos_token
    for file in ('config.json', 'generation_config.json'):
        values = json.loads((tmp_path / 'out' / file).read_text())
        assert (values['bos_token_id'], values['eos_token_id']) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


# ---------------------------------------------------------------- both


def write_easylm(path, tensor, float_dtype):
    easylm_writer.write_params(path, tensor, SMALL, float_dtype)


def write_hugging_face(path, tensor, float_dtype):
    huggingface_writer.write(path, tensor, SMALL, None, None, float_dtype, 10**12)


@pytest.mark.parametrize('write', [write_easylm, write_hugging_face])
@pytest.mark.parametrize('value, float_dtype', [(np.nan, 'fp32'), (np.inf, 'bf16'), (1e5, 'fp16'), (3.4e38, 'bf16')])
def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path, write, value, float_dtype):
    """NaN, infinity, and what only the rounding makes infinite: the tensor is named and nothing is left behind."""
    tensor, _ = random_tensor(SMALL)
    broken = lambda name, layer: np.where(layer == 7, np.float32(value), tensor(name, layer))
    with pytest.raises(ValueError, match=r'(layers\.7|h/7).* holds NaN, infinity, or a value beyond the range'):
        write(tmp_path / 'out', broken, float_dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('write', [write_easylm, write_hugging_face])
def test_nothing_is_written_over(tmp_path, write):
    """A path that exists is refused, and stays as it was."""
    (tmp_path / 'out').write_text('mine')
    with pytest.raises(ValueError, match='exists already'):
        write(tmp_path / 'out', random_tensor(SMALL)[0], 'fp32')
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('out', 'mine')]


def test_a_file_that_may_be_replaced_stays_until_the_new_one_is_whole(tmp_path):
    """An interrupted rewrite leaves the old file and no remains; a finished one replaces it."""
    path = tmp_path / 'streaming_params'
    easylm_writer.write_params(path, random_tensor(SMALL)[0], SMALL, 'fp32')
    before = path.read_bytes()

    def dying(name, layer):
        if layer == 5:
            raise KeyboardInterrupt
        return random_tensor(SMALL)[0](name, layer)

    with pytest.raises(KeyboardInterrupt):
        easylm_writer.write_params(path, dying, SMALL, 'fp32', replace=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    easylm_writer.write_params(path, random_tensor(SMALL, seed=1)[0], SMALL, 'fp32', replace=True)
    assert path.read_bytes() != before and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_with_a_warning(tmp_path, caplog):
    """Remains of the same name go, a file or a directory; those of a neighbour stay."""
    (tmp_path / 'out.tmp-1').write_text('half')
    (tmp_path / 'out.tmp-2').mkdir()
    (tmp_path / 'out_10.tmp-3').write_text('half')
    write_hugging_face(tmp_path / 'out', random_tensor(SMALL)[0], 'fp32')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'out_10.tmp-3']
    assert 'out.tmp-1' in caplog.text and 'out.tmp-2' in caplog.text


def test_everything_is_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    """At the rename every file of the temporary directory and itself has been synced; then the directory above."""
    synced, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, 'fsync', lambda fd: (synced.append(Path(os.readlink(f'/proc/self/fd/{fd}'))), fsync(fd)))

    def checked_rename(source, target):
        assert {source, *source.rglob('*')} <= set(synced) and len(list(source.rglob('*'))) == 3
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, 'rename', checked_rename)
    write_hugging_face(tmp_path / 'out', random_tensor(SMALL)[0], 'fp32')
    assert synced == [tmp_path]


def test_rounding_leaves_whole_numbers_and_asks_for_no_copy_in_vain(tmp_path):
    """int32 stays int32, '' keeps any dtype, and float32 in float32 is the same memory."""
    whole, array = np.arange(3, dtype=np.int32), np.ones(3, np.float32)
    assert rounded(whole, 'bf16', 'x') is whole and rounded(array, 'fp32', 'x') is array
    assert rounded(array.astype(NUMPY['bf16']), '', 'x').dtype == NUMPY['bf16']
    with pytest.raises(ValueError, match='exists already'), appears_whole(tmp_path):
        pass
