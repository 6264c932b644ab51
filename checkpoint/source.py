"""Open `--load_checkpoint=TYPE::PATH` once: configuration, tokenizer, prompt template, weights.  Next: adapter.py.

  bare PATH   our own checkpoint (native.py): a directory of steps (the newest is taken), or one step_N directory
  hf::        Hugging Face directory with safetensors (formats/huggingface.py)
  gguf::      llama.cpp file (formats/gguf.py)
  params:: trainstate_params:: flax_params::     EasyLM files (formats/easylm.py); these need --load_llama_config
  trainstate::       the same, and train.py goes on from its step and optimizer state (formats/easylm_train_state.py)

A reader has config, notes, names, source(name, layer), shape(name, layer) and tensor(name, layer, bounds): one tensor
of one layer, or the part of it within `bounds`, (start, stop) per dimension.  All shapes are compared before anything
is allocated; then the slices that this process's devices hold are read and put on them one after the other (shards.py).
So a host needs `host_bytes` beside the result; flax_params:: alone is no stream and read whole.  Pickle files are never
opened.
"""
import difflib
import functools
import hashlib
import logging
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint import native, shards
from checkpoint.formats.reading import Bounds, tensors_of
from data.prompt import PromptTemplate
from data.tokenizer import Tokenizer, load_tokenizer, read_object, tokenizer_from_bytes, tokenizer_from_json
from hosts import processes
from mistake import Mistake
from model.config import LlamaConfig, config_from_dict, config_to_dict
from model.lora import abstract_base
from model.quantized import Int8, is_quantized, rounded_columns
from model.weights import Llama, WeightSpec, weight_specs

EASYLM = ('params', 'trainstate', 'trainstate_params', 'flax_params')
TYPES = ('hf', 'gguf', *EASYLM)
_log = logging.getLogger(__name__)


class Source:
    """A checkpoint that was opened: everything is read when first asked for, once, and from the same step or file.

    Raises Mistake for a spec that names nothing readable.  Several processes open it together, at the same step.
    adapter: None; adapter.py's AdaptedSource has one.  spec, kind ('native' or one of TYPES), path: as given.  native:
    the opened native.Step, None for foreign files.
    """

    adapter = None

    def __init__(self, spec: str):
        self.spec = spec
        self.kind, self.path = split_spec(spec)
        self.native = open_step(self.path) if self.kind == 'native' else None
        if self.kind in ('hf', 'gguf'):
            for note in self._reader.notes:
                _log.warning('%s', note)

    @functools.cached_property
    def config(self) -> LlamaConfig | None:
        """Return the model's configuration; None if the file states none (EasyLM's)."""
        if self.native:
            if 'model' not in self.native.meta:
                raise Mistake(f'load_checkpoint={self.spec!r}: {self.native.path} states no model')
            return config_from_dict(self.native.meta['model'], source=str(self.native.path))
        return None if self.kind in EASYLM else self._reader.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Read the tokenizer that comes with the weights; None without one, Mistake for one that is not supported."""
        if self.kind == 'hf':
            return tokenizer_in(Path(self.path))
        if self.kind == 'gguf':
            return tokenizer_from_json(*self._reader.tokenizer_json(), source=self.path)
        stated = self._meta('tokenizer')
        return stated and tokenizer_from_bytes(stated['file_name'], self.native.read_file(stated['file_name']),
                                               stated['bos'], stated['eos'], stated['pad'], self.path)

    @functools.cached_property
    def template(self) -> PromptTemplate | None:
        """Return the prompt template of a native checkpoint; None if it carries none, and for foreign files."""
        values = self._meta('template')
        return values and PromptTemplate.from_dict(values, source=self.spec)

    @functools.cached_property
    def add_bos_token(self) -> bool | None:
        """Tell whether the weights were trained on texts that begin with bos; None if nothing says so."""
        if self.kind == 'gguf':
            return self._reader.add_bos_token
        return add_bos_token_in(Path(self.path)) if self.kind == 'hf' else self._meta('add_bos_token')

    @functools.cached_property
    def chat_template(self) -> str | None:
        """Return the chat template (Jinja) that comes with the tokenizer of hf:: and gguf::, or the one that a native
        checkpoint was trained with (Jinja, or a name of data/chat.py's table); None without one.

        Raises Mistake for one that is no text.
        """
        if self.kind == 'gguf':
            return self._reader.chat_template
        return chat_template_in(Path(self.path)) if self.kind == 'hf' else self._meta('chat_template')

    @functools.cached_property
    def step(self) -> int:
        """Return the step at which the weights were saved: micro-steps done, 0 where the file states none."""
        if self.kind == 'trainstate':
            reader = self._reader  # first: without the extra `formats` it says so
            from checkpoint.formats.easylm_train_state import read_step
            return read_step(reader)
        return self.native.number if self.native else 0

    def load_params(self, config: LlamaConfig, mesh: Mesh, dtype: str = 'fp32', reader=None) -> Llama:
        """Load the weights on the shardings of `abstract_base(config, mesh, dtype)`: float32, or what adapters train
        beside, as 'bf16' or 'int8' (a layer's matrix at a time; the device never has it in float32).

        reader: what gives them instead of `self.reader(config)`.  Raises Mistake for a checkpoint of another shape than
        `config`.
        """
        read = functools.partial(_assemble, reader or self.reader(config))
        params = jax.tree.map(read, weight_specs(config), abstract_base(config, mesh, dtype))
        del self._reader  # a flax_params file is in memory as a whole: not through the training
        return params

    def load_train_state(self, config: LlamaConfig, targets: dict[str, jax.ShapeDtypeStruct],
                         parameter_scale: bool) -> dict[str, jax.Array]:
        """Load the arrays named in `targets` from an EasyLM train state (trainstate::), as native.Step.restore does.

        targets: 'params.*', 'momentum.*', 'second_moment.*', 'optimizer.count', 'optimizer.micro_step', and with
        accumulation 'mean_gradient.*'; each array comes in its target's dtype, on its sharding.  parameter_scale: the
        flag optimizer.adamw_optimizer.multiply_by_parameter_scale, which decides what the second moment is.
        Raises Mistake for another shape of the model, and for a state of another kind of optimizer.
        """
        self._reader.head_dim = config.head_dim
        from checkpoint.formats.easylm_train_state import TrainStateReader
        accumulated = any(name.startswith('mean_gradient.') for name in targets)
        state = TrainStateReader(self._reader, parameter_scale, accumulated)
        specs = {spec.name: spec for spec in jax.tree.leaves(weight_specs(config))}
        trees = {name.partition('.')[0] for name in targets} - {'optimizer'}
        readers = {what: state.tree(what) for what in sorted(trees)}
        for reader in readers.values():
            self._compare(reader, config)
        arrays = {}
        for name, target in targets.items():
            what, _, weight = name.partition('.')
            if name in state.scalars:
                arrays[name] = jax.device_put(state.scalars[name], target.sharding)
            else:
                arrays[name] = _assemble(readers[what], specs[weight], target)
        del self._reader
        return arrays

    def fingerprint(self, config: LlamaConfig) -> str:
        """Hash what tells these weights from others, whatever the format: sha256 as hex digits.

        Of every layer's tensors, the embedding and the head: their names, shapes, and a corner of their values as
        float32, 16 rows of a head's width (a norm as a whole).  So a copy in another format is the same base, one that
        was rounded another.  Little is read.  Raises Mistake for another shape than `config`.
        """
        reader, digest = self.reader(config), hashlib.sha256()
        for spec, layer in tensors_of(config):
            shape = spec.shape[spec.stacked:]
            corner = tuple((0, min(size, most)) for size, most in zip(shape, (16, config.head_dim), strict=True)
                           ) if len(shape) == 2 else ((0, *shape),)
            digest.update(f'{spec.name} {layer} {shape}'.encode())
            digest.update(np.ascontiguousarray(reader.tensor(spec.name, layer, corner), '<f4').tobytes())
        return digest.hexdigest()

    def reader(self, config: LlamaConfig):
        """Return the reader of any checkpoint, ours too: (name, layer) -> tensor, once all shapes are `config`'s.

        name: of a weight (WeightSpec.name); layer: a number where it is stacked, else None.
        """
        if self.kind in EASYLM:
            self._reader.head_dim = config.head_dim
        self._compare(self._reader, config)
        return self._reader

    @functools.cached_property
    def _reader(self):
        """Open the reader, its shapes not yet compared.  A format's libraries, extras, are imported only here."""
        try:
            if self.native:
                return _NativeReader(self.native, self.config)
            if self.kind == 'hf':
                from checkpoint.formats import huggingface
                return huggingface.Reader(self.path)
            if self.kind == 'gguf':
                from checkpoint.formats import gguf
                return gguf.Reader(self.path)
            from checkpoint.formats import easylm
            return easylm.Reader(self.path, self.kind)
        except ModuleNotFoundError as error:
            raise needs_formats(f'load_checkpoint={self.spec!r}', error) from None

    def _meta(self, key: str):
        return self.native and self.native.meta.get(key)

    def _compare(self, reader, config: LlamaConfig) -> None:
        """Raise Mistake unless the reader has exactly the tensors of `config`, in their shapes."""
        wrong, expected = [], set()
        for spec, layer in tensors_of(config):
            want = spec.shape[spec.stacked:]
            got, source = reader.shape(spec.name, layer), reader.source(spec.name, layer)
            expected.add(source)
            if got != want:
                wrong.append(f'{source} got {list(got) if got else "nothing"} want {list(want)}')
        wrong += [f'{name} got a tensor want none' for name in sorted(reader.names - expected)]
        self._refuse_misfit(wrong + (_other_heads(reader.config, config) if reader.config else []))

    def _refuse_misfit(self, wrong: list[str]) -> None:
        if wrong:
            raise Mistake(f'load_checkpoint={self.spec!r} is a checkpoint of another shape than the model: '
                          f'{native.shortened(wrong)} (check --load_llama_config; without it the sizes are those that '
                          'the checkpoint states, if it does)')


class _NativeReader:
    """One of our checkpoints as the other readers are: a layer's matrix at a time, on the host."""

    def __init__(self, step: native.Step, config: LlamaConfig):
        self.config, self._step = config, step
        self._shapes = {self.source(name.removeprefix('params.'), layer): shape[layer is not None:]
                        for name, (shape, _) in step.arrays.items() if name.startswith('params.')
                        for layer in (range(shape[0]) if name.startswith('params.layers.') else [None])}
        self.names = set(self._shapes)

    def source(self, name: str, layer: int | None) -> str:
        return f'params.{name}' + ('' if layer is None else f'[{layer}]')

    def shape(self, name: str, layer: int | None) -> tuple[int, ...] | None:
        return self._shapes.get(self.source(name, layer))

    def tensor(self, name: str, layer: int | None, bounds: Bounds = None) -> np.ndarray:
        return self._step.read(f'params.{name}', layer, bounds)


# ---------------------------------------------------------------- what a Hugging Face directory says beside its weights


def tokenizer_in(directory: Path) -> Tokenizer | None:
    """Read the tokenizer of a directory; None without one."""
    known = any((directory / name).is_file() for name in ('tokenizer.json', 'tokenizer.model'))
    return load_tokenizer(directory) if known else None


def add_bos_token_in(directory: Path) -> bool | None:
    """Read what tokenizer_config.json says of bos; None where it says nothing."""
    stated = directory / 'tokenizer_config.json'
    value = read_object(stated).get('add_bos_token') if stated.is_file() else None
    return value if isinstance(value, bool) else None


def chat_template_in(directory: Path) -> str | None:
    """Read the chat template; None without one, Mistake for one that is no text."""
    own, stated = directory / 'chat_template.jinja', directory / 'tokenizer_config.json'
    if own.is_file():
        return own.read_text(encoding='utf-8')
    found = read_object(stated).get('chat_template') if stated.is_file() else None
    if isinstance(found, list):  # several, by name
        found = {entry.get('name'): entry.get('template') for entry in found if isinstance(entry, dict)}.get('default')
    if not isinstance(found, str | None):
        raise Mistake(f'{stated}: chat_template is neither text nor a list with one named default')
    return found


# ---------------------------------------------------------------- what a native checkpoint says beside its arrays


def describe(config: LlamaConfig, tokenizer: Tokenizer | None, template: PromptTemplate | None,
             add_bos_token: bool | None = None, chat_template: str | None = None) -> tuple[dict, dict]:
    """Return (meta, files) for native.save, such that a Source gives them back."""
    meta = dict(model=config_to_dict(config), template=template.to_dict() if template else None, tokenizer=None,
                add_bos_token=add_bos_token, chat_template=chat_template)
    if tokenizer is None:
        return meta, {}
    meta['tokenizer'] = dict(file_name=tokenizer.file_name, fingerprint=tokenizer.fingerprint,
                             bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    return meta, {tokenizer.file_name: tokenizer.source_bytes}


def read_run(path: str) -> tuple[dict, dict]:
    """Read (flags, position in the data) of the run that wrote a native checkpoint, for --load_dataset_state.

    Raises Mistake naming that flag if `path` holds none of our checkpoints, or one that convert.py wrote.
    """
    step = open_step(path, 'load_dataset_state')
    if not {'flags', 'data'} <= step.meta.keys():
        raise Mistake(f'load_dataset_state={str(path)!r}: {step.path} was not written by train.py (but by '
                      'convert.py) and holds no position in the data: name a checkpoint or the dataset.json of the run '
                      'itself, or leave --load_dataset_state out')
    return step.meta['flags'], step.meta['data']


# ---------------------------------------------------------------- weights


def host_bytes(config: LlamaConfig, mesh: Mesh, dtype: str = 'fp32') -> int:
    """Return the most bytes that each process needs on its host, beside its devices' memory, to load the weights.

    `mesh` may be one of a described topology.  The rule: shards.SLICES times the largest thing that is read at a time,
    as float32; as int8 that is of a layer's matrix whole columns, since one factor belongs to each, and the matrix as
    int8 beside it.
    """
    def needed(spec: WeightSpec, target: jax.ShapeDtypeStruct | Int8) -> int:
        if is_quantized(target):
            rows, columns = spec.shape[1], target.values.sharding.shard_shape(spec.shape)[2]
            return shards.SLICES * 4 * rows * columns + spec.size // spec.shape[0]
        return shards.SLICES * 4 * shards.slice_bytes(target, spec.stacked) // target.dtype.itemsize

    return max(jax.tree.leaves(jax.tree.map(needed, weight_specs(config), abstract_base(config, mesh, dtype))))


def _other_heads(stored: LlamaConfig, config: LlamaConfig) -> list[str]:
    """Compare what shapes alone do not show: 4 heads of 16 have the matrices of 2 heads of 32."""
    return [f'{field} got {getattr(stored, field)} want {getattr(config, field)}'
            for field in ('num_attention_heads', 'num_key_value_heads', 'head_dim')
            if getattr(stored, field) != getattr(config, field)]


def _assemble(reader, spec: WeightSpec, target: jax.ShapeDtypeStruct | Int8) -> jax.Array | Int8:
    """Read one weight, no slice of its tensors twice."""
    if is_quantized(target):
        return _quantized(reader, spec, target)
    if spec.stacked:
        return shards.fill_stack(target, functools.partial(reader.tensor, spec.name))
    return shards.fill(target, functools.partial(reader.tensor, spec.name, None))


def _quantized(reader, spec: WeightSpec, target: Int8) -> Int8:
    """Read one stack of matrices, and round whole columns of a layer on the host as quantized.quantize does."""
    columns = {bounds[2] for bounds in shards.shard_indices(target.shape, target.values.sharding)}
    factors = {}

    @functools.lru_cache(len(columns))  # devices that hold other rows of these columns come next
    def whole(layer: int, start: int, stop: int) -> np.ndarray:
        w = reader.tensor(spec.name, layer, ((0, spec.shape[1]), (start, stop)))
        factors[layer, (start, stop)], values = rounded_columns(w)
        return values

    values = shards.fill_stack(
        target.values, lambda layer, bounds: whole(layer, *bounds[1])[slice(*bounds[0])], by_layer=True)
    return Int8(values, shards.fill(target.factors, lambda bounds: np.stack(
        [factors[layer, bounds[1]] for layer in range(*bounds[0])])), target.weight_only)


# ---------------------------------------------------------------- specs


def split_spec(spec: str) -> tuple[str, str]:
    """Split 'TYPE::PATH' into (type, path), a bare path into ('native', path).  Raises Mistake with the types."""
    kind, separator, path = spec.partition('::')
    if not separator:
        kind, path = 'native', spec
    elif kind not in (*TYPES, 'pickle'):
        close = difflib.get_close_matches(kind, TYPES, n=1, cutoff=0.5)
        hint = f' (did you mean {close[0]}::?)' if close else ''
        raise Mistake(f'load_checkpoint={spec!r}: unknown type {kind!r}{hint}; types: '
                      f'{" ".join(name + "::" for name in TYPES)}, or a bare path for our own checkpoints')
    if kind == 'pickle' or Path(path).suffix in ('.pkl', '.pickle', '.pt', '.pth'):
        raise Mistake(f'load_checkpoint={spec!r}: pickle files are never read (unpickling runs code); save the '
                      'weights as safetensors (hf::) or take the streaming file of the same run (params::)')
    if not path or not Path(path).exists() and not Path(path).is_symlink():
        raise Mistake(f'load_checkpoint={spec!r}: {path!r} does not exist')
    return kind, path


def open_step(path: str, flag: str = 'load_checkpoint') -> native.Step:
    """Open a native checkpoint: one of the steps, or the newest of a directory (all processes take process 0's).

    Raises Mistake naming `flag`; for a foreign file or directory it spells the value with its type.
    """
    name = Path(path).name
    if (Path(path) / native.MANIFEST).exists() and name.removeprefix('step_').isdecimal():
        return native.Step(str(Path(path).parent), int(name.removeprefix('step_')))
    if (foreign := _foreign(Path(path))) and flag == 'load_checkpoint':
        raise Mistake(f'load_checkpoint={str(path)!r} is no checkpoint of ours: a foreign one is named with its type, '
                      f'for example --load_checkpoint={foreign}')
    try:
        step = native.Step(path)
    except Mistake as error:
        raise Mistake(f'{flag}={error}') from None  # it begins with the path
    first, *_ = processes.exchange(str(step.number))
    return step if step.number == int(first) else native.Step(path, int(first))


def _foreign(path: Path) -> str | None:
    """Spell as TYPE::PATH what a path without a type seems to be; None if it may be a checkpoint of ours."""
    if path.is_file():
        return f'{"gguf" if path.suffix == ".gguf" else "params"}::{path}'
    if any(path.glob('step_*')):
        return None
    if (path / 'config.json').exists() or any(path.glob('*.safetensors')):
        return f'hf::{path}'
    inside = [f'gguf::{file}' for file in sorted(path.glob('*.gguf'))]
    inside += [f'params::{file}' for file in sorted(path.glob('streaming_params*'))]
    inside += [f'trainstate::{file}' for file in sorted(path.glob('streaming_train_state*'))]
    return inside[0] if inside else None


def needs_formats(what: str, error: ModuleNotFoundError) -> Mistake:
    """Return the error for a package that is missing because the extra `formats` is not installed."""
    return Mistake(f"{what} needs the Python package {error.name!r}: install this project with its extra 'formats'")
