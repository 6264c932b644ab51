"""Reads a LLaMA from a Hugging Face directory: config.json and safetensors files.  Next: huggingface_writer.py.

Format facts (transformers' LlamaConfig and modeling_llama; the safetensors format description):
  - a linear layer is stored [out, in], we keep [in, out]; embed_tokens and lm_head are [V, M] as ours;
  - rotary order is half-split, as ours;
  - config.json of transformers 5 has `rope_parameters`, that of transformers 4 has `rope_theta` and `rope_scaling`;
  - a large model is cut into shards, and model.safetensors.index.json says which tensor lies in which file.
Everything that would change the mathematics and is not implemented is refused by name.  The safetensors library checks
a file; its data are then read by ourselves (reading.py), so that memory holds what is asked for and nothing beside it.
"""
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoint.formats.reading import Bounds, read_part, transposed
from data.tokenizer import read_object
from mistake import Mistake
from model.config import LlamaConfig, RopeScaling

# our name -> (their name, transposed); {} is the layer
NAMES = {
    'embedding': ('model.embed_tokens.weight', False),
    'layers.attention_norm': ('model.layers.{}.input_layernorm.weight', False),
    'layers.w_q': ('model.layers.{}.self_attn.q_proj.weight', True),
    'layers.w_k': ('model.layers.{}.self_attn.k_proj.weight', True),
    'layers.w_v': ('model.layers.{}.self_attn.v_proj.weight', True),
    'layers.w_o': ('model.layers.{}.self_attn.o_proj.weight', True),
    'layers.ffn_norm': ('model.layers.{}.post_attention_layernorm.weight', False),
    'layers.w_gate': ('model.layers.{}.mlp.gate_proj.weight', True),
    'layers.w_up': ('model.layers.{}.mlp.up_proj.weight', True),
    'layers.w_down': ('model.layers.{}.mlp.down_proj.weight', True),
    'final_norm': ('model.norm.weight', False),
    'head': ('lm_head.weight', False),
}
LARGEST_SIZE = 2**24  # of any one dimension: a config.json beyond it is broken, not large
DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}


class Reader:
    """A directory opened for reading; tensors, or parts of them, are read from disk when asked for.

    config: LlamaConfig.  notes: for the log (several eos ids).  names: all tensors, by the file's names.
    Raises Mistake for a directory without safetensors, broken files and unsupported architectures.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise Mistake(f'{path!r} is not a directory: hf:: takes one with config.json and *.safetensors')
        self.config, self.notes = read_config(self.path / 'config.json')
        self._tensors = {}  # as tensors_in
        for file in _weight_files(self.path):
            self._open(file)
        self.names = {name for name in self._tensors if not name.endswith('rotary_emb.inv_freq')}
        if self.config.tie_word_embeddings:
            self.names.discard('lm_head.weight')  # a copy of the embedding, which transformers ignores too

    def _open(self, file: str) -> None:
        for name, found in tensors_in(self.path / file).items():
            if name in self._tensors:
                raise Mistake(f'{self.path / file}: tensor {name!r} lies in {self._tensors[name][0].name!r} too')
            self._tensors[name] = found

    def source(self, name: str, layer: int | None) -> str:
        """The file's own name of our tensor, for messages and for `names`."""
        return NAMES[name][0].format(layer)

    def shape(self, name: str, layer: int | None) -> tuple[int, ...] | None:
        """The shape `tensor` would return, from the header alone; None if the directory has no such tensor."""
        source = self.source(name, layer)
        if source not in self._tensors:
            return None
        shape = self._tensors[source][2]
        return shape[::-1] if NAMES[name][1] else shape

    def tensor(self, name: str, layer: int | None, bounds: Bounds = None) -> np.ndarray:
        """One tensor, or the part of it within `bounds`, float32, in our layout.

        Raises Mistake naming a missing tensor or an unsupported dtype.
        """
        source, is_transposed = self.source(name, layer), NAMES[name][1]
        if source not in self._tensors:
            raise Mistake(f'{self.path}: no tensor {source!r}')
        file, dtype, shape, offset = self._tensors[source]
        if dtype not in DTYPES:
            raise Mistake(f'{file}: {source!r} has dtype {dtype}; '
                             f'supported: {" ".join(DTYPES)} (quantised models are read from gguf:: files)')
        bounds = transposed(bounds) if is_transposed else bounds
        array = read_part(file, DTYPES[dtype], shape, offset, bounds).astype(np.float32, copy=False)
        return array.T if is_transposed else array


def tensors_in(path: Path) -> dict[str, tuple[Path, str, tuple[int, ...], int]]:
    """{name: (file, dtype as the format names it, shape, offset of the data)} of a safetensors file."""
    refuse_placeholder(path)
    try:
        safe_open(path, framework='np')
    except SafetensorError as error:
        raise Mistake(f'{path} is not a whole safetensors file ({error}): download it again') from None
    with open(path, 'rb') as opened:
        length = int.from_bytes(opened.read(8), 'little')
        header = json.loads(opened.read(length))
    header.pop('__metadata__', None)
    return {name: (path, entry['dtype'], tuple(entry['shape']), 8 + length + entry['data_offsets'][0])
            for name, entry in header.items()}


def refuse_placeholder(path: Path) -> None:
    """Raises Mistake if `path` is missing, a dangling link, or a git-lfs pointer instead of the data."""
    if path.is_symlink() and not path.exists():
        raise Mistake(f'{path} is a dangling link to {path.readlink()}: download the model again')
    if not path.is_file():
        raise Mistake(f'{path} does not exist')
    with open(path, 'rb') as file:
        if file.read(64).startswith(b'version https://git-lfs'):
            raise Mistake(f'{path} is a git-lfs pointer, not the weights: run `git lfs pull` in that directory')


def _weight_files(path: Path) -> list[str]:
    """The names of the safetensors files, checked against the index if there is one."""
    index, single = path / 'model.safetensors.index.json', path / 'model.safetensors'
    if single.exists() or single.is_symlink():
        return [single.name]
    if index.exists() or index.is_symlink():
        refuse_placeholder(index)
        weight_map = read_object(index).get('weight_map')
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise Mistake(f'{index}: weight_map must map tensor names to file names')
        for file in set(weight_map.values()):
            if file != Path(file).name or file in ('', '.', '..') or '\\' in file:
                raise Mistake(f'{index}: shard {file!r} must be a plain file name inside the directory')
        return sorted(set(weight_map.values()))
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in ('.bin', '.pt', '.pth', '.pkl', '.ckpt'))
    if pickles:
        raise Mistake(f'{path} holds only pickle files ({pickles[0]}), which are never read (unpickling runs code): '
                         'take the safetensors version, or where the file is trusted convert it with transformers: '
                         'AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)')
    raise Mistake(f'{path} holds no weights: expected model.safetensors or model.safetensors.index.json')


def read_config(path: Path) -> tuple[LlamaConfig, list[str]]:
    """config.json as a LlamaConfig, and notes.  Keys that are absent have the defaults of transformers' LlamaConfig.

    Raises Mistake that names the file, the key and the supported values.
    """
    refuse_placeholder(path)
    values = read_object(path)
    supported = {'model_type': 'llama', 'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False,
                 'quantization_config': None, 'partial_rotary_factor': 1.0, 'auto_map': None}
    for key, value in supported.items():
        given = values.get(key, None if key == 'model_type' else value)
        if given != value:
            raise Mistake(f'{path}: {key}={given!r} is not supported; supported: {value!r}')
    values = {key: value for key, value in values.items() if value is not None}  # null is as good as absent
    theta, scaling = _rope(path, values)
    tied, notes = values.get('tie_word_embeddings', False), []
    if type(tied) is not bool:
        raise Mistake(f'{path}: tie_word_embeddings={tied!r} must be true or false')
    fields = dict(
        vocab_size=_size(path, values, 'vocab_size'),
        hidden_size=_size(path, values, 'hidden_size'),
        intermediate_size=_size(path, values, 'intermediate_size'),
        num_hidden_layers=_size(path, values, 'num_hidden_layers', largest=10_000),
        num_attention_heads=_size(path, values, 'num_attention_heads'),
        num_key_value_heads=_size(path, values, 'num_key_value_heads', absent=0),
        head_dim=_size(path, values, 'head_dim', absent=0),
        max_sequence_length=_size(path, values, 'max_position_embeddings', absent=2048),
        rms_norm_eps=_positive(path, values, 'rms_norm_eps', absent=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        initializer_range=_positive(path, values, 'initializer_range', absent=0.02),
        bos_token_id=_token_id(path, values, 'bos_token_id', absent=1, notes=notes),
        eos_token_id=_token_id(path, values, 'eos_token_id', absent=2, notes=notes),
    )
    try:
        return LlamaConfig(**fields), notes
    except ValueError as error:
        raise Mistake(f'{path}: {error}') from None


def _rope(path: Path, values: dict) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) from either generation of transformers."""
    if 'rope_parameters' in values and 'rope_scaling' in values:
        raise Mistake(f'{path}: both rope_parameters (transformers 5) and rope_scaling (transformers 4) are given; '
                         'remove one')
    key = 'rope_parameters' if 'rope_parameters' in values else 'rope_scaling'
    rope = values.get(key, {})
    if not isinstance(rope, dict):
        raise Mistake(f'{path}: {key}={rope!r} must be an object')
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.pop('rope_type', rope.get('type', 'default'))
    rope.pop('type', None)
    theta = _positive(path, rope if 'rope_theta' in rope else values, 'rope_theta', absent=10000.0)
    rope.pop('rope_theta', None)
    if kind not in ('default', 'llama3'):
        raise Mistake(f'{path}: {key}.rope_type={kind!r} is not supported; supported: default llama3')
    floats = ('factor', 'low_freq_factor', 'high_freq_factor') if kind == 'llama3' else ()
    sizes = ('original_max_position_embeddings',) if kind == 'llama3' else ()
    unknown = sorted(set(rope) - set(floats + sizes) - ({'factor'} if rope.get('factor') == 1 else set()))
    if unknown:
        raise Mistake(f'{path}: {key}.{unknown[0]}={rope[unknown[0]]!r} is not supported with rope_type={kind!r}; '
                         f'supported: rope_theta {" ".join(floats + sizes)}'.rstrip())
    if kind == 'default':
        return theta, None
    return theta, RopeScaling(*(_positive(path, rope, name) for name in floats),
                              *(_size(path, rope, name) for name in sizes))


def _size(path: Path, values: dict, key: str, absent: int | None = None, largest: int = LARGEST_SIZE) -> int:
    if key not in values and absent is not None:
        return absent
    value = values.get(key)
    if type(value) is not int or not 1 <= value <= largest:
        raise Mistake(f'{path}: {key}={value!r} must be a whole number between 1 and {largest}')
    return value


def _positive(path: Path, values: dict, key: str, absent: float | None = None) -> float:
    value = values.get(key, absent)
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise Mistake(f'{path}: {key}={value!r} must be a positive number')
    return float(value)


def _token_id(path: Path, values: dict, key: str, absent: int, notes: list[str]) -> int:
    """A special token's id; of several (chat models list more than one eos) the first, with a note."""
    value = values.get(key)
    if value is None:
        notes.append(f'{path}: no {key}; transformers takes {absent}')
        return absent
    if isinstance(value, list) and value:
        notes.append(f'{path}: {key}={value}; the first one is used')
        value = value[0]
    if type(value) is not int or value < 0:
        raise Mistake(f'{path}: {key}={value!r} must be a token id')
    return value
