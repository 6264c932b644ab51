"""Trains (fine-tunes) a LLaMA on text records: python train.py --config=configs/quickstart.py

Reads --load_checkpoint and --train_dataset, writes DIR/metrics.jsonl and DIR/step_N (checkpoints that serve.py,
evaluate.py and train.py load), or what EasyLM reads, where DIR is --logger.output_dir.  Several processes (hosts) train
together with --jax_distributed.initialize_jax_distributed=True; DIR must lie on a file system that all of them share.
"""
import json
import pathlib
import random
import time

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from checkpoint import Source, easylm_run, native
from checkpoint.source import describe, read_run
from data.batches import PackedStream, Rows, read_dataset_state
from data.huggingface import HuggingfaceReader
from data.prompt import PromptTemplate
from data.records import RecordReader
from data.text_processor import TextProcessor
from hosts import processes, start
from instruments.planning.compiled import CompiledStep
from instruments.planning.plan import Setting
from mistake import Mistake
from model import llama
from model.config import LlamaConfig, named_config, updated
from program import flags
from program import model as wiring
from training import loop, step
from training.metrics import MetricsWriter
from training.optimizer import AdamW, Hyperparameters, OptimizerState, Palm


@start.failing_together()
def main(config) -> None:
    began = time.perf_counter()
    start.start_processes(config)
    output_dir = run_directory(config.logger)
    native.check_shared(output_dir)
    resume_step = find_resume_step(config, output_dir)
    processes.refuse_difference('the newest step', str(resume_step), f'{output_dir} must lie on a file system that '
                                'all processes share')
    source = wiring.open_source(config)
    sizes, remat = model_flags(config, source)
    model = wiring.open_model(config, sizes, source, reduce_gradients=config.reduce_gradients, **remat)
    print(wiring.describe(model), flush=True)
    dataset, position = dataset_flags(config)
    batches = open_batches(dataset, 'train_dataset', model, config.seed)
    total_steps = config.total_steps or config.epochs * epoch_length(batches)
    start_step = resume_step or (source.step if resumes_easylm(config) else 0)
    if start_step >= total_steps:
        print(f'{output_dir if resume_step else config.load_checkpoint} holds the whole run already: '
              f'{start_step} of {total_steps} steps')
        return
    check_resumable(output_dir, resume_step)
    hyper = read_hyperparameters(config.optimizer, total_steps)
    accumulate = config.optimizer.accumulate_gradient_steps
    template = template_of(dataset) or model.template
    save_arrays = saver(config, model, hyper, output_dir, dataset, template, total_steps)
    rows, length = batches.batch_size, batches.seq_length
    print(f'{total_steps} steps of {rows} rows up to {length} tokens; prompt template: {template}', flush=True)

    state = load_state(config, model, hyper, accumulate, output_dir, resume_step)
    if resume_step:
        position = native.Step(output_dir, resume_step).meta['data']
        print(f'resumed {native.step_directory(output_dir, resume_step)}', flush=True)
    if position:
        batches.restore(position)
    print(f'loaded in {time.perf_counter() - began:.1f} s', flush=True)

    output_dir.mkdir(parents=True, exist_ok=True)
    logs = processes.index() == 0 or config.log_all_worker
    writer = MetricsWriter(output_dir, resume_step=start_step, tensorboard=config.logger.tensorboard,
                           wandb=wandb_options(config, output_dir) if config.logger.online and logs else None,
                           process=processes.index(), enabled=logs)

    def save(state: step.TrainState, done: int) -> None:
        if done == start_step:
            return
        arrays = llama.by_name(state.params, model.config, 'params')
        if config.checkpointer.save_optimizer_state:
            arrays |= state_by_name(state, model.config)
        print(f'\nsaved {save_arrays(arrays, done, batches.state())}', flush=True)

    schedule = loop.Schedule(start_step, total_steps, config.log_freq,
                             (config.save_model_freq, config.save_milestone_freq))
    setting = Setting(model.config, model.compute, hyper, accumulate, model.mesh)
    compiled = CompiledStep(setting, tqdm.write, wait_for_all)
    state = loop.train(state, batches, compiled, model.mesh, schedule, writer, data_position=lambda: batches.metrics,
                       save=save, evaluate=evaluation(config, model))
    save(state, total_steps)
    writer.close()
    print(f'wrote {writer.path}; trained in {time.perf_counter() - began:.1f} s\n'
          f'serve it: python serve.py {serving_flags(config, output_dir)}', flush=True)


# ---------------------------------------------------------------- flags -> parts


def model_flags(config, source: Source | None = None) -> tuple[LlamaConfig, dict[str, str]]:
    """What the flags say of the model: its sizes, and Compute's remat fields.

    Sizes are those of --load_llama_config, else those that the checkpoint states, else the llama flags; upon them
    comes --update_llama_config.
    """
    sizes = config.llama.to_dict()
    remat = {name: sizes.pop(name) for name in ('remat_block', 'remat_attention', 'remat_mlp')}
    only = {flag.name.removeprefix('llama.'): flag for flag in flags.LLAMA if flag.only}
    sizes = {name: value for name, value in sizes.items() if name not in only}
    changed = [name for name, value in sizes.items() if value != getattr(LlamaConfig(), name)]
    if changed and config.load_llama_config:
        raise Mistake(f'llama.{changed[0]}={sizes[changed[0]]!r} and load_llama_config={config.load_llama_config!r} '
                         f'both say it: use --update_llama_config="dict({changed[0]}={sizes[changed[0]]!r})"')
    if config.load_llama_config:
        stated = named_config(config.load_llama_config)
    else:
        own = source.config if source and not changed else None
        stated = own or LlamaConfig(**sizes)
    update = flags.literals('update_llama_config', config.update_llama_config)
    for name in sorted(set(update) & set(only)):
        if update.pop(name) != only[name].default:
            raise Mistake(f'update_llama_config: {name} must stay {only[name].default!r}: {only[name].only}')
    for name in sorted(set(update) & set(remat)):
        remat[name] = update.pop(name)
    for policy in filter(None, remat.values()):
        llama.remat_policy(policy)  # raises for one that is not known
    return updated(stated, update, source='update_llama_config'), remat


def run_directory(logger) -> pathlib.Path:
    """Where the run writes: output_dir, and below it experiment_id if one is given."""
    directory = pathlib.Path(logger.output_dir)
    return directory / experiment_name(logger) if logger.experiment_id else directory


def experiment_name(logger) -> str | None:
    """experiment_id, behind the prefix if that is its place; None leaves the choice to Weights & Biases."""
    if logger.prefix_to_id and not (logger.prefix and logger.experiment_id):
        raise Mistake(f'logger.prefix_to_id=True needs logger.prefix={logger.prefix!r} and '
                         f'logger.experiment_id={logger.experiment_id!r}: give both')
    return f'{logger.prefix}--{logger.experiment_id}' if logger.prefix_to_id else logger.experiment_id


def wandb_options(config, output_dir: pathlib.Path) -> dict:
    """The arguments of wandb.init.  Flags keep their dotted names, so none hides another of the same last part."""
    logger = config.logger
    project = f'{logger.prefix}--{logger.project}' if logger.prefix and not logger.prefix_to_id else logger.project
    name = experiment_name(logger)
    if name and processes.index():
        name += f'-{processes.index()}'
    options = dict(project=project, id=name, entity=logger.entity, notes=logger.notes,
                   anonymous=logger.anonymous, dir=logger.wandb_dir or str(output_dir), config=config.to_dict())
    pathlib.Path(options['dir']).mkdir(parents=True, exist_ok=True)
    time.sleep(random.uniform(0, logger.random_delay))
    return {name: value for name, value in options.items() if value is not None}


def read_hyperparameters(options, total_steps: int) -> Hyperparameters:
    """The optimizer's hyperparameters; lr_decay_steps=0 means the number of optimizer steps of this run."""
    if options.accumulate_gradient_steps < 1:
        raise Mistake(f'optimizer.accumulate_gradient_steps={options.accumulate_gradient_steps} must be at least 1')
    if options.type == 'palm':
        return Palm(**options.palm_optimizer.to_dict())
    hyper = options.adamw_optimizer.to_dict()
    hyper['lr_decay_steps'] = hyper['lr_decay_steps'] or max(1, total_steps // options.accumulate_gradient_steps)
    if hyper['end_lr'] > hyper['lr']:
        print(f'WARNING: optimizer.adamw_optimizer.end_lr={hyper["end_lr"]} is above lr={hyper["lr"]}: the learning '
              'rate will rise after the warmup; set --optimizer.adamw_optimizer.end_lr', flush=True)
    return AdamW(**hyper)


def dataset_flags(config) -> tuple[ConfigDict, dict | None]:
    """The flags of train_dataset, and the position at which to begin: both from --load_dataset_state if that is given.

    Raises Mistake for a file that is no dataset state, pickles (EasyLM's dataset.pkl) by name.
    """
    path = config.load_dataset_state
    if not path:
        return config.train_dataset, None
    if pathlib.Path(path).is_dir():
        saved_flags, position = read_run(path)
        saved = dict(dataset=saved_flags['train_dataset'], state=position)
    else:
        saved = read_dataset_state(path)
    dataset = config.train_dataset.copy_and_resolve_references()
    try:
        dataset.update(saved['dataset'])
    except (KeyError, TypeError, AttributeError) as error:
        raise Mistake(f'load_dataset_state={path!r}: its flags are none of train_dataset ({error}); begin the data '
                         'anew, or give the position as --train_dataset.json_dataset.start_seek_loc and its like') \
            from None
    print(f'load_dataset_state={path!r} replaces the train_dataset flags', flush=True)
    return dataset, saved['state']


def open_batches(options, name: str, model: wiring.Model, seed: int) -> PackedStream | Rows:
    """The batches of `train_dataset` or `eval_dataset` (`name`), as its flags say."""
    kind = f'{options.type}_dataset'
    rows, flag = options[kind], f'{name}.{kind}'
    check_batch(rows.batch_size, flag, model)
    processor = TextProcessor(tokenizer=model.tokenizer, **options.text_processor.to_dict())
    if options.type == 'huggingface':
        if options.json_dataset.path:
            raise Mistake(f"{name}.json_dataset.path={options.json_dataset.path!r}, but {name}.type='huggingface': "
                             f"add --{name}.type=json")
        reader = HuggingfaceReader(rows.path, rows.name, rows.split, rows.streaming, processor,
                                   skip_bad_lines=rows.skip_bad_lines, flag=flag)
        more = {}
    else:
        if not rows.path:
            raise Mistake(f'{flag}.path is empty: name a file of JSON lines (prepare_data.py writes them)')
        reader = RecordReader(rows.path, processor, skip_bad_lines=rows.skip_bad_lines, flag=flag,
                              processes=rows.tokenizer_processes, chunk_size=rows.tokenizer_parallel_chunk_size,
                              batch_size=rows.tokenizer_parallel_batch_size)
        more = {key: rows[key] for key in ('start_seek_loc', 'example_index_at_start', 'tokens_count_at_start',
                                           'throughput_average_window_size')}
    sizes = dict(seq_length=rows.seq_length, batch_size=rows.batch_size) | more
    if rows.batching == 'stream':
        return PackedStream(reader, always_start_with_bos=rows.always_start_with_bos, **sizes)
    batches = Rows(reader, seed=seed, too_long=rows.too_long, **sizes)
    print(f'{name}: {batches.counts}, {batches.batches_per_epoch} batches an epoch, {batches.fill:.0%} of the '
          f'positions hold tokens, shapes (T, P) {batches.shapes}', flush=True)
    return batches


def check_batch(batch_size: int, flag: str, model: wiring.Model) -> None:
    devices = model.mesh.shape['dp'] * model.mesh.shape['fsdp']
    if batch_size % devices:
        raise Mistake(f'{flag}.{batch_size=} must be divisible by dp*fsdp={devices} of the mesh '
                         f'{dict(model.mesh.shape)}: change it or --mesh_dim')


def epoch_length(batches) -> int:
    if isinstance(batches, PackedStream):
        raise Mistake('total_steps=0 needs --train_dataset.json_dataset.batching=rows: a stream has no epochs')
    return batches.batches_per_epoch


def template_of(dataset) -> PromptTemplate | None:
    """The template that prepare_data.py noted beside the records it wrote, in labels_NAME.json; None without it."""
    if dataset.type != 'json':
        return None
    path = pathlib.Path(dataset.json_dataset.path)
    labels = path.with_name(f'labels_{path.stem}.json')
    if not labels.is_file():
        return None
    return PromptTemplate.from_dict(json.loads(labels.read_text(encoding='utf-8'))['template'], source=str(labels))


def evaluation(config, model: wiring.Model):
    """None, or the function state -> {eval_loss, eval_accuracy} over the first eval_steps batches of eval_dataset."""
    if not config.eval_steps:
        return None
    stream = open_batches(config.eval_dataset, 'eval_dataset', model, config.seed)
    held_out = [loop.put(next(stream), model.mesh) for _ in range(config.eval_steps)]
    eval_step, programs = step.make_eval_step(model.config, model.compute, model.mesh), {}

    def evaluate(state: step.TrainState) -> dict:
        for batch in held_out:
            if (shape := batch.tokens_BT.shape) not in programs:
                programs[shape] = eval_step.lower(state.params, batch).compile()
                wait_for_all()
        rows = [programs[batch.tokens_BT.shape](state.params, batch) for batch in held_out]
        return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}

    return evaluate


def wait_for_all() -> None:
    processes.exchange('')


# ---------------------------------------------------------------- state <-> checkpoint


def find_resume_step(config, output_dir: pathlib.Path) -> int:
    """The step to continue from, 0 for a fresh run.  Refuses to mix two runs in one directory."""
    latest = native.latest_step(output_dir) if output_dir.exists() else None
    if latest is None:
        if found := sorted(output_dir.glob('streaming_*')):
            raise Mistake(f'logger.output_dir={str(output_dir)!r} holds a run already ({found[0].name}): choose '
                             'another directory; a train state goes on with --load_checkpoint=trainstate::FILE and '
                             '--load_dataset_state=dataset.json')
        return 0
    if not config.resume:
        raise Mistake(f'logger.output_dir={str(output_dir)!r} holds a run already (step {latest}): continue it with '
                         '--resume=True, or choose another directory')
    return latest


def resumes_easylm(config) -> bool:
    return config.load_checkpoint.startswith('trainstate::')


def check_resumable(output_dir: pathlib.Path, latest: int) -> None:
    if latest and 'optimizer.count' not in native.Step(output_dir, latest).arrays:
        raise Mistake(f'{native.step_directory(output_dir, latest)} holds no optimizer state, so the run cannot be '
                         'resumed: train with --checkpointer.save_optimizer_state=True')


def state_by_name(state: step.TrainState, model_config) -> dict:
    """What a checkpoint holds beside the weights: {name: array}."""
    arrays = {'optimizer.count': state.optimizer.count, 'optimizer.micro_step': state.micro_step}
    for name, tree in (('momentum', state.optimizer.momentum), ('second_moment', state.optimizer.second_moment),
                       ('mean_gradient', state.mean_gradient)):
        arrays |= llama.by_name(tree, model_config, name) if tree is not None else {}
    return arrays


def load_state(config, model: wiring.Model, hyper: Hyperparameters, accumulate: int, output_dir: pathlib.Path,
               resume_step: int) -> step.TrainState:
    """The state to start from: the resumed run's, or a fresh one around --load_checkpoint's weights."""
    fresh = lambda params: step.init_state(params, model.config, hyper, accumulate, model.mesh)
    if not resume_step and not resumes_easylm(config):
        return fresh(model.load_params(config.seed))
    like = step.abstract_state(model.config, hyper, accumulate, model.mesh)
    targets = llama.by_name(like.params, model.config, 'params') | state_by_name(like, model.config)
    if resume_step:
        arrays = native.Step(output_dir, resume_step).restore(targets)
    else:
        arrays = model.source.load_train_state(model.config, targets, hyper.multiply_by_parameter_scale)
    if (begun := int(arrays['optimizer.micro_step'])) >= accumulate:
        raise Mistake(f'the state stands {begun} micro-steps after its last update, more than '
                         f'optimizer.accumulate_gradient_steps={accumulate} ever is: set the flag as it was')
    tree = lambda name: jax.tree.unflatten(jax.tree.structure(like.params),
                                           [arrays[key] for key in llama.by_name(like.params, model.config, name)])
    return step.TrainState(
        tree('params'), OptimizerState(arrays['optimizer.count'], tree('momentum'), tree('second_moment')),
        arrays['optimizer.micro_step'], tree('mean_gradient') if accumulate > 1 else None)


def saver(config, model: wiring.Model, hyper: Hyperparameters, output_dir: pathlib.Path, dataset,
          template: PromptTemplate | None, total_steps: int):
    """The function (arrays, steps done, position in the data) -> path that writes a checkpoint in the format asked for.

    What the format cannot hold is refused here, not at the end of the run.
    """
    flag_values = config.to_dict() | dict(train_dataset=dataset.to_dict())
    if config.checkpointer.format == 'native':
        meta, files = describe(model.config, model.tokenizer, template, dataset.text_processor.add_bos_token)
        return lambda arrays, done, position: native.save(
            output_dir, done, arrays, meta | dict(data=position, flags=flag_values), files,
            keep=config.checkpointer.keep, keep_every=config.save_milestone_freq)
    written = dict(optimizer_state=config.checkpointer.save_optimizer_state,
                   float_dtype=config.checkpointer.float_dtype)
    easylm_run.refuse(model.config, resume=config.resume, **written)

    def save_easylm(arrays: dict, done: int, position: dict) -> pathlib.Path:  # the run's end is never a milestone
        milestone = config.save_milestone_freq and done % config.save_milestone_freq == 0 and done < total_steps
        return easylm_run.save(output_dir, arrays, done, position, config=model.config, flags=flag_values,
                               dataset=dataset.to_dict(), milestone=bool(milestone),
                               parameter_scale=hyper.multiply_by_parameter_scale, **written)

    return save_easylm


def serving_flags(config, output_dir: pathlib.Path) -> str:
    """What serve.py needs to serve what this run saved."""
    if config.checkpointer.format == 'native':
        return f'--load_checkpoint={output_dir}'
    tokenizer = config.tokenizer.vocab_file and f' --tokenizer.vocab_file={config.tokenizer.vocab_file}'
    return easylm_run.loading_flags(output_dir, config.checkpointer.save_optimizer_state) + tokenizer


if __name__ == '__main__':
    flags.run(main, flags.TRAIN)
