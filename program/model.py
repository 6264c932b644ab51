"""Load (program/settings.py) -> mesh, configuration, tokenizer, template and weights."""
import dataclasses
from typing import NamedTuple

import jax
from jax.sharding import Mesh

import checkpoint
from data.prompt import PromptTemplate
from data.tokenizer import Tokenizer, load_tokenizer
from hosts import processes
from mistake import Mistake
from model import attention
from model.config import Compute, LlamaConfig, named_config, updated
from model.partition import make_mesh
from model.weights import Llama, check_divisible, init_params, weight_specs
from program.assets import cache_directory
from program.settings import Load


class Model(NamedTuple):
    """A model that was opened and checked; nothing large is loaded yet (`load_params` does that)."""

    mesh: Mesh
    config: LlamaConfig
    compute: Compute
    tokenizer: Tokenizer
    source: checkpoint.Source | None  # --load_checkpoint, opened; None for random weights
    add_bos_token: bool  # whether a prompt begins with bos

    @property
    def template(self) -> PromptTemplate | None:
        """Return the checkpoint's prompt template, or None."""
        return self.source and self.source.template

    def load_params(self, seed: int, dtype: str = 'fp32') -> Llama:
        """Load the weights of --load_checkpoint, or make random float32 ones from the seed where it is empty.

        dtype: see Source.load_params.
        """
        if self.source:
            return self.source.load_params(self.config, self.mesh, dtype)
        return init_params(self.config, self.mesh, seed)


def open_source(load: Load) -> checkpoint.Source | None:
    """Open --load_checkpoint, with --adapter merged in; None where it is empty."""
    if load.adapter and not load.checkpoint:
        raise Mistake(f'adapter={load.adapter!r} is nothing without its base: give it as --load_checkpoint=TYPE::PATH')
    return checkpoint.open(load.checkpoint, load.adapter) if load.checkpoint else None


def open_model(load: Load, compute: Compute, source: checkpoint.Source | None = None) -> Model:
    """Open what `load` names.  Raises Mistake, naming the flag and the remedy, before anything is compiled.

    The program has called start_processes.  source: load.checkpoint where the caller has opened it.  compute.attention
    may be '': the platform's default.  The ids of bos and eos are always the tokenizer's.
    """
    keep_compilations()
    if jax.process_count() > processes.count():
        raise Mistake(f'this is one of {jax.process_count()} hosts of a slice: start the program on all of them '
                      'with --jax_distributed.initialize_jax_distributed=True')
    mesh = make_mesh(load.mesh_dim)
    source = source or open_source(load)
    config = find_config(load, source)
    tokenizer = load_tokenizer(load.vocab_file) if load.vocab_file else source and source.tokenizer
    if tokenizer is None:
        raise Mistake(f'load_checkpoint={load.checkpoint!r} holds no tokenizer: give one as --tokenizer.vocab_file')
    config = dataclasses.replace(config, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    if tokenizer.vocab_size > config.vocab_size and not source:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise Mistake(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: ids '
                      f'{config.vocab_size}..{tokenizer.vocab_size - 1} would have no embedding; give the '
                      'tokenizer that belongs to the model as --tokenizer.vocab_file')
    check_divisible(config, mesh)
    compute = dataclasses.replace(compute, attention=attention.resolve(compute.attention))
    return Model(mesh, config, compute, tokenizer, source, choose_bos(load.add_bos_token, source))


def find_config(load: Load, source: checkpoint.Source | None) -> LlamaConfig:
    """Take the sizes of --load_llama_config, else the checkpoint's own, else --llama.*; then --update_llama_config."""
    stated = named_config(load.llama_config) if load.llama_config else None
    if stated is None and source and not load.given:
        stated = source.config
    if stated is None and load.sizes:
        stated = LlamaConfig(**load.sizes)
    if stated is None:
        raise Mistake(f'load_checkpoint={load.checkpoint!r} does not say the sizes of the model: give them as '
                      '--load_llama_config, for example 3b')
    return updated(stated, load.update, source='update_llama_config')


def choose_bos(given: bool | None, source: checkpoint.Source | None) -> bool:
    """Take --add_bos_token, which must not contradict the checkpoint; else what that says; else True (as EasyLM)."""
    trained = source and source.add_bos_token
    if None not in (given, trained) and given != trained:
        raise Mistake(f'add_bos_token={given}, but load_checkpoint={source.spec!r} was trained with {trained}: leave '
                      '--add_bos_token out')
    return next((value for value in (given, trained) if value is not None), True)


def describe(model: Model) -> str:
    """Write the first line of every program's log: platform, mesh, attention, parameters."""
    shape = ','.join(f'{axis}={size}' for axis, size in model.mesh.shape.items())
    parameters = sum(spec.size for spec in jax.tree.leaves(weight_specs(model.config)))
    devices, attends = jax.devices(), model.compute.attention
    how = attends + (' (interpreted)' if attention.interpreted(attends) else '')
    hosts = f', {processes.count()} processes' if processes.count() > 1 else ''
    return (f'platform {devices[0].platform} ({devices[0].device_kind} x {len(devices)}{hosts}), mesh {shape}, '
            f'attention {how}, dtype {model.compute.dtype}, {parameters:,} parameters')


def keep_compilations() -> None:
    """Turn on JAX's persistent compilation cache in a private directory (it holds native code: mode 0700)."""
    cache = cache_directory() / 'compiled'
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache.chmod(0o700)
    jax.config.update('jax_compilation_cache_dir', str(cache))
