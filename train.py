"""Trains (fine-tunes) a LLaMA on text records: python train.py --config=configs/quickstart.py

Reads --load_checkpoint and --train_dataset.json_dataset.path, writes DIR/metrics.jsonl and DIR/step_N (checkpoints that
serve.py, evaluate.py and train.py load) where DIR is --logger.output_dir.
"""
import json
import pathlib
import time

import jax
from jax.sharding import NamedSharding

import flags
import wiring
from checkpoint import load, native
from data.batches import PackedStream, Rows
from data.prompt import PromptTemplate
from data.records import RecordReader, TextProcessor
from model.llama import abstract_params
from training import loop, step
from training.metrics import MetricsWriter
from training.optimizer import AdamW, OptimizerState


def main(config) -> None:
    began = time.perf_counter()
    output_dir = pathlib.Path(config.logger.output_dir)
    resume_step = find_resume_step(config, output_dir)
    model = wiring.open_model(config, config.remat)
    print(wiring.describe(model), flush=True)
    check_batch(config, model)
    batches = open_batches(config.train_dataset, 'train_dataset', model.tokenizer, config.seed)
    total_steps = config.total_steps or config.epochs * epoch_length(batches)
    if resume_step >= total_steps:
        print(f'{output_dir} holds the whole run already: {resume_step} steps')
        return
    check_resumable(output_dir, resume_step)
    hyper = read_hyperparameters(config.optimizer, total_steps)
    accumulate = config.optimizer.accumulate_gradient_steps
    template = template_of(config.train_dataset.json_dataset.path) or model.template
    print(f'{total_steps} steps of {config.train_dataset.json_dataset.batch_size} rows up to '
          f'{config.train_dataset.json_dataset.seq_length} tokens; prompt template: {template}', flush=True)

    state = load_state(config, model, hyper, accumulate, output_dir, resume_step)
    if resume_step:
        batches.restore(native.read_meta(output_dir, resume_step)['data'])
        print(f'resumed {native.step_directory(output_dir, resume_step)}', flush=True)
    print(f'loaded in {time.perf_counter() - began:.1f} s', flush=True)

    output_dir.mkdir(parents=True, exist_ok=True)
    writer = MetricsWriter(output_dir, resume_step=resume_step, tensorboard=config.logger.tensorboard,
                           wandb=dict(project=config.logger.project, config=config.to_dict(), dir=str(output_dir))
                           if config.logger.online else None)

    def save(state: step.TrainState, done: int) -> None:
        if done == resume_step:
            return
        arrays = load.by_name(state.params, model.config, 'params')
        if config.checkpointer.save_optimizer_state:
            arrays |= state_by_name(state, model.config)
        meta, files = load.describe(model.config, model.tokenizer, template,
                                    config.train_dataset.text_processor.add_bos_token)
        meta |= dict(data=batches.state(), flags=config.to_dict())
        path = native.save(output_dir, done, arrays, meta, files, keep=config.checkpointer.keep)
        print(f'\nsaved {path}', flush=True)

    schedule = loop.Schedule(resume_step, total_steps, config.log_freq, config.save_model_freq)
    jitted = step.make_train_step(model.config, model.compute, hyper, accumulate, model.mesh)
    state = loop.train(state, batches, jitted, model.mesh, schedule, writer, data_position=lambda: batches.metrics,
                       save=save, evaluate=evaluation(config, model))
    save(state, total_steps)
    writer.close()
    print(f'wrote {writer.path}; trained in {time.perf_counter() - began:.1f} s\n'
          f'serve it: python serve.py --load_checkpoint={output_dir}', flush=True)


# ---------------------------------------------------------------- flags -> parts


def read_hyperparameters(options, total_steps: int) -> AdamW:
    """The optimizer's hyperparameters; lr_decay_steps=0 means the number of optimizer steps of this run."""
    if options.accumulate_gradient_steps < 1:
        raise ValueError(f'optimizer.accumulate_gradient_steps={options.accumulate_gradient_steps} must be at least 1')
    hyper = options.adamw_optimizer.to_dict()
    hyper['lr_decay_steps'] = hyper['lr_decay_steps'] or max(1, total_steps // options.accumulate_gradient_steps)
    if hyper['end_lr'] > hyper['lr']:
        print(f'WARNING: optimizer.adamw_optimizer.end_lr={hyper["end_lr"]} is above lr={hyper["lr"]}: the learning '
              'rate will rise after the warmup; set --optimizer.adamw_optimizer.end_lr', flush=True)
    return AdamW(**hyper)


def check_batch(config, model: wiring.Model) -> None:
    rows, devices = config.train_dataset.json_dataset.batch_size, model.mesh.shape['dp'] * model.mesh.shape['fsdp']
    if rows % devices:
        raise ValueError(f'train_dataset.json_dataset.batch_size={rows} must be divisible by dp*fsdp={devices} of '
                         f'mesh_dim={config.mesh_dim!r}')


def open_batches(options, name: str, tokenizer, seed: int) -> PackedStream | Rows:
    """The batches of `train_dataset` or `eval_dataset` (`name`), as its flags say."""
    text, rows = options.text_processor, options.json_dataset
    if not rows.path:
        raise ValueError(f'{name}.json_dataset.path is empty: name a file of JSON lines (prepare_data.py writes them)')
    processor = TextProcessor(tokenizer=tokenizer, **text.to_dict())
    reader = RecordReader(rows.path, processor, skip_bad_lines=rows.skip_bad_lines, flag=f'{name}.json_dataset')
    sizes = dict(seq_length=rows.seq_length, batch_size=rows.batch_size)
    if rows.batching == 'stream':
        return PackedStream(reader, always_start_with_bos=rows.always_start_with_bos, **sizes)
    batches = Rows(reader, seed=seed, too_long=rows.too_long, **sizes)
    print(f'{name}: {batches.counts}, {batches.batches_per_epoch} batches an epoch, {batches.fill:.0%} of the '
          f'positions hold tokens, shapes (T, P) {batches.shapes}', flush=True)
    return batches


def epoch_length(batches) -> int:
    if isinstance(batches, PackedStream):
        raise ValueError('total_steps=0 needs --train_dataset.json_dataset.batching=rows: a stream has no epochs')
    return batches.batches_per_epoch


def template_of(records: str) -> PromptTemplate | None:
    """The template that prepare_data.py noted beside the records it wrote, in labels_NAME.json; None without it."""
    path = pathlib.Path(records)
    labels = path.with_name(f'labels_{path.stem}.json')
    if not labels.is_file():
        return None
    return PromptTemplate.from_dict(json.loads(labels.read_text(encoding='utf-8'))['template'], source=str(labels))


def evaluation(config, model: wiring.Model):
    """None, or the function state -> {eval_loss, eval_accuracy} over the first eval_steps batches of eval_dataset."""
    if not config.eval_steps:
        return None
    stream = open_batches(config.eval_dataset, 'eval_dataset', model.tokenizer, config.seed)
    held_out = [loop.put(next(stream), model.mesh) for _ in range(config.eval_steps)]
    eval_step = step.make_eval_step(model.config, model.compute, model.mesh)

    def evaluate(state: step.TrainState) -> dict:
        rows = [eval_step(state.params, batch) for batch in held_out]
        return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}

    return evaluate


# ---------------------------------------------------------------- state <-> checkpoint


def find_resume_step(config, output_dir: pathlib.Path) -> int:
    """The step to continue from, 0 for a fresh run.  Refuses to mix two runs in one directory."""
    latest = native.latest_step(output_dir) if output_dir.exists() else None
    if latest is None:
        return 0
    if not config.resume:
        raise ValueError(f'logger.output_dir={str(output_dir)!r} holds a run already (step {latest}): continue it with '
                         '--resume=True, or choose another directory')
    return latest


def check_resumable(output_dir: pathlib.Path, latest: int) -> None:
    if latest and 'optimizer.count' not in native.read_manifest(output_dir, latest)['arrays']:
        raise ValueError(f'{native.step_directory(output_dir, latest)} holds no optimizer state, so the run cannot be '
                         'resumed: train with --checkpointer.save_optimizer_state=True')


def state_by_name(state: step.TrainState, model_config) -> dict:
    """What a checkpoint holds beside the weights: {name: array}."""
    arrays = {'optimizer.count': state.optimizer.count, 'optimizer.micro_step': state.micro_step}
    for name, tree in (('momentum', state.optimizer.momentum), ('second_moment', state.optimizer.second_moment),
                       ('mean_gradient', state.mean_gradient)):
        arrays |= load.by_name(tree, model_config, name) if tree is not None else {}
    return arrays


def load_state(config, model: wiring.Model, hyper: AdamW, accumulate: int, output_dir: pathlib.Path,
               resume_step: int) -> step.TrainState:
    """The state to start from: the resumed run's, or a fresh one around --load_checkpoint's weights."""
    fresh = lambda params: step.init_state(params, model.config, hyper, accumulate, model.mesh)
    if not resume_step:
        return fresh(model.load_params(config.load_checkpoint, config.seed))
    weights = abstract_params(model.config, model.mesh)
    shardings = jax.tree.map(lambda partition: NamedSharding(model.mesh, partition),
                             step.state_partitions(model.config, accumulate))
    like = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                        jax.eval_shape(fresh, weights), shardings)
    targets = load.by_name(like.params, model.config, 'params') | state_by_name(like, model.config)
    arrays = native.restore(output_dir, resume_step, targets)
    tree = lambda name: jax.tree.unflatten(jax.tree.structure(weights),
                                           [arrays[key] for key in load.by_name(weights, model.config, name)])
    return step.TrainState(
        tree('params'), OptimizerState(arrays['optimizer.count'], tree('momentum'), tree('second_moment')),
        arrays['optimizer.micro_step'], tree('mean_gradient') if accumulate > 1 else None)


if __name__ == '__main__':
    flags.run(main, flags.TRAIN)
