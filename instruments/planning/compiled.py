"""The step, compiled once for every batch shape: what it needs is said before it runs, and what to do when it does not
fit.  Before: training/step.py, training/plan.py; after: training/loop.py.
"""
import time
from collections.abc import Callable

import jax

from data.batches import Batch
from instruments.planning import plan as planning
from instruments.planning.plan import Plan, Setting
from kernels import chips
from mistake import Mistake
from training.state import abstract_batch


class CompiledStep:
    """`(state, batch) -> (state, metrics)` by the program of the batch's shape, compiled when the shape is new.

    describe: receives the lines that a program prints about itself, before its first run.
    wait_for_all: called between compiling a program and running it.  Of several processes one may find the program
    compiled already, and collectives between CPUs wait for half a minute only.
    Raises Mistake, naming a plan that fits if one is found, where a program does not fit the devices.
    """

    def __init__(self, setting: Setting, describe: Callable[[str], None],
                 wait_for_all: Callable[[], object] = lambda: None):
        self._setting, self._describe, self._wait_for_all, self.programs = setting, describe, wait_for_all, {}
        self.compile_seconds = 0.0

    def __call__(self, state, batch: Batch):
        shape = tuple(x.shape for x in jax.tree.leaves(batch))
        if shape in self.programs:
            return self.programs[shape](state, batch)
        try:
            program = self.programs[shape] = self._compile(state, batch)
            self._wait_for_all()
            return jax.block_until_ready(program(state, batch))  # so that memory runs out here or not at all
        except jax.errors.JaxRuntimeError as error:
            if planning.out_of_memory(error) is None:
                raise
            message = out_of_memory_message(self._setting, error, abstract(batch), self._describe)
            raise Mistake(message) from error

    def _compile(self, state, batch: Batch):
        began = time.perf_counter()
        compiled = self._setting.lower(batch, state).compile()
        seconds = time.perf_counter() - began
        self.compile_seconds += seconds
        rows, length = batch.tokens_BT.shape
        lines = [f'compiled the step for {rows} x {length} tokens in {seconds:.1f} s']
        self._describe('\n'.join(lines + self._summary(compiled, abstract(batch))))
        return compiled

    def _summary(self, compiled, batch: Batch) -> list[str]:
        mesh = self._setting.mesh
        device = mesh.devices.flat[0]
        plan = planning.uncompiled(self._setting, batch, planning.usable_hbm(mesh))
        try:
            chip = chips.find(device.device_kind) if device.platform == 'tpu' else None
            # times of the kernels would have to be compiled for (kernels/static_times.py): plan.py counts them
            plan = planning.measured(plan, compiled, mesh, chip, lambda name: 0.0, 0.0)
        except ValueError as error:  # a run does not end because a chip or a text is not known
            return [f'  what it needs is not known: {error}']
        return planning.summary(plan)


def abstract(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)


def out_of_memory_message(setting: Setting, error: Exception, batch: Batch, describe: Callable[[str], None]) -> str:
    """What was missing, and the flags of the nearest run of the same optimizer steps that fits: they are compiled until
    one does.
    """
    shortage = planning.out_of_memory(error)
    missing = (f'out of memory: mesh_dim={planning.mesh_dim_of(setting.mesh)!r} with {batch.tokens_BT.shape[0]} x '
               f'{batch.tokens_BT.shape[1]} tokens needs {planning.gib(shortage.needed)} GiB where '
               f'{planning.gib(shortage.available)} GiB are to be had')
    describe(missing + '; looking for a plan that fits')
    fitting = nearest(setting, batch, describe)
    if fitting is None:
        return f'{missing}, and nothing else that was tried fits these devices: use more of them, or a smaller model'
    return f'{missing}; the nearest plan that fits: {flags_of(fitting, setting, batch)}'


def nearest(setting: Setting, batch: Batch, describe: Callable[[str], None]) -> Plan | None:
    """The first of planning.alternatives that fits; each is compiled, and described, in turn."""
    usable = planning.usable_hbm(setting.mesh)
    for other, rows in planning.alternatives(setting, batch.tokens_BT.shape[0]):
        plan = planning.plan_train(other, resized(batch, rows, other), None, usable, None)
        described = flags_of(plan, setting, batch)
        describe(f'  {described}: ' + (f'fits, {planning.gib(plan.needed)} GiB' if plan.fits else plan.reason))
        if plan.fits:
            return plan
    return None


def resized(batch: Batch, rows: int, setting: Setting) -> Batch:
    """The shapes of `batch` with another number of rows, on the mesh of `setting`."""
    positions = None if batch.loss_positions_BP is None else batch.loss_positions_BP.shape[1]
    return abstract_batch(setting.mesh, rows, batch.tokens_BT.shape[1], positions,
                               segments=batch.segments_BT is not None)


def flags_of(plan: Plan, setting: Setting, batch: Batch) -> str:
    """The flags of train.py that make a run of `setting` the planned one."""
    changed = {'mesh_dim': (plan.mesh_dim, planning.mesh_dim_of(setting.mesh)),
               'llama.remat_block': (plan.remat_block, setting.compute.remat_block),
               'train_dataset.json_dataset.batch_size': (plan.batch_size, batch.tokens_BT.shape[0]),
               'optimizer.accumulate_gradient_steps': (plan.accumulate, setting.accumulate)}
    flags = ' '.join(f'--{name}={new}' for name, (new, old) in changed.items() if new != old)
    more = plan.accumulate // setting.accumulate
    return flags + (f' and {more} times the --total_steps' if more > 1 else '')
