"""Reads a LLaMA and its tokenizer from one GGUF file (llama.cpp's format).  Neighbours: ../source.py, reading.py.

Format facts (the GGUF specification of ggml, and llama.cpp's convert_hf_to_gguf):
  - header: magic 'GGUF', version u32, tensor count u64, key count u64; keys (string, type u32, value); tensor infos
    (string, dimension count u32, dimensions u64, the fastest first, type u32, offset u64); then aligned data; all
    little-endian;
  - read as numpy, a linear layer is [out, in]; we keep [in, out];
  - llama.cpp writes q and k in interleaved rotary order: a Hugging Face row (head, half j, i) becomes row (head, i, j);
  - no output.weight means that the embedding is the head too;
  - Llama 3.1's frequency scaling is stored only as its result, the tensor rope_freqs.weight: refused here.
Weights are dequantised when asked for, one tensor, or part of one, at a time.
"""
import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, TokenType
from gguf.quants import dequantize

from checkpoint.formats.huggingface import refuse_placeholder
from checkpoint.formats.reading import Bounds, half_split_part, read_part, transposed
from mistake import Mistake
from model.config import LlamaConfig

# our name -> their name; {} is the layer
NAMES = {
    'embedding': 'token_embd.weight',
    'layers.attention_norm': 'blk.{}.attn_norm.weight',
    'layers.w_q': 'blk.{}.attn_q.weight',
    'layers.w_k': 'blk.{}.attn_k.weight',
    'layers.w_v': 'blk.{}.attn_v.weight',
    'layers.w_o': 'blk.{}.attn_output.weight',
    'layers.ffn_norm': 'blk.{}.ffn_norm.weight',
    'layers.w_gate': 'blk.{}.ffn_gate.weight',
    'layers.w_up': 'blk.{}.ffn_up.weight',
    'layers.w_down': 'blk.{}.ffn_down.weight',
    'final_norm': 'output_norm.weight',
    'head': 'output.weight',
}
TRANSPOSED = tuple(name for name in NAMES if name.startswith('layers.w_'))
ROTARY = ('layers.w_q', 'layers.w_k')


class Reader:
    """A GGUF file of architecture `llama`, opened for reading.

    config: LlamaConfig.  names: all tensors of the file, by the file's names.  notes: what the caller may want to log.
    Raises Mistake for a broken file and for whatever would change the mathematics and is not implemented.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        refuse_placeholder(self.path)
        header = _Header(self.path)
        self._metadata, self._tensors, self._data_start = header.metadata, header.tensors, header.data_start
        self.names, self.notes = set(self._tensors), []
        self.config = self._config()

    def source(self, name: str, layer: int | None) -> str:
        """The file's own name of our tensor, for messages and for `names`."""
        return NAMES[name].format(layer)

    def shape(self, name: str, layer: int | None) -> tuple[int, ...] | None:
        """The shape `tensor` would return, from the header alone; None if the file has no such tensor."""
        tensor = self._tensors.get(self.source(name, layer))
        if tensor is None:
            return None
        return tensor.shape[::-1] if name in TRANSPOSED else tensor.shape

    def tensor(self, name: str, layer: int | None, bounds: Bounds = None) -> np.ndarray:
        """One tensor, or the part of it within `bounds`, dequantised to float32, in our layout and rotary order."""
        source = self.source(name, layer)
        if source not in self._tensors:
            raise Mistake(f'{self.path}: no tensor {source!r}')
        if name not in TRANSPOSED:
            return self._read(source, bounds)
        read = lambda bounds: self._read(source, transposed(bounds)).T
        return half_split_part(read, bounds, self.config.head_dim) if name in ROTARY else read(bounds)

    def _read(self, source: str, bounds: Bounds) -> np.ndarray:
        """A part of a tensor as the file lays it out; of a row, whole quantised blocks are read."""
        tensor = self._tensors[source]
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        *rows, (first, last) = bounds or [(0, size) for size in tensor.shape]
        start, stop = first // block, -(-last // block)
        stored = read_part(self.path, np.uint8, tensor.byte_shape, self._data_start + tensor.offset,
                           (*rows, (start * block_bytes, stop * block_bytes)))
        try:
            array = dequantize(stored, tensor.kind).astype(np.float32, copy=False)
        except NotImplementedError:
            raise Mistake(f'{self.path}: {source!r} has type {tensor.kind.name}, which the gguf package cannot '
                             'dequantise: take a file of another quantisation, such as Q8_0') from None
        return array[..., first - start * block:last - start * block]

    def _get(self, key: str, kind: type, default=None):
        """A metadata value, checked for its type; without a default its absence is an error."""
        value = self._metadata.get(key, default)
        if type(value) is not kind:
            raise Mistake(f'{self.path}: {key}={value!r} must be {kind.__name__}')
        return value

    def _config(self) -> LlamaConfig:
        architecture = self._get('general.architecture', str)
        if architecture != 'llama':
            raise Mistake(f'{self.path}: general.architecture={architecture!r} is not supported; supported: llama')
        heads = self._get('llama.attention.head_count', int)
        hidden_size = self._get('llama.embedding_length', int)
        head_dim = self._get('llama.attention.key_length', int, hidden_size // max(heads, 1))
        for key, supported in (('llama.attention.value_length', head_dim), ('llama.rope.dimension_count', head_dim),
                               ('llama.rope.scaling.type', 'none'), ('llama.expert_count', 0)):
            if (value := self._get(key, type(supported), supported)) != supported:
                raise Mistake(f'{self.path}: {key}={value!r} is not supported; supported: {supported!r}')
        if 'rope_freqs.weight' in self._tensors:
            raise Mistake(f'{self.path}: rope_freqs.weight (frequency scaling of Llama 3.1 and later) is not '
                             'supported in GGUF files: load the model from its safetensors directory with hf::')
        embedding = self.shape('embedding', None)
        if embedding is None or len(embedding) != 2:
            raise Mistake(f'{self.path}: no matrix {NAMES["embedding"]!r}')
        for key, default in (('bos', 1), ('eos', 2)):
            if f'tokenizer.ggml.{key}_token_id' not in self._metadata:
                self.notes.append(f'{self.path}: no tokenizer.ggml.{key}_token_id; llama.cpp takes {default}')
        layers = self._get('llama.block_count', int)
        if layers > len(self._tensors):
            raise Mistake(f'{self.path}: llama.block_count={layers} but the file has {len(self._tensors)} tensors')
        values = dict(
            vocab_size=embedding[0],
            hidden_size=hidden_size,
            intermediate_size=self._get('llama.feed_forward_length', int),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self._get('llama.attention.head_count_kv', int, heads),
            head_dim=head_dim,
            max_sequence_length=self._get('llama.context_length', int),
            rms_norm_eps=self._positive('llama.attention.layer_norm_rms_epsilon'),
            rope_theta=self._positive('llama.rope.freq_base', 10000.0),
            tie_word_embeddings=NAMES['head'] not in self._tensors,
            bos_token_id=self._get('tokenizer.ggml.bos_token_id', int, 1),
            eos_token_id=self._get('tokenizer.ggml.eos_token_id', int, 2),
        )
        try:
            return LlamaConfig(**values)
        except ValueError as error:
            raise Mistake(f'{self.path}: {error}') from None

    def _positive(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is the same float32: the file holds 1e-5 as 9.999999747378752e-06."""
        value = float(str(np.float32(self._get(key, float, default))))
        if not 0 < value < math.inf:
            raise Mistake(f'{self.path}: {key}={value!r} must be a positive number')
        return value

    @property
    def add_bos_token(self) -> bool | None:
        """Whether the model was trained on texts that begin with bos; None if the file does not say."""
        return self._metadata.get('tokenizer.ggml.add_bos_token')

    @property
    def chat_template(self) -> str | None:
        """The chat template (Jinja) of the file, None without one."""
        return self._get('tokenizer.chat_template', str, '') or None

    def tokenizer_json(self) -> tuple[str, int, int, int]:
        """(tokenizer.json text of the tokenizers library, bos id, eos id, pad id) rebuilt from the metadata.

        Supported: byte-level BPE ('gpt2') with the pre-tokenizer 'smollm': digits one by one, then GPT-2's pattern.
        Raises Mistake that tells to give --tokenizer.vocab_file for all others.
        """
        remedy = 'give the tokenizer with --tokenizer.vocab_file=FILE'
        model = self._get('tokenizer.ggml.model', str, 'none')
        pre = self._get('tokenizer.ggml.pre', str, 'none')
        if (model, pre) != ('gpt2', 'smollm'):
            raise Mistake(f'{self.path}: the embedded tokenizer (tokenizer.ggml.model={model!r}, pre={pre!r}) is '
                             f"not supported (supported: 'gpt2' with pre 'smollm'): {remedy}")
        tokens = self._get('tokenizer.ggml.tokens', list)
        types = self._get('tokenizer.ggml.token_type', list)
        merges = [merge.split(' ') for merge in self._get('tokenizer.ggml.merges', list)]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if len(types) != len(tokens) or len(vocabulary) != len(tokens) or any(len(merge) != 2 for merge in merges):
            raise Mistake(f'{self.path}: the embedded tokenizer is broken (tokens, types or merges): {remedy}')
        added = [dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
                      special=kind == TokenType.CONTROL)
                 for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
                 if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
        byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)
        digits = dict(type='Digits', individual_digits=True)
        text = json.dumps(dict(
            version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=None,
            pre_tokenizer=dict(type='Sequence', pretokenizers=[digits, byte_level]),
            post_processor=None, decoder=byte_level,
            model=dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix=None,
                       end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
                       vocab=vocabulary, merges=merges)))
        eos = self.config.eos_token_id
        return text, self.config.bos_token_id, eos, self._get('tokenizer.ggml.padding_token_id', int, eos)


class _Tensor(NamedTuple):
    """A tensor's place in the file: ggml type, shape as numpy sees it, and the offset from the start of the data."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * block_bytes)


class _Header:
    """The header of a GGUF file, every count of it held against the bytes that are left before it is believed.

    (gguf.GGUFReader trusts the counts, and needs seconds for a vocabulary.)
    """

    SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
    STRING, ARRAY = 8, 9

    def __init__(self, path: Path):
        self._path, self._size = path, path.stat().st_size
        with open(path, 'rb') as self._file:
            if self._file.read(4) != b'GGUF':
                raise Mistake(f'{path} is not a GGUF file (it does not start with GGUF)')
            version, tensors, keys = self._scalar('I'), self._scalar('Q'), self._scalar('Q')
            if version not in (2, 3):
                raise Mistake(f'{path}: GGUF version {version} is not supported; supported: 2 3')
            self.metadata = dict(self._unique(keys, lambda: self._value(self._scalar('I'))))
            self.tensors = dict(self._unique(tensors, self._tensor))
            alignment = self.metadata.get('general.alignment', 32)
            if type(alignment) is not int or alignment < 1:
                raise Mistake(f'{path}: general.alignment={alignment!r} must be a positive number')
            self.data_start = -(-self._file.tell() // alignment) * alignment
        for name, tensor in self.tensors.items():
            if self.data_start + tensor.offset + math.prod(tensor.byte_shape) > self._size:
                raise Mistake(f'{path} is cut off: tensor {name!r} ends behind its {self._size} bytes')

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise Mistake(f'{self._path}: the header asks for {count} more bytes than the file has: '
                             'it is cut off or broken, download it again')
        return self._file.read(count)

    def _scalar(self, code: str):
        return struct.unpack('<' + code, self._bytes(struct.calcsize('<' + code)))[0]

    def _string(self) -> str:
        return self._bytes(self._scalar('Q')).decode('utf-8', errors='replace')

    def _value(self, kind: int):
        if kind in self.SCALARS:
            return self._scalar(self.SCALARS[kind])
        if kind == self.STRING:
            return self._string()
        if kind != self.ARRAY:
            raise Mistake(f'{self._path}: metadata type {kind} is unknown')
        item, count = self._scalar('I'), self._scalar('Q')
        if item in self.SCALARS:
            width = struct.calcsize('<' + self.SCALARS[item])
            return list(struct.unpack(f'<{count}{self.SCALARS[item]}', self._bytes(count * width)))
        if item == self.STRING:  # each string reads its own length or raises, so `count` cannot run away
            return [self._string() for _ in range(count)]
        raise Mistake(f'{self._path}: arrays of metadata type {item} are not supported')

    def _tensor(self) -> _Tensor:
        dimensions = self._scalar('I')
        if not 1 <= dimensions <= 4:
            raise Mistake(f'{self._path}: a tensor with {dimensions} dimensions is not supported')
        shape = tuple(self._scalar('Q') for _ in range(dimensions))[::-1]
        kind = self._scalar('I')
        if kind not in list(GGML_QUANT_SIZES):
            raise Mistake(f'{self._path}: tensor type {kind} is unknown to the installed gguf package')
        tensor = _Tensor(GGMLQuantizationType(kind), shape, self._scalar('Q'))
        if shape[-1] % GGML_QUANT_SIZES[tensor.kind][0]:
            raise Mistake(f'{self._path}: a {tensor.kind.name} row of {shape[-1]} is no whole number of blocks')
        return tensor

    def _unique(self, count: int, read):
        seen = set()
        for _ in range(count):
            name = self._string()
            if name in seen:
                raise Mistake(f'{self._path}: {name!r} occurs twice in the header')
            seen.add(name)
            yield name, read()
