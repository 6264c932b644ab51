"""Turn the flags that every program shares (flags.MODEL) into mesh, configuration, tokenizer, template and weights."""
import dataclasses
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import checkpoint
from data.prompt import PromptTemplate
from data.tokenizer import Tokenizer, load_tokenizer
from hosts import processes
from mistake import Mistake
from model import attention, llama
from model.config import Compute, LlamaConfig, named_config
from model.partition import make_mesh
from program.flags import cache_directory


class Model(NamedTuple):
    """What the shared flags say, checked against each other; nothing large is loaded yet (`load_params` does that)."""

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

    def load_params(self, seed: int) -> llama.Llama:
        """Load the weights of --load_checkpoint, or make random ones from the seed where it is empty."""
        if self.source:
            return self.source.load_params(self.config, self.mesh)
        return llama.init_params(self.config, self.mesh, seed)


def open_source(flags: ConfigDict) -> checkpoint.Source | None:
    """Open --load_checkpoint; None where it is empty."""
    return checkpoint.open(flags.load_checkpoint) if flags.load_checkpoint else None


def open_model(flags: ConfigDict, config: LlamaConfig | None = None, source: checkpoint.Source | None = None,
               **compute: str) -> Model:
    """Read the shared flags.  Raises Mistake, naming the flag and the remedy, before anything is compiled.

    The program has called start_processes.  config: sizes that flags of the caller state; None for those of
    --load_llama_config, else the checkpoint's own.  source: --load_checkpoint where the caller has opened it.
    compute: Compute's reduce_gradients, remat_block, remat_attention, remat_mlp.  The ids of bos and eos are always the
    tokenizer's.
    """
    keep_compilations()
    if jax.process_count() > processes.count():
        raise Mistake(f'this is one of {jax.process_count()} hosts of a slice: start the program on all of them '
                      'with --jax_distributed.initialize_jax_distributed=True')
    mesh = make_mesh(flags.mesh_dim)
    if config is None and flags.load_llama_config:
        config = named_config(flags.load_llama_config)
    source = source or open_source(flags)
    config = config or (source and source.config)
    if config is None:
        raise Mistake(f'load_checkpoint={flags.load_checkpoint!r} does not say the sizes of the model: '
                      'give them as --load_llama_config, for example 3b')
    vocab_file = flags.tokenizer.vocab_file
    tokenizer = load_tokenizer(vocab_file) if vocab_file else source and source.tokenizer
    if tokenizer is None:
        raise Mistake(f'load_checkpoint={flags.load_checkpoint!r} holds no tokenizer: give one as '
                      '--tokenizer.vocab_file')
    config = dataclasses.replace(config, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    if tokenizer.vocab_size > config.vocab_size and not source:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise Mistake(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: ids '
                      f'{config.vocab_size}..{tokenizer.vocab_size - 1} would have no embedding; give the '
                      'tokenizer that belongs to the model as --tokenizer.vocab_file')
    llama.check_divisible(config, mesh)
    compute = Compute(flags.dtype, attention.resolve(flags.attention), **compute)
    return Model(mesh, config, compute, tokenizer, source, choose_bos(flags.get('add_bos_token'), source))


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
    parameters = sum(spec.size for spec in jax.tree.leaves(llama.weight_specs(model.config)))
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
