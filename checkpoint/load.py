"""`--load_checkpoint=TYPE::PATH` -> configuration, weights, tokenizer, prompt template.  Next: the readers beside it.

  bare PATH   our own checkpoint (native.py): a directory of steps (the newest is taken), or one step_N directory
  hf::        Hugging Face directory with safetensors (huggingface.py)
  gguf::      llama.cpp file (gguf.py)
  params:: trainstate_params:: flax_params::     EasyLM files (easylm.py); these need --load_llama_config
  trainstate::       the same, and train.py goes on from its step and optimizer state (easylm_train_state.py)

A reader has config, notes, names, source(name, layer), shape(name, layer) and tensor(name, layer, bounds): one tensor
of one layer, or the part of it within `bounds`, (start, stop) per dimension.  All shapes are compared before anything
is allocated; then the slices that this process's devices hold are read one after the other, and each is put on its
devices at once (shards.py).  So a host needs `host_bytes` beside the result, four slices of one tensor; flax_params::
alone is no stream and read whole.  Pickle files are never opened, those beside a checkpoint (EasyLM's metadata.pkl)
neither.
"""
import difflib
import functools
import importlib
import json
import logging
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint import native, shards
from data.prompt import PromptTemplate
from data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_bytes, tokenizer_from_json
from mistake import Mistake
from model.config import LlamaConfig, config_from_dict, config_to_dict
from model.llama import Llama, abstract_params, weight_specs
from model.weights import WeightSpec

EASYLM = ('params', 'trainstate', 'trainstate_params', 'flax_params')
TYPES = ('hf', 'gguf', *EASYLM)
_log = logging.getLogger(__name__)


# ---------------------------------------------------------------- what a spec holds


def read_config(spec: str) -> LlamaConfig | None:
    """The model's configuration; None if the file states none (EasyLM's)."""
    kind, path = split_spec(spec)
    if kind == 'native':
        return config_from_dict(_meta(spec, 'model'), source=str(native.step_directory(*native_step(path))))
    if kind in EASYLM:
        return None
    reader = _open(spec, None)
    for note in reader.notes:
        _log.warning('%s', note)
    return reader.config


def read_tokenizer(spec: str) -> Tokenizer | None:
    """The tokenizer that comes with the weights, or None; raises Mistake if there is one that is not supported."""
    kind, path = split_spec(spec)
    if kind == 'hf':
        known = any((Path(path) / name).is_file() for name in ('tokenizer.json', 'tokenizer.model'))
        return load_tokenizer(path) if known else None
    if kind == 'gguf':
        return tokenizer_from_json(*_open(spec, None).tokenizer_json(), source=path)
    if kind == 'native' and (stated := _meta(spec, 'tokenizer', None)) is not None:
        directory, step = native_step(path)
        content = native.read_file(directory, step, stated['file_name'])
        return tokenizer_from_bytes(stated['file_name'], content, stated['bos'], stated['eos'], stated['pad'], path)
    return None


def read_template(spec: str) -> PromptTemplate | None:
    """The prompt template of a native checkpoint; None if it carries none, and for foreign files."""
    if split_spec(spec)[0] != 'native' or (values := _meta(spec, 'template', None)) is None:
        return None
    return PromptTemplate.from_dict(values, source=spec)


def read_add_bos_token(spec: str) -> bool | None:
    """Whether the weights were trained on texts that begin with bos; None if nothing says so."""
    kind, path = split_spec(spec)
    if kind == 'gguf':
        return _open(spec, None).add_bos_token
    stated = Path(path) / 'tokenizer_config.json'
    if kind == 'hf' and stated.is_file():
        value = json.loads(stated.read_text(encoding='utf-8')).get('add_bos_token')
        return value if isinstance(value, bool) else None
    return _meta(spec, 'add_bos_token', None) if kind == 'native' else None


def read_step(spec: str) -> int:
    """The step at which the weights were saved: micro-steps done, 0 where the file states none."""
    kind, path = split_spec(spec)
    if kind == 'trainstate':
        return _formats(spec, 'easylm_train_state').read_step(path)
    return native_step(path)[1] if kind == 'native' else 0


def describe(config: LlamaConfig, tokenizer: Tokenizer | None, template: PromptTemplate | None,
             add_bos_token: bool | None = None) -> tuple[dict, dict]:
    """(meta, files) for native.save, such that the read_ functions above give them back."""
    meta = dict(model=config_to_dict(config), template=template.to_dict() if template else None, tokenizer=None,
                add_bos_token=add_bos_token)
    if tokenizer is None:
        return meta, {}
    meta['tokenizer'] = dict(file_name=tokenizer.file_name, fingerprint=tokenizer.fingerprint,
                             bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    return meta, {tokenizer.file_name: tokenizer.source_bytes}


def by_name(tree: Llama, config: LlamaConfig, prefix: str) -> dict:
    """{prefix + '.' + weight's name: leaf} of a tree shaped like the weights (weights, momenta, ShapeDtypeStructs)."""
    return {f'{prefix}.{spec.name}': leaf for spec, leaf in zip(specs_of(config), jax.tree.leaves(tree), strict=True)}


def specs_of(config: LlamaConfig) -> list[WeightSpec]:
    """The weights in the order of the tree's leaves."""
    return jax.tree.leaves(weight_specs(config), is_leaf=lambda node: isinstance(node, WeightSpec))


def tensors_of(config: LlamaConfig) -> list[tuple[WeightSpec, int | None]]:
    """[(weight, layer)]: what a reader's `tensor` is asked for, layer None where a weight is not stacked."""
    return [(spec, layer) for spec in specs_of(config)
            for layer in (range(spec.shape[0]) if spec.stacked else [None])]


# ---------------------------------------------------------------- the weights


def load_params(spec: str, config: LlamaConfig, mesh: Mesh) -> Llama:
    """The weights: float32, on the shardings of `abstract_params(config, mesh)`.

    Raises Mistake for a spec that names nothing readable, and for a checkpoint of another shape than `config`.
    """
    kind, path = split_spec(spec)
    targets = abstract_params(config, mesh)
    if kind == 'native':
        _refuse_misfit(spec, _other_heads(read_config(spec), config))
        directory, step = native_step(path)
        arrays = native.restore(directory, step, by_name(targets, config, 'params'))
        return jax.tree.unflatten(jax.tree.structure(targets), arrays.values())
    reader = open_reader(spec, config)
    leaves = [_assemble(reader, weight, target) for weight, target in
              zip(specs_of(config), jax.tree.leaves(targets), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(targets), leaves)


def host_bytes(config: LlamaConfig, mesh: Mesh) -> int:
    """The most that each process needs on its host, beside its devices' memory, to load the weights or a train state.

    `mesh` may be one of a described topology.  The rule: shards.SLICES times the largest thing that is read at a time.
    """
    return shards.SLICES * max(shards.slice_bytes(target, weight.stacked) for weight, target in
                               zip(specs_of(config), jax.tree.leaves(abstract_params(config, mesh)), strict=True))


def load_train_state(spec: str, config: LlamaConfig, targets: dict[str, jax.ShapeDtypeStruct],
                     parameter_scale: bool) -> dict[str, jax.Array]:
    """The arrays named in `targets` of an EasyLM train state (trainstate::), as native.restore gives those of ours.

    targets: 'params.*', 'momentum.*', 'second_moment.*', 'optimizer.count', 'optimizer.micro_step', and with
    accumulation 'mean_gradient.*'; each array comes in its target's dtype, on its sharding.  parameter_scale: the flag
    optimizer.adamw_optimizer.multiply_by_parameter_scale, which decides what the second moment is.
    Raises Mistake for another shape of the model, and for a state of another kind of optimizer.
    """
    _, path = split_spec(spec)
    accumulated = any(name.startswith('mean_gradient.') for name in targets)
    state = _formats(spec, 'easylm_train_state').TrainStateReader(path, config.head_dim, parameter_scale, accumulated)
    weights = {weight.name: weight for weight in specs_of(config)}
    readers = {what: state.tree(what) for what in sorted({name.partition('.')[0] for name in targets} - {'optimizer'})}
    for reader in readers.values():
        _compare(spec, reader, config)
    arrays = {}
    for name, target in targets.items():
        what, _, weight = name.partition('.')
        if name in state.scalars:
            arrays[name] = jax.device_put(state.scalars[name], target.sharding)
        else:
            arrays[name] = _assemble(readers[what], weights[weight], target)
    return arrays


def open_reader(spec: str, config: LlamaConfig):
    """The reader of any spec, ours too: (name, layer) -> tensor, once all shapes are those of `config`.

    name: of a weight (WeightSpec.name); layer: a number where it is stacked, else None.
    """
    reader = _open(spec, config)
    _compare(spec, reader, config)
    return reader


def _compare(spec: str, reader, config: LlamaConfig) -> None:
    """Raises Mistake unless the reader has exactly the tensors of `config`, in their shapes."""
    wrong, expected = [], set()
    for weight, layer in tensors_of(config):
        want = weight.shape[1:] if weight.stacked else weight.shape
        got, source = reader.shape(weight.name, layer), reader.source(weight.name, layer)
        expected.add(source)
        if got != want:
            wrong.append(f'{source} got {list(got) if got else "nothing"} want {list(want)}')
    wrong += [f'{name} got a tensor want none' for name in sorted(reader.names - expected)]
    _refuse_misfit(spec, wrong + (_other_heads(reader.config, config) if reader.config else []))


def _other_heads(stored: LlamaConfig, config: LlamaConfig) -> list[str]:
    """What shapes alone do not show: 4 heads of 16 have the matrices of 2 heads of 32."""
    return [f'{field} got {getattr(stored, field)} want {getattr(config, field)}'
            for field in ('num_attention_heads', 'num_key_value_heads', 'head_dim')
            if getattr(stored, field) != getattr(config, field)]


def _refuse_misfit(spec: str, wrong: list[str]) -> None:
    if wrong:
        raise Mistake(f'load_checkpoint={spec!r} is a checkpoint of another shape than the model: '
                         f'{native.shortened(wrong)} (check --load_llama_config; without it the '
                         'sizes are those that the checkpoint states, if it does)')


def _assemble(reader, weight: WeightSpec, target: jax.ShapeDtypeStruct) -> jax.Array:
    """One weight, no slice of its tensors read twice."""
    if weight.stacked:
        return shards.fill_stack(target, functools.partial(reader.tensor, weight.name))
    return shards.fill(target, functools.partial(reader.tensor, weight.name, None))


# ---------------------------------------------------------------- specs


def split_spec(spec: str) -> tuple[str, str]:
    """'TYPE::PATH' -> (type, path), a bare path -> ('native', path).  Raises Mistake with the types that exist."""
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


def _open(spec: str, config: LlamaConfig | None):
    """The reader of a spec, its shapes not yet compared."""
    kind, path = split_spec(spec)
    if kind == 'native':
        return _NativeReader(spec)
    if kind == 'hf':
        return _formats(spec, 'huggingface').Reader(path)
    if kind == 'gguf':
        return _formats(spec, 'gguf').Reader(path)
    return _formats(spec, 'easylm').Reader(path, kind, config.head_dim)


def _formats(spec: str, module: str):
    """A module of this room whose libraries are extras: each is imported only when its format is asked for."""
    try:
        return importlib.import_module(f'checkpoint.formats.{module}')
    except ModuleNotFoundError as error:
        raise Mistake(f'load_checkpoint={spec!r} needs the Python package {error.name!r}: '
                         "install this project with its extra 'formats'") from None


class _NativeReader:
    """One of our checkpoints as the other readers are: a layer's matrix at a time, on the host."""

    def __init__(self, spec: str):
        self.config, self.notes = read_config(spec), []
        self._arrays = native.ArrayReader(*native_step(split_spec(spec)[1]))
        shapes = {name: shape for name, (shape, _) in self._arrays.arrays.items() if name.startswith('params.')}
        self._shapes = {self.source(name.removeprefix('params.'), layer): shape[1:] if layer is not None else shape
                        for name, shape in shapes.items()
                        for layer in (range(shape[0]) if name.startswith('params.layers.') else [None])}
        self.names = set(self._shapes)

    def source(self, name: str, layer: int | None) -> str:
        return f'params.{name}' + ('' if layer is None else f'[{layer}]')

    def shape(self, name: str, layer: int | None) -> tuple[int, ...] | None:
        return self._shapes.get(self.source(name, layer))

    def tensor(self, name: str, layer: int | None) -> np.ndarray:
        return self._arrays.read(f'params.{name}', layer)


def native_step(path: str) -> tuple[str, int]:
    """(directory, step) of a native path: a directory of steps, or one of the steps itself."""
    name = Path(path).name
    if (Path(path) / native.MANIFEST).exists() and name.removeprefix('step_').isdecimal():
        return str(Path(path).parent), int(name.removeprefix('step_'))
    if (Path(path) / 'config.json').exists() or Path(path).is_file():
        kind = 'gguf' if path.endswith('.gguf') else 'params' if Path(path).is_file() else 'hf'
        raise Mistake(f'load_checkpoint={path!r} is no checkpoint of ours: a foreign one is named with its type, '
                         f'for example {kind}::{path}')
    return path, native.existing_step(path, None)


def _meta(spec: str, key: str, *default):
    directory, step = native_step(split_spec(spec)[1])
    meta = native.read_meta(directory, step)
    if key not in meta and not default:
        raise Mistake(f'load_checkpoint={spec!r}: {native.step_directory(directory, step)} states no {key}')
    return meta.get(key, *default)
