"""--adapter: ours and PEFT's beside a base, merged, converted both ways, and what does not fit refused in one line."""
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import test_convert
from helpers import PLAIN, QUICK, logits, merged, one_device
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

import checkpoint
import evaluate
import serve
from checkpoint import native
from checkpoint.source import describe
from data.prompt import PromptTemplate
from data.tokenizer import load_tokenizer
from mistake import Mistake
from model import llama, loss
from model.config import LlamaConfig
from model.lora import TARGETS, Lora, abstract_base, adapted, adapted_partitions, adapter_specs
from model.partition import BATCH, make_mesh
from model.weights import weight_specs
from program import flags, parse, settings
from program import model as program_model
from program.model import open_source

GOLDEN = Path(__file__).parent / 'golden'
LORA = Lora(rank=3, alpha=5.0, targets=TARGETS, dropout=0.1, rslora=True, seed=7)
TEMPLATE = PromptTemplate(labels=('bad', 'good'))


def base_of(golden):
    return f'hf::{golden}/huggingface/gqa_tied'


def fingerprint_of(spec):
    source = checkpoint.open(spec)
    return source.fingerprint(source.config or easylm_config())


def easylm_config():
    return LlamaConfig(**json.loads((GOLDEN / 'easylm/model.json').read_text()))


def write_adapter(directory, spec, config, lora=LORA, change=None, tokenizer=None, scale=1.0, **base):
    """An adapter of random numbers as train.py saves it, with one momentum beside; returns (directory, its tree)."""
    draw = np.random.default_rng(0)
    tree = jax.tree.map(lambda one: scale * draw.uniform(-0.1, 0.1, one.shape).astype(np.float32),
                        adapter_specs(config, lora))
    arrays = {f'params.{one.name}': jax.numpy.asarray(leaf) for one, leaf in
              zip(jax.tree.leaves(adapter_specs(config, lora)), jax.tree.leaves(tree), strict=True)}
    arrays |= {name.replace('params.', 'momentum.'): array for name, array in list(arrays.items())[:1]}
    meta, files = describe(config, tokenizer, TEMPLATE, add_bos_token=True)
    found = dict(spec=spec, fingerprint=fingerprint_of(spec)) | base
    meta |= dict(lora=dataclasses.asdict(lora) | dict(targets=list(lora.targets)), base=found)
    native.save(directory, 12, change(arrays) if change else arrays, meta, files, keep=1)
    return str(directory), tree


def tensors(source, config):
    reader = source.reader(config)
    return {(spec.name, layer): reader.tensor(spec.name, layer) for spec in jax.tree.leaves(weight_specs(config))
            for layer in (range(spec.shape[0]) if spec.stacked else [None])}


def assert_equal_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert np.asarray(got[name]).tobytes() == np.asarray(want[name]).tobytes(), name


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize('mesh', ['1,1,1', '1,4,2'])
def test_an_adapter_of_pefts_gives_the_logits_of_peft(golden, mesh):
    """Within 2e-5 of the largest logit of PEFT 0.21.2 with torch, which without the adapter are 40 % of it away."""
    mesh = make_mesh(mesh, jax.devices()[:np.prod([int(size) for size in mesh.split(',')])])
    source, expected = checkpoint.open(base_of(golden), str(golden / 'peft')), np.load(golden / 'peft/golden.npz')
    assert source.adapter.lora == Lora(2, 3.0, ('w_q', 'w_k', 'w_down'), 0.1, rslora=True)
    tokens = np.repeat(expected['tokens'].astype(np.int32), mesh.shape['fsdp'], axis=0)
    most = np.abs(expected['logits']).max()
    got = logits(source.load_params(source.config, mesh), source.config, tokens, mesh=mesh)
    assert np.abs(got - expected['logits']).max() <= 2e-5 * most
    base = logits(source.base.load_params(source.config, mesh), source.config, tokens, mesh=mesh)
    assert np.abs(base - expected['logits']).max() > 0.2 * most


def test_merged_weights_compute_what_the_unmerged_do(golden, tmp_path):
    """Logits of --adapter within 1e-5 of those of W and A, B side by side, float32; helpers.merged likewise."""
    spec, mesh = base_of(golden), one_device()
    config, tokens = checkpoint.open(spec).config, np.random.default_rng(1).integers(0, 258, (2, 24)).astype(np.int32)
    path, tree = write_adapter(tmp_path / 'run', spec, config)
    base = checkpoint.open(spec).load_params(config, mesh)

    def unmerged(params, tokens):
        return loss.logits(params, llama.hidden_states(params, tokens, None, config, PLAIN)[0])

    specs = adapted_partitions(config, LORA)
    want = jax.jit(jax.shard_map(unmerged, mesh=mesh, in_specs=(specs, BATCH),
                                 out_specs=PartitionSpec(BATCH[0], None, 'mp')),
                   compiler_options=QUICK)(adapted(base, tree, LORA), tokens)
    got = logits(checkpoint.open(spec, path).load_params(config, mesh), config, tokens)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert np.abs(logits(merged(base, tree, LORA), config, tokens) - got).max() <= 1e-5 * np.abs(want).max()
    assert np.abs(logits(base, config, tokens) - got).max() > 0.05 * np.abs(want).max()


def test_merged_weights_load_on_any_mesh_and_in_any_dtype(golden, tmp_path):
    """Slices of eight devices are those of one, and bf16 and int8 have the shardings of a frozen base."""
    spec, mesh = base_of(golden), make_mesh('1,4,2')
    path, _ = write_adapter(tmp_path / 'run', spec, config := checkpoint.open(spec).config)
    source = checkpoint.open(spec, path)
    whole, parts = (source.load_params(config, mesh) for mesh in (one_device(), mesh))
    for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    for dtype in ('bf16', 'int8'):
        for got, want in zip(jax.tree.leaves(source.load_params(config, mesh, dtype)),
                             jax.tree.leaves(abstract_base(config, mesh, dtype)), strict=True):
            assert (got.dtype, got.sharding) == (want.dtype, want.sharding)


# ---------------------------------------------------------------- files


def test_an_adapter_says_what_belongs_to_it(golden, tmp_path):
    """Template, bos, tokenizer, step and the place of a calibration are the adapter's; of PEFT's the base's remain."""
    spec = f'params::{golden}/easylm/streaming_params_fp32'
    config = easylm_config()
    tokenizer = load_tokenizer(golden / 'easylm/tokenizer.model')
    path, _ = write_adapter(tmp_path / 'run', spec, config, tokenizer=tokenizer)
    source = checkpoint.open(spec, path)
    assert (source.template, source.add_bos_token, source.step) == (TEMPLATE, True, 12)
    assert source.tokenizer.fingerprint == tokenizer.fingerprint and source.config is None
    assert source.native.path == native.step_directory(path, 12) and (source.spec, source.kind) == (spec, 'params')
    theirs = checkpoint.open(base_of(golden), str(golden / 'peft'))
    assert theirs.native is theirs.template is theirs.tokenizer is theirs.add_bos_token is None and theirs.step == 0


@pytest.mark.parametrize('targets', [TARGETS, ('w_v', 'w_o')])
def test_ours_through_peft_and_back_is_bit_exact(golden, tmp_path, targets):
    """native -> peft -> native: the arrays, scale and targets; the PEFT file has its names and [out, in] shapes."""
    spec, lora = base_of(golden), dataclasses.replace(LORA, targets=targets)
    path, _ = write_adapter(tmp_path / 'run', spec, config := checkpoint.open(spec).config, lora)
    theirs = test_convert.run(spec, 'peft', tmp_path / 'peft', adapter=path)
    back = test_convert.run(spec, 'native', tmp_path / 'back', adapter=theirs)
    first, last = (checkpoint.open(spec, str(directory)).adapter for directory in (path, back))
    assert last.lora == dataclasses.replace(lora, seed=0)
    assert (last.base, last.fingerprint) == (first.base, first.fingerprint)
    assert_equal_bits(last.arrays(config), first.arrays(config))
    stored = load_file(theirs / 'adapter_model.safetensors')
    assert len(stored) == 3 * 2 * len(targets)
    name = 'base_model.model.model.layers.2.self_attn.v_proj.lora_{}.weight'
    assert (stored[name.format('A')].shape, stored[name.format('B')].shape) == ((3, 96), (32, 3))
    said = json.loads((theirs / 'adapter_config.json').read_text())
    assert (said['r'], said['lora_alpha'], said['use_rslora'], said['peft_type']) == (3, 5, True, 'LORA')


@pytest.mark.parametrize('kind', ['native', 'hf'])
def test_a_merge_on_disk_has_the_bits_of_a_merge_at_load(golden, tmp_path, kind):
    """convert.py --merge=True: each tensor of the result is that of base + adapter; ours keeps template and step."""
    spec = base_of(golden)
    path, _ = write_adapter(tmp_path / 'run', spec, config := checkpoint.open(spec).config)
    output = test_convert.run(spec, kind, tmp_path / 'out', adapter=path, merge=True)
    source = checkpoint.open(f'hf::{output}' if kind == 'hf' else str(output))
    want = tensors(checkpoint.open(spec, path), config)
    assert_equal_bits(tensors(source, config), want)
    changed = {name for name, array in tensors(checkpoint.open(spec), config).items()
               if not np.array_equal(array, want[name])}
    assert changed == {(f'layers.{target}', layer) for target in TARGETS for layer in range(3)}
    if kind == 'native':
        assert (source.template, source.step, source.adapter) == (TEMPLATE, 12, None)


# ---------------------------------------------------------------- the programs


def test_evaluate_counts_the_same_with_an_adapter_and_with_merged_weights(golden, tmp_path, monkeypatch):
    """All numbers of evaluation.json; it names the adapter, and without it the scores are others.  (The three engines
    share their programs.)
    """
    programs, compile_ = {}, jax.stages.Lowered.compile

    def compiled(lowered):
        text = lowered.as_text()
        programs[text] = programs.get(text) or compile_(lowered, compiler_options=QUICK)
        return programs[text]

    monkeypatch.setattr(jax.stages.Lowered, 'compile', compiled)
    monkeypatch.setattr(program_model, 'keep_compilations', lambda: None)
    monkeypatch.setattr(program_model, 'make_mesh', lambda mesh_dim: one_device())
    spec, sizes = f'params::{golden}/easylm/streaming_params_fp32', f'json::{golden}/easylm/model.json'
    config = easylm_config()
    path, _ = write_adapter(tmp_path / 'run', spec, config, Lora(4, 8.0),
                            tokenizer=load_tokenizer(golden / 'easylm/tokenizer.model'), scale=3.0)
    whole = test_convert.run(spec, 'native', tmp_path / 'merged', adapter=path, merge=True, load_llama_config=sizes)
    reviews = tmp_path / 'reviews.jsonl'
    reviews.write_text(''.join(json.dumps(dict(text=text, label=i % 2)) + '\n' for i, text in
                               enumerate(('a warm film', 'a waste', 'falls apart', 'sparkles'))))
    found = []
    base = [f'--load_checkpoint={spec}', f'--load_llama_config={sizes}']
    for i, words in enumerate(([*base, f'--adapter={path}'], [f'--load_checkpoint={whole}'],
                               [*base, f'--tokenizer.vocab_file={golden}/easylm/tokenizer.model'])):
        evaluate.main(parse.parse(
            ['evaluate.py', *words, f'--input={reviews}', f'--output_dir={tmp_path}/{i}', '--batch_size=4',
             '--samples=0', '--labels=bad,good'], flags.EVALUATE, ''))
        found.append(json.loads((tmp_path / f'{i}/evaluation.json').read_text()))
    counts = [{name: value for name, value in one['results']['loglikelihood'].items()
               if name not in ('seconds', 'reviews_per_second', 'calibration')} for one in found]
    assert counts[0] == counts[1] != counts[2] and found[0]['reviews'] == found[1]['reviews']
    scores = [[row['loglikelihood']['log_likelihood'] for row in one['reviews']] for one in found]
    assert scores[0] == scores[1] and np.abs(np.subtract(scores[0], scores[2])).min() > 1e-3
    assert found[1]['adapter'] is found[2]['adapter'] is None
    assert found[0]['adapter'] == dict(path=path, format='native', step=12, base=spec, rank=4, alpha=8.0,
                                       targets=['w_q', 'w_v'], rslora=False)


def test_what_is_served_is_named(golden, tmp_path):
    """/info has the adapter, None without one; --lm_server.model_name's default is the adapter's directory."""
    spec, names = base_of(golden), ['serve.py', f'--load_checkpoint={base_of(golden)}']
    told = []
    for words in (names, [*names, f'--adapter={golden}/peft']):
        config = parse.parse(words, flags.SERVE, '')
        source = open_source(settings.read_load(config))
        told.append((serve.options_of(config).model_name, serve.info_of(serve.Model(
            None, source.config, PLAIN, None, source, True))['adapter']))
    assert told[0] == ('gqa_tied', None) and told[1][0] == 'peft'
    assert told[1][1] == dict(path=f'{golden}/peft', format='peft', step=0, base=spec, rank=2, alpha=3.0,
                              targets=['w_q', 'w_k', 'w_down'], rslora=True)


def served(given, spec, *more, bos=True):
    """What serve.py opens of --lm_server.adapters, on a model whose tokenizer is EasyLM's."""
    config = parse.parse(['serve.py', f'--load_checkpoint={spec}', f'--lm_server.adapters={given}', *more],
                         flags.SERVE, '')
    load = settings.read_load(config)
    source = checkpoint.open(spec)
    model = serve.Model(None, source.config, PLAIN, TOKENIZER, source, bos)
    return serve.open_adapters(config.lm_server.adapters, load, model, serve.options_of(config))


TOKENIZER = load_tokenizer(GOLDEN / 'easylm/tokenizer.model')


def test_adapters_are_served_by_name_with_their_own_templates(golden, tmp_path):
    """Of both formats; what is loaded are A and B alone."""
    spec = base_of(golden)
    config = checkpoint.open(spec).config
    path, tree = write_adapter(tmp_path / 'run', spec, config, tokenizer=TOKENIZER)
    found = served(f'ours={path}, theirs={golden}/peft', spec)
    assert list(found) == ['ours', 'theirs'] and found['ours'].template == TEMPLATE
    assert found['theirs'].template is None
    jax.tree.map(np.testing.assert_array_equal, found['ours'].load_adapter(config), tree)
    assert found['theirs'].load_adapter(config).layers.w_down.a.shape[2] == 2


@pytest.mark.parametrize('given, more, message', [
    ('ours', (), "'ours' must be NAME=DIR"), ('gqa_tied={path}', (), 'with a name that is not taken'),
    ('a={path},a={path}', (), 'with a name that is not taken'), ('a=nowhere', (), "adapter='nowhere' does not exist"),
    ('a={path}', ('--adapter={path}',), 'an adapter belongs to the weights as they were'),
    ('a={path}', (), 'was trained with add_bos_token=True, and the model')])
def test_adapters_that_cannot_be_served_are_refused(golden, tmp_path, given, more, message):
    spec = base_of(golden)
    path, _ = write_adapter(tmp_path / 'run', spec, checkpoint.open(spec).config, tokenizer=TOKENIZER)
    with pytest.raises(Mistake, match=message):
        served(given.format(path=path), spec, *(word.format(path=path) for word in more), bos='bos' not in message)


# ---------------------------------------------------------------- mistakes


def without(name):
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize('make, message', [
    (lambda path, spec, config: write_adapter(path, spec, config, fingerprint='0' * 64), 'was trained beside .*gqa_tied'
     '.* other weights: name that base'),
    (lambda path, spec, config: write_adapter(path, spec, config, change=without('params.layers.w_o.b')),
     r'another shape.*params.layers.w_o.b got nothing want \[3, 3, 96\]'),
    (lambda path, spec, config: write_adapter(path, spec, config, change=lambda arrays: arrays | {
        'params.layers.w_x.b': arrays['params.layers.w_q.b']}), 'params.layers.w_x.b got an array want none'),
    (lambda path, spec, config: write_adapter(path, spec, dataclasses.replace(config, intermediate_size=120)),
     r'w_gate.b got \[3, 3, 120\] want \[3, 3, 128\]')])
def test_an_adapter_of_ours_that_does_not_fit_is_refused(golden, tmp_path, make, message):
    """Another base, another shape, a missing and a surplus array, by name, at loading and converting alike."""
    spec = base_of(golden)
    path, _ = make(tmp_path / 'run', spec, config := checkpoint.open(spec).config)
    with pytest.raises(Mistake, match=message):
        checkpoint.open(spec, path).load_params(config, one_device())
    with pytest.raises(Mistake, match=message):
        test_convert.run(spec, 'peft', tmp_path / 'peft', adapter=path)
    assert not (tmp_path / 'peft').exists()


@pytest.mark.parametrize('change, message', [
    (dict(bias='all'), "bias='all' is not supported; supported: 'none'"),
    (dict(use_dora=True), 'use_dora=True is not supported; supported: to leave it out'),
    (dict(modules_to_save=['lm_head']), 'modules_to_save'), (dict(rank_pattern={'q_proj': 4}), 'rank_pattern'),
    (dict(alpha_pattern={'q_proj': 4}), 'alpha_pattern'), (dict(peft_type='LOHA'), "peft_type='LOHA'"),
    (dict(init_lora_weights='pissa'), "init_lora_weights='pissa'"), (dict(some_new_trick=1), 'some_new_trick=1'),
    (dict(peft_type=None), 'peft_type=None'), (dict(r='two'), "r='two'"), (dict(r=3), 'another shape'),
    ('base_model.model.model.embed_tokens.lora_embedding_A', 'embed_tokens.* adapts no matrix .* q_proj'),
    ('base_model.model.lm_head.lora_A.weight', 'lm_head.* adapts no matrix'),
    ('base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight', 'layers.9.* got an array want none'),
    (None, 'layers.1.mlp.down_proj.lora_B.weight got nothing')])
def test_an_adapter_of_pefts_that_we_cannot_compute_is_refused(golden, tmp_path, change, message):
    """Keys that change the mathematics, known or not, matrices we do not adapt, surplus and missing layers."""
    path = tmp_path / 'peft'
    shutil.copytree(golden / 'peft', path)
    said, stored = json.loads((path / 'adapter_config.json').read_text()), load_file(path / 'adapter_model.safetensors')
    if isinstance(change, dict):
        (path / 'adapter_config.json').write_text(json.dumps(said | change))
    else:
        stored = stored | {change: np.zeros((2, 96), np.float32)} if change else {
            name: array for name, array in stored.items() if name != 'base_model.model.model.layers.1.mlp.down_proj.'
            'lora_B.weight'}
        save_file(stored, path / 'adapter_model.safetensors')
    with pytest.raises(Mistake, match=message) as error:
        source = checkpoint.open(base_of(golden), str(path))
        source.reader(source.config)
    assert '\n' not in str(error.value)


def test_an_adapter_alone_is_no_checkpoint(golden, tmp_path):
    """--load_checkpoint=DIR of one spells both flags; --adapter of a model, of nothing, or without base says so."""
    spec = base_of(golden)
    path, _ = write_adapter(tmp_path / 'run', spec, config := checkpoint.open(spec).config)
    for directory in (path, f'{path}/step_00000012'):
        with pytest.raises(Mistake, match=f'--load_checkpoint={spec} --adapter={directory}'):
            checkpoint.open(directory)
    for theirs in (f'{golden}/peft', f'hf::{golden}/peft'):
        with pytest.raises(Mistake, match=f'--load_checkpoint=BASE --adapter={golden}/peft'):
            checkpoint.open(theirs)
    native.save(tmp_path / 'whole', 1, {}, describe(config, None, None)[0], {}, keep=1)
    for wrong, message in ((str(tmp_path / 'whole'), 'no adapter: --load_checkpoint='), ('nowhere', 'does not exist'),
                           (spec.removeprefix('hf::'), 'no complete checkpoint')):
        with pytest.raises(Mistake, match=f'adapter=.*{message}'):
            checkpoint.open(spec, wrong)
    load = settings.read_load(parse.parse(['serve.py', f'--adapter={path}'], flags.SERVE, ''))
    with pytest.raises(Mistake, match='nothing without its base: give it as --load_checkpoint'):
        open_source(load)


@pytest.mark.parametrize('kind, words, message', [
    ('hf', dict(adapter='x'), 'add --merge=True'), ('hf', dict(merge=True), 'merge=True needs an adapter'),
    ('peft', dict(), 'give --adapter=DIR'), ('peft', dict(adapter='x', merge=True), 'no --merge')])
def test_convert_refuses_what_cannot_be_meant(golden, tmp_path, kind, words, message):
    """Before anything is read."""
    with pytest.raises(Mistake, match=message):
        test_convert.run(base_of(golden), kind, tmp_path / 'out', **words)
