"""Compile any function for a TPU, on a machine that has none.

libtpu is a library with the whole TPU compiler in it.  Given the name of a slice ('v5e:2x4') it describes the devices,
and JAX compiles for the description: `jax.jit(f).lower(shapes with shardings).compile()`.  Nothing can be run, but the
memory, the optimised HLO and each kernel's schedule are the real ones.

libtpu reads its environment once, when it is loaded: the first description loads it.  Among those variables is the
folder that schedules are written to, so a process decides before its first compilation whether it wants them:
`prepare(schedules=True)`.  kernel_time/static_cost.py does so by itself; a program that compiles large modules leaves
them out (a whole training step's schedules are gigabytes).
"""
import atexit
import contextlib
import dataclasses
import glob
import importlib.util
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instruments.tpu import chips
from mistake import Mistake

# there is no TPU and no metadata server to ask; several compiling processes do not harm each other
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_WORKER_HOSTNAMES': 'localhost',
               'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
KEPT = ('-packed-bundles-post-ra.txt', '-pre-delay_hlo-static-per-bundle-utilization.txt', '-post-delay-converter.txt')


@dataclasses.dataclass
class Library:
    """Remember what this process has done to libtpu: nothing, prepared the environment, loaded it."""
    prepared: bool = False
    loaded: bool = False
    schedules: pathlib.Path | None = None


library = Library()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Hold what the compiler says of a program; bytes are those of one device."""
    chip: chips.Chip
    text: str  # optimised HLO
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # outputs that take over a donated argument's memory
    temporary_bytes: int
    code_bytes: int
    peak_bytes: int
    flops: float  # XLA's count; a loop's body counts once, a Pallas kernel what its cost_estimate says
    bytes_accessed: float


def prepare(schedules: bool = False) -> None:
    """Set up libtpu's environment, once a process; with `schedules`, kernels' schedules are written while compiling.

    Raises:
      Mistake: libtpu is not installed.
      ValueError: it was loaded without schedules and they are wanted now.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise Mistake("libtpu is not installed: the TPU compiler is in it; pip install -e '.[tpu]'")
    if schedules and library.schedules is None:
        if library.loaded:
            raise ValueError(f'{schedules=} is too late, libtpu is loaded and will not write them: '
                             'call tpu.compile.prepare(schedules=True) before the first compilation of this process')
        library.schedules = pathlib.Path(tempfile.mkdtemp(prefix='tpu-schedules-'))
        atexit.register(shutil.rmtree, library.schedules, ignore_errors=True)
        dump = f'--xla_jf_dump_to={library.schedules} --xla_jf_dump_llo_text=true'
        os.environ['LIBTPU_INIT_ARGS'] = f'{os.environ.get("LIBTPU_INIT_ARGS", "")} {dump}'.strip()
    if not library.prepared:
        os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
        library.prepared = True


def devices(name: str) -> list[jax.Device]:
    """Describe the devices of a slice ('v5e:4x8'), or of a chip's small default slice ('v5e'), to compile for.

    Raises:
      Mistake: no such chip, or libtpu knows no such slice; the message lists them.
    """
    chip = chips.find(name)
    prepare()
    topology = name if ':' in name else chip.topology
    single = dict(chips_per_host_bounds=[1, 1, 1]) if set(topology.split(':')[1].split('x')) == {'1'} else {}
    megacore = dict(chip_config_name='megacore') if chip.name == 'v4' else {}  # on v5p that is libtpu's default
    library.loaded = True
    try:
        return list(topologies.get_topology_desc(platform='tpu', topology_name=topology, **single, **megacore).devices)
    except jax.errors.JaxRuntimeError as error:
        raise Mistake(f'{topology=} is no slice that libtpu knows ({error}); those of {chip.name}: '
                      f'{", ".join(chips.topologies(chip))}') from error


def mesh(name: str, sizes: tuple[int, ...] = (1,), axes: tuple[str, ...] = ('x',)) -> Mesh:
    """Make a mesh over a slice's devices, in libtpu's order; by default over one of them."""
    if len(sizes) != len(axes):
        raise ValueError(f'{sizes=} and {axes=} must have the same length')
    found = devices(name)
    wanted = int(np.prod(sizes))
    if wanted > len(found) or (wanted < len(found) and wanted > 1):
        raise ValueError(f'{sizes=} takes {wanted} devices, {name} has {len(found)}')
    return Mesh(np.array(found[:wanted]).reshape(sizes), axes)


def abstract(tree, sharding) -> jax.ShapeDtypeStruct:
    """Take the shapes and types of arrays (or of shapes), placed; those with a sharding of their own keep it."""
    def place(x):
        own = x.sharding if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    return jax.tree.map(place, tree)


def compile_for(name: str, function, *arguments, over: Mesh | None = None, donate: tuple[int, ...] = (),
                dump: str | os.PathLike | None = None) -> Compiled:
    """Compile `function(*arguments)` for a chip or slice.

    Args:
      name: 'v5e', or a slice such as 'v5e:2x4'.
      arguments: pytrees of arrays or jax.ShapeDtypeStruct; without a sharding of their own they are on every device of
        the mesh alike.
      over: the mesh that `function` is written for (`mesh`); by default one device.
      donate: arguments whose memory the outputs may take.
      dump: folder for the kernels' schedules, created; needs `prepare(schedules=True)`.

    Raises:
      ValueError: see `prepare`, `devices`.
      jax.errors.JaxRuntimeError: the program does not fit the chip's memory, or the compiler refuses it.
    """
    if dump is not None:
        prepare(schedules=True)
    over = over or mesh(name)
    arguments = abstract(arguments, NamedSharding(over, PartitionSpec()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(over))  # tells Pallas which chip it lowers for
        if library.schedules:  # a program from the persistent cache would leave none
            stack.callback(keep_schedules, library.schedules, dump)
            stack.callback(jax.config.update, 'jax_enable_compilation_cache', jax.config.jax_enable_compilation_cache)
            jax.config.update('jax_enable_compilation_cache', False)
        compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Compiled(
        chip=chips.find(name), text=compiled.as_text(), argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes, alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes, code_bytes=memory.generated_code_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes, flops=cost.get('flops', 0.0),
        bytes_accessed=cost.get('bytes accessed', 0.0))


def keep_schedules(written: pathlib.Path, dump: str | os.PathLike | None) -> None:
    """Move what is of use from where libtpu writes to `dump`, and delete the rest (hundreds of files a kernel)."""
    if dump is not None:
        pathlib.Path(dump).mkdir(parents=True, exist_ok=True)
    for path in glob.glob(f'{glob.escape(str(written))}/*'):
        if dump is not None and path.endswith(KEPT) and 'schedule-analysis' not in path and 'late-' not in path:
            shutil.move(path, dump)
        else:
            os.remove(path)
