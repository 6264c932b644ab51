"""Fine-tune a LLaMA on text records: python train.py --config=configs/quickstart.py

Reads --load_checkpoint and --train_dataset, writes DIR/metrics.jsonl and DIR/step_N (checkpoints that serve.py,
evaluate.py and train.py load), or what EasyLM reads, where DIR is --logger.output_dir.  With --evaluate_every it
evaluates a labelled set on its way, keeps the best checkpoint (--keep_best) and stops when nothing gets better
(--patience).  Several processes (hosts) train together with --jax_distributed.initialize_jax_distributed=True; DIR must
lie on a file system that all of them share.
"""
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import jax
from tqdm import tqdm

from checkpoint import easylm_run, native
from checkpoint.source import describe as describe_checkpoint
from data.batches import Batch
from data.prompt import PromptTemplate
from hosts import processes
from hosts.start import failing_together, start_processes
from instruments.planning.compiled import CompiledStep
from instruments.planning.one_mesh import Setting
from instruments.tpu import chips
from mistake import Mistake
from model.lora import Lora, adapted, adapter_specs
from model.weights import Llama, init_weights, weight_specs
from program import flags, settings
from program.data import chat_template_of, continued, epoch_length, open_batches, read_template
from program.evaluation import open_labelled, open_texts
from program.model import Model, describe, open_model
from program.parse import run as run_program
from program.settings import Dataset, Run
from training import loop
from training.best import Best
from training.evaluation import evaluator
from training.flops import step_flops
from training.metrics import MetricsWriter
from training.optimizer import Hyperparameters
from training.profile import Trace
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
    load, compute = settings.read_load(flags), settings.read_compute(flags)
    lora = settings.read_lora(flags, compute)
    model = open_model(load, compute)
    print(describe(model), flush=True)
    if lora:
        print(describe_adapters(lora, model), flush=True)

    # ------------------------------------------------ data
    dataset, position = settings.read_dataset(flags, 'train_dataset'), None
    if run.load_dataset_state:
        dataset, position = continued(dataset, run.load_dataset_state)
    batches = open_batches(dataset, model.tokenizer, model.mesh, run.seed, model.source)
    template = read_template(dataset) or model.template
    epoch = functools.cache(lambda: epoch_length(batches, dataset))
    total_steps = run.total_steps or math.ceil(run.epochs * epoch())
    evaluate = open_evaluation(run, settings.read_dataset(flags, 'eval_dataset'), model, lora)
    every, measure = open_measure(run, model, template, dataset, epoch, lora) if run.evaluation else (Fraction(0), None)
    profile = settings.read_profile(flags.profile_steps, total_steps)

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
    best = find_best(run, resumed)
    if best and best.exhausted:
        print(f'{run.output_dir} stopped at step {start_step} already: {describe_best(best, run)}; go on with a higher '
              '--patience')
        return
    adapter = identify(lora, hyper, model, resumed) if lora else None
    write = checkpoint_writer(run, model, hyper, dataset, template, total_steps,
                              chat_template_of(batches, model.source), best, adapter)
    print(f'{total_steps} steps of {batches.batch_size} rows up to {batches.seq_length} tokens\n'
          f'prompt template: {template}', flush=True)
    base = model.load_params(run.seed, lora.base_dtype) if lora else None
    state = load_state(resumed, easylm_state, model, hyper, accumulate, run.seed, lora)
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

    saved = start_step

    def save(state: TrainState, done: int) -> None:
        nonlocal saved
        arrays = to_arrays(state, model.config, lora)
        if not run.save_optimizer_state:
            arrays = {name: array for name, array in arrays.items() if name.startswith('params.')}
        tqdm.write(f'saved {write(arrays, done, batches.state())}')
        saved = done

    schedule = loop.Schedule(start_step, total_steps, run.log_freq, (run.save_model_freq, run.save_milestone_freq),
                             every)
    step = CompiledStep(Setting(model.config, model.compute, hyper, accumulate, model.mesh, load.mesh_dim, lora),
                        tqdm.write, wait_for_all, f'{dataset.flag}.batch_size', frozen=base)
    if profile:  # a program from the cache would have the names that the code had when it was compiled
        jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
    trace = Trace(run.output_dir / 'profile', profile, tqdm.write) if profile and processes.index() == 0 else None
    state, done = loop.train(state, batches, step, model.mesh, schedule, writer, data_position=lambda: batches.metrics,
                             weights_of=lambda state: adapted(base, state.params, lora) if lora else state.params,
                             save=save, evaluate=evaluate, measure=measure, best=best,
                             peak_seconds=peak_seconds(model, lora), trace=trace)
    if done > saved:
        save(state, done)
    writer.close()
    if done < total_steps:
        print(f'stopped at step {done} of {total_steps}: the last {best.waited} evaluations were no better '
              f'(patience={best.patience})')
    print(f'wrote {writer.path}; trained in {time.perf_counter() - began:.1f} s')
    tell_what_to_serve(run, flags, best)


def tell_what_to_serve(run: Run, flags, best: Best | None) -> None:
    """Print which step is best, and the commands that serve it and the newest."""
    if best:
        path = native.step_directory(run.output_dir, best.step)
        print(f'{describe_best(best, run)}\nserve the best: python serve.py {serving_flags(run, flags, path)}')
    print(f'serve {"the newest" if best else "it"}: python serve.py {serving_flags(run, flags, run.output_dir)}',
          flush=True)


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


def open_evaluation(run: Run, dataset: Dataset, model: Model, lora: Lora | None) -> Callable[[Llama], dict] | None:
    """Open the first eval_steps batches of eval_dataset as training/evaluation.py wants them; None for 0."""
    if not run.eval_steps:
        return None
    batches = open_batches(dataset, model.tokenizer, model.mesh, run.seed, model.source)
    batches = list(islice(batches, run.eval_steps))
    return evaluator(batches, model.config, model.compute, model.mesh, wait_for_all, lora)


def open_measure(run: Run, model: Model, template: PromptTemplate | None, dataset: Dataset,
                epoch: Callable[[], Fraction], lora: Lora | None) -> tuple[Fraction, Callable[[Llama, int], dict]]:
    """Open --evaluate.input: (micro-steps between evaluations, the function (weights, steps done) -> its figures)."""
    every = run.evaluation.every_steps(epoch)
    bos = dataset.text_processor['add_bos_token']
    if run.evaluation.task == 'text':
        of_weights = open_texts(run.evaluation, model, bos, run.seed, wait_for_all, lora)
    else:
        of_weights = open_labelled(run.evaluation, model, template, bos, run.seed, wait_for_all, lora)

    def measure(params: Llama, done: int) -> dict:
        asked = time.perf_counter()
        row = of_weights(params)
        tqdm.write(f'evaluated step {done}: {figures(row)}, {time.perf_counter() - asked:.1f} s')
        return row

    return every, measure


def figures(row: dict) -> str:
    """Write the figures of an evaluation."""
    if 'label_accuracy' not in row:
        return ', '.join(f'{name.removeprefix("text_").replace("_", " ")} {row[name]:.2%}' for name in row
                         if name.startswith('text_'))
    return (f'accuracy {row["label_accuracy"]:.2%}, macro F1 {row["label_f1"]:.2%}, loss {row["label_loss"]:.4f} '
            '(of the labels)')


def find_best(run: Run, resumed: native.Step | None) -> Best | None:
    """Make what keeps the best evaluation, going on with that of the step to resume; None without --keep_best."""
    if not run.evaluation or not run.evaluation.keep_best:
        return None
    best, mark = Best(run.evaluation.keep_best, run.evaluation.patience), resumed and resumed.meta.get('best')
    if not mark:
        return best
    before, now = (flags['evaluate'] | dict(batch_size=0) for flags in (resumed.meta['flags'], run.flags))
    if mark['metric'] != best.metric or before != now:
        was, name = (mark['metric'], 'keep_best') if before == now else next(
            (before[key], f'evaluate.{key}') for key in now if before[key] != now[key])
        raise Mistake(f'{resumed.path} knows the best by --{name}={was}, and what is measured otherwise cannot be '
                      'compared with it: leave the flag as it was, or begin in another --logger.output_dir')
    if mark['step'] not in native.steps(run.output_dir):
        print(f'WARNING: step {mark["step"]}, the best so far, is not in {run.output_dir} any more: the best is looked '
              'for anew', flush=True)
        return best
    return dataclasses.replace(best, **mark)


def describe_best(best: Best, run: Run) -> str:
    """Say which step is best."""
    return f'best by {best.metric} on {run.evaluation.input}: step {best.step}, {figures(best.row)}'


def peak_seconds(model: Model, lora: Lora | None) -> Callable[[Batch], float] | None:
    """Make the function batch -> seconds that its step takes at the devices' peak, for MFU; None for other chips than
    those of instruments/tpu/chips.py.
    """
    try:
        peak = chips.find(model.mesh.devices.flat[0].device_kind).peak_flops * model.mesh.size
    except Mistake:
        return None
    return lambda batch: step_flops(model.config, batch, lora) / peak


def load_state(resumed: native.Step | None, easylm_state: bool, model: Model, hyper: Hyperparameters, accumulate: int,
               seed: int, lora: Lora | None) -> TrainState:
    """Load the state to start from: the resumed run's, EasyLM's, or a fresh one around --load_checkpoint's weights, or
    around new adapters.
    """
    if not resumed and not easylm_state:
        params = init_weights(adapter_specs(model.config, lora), model.mesh, seed, model.config.initializer_range) \
            if lora else model.load_params(seed)
        return init_state(params, model.config, hyper, accumulate, model.mesh, lora)
    like = abstract_state(model.config, hyper, accumulate, model.mesh, lora)
    targets = to_arrays(like, model.config, lora)
    arrays = resumed.restore(targets) if resumed else \
        model.source.load_train_state(model.config, targets, hyper.multiply_by_parameter_scale)
    if (begun := int(arrays['optimizer.micro_step'])) >= accumulate:
        raise Mistake(f'the state stands {begun} micro-steps after its last update, more than '
                      f'optimizer.accumulate_gradient_steps={accumulate} ever is: set the flag as it was')
    return from_arrays(arrays, like, model.config, lora)


def describe_adapters(lora: Lora, model: Model) -> str:
    """Say what trains.  Raises Mistake for a run that cannot have adapters."""
    if not model.source:
        raise Mistake(f'lora.rank={lora.rank} needs --load_checkpoint: adapters belong to weights that can be loaded '
                      'again')
    if model.source.kind == 'trainstate':
        raise Mistake(f'load_checkpoint={model.source.spec!r} brings an optimizer state of all weights: with '
                      f'--lora.rank load trainstate_params::{model.source.path}')
    count, all_ = (sum(spec.size for spec in jax.tree.leaves(specs))
                   for specs in (adapter_specs(model.config, lora), weight_specs(model.config)))
    return (f'adapters of rank {lora.rank} beside {",".join(lora.targets)}, scale {lora.scale:g}: {count:,} parameters '
            f'train, {count / all_:.2%} of the {all_:,}, which stay as they are in {lora.base_dtype}')


def identify(lora: Lora, hyper: Hyperparameters, model: Model, resumed: native.Step | None) -> dict:
    """Describe the adapters and their base for the manifest; warn of an optimizer that hardly moves them.

    Raises Mistake where the run to resume had others.
    """
    if hyper.multiply_by_parameter_scale:
        print('WARNING: multiply_by_parameter_scale=True multiplies the learning rate by the RMS of what it changes, '
              'and B begins with zeros: adapters learn with '
              '--optimizer.adamw_optimizer.multiply_by_parameter_scale=False', flush=True)
    found = dict(lora=dataclasses.asdict(lora) | dict(targets=list(lora.targets)),
                 base=dict(spec=model.source.spec, fingerprint=model.source.fingerprint(model.config)))
    if not resumed:
        return found
    if 'lora' not in resumed.meta:
        raise Mistake(f'lora.rank={lora.rank}, but {resumed.path} trains all weights: leave --lora.rank out, or choose '
                      'another --logger.output_dir')
    for name, now in found['lora'].items():
        if (was := resumed.meta['lora'][name]) != now and name != 'seed':
            raise Mistake(f'lora.{name}={now!r}, but {resumed.path} was trained with {was!r}: leave it as it was, or '
                          'choose another --logger.output_dir')
    if found['base']['fingerprint'] != resumed.meta['base']['fingerprint']:
        raise Mistake(f'load_checkpoint={model.source.spec!r} holds other weights than those beside which '
                      f'{resumed.path} was trained ({resumed.meta["base"]["spec"]}): name those')
    return found


def checkpoint_writer(run: Run, model: Model, hyper: Hyperparameters, dataset: Dataset,
                      template: PromptTemplate | None, total_steps: int,
                      chat_template: str | None = None, best: Best | None = None,
                      adapter: dict | None = None) -> Callable[[dict, int, dict], Path]:
    """Make the function (arrays, steps done, position in the data) -> path that writes a checkpoint.

    best: its mark goes into the manifest, and its step stays.  adapter: of `identify`, for the manifest.  What the
    format cannot hold is refused here, not at the end of the run.
    """
    values = run.flags | dict(train_dataset=dataset.values)
    if run.format == 'native':
        if (run.save_model_freq or best) and not run.save_optimizer_state:
            print('WARNING: checkpointer.save_optimizer_state=False: the checkpoints of this run can be served, but it '
                  'cannot be resumed from them', flush=True)
        meta, files = describe_checkpoint(model.config, model.tokenizer, template,
                                          dataset.text_processor['add_bos_token'], chat_template)
        mark = lambda: dict(best=best.mark) if best else {}
        meta |= (adapter or {}) | dict(flags=values)
        return lambda arrays, done, position: native.save(
            run.output_dir, done, arrays, meta | dict(data=position) | mark(), files, keep=run.keep,
            keep_every=run.save_milestone_freq, spare=best and best.step)
    if adapter:
        raise Mistake(f'checkpointer.format={run.format!r} holds no adapters: set --checkpointer.format=native; '
                      'convert.py --merge writes EasyLM files from it')
    easylm_run.refuse(model.config, resume=run.resume, optimizer_state=run.save_optimizer_state,
                      float_dtype=run.float_dtype)

    def write(arrays: dict, done: int, position: dict) -> Path:  # the end of the run is never a milestone
        milestone = bool(run.save_milestone_freq) and done % run.save_milestone_freq == 0 and done < total_steps
        return easylm_run.save(run.output_dir, arrays, done, position, config=model.config, flags=values,
                               dataset=dataset.values, milestone=milestone, optimizer_state=run.save_optimizer_state,
                               parameter_scale=hyper.multiply_by_parameter_scale, float_dtype=run.float_dtype)

    return write


def serving_flags(run: Run, flags, path: Path) -> str:
    """Spell the flags with which serve.py serves what this run saved at `path`."""
    if flags.lora.rank:
        return f'--load_checkpoint={flags.load_checkpoint} --adapter={path}'
    if run.format == 'native':
        return f'--load_checkpoint={path}'
    tokenizer = f' --tokenizer.vocab_file={flags.tokenizer.vocab_file}' if flags.tokenizer.vocab_file else ''
    return easylm_run.loading_flags(run.output_dir, run.save_optimizer_state) + tokenizer


if __name__ == '__main__':
    run_program(main, flags.TRAIN)
