"""TYPE::PATH: every format becomes the same sharded weights, what does not fit is listed before anything is read."""
import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from jax.sharding import PartitionSpec as P
from test_checkpoint_easylm import flax_array, stream
from test_checkpoint_gguf import write as write_gguf

import checkpoint
from checkpoint import native, shards
from checkpoint.formats import easylm, easylm_writer, huggingface, huggingface_writer, reading
from data.prompt import PromptTemplate
from data.tokenizer import load_tokenizer, tokenizer_from_json
from mistake import Mistake
from model.config import MODELS, Compute, LlamaConfig, config_to_dict
from model.llama import hidden_states
from model.loss import logits
from model.partition import make_mesh
from model.weights import abstract_params, by_name, partitions, weight_specs

ROOT = Path(__file__).parent.parent


def model_logits(params, config, mesh, tokens):
    """float32 logits [B, T, V] of the reference forward pass."""
    def forward(params, tokens):
        return logits(params, hidden_states(params, tokens, jnp.ones_like(tokens), config, Compute())[0])
    return jax.jit(jax.shard_map(forward, mesh=mesh, in_specs=(partitions(config), P()), out_specs=P(None, None, 'mp'),
                                 check_vma=False))(params, tokens)


@pytest.mark.parametrize('case', ['gqa_tied', 'head_dim_100', 'llama31_rope', 'mha_untied'])
def test_hugging_face_models_give_the_logits_of_transformers(golden, case):
    """Within 2e-5 of the largest logit of transformers 5.23, both in float32."""
    spec, mesh = f'hf::{golden}/huggingface/{case}', make_mesh('1,1,1', jax.devices()[:1])
    source = checkpoint.open(spec)
    config, expected = source.config, np.load(golden / f'huggingface/{case}/golden.npz')
    got = model_logits(source.load_params(config, mesh), config, mesh, expected['tokens'].astype(np.int32))
    assert np.abs(got - expected['logits']).max() <= 2e-5 * np.abs(expected['logits']).max()


def easylm_config(golden, **changes):
    return LlamaConfig(**json.loads((golden / 'easylm/model.json').read_text()) | changes)


def test_easylm_models_give_the_logits_of_easylm(golden):
    """Within 2e-5 of the largest logit of EasyLM (August 2023), both in float32, on a mesh of two heads a device."""
    spec, mesh, config = f'params::{golden}/easylm/streaming_params_fp32', make_mesh('1,1,2', jax.devices()[:2]), None
    source = checkpoint.open(spec)
    assert source.config is None and source.tokenizer is None and source.template is None
    config, expected = easylm_config(golden), np.load(golden / 'easylm/model.npz')
    got = model_logits(source.load_params(config, mesh), config, mesh, expected['tokens'][:, :-1].astype(np.int32))
    assert np.abs(got - expected['logits']).max() <= 2e-5 * np.abs(expected['logits']).max()


@pytest.mark.parametrize('mesh, stack_bytes', [('1,4,2', shards.STACK_BYTES), ('8,1,1', shards.STACK_BYTES),
                                               ('2,2,2', 0)])
def test_weights_land_on_their_shardings(golden, mesh, stack_bytes, monkeypatch):
    """On eight devices every weight has the sharding of abstract_params and the reader's numbers, each read once.

    stack_bytes=0: stacks are filled on the devices, as large ones are.
    """
    spec, mesh = f'params::{golden}/easylm/streaming_params_fp32', make_mesh(mesh)
    config, reads, read = easylm_config(golden), [], easylm.Reader.tensor
    whole = checkpoint.open(spec).reader(config)

    def counted(*args):
        part = read(*args)
        reads.append((args[1:], part.size))
        return part

    monkeypatch.setattr(shards, 'STACK_BYTES', stack_bytes)
    monkeypatch.setattr(easylm.Reader, 'tensor', counted)
    params = checkpoint.open(spec).load_params(config, mesh)
    monkeypatch.undo()
    for leaf, target in zip(jax.tree.leaves(params), jax.tree.leaves(abstract_params(config, mesh)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (target.shape, target.dtype, target.sharding)
    assert len(reads) == len(dict(reads))
    assert sum(size for _, size in reads) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert_equal_whole_tensors(params, whole, config)


def assert_equal_whole_tensors(params, reader, config):
    for weight, leaf in zip(jax.tree.leaves(weight_specs(config)), jax.tree.leaves(params), strict=True):
        leaf = np.asarray(leaf)
        for layer in range(weight.shape[0]) if weight.stacked else [None]:
            np.testing.assert_array_equal(leaf if layer is None else leaf[layer], reader.tensor(weight.name, layer))


def random_model(tmp_path, kind):
    """(spec, sizes) of a model of random weights in the format `kind`."""
    config = LlamaConfig(64, 64, 128, 2, 8, 8 if kind in ('params', 'bf16', 'flax_params') else 4)
    rng = np.random.default_rng(0)
    shapes = {spec.name: spec.shape[spec.stacked:] for spec in jax.tree.leaves(weight_specs(config))}
    tensor = lambda name, layer: rng.standard_normal(shapes[name], np.float32)
    if kind in ('hf', 'gguf', 'gguf_quantised', 'native'):
        huggingface_writer.write(tmp_path / 'hf', tensor, config, None, None, 'fp32', 10**9)
        spec = f'hf::{tmp_path}/hf'
    if kind.startswith('gguf'):
        kinds = [GGMLQuantizationType.Q8_0] if kind == 'gguf_quantised' else None
        spec = f'gguf::{write_gguf(tmp_path / "model.gguf", tmp_path / "hf", kinds)}'
    if kind in ('params', 'bf16', 'flax_params'):
        easylm_writer.write_params(tmp_path / 'p', tensor, config, 'bf16' if kind == 'bf16' else 'fp32')
        spec = f'params::{tmp_path}/p'
    if kind == 'flax_params':
        tree = {}
        for key, value in stream(tmp_path / 'p'):
            functools.reduce(lambda node, part: node.setdefault(part, {}), key[:-1], tree)[key[-1]] = flax_array(value)
        (tmp_path / 'f').write_bytes(msgpack.packb(tree))
        spec = f'flax_params::{tmp_path}/f'
    if kind == 'native':
        read, stack = checkpoint.open(spec).reader(config).tensor, jax.tree.leaves(weight_specs(config))
        arrays = {f'params.{spec.name}': jnp.asarray(np.stack([read(spec.name, layer) for layer in range(2)]) if
                                                     spec.stacked else read(spec.name, None)) for spec in stack}
        native.save(tmp_path / 'native', 1, arrays, dict(model=config_to_dict(config)), {}, keep=1)
        spec = str(tmp_path / 'native')
    return spec, config


@pytest.mark.parametrize('mesh', ['1,1,8', '1,4,2', '2,1,4'])
@pytest.mark.parametrize('kind', ['hf', 'gguf', 'gguf_quantised', 'params', 'bf16', 'flax_params', 'native'])
def test_every_format_read_in_slices_equals_its_whole_tensors(tmp_path, kind, mesh):
    """Bit for bit; mp=8 cuts 4 key/value heads in two, fsdp=4 cuts rows of 64 in quantised blocks of 32."""
    spec, config = random_model(tmp_path, kind)
    params = checkpoint.open(spec).load_params(config, make_mesh(mesh))
    assert_equal_whole_tensors(params, checkpoint.open(spec).reader(config), config)


@pytest.mark.parametrize('kind, mesh', [('hf', '1,1,8'), ('gguf', '1,4,2'), ('params', '2,2,2'), ('native', '1,8,1')])
def test_weights_load_straight_into_the_dtype_of_a_frozen_base(tmp_path, kind, mesh, monkeypatch):
    """bf16 and int8 have the bits, dtypes and shardings of float32 weights that are frozen; as int8 each number of a
    matrix is read once, though a factor needs columns that several devices hold.
    """
    spec, config = random_model(tmp_path, kind)
    mesh, source = make_mesh(mesh), checkpoint.open(spec)
    params, reader, reads = source.load_params(config, mesh), type(source.reader(config)), []
    read = reader.tensor
    monkeypatch.setattr(reader, 'tensor', lambda *args: reads.append((part := read(*args)).size) or part)
    for dtype in ('bf16', 'int8'):
        reads.clear()
        loaded = source.load_params(config, mesh, dtype)
        assert sum(reads) == sum(spec.size for spec in jax.tree.leaves(weight_specs(config)))
        frozen = helpers.freeze(params, config, mesh, dtype)
        assert jax.tree.structure(loaded) == jax.tree.structure(frozen)
        for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(frozen), strict=True):
            assert (got.dtype, got.sharding) == (want.dtype, want.sharding)
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_a_fingerprint_is_of_the_values_alone(tmp_path, monkeypatch):
    """hf, gguf, EasyLM's and our copy of a model have the same one; each tensor counts, and a corner of it is read."""
    config = LlamaConfig(64, 64, 128, 2, 4, 4, tie_word_embeddings=False, rope_theta=10000.0)
    specs, changed = jax.tree.leaves(weight_specs(config)), set()

    def tensor(name, layer):
        rng = np.random.default_rng([ord(letter) for letter in name] + [layer or 0])
        values = rng.standard_normal(next(spec.shape[spec.stacked:] for spec in specs if spec.name == name), np.float32)
        return values.astype(ml_dtypes.bfloat16).astype(np.float32) + ((name, layer) in changed)

    def fingerprint(spec):
        return checkpoint.open(spec).fingerprint(config)

    huggingface_writer.write(tmp_path / 'hf', tensor, config, None, None, 'fp32', 10**9)
    huggingface_writer.write(tmp_path / 'bf16', tensor, config, None, None, 'bf16', 10**5)
    easylm_writer.write_params(tmp_path / 'params', tensor, config, 'bf16')
    arrays = {f'params.{spec.name}': jnp.stack([tensor(spec.name, layer) for layer in range(2)]) if spec.stacked else
              jnp.asarray(tensor(spec.name, None)) for spec in specs}
    native.save(tmp_path / 'native', 1, arrays, dict(model=config_to_dict(config)), {}, keep=1)
    write_gguf(tmp_path / 'model.gguf', tmp_path / 'hf')
    whole = fingerprint(f'hf::{tmp_path}/hf')
    for spec in (f'hf::{tmp_path}/bf16', f'params::{tmp_path}/params', str(tmp_path / 'native'),
                 f'gguf::{tmp_path}/model.gguf'):
        assert fingerprint(spec) == whole, spec
    reads, read = [], huggingface.Reader.tensor
    monkeypatch.setattr(huggingface.Reader, 'tensor', lambda *args: reads.append(read(*args).size) or read(*args))
    fingerprint(f'hf::{tmp_path}/hf')
    monkeypatch.undo()
    assert max(reads) == 16 * config.head_dim and len(reads) == len(reading.tensors_of(config))
    for number, (spec, layer) in enumerate(reading.tensors_of(config)):
        changed.clear()
        changed.add((spec.name, layer))
        huggingface_writer.write(tmp_path / f'{number}', tensor, config, None, None, 'fp32', 10**9)
        assert fingerprint(f'hf::{tmp_path}/{number}') != whole, spec.name


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_a_part_of_a_file_is_that_part(tmp_path, monkeypatch, dtype):
    """Rows, columns and corners, a block boundary within them, equal numpy's slices."""
    monkeypatch.setattr(reading, 'BLOCK_BYTES', 3 * 11 * np.dtype(dtype).itemsize)
    array = np.random.default_rng(0).standard_normal((13, 11)).astype(dtype)
    path = tmp_path / 'file'
    path.write_bytes(b'header' + array.tobytes())
    for rows in ((0, 13), (0, 4), (5, 13), (2, 3)):
        for columns in ((0, 11), (0, 5), (4, 11), (10, 11)):
            part = reading.read_part(path, dtype, array.shape, 6, (rows, columns))
            assert part.dtype == dtype and part.tobytes() == array[slice(*rows), slice(*columns)].tobytes()


def test_host_bytes_are_four_slices():
    """65b on eight devices: 4 x an eighth of the embedding; on one, 4 x the embedding and not a stack of 57 GB."""
    config = MODELS['65b']
    assert checkpoint.source.host_bytes(config, make_mesh('1,8,1')) == 4 * (32000 * 8192 * 4 // 8)
    assert checkpoint.source.host_bytes(config, make_mesh('1,1,1', jax.devices()[:1])) == 4 * (32000 * 8192 * 4)
    small = LlamaConfig(64, 64, 128, 2, 8)  # its stacks are put together on the host
    assert checkpoint.source.host_bytes(small, make_mesh('1,1,1', jax.devices()[:1])) == 4 * (2 * 64 * 128 * 4)
    base = LlamaConfig(1024, 512, 2048, 4, 8, 8)
    assert checkpoint.source.host_bytes(base, make_mesh('1,4,2'), 'int8') == 4 * (512 * 1024 * 4) + 512 * 2048


MEASURED = '''
import pathlib, sys
import jax, numpy as np
import checkpoint
from checkpoint import shards
from checkpoint.formats import easylm
from checkpoint.formats import huggingface
from model.config import LlamaConfig
from model.partition import make_mesh
from jax.sharding import NamedSharding, PartitionSpec
config, mesh = LlamaConfig(4096, 1024, 2816, 7, 8, max_sequence_length=128), make_mesh('1,1,1')
target = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(None)))
shards.STACK_BYTES = 0
shards.fill_stack(target(2, 8, 8), lambda layer, bounds: np.zeros((8, 8), np.float32))  # the compiler is in memory
status = lambda: {line.split(':')[0]: int(line.split()[1]) * 1024
                  for line in open('/proc/self/status') if line.startswith('Vm')}
pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
before = status()['VmRSS']
params = jax.block_until_ready(checkpoint.open(sys.argv[1]).load_params(config, mesh, sys.argv[2]))
peak = status()['VmHWM'] - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print('BESIDE', peak, checkpoint.source.host_bytes(config, mesh, sys.argv[2]))
'''


@pytest.mark.parametrize('kind, dtype', [('hf', 'fp32'), ('params', 'fp32'), ('hf', 'int8')])
def test_host_memory_beside_the_result_is_that_of_a_few_slices(tmp_path, kind, dtype):
    """Loading 390 MB, of which a stack is 81 MB, takes no more than host_bytes (4 x 17 MB) beside the result; as int8
    too, where the result is a quarter.

    MALLOC_MMAP_THRESHOLD_: what is freed goes back to the system and is not counted.
    """
    config = LlamaConfig(4096, 1024, 2816, 7, 8, max_sequence_length=128)
    tile = np.random.default_rng(0).random(2**22, np.float32)
    shapes = {spec.name: spec.shape[spec.stacked:] for spec in jax.tree.leaves(weight_specs(config))}
    tensor = lambda name, layer: tile[:np.prod(shapes[name])].reshape(shapes[name])
    if kind == 'hf':
        huggingface_writer.write(tmp_path / 'model', tensor, config, None, None, 'bf16', 10**12)
    else:
        easylm_writer.write_params(tmp_path / 'model', tensor, config, 'bf16')
    done = subprocess.run([sys.executable, '-c', MEASURED, f'{kind}::{tmp_path}/model', dtype], capture_output=True,
                          text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT), XLA_FLAGS='', MALLOC_MMAP_THRESHOLD_=str(2**20)))
    assert done.returncode == 0, done.stderr
    beside, bound = map(int, done.stdout.split('BESIDE ')[1].split())
    assert beside < bound, (beside, bound)


PROCESS = '''
import json, pathlib, sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import checkpoint
from checkpoint import shards
from checkpoint.formats import easylm
from model.config import LlamaConfig
from model.partition import make_mesh
from model.weights import weight_specs
from model.weights import partitions
from model.weights import by_name
from model.weights import abstract_params
golden = pathlib.Path(sys.argv[3])
config = LlamaConfig(**json.loads((golden / 'model.json').read_text()))
reads, read = [], easylm.Reader.tensor
easylm.Reader.tensor = lambda *args: reads.append(part := read(*args)) or part
shards.STACK_BYTES = 0
spec, count = f'params::{golden}/streaming_params_fp32', 0
params = checkpoint.open(spec).load_params(config, make_mesh('!1,4,2'))
read_here, whole = sum(part.size for part in reads), checkpoint.open(spec).reader(config)
for weight, leaf in zip(jax.tree.leaves(weight_specs(config)), jax.tree.leaves(params), strict=True):
    stored = lambda layer: read(whole, weight.name, layer)
    array = np.stack([stored(layer) for layer in range(weight.shape[0])]) if weight.stacked else stored(None)
    assert not leaf.is_fully_addressable
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, array[shard.index])
    count += leaf.size if leaf.is_fully_replicated else leaf.size // 2
print('READ', read_here, count)
'''


def test_two_processes_read_half_of_the_file_each(golden):
    """Each reads its own four devices' parts (half of every matrix, and the norms), and holds the file's numbers."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    env = os.environ | dict(PYTHONPATH=str(ROOT), XLA_FLAGS='--xla_force_host_platform_device_count=4')
    processes = [subprocess.Popen([sys.executable, '-c', PROCESS, address, str(i), str(golden / 'easylm')],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for i in range(2)]
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        read, expected = out.split('READ ')[1].split()
        assert read == expected


@pytest.mark.parametrize('changes, message', [
    (dict(vocab_size=641), r'transformer/wte/embedding got \[640, 64\] want \[641, 64\]'),
    (dict(num_hidden_layers=3), r'transformer/h/2/attention_norm/kernel got nothing want \[64\]'),
    (dict(num_hidden_layers=1), r'transformer/h/1/attention/wq/kernel got a tensor want none'),
    (dict(tie_word_embeddings=True), r'lm_head/kernel got a tensor want none'),
    (dict(hidden_size=128), r'and \d+ more .*load_llama_config')])
def test_a_checkpoint_of_another_shape_is_refused_before_a_tensor_is_read(golden, monkeypatch, changes, message):
    """Shapes are compared first: got and want of up to ten tensors, missing and surplus ones among them."""
    monkeypatch.setattr(easylm.Reader, 'tensor', None)
    spec = f'params::{golden}/easylm/streaming_params_fp32'
    with pytest.raises(ValueError, match=f'checkpoint of another shape.*{message}'):
        checkpoint.open(spec).load_params(easylm_config(golden, **changes), make_mesh('8,1,1'))


def test_heads_that_share_a_shape_are_told_apart(golden, monkeypatch):
    """4 heads of 16 and 2 heads of 32 have equal matrices; the configurations differ, so it is refused."""
    monkeypatch.setattr(huggingface.Reader, 'tensor', None)
    spec = f'hf::{golden}/huggingface/mha_untied'
    source = checkpoint.open(spec)
    config = dataclasses.replace(source.config, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    with pytest.raises(ValueError, match='head_dim got 16 want 32'):
        source.load_params(config, make_mesh('8,1,1'))


@pytest.mark.parametrize('spec, message', [
    ('pickle::x', 'pickle files are never read'), ('params::run/metadata.pkl', 'streaming file of the same run'),
    ('flax::x', 'did you mean flax_params::?'), ('safetensors::x', 'types: hf:: gguf:: params::'),
    ('hf::nowhere', "load_checkpoint='hf::nowhere': 'nowhere' does not exist"), ('nowhere', "'nowhere' does not exist"),
    ('', "load_checkpoint=''"), ('params::', "load_checkpoint='params::'")])
def test_specs_that_name_nothing_are_refused_with_the_remedy(spec, message):
    """One line with the flag, the value, and what to write instead."""
    with pytest.raises(Mistake) as error:
        checkpoint.open(spec)
    assert message in str(error.value) and 'load_checkpoint=' in str(error.value)


def test_a_bare_foreign_path_is_answered_with_its_type(golden):
    """Forgetting hf:: or params:: is the commonest slip: the message spells the whole value."""
    for path, kind in ((golden / 'huggingface/mha_untied', 'hf'), (golden / 'easylm/streaming_params_fp32', 'params')):
        with pytest.raises(ValueError, match=f'{kind}::{path}'):
            checkpoint.open(str(path))


def test_native_checkpoint_gives_back_all_it_was_given(golden, tmp_path):
    """Configuration, weights, tokenizer and templates of a saved model, from the directory or from the step in it."""
    config, tokenizer = easylm_config(golden), load_tokenizer(golden / 'easylm/tokenizer.model')
    params = checkpoint.open(f'params::{golden}/easylm/streaming_params_fp32').load_params(config, make_mesh('1,4,2'))
    template = PromptTemplate(labels=('bad', 'good'))
    meta, files = checkpoint.source.describe(config, tokenizer, template, True, '{{ messages }}')
    step = native.save(tmp_path, 3, by_name(params, config, 'params'), meta, files, keep=1)
    for spec in (str(tmp_path), str(step)):
        source = checkpoint.open(spec)
        loaded = source.load_params(source.config, make_mesh('2,2,2'))
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert source.config == config and source.template == template and source.step == 3
        assert source.add_bos_token is True and source.chat_template == '{{ messages }}'
        assert source.tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match='head_dim got 16 want 32'):
        source.load_params(dataclasses.replace(config, num_attention_heads=2, num_key_value_heads=2, head_dim=32),
                           make_mesh('2,2,2'))


def test_native_checkpoint_keeps_a_json_tokenizer_with_its_ids(tmp_path):
    """tokenizer.json states no bos, eos and pad: the checkpoint does, so the fingerprint survives."""
    bpe = dict(type='BPE', vocab={'a': 0, 'b': 1, 'c': 2}, merges=[])
    tokenizer = tokenizer_from_json(json.dumps(dict(version='1.0', added_tokens=[], model=bpe)), 2, 1, 0)
    meta, files = checkpoint.source.describe(LlamaConfig(), tokenizer, None)
    native.save(tmp_path, 1, {}, meta, files, keep=1)
    source = checkpoint.open(str(tmp_path))
    assert source.tokenizer.fingerprint == tokenizer.fingerprint
    assert source.template is source.chat_template is None


# ---------------------------------------------------------------- a run that writes and deletes meanwhile


def save_step(directory, step, keep_every=0):
    """Saves a checkpoint every part of which says `step`, and deletes the others: what a run does with keep=1."""
    config = LlamaConfig(8, 8, 16, 2, 2, max_sequence_length=step)
    bpe = dict(type='BPE', vocab={'a': 0, 'b': 1, f'c{step}': 2}, merges=[])
    tokenizer = tokenizer_from_json(json.dumps(dict(version='1.0', added_tokens=[], model=bpe)), 2, 1, 0)
    meta, files = checkpoint.source.describe(config, tokenizer, PromptTemplate(labels=(f'no{step}', 'yes')))
    arrays = {f'params.{spec.name}': native.Streamed(spec.shape, np.dtype(np.float32), spec.shape[0],
                                                     iter([np.full(spec.shape, step, np.float32)]))
              for spec in jax.tree.leaves(weight_specs(config))}
    native.save(directory, step, arrays, meta, files, keep=1, keep_every=keep_every)


def value(arrays):
    """The one number that all of them hold."""
    found, = {float(number) for array in arrays for number in np.unique(np.asarray(array))}
    return found


def weights(source):
    mesh = make_mesh('1,1,1', jax.devices()[:1])
    return value(jax.tree.leaves(source.load_params(source.config, mesh)))


READS = {
    'config': lambda source: source.config.max_sequence_length,
    'tokenizer': lambda source: int(list(json.loads(source.tokenizer.source_bytes)['model']['vocab'])[2][1:]),
    'template': lambda source: int(source.template.labels[0][2:]),
    'step': lambda source: source.step,
    'load_params': weights,
    'reader': lambda source: value([source.reader(source.config).tensor('layers.w_q', 1)]),
}
IN_MEMORY = ('config', 'template', 'step')  # once it is open


@pytest.mark.parametrize('reads', [[read, *READS] for read in READS] + [[*READS]], ids=lambda reads: reads[0])
def test_what_is_read_after_a_newer_step_was_saved_is_of_the_step_that_was_opened(tmp_path, reads):
    """Between open and any read the run saves step 2 and deletes 1: all is of step 1 or one line says it is gone."""
    save_step(tmp_path, 1)
    source = checkpoint.open(str(tmp_path))
    save_step(tmp_path, 2)
    for read in reads:
        if read in IN_MEMORY:
            assert READS[read](source) == 1
        else:
            with pytest.raises(Mistake, match='step_00000001 was deleted while it was read.* --checkpointer.keep'):
                READS[read](source)
    assert {name: read(checkpoint.open(str(tmp_path))) for name, read in READS.items()} == dict.fromkeys(READS, 2)


def test_the_newest_step_is_looked_for_again_when_it_goes_before_it_is_opened(tmp_path, monkeypatch):
    """Listed: 10, a milestone, and 11; then 12 is saved and 11 deleted.  12 is opened, and not the older milestone."""
    save_step(tmp_path, 10, keep_every=10)
    save_step(tmp_path, 11, keep_every=10)
    complete = native._complete

    def once(path):
        monkeypatch.setattr(native, '_complete', complete)
        save_step(tmp_path, 12, keep_every=10)
        return complete(path)

    monkeypatch.setattr(native, '_complete', once)
    source = checkpoint.open(str(tmp_path))
    assert native.steps(tmp_path) == [10, 12]
    assert {name: read(source) for name, read in READS.items()} == dict.fromkeys(READS, 12)


@pytest.mark.parametrize('read, after', [('reader', 1), ('load_params', 1), ('load_params', 2), ('load_params', 24)])
def test_arrays_that_go_after_they_were_verified_are_not_read_as_zeros(tmp_path, monkeypatch, read, after):
    """tensorstore fills a chunk that is missing with zeros unless told otherwise."""
    save_step(tmp_path, 1)
    source, verify, calls = checkpoint.open(str(tmp_path)), native._verify, []

    def then_gone(*args):
        verify(*args)
        calls.append(args)
        if len(calls) == after:  # two calls for each of the 12 arrays
            save_step(tmp_path, 2)

    monkeypatch.setattr(native, '_verify', then_gone)
    with pytest.raises(Mistake, match='step_00000001 was deleted while it was read'):
        READS[read](source)


def test_a_run_that_saves_all_the_time_is_read_step_by_step(tmp_path):
    """A thread saves one step after the other with keep=1; whatever is read meanwhile is all of one step.

    The pauses grow until every reader loses the race, so that each read is once the one that comes too late.
    """
    done, seen, gone = threading.Event(), set(), 0
    save_step(tmp_path, 1)

    def save_on():
        step = 2
        while not done.is_set():
            save_step(tmp_path, step)
            step += 1

    thread = threading.Thread(target=save_on)
    thread.start()
    try:
        while gone < 5:
            assert thread.is_alive()
            source, found = checkpoint.open(str(tmp_path)), set()
            try:
                for read in READS.values():
                    time.sleep(0.002 * gone + 0.001 * len(seen))
                    found.add(read(source))
                seen |= found
            except Mistake as error:
                assert 'was deleted while it was read' in str(error)
                gone += 1
            assert found <= {source.step}
    finally:
        done.set()
        thread.join()
    assert seen


# ---------------------------------------------------------------- slips


@pytest.mark.parametrize('file, hint', [
    ('model.gguf', 'gguf::{}/model.gguf'), ('model.safetensors', 'hf::{}'), ('config.json', 'hf::{}'),
    ('streaming_params', 'params::{}/streaming_params'),
    ('streaming_train_state', 'trainstate::{}/streaming_train_state')])
def test_a_directory_with_a_foreign_model_is_answered_with_its_spelling(tmp_path, file, hint):
    """--load_checkpoint=DIR where DIR holds a .gguf, as fetch.py leaves it: the message spells TYPE::PATH."""
    (tmp_path / file).write_bytes(b'')
    with pytest.raises(Mistake) as error:
        checkpoint.open(str(tmp_path))
    assert str(error.value).endswith(f'--load_checkpoint={hint.format(tmp_path)}')


def test_the_position_in_the_data_is_that_of_a_run(tmp_path):
    """--load_dataset_state of what convert.py wrote, or of no checkpoint: one line with that flag, not KeyError."""
    native.save(tmp_path / 'run', 1, {}, dict(flags=dict(a=1), data=dict(b=2)), {}, keep=1)
    assert checkpoint.source.read_run(str(tmp_path / 'run')) == (dict(a=1), dict(b=2))
    save_step(tmp_path / 'converted', 7)
    with pytest.raises(Mistake, match='^load_dataset_state=.*was not written by train.py.*dataset.json of the run'):
        checkpoint.source.read_run(str(tmp_path / 'converted'))
    (tmp_path / 'model.gguf').write_bytes(b'')
    with pytest.raises(Mistake, match='^load_dataset_state=.*holds no complete checkpoint'):
        checkpoint.source.read_run(str(tmp_path))
