"""TYPE::PATH: every format becomes the same sharded weights, what does not fit is listed before anything is read."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from checkpoint import easylm, huggingface, load, native
from data.prompt import PromptTemplate
from data.tokenizer import load_tokenizer, tokenizer_from_json
from model.config import Compute, LlamaConfig
from model.llama import abstract_params, hidden_states, partitions
from model.loss import logits
from model.partition import make_mesh


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
    config, expected = load.read_config(spec), np.load(golden / f'huggingface/{case}/golden.npz')
    got = model_logits(load.load_params(spec, config, mesh), config, mesh, expected['tokens'].astype(np.int32))
    assert np.abs(got - expected['logits']).max() <= 2e-5 * np.abs(expected['logits']).max()


def easylm_config(golden, **changes):
    return LlamaConfig(**json.loads((golden / 'easylm/model.json').read_text()) | changes)


def test_easylm_models_give_the_logits_of_easylm(golden):
    """Within 2e-5 of the largest logit of EasyLM (August 2023), both in float32, on a mesh of two heads a device."""
    spec, mesh, config = f'params::{golden}/easylm/streaming_params_fp32', make_mesh('1,1,2', jax.devices()[:2]), None
    assert load.read_config(spec) is None and load.read_tokenizer(spec) is None and load.read_template(spec) is None
    config, expected = easylm_config(golden), np.load(golden / 'easylm/model.npz')
    got = model_logits(load.load_params(spec, config, mesh), config, mesh, expected['tokens'][:, :-1].astype(np.int32))
    assert np.abs(got - expected['logits']).max() <= 2e-5 * np.abs(expected['logits']).max()


@pytest.mark.parametrize('mesh', ['1,4,2', '8,1,1'])
def test_weights_land_on_their_shardings(golden, mesh, monkeypatch):
    """On eight devices every weight has the sharding of abstract_params and the reader's numbers, each read once."""
    spec, mesh = f'params::{golden}/easylm/streaming_params_fp32', make_mesh(mesh)
    config, reads, read = easylm_config(golden), [], easylm.Reader.tensor
    reader = easylm.Reader(golden / 'easylm/streaming_params_fp32', 'params', 16)
    monkeypatch.setattr(easylm.Reader, 'tensor', lambda *args: reads.append(args[1:]) or read(*args))
    params = load.load_params(spec, config, mesh)
    for leaf, target in zip(jax.tree.leaves(params), jax.tree.leaves(abstract_params(config, mesh)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (target.shape, target.dtype, target.sharding)
    assert len(reads) == len(set(reads)) == 21
    for layer in range(2):
        np.testing.assert_array_equal(params.layers.w_down[layer], read(reader, 'layers.w_down', layer))
    np.testing.assert_array_equal(params.head, read(reader, 'head', None))


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
        load.load_params(spec, easylm_config(golden, **changes), make_mesh('8,1,1'))


def test_heads_that_share_a_shape_are_told_apart(golden, monkeypatch):
    """4 heads of 16 and 2 heads of 32 have equal matrices; the configurations differ, so it is refused."""
    monkeypatch.setattr(huggingface.Reader, 'tensor', None)
    spec = f'hf::{golden}/huggingface/mha_untied'
    config = dataclasses.replace(load.read_config(spec), num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    with pytest.raises(ValueError, match='head_dim got 16 want 32'):
        load.load_params(spec, config, make_mesh('8,1,1'))


@pytest.mark.parametrize('spec, message', [
    ('pickle::x', 'pickle files are never read'), ('params::run/metadata.pkl', 'streaming file of the same run'),
    ('flax::x', 'did you mean flax_params::?'), ('safetensors::x', 'types: hf:: gguf:: params::'),
    ('hf::nowhere', "load_checkpoint='hf::nowhere': 'nowhere' does not exist"), ('nowhere', "'nowhere' does not exist"),
    ('', "load_checkpoint=''"), ('params::', "load_checkpoint='params::'")])
def test_specs_that_name_nothing_are_refused_with_the_remedy(spec, message):
    """One line with the flag, the value, and what to write instead."""
    for read in (load.read_config, load.read_tokenizer, load.read_template):
        with pytest.raises(ValueError) as error:
            read(spec)
        assert message in str(error.value) and 'load_checkpoint=' in str(error.value)


def test_a_bare_foreign_path_is_answered_with_its_type(golden):
    """Forgetting hf:: or params:: is the commonest slip: the message spells the whole value."""
    for path, kind in ((golden / 'huggingface/mha_untied', 'hf'), (golden / 'easylm/streaming_params_fp32', 'params')):
        with pytest.raises(ValueError, match=f'{kind}::{path}'):
            load.read_config(str(path))


def test_native_checkpoint_gives_back_all_it_was_given(golden, tmp_path):
    """Configuration, weights, tokenizer and template of a saved model, from the directory or from the step in it."""
    config, tokenizer = easylm_config(golden), load_tokenizer(golden / 'easylm/tokenizer.model')
    params = load.load_params(f'params::{golden}/easylm/streaming_params_fp32', config, make_mesh('1,4,2'))
    template = PromptTemplate(labels=('bad', 'good'))
    meta, files = load.describe(config, tokenizer, template)
    step = native.save(tmp_path, 3, load.by_name(params, config, 'params'), meta, files, keep=1)
    for spec in (str(tmp_path), str(step)):
        loaded = load.load_params(spec, load.read_config(spec), make_mesh('2,2,2'))
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert load.read_config(spec) == config and load.read_template(spec) == template
        assert load.read_tokenizer(spec).fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match='head_dim got 16 want 32'):
        load.load_params(str(tmp_path), dataclasses.replace(config, num_attention_heads=2, num_key_value_heads=2,
                                                            head_dim=32), make_mesh('2,2,2'))


def test_native_checkpoint_keeps_a_json_tokenizer_with_its_ids(tmp_path):
    """tokenizer.json states no bos, eos and pad: the checkpoint does, so the fingerprint survives."""
    bpe = dict(type='BPE', vocab={'a': 0, 'b': 1, 'c': 2}, merges=[])
    tokenizer = tokenizer_from_json(json.dumps(dict(version='1.0', added_tokens=[], model=bpe)), 2, 1, 0)
    meta, files = load.describe(LlamaConfig(), tokenizer, None)
    native.save(tmp_path, 1, {}, meta, files, keep=1)
    assert load.read_tokenizer(str(tmp_path)).fingerprint == tokenizer.fingerprint
    assert load.read_template(str(tmp_path)) is None
