"""What a training run needs, known before it starts: the real step compiled for a mesh, and what the compiler says.

Bytes are those of one device.  They come from three places:

  parameters, optimizer   what the shardings of training/step.py's abstract_state put on a device, exactly; optimizer
                          holds the moments, the mean gradient of an accumulation and the counters
  activations             what the forward pass keeps for the backward pass, from tracing the loss: the leaves of its
                          vector-Jacobian product that are no weights.  It follows the remat policy, whichever it is:
                          with nothing_saveable a layer keeps its input, [B, T/mp, M]; without a policy every product's
                          operands, gathered weights among them.  The compiler may keep less, never more
  temporaries             all that the compiler allocates besides arguments and results, activations and the float32
                          gradients included

`needed` is their sum as the runtime allocates it: arguments, results that do not take over an argument's memory,
temporaries, code.  `usable` is what libtpu lets programs use, asked of libtpu (`usable_hbm`): 15.75 GiB of the 16 of a
v5e, 30.75 of 32 on v4, 95.74 on v5p, 31.25 of 32 on v6e.  A program that needs more is refused by the compiler, with
both figures.

Times are estimates (tpu/estimate.py), for choosing between meshes.  Next: training/compiled.py; program: plan.py.
"""
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding

from data.batches import Batch
from instruments.tpu.collectives import bytes_by_axis, collectives
from instruments.tpu.estimate import Estimate, estimate
from kernels.chips import Chip
from mistake import Mistake
from model import llama
from model.config import Compute, LlamaConfig
from model.partition import AXES, BATCH, factorizations, make_mesh
from training import step
from training.optimizer import Hyperparameters

LEAST_MEMORY = 'nothing_saveable'
TIE = 0.03  # estimates closer than this say nothing: the mesh that needs less memory is taken


class Setting(NamedTuple):
    """All that decides a step's program but the shape of its batch."""

    config: LlamaConfig
    compute: Compute
    hyper: Hyperparameters
    accumulate: int
    mesh: Mesh

    def lower(self, batch: Batch, state: step.TrainState | None = None) -> jax.stages.Lowered:
        """The step for arrays or ShapeDtypeStructs; for a described TPU as for one that is there."""
        state = state or step.abstract_state(self.config, self.hyper, self.accumulate, self.mesh)
        with jax.set_mesh(self.mesh):  # tells Pallas which chip it lowers for
            return step.make_train_step(*self).lower(state, batch)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one mesh needs.  JSON-ready: dataclasses.asdict(plan), and read_plan(values) back.

    parts: bytes of a device that are known without compiling, by name; activations lie within the temporaries.
    tokens: that one run of the program takes or makes.
    temporaries, needed, usable: bytes of a device, None where nobody said (a refused program, a platform without a
    limit).  estimate: None without a chip, or for a program that was refused.
    """

    mesh_dim: str
    batch_size: int
    seq_length: int
    accumulate: int
    remat_block: str
    parts: dict[str, int]
    tokens: int
    fits: bool
    reason: str = ''
    temporaries: int | None = None
    needed: int | None = None
    usable: int | None = None
    wire_bytes: dict[str, int] | None = None
    estimate: Estimate | None = None
    compile_seconds: float = 0.0

    @property
    def seconds(self) -> float | None:
        return self.estimate and self.estimate.seconds

    @property
    def tokens_per_second(self) -> float | None:
        return self.estimate and self.tokens / self.seconds


def read_plan(values: dict) -> Plan:
    """The inverse of dataclasses.asdict."""
    return Plan(**values | dict(estimate=values['estimate'] and Estimate(**values['estimate'])))


# ---------------------------------------------------------------- which meshes


def valid_meshes(config: LlamaConfig, devices: int, batch_size: int) -> tuple[list[str], dict[str, str]]:
    """(the factorizations that divide model and batch, {one that does not: why})."""
    valid, invalid = [], {}
    for mesh_dim in factorizations(devices):
        mesh = AbstractMesh(tuple(int(size) for size in mesh_dim.split(',')), AXES)
        try:
            llama.check_divisible(config, mesh)
            check_rows(batch_size, mesh)
        except ValueError as error:
            invalid[mesh_dim] = str(error)
        else:
            valid.append(mesh_dim)
    return valid, invalid


def check_rows(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises Mistake unless every device gets the same number of rows."""
    if batch_size % rows_unit(mesh):
        raise Mistake(f'{batch_size=} is not divisible by dp*fsdp={rows_unit(mesh)}: change it or --mesh_dim')


def rows_unit(mesh: Mesh | AbstractMesh) -> int:
    return mesh.shape['dp'] * mesh.shape['fsdp']


def mesh_dim_of(mesh: Mesh) -> str:
    return ','.join(str(mesh.shape[axis]) for axis in AXES)


# ---------------------------------------------------------------- one mesh


def plan_train(setting: Setting, batch: Batch, chip: Chip | None, usable: int | None,
               kernel_seconds: Callable[[str], float] | dict) -> Plan:
    """Compiles the step and says what it needs; a program that does not fit is a Plan too.

    Args:
      batch: of ShapeDtypeStructs (step.abstract_batch).
      chip: None where it is not known: then times are not estimated.
      usable: bytes of a device that programs may use (`usable_hbm`); None: no limit is known.
      kernel_seconds: of the Pallas kernels by HLO name, as tpu.estimate.estimate takes them.
    """
    plan = uncompiled(setting, batch, usable)
    if not plan.fits:
        return plan
    began = time.perf_counter()
    try:
        compiled = setting.lower(batch).compile()
    except jax.errors.JaxRuntimeError as error:
        return refused(plan, error, time.perf_counter() - began)
    return measured(plan, compiled, setting.mesh, chip, kernel_seconds, time.perf_counter() - began)


def uncompiled(setting: Setting, batch: Batch, usable: int | None) -> Plan:
    """What is known without compiling; it does not fit when the state alone is too large."""
    state = step.abstract_state(setting.config, setting.hyper, setting.accumulate, setting.mesh)
    parameters = device_bytes(state.params)
    parts = dict(parameters=parameters, optimizer=device_bytes(state) - parameters,
                 activations=kept_bytes(setting, batch))
    plan = Plan(mesh_dim_of(setting.mesh), *batch.tokens_BT.shape, setting.accumulate, setting.compute.remat_block,
                parts, batch.tokens_BT.size, fits=True, usable=usable)
    if usable is not None and device_bytes(state) > usable:
        return dataclasses.replace(plan, fits=False, needed=device_bytes(state),
                                   reason='parameters and optimizer state alone do not fit')
    return plan


def refused(plan: Plan, error: jax.errors.JaxRuntimeError, seconds: float) -> Plan:
    """The plan of a program that the compiler did not make."""
    shortage = out_of_memory(error)
    if shortage is None:
        lines = str(error).strip().splitlines()
        return dataclasses.replace(plan, fits=False, reason=f'refused by the compiler: {lines[0][:200]}',
                                   compile_seconds=seconds)
    return judged(dataclasses.replace(plan, needed=shortage.needed, usable=shortage.available,
                                      compile_seconds=seconds))


def measured(plan: Plan, compiled: jax.stages.Compiled, mesh: Mesh, chip: Chip | None, kernel_seconds,
             seconds: float, text: str | None = None) -> Plan:
    """The plan of a compiled program that took `seconds` to compile; text: in the place of its own.

    Raises Mistake where the text cannot be read (tpu/hlo.py).
    """
    memory, text = compiled.memory_analysis(), text or compiled.as_text()
    return judged(dataclasses.replace(
        plan, needed=needed_bytes(memory), temporaries=memory.temp_size_in_bytes, compile_seconds=seconds,
        wire_bytes=bytes_by_axis(collectives(text, mesh)),
        estimate=chip and estimate(text, mesh, chip, kernel_seconds)))


def judged(plan: Plan) -> Plan:
    """With `fits` and `reason` as needed and usable have it."""
    fits = plan.usable is None or plan.needed <= plan.usable
    return dataclasses.replace(plan, fits=fits,
                               reason='' if fits else f'needs {gib(plan.needed)} of {gib(plan.usable)} GiB')


def needed_bytes(memory) -> int:
    """Of a device while the program runs, from `compiled.memory_analysis()`."""
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes +
            memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)


def device_bytes(tree) -> int:
    """What the arrays (or ShapeDtypeStructs) of a tree take on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kept_bytes(setting: Setting, batch: Batch) -> int:
    """What one device keeps between forward and backward pass, weights aside."""
    kept = 0

    def forward(params, batch):
        nonlocal kept
        loss = lambda params: step.batch_loss(params, batch, setting.config, setting.compute)
        _, pull_back, _ = jax.vjp(loss, params, has_aux=True)
        weights = {id(x) for x in jax.tree.leaves(params)}
        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull_back) if id(x) not in weights)
        return ()

    with jax.set_mesh(setting.mesh):
        specs = llama.partitions(setting.config), BATCH
        jax.eval_shape(jax.shard_map(forward, mesh=setting.mesh, in_specs=specs, out_specs=()),
                       llama.abstract_params(setting.config, setting.mesh), batch)
    return kept


# ---------------------------------------------------------------- out of memory


class Shortage(NamedTuple):
    needed: int
    available: int


UNITS = {'': 1, 'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
SIZE = r'\(?([\d.]+)([BKMGT]?)\)?'
SHORTAGES = (  # the compiler's words; those of older libtpu; the runtime's, of a single allocation
    rf'memory required for HLO temporaries {SIZE} exceeds available HBM {SIZE}',
    rf'Used {SIZE} of {SIZE} hbm',
    rf'Attempting to (?:allocate|reserve) {SIZE}.*?There are {SIZE} free',
)


def out_of_memory(error: Exception) -> Shortage | None:
    """What a RESOURCE_EXHAUSTED of HBM says was needed, and what there was; None for any other error."""
    for pattern in SHORTAGES:
        if found := re.search(pattern, str(error), re.DOTALL):
            needed, available = (int(float(number) * UNITS[unit]) for number, unit in
                                 (found.groups()[:2], found.groups()[2:]))
            return Shortage(needed, available)
    return None


def usable_hbm(mesh: Mesh) -> int | None:
    """Bytes of a TPU that libtpu lets a program use, for described devices too; None on other platforms.

    Asked by compiling what cannot fit (0.04 s), for a device of this host: the refusal names the figure.
    """
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    if device.platform != 'tpu':
        return None
    impossible = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(impossible).compile()
    except jax.errors.JaxRuntimeError as error:
        if shortage := out_of_memory(error):
            return shortage.available
        raise
    raise AssertionError(f'{device} takes 4 TiB')


# ---------------------------------------------------------------- choosing


def choose(plans: list[Plan]) -> Plan | None:
    """Of those that fit, the one whose step is estimated fastest; within TIE of it, the one that needs least."""
    fitting = [plan for plan in plans if plan.fits and plan.estimate]
    if not fitting:
        return None
    fastest = min(plan.seconds for plan in fitting)
    return min((plan for plan in fitting if plan.seconds <= (1 + TIE) * fastest), key=lambda plan: plan.needed)


def alternatives(setting: Setting, batch_size: int) -> Iterator[tuple[Setting, int]]:
    """(setting, batch size) of runs that need less memory for the same optimizer steps, nearest first.

    The same mesh keeping less for the backward pass; other meshes, as they are and keeping less; smaller batches with
    more accumulation.
    """
    less = dataclasses.replace(setting.compute, remat_block=LEAST_MEMORY, remat_attention='', remat_mlp='')
    devices = sorted(setting.mesh.devices.flat, key=lambda device: device.id)
    here = mesh_dim_of(setting.mesh)
    meshes = {mesh_dim: make_mesh(mesh_dim, devices) for mesh_dim in
              sorted(valid_meshes(setting.config, len(devices), len(devices))[0],
                     key=lambda other: (distance(here, other), other.split(',')[2])) if mesh_dim != here}
    computes = [setting.compute] if setting.compute == less else [setting.compute, less]
    for part in (1, *(2**n for n in range(1, batch_size.bit_length()))):
        if batch_size % part:
            return
        accumulate, rows = setting.accumulate * part, batch_size // part
        for compute in computes if part == 1 else [less]:
            for mesh in (setting.mesh, *meshes.values()):
                other = setting._replace(compute=compute, accumulate=accumulate, mesh=mesh)
                if rows % rows_unit(mesh) == 0 and (other, rows) != (setting, batch_size):
                    yield other, rows


def distance(a: str, b: str) -> float:
    """How far two --mesh_dim are from each other: doublings of an axis."""
    return sum(abs(math.log2(int(m) / int(n))) for m, n in zip(a.split(','), b.split(','), strict=True))


def largest_batch(try_batch: Callable[[int], Plan], unit: int) -> Plan | None:
    """The plan of the largest multiple of `unit` rows that fits; None when `unit` rows do not.

    Memory is nearly linear in the rows, and a refusal says what was needed: so the next size to try is where the line
    through the two nearest crosses the limit; after six of those, every other time it is the double, or the middle.
    """
    tried: dict[int, Plan] = {}

    def attempt(count: int) -> bool:
        tried[count] = try_batch(count * unit)
        return tried[count].fits

    if not attempt(1):
        return None
    fitting, too_large = 1, None
    while too_large is None or too_large - fitting > 1:
        count = crossing(tried) if len(tried) > 1 else 2
        doubtful = len(tried) >= 6 and len(tried) % 2 == 0
        if too_large is None:
            count = min(max(count, 2 * fitting if doubtful else fitting + 1), 64 * fitting)
        elif doubtful or not fitting < count < too_large:
            count = (fitting + too_large) // 2
        if attempt(count):
            fitting = count
        else:
            too_large = count
    return tried[fitting]


def crossing(tried: dict[int, Plan]) -> int:
    """The largest count below the limit, on the line through the two counts whose need is nearest to it."""
    known = sorted((abs(plan.needed - plan.usable), count) for count, plan in tried.items() if plan.needed)[:2]
    (a, b), limit = sorted(count for _, count in known), next(iter(tried.values())).usable
    slope = (tried[b].needed - tried[a].needed) / (b - a)
    return int(a + (limit - tried[a].needed) / slope) if slope > 0 else 8 * b


# ---------------------------------------------------------------- words


def gib(size: float) -> str:
    """Bytes in GiB, short: 15.75, 0.0312."""
    return short(size / 2**30)


def short(value: float) -> str:
    return f'{value:,.2f}' if value >= 1 or not value else f'{value:.3f}' if value >= 0.1 else f'{value:.2g}'


def sent_by_axis(wire_bytes: dict[str, int]) -> str:
    """'fsdp 1.20 mp 0.31' in GB, largest first, without what is below a hundredth of all."""
    total = sum(wire_bytes.values())
    return ' '.join(f'{axis} {short(size / 1e9)}' for axis, size in
                    sorted(wire_bytes.items(), key=lambda item: -item[1]) if size >= 0.01 * total)


def summary(plan: Plan) -> list[str]:
    """The lines that a program prints before it starts; the estimate is without the time of Pallas kernels here."""
    parts = ', '.join(f'{name} {gib(size)}' for name, size in plan.parts.items() if name != 'activations')
    held = f'; {gib(plan.needed)} in all' + (f' of {gib(plan.usable)}' if plan.usable else '')
    kept = f' ({gib(plan.parts["activations"])} kept for the backward pass)' if 'activations' in plan.parts else ''
    lines = [f'  GiB a device: {parts}, temporaries {gib(plan.temporaries)}{kept}{held}']
    if plan.wire_bytes is not None:
        lines.append(f'  GB a device sends in a step, by mesh axis: {sent_by_axis(plan.wire_bytes) or "nothing"}')
    if plan.estimate:
        least = max(plan.seconds, *plan.estimate.bounds.values())
        lines.append(f'  estimated, not measured: {plan.estimate.flops / 1e12:.3f} TFLOP a device, at least '
                     f'{least * 1e3:.1f} ms a step and the time of its Pallas kernels, bound by {plan.estimate.binds}')
    return lines


HEADER = ('mesh_dim', 'batch', 'weights', 'optim.', 'activ.', 'temp.', 'needed', 'of GiB', 'fits', 'GB sent by axis',
          'TFLOP', 'ms', 'bound by', 'tokens/s', 'compile')
SERVE_HEADER = (*HEADER[:3], 'cache', '', *HEADER[5:])
WIDTHS = (8, 5, 7, 6, 6, 6, 6, 6, 4, 34, 7, 9, 12, 10, 7)


def row(cells: tuple[str, ...]) -> str:
    """One line of the table, of at most 160 columns."""
    return ' '.join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def cells(plan: Plan) -> tuple[str, ...]:
    """The plan under HEADER; '-' where nobody knows."""
    size = lambda value: '-' if value is None else gib(value)
    parts = [*plan.parts.values(), None, None][:3]
    times = ('-',) * 4
    if plan.estimate:
        times = (short(plan.estimate.flops / 1e12), f'{plan.seconds * 1e3:,.1f}', plan.estimate.binds,
                 f'{plan.tokens_per_second:,.0f}')
    return (plan.mesh_dim, str(plan.batch_size), *map(size, (*parts, plan.temporaries, plan.needed, plan.usable)),
            'yes' if plan.fits else 'no', sent_by_axis(plan.wire_bytes or {}) or '-', *times,
            f'{plan.compile_seconds:.0f} s')
