"""Says before a run which mesh fits, what it sends and how fast it is: python plan.py --topology=v5e:2x4
--load_llama_config=3b --batch_size=8 --seq_length=1024

Compiles the real training step (with --serve the engine's programs) for every mesh of the slice, or for --mesh_dim,
with the TPU compiler of libtpu (extra: tpu) and no TPU.  A row takes from seconds to minutes, nearly all of it the
compiler's; with --output=FILE.json finished rows are kept.  A recipe of train.py is understood: --config=configs/….py.

Memory is exact as far as the compiler decides it.  FLOPs, traffic and times are read from the compiled program and are
estimates, for choosing between meshes (tpu/estimate.py); none has been measured on a TPU.
"""
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import re
import shlex
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint import load
from checkpoint.writing import appears_whole
from data.batches import Batch
from instruments.kernel_time.static_times import flash_times
from instruments.planning import plan as planning
from instruments.planning.plan import Plan, Setting
from instruments.tpu import compile as tpu_compile
from kernels import chips
from mistake import Mistake
from model import llama
from model.config import Compute, LlamaConfig, named_config, updated
from model.partition import make_mesh
from program import flags, parse
from serving.engine import BatchRows, Engine, check_batch_size, check_lengths
from training import step
from training.optimizer import AdamW, Hyperparameters, Palm

ROOT = pathlib.Path(__file__).parent
# what a row follows from, beside its flags
SOURCES = ('model', 'kernels', 'training', 'serving', 'instruments', 'data')
PACKAGES = ('jax', 'jaxlib', 'libtpu')


def main(config) -> None:
    jax.config.update('jax_platforms', 'cpu')  # nothing is run
    if not config.topology:
        raise Mistake('topology is empty: name the slice to plan for, for example --topology=v5e:2x4')
    sizes, compute = model_flags(config)
    check_flags(config, sizes)
    devices, chip = tpu_compile.devices(config.topology), chips.find(config.topology)
    usable = planning.usable_hbm(make_mesh('1,-1,1', devices))
    print(f'{config.topology}: {len(devices)} chips on {len({device.process_index for device in devices})} hosts; '
          f'{planning.gib(usable)} GiB of a chip can be used; {parameters(sizes):,} parameters', flush=True)
    mesh_dims = wanted_meshes(config, sizes, devices)
    book = Book(config)
    print(planning.row(planning.SERVE_HEADER if config.serve else planning.HEADER), flush=True)
    plans = []
    for mesh_dim in mesh_dims:
        mesh = make_mesh(mesh_dim, devices)
        one = functools.partial(plan_decoding if config.serve else plan_training, config, sizes, compute, mesh, chip,
                                usable)
        if config.largest_batch:
            plan = planning.largest_batch(lambda batch_size, one=one: book.plan(one, batch_size),
                                          planning.rows_unit(mesh)) or book.plan(one, planning.rows_unit(mesh))
        else:
            plan = book.plan(one, config.batch_size)
        plans.append(plan)
        print(planning.row(planning.cells(plan)) + (f'   {plan.reason}' if plan.reason else ''), flush=True)
    best = planning.choose(plans)
    if best is None:
        raise Mistake(f'no mesh of {config.topology} fits: try --llama.remat_block=nothing_saveable, a smaller '
                         '--batch_size with --optimizer.accumulate_gradient_steps, or a larger slice')
    mesh = make_mesh(best.mesh_dim, devices)
    print(f'a host ({len(host_devices(mesh))} chips) needs {planning.gib(host_bytes(sizes, mesh))} GiB for loading and '
          f'saving, besides the process itself\nchosen: {best.mesh_dim}\n  {command(config, best)}', flush=True)
    book.finish(best, command(config, best))


# ---------------------------------------------------------------- flags -> parts


def model_flags(config) -> tuple[LlamaConfig, Compute]:
    """The sizes and how they are computed; --update_llama_config may state both, as in train.py."""
    if not config.load_llama_config:
        raise Mistake('load_llama_config is empty: name the model to plan for, for example --load_llama_config=3b')
    update = parse.literals('update_llama_config', config.update_llama_config)
    remat = {name: update.pop(name, config.llama[name]) for name in ('remat_block', 'remat_attention', 'remat_mlp')}
    for policy in filter(None, remat.values()):
        llama.remat_policy(policy)  # raises for one that is not known
    sizes = updated(named_config(config.load_llama_config), update, source='update_llama_config')
    return sizes, Compute(config.dtype, config.attention or 'pallas', config.reduce_gradients, **remat)


def check_flags(config, sizes: LlamaConfig) -> None:
    if config.serve:
        check_lengths(config.seq_length // 2, config.seq_length, sizes)


def wanted_meshes(config, sizes: LlamaConfig, devices: list[jax.Device]) -> list[str]:
    """--mesh_dim, or all that divide model and batch; the others are printed with the reason."""
    if config.mesh_dim:
        mesh = make_mesh(config.mesh_dim, devices)
        llama.check_divisible(sizes, mesh)
        if not config.largest_batch:
            planning.check_rows(config.batch_size, mesh)
        return [planning.mesh_dim_of(mesh)]
    valid, invalid = planning.valid_meshes(sizes, len(devices), len(devices) if config.largest_batch else
                                           config.batch_size)
    for mesh_dim, reason in invalid.items():
        print(f'{mesh_dim}: {reason}')
    if not valid:
        raise Mistake(f'no mesh of {len(devices)} chips divides this model and batch_size={config.batch_size}')
    return valid


def hyperparameters(options) -> Hyperparameters:
    """Those that change what is kept; learning rates do not."""
    if options.type == 'palm':
        return Palm(bf16_momentum=options.palm_optimizer.bf16_momentum)
    return AdamW(**options.adamw_optimizer.to_dict())


def parameters(sizes: LlamaConfig) -> int:
    return sum(spec.size for spec in load.specs_of(sizes))


# ---------------------------------------------------------------- one mesh


def plan_training(config, sizes: LlamaConfig, compute: Compute, mesh: Mesh, chip: chips.Chip, usable: int,
                  batch_size: int) -> Plan:
    setting = Setting(sizes, compute, hyperparameters(config.optimizer), config.optimizer.accumulate_gradient_steps,
                      mesh)
    batch = step.abstract_batch(mesh, batch_size, config.seq_length, segments=config.segments)
    return planning.plan_train(setting, batch, chip, usable, lambda name: kernel_times(setting, batch, chip)[
        'backward' if 'flash_backward' in name else 'forward'])


def kernel_times(setting: Setting, batch: Batch, chip: chips.Chip) -> dict[str, float]:
    """Seconds of the attention kernels at one device's shapes: of those there are as many as sizes of mp."""
    rows, length = batch.tokens_BT.shape
    sizes, mp = setting.config, setting.mesh.shape['mp']
    return flash_times(chip.name, B=rows // planning.rows_unit(setting.mesh), T=length,
                       H=sizes.num_attention_heads // mp, K=max(1, sizes.num_key_value_heads // mp), D=sizes.head_dim,
                       dtype=llama.DTYPES[setting.compute.dtype].__name__, segments=int(batch.segments_BT is not None))


class Vocabulary(NamedTuple):
    """What the engine's programs take from a tokenizer."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int


def plan_decoding(config, sizes: LlamaConfig, compute: Compute, mesh: Mesh, chip: chips.Chip, usable: int,
                  batch_size: int) -> Plan:
    """The engine's programs at their longest, seq_length / 2 tokens of prompt: prefill, grow (which holds the short
    cache and the long one) and decode.  Memory is that of the hungriest, the time that of a token of decode.
    """
    check_batch_size(batch_size, mesh)
    dtype, spec = llama.DTYPES[compute.dtype], jax.ShapeDtypeStruct
    weights = jax.tree.map(lambda x: spec(x.shape, dtype, sharding=x.sharding), llama.abstract_params(sizes, mesh))
    engine = Engine(None, sizes, compute, Vocabulary(sizes.vocab_size, sizes.bos_token_id, sizes.eos_token_id), mesh,
                    batch_size=batch_size, input_length=config.seq_length // 2, seq_length=config.seq_length)
    parts = dict(parameters=planning.device_bytes(weights))
    plan = Plan(planning.mesh_dim_of(mesh), batch_size, config.seq_length, 1, '', parts, batch_size, fits=True,
                usable=usable)
    rows = BatchRows(*(spec((batch_size,), x) for x in (np.int32, np.uint32, np.float32, bool)))
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            prefill = engine._compile('prefill', weights, spec((batch_size, config.seq_length // 2), np.int32), rows)
            grow = engine._compile('grow', prefill.out_info, static=config.seq_length)
            decode = engine._compile('decode', weights, grow.out_info, rows, spec((), np.int32))
    except jax.errors.JaxRuntimeError as error:
        return planning.refused(plan, error, time.perf_counter() - began)
    cache = decode.out_info.cache
    plan = dataclasses.replace(plan, parts=parts | dict(cache=planning.device_bytes(cache)))
    # the kernel waits for the filled slots of its layer, and for little else (README, Kernels)
    seconds = planning.device_bytes(cache) / sizes.num_hidden_layers / chip.hbm_bandwidth
    plan = planning.measured(plan, decode, mesh, chip, lambda name: seconds, 0.0, one_token(decode.as_text()))
    needed = max(planning.needed_bytes(program.memory_analysis()) + resident
                 for program, resident in ((prefill, 0), (grow, parts['parameters']), (decode, 0)))
    return planning.judged(dataclasses.replace(plan, needed=needed, compile_seconds=time.perf_counter() - began))


def one_token(text: str) -> str:
    """The text of decode with its loop taken for one turn: how many tokens there will be is not in the program."""
    return re.sub(r'( while\(.*op_name="jit\(_decode\)/shard_map/while".*)', r'\1 "known_trip_count":{"n":"1"}', text)


# ---------------------------------------------------------------- the host


def host_devices(mesh: Mesh) -> list[jax.Device]:
    """Those of the mesh that are attached to the host of its first."""
    return [device for device in mesh.devices.flat if device.process_index == mesh.devices.flat[0].process_index]


def host_bytes(sizes: LlamaConfig, mesh: Mesh) -> int:
    """What loading (checkpoint/load.py) or saving takes of a host at most, one process on each.

    Saving (checkpoint/native.py) holds the host's part of one array, all layers of it, and what is on its way to disk.
    """
    def part(spec: llama.WeightSpec) -> int:  # no part is held twice
        pieces = min(len(host_devices(mesh)), math.prod(mesh.shape[axis] for axis in spec.axes))
        return spec.size // math.prod(mesh.shape[axis] for axis in spec.axes) * pieces

    return max(load.host_bytes(sizes, mesh), 2 * 4 * max(part(spec) for spec in load.specs_of(sizes)))


# ---------------------------------------------------------------- the result


class Book:
    """The rows of a question, in --output if there is one.  A row is compiled once for the same flags and sources."""

    def __init__(self, config):
        self._path = pathlib.Path(config.output) if config.output else None
        ignored = ('config', 'show_traceback', 'output', 'mesh_dim', 'batch_size', 'largest_batch')
        self._question = dict(
            flags={name: value for name, value in config.to_dict().items() if name not in ignored},
            sources=hash_of_sources(), packages={name: version(name) for name in PACKAGES})
        self._rows = []
        if self._path and self._path.exists():
            self._rows = self._held()

    def _held(self) -> list[dict]:
        try:
            held = json.loads(self._path.read_text(encoding='utf-8'))
            return held['rows'] if held['question'] == self._question else []
        except (ValueError, KeyError, TypeError):
            raise Mistake(f'output={str(self._path)!r} was not written by plan.py: choose another file') from None

    def plan(self, compile_one, batch_size: int) -> Plan:
        mesh_dim = planning.mesh_dim_of(compile_one.args[3])
        for values in self._rows:
            if (values['mesh_dim'], values['batch_size']) == (mesh_dim, batch_size):
                return planning.read_plan(values)
        plan = compile_one(batch_size)
        self._rows.append(dataclasses.asdict(plan))
        self._write()
        return plan

    def finish(self, best: Plan, command: str) -> None:
        self._write(chosen=dataclasses.asdict(best), command=command)

    def _write(self, **more) -> None:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with appears_whole(self._path, replace=True) as temporary:
                temporary.write_text(json.dumps(dict(question=self._question, rows=self._rows) | more, indent=1) + '\n',
                                     encoding='utf-8')


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hash_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for room in SOURCES for path in (ROOT / room).rglob('*')
                       if path.suffix in ('.py', '.json')):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()


def command(config, plan: Plan) -> str:
    """The command line that runs what was planned; the checkpoint and the data are left to be named."""
    size, table = ('lm_server.batch_size', flags.SERVE) if config.serve else ('train_dataset.json_dataset.batch_size',
                                                                             flags.TRAIN)
    length = 'seq_length' if config.serve else 'train_dataset.json_dataset.seq_length'
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
