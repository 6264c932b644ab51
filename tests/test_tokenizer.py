"""Claims about data/tokenizer.py.

tokenizer.model is a sentencepiece BPE of 640 pieces, tokenizer_ids.json what EasyLM of August 2023 made of some texts
with it (its decoded text has the spaces before punctuation removed).
"""
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.tokenizer import load_tokenizer, tokenizer_from_json

GOLDEN = Path(__file__).parent / 'golden' / 'easylm'


@pytest.fixture(scope='module')
def sentencepiece_tokenizer():
    return load_tokenizer(GOLDEN / 'tokenizer.model')


@pytest.fixture(scope='module')
def bpe_json():
    """A byte-level BPE tokenizer.json with the control tokens <s> (0), </s> (1) and <pad> (2)."""
    inner = Inner(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(['a fine film, and a fine cast'] * 3, trainers.BpeTrainer(
        vocab_size=280, special_tokens=['<s>', '</s>', '<pad>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return inner.to_str()


def test_ids_are_those_of_easylm(sentencepiece_tokenizer):
    """Every golden text that holds no control token has exactly EasyLM's ids."""
    cases = [case for case in json.loads((GOLDEN / 'tokenizer_ids.json').read_text()) if '<s>' not in case['text']]
    assert len(cases) == 7
    for case in cases:
        assert sentencepiece_tokenizer.encode(case['text']) == case['ids']
        cleaned = re.sub(r' ([.,?!])', r'\1', sentencepiece_tokenizer.decode(case['ids'])).lstrip()
        assert cleaned == case['decoded']


def test_control_tokens_in_text_stay_text(sentencepiece_tokenizer, bpe_json):
    """'<s> not bos </s>' holds neither bos nor eos and comes back letter by letter (EasyLM read 1 and 2 there)."""
    for tokenizer in (sentencepiece_tokenizer, tokenizer_from_json(bpe_json, 0, 1, 2)):
        ids = tokenizer.encode('<s> not bos </s><pad>')
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
        assert tokenizer.decode(ids) == '<s> not bos </s><pad>'


def test_control_tokens_of_sentencepiece_come_from_the_model(sentencepiece_tokenizer):
    """bos 1, eos 2, pad := unk = 0, 640 ids."""
    tokenizer = sentencepiece_tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.vocab_size == 640


def test_decode_drops_control_ids_and_padding_of_the_vocabulary(sentencepiece_tokenizer, bpe_json):
    """decode([bos] + ids + [eos, pad, vocab_size + 3]) == decode(ids)."""
    for tokenizer in (sentencepiece_tokenizer, tokenizer_from_json(bpe_json, 0, 1, 2)):
        around = [tokenizer.bos_token_id], [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size + 3]
        assert tokenizer.decode(around[0] + tokenizer.encode('a fine film') + around[1]) == 'a fine film'


def test_encode_adds_nothing(bpe_json):
    """A post-processor, a truncation or a padding written into tokenizer.json does not touch the ids."""
    inner = Inner.from_str(bpe_json)
    plain = inner.encode('a fine film').ids
    inner.enable_truncation(2)
    inner.enable_padding(length=12)
    spec = json.loads(inner.to_str())
    spec['post_processor'] = {'type': 'TemplateProcessing', 'pair': [], 'special_tokens': {
        '<s>': {'id': '<s>', 'ids': [0], 'tokens': ['<s>']}}, 'single': [
            {'SpecialToken': {'id': '<s>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]}
    assert tokenizer_from_json(json.dumps(spec), 0, 1, 2).encode('a fine film') == plain


@pytest.mark.parametrize('files, expected', [
    ({'tokenizer_config.json': {'bos_token': '<s>', 'eos_token': {'content': '</s>'}, 'pad_token': '<pad>'}},
     (0, 1, 2)),
    ({'tokenizer_config.json': {'bos_token': None, 'eos_token': '</s>'},
      'special_tokens_map.json': {'bos_token': '<s>'}}, (0, 1, 1)),
    ({'tokenizer_config.json': {'bos_token': '<s>', 'eos_token': '</s>'},
      'config.json': {'bos_token_id': 2}}, (0, 1, 1)),
    ({'generation_config.json': {'bos_token_id': 0, 'eos_token_id': [1, 2]}, 'config.json': {'pad_token_id': 2}},
     (0, 1, 2)),
])
def test_control_tokens_come_from_the_files_beside(bpe_json, tmp_path, files, expected):
    """tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json; without pad, pad := eos."""
    (tmp_path / 'tokenizer.json').write_text(bpe_json)
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == expected


def test_missing_control_token_is_named(bpe_json, tmp_path):
    """Without any file that names eos there is no tokenizer, and the text says where to put it."""
    (tmp_path / 'tokenizer.json').write_text(bpe_json)
    (tmp_path / 'config.json').write_text('{"bos_token_id": 0}')
    with pytest.raises(ValueError, match='names the eos token; put "eos_token"'):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize('name, content, message', [
    (None, '', 'tokenizer.vocab_file='), ('tokenizer.model', 'junk', 'no sentencepiece model'),
    ('tokenizer.model', '', 'no sentencepiece model'), ('tokenizer.json', '{"a": 1}', 'no valid tokenizer.json'),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    """A missing, damaged or empty tokenizer is one line with its path."""
    path = tmp_path / (name or 'missing.model')
    if name:
        path.write_text(content)
        (tmp_path / 'config.json').write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_token_outside_the_vocabulary_is_refused(bpe_json):
    """bos must be one of the tokens, by id and by name."""
    with pytest.raises(ValueError, match='bos has id 5000'):
        tokenizer_from_json(bpe_json, 5000, 1, 2)
    with pytest.raises(ValueError, match="'<begin>' is not in its vocabulary"):
        tokenizer_from_json(bpe_json, '<begin>', 1, 2)


def test_fingerprint_tells_tokenizers_apart(bpe_json):
    """Same text and ids, same fingerprint; another eos or another text, another one."""
    one, same = tokenizer_from_json(bpe_json, 0, 1, 2), tokenizer_from_json(bpe_json, '<s>', '</s>', '<pad>')
    assert one.fingerprint == same.fingerprint and one.source_bytes == bpe_json.encode()
    assert len({one.fingerprint, tokenizer_from_json(bpe_json, 0, 2, 2).fingerprint,
                tokenizer_from_json(bpe_json + '\n', 0, 1, 2).fingerprint}) == 3


def test_half_a_surrogate_pair_is_refused(sentencepiece_tokenizer, bpe_json):
    """JSON can hold '\\ud800' alone; no tokenizer can."""
    for tokenizer in (sentencepiece_tokenizer, tokenizer_from_json(bpe_json, 0, 1, 2)):
        with pytest.raises(ValueError, match='half a surrogate pair'):
            tokenizer.encode('a \ud800')
