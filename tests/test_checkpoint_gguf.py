"""GGUF files: small ones written here with the gguf package from a Hugging Face model, and a real quantised one."""
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

from checkpoint.formats import huggingface
from checkpoint.formats.gguf import NAMES, Reader
from data.tokenizer import tokenizer_from_json

WEIGHTS = [(name, layer) for name in NAMES for layer in (range(2) if name.startswith('layers.') else [None])]


def permuted(w_out_in, heads):
    """llama.cpp's conversion of a Hugging Face q or k: row (head, half, i) becomes row (head, i, half)."""
    rows, columns = w_out_in.shape
    out = np.empty_like(w_out_in)
    D = rows // heads
    for head in range(heads):
        for half in range(2):
            for i in range(D // 2):
                out[head * D + 2 * i + half] = w_out_in[head * D + half * (D // 2) + i]
    return out


def write(path, source, kinds=None, architecture='llama', tensors=None, **metadata):
    """The Hugging Face model `source` as GGUF; `kinds`: types of its matrices, in turn; more tensors and metadata."""
    reader, writer = huggingface.Reader(source), GGUFWriter(path, architecture)
    config = reader.config
    for key, value in dict(block_count=config.num_hidden_layers, context_length=config.max_sequence_length,
                           embedding_length=config.hidden_size, feed_forward_length=config.intermediate_size).items():
        writer.add_uint32(f'llama.{key}', value)
    writer.add_uint32('llama.attention.head_count', config.num_attention_heads)
    writer.add_uint32('llama.attention.head_count_kv', config.num_key_value_heads)
    writer.add_float32('llama.attention.layer_norm_rms_epsilon', config.rms_norm_eps)
    writer.add_float32('llama.rope.freq_base', config.rope_theta)
    writer.add_uint32('tokenizer.ggml.bos_token_id', config.bos_token_id)
    writer.add_uint32('tokenizer.ggml.eos_token_id', config.eos_token_id)
    for key, value in metadata.items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}[type(value)]
        add(key.replace('__', '.'), value)
    for i, (name, layer) in enumerate(weights_of(config)):
        tensor = reader.tensor(name, layer)
        tensor = np.ascontiguousarray(tensor.T if name.startswith('layers.w_') else tensor)
        if name in ('layers.w_q', 'layers.w_k'):
            tensor = permuted(tensor, tensor.shape[0] // config.head_dim)
        kind = kinds[i % len(kinds)] if kinds and tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(NAMES[name].format(layer), quantize(tensor, kind), raw_dtype=kind)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights_of(config):
    return [(name, layer) for name in NAMES
            for layer in (range(config.num_hidden_layers) if name.startswith('layers.') else [None])
            if not (name == 'head' and config.tie_word_embeddings)]


@pytest.mark.parametrize('case', ['gqa_tied', 'mha_untied', 'head_dim_100'])
def test_float32_file_equals_its_hugging_face_source(golden, tmp_path, case):
    """Rotary order undone, layers transposed, a missing head read as tied: tensors and configuration are equal."""
    source = huggingface.Reader(golden / 'huggingface' / case)
    head_dim = {} if case != 'gqa_tied' else dict(llama__rope__dimension_count=16, llama__attention__key_length=16)
    reader = Reader(write(tmp_path / 'model.gguf', source.path, **head_dim))
    for name, layer in weights_of(source.config):
        np.testing.assert_array_equal(reader.tensor(name, layer), source.tensor(name, layer), err_msg=name)
        assert reader.shape(name, layer) == source.shape(name, layer)
    assert reader.names == {reader.source(name, layer) for name, layer in weights_of(source.config)}
    stated = dict(vars(reader.config), initializer_range=source.config.initializer_range)
    assert stated == vars(source.config)


@pytest.mark.parametrize('kind, steps', [('F16', 2**11), ('Q8_0', 254), ('Q4_1', 15)])
def test_quantised_weights_are_within_half_a_step(golden, tmp_path, kind, steps):
    """|error| <= half a quantisation step of the block's range, plus the float16 rounding of scale and offset."""
    source = huggingface.Reader(golden / 'huggingface/gqa_tied')
    reader = Reader(write(tmp_path / 'model.gguf', source.path, [GGMLQuantizationType[kind]]))
    for name in ('layers.w_q', 'layers.w_down', 'embedding'):
        layer = None if name == 'embedding' else 1
        expected, tensor = source.tensor(name, layer), reader.tensor(name, layer)
        spread = 2 * np.abs(expected).max()
        assert tensor.dtype == np.float32 and tensor.shape == expected.shape
        assert 0 < np.abs(tensor - expected).max() <= spread * (0.5 / steps + 2**-10)


def test_types_may_be_mixed_and_are_read_one_by_one(golden, tmp_path):
    """A file of F32, F16, Q8_0 and Q4_1 matrices: each correlates with its source, none is read as its neighbour."""
    kinds = [GGMLQuantizationType[kind] for kind in ('Q4_1', 'F16', 'Q8_0', 'F32')]
    source = huggingface.Reader(golden / 'huggingface/gqa_tied')
    reader = Reader(write(tmp_path / 'model.gguf', source.path, kinds))
    for name, layer in weights_of(source.config):
        a, b = source.tensor(name, layer).ravel(), reader.tensor(name, layer).ravel()
        assert np.dot(a, b) > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize('key, value', [('llama__rope__scaling__type', 'linear'), ('llama__expert_count', 8),
                                        ('llama__rope__dimension_count', 8), ('llama__attention__value_length', 8)])
def test_metadata_that_change_the_mathematics_are_refused_by_key(golden, tmp_path, key, value):
    """Scaled rope, experts, partial rotary embedding and other value sizes are not guessed away."""
    path = write(tmp_path / 'model.gguf', golden / 'huggingface/gqa_tied', **{key: value})
    with pytest.raises(ValueError, match=f'{key.replace("__", ".")}={value!r} is not supported'):
        Reader(path)


def test_other_architectures_and_frequency_tables_are_refused(golden, tmp_path):
    """Only `llama` without rope_freqs.weight is read; the message says what to do instead."""
    source = golden / 'huggingface/gqa_tied'
    with pytest.raises(ValueError, match="general.architecture='qwen2' is not supported; supported: llama"):
        Reader(write(tmp_path / 'a.gguf', source, architecture='qwen2'))
    with pytest.raises(ValueError, match='rope_freqs.weight .* hf::'):
        Reader(write(tmp_path / 'b.gguf', source, tensors={'rope_freqs.weight': np.ones(8, np.float32)}))


def test_a_file_cut_anywhere_in_the_header_or_data_is_refused(golden, tmp_path):
    """Every prefix of the header, and the file without its last 100 bytes, is an error that names the file."""
    whole = write(tmp_path / 'model.gguf', golden / 'huggingface/gqa_tied').read_bytes()
    cut = tmp_path / 'cut.gguf'
    for length in [*range(0, 2000, 7), len(whole) - 100]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match='cut.gguf'):
            Reader(cut)


@pytest.mark.parametrize('header', [
    struct.pack('<QQ', 2**63, 0), struct.pack('<QQ', 0, 2**63), struct.pack('<QQQ', 0, 1, 2**62),
    struct.pack('<QQQ1sIIQ', 0, 1, 1, b'a', 9, 8, 2**60), struct.pack('<QQQ1sIIQ', 0, 1, 1, b'a', 9, 4, 2**60),
    struct.pack('<QQQ1sII', 0, 1, 1, b'a', 9, 9) + b'\1' * 64,
    struct.pack('<QQQ1sI', 1, 0, 1, b'a', 2**31) + b'\1' * 64,
    struct.pack('<QQQ1sIQQIQ', 1, 0, 1, b'a', 2, 2**40, 2**40, 0, 0)])
def test_lying_counts_are_refused_before_anything_is_allocated(tmp_path, header):
    """Counts and lengths beyond the file end in an error at once, not in memory or in an endless loop."""
    path = tmp_path / 'lie.gguf'
    path.write_bytes(b'GGUF' + struct.pack('<I', 3) + header)
    with pytest.raises(ValueError, match='lie.gguf'):
        Reader(path)


TOKENS = ['<|end|>', 'a', 'b', 'ab', '1', '2', '12', 'Ġ', 'Ġab', '<', '|', '>', 'e', 'n', 'd']
BPE = dict(tokenizer__ggml__model='gpt2', tokenizer__ggml__pre='smollm', tokenizer__ggml__tokens=TOKENS,
           tokenizer__ggml__token_type=[int(TokenType.CONTROL)] + [int(TokenType.NORMAL)] * (len(TOKENS) - 1),
           tokenizer__ggml__merges=['a b', '1 2', 'Ġ ab'])


def test_embedded_tokenizer_splits_digits_and_keeps_text_text(golden, tmp_path):
    """Digits come one by one although a merge for 12 exists; spaces join words; a control token in text stays text."""
    reader = Reader(write(tmp_path / 'model.gguf', golden / 'huggingface/gqa_tied', **BPE))
    tokenizer = tokenizer_from_json(*reader.tokenizer_json())
    ids = tokenizer.encode('ab ab12<|end|>')
    assert [TOKENS[i] for i in ids] == ['ab', 'Ġab', '1', '2', '<', '|', 'e', 'n', 'd', '|', '>']
    assert tokenizer.decode(ids) == 'ab ab12<|end|>'
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize('changes', [dict(tokenizer__ggml__model='llama'), dict(tokenizer__ggml__pre='llama-bpe'),
                                     dict(tokenizer__ggml__merges=['a b c']), dict(tokenizer__ggml__token_type=[1])])
def test_other_embedded_tokenizers_are_refused_with_the_flag_to_give(golden, tmp_path, changes):
    """Sentencepiece, other pre-tokenizers and broken tables: the weights still load, the tokenizer must be given."""
    reader = Reader(write(tmp_path / 'model.gguf', golden / 'huggingface/gqa_tied', **BPE | changes))
    with pytest.raises(ValueError, match='--tokenizer.vocab_file'):
        reader.tokenizer_json()
