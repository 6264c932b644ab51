"""Say before a run which mesh fits, what it sends and how fast it is: python plan.py --topology=v5e:2x4
--load_llama_config=3b --batch_size=8 --seq_length=1024

Compiles the real training step (with --serve the engine's programs) for every mesh of the slice, or for --mesh_dim,
with the TPU compiler of libtpu (extra: tpu) and no TPU.  A row takes from seconds to minutes, nearly all of it the
compiler's; with --output=FILE.json finished rows are kept.  A recipe of train.py is understood: --config=configs/….py.

Memory is exact as far as the compiler decides it.  FLOPs, traffic and times are read from the compiled program and are
estimates, for choosing between meshes (instruments/tpu/estimate.py); none has been measured on a TPU.
"""
import dataclasses
import functools
import pathlib
import shlex

import jax
from jax.sharding import Mesh

from instruments.planning.decoding import plan_decoding
from instruments.planning.host import host_devices, host_needs
from instruments.planning.kernel_times import kernel_times
from instruments.planning.one_mesh import MeshPlan, Setting, plan_train
from instruments.planning.out_of_memory import usable_hbm
from instruments.planning.plan_file import PlanFile
from instruments.planning.search import choose, largest_batch, valid_meshes
from instruments.planning.table import HEADER, SERVE_HEADER, WIDTHS, cells, row
from instruments.planning.units import gib
from instruments.tpu import chips
from instruments.tpu import compile as tpu_compile
from mistake import Mistake
from model.config import Compute, LlamaConfig, named_config, updated
from model.lora import adapter_specs
from model.partition import check_rows, make_mesh, rows_unit
from model.weights import check_divisible, weight_specs
from program import flags, parse, settings
from serving.texts import check_lengths
from training.optimizer import AdamW, Hyperparameters, Palm
from training.state import abstract_batch

# flags that a row does not follow from, or is kept by
FREE = ('config', 'show_traceback', 'output', 'mesh_dim', 'batch_size', 'largest_batch', 'train_dataset')


def main(config) -> None:
    jax.config.update('jax_platforms', 'cpu')  # nothing is run
    if not config.topology:
        raise Mistake('topology is empty: name the slice to plan for, for example --topology=v5e:2x4')
    sizes, compute = model_flags(config)
    devices, chip = tpu_compile.devices(config.topology), chips.find(config.topology)
    usable = usable_hbm(make_mesh('1,-1,1', devices))
    print(f'{config.topology}: {len(devices)} chips on {len({device.process_index for device in devices})} hosts; '
          f'{gib(usable)} GiB of a chip can be used; {parameters(sizes):,} parameters', flush=True)
    mesh_dims = wanted_meshes(config, sizes, devices)
    file = PlanFile(pathlib.Path(config.output) if config.output else None,
                    {name: value for name, value in config.to_dict().items() if name not in FREE})
    write = functools.partial(row, first=max(WIDTHS[0], *map(len, mesh_dims)))
    print(write(SERVE_HEADER if config.serve else HEADER), flush=True)
    plans = []
    for mesh_dim in mesh_dims:
        plans.append(plan_mesh(config, sizes, compute, mesh_dim, make_mesh(mesh_dim, devices), chip, usable, file))
        print(write(cells(plans[-1])) + (f'   {plans[-1].reason}' if plans[-1].reason else ''), flush=True)
    best = choose(plans)
    if best is None:
        raise Mistake(f'no mesh of {config.topology} fits: try --llama.remat_block=nothing_saveable, a smaller '
                      '--batch_size with --optimizer.accumulate_gradient_steps, adapters beside a frozen base '
                      '(--lora.rank=16 --lora.base_dtype=int8), or a larger slice')
    mesh = make_mesh(best.mesh_dim, devices)
    needs = host_needs(sizes, mesh, settings.read_lora(config, compute))
    print(f'a host ({len(host_devices(mesh))} chips) needs {gib(needs)} GiB for loading and saving, '
          f'besides the process itself\nchosen: {best.mesh_dim}\n  {command(config, best)}', flush=True)
    file.finish(best, command(config, best))


def plan_mesh(config, sizes: LlamaConfig, compute: Compute, mesh_dim: str, mesh: Mesh, chip: chips.Chip, usable: int,
              file: PlanFile) -> MeshPlan:
    """Plan one mesh for --batch_size, or for the largest batch; a row that the file has is not compiled."""
    def compile_one(batch_size: int) -> MeshPlan:
        if config.serve:
            return plan_decoding(sizes, compute, mesh, mesh_dim, config.seq_length, batch_size, chip, usable)
        setting = Setting(sizes, compute, hyperparameters(config.optimizer),
                          config.optimizer.accumulate_gradient_steps, mesh, mesh_dim,
                          settings.read_lora(config, compute))
        batch = abstract_batch(mesh, batch_size, config.seq_length, segments=config.segments)
        return plan_train(setting, batch, chip, usable, lambda name: kernel_times(setting, batch, chip)[
            'backward' if 'flash_backward' in name else 'forward'])

    plan = lambda batch_size: file.plan(mesh_dim, batch_size, compile_one)
    if not config.largest_batch:
        return plan(config.batch_size)
    return largest_batch(plan, rows_unit(mesh)) or plan(rows_unit(mesh))


# ---------------------------------------------------------------- flags -> parts


def model_flags(config) -> tuple[LlamaConfig, Compute]:
    """Read the sizes and how they are computed; --update_llama_config may state both, as in train.py."""
    if not config.load_llama_config:
        raise Mistake('load_llama_config is empty: name the model to plan for, for example --load_llama_config=3b')
    compute, update = settings.read_compute(config), parse.literals('update_llama_config', config.update_llama_config)
    update = {name: value for name, value in update.items() if name not in settings.REMAT}
    sizes = updated(named_config(config.load_llama_config), update, source='update_llama_config')
    if lora := settings.read_lora(config, compute):
        if config.serve:
            raise Mistake(f'lora.rank={lora.rank} is of training: leave it out with --serve')
        adapter_specs(sizes, lora)  # raises for a rank that is too high
    if config.serve:
        check_lengths(config.seq_length // 2, config.seq_length, sizes)
    return sizes, dataclasses.replace(compute, attention=compute.attention or 'pallas')


def wanted_meshes(config, sizes: LlamaConfig, devices: list[jax.Device]) -> list[str]:
    """List --mesh_dim as it is written, or all that divide model and batch; print the others with the reason."""
    if config.mesh_dim:
        mesh = make_mesh(config.mesh_dim, devices)
        check_divisible(sizes, mesh)
        if not config.largest_batch:
            check_rows(config.batch_size, mesh, 'batch_size')
        return [config.mesh_dim]
    valid, invalid = valid_meshes(sizes, len(devices), len(devices) if config.largest_batch else config.batch_size)
    for mesh_dim, reason in invalid.items():
        print(f'{mesh_dim}: {reason}')
    if not valid:
        raise Mistake(f'no mesh of {len(devices)} chips divides this model and batch_size={config.batch_size}')
    return valid


def hyperparameters(options) -> Hyperparameters:
    """Read the hyperparameters that change what is kept; learning rates do not."""
    if options.type == 'palm':
        return Palm(bf16_momentum=options.palm_optimizer.bf16_momentum)
    return AdamW(**options.adamw_optimizer.to_dict())


def parameters(sizes: LlamaConfig) -> int:
    """Count the weights."""
    return sum(spec.size for spec in jax.tree.leaves(weight_specs(sizes)))


def command(config, plan: MeshPlan) -> str:
    """Write the command line that runs what was planned; the checkpoint and the data are left to be named."""
    table, size, length = flags.SERVE, 'lm_server.batch_size', 'seq_length'
    if not config.serve:
        rows = f'train_dataset.{config.train_dataset.type}_dataset'
        table, size, length = flags.TRAIN, f'{rows}.batch_size', f'{rows}.seq_length'
    known = {flag.name: flag.default for flag in table}
    values = {flag.name: parse.value_of(config, flag.name)
              for flag in flags.PLAN if flag.name in known and flag.name not in ('seq_length', 'batch_size')}
    values |= {'mesh_dim': plan.mesh_dim, size: plan.batch_size, length: config.seq_length}
    if config.serve:
        values['input_length'] = config.seq_length // 2
    given = ' '.join(shlex.quote(f'--{name}={value}') for name, value in values.items() if value != known[name])
    recipe = f'--config={config.config} ' if config.config else ''
    return f'python {"serve" if config.serve else "train"}.py {recipe}{given} …'


if __name__ == '__main__':
    parse.run(main, flags.PLAN)
