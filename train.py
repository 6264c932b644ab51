"""Fine-tune a LLaMA on text records: python train.py --config=configs/quickstart.py

Reads --load_checkpoint and --train_dataset, writes DIR/metrics.jsonl and DIR/step_N (checkpoints that serve.py,
evaluate.py and train.py load), or what EasyLM reads, where DIR is --logger.output_dir.  Several processes (hosts) train
together with --jax_distributed.initialize_jax_distributed=True; DIR must lie on a file system that all of them share.
"""
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from checkpoint import easylm_run, native
from checkpoint.source import describe as describe_checkpoint
from data.prompt import PromptTemplate
from hosts import processes
from hosts.start import failing_together, start_processes
from instruments.planning.compiled import CompiledStep
from instruments.planning.one_mesh import Setting
from mistake import Mistake
from program import flags, settings
from program.data import chat_template_of, continued, epoch_length, open_batches, read_template
from program.model import Model, describe, open_model
from program.parse import run as run_program
from program.settings import Dataset, Run
from training import loop
from training.evaluation import evaluator
from training.metrics import MetricsWriter
from training.optimizer import Hyperparameters
from training.state import TrainState, abstract_state, from_arrays, init_state, to_arrays


@failing_together()
def main(flags) -> None:
    began = time.perf_counter()

    # ------------------------------------------------ processes, and the place of the run
    start_processes(flags)
    run = settings.read_run(flags)
    native.check_shared(run.output_dir)
    resumed = find_step(run)

    # ------------------------------------------------ model
    load = settings.read_load(flags)
    model = open_model(load, settings.read_compute(flags))
    print(describe(model), flush=True)

    # ------------------------------------------------ data
    dataset, position = settings.read_dataset(flags, 'train_dataset'), None
    if run.load_dataset_state:
        dataset, position = continued(dataset, run.load_dataset_state)
    batches = open_batches(dataset, model.tokenizer, model.mesh, run.seed, model.source)
    template = read_template(dataset) or model.template
    total_steps = run.total_steps or run.epochs * epoch_length(batches)
    evaluate = open_evaluation(run, settings.read_dataset(flags, 'eval_dataset'), model)

    # ------------------------------------------------ state
    hyper, accumulate = settings.read_optimizer(flags, total_steps)
    easylm_state = not resumed and model.source is not None and model.source.kind == 'trainstate'
    start_step = resumed.number if resumed else model.source.step if easylm_state else 0
    if start_step >= total_steps:
        print(f'{run.output_dir if resumed else model.source.spec} holds the whole run already: {start_step} of '
              f'{total_steps} steps')
        return
    if resumed and 'optimizer.count' not in resumed.arrays:
        raise Mistake(f'{resumed.path} holds no optimizer state, so the run cannot be resumed: train with '
                      '--checkpointer.save_optimizer_state=True')
    write = checkpoint_writer(run, model, hyper, dataset, template, total_steps,
                              chat_template_of(batches, model.source))
    print(f'{total_steps} steps of {batches.batch_size} rows up to {batches.seq_length} tokens\n'
          f'prompt template: {template}', flush=True)
    state = load_state(resumed, easylm_state, model, hyper, accumulate, run.seed)
    if resumed:
        position = resumed.meta['data']
        print(f'resumed {resumed.path}', flush=True)
    if position:
        batches.restore(position)
    print(f'loaded in {time.perf_counter() - began:.1f} s', flush=True)

    # ------------------------------------------------ run
    run.output_dir.mkdir(parents=True, exist_ok=True)
    logs = processes.index() == 0 or run.log_all_worker
    writer = MetricsWriter(run.output_dir, resume_step=start_step, tensorboard=run.tensorboard,
                           wandb=run.wandb if logs else None, wandb_delay=run.random_delay,
                           process=processes.index(), enabled=logs)

    def save(state: TrainState, done: int) -> None:
        arrays = to_arrays(state, model.config)
        if not run.save_optimizer_state:
            arrays = {name: array for name, array in arrays.items() if name.startswith('params.')}
        tqdm.write(f'saved {write(arrays, done, batches.state())}')

    schedule = loop.Schedule(start_step, total_steps, run.log_freq, (run.save_model_freq, run.save_milestone_freq))
    step = CompiledStep(Setting(model.config, model.compute, hyper, accumulate, model.mesh, load.mesh_dim),
                        tqdm.write, wait_for_all, f'{dataset.flag}.batch_size')
    state = loop.train(state, batches, step, model.mesh, schedule, writer, data_position=lambda: batches.metrics,
                       save=save, evaluate=evaluate)
    save(state, total_steps)
    writer.close()
    print(f'wrote {writer.path}; trained in {time.perf_counter() - began:.1f} s\n'
          f'serve it: python serve.py {serving_flags(run, flags.tokenizer.vocab_file)}', flush=True)


def wait_for_all() -> None:
    """Wait until every process has come here."""
    processes.exchange('')


def find_step(run: Run) -> native.Step | None:
    """Open the step to continue from, None for a fresh run.  Refuses to mix two runs in one directory."""
    latest = native.latest_step(run.output_dir) if run.output_dir.exists() else None
    processes.refuse_difference('the newest step', str(latest), f'{run.output_dir} must lie on a file system that all '
                                'processes share')
    where = f'logger.output_dir={str(run.output_dir)!r} holds a run already'
    if latest is None:
        if found := sorted(run.output_dir.glob('streaming_*')):
            raise Mistake(f'{where} ({found[0].name}): choose another directory; a train state goes on with '
                          '--load_checkpoint=trainstate::FILE and --load_dataset_state=dataset.json')
        return None
    if not run.resume:
        raise Mistake(f'{where} (step {latest}): continue it with --resume=True, or choose another directory')
    return native.Step(run.output_dir, latest)


def open_evaluation(run: Run, dataset: Dataset, model: Model) -> Callable[[TrainState], dict] | None:
    """Open the first eval_steps batches of eval_dataset as training/evaluation.py wants them; None for 0."""
    if not run.eval_steps:
        return None
    batches = open_batches(dataset, model.tokenizer, model.mesh, run.seed, model.source)
    batches = list(islice(batches, run.eval_steps))
    return evaluator(batches, model.config, model.compute, model.mesh, wait_for_all)


def load_state(resumed: native.Step | None, easylm_state: bool, model: Model, hyper: Hyperparameters, accumulate: int,
               seed: int) -> TrainState:
    """Load the state to start from: the resumed run's, EasyLM's, or a fresh one around --load_checkpoint's weights."""
    if not resumed and not easylm_state:
        return init_state(model.load_params(seed), model.config, hyper, accumulate, model.mesh)
    like = abstract_state(model.config, hyper, accumulate, model.mesh)
    targets = to_arrays(like, model.config)
    arrays = resumed.restore(targets) if resumed else \
        model.source.load_train_state(model.config, targets, hyper.multiply_by_parameter_scale)
    if (begun := int(arrays['optimizer.micro_step'])) >= accumulate:
        raise Mistake(f'the state stands {begun} micro-steps after its last update, more than '
                      f'optimizer.accumulate_gradient_steps={accumulate} ever is: set the flag as it was')
    return from_arrays(arrays, like, model.config)


def checkpoint_writer(run: Run, model: Model, hyper: Hyperparameters, dataset: Dataset,
                      template: PromptTemplate | None, total_steps: int,
                      chat_template: str | None = None) -> Callable[[dict, int, dict], Path]:
    """Make the function (arrays, steps done, position in the data) -> path that writes a checkpoint.

    What the format cannot hold is refused here, not at the end of the run.
    """
    values = run.flags | dict(train_dataset=dataset.values)
    if run.format == 'native':
        if run.save_model_freq and not run.save_optimizer_state:
            print('WARNING: checkpointer.save_optimizer_state=False: the checkpoints of this run can be served, but it '
                  'cannot be resumed from them', flush=True)
        meta, files = describe_checkpoint(model.config, model.tokenizer, template,
                                          dataset.text_processor['add_bos_token'], chat_template)
        return lambda arrays, done, position: native.save(
            run.output_dir, done, arrays, meta | dict(data=position, flags=values), files, keep=run.keep,
            keep_every=run.save_milestone_freq)
    easylm_run.refuse(model.config, resume=run.resume, optimizer_state=run.save_optimizer_state,
                      float_dtype=run.float_dtype)

    def write(arrays: dict, done: int, position: dict) -> Path:  # the end of the run is never a milestone
        milestone = bool(run.save_milestone_freq) and done % run.save_milestone_freq == 0 and done < total_steps
        return easylm_run.save(run.output_dir, arrays, done, position, config=model.config, flags=values,
                               dataset=dataset.values, milestone=milestone, optimizer_state=run.save_optimizer_state,
                               parameter_scale=hyper.multiply_by_parameter_scale, float_dtype=run.float_dtype)

    return write


def serving_flags(run: Run, vocab_file: str) -> str:
    """Spell the flags with which serve.py serves what this run saved."""
    if run.format == 'native':
        return f'--load_checkpoint={run.output_dir}'
    tokenizer = f' --tokenizer.vocab_file={vocab_file}' if vocab_file else ''
    return easylm_run.loading_flags(run.output_dir, run.save_optimizer_state) + tokenizer


if __name__ == '__main__':
    run_program(main, flags.TRAIN)
