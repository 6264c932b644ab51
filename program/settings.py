"""The flags, read once at the door into frozen dataclasses: what is below a program never sees the flags themselves.

  Load      what to load: weights, sizes, tokenizer, and the mesh to put them on
  Compute   how to compute (model/config.py)
  Lora      which adapters to train beside frozen weights (model/lora.py)
  Dataset   what to read: train_dataset or eval_dataset
  Run       how to run: steps, evaluations, checkpoints, logs
"""
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from ml_collections import ConfigDict

from mistake import Mistake
from model.config import Compute, LlamaConfig
from model.lora import Lora
from model.remat import remat_policy
from program import flags as tables
from program.parse import literals
from training.best import METRICS
from training.optimizer import AdamW, Hyperparameters, Palm

REMAT = ('remat_block', 'remat_attention', 'remat_mlp')


# ---------------------------------------------------------------- what to load, how to compute


@dataclass(frozen=True)
class Load:
    """What to load.

    checkpoint: TYPE::PATH, '' for random weights.  adapter: directory of one that is merged in, '' for none.
    llama_config: name or json::FILE, '' for the checkpoint's own sizes.  sizes: fields of LlamaConfig where neither
    says them; given: names of those that were set.  update: fields that are changed afterwards.
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
    adapter: str = ''


def read_load(flags: ConfigDict) -> Load:
    """Read --load_checkpoint and the like; raises Mistake for flags that contradict each other."""
    load = Load(flags.load_checkpoint, flags.load_llama_config, flags.tokenizer.vocab_file, flags.mesh_dim, flags.seed,
                flags.get('add_bos_token'), adapter=flags.get('adapter', ''))
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


def read_lora(flags: ConfigDict, compute: Compute) -> Lora | None:
    """Read the adapters to train; None with --lora.rank=0, where no other of their flags may be set."""
    values = flags.lora.to_dict()
    if not values['rank']:
        for flag in tables.LORA:
            if (value := values[flag.name.removeprefix('lora.')]) != flag.default:
                raise Mistake(f'{flag.name}={value!r} has no effect where lora.rank=0 trains all weights: set '
                              '--lora.rank, for example to 16')
        return None
    return Lora(**values | dict(alpha=values['alpha'] or 2.0 * values['rank'],
                                targets=tuple(name.strip() for name in values['targets'].split(',')),
                                base_dtype=values['base_dtype'] or compute.dtype, seed=flags.get('seed', 0)))


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
class Evaluation:
    """What train.py evaluates on its way, and what follows; fields are flags of these names, or evaluate.NAME.

    every: micro-steps; epochs, where in_epochs.
    """

    every: Fraction
    in_epochs: bool
    input: str
    split: str
    text_field: str
    label_field: str
    sample_size: int
    batch_size: int
    task: str
    max_new_tokens: int
    keep_best: str
    patience: int

    def every_steps(self, epoch_length: Callable[[], Fraction]) -> Fraction:
        """Return micro-steps between two evaluations; epoch_length is only called where that is what counts."""
        steps = self.every * epoch_length() if self.in_epochs else self.every
        if steps < 1:
            raise Mistake(f'evaluate_every={float(self.every):g}epoch is less than a step: an epoch has '
                          f'{float(epoch_length()):.1f}')
        return steps


def read_evaluation(flags: ConfigDict) -> Evaluation | None:
    """Read --evaluate_every and what belongs to it, None without; raises Mistake for flags that contradict."""
    values, every = flags.evaluate.to_dict(), flags.evaluate_every
    defaults = {flag.name: flag.default for flag in tables.TRAIN}
    if not every:
        given = [(name, value) for name, value in {
            **{f'evaluate.{name}': value for name, value in values.items()}, 'keep_best': flags.keep_best,
            'patience': flags.patience}.items() if value != defaults[name]]
        if given:
            raise Mistake(f'{given[0][0]}={given[0][1]!r} has no effect without --evaluate_every: add '
                          '--evaluate_every=100 (micro-steps) or --evaluate_every=0.5epoch')
        return None
    match = re.fullmatch(r'(\d+)|(\d+|\d*\.\d+)epochs?', every)
    if not match or not (number := Fraction(match[1] or match[2])):
        raise Mistake(f'evaluate_every={every!r} must be a number of micro-steps, or a part of an epoch: '
                      '--evaluate_every=100, --evaluate_every=0.5epoch')
    if not values['input']:
        raise Mistake(f'evaluate_every={every!r} needs --evaluate.input: a labelled set, as evaluate.py takes it')
    foreign = ('text_field', 'label_field') if values['task'] == 'text' else ('max_new_tokens',)
    for name in foreign:
        if values[name] != defaults[f'evaluate.{name}']:
            raise Mistake(f'evaluate.{name}={values[name]!r} has no effect with evaluate.task={values["task"]}: leave '
                          'it out')
    if flags.patience and not flags.keep_best:
        raise Mistake(f'patience={flags.patience} needs --keep_best, which says what shall get better, for example '
                      'accuracy')
    known = [name for name, row in METRICS.items() if row.startswith(values['task'])]
    if flags.keep_best and flags.keep_best not in known:
        raise Mistake(f'keep_best={flags.keep_best!r} is not measured with evaluate.task={values["task"]}: choose '
                      f'{", ".join(known)}, or another --evaluate.task')
    if flags.keep_best and flags.checkpointer.format != 'native':
        raise Mistake(f'keep_best={flags.keep_best!r} needs --checkpointer.format=native: of format=easylm the next '
                      'checkpoint is written over the best')
    return Evaluation(number, not match[1], **values, keep_best=flags.keep_best, patience=flags.patience)


def read_profile(text: str, total_steps: int) -> range | None:
    """Read --profile_steps of a run of `total_steps`, None where it is empty."""
    if not text:
        return None
    match = re.fullmatch(r'(\d+):(\d+)', text)
    steps = match and range(int(match[1]), int(match[2]))
    if not steps or steps[-1] >= total_steps:
        raise Mistake(f'profile_steps={text!r} must be FIRST:END, micro-steps FIRST to END - 1 of the run, which has '
                      f'{total_steps}: --profile_steps=10:15')
    return steps


@dataclass(frozen=True)
class Run:
    """How to run train.py; fields are flags of these names.

    output_dir: with experiment_id.  evaluation: None for none.  wandb: arguments of wandb.init, None without
    --logger.online; it is asked after up to random_delay seconds.  flags: all flags, nested, for the checkpoint's
    record.
    """

    output_dir: Path
    evaluation: Evaluation | None
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
    return Run(output_dir=output_dir, evaluation=read_evaluation(flags), **{key: flags[key] for key in own},
               format=keeper.format, float_dtype=keeper.float_dtype, save_optimizer_state=keeper.save_optimizer_state,
               keep=keeper.keep, tensorboard=logger.tensorboard, random_delay=logger.random_delay,
               flags=flags.to_dict(),
               wandb={key: value for key, value in wandb.items() if value is not None} if logger.online else None)


def _experiment_name(logger: ConfigDict) -> str | None:
    """experiment_id, behind the prefix if that is its place; None leaves the choice to Weights & Biases."""
    if logger.prefix_to_id and not (logger.prefix and logger.experiment_id):
        raise Mistake(f'logger.prefix_to_id=True needs logger.prefix={logger.prefix!r} and '
                      f'logger.experiment_id={logger.experiment_id!r}: give both')
    return f'{logger.prefix}--{logger.experiment_id}' if logger.prefix_to_id else logger.experiment_id
