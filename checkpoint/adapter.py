"""Open an adapter beside its base (`--load_checkpoint=BASE --adapter=DIR`).  Before: source.py.  Next: formats/peft.py.

DIR is a run of train.py with --lora.rank (its newest step, or one step_N directory), or a directory of PEFT's: what is
there decides.  What comes out has all that a Source has.  The weights are the base's with the adapter added, a slice at
a time on the host while they are read, W + scale A B in float32: so an adapter costs no memory, merged weights have the
same bits wherever they are read, and every format and dtype that a Source loads is loaded so.

An adapter of ours knows the fingerprint of its base and refuses another; PEFT's has only a name, and shapes.
"""
import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint import native
from checkpoint.formats.reading import Bounds, slices
from checkpoint.source import (
    Source,
    add_bos_token_in,
    chat_template_in,
    describe,
    needs_formats,
    open_step,
    split_spec,
    tokenizer_in,
)
from data.prompt import PromptTemplate
from data.tokenizer import Tokenizer
from mistake import Mistake
from model.config import LlamaConfig
from model.lora import Lora, adapter_specs
from model.weights import Llama

PEFT = 'adapter_config.json'


def open(spec: str, adapter: str = '') -> 'Source | AdaptedSource':
    """Open a checkpoint by its TYPE::PATH; of a run's directory the step that is now the newest, for good.

    adapter: directory of one that is merged into it.  Raises Mistake for what names nothing readable, and for a spec
    that is an adapter itself.
    """
    kind, path = split_spec(spec)
    alone = 'is an adapter, and its base is needed too: '
    if kind in ('hf', 'native') and (Path(path) / PEFT).is_file() and not (Path(path) / 'config.json').exists():
        raise Mistake(f'load_checkpoint={spec!r} {alone}--load_checkpoint=BASE --adapter={path}')
    source = Source(spec)
    if source.native and 'lora' in source.native.meta:
        raise Mistake(f'load_checkpoint={spec!r} {alone}--load_checkpoint={source.native.meta["base"]["spec"]} '
                      f'--adapter={path} (for train.py, merge the two first: convert.py --merge=True)')
    return AdaptedSource(source, open_adapter(adapter)) if adapter else source


def open_adapter(path: str) -> 'NativeAdapter | PeftAdapter':
    """Open an adapter of ours or of PEFT's, as what is there says.  Raises Mistake for anything else."""
    if (Path(path) / PEFT).is_file():
        return PeftAdapter(path)
    if not Path(path).exists():
        raise Mistake(f'adapter={path!r} does not exist')
    return NativeAdapter(path)


class NativeAdapter:
    """An adapter of a run of ours: lora, base (spec and fingerprint), and what a Source of the run says."""

    kind = 'native'

    def __init__(self, path: str):
        self.path, self.native = path, open_step(path, 'adapter')
        meta = self.native.meta
        if 'lora' not in meta:
            raise Mistake(f'adapter={path!r} holds all weights of a model, no adapter: --load_checkpoint={path} alone')
        self.lora = Lora(**meta['lora'] | dict(targets=tuple(meta['lora']['targets'])))
        self.base, self.fingerprint, self.step = meta['base']['spec'], meta['base']['fingerprint'], self.native.number
        own = Source(str(self.native.path))
        self.tokenizer, self.template = own.tokenizer, own.template
        self.add_bos_token, self.chat_template = own.add_bos_token, own.chat_template

    def arrays(self, config: LlamaConfig) -> dict[str, np.ndarray]:
        """Read 'layers.w_q.a' [N, in, R], 'layers.w_q.b' [N, R, out] and so on, float32.

        Raises Mistake for another shape than `config`, missing and surplus ones.
        """
        wanted = {f'params.{spec.name}': spec.shape for spec in jax.tree.leaves(adapter_specs(config, self.lora))}
        _refuse_misfit(self.path, {name: shape for name, (shape, _) in self.native.arrays.items()
                                   if name.startswith('params.')}, wanted)
        return {name.removeprefix('params.'): self.native.read(name, None) for name in wanted}


class PeftAdapter:
    """A directory of PEFT's: lora, the name of its base, and what of a tokenizer lies beside."""

    kind, native, step, template, fingerprint = 'peft', None, 0, None, None

    def __init__(self, path: str):
        try:
            from checkpoint.formats import peft
        except ModuleNotFoundError as error:
            raise needs_formats(f'adapter={path!r}', error) from None
        self.path, self._reader, self._sources = path, peft.Reader(path), peft.sources
        self.lora, self.base = self._reader.lora, self._reader.base
        self.tokenizer, self.add_bos_token = tokenizer_in(Path(path)), add_bos_token_in(Path(path))
        self.chat_template = chat_template_in(Path(path))

    def arrays(self, config: LlamaConfig) -> dict[str, np.ndarray]:
        """Read the tensors as NativeAdapter.arrays does."""
        shapes = {spec.name: spec.shape[1:] for spec in jax.tree.leaves(adapter_specs(config, self.lora))}
        named = self._sources(config, self.lora)
        ours = lambda target, half: f'layers.{target}.{half.lower()}'
        _refuse_misfit(self.path, self._reader.shapes, {
            name: shapes[ours(target, half)][::-1] for (target, _, half), name in named.items()})
        return {ours(target, half): np.stack([self._reader.array(named[target, layer, half]).T
                                              for layer in range(config.num_hidden_layers)])
                for target in self.lora.targets for half in 'AB'}


def _refuse_misfit(path: str, stored: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Raise Mistake unless exactly the arrays wanted are there, in their shapes."""
    wrong = [f'{name} got {list(stored[name]) if name in stored else "nothing"} want {list(shape)}'
             for name, shape in wanted.items() if stored.get(name) != shape]
    wrong += [f'{name} got an array want none' for name in sorted(set(stored) - set(wanted))]
    if wrong:
        raise Mistake(f'adapter={path!r} is of another shape than the model: {native.shortened(wrong)}; name the base '
                      'that it was trained beside as --load_checkpoint')


class AdaptedSource:
    """A Source of base + adapter; tokenizer, templates, bos, step and calibration are the adapter's where it has them.

    base, adapter: the two.  native: the adapter's step (None for PEFT's): what belongs to these weights lies there.
    """

    def __init__(self, base: Source, adapter: NativeAdapter | PeftAdapter):
        self.base, self.adapter = base, adapter
        self.spec, self.kind, self.path, self.native = base.spec, base.kind, base.path, adapter.native
        self.step = adapter.step or base.step

    @property
    def config(self) -> LlamaConfig | None:
        """Return the base's configuration."""
        return self.base.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Return the adapter's tokenizer, else the base's."""
        return self.adapter.tokenizer or self.base.tokenizer

    @functools.cached_property
    def template(self) -> PromptTemplate | None:
        """Return the adapter's prompt template, else the base's."""
        return self.adapter.template or self.base.template

    @functools.cached_property
    def add_bos_token(self) -> bool | None:
        """Tell whether texts begin with bos: the adapter's word, else the base's."""
        return self.base.add_bos_token if self.adapter.add_bos_token is None else self.adapter.add_bos_token

    @functools.cached_property
    def chat_template(self) -> str | None:
        """Return the adapter's chat template, else the base's."""
        return self.adapter.chat_template or self.base.chat_template

    def fingerprint(self, config: LlamaConfig) -> str:
        """Hash the base's weights, as Source.fingerprint."""
        return self.base.fingerprint(config)

    def reader(self, config: LlamaConfig) -> '_MergedReader':
        """Return the reader of the merged weights, as Source.reader.

        Raises Mistake for an adapter of another base or another shape.
        """
        reader, arrays, stated = self.base.reader(config), self.adapter.arrays(config), self.adapter.fingerprint
        if stated and stated != self.base.fingerprint(config):
            raise Mistake(f'adapter={self.adapter.path!r} was trained beside {self.adapter.base!r}, and '
                          f'load_checkpoint={self.spec!r} has other weights: name that base')
        return _MergedReader(reader, arrays, self.adapter.lora)

    def load_adapter(self, config: LlamaConfig) -> Llama:
        """Load the adapter alone, as the tree of model/lora.py: numpy, float32.

        Raises Mistake for an adapter of another base or another shape.
        """
        self.reader(config)
        arrays = self.adapter.arrays(config)
        return jax.tree.map(lambda spec: arrays[spec.name], adapter_specs(config, self.adapter.lora))

    def load_params(self, config: LlamaConfig, mesh: Mesh, dtype: str = 'fp32') -> Llama:
        """Load the merged weights, as Source.load_params."""
        return self.base.load_params(config, mesh, dtype, self.reader(config))


class _MergedReader:
    """A reader whose matrices are the base's with the adapter added."""

    def __init__(self, base, arrays: dict[str, np.ndarray], lora: Lora):
        self.config, self.notes, self.names = base.config, [], base.names
        self.source, self.shape = base.source, base.shape
        self._base, self._arrays, self._lora = base, arrays, lora

    def tensor(self, name: str, layer: int | None, bounds: Bounds = None) -> np.ndarray:
        w = self._base.tensor(name, layer, bounds)
        if f'{name}.a' not in self._arrays:
            return w
        rows, columns = slices(bounds) if bounds else (slice(None), slice(None))
        a, b = self._arrays[f'{name}.a'][layer][rows], self._arrays[f'{name}.b'][layer][:, columns]
        return w + np.float32(self._lora.scale) * (a @ b)


# ---------------------------------------------------------------- writing one, and telling of it


def describe_adapter(source: AdaptedSource) -> dict:
    """Return what /info and evaluation.json say of an adapter, JSON-ready."""
    adapter, lora = source.adapter, source.adapter.lora
    return dict(path=adapter.path, format=adapter.kind, step=adapter.step, base=source.spec, rank=lora.rank,
                alpha=lora.alpha, targets=list(lora.targets), rslora=lora.rslora)


def write_native(directory: Path, source: AdaptedSource, config: LlamaConfig, tokenizer: Tokenizer | None) -> None:
    """Write the adapter of `source` as one of ours, at its step, with the fingerprint of its base."""
    lora = source.adapter.lora
    meta, files = describe(config, tokenizer, source.template, source.add_bos_token, source.chat_template)
    meta |= dict(lora=vars(lora) | dict(targets=list(lora.targets)),
                 base=dict(spec=source.spec, fingerprint=source.fingerprint(config)))
    source.reader(config)  # refuses an adapter of another base
    arrays = {f'params.{name}': native.Streamed(array.shape, array.dtype, array.shape[0], iter([array]))
              for name, array in source.adapter.arrays(config).items()}
    native.save(directory, source.step, arrays, meta, files, keep=1)
