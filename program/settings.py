"""The flags, read once at the door into frozen dataclasses: what is below a program never sees the flags themselves.

  Load      what to load: weights, sizes, tokenizer, and the mesh to put them on
  Compute   how to compute (model/config.py)
  Dataset   what to read: train_dataset or eval_dataset
  Run       how to run: steps, checkpoints, logs
"""
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from mistake import Mistake
from model.config import Compute, LlamaConfig
from model.remat import remat_policy
from program import flags as tables
from program.parse import literals
from training.optimizer import AdamW, Hyperparameters, Palm

REMAT = ('remat_block', 'remat_attention', 'remat_mlp')


# ---------------------------------------------------------------- what to load, how to compute


@dataclass(frozen=True)
class Load:
    """What to load.

    checkpoint: TYPE::PATH, '' for random weights.  llama_config: name or json::FILE, '' for the checkpoint's own sizes.
    sizes: fields of LlamaConfig where neither says them; given: names of those that were set.  update: fields that are
    changed afterwards.
    """

    checkpoint: str
    llama_config: str
    vocab_file: str
    mesh_dim: str
    seed: int
    add_bos_token: bool | None = None
    sizes: dict = field(default_factory=dict)
    given: tuple[str, ...] = ()
    update: dict = field(default_factory=dict)


def read_load(flags: ConfigDict) -> Load:
    """Read --load_checkpoint and the like; raises Mistake for flags that contradict each other."""
    load = Load(flags.load_checkpoint, flags.load_llama_config, flags.tokenizer.vocab_file, flags.mesh_dim, flags.seed,
                flags.get('add_bos_token'))
    if 'llama' not in flags:
        return load
    ignored = {flag.name.removeprefix('llama.'): flag for flag in tables.LLAMA if flag.only}
    sizes = {name: value for name, value in flags.llama.items() if name not in (*ignored, *REMAT)}
    given = tuple(name for name, value in sizes.items() if value != getattr(LlamaConfig(), name))
    if given and load.llama_config:
        value = sizes[given[0]]
        raise Mistake(f'llama.{given[0]}={value!r} and load_llama_config={load.llama_config!r} both say it: use '
                      f'--update_llama_config="dict({given[0]}={value!r})"')
    update = literals('update_llama_config', flags.update_llama_config)
    for name in sorted(set(update) & set(ignored)):
        if update.pop(name) != ignored[name].default:
            raise Mistake(f'update_llama_config: {name} must stay {ignored[name].default!r}: {ignored[name].only}')
    update = {name: value for name, value in update.items() if name not in REMAT}
    return dataclasses.replace(load, sizes=sizes, given=given, update=update)


def read_compute(flags: ConfigDict) -> Compute:
    """Read how to compute; --update_llama_config may state the remat policies, as EasyLM's does."""
    if 'llama' not in flags:
        return Compute(flags.dtype, flags.attention)
    update = literals('update_llama_config', flags.update_llama_config)
    remat = {name: update.get(name, flags.llama[name]) for name in REMAT}
    for policy in filter(None, remat.values()):
        remat_policy(policy)  # raises for one that is not known
    return Compute(flags.dtype, flags.attention, flags.reduce_gradients, **remat,
                   label_smoothing=flags.get('label_smoothing', 0.0))


def read_optimizer(flags: ConfigDict, steps: int) -> tuple[Hyperparameters, int]:
    """Read (hyperparameters, accumulate_gradient_steps) for a run of `steps` micro-steps.

    lr_decay_steps=0 is the number of optimizer steps of the run, lr_warmup_ratio a part of it.
    """
    options, accumulate = flags.optimizer, flags.optimizer.accumulate_gradient_steps
    if options.type == 'palm':
        return Palm(**options.palm_optimizer.to_dict()), accumulate
    hyper, updates = options.adamw_optimizer.to_dict(), max(1, steps // accumulate)
    if (ratio := hyper.pop('lr_warmup_ratio')) > 0:
        hyper['lr_warmup_steps'] = int(ratio * updates)
    hyper['lr_decay_steps'] = hyper['lr_decay_steps'] or updates
    if hyper['end_lr'] > hyper['lr']:
        print(f'WARNING: optimizer.adamw_optimizer.end_lr={hyper["end_lr"]} is above lr={hyper["lr"]}: the learning '
              'rate will rise after the warmup; set --optimizer.adamw_optimizer.end_lr', flush=True)
    return AdamW(**hyper), accumulate


# ---------------------------------------------------------------- what to read


@dataclass(frozen=True)
class Dataset:
    """What to read.  name: 'train_dataset' or 'eval_dataset'; values: its flags, nested, as checkpoints keep them."""

    name: str
    values: dict

    @property
    def type(self) -> str:
        return self.values['type']

    @property
    def flag(self) -> str:
        """The group of flags in force, for messages."""
        return f'{self.name}.{self.type}_dataset'

    @property
    def text_processor(self) -> dict:
        return self.values['text_processor']

    @property
    def rows(self) -> dict:
        """The flags of that group: path, seq_length, batch_size, .."""
        return self.values[f'{self.type}_dataset']


def read_dataset(flags: ConfigDict, name: str) -> Dataset:
    """Read train_dataset's or eval_dataset's flags; what eval_dataset does not say is train_dataset's."""
    values = flags[name].to_dict()
    if name == 'eval_dataset':
        values = _inherited(values, flags.train_dataset.to_dict())
    return Dataset(name, values)


def _inherited(values: dict, parent: dict) -> dict:
    return {key: _inherited(value, parent[key]) if isinstance(value, dict) else
            parent[key] if value is None else value for key, value in values.items()}


# ---------------------------------------------------------------- how to run


@dataclass(frozen=True)
class Run:
    """How to run train.py; fields are flags of these names.

    output_dir: with experiment_id.  wandb: arguments of wandb.init, None without --logger.online; it is asked after up
    to random_delay seconds.  flags: all flags, nested, for the checkpoint's record.
    """

    output_dir: Path
    seed: int
    total_steps: int
    epochs: int
    log_freq: int
    log_all_worker: bool
    save_model_freq: int
    save_milestone_freq: int
    eval_steps: int
    resume: bool
    load_dataset_state: str
    format: str
    float_dtype: str
    save_optimizer_state: bool
    keep: int
    tensorboard: bool
    wandb: dict | None
    random_delay: float
    flags: dict


def read_run(flags: ConfigDict) -> Run:
    """Read how train.py is to run."""
    logger, keeper = flags.logger, flags.checkpointer
    own = ('seed', 'total_steps', 'epochs', 'log_freq', 'log_all_worker', 'save_model_freq', 'save_milestone_freq',
           'eval_steps', 'resume', 'load_dataset_state')
    name = _experiment_name(logger)
    output_dir = Path(logger.output_dir, name) if logger.experiment_id else Path(logger.output_dir)
    project = f'{logger.prefix}--{logger.project}' if logger.prefix and not logger.prefix_to_id else logger.project
    wandb = dict(project=project, id=name, entity=logger.entity, notes=logger.notes, anonymous=logger.anonymous,
                 dir=logger.wandb_dir or str(output_dir), config=flags.to_dict())
    return Run(output_dir=output_dir, **{key: flags[key] for key in own}, format=keeper.format,
               float_dtype=keeper.float_dtype, save_optimizer_state=keeper.save_optimizer_state, keep=keeper.keep,
               tensorboard=logger.tensorboard, random_delay=logger.random_delay, flags=flags.to_dict(),
               wandb={key: value for key, value in wandb.items() if value is not None} if logger.online else None)


def _experiment_name(logger: ConfigDict) -> str | None:
    """experiment_id, behind the prefix if that is its place; None leaves the choice to Weights & Biases."""
    if logger.prefix_to_id and not (logger.prefix and logger.experiment_id):
        raise Mistake(f'logger.prefix_to_id=True needs logger.prefix={logger.prefix!r} and '
                      f'logger.experiment_id={logger.experiment_id!r}: give both')
    return f'{logger.prefix}--{logger.experiment_id}' if logger.prefix_to_id else logger.experiment_id
