"""The flags that every program shares (flags.MODEL) -> processes, mesh, configuration, tokenizer, template, weights."""
import dataclasses
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from checkpoint import load
from data.prompt import PromptTemplate
from data.tokenizer import Tokenizer, load_tokenizer
from hosts import processes
from hosts.start import start_processes
from mistake import Mistake
from model import attention, llama
from model.config import Compute, LlamaConfig, named_config
from model.partition import make_mesh
from program.assets import cache_directory


class Model(NamedTuple):
    """What the shared flags say, checked against each other; nothing large is loaded yet (`load_params` does that)."""

    mesh: Mesh
    config: LlamaConfig
    compute: Compute
    tokenizer: Tokenizer
    template: PromptTemplate | None  # None when the checkpoint carries none
    add_bos_token: bool  # whether a prompt begins with bos

    def load_params(self, spec: str, seed: int) -> llama.Llama:
        """The weights of `--load_checkpoint`, or random ones from the seed where it is empty."""
        if not spec:
            return llama.init_params(self.config, self.mesh, seed)
        return load.load_params(spec, self.config, self.mesh)


def open_model(flags: ConfigDict, config: LlamaConfig | None = None, **compute: str) -> Model:
    """Reads the shared flags.  Raises Mistake, naming the flag and the remedy, before anything is compiled.

    config: sizes that flags of the caller state; None for those of --load_llama_config, else the checkpoint's own.
    compute: Compute's reduce_gradients, remat_block, remat_attention, remat_mlp.  The ids of bos and eos are always the
    tokenizer's.
    """
    start_processes(flags)
    keep_compilations()
    if jax.process_count() > processes.count():
        raise Mistake(f'this is one of {jax.process_count()} hosts of a slice: start the program on all of them '
                         'with --jax_distributed.initialize_jax_distributed=True')
    mesh = make_mesh(flags.mesh_dim)
    if config is None and flags.load_llama_config:
        config = named_config(flags.load_llama_config)
    tokenizer = load_tokenizer(flags.tokenizer.vocab_file) if flags.tokenizer.vocab_file else None
    template = None
    if flags.load_checkpoint:
        config = config or load.read_config(flags.load_checkpoint)
        tokenizer = tokenizer or load.read_tokenizer(flags.load_checkpoint)
        template = load.read_template(flags.load_checkpoint)
    if config is None:
        raise Mistake(f'load_checkpoint={flags.load_checkpoint!r} does not say the sizes of the model: '
                         'give them as --load_llama_config, for example 3b')
    if tokenizer is None:
        raise Mistake(f'load_checkpoint={flags.load_checkpoint!r} holds no tokenizer: give one as '
                         '--tokenizer.vocab_file')
    config = dataclasses.replace(config, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    if tokenizer.vocab_size > config.vocab_size and not flags.load_checkpoint:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise Mistake(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: ids '
                         f'{config.vocab_size}..{tokenizer.vocab_size - 1} would have no embedding; give the '
                         'tokenizer that belongs to the model as --tokenizer.vocab_file')
    llama.check_divisible(config, mesh)
    compute = Compute(flags.dtype, attention.resolve(flags.attention), **compute)
    return Model(mesh, config, compute, tokenizer, template, choose_bos(flags))


def choose_bos(flags: ConfigDict) -> bool:
    """--add_bos_token, which must not contradict the checkpoint; else what that says; else True (as EasyLM)."""
    given = flags.get('add_bos_token')
    trained = load.read_add_bos_token(flags.load_checkpoint) if flags.load_checkpoint else None
    if None not in (given, trained) and given != trained:
        raise Mistake(f'add_bos_token={given}, but load_checkpoint={flags.load_checkpoint!r} was trained with '
                         f'{trained}: leave --add_bos_token out')
    return next((value for value in (given, trained) if value is not None), True)


def describe(model: Model) -> str:
    """The first line of every program's log: platform, mesh, attention, parameters."""
    shape = ','.join(f'{axis}={size}' for axis, size in model.mesh.shape.items())
    parameters = sum(jax.tree.leaves(jax.tree.map(lambda x: x.size, llama.abstract_params(model.config, model.mesh))))
    devices = jax.devices()
    how = model.compute.attention + (' (interpreted)' if attention.interpreted(model.compute.attention) else '')
    hosts = f', {processes.count()} processes' if processes.count() > 1 else ''
    return (f'platform {devices[0].platform} ({devices[0].device_kind} x {len(devices)}{hosts}), mesh {shape}, '
            f'attention {how}, dtype {model.compute.dtype}, {parameters:,} parameters')


def keep_compilations() -> None:
    """Turns on JAX's persistent compilation cache in a private directory (it holds native code: mode 0700)."""
    cache = cache_directory() / 'compiled'
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache.chmod(0o700)
    jax.config.update('jax_compilation_cache_dir', str(cache))
