"""convert.py: any source to any format, bit for bit, in the memory of a few tensors."""
import hashlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_checkpoint_gguf import write as write_gguf

import checkpoint
import convert
from checkpoint import native
from checkpoint.formats import huggingface, huggingface_writer
from checkpoint.formats.reading import tensors_of
from data.prompt import PromptTemplate
from data.tokenizer import load_tokenizer
from model.config import LlamaConfig, config_to_dict
from model.weights import weight_specs
from program import flags, parse


def run(spec, kind, output, **more):
    words = [f'--{name.replace("__", ".")}={value}' for name, value in more.items()]
    convert.main(parse.parse(['convert.py', f'--load_checkpoint={spec}', f'--format={kind}', f'--output={output}',
                              *words], flags.CONVERT, ''))
    return output


def equal_tensors(a, b):
    a, b = (load_file(path / 'model.safetensors') for path in (a, b))
    return set(a) == set(b) and all(a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
                                    for name in a)


@pytest.mark.parametrize('case', ['gqa_tied', 'head_dim_100', 'llama31_rope', 'mha_untied'])
def test_hugging_face_through_our_checkpoint_is_bit_exact(golden, tmp_path, case):
    """hf -> native -> hf: tensors and configuration, with tied heads, shared key/value heads and scaled rope."""
    source = golden / 'huggingface' / case
    ours = run(f'hf::{source}', 'native', tmp_path / 'native')
    back = run(str(ours), 'hf', tmp_path / 'hf')
    assert equal_tensors(back, source)
    assert huggingface.Reader(back).config == huggingface.Reader(source).config == checkpoint.open(str(ours)).config


@pytest.mark.parametrize('case', ['mha_untied', 'head_dim_100'])
def test_hugging_face_through_easylm_is_bit_exact(golden, tmp_path, case):
    """hf -> easylm -> hf, the sizes coming from the llama_config.json that is written beside the stream."""
    source = golden / 'huggingface' / case
    easylm = run(f'hf::{source}', 'easylm', tmp_path / 'easylm')
    back = run(f'params::{easylm}/streaming_params', 'hf', tmp_path / 'hf',
               load_llama_config=f'json::{easylm}/llama_config.json')
    assert equal_tensors(back, source) and huggingface.Reader(back).config == huggingface.Reader(source).config


def test_what_easylm_cannot_hold_is_refused_and_nothing_is_left(golden, tmp_path):
    """Tied head, shared key/value heads and another rotary base are listed in one message."""
    with pytest.raises(ValueError, match='tie_word_embeddings.*num_key_value_heads=2.*rope_theta=100000'):
        run(f'hf::{golden}/huggingface/gqa_tied', 'easylm', tmp_path / 'easylm')
    assert not list(tmp_path.iterdir())


def test_gguf_to_hugging_face(golden, tmp_path, capsys):
    """A float32 GGUF made from a Hugging Face model becomes its tensors again; that it has no tokenizer is said."""
    source = golden / 'huggingface/gqa_tied'
    path = write_gguf(tmp_path / 'model.gguf', source, llama__rope__dimension_count=16, llama__attention__key_length=16)
    assert equal_tensors(run(f'gguf::{path}', 'hf', tmp_path / 'hf'), source)
    assert 'left out: the tokenizer' in capsys.readouterr().out


@pytest.mark.parametrize('file', ['train_state_param_scale', 'train_state_accumulate'])
def test_a_train_state_gives_its_weights_at_its_step(golden, tmp_path, file):
    """trainstate:: -> native: the weights, no optimizer state, and the step that EasyLM had reached."""
    sizes = tmp_path / 'sizes.json'
    config = LlamaConfig(32, 16, 24, 2, 2)
    sizes.write_text(json.dumps(config_to_dict(config)))
    spec = f'trainstate::{golden}/easylm/{file}'
    ours = run(spec, 'native', tmp_path / 'native', load_llama_config=f'json::{sizes}')
    step = {'train_state_param_scale': 3, 'train_state_accumulate': 4}[file]
    assert native.steps(ours) == [step]
    assert all(name.startswith('params.') for name in native.Step(ours, step).arrays)
    written, read = checkpoint.open(str(ours)).reader(config), checkpoint.open(spec).reader(config)
    for weight, layer in tensors_of(config):
        np.testing.assert_array_equal(written.tensor(weight.name, layer), read.tensor(weight.name, layer))


@pytest.mark.parametrize('kind', ['native', 'hf', 'easylm'])
def test_tokenizer_template_and_bos_go_where_there_is_a_place(golden, tmp_path, capsys, kind):
    """Native keeps all three, hf the tokenizer and add_bos_token, easylm the tokenizer; what is left out is said."""
    config, tokenizer = LlamaConfig(640, 16, 24, 2, 2), load_tokenizer(golden / 'easylm/tokenizer.model')
    template = PromptTemplate(labels=('bad', 'good'))
    meta, files = checkpoint.source.describe(config, tokenizer, template, False, 'chatml')
    arrays = {f'params.{weight.name}': native.Streamed(weight.shape, np.dtype(np.float32), weight.shape[0],
                                                       iter([np.ones(weight.shape, np.float32)]))
              for weight in jax.tree.leaves(weight_specs(config))}
    native.save(tmp_path / 'run', 7, arrays, meta, files, keep=1)
    output = run(str(tmp_path / 'run'), kind, tmp_path / 'out')
    spec = {'native': f'{output}', 'hf': f'hf::{output}', 'easylm': f'params::{output}/streaming_params'}[kind]
    found = checkpoint.open(spec).tokenizer if kind != 'easylm' else load_tokenizer(output)
    assert found.fingerprint == tokenizer.fingerprint
    assert checkpoint.open(spec).template == (template if kind == 'native' else None)
    assert checkpoint.open(spec).chat_template == ('chatml' if kind == 'native' else None)
    assert checkpoint.open(spec).add_bos_token is (None if kind == 'easylm' else False)
    lines = capsys.readouterr().out.splitlines()
    assert (kind == 'native') != any('left out: the prompt template' in line for line in lines)
    assert lines[-1].startswith(f'wrote {output}; use it with --load_checkpoint={spec}')
    assert native.steps(output) == [7] if kind == 'native' else True


def test_the_printed_flags_load_what_was_written(golden, tmp_path, capsys):
    """The last line's flags, for every format, name the same weights, configuration and tokenizer."""
    source = f'params::{golden}/easylm/streaming_params_fp32'
    given = dict(load_llama_config=f'json::{golden}/easylm/model.json',
                 tokenizer__vocab_file=golden / 'easylm/tokenizer.model')
    whole = None
    for kind in ('native', 'hf', 'easylm'):
        run(source, kind, tmp_path / kind, **given)
        words = capsys.readouterr().out.splitlines()[-1].partition('use it with ')[2].split()
        values = dict(word.removeprefix('--').split('=', 1) for word in words)
        config = convert.named_config(values['load_llama_config']) if 'load_llama_config' in values else \
            checkpoint.open(values['load_checkpoint']).config
        tokenizer = load_tokenizer(values['tokenizer.vocab_file']) if 'tokenizer.vocab_file' in values else \
            checkpoint.open(values['load_checkpoint']).tokenizer
        reader = checkpoint.open(values['load_checkpoint']).reader(config)
        content = [tokenizer.fingerprint, *(reader.tensor(weight.name, layer).tobytes()
                                            for weight, layer in tensors_of(config))]
        assert content == (whole := whole or content)


@pytest.mark.parametrize('words, message', [
    ([], 'load_checkpoint is empty'), (['--load_checkpoint=x'], 'format is empty'),
    (['--load_checkpoint=x', '--format=hf'], 'output is empty'),
    (['--load_checkpoint=x', '--format=hf', '--output=.'], "output='.' exists already"),
    (['--load_checkpoint=x', '--format=native', '--output=new', '--float_dtype=bf16'], 'hold fp32'),
    (['--load_checkpoint=x', '--format=hf', '--output=new', '--max_shard_size=5'], 'max_shard_size=.5.'),
    (['--load_checkpoint=x', '--format=hf', '--output=new', '--max_shard_size=0GB'], 'max_shard_size=.0GB.'),
    (['--load_checkpoint=x', '--format=hf', '--output=new'], "'x' does not exist"),
    (['--load_checkpoint=params::EASYLM', '--format=hf', '--output=new'], 'give them as --load_llama_config'),
    (['--load_checkpoint=params::EASYLM', '--format=hf', '--output=new', '--load_llama_config=debug'],
     'checkpoint of another shape')])
def test_mistakes_name_the_flag_and_write_nothing(golden, tmp_path, monkeypatch, words, message):
    """Each is a ValueError (one line, exit code 2) before anything is written."""
    monkeypatch.chdir(tmp_path)
    words = [word.replace('EASYLM', str(golden / 'easylm/streaming_params_fp32')) for word in words]
    with pytest.raises(ValueError, match=message):
        convert.main(parse.parse(['convert.py', *words], flags.CONVERT, ''))
    assert not list(tmp_path.iterdir())


MEASURED = '''
import sys, pathlib
import convert
from checkpoint.formats import easylm_writer
from checkpoint.formats import gguf
from checkpoint.formats import huggingface_writer
from program import flags, parse
status = lambda: {line.split(':')[0]: line.split()[1] for line in open('/proc/self/status') if line.startswith('Vm')}
pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
before = int(status()['VmRSS'])
convert.main(parse.parse(sys.argv, flags.CONVERT, ''))
print('PEAK', (int(status()['VmHWM']) - before) * 1024)
'''


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """A model of 530 MB takes 5 times its largest tensor (34 MB), through every format, and comes back byte for byte.

    JAX_PLATFORMS names no platform: whatever would ask JAX for a device would fail.

    5: a tensor as read, in the other layout, and as a library's buffer; the next one, made before the last is freed;
    and one for the allocator.
    """
    config = LlamaConfig(8192, 1024, 2816, 9, 8, max_sequence_length=128)
    tile, largest = np.random.default_rng(0).random(2**23 + 1000, np.float32), 8192 * 1024 * 4
    shapes = {spec.name: spec.shape[spec.stacked:] for spec in jax.tree.leaves(weight_specs(config))}

    def tensor(name, layer):
        start = 17 * (layer or 0) + len(name)
        return tile[start:start + int(np.prod(shapes[name]))].reshape(shapes[name])

    sha = lambda path: hashlib.file_digest(open(path / 'model.safetensors', 'rb'), 'sha256').hexdigest()
    huggingface_writer.write(tmp_path / 'hf', tensor, config, None, None, 'fp32', 10**12)
    expected, size = sha(tmp_path / 'hf'), (tmp_path / 'hf/model.safetensors').stat().st_size
    assert 500e6 < size < 600e6
    peaks = {}
    for source, target in (('hf', 'easylm'), ('easylm', 'native'), ('native', 'hf')):
        spec = {'hf': f'hf::{tmp_path}/hf', 'native': f'{tmp_path}/native',
                'easylm': f'params::{tmp_path}/easylm/streaming_params'}[source]
        sizes = [f'--load_llama_config=json::{tmp_path}/easylm/llama_config.json'] if source == 'easylm' else []
        done = subprocess.run([sys.executable, '-c', MEASURED, f'--load_checkpoint={spec}', f'--format={target}',
                               f'--output={tmp_path / "new"}', *sizes], capture_output=True, text=True,
                              env=os.environ | dict(PYTHONPATH=convert.__file__.rpartition('/')[0],
                                                    JAX_PLATFORMS='none'))
        assert done.returncode == 0, done.stderr
        peaks[f'{source} -> {target}'] = int(done.stdout.split('PEAK ')[1]) / largest
        subprocess.run(['rm', '-r', tmp_path / source], check=True)
        os.rename(tmp_path / 'new', tmp_path / target)
    assert sha(tmp_path / 'hf') == expected
    subprocess.run(['rm', '-r', tmp_path / 'hf'], check=True)
    assert max(peaks.values()) < 5, peaks
