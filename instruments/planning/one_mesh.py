"""Find out before a run what it needs: compile the real step for a mesh, and read what the compiler says.

Bytes are those of one device.  They come from three places:

  parameters, optimizer   what the shardings of training/state.py's abstract_state put on a device, exactly; optimizer
                          holds the moments, the mean gradient of an accumulation and the counters
  base, adapters          with adapters (model/lora.py) in the place of parameters: the frozen weights in their dtype,
                          and what trains beside them.  A run holds no more than the base, 16 bytes for each number of
                          an adapter (itself, momentum, second moment, gradient), activations and a layer at work
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

Times are estimates (tpu/estimate.py in this room), for choosing between meshes.  Next: search.py, compiled.py.
"""
import dataclasses
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from data.batches import Batch
from instruments.planning.out_of_memory import out_of_memory
from instruments.planning.units import gib
from instruments.tpu.chips import Chip
from instruments.tpu.collectives import bytes_by_axis, collectives
from instruments.tpu.estimate import Estimate, estimate
from model.config import Compute, LlamaConfig
from model.lora import Lora, abstract_base, adapted, base_partitions
from model.partition import AXES, BATCH
from model.weights import Llama
from training import step
from training.optimizer import Hyperparameters
from training.state import TrainState, abstract_state, state_partitions


class Setting(NamedTuple):
    """Hold what decides a step's program, all but the shape of its batch.

    mesh_dim: as the user wrote it ('!1,4,2', 'dp:1,mp:2,fsdp:4'); '' stands for the mesh's sizes.  lora: the adapters
    that train, None where all weights do.
    """

    config: LlamaConfig
    compute: Compute
    hyper: Hyperparameters
    accumulate: int
    mesh: Mesh
    mesh_dim: str = ''
    lora: Lora | None = None

    @property
    def spelling(self) -> str:
        """Write the --mesh_dim that makes this mesh."""
        return self.mesh_dim or mesh_dim_of(self.mesh)

    def state(self) -> TrainState:
        """Build the state's tree of ShapeDtypeStructs."""
        return abstract_state(self.config, self.hyper, self.accumulate, self.mesh, self.lora)

    def base(self) -> tuple[Llama, ...]:
        """Build what the step takes after state and batch: the frozen base's ShapeDtypeStructs, or nothing."""
        return (abstract_base(self.config, self.mesh, self.lora.base_dtype),) if self.lora else ()

    def lower(self, batch: Batch, state: TrainState | None = None) -> jax.stages.Lowered:
        """Lower the step for arrays or ShapeDtypeStructs; works for a real or a described TPU."""
        jitted = step.make_train_step(self.config, self.compute, self.hyper, self.accumulate, self.mesh, self.lora)
        with jax.set_mesh(self.mesh):  # tells Pallas which chip it lowers for
            return jitted.lower(state or self.state(), batch, *self.base())


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """Hold what one mesh needs.  JSON-ready: dataclasses.asdict(plan), and read_plan(values) back.

    mesh_dim: as the user wrote it, so that a command with it makes the same mesh.

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


def read_plan(values: dict) -> MeshPlan:
    """Read a plan from what dataclasses.asdict made of it."""
    return MeshPlan(**values | dict(estimate=values['estimate'] and Estimate(**values['estimate'])))


def mesh_dim_of(mesh: Mesh) -> str:
    """Write the sizes of a mesh as 'dp,fsdp,mp'; the order of its axes and devices is not in it."""
    return ','.join(str(mesh.shape[axis]) for axis in AXES)


# ---------------------------------------------------------------- compiling


def plan_train(setting: Setting, batch: Batch, chip: Chip | None, usable: int | None,
               kernel_seconds: Callable[[str], float] | dict) -> MeshPlan:
    """Compile the step and say what it needs; a program that does not fit gives a plan too.

    Args:
      batch: of ShapeDtypeStructs (abstract_batch).
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
    return from_compiled(plan, compiled, setting.mesh, chip, kernel_seconds, time.perf_counter() - began)


def uncompiled(setting: Setting, batch: Batch, usable: int | None) -> MeshPlan:
    """Say what is known without compiling; the plan does not fit when the state alone is too large."""
    state, base = setting.state(), setting.base()
    trained, held = device_bytes(state.params), device_bytes((state, base))
    weights = dict(base=device_bytes(base), adapters=trained) if setting.lora else dict(parameters=trained)
    parts = weights | dict(optimizer=device_bytes(state) - trained, activations=kept_bytes(setting, batch))
    plan = MeshPlan(setting.spelling, *batch.tokens_BT.shape, setting.accumulate, setting.compute.remat_block,
                    parts, batch.tokens_BT.size, fits=True, usable=usable)
    if usable is not None and held > usable:
        return dataclasses.replace(plan, fits=False, needed=held,
                                   reason='parameters and optimizer state alone do not fit')
    return plan


def refused(plan: MeshPlan, error: jax.errors.JaxRuntimeError, seconds: float) -> MeshPlan:
    """Complete the plan of a program that the compiler refused."""
    shortage = out_of_memory(error)
    if shortage is None:
        lines = str(error).strip().splitlines()
        return dataclasses.replace(plan, fits=False, reason=f'refused by the compiler: {lines[0][:200]}',
                                   compile_seconds=seconds)
    return with_verdict(dataclasses.replace(plan, needed=shortage.needed, usable=shortage.available,
                                            compile_seconds=seconds))


def from_compiled(plan: MeshPlan, compiled: jax.stages.Compiled, mesh: Mesh, chip: Chip | None, kernel_seconds,
                  seconds: float, text: str | None = None) -> MeshPlan:
    """Complete the plan of a compiled program that took `seconds` to compile; text: read in the place of its own.

    Raises ValueError where the text cannot be read (instruments/tpu/hlo.py).
    """
    memory, text = compiled.memory_analysis(), text or compiled.as_text()
    return with_verdict(dataclasses.replace(
        plan, needed=needed_bytes(memory), temporaries=memory.temp_size_in_bytes, compile_seconds=seconds,
        wire_bytes=bytes_by_axis(collectives(text, mesh)),
        estimate=chip and estimate(text, mesh, chip, kernel_seconds)))


def with_verdict(plan: MeshPlan) -> MeshPlan:
    """Set `fits` and `reason` by comparing needed with usable."""
    fits = plan.usable is None or plan.needed <= plan.usable
    return dataclasses.replace(plan, fits=fits,
                               reason='' if fits else f'needs {gib(plan.needed)} of {gib(plan.usable)} GiB')


def needed_bytes(memory) -> int:
    """Add up the bytes of a device while the program runs, from `compiled.memory_analysis()`."""
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes +
            memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)


def device_bytes(tree) -> int:
    """Add up the bytes that the arrays (or ShapeDtypeStructs) of a tree take on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kept_bytes(setting: Setting, batch: Batch) -> int:
    """Count the bytes that one device keeps between forward and backward pass, weights aside."""
    kept, lora = 0, setting.lora

    def forward(state, batch, *base):
        nonlocal kept

        def loss(trained):
            params = adapted(*base, trained, lora, step.dropout_key(state, lora)) if lora else trained
            return step.batch_loss(params, batch, setting.config, setting.compute)

        _, pull_back, _ = jax.vjp(loss, state.params, has_aux=True)
        weights = {id(x) for x in jax.tree.leaves((state.params, base))}
        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull_back) if id(x) not in weights)
        return ()

    with jax.set_mesh(setting.mesh):
        specs = (state_partitions(setting.config, setting.accumulate, lora), BATCH,
                 *([base_partitions(setting.config, lora.base_dtype)] if lora else []))
        jax.eval_shape(jax.shard_map(forward, mesh=setting.mesh, in_specs=specs, out_specs=()),
                       setting.state(), batch, *setting.base())
    return kept
