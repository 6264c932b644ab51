"""transformers and PEFT on what we write (`make test-oracle`: needs the extra `oracle`, torch with the two)."""
import json

import numpy as np
import pytest
from helpers import logits, one_device
from test_adapter import write_adapter

import checkpoint
import convert
from data.tokenizer import load_tokenizer
from program import flags, parse

pytestmark = pytest.mark.oracle

CASES = ('gqa_tied', 'head_dim_100', 'llama31_rope', 'mha_untied')


def run(spec, kind, output, *words):
    convert.main(parse.parse(['convert.py', f'--load_checkpoint={spec}', f'--format={kind}', f'--output={output}',
                              *words], flags.CONVERT, ''))
    return output


def forward(directory, tokens):
    """(transformers' model, its float32 logits)."""
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    with torch.no_grad():
        return model, model(torch.tensor(tokens.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('shard_size', ['5GB', '300KB'])
def test_transformers_gives_the_golden_logits(golden, tmp_path, case, shard_size):
    """hf -> native -> hf, in one file or in shards: the logits of the original within 1e-6 of the largest."""
    expected = np.load(golden / f'huggingface/{case}/golden.npz')
    run(f'hf::{golden}/huggingface/{case}', 'native', tmp_path / 'native')
    directory = run(str(tmp_path / 'native'), 'hf', tmp_path / 'hf', f'--max_shard_size={shard_size}')
    model, found = forward(directory, expected['tokens'])
    assert np.abs(found - expected['logits']).max() <= 1e-6 * np.abs(expected['logits']).max()
    assert model.generation_config.eos_token_id == checkpoint.open(f'hf::{directory}').config.eos_token_id
    assert json.loads((directory / 'config.json').read_text())['head_dim'] == model.config.head_dim


def test_a_model_of_easylm_gives_easylms_logits_in_transformers(golden, tmp_path):
    """streaming_params -> hf: rotary order and head turned, transformers computes what EasyLM computed."""
    directory = run(f'params::{golden}/easylm/streaming_params_fp32', 'hf', tmp_path / 'hf',
                    f'--load_llama_config=json::{golden}/easylm/model.json')
    expected = np.load(golden / 'easylm/model.npz')
    _, found = forward(directory, expected['tokens'][:, :-1])
    assert np.abs(found - expected['logits']).max() <= 2e-5 * np.abs(expected['logits']).max()


@pytest.mark.parametrize('case', ['mha_untied', 'head_dim_100'])
def test_through_easylms_format_too(golden, tmp_path, case):
    """hf -> easylm -> hf: the golden logits."""
    expected = np.load(golden / f'huggingface/{case}/golden.npz')
    easylm = run(f'hf::{golden}/huggingface/{case}', 'easylm', tmp_path / 'easylm')
    directory = run(f'params::{easylm}/streaming_params', 'hf', tmp_path / 'hf',
                    f'--load_llama_config=json::{easylm}/llama_config.json')
    _, found = forward(directory, expected['tokens'])
    assert np.abs(found - expected['logits']).max() <= 1e-6 * np.abs(expected['logits']).max()


def test_transformers_tokenizes_as_we_do(golden, tmp_path):
    """The written tokenizer.model and tokenizer_config.json: 200 records give our ids, special tokens are the same."""
    import transformers
    directory = run(f'params::{golden}/easylm/streaming_params_fp32', 'hf', tmp_path / 'hf',
                    f'--load_llama_config=json::{golden}/easylm/model.json',
                    f'--tokenizer.vocab_file={golden}/easylm/tokenizer.model')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(directory)), load_tokenizer(directory)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_token_id, ours.eos_token_id, ours.pad_token_id)
    lines = (golden / 'easylm/train_200.jsonl').read_text().splitlines()
    texts = [text for line in lines for text in json.loads(line).values() if isinstance(text, str)]
    assert len(texts) >= 200
    for text in texts:
        assert theirs(text, add_special_tokens=False)['input_ids'] == ours.encode(text), text


def test_peft_gives_our_logits_with_our_adapter(golden, tmp_path):
    """An adapter of ours, all matrices and rsLoRA, written as PEFT's: the logits of both within 1e-5 of the largest;
    and what PEFT saves of it then is read back with the same bits.
    """
    import peft
    import torch
    import transformers
    spec = f'hf::{golden}/huggingface/gqa_tied'
    path, _ = write_adapter(tmp_path / 'run', spec, config := checkpoint.open(spec).config)
    directory = run(spec, 'peft', tmp_path / 'peft', f'--adapter={path}')
    base = transformers.AutoModelForCausalLM.from_pretrained(spec.removeprefix('hf::'), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(directory)).eval()
    tokens = np.load(golden / 'huggingface/gqa_tied/golden.npz')['tokens'].astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    source = checkpoint.open(spec, path)
    ours = np.asarray(logits(source.load_params(config, one_device()), config, tokens))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    with model.disable_adapter(), torch.no_grad():
        assert np.abs(model(torch.tensor(tokens.astype(np.int64))).logits.numpy() - theirs).max() > 0.05 * theirs.max()
    model.save_pretrained(tmp_path / 'again')
    back = checkpoint.open(spec, str(tmp_path / 'again')).adapter
    assert (back.lora.scale, back.lora.targets) == (source.adapter.lora.scale, source.adapter.lora.targets)
    for name, array in source.adapter.arrays(config).items():
        np.testing.assert_array_equal(back.arrays(config)[name], array)
