"""The sizes of a LLaMA, and the named models.  Next: model/partition.py, model/llama.py.

Letters used in every name of the code (local sizes inside `shard_map`):

  B batch   T query time   S key time   M hidden_size   H query heads   K key/value heads   G = H / K
  D head_dim   F intermediate_size   V vocab_size   N layers   P positions whose loss is computed
"""
import dataclasses
import difflib
import json
import math
from dataclasses import dataclass

from mistake import Mistake


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling (Meta's llama-models, `apply_scaling`): long wavelengths are slowed by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture.  Field names are EasyLM's and Hugging Face's.

    Defaults are EasyLM's `llama.*` flags (August 2023), that is, LLaMA 7B.  `num_key_value_heads=0` means as many
    as query heads, `head_dim=0` means hidden_size / num_attention_heads; both are resolved at construction.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_sequence_length: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self):
        for field in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
                      'max_sequence_length'):
            if getattr(self, field) < 1:
                raise Mistake(f'{field}={getattr(self, field)} must be at least 1')
        if not self.num_key_value_heads:
            object.__setattr__(self, 'num_key_value_heads', self.num_attention_heads)
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise Mistake(f'{self.hidden_size=} must be divisible by {self.num_attention_heads=}, '
                                 'or head_dim must be given')
            object.__setattr__(self, 'head_dim', self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise Mistake(f'{self.num_attention_heads=} must be divisible by {self.num_key_value_heads=}')
        if self.head_dim % 2:
            raise Mistake(f'{self.head_dim=} must be even: rotary embedding turns pairs of coordinates')

    @property
    def letters(self) -> dict[str, int]:
        """The size of each letter (and product of letters) that a weight's line may name."""
        return dict(V=self.vocab_size, M=self.hidden_size, F=self.intermediate_size, N=self.num_hidden_layers,
                    HD=self.num_attention_heads * self.head_dim, KD=self.num_key_value_heads * self.head_dim)


@dataclass(frozen=True)
class Compute:
    """How the network is computed; nothing here changes what it is.

    dtype: of activations and of the weights as they enter a matrix product, 'fp32' or 'bf16'; parameters stay f32.
    attention: the implementation, by name (model/attention.py).
    reduce_gradients: dtype in which gradients are summed over devices; '' is that of `dtype`.
    remat_block, remat_attention, remat_mlp: what the backward pass keeps of a layer, of its attention and of its ffn,
    by name (model/remat.py); '' recomputes nothing.
    label_smoothing: the part of a training target that is spread over the vocabulary (model/loss.py).
    """

    dtype: str = 'fp32'
    attention: str = 'reference'
    reduce_gradients: str = ''
    remat_block: str = ''
    remat_attention: str = ''
    remat_mlp: str = ''
    label_smoothing: float = 0.0


def _easylm(hidden_size, intermediate_size, layers, heads, **more):
    return LlamaConfig(32000, hidden_size, intermediate_size, layers, heads, **more)


_LLAMA3 = dict(rms_norm_eps=1e-5, rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001)
_LLAMA32 = _LLAMA3 | dict(max_sequence_length=131072, tie_word_embeddings=True,
                          rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))
_LLAMA2 = dict(max_sequence_length=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
_SMOLLM2 = dict(head_dim=64, max_sequence_length=8192, rms_norm_eps=1e-5, rope_theta=100000.0,
                tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)

# name -> sizes, as `--load_llama_config` spells them.  The first seven are EasyLM's own table; the others come from the
# config.json that their publisher distributes with the weights.
MODELS = {
    'debug': _easylm(128, 256, 2, 4),
    '1b': _easylm(2048, 5504, 22, 16),
    '3b': _easylm(3200, 8640, 26, 32),
    '7b': _easylm(4096, 11008, 32, 32),
    '13b': _easylm(5120, 13824, 40, 40),
    '30b': _easylm(6656, 17920, 60, 52),
    '65b': _easylm(8192, 22016, 80, 64, rms_norm_eps=1e-5),
    'llama2_7b': _easylm(4096, 11008, 32, 32, **_LLAMA2),
    'llama2_13b': _easylm(5120, 13824, 40, 40, **_LLAMA2),
    'llama2_70b': _easylm(8192, 28672, 80, 64, num_key_value_heads=8, **_LLAMA2),
    'llama3_8b': LlamaConfig(128256, 4096, 14336, 32, 32, 8, max_sequence_length=8192, **_LLAMA3),
    'llama3_70b': LlamaConfig(128256, 8192, 28672, 80, 64, 8, max_sequence_length=8192, **_LLAMA3),
    'llama32_1b': LlamaConfig(128256, 2048, 8192, 16, 32, 8, head_dim=64, **_LLAMA32),
    'llama32_3b': LlamaConfig(128256, 3072, 8192, 28, 24, 8, head_dim=128, **_LLAMA32),
    'smollm2_135m': LlamaConfig(49152, 576, 1536, 30, 9, 3, **_SMOLLM2),
    'smollm2_360m': LlamaConfig(49152, 960, 2560, 32, 15, 5, **_SMOLLM2),
}


def named_config(name: str) -> LlamaConfig:
    """`--load_llama_config`: a name of MODELS, or `json::FILE` (EasyLM's spelling) with fields of LlamaConfig,
    at its top or under `llama_config` (the metadata.json that train.py writes beside EasyLM files).

    Raises Mistake that lists the names, or names the file and field at fault.
    """
    if name in MODELS:
        return MODELS[name]
    kind, separator, path = name.partition('::')
    if separator and kind == 'json':
        try:
            with open(path, encoding='utf-8') as file:
                values = json.load(file)
        except OSError as error:
            raise Mistake(f'load_llama_config={name!r} cannot be read: {error.strerror}') from None
        except json.JSONDecodeError as error:
            raise Mistake(f'load_llama_config: {path}:{error.lineno} is not JSON: {error.msg}') from None
        if not isinstance(values, dict):
            raise Mistake(f'load_llama_config: {path} must hold a JSON object')
        return config_from_dict(values.get('llama_config', values), source=path)
    if separator and kind == 'pickle':
        raise Mistake(f'load_llama_config={name!r}: pickle files are never read (unpickling runs code); '
                         'give a name, or write the sizes to a JSON file and use json::FILE')
    close = difflib.get_close_matches(name, MODELS, n=1)
    hint = f' (did you mean {close[0]!r}?)' if close else ''
    raise Mistake(f'load_llama_config={name!r} is not a known model{hint}: use one of {" ".join(MODELS)}, '
                     'or json::FILE')


def config_from_dict(values: dict, source: str) -> LlamaConfig:
    """The inverse of `config_to_dict`.  Raises Mistake naming `source` and the unknown or mistyped fields."""
    types = {field.name: field.type for field in dataclasses.fields(LlamaConfig)}
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise Mistake(f'{source}: unknown model fields {unknown}; known: {" ".join(types)}')
    values = dict(values)
    for name, value in values.items():
        if name == 'rope_scaling':
            values[name] = RopeScaling(**value) if isinstance(value, dict) else value
        elif types[name] is float and isinstance(value, int) and not isinstance(value, bool):
            values[name] = float(value)
        elif not isinstance(value, types[name]) or isinstance(value, bool) != (types[name] is bool):
            raise Mistake(f'{source}: {name}={value!r} must be {types[name].__name__}')
        elif isinstance(value, float) and not math.isfinite(value):
            raise Mistake(f'{source}: {name}={value!r} must be finite')
    return LlamaConfig(**values)


def updated(config: LlamaConfig, changes: dict, source: str) -> LlamaConfig:
    """`config` with some fields changed; head_dim and num_key_value_heads follow hidden_size and num_attention_heads
    where they did before.  Raises Mistake as `config_from_dict`.
    """
    values = config_to_dict(config)
    if config.head_dim * config.num_attention_heads == config.hidden_size:
        values['head_dim'] = 0
    if config.num_key_value_heads == config.num_attention_heads:
        values['num_key_value_heads'] = 0
    return config_from_dict(values | changes, source)


def config_to_dict(config: LlamaConfig) -> dict:
    """JSON-ready fields of a configuration; `rope_scaling` becomes a dict or None."""
    return dataclasses.asdict(config)
