"""Hugging Face directories: both generations of config.json, safetensors in one file or many, and what is refused."""
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from checkpoint.formats.huggingface import NAMES, Reader
from model.config import RopeScaling

CASES = ('gqa_tied', 'head_dim_100', 'llama31_rope', 'mha_untied')


@pytest.fixture
def directory(golden, tmp_path):
    """A copy of a small model made by transformers 5, to be damaged."""
    return shutil.copytree(golden / 'huggingface/gqa_tied', tmp_path / 'model')


def change_config(directory, **changes):
    path = directory / 'config.json'
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != 'absent'}))


def all_tensors(reader):
    names = [name for name in NAMES if name.startswith('layers.')]
    tensors = {(name, layer): reader.tensor(name, layer)
               for name in names for layer in range(reader.config.num_hidden_layers)}
    return tensors | {(name, None): reader.tensor(name, None) for name in ('embedding', 'final_norm')}


@pytest.mark.parametrize('case', CASES)
def test_tensors_are_in_out_float32(golden, case):
    """Linear layers are the transposes of the file's [out, in]; the embedding is as stored; `shape` announces them."""
    path = golden / 'huggingface' / case
    reader, stored = Reader(path), load_file(path / 'model.safetensors')
    for (name, layer), tensor in all_tensors(reader).items():
        expected = stored[reader.source(name, layer)]
        expected = expected.T if name.startswith('layers.w_') else expected
        np.testing.assert_array_equal(tensor, expected)
        assert tensor.dtype == np.float32 and reader.shape(name, layer) == expected.shape
    assert reader.names == set(stored)


def test_config_of_transformers_4_equals_that_of_5(directory, golden):
    """rope_theta and rope_scaling at the top level mean what rope_parameters means."""
    shutil.copy(golden / 'huggingface/llama31_rope/config.json', directory / 'config.json')
    newer = Reader(directory).config
    rope = json.loads((directory / 'config.json').read_text())['rope_parameters']
    change_config(directory, rope_parameters='absent', rope_theta=rope.pop('rope_theta'), rope_scaling=rope)
    assert Reader(directory).config == newer
    assert newer.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32) and newer.rope_theta == 500000.0


@pytest.mark.parametrize('changes', [
    dict(model_type='mistral'), dict(hidden_act='gelu'), dict(attention_bias=True), dict(mlp_bias=True),
    dict(rope_parameters={'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4.0}),
    dict(rope_parameters={'rope_type': 'default', 'partial_rotary_factor': 0.5}),
    dict(rope_parameters='absent', rope_scaling={'type': 'linear', 'factor': 2.0}),
    dict(rope_scaling={'rope_type': 'llama3'}),
    dict(quantization_config={'bits': 4}), dict(auto_map={'AutoModel': 'x.Y'}),
    dict(hidden_size=-96), dict(vocab_size=2**40), dict(intermediate_size='absent'), dict(num_hidden_layers=True),
    dict(rms_norm_eps=float('nan')), dict(tie_word_embeddings=1), dict(bos_token_id=-1), dict(num_key_value_heads=4)])
def test_config_that_is_not_understood_is_refused_by_key(directory, changes):
    """Nothing is guessed: the message names config.json and the key."""
    change_config(directory, **changes)
    with pytest.raises(ValueError, match=f'config.json.*{list(changes)[-1]}'):
        Reader(directory)


def test_first_of_several_eos_tokens_is_taken_with_a_note(directory):
    """Chat models list more than one end: the first counts, and a note says so."""
    change_config(directory, eos_token_id=[7, 8])
    reader = Reader(directory)
    assert reader.config.eos_token_id == 7 and 'eos_token_id=[7, 8]' in reader.notes[0]


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_become_float32_exactly(directory, dtype):
    """Every bfloat16 and float16 value is a float32 value."""
    stored = {name: array.astype(dtype) for name, array in load_file(directory / 'model.safetensors').items()}
    save_file(stored, directory / 'model.safetensors')
    tensor = Reader(directory).tensor('layers.w_q', 1)
    expected = stored['model.layers.1.self_attn.q_proj.weight'].astype(np.float32).T
    assert tensor.dtype == np.float32 and np.array_equal(tensor, expected)


def shard(directory, names=('a.safetensors', 'b.safetensors')):
    stored = load_file(directory / 'model.safetensors')
    (directory / 'model.safetensors').unlink()
    halves = [dict(list(stored.items())[start::2]) for start in (0, 1)]
    for name, half in zip(('a.safetensors', 'b.safetensors'), halves, strict=True):
        save_file(half, directory / name)
    weight_map = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (directory / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))


def test_sharded_model_equals_single_file(directory, golden):
    """The same tensors, cut into two files with an index."""
    shard(directory)
    whole = all_tensors(Reader(golden / 'huggingface/gqa_tied'))
    for key, tensor in all_tensors(Reader(directory)).items():
        np.testing.assert_array_equal(tensor, whole[key])


@pytest.mark.parametrize('name', ['../b.safetensors', '/etc/passwd', 'x/b.safetensors', '..', ''])
def test_shard_outside_the_directory_is_refused(directory, name):
    """An index names plain files of its own directory."""
    shard(directory, ('a.safetensors', name))
    with pytest.raises(ValueError, match='plain file name'):
        Reader(directory)


def damage(directory, kind):
    weights = directory / 'model.safetensors'
    content = weights.read_bytes()
    weights.unlink()
    if kind == 'pickle':
        (directory / 'pytorch_model.bin').write_bytes(b'\x80')
    elif kind == 'git-lfs pointer':
        weights.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    elif kind == 'dangling link':
        weights.symlink_to('../../blobs/0')
    elif kind == 'not a whole safetensors':
        weights.write_bytes(content[:-1])
    elif kind == 'dtype F64':
        save_file({name: array.astype(np.float64) for name, array in load(content).items()}, weights)


@pytest.mark.parametrize('kind', ['pickle', 'git-lfs pointer', 'dangling link', 'not a whole safetensors', 'dtype F64',
                                  'holds no weights'])
def test_directory_without_readable_weights_is_refused(directory, kind):
    """The message says which of the usual accidents it is."""
    damage(directory, kind)
    with pytest.raises(ValueError, match=kind):
        Reader(directory).tensor('embedding', None)
