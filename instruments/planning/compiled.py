"""Compile the step once for every batch shape: say before it runs what it needs, and what to do when it does not fit.

Before: training/step.py, one_mesh.py, search.py; after: training/loop.py.
"""
import time
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding

from data.batches import Batch
from instruments.planning import one_mesh, search, table
from instruments.planning.one_mesh import Setting
from instruments.planning.out_of_memory import out_of_memory, usable_hbm
from instruments.planning.units import gib
from instruments.tpu import chips
from mistake import Mistake
from model.partition import BATCH
from model.weights import Llama


class CompiledStep:
    """Run `(state, batch) -> (state, metrics)` by the program of the batch's shape, compiled when the shape is new.

    describe: receives the lines that a program prints about itself, before its first run.
    wait_for_all: called between compiling a program and running it.  Of several processes one may find the program
    compiled already, and collectives between CPUs wait for half a minute only.
    batch_size_flag: the flag of train.py that says how many rows a batch has, named by the remedy for lack of memory.
    frozen: the base beside which the setting's adapters train; the step's third argument.
    Raises Mistake, naming a plan that fits if one is found, where a program does not fit the devices.
    """

    def __init__(self, setting: Setting, describe: Callable[[str], None],
                 wait_for_all: Callable[[], object] = lambda: None,
                 batch_size_flag: str = 'train_dataset.json_dataset.batch_size', frozen: Llama | None = None):
        if (frozen is None) != (setting.lora is None):
            raise ValueError(f'{setting.lora=} and a frozen base go together')
        self._frozen = () if frozen is None else (frozen,)
        self._setting, self._describe, self._wait_for_all = setting, describe, wait_for_all
        self._batch_size_flag, self.programs = batch_size_flag, {}
        self.compile_seconds = 0.0

    def __call__(self, state, batch: Batch):
        shape = tuple(x.shape for x in jax.tree.leaves(batch))
        if shape in self.programs:
            return self.programs[shape](state, batch, *self._frozen)
        try:
            program = self.programs[shape] = self._compile(state, batch)
            self._wait_for_all()
            return jax.block_until_ready(program(state, batch, *self._frozen))  # memory runs out here or not at all
        except jax.errors.JaxRuntimeError as error:
            if out_of_memory(error) is None:
                raise
            raise Mistake(remedy(self._setting, error, abstract(batch), self._batch_size_flag,
                                 self._describe)) from error

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
        plan = one_mesh.uncompiled(self._setting, batch, usable_hbm(mesh))
        try:
            chip = chips.find(device.device_kind) if device.platform == 'tpu' else None
            # the kernels' times would take a compilation of their own (kernel_times.py): plan.py counts them
            plan = one_mesh.from_compiled(plan, compiled, mesh, chip, lambda name: 0.0, 0.0)
        except ValueError as error:  # a run does not end because a chip or a text is not known
            return [f'  what it needs is not known: {error}']
        return table.summary(plan)


def abstract(batch: Batch) -> Batch:
    """Replace arrays by their shapes and shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)


def remedy(setting: Setting, error: Exception, batch: Batch, batch_size_flag: str,
           describe: Callable[[str], None]) -> str:
    """Say what was missing, and the flags of the nearest run of the same optimizer steps that fits.

    Runs are compiled, and described, until one fits.
    """
    shortage = out_of_memory(error)
    missing = (f'out of memory: mesh_dim={setting.spelling!r} with {batch.tokens_BT.shape[0]} x '
               f'{batch.tokens_BT.shape[1]} tokens needs {gib(shortage.needed)} GiB where '
               f'{gib(shortage.available)} GiB are to be had')
    describe(missing + '; looking for a plan that fits')
    usable = usable_hbm(setting.mesh)
    for other, rows in search.alternatives(setting, batch.tokens_BT.shape[0]):
        plan = one_mesh.plan_train(other, resized(batch, rows, other), None, usable, None)
        flags = flags_of(other, rows, setting, batch, batch_size_flag)
        describe(f'  {flags}: ' + (f'fits, {gib(plan.needed)} GiB' if plan.fits else plan.reason))
        if plan.fits:
            return f'{missing}; the nearest plan that fits: {flags}'
    return f'{missing}, and nothing else that was tried fits these devices: use more of them, or a smaller model'


def resized(batch: Batch, rows: int, setting: Setting) -> Batch:
    """Make the shapes of `batch` with another number of rows, on the mesh of `setting`."""
    sharding = NamedSharding(setting.mesh, BATCH)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding), batch)


def flags_of(other: Setting, rows: int, setting: Setting, batch: Batch, batch_size_flag: str) -> str:
    """Name the flags of train.py that make a run of `setting` with `batch` one of `other` with so many rows."""
    changed = {'mesh_dim': (other.spelling, setting.spelling)}
    changed |= {f'llama.{name}': (getattr(other.compute, name), getattr(setting.compute, name))
                for name in ('remat_block', 'remat_attention', 'remat_mlp')}
    changed |= {batch_size_flag: (rows, batch.tokens_BT.shape[0]),
                'optimizer.accumulate_gradient_steps': (other.accumulate, setting.accumulate)}
    changed |= {f'lora.{name}': (getattr(other.lora, name), getattr(setting.lora, name, None))
                for name in ('rank', 'base_dtype') if other.lora}
    flags = ' '.join(f'--{name}={new}' for name, (new, old) in changed.items() if new != old)
    more = other.accumulate // setting.accumulate
    flags += f' and {more} times the --total_steps' if more > 1 else ''
    return flags + (' (adapters alone train: LoRA)' if other.lora and not setting.lora else '')
