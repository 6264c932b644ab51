"""Compiling for TPUs on a machine without one, and what is known of the chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from instruments.tpu import chips
from instruments.tpu import compile as tpu_compile
from instruments.tpu.chips import CHIPS
from instruments.tpu.compile import compile_for
from kernels import tiles


def test_clocks_follow_from_the_peak_and_the_units():
    """v5e: 197e12 / (4 MXUs * 2 * 128 * 128) = 1.503 GHz; the others likewise, in GHz."""
    clocks = {name: round(chip.clock / 1e9, 3) for name, chip in CHIPS.items()}
    assert clocks == {'v4': 1.049, 'v5e': 1.503, 'v5p': 1.751, 'v6e': 1.751, 'v7x': 2.2}


def test_chips_are_found_by_every_name_they_have():
    assert chips.find('v5e') == chips.find('v5e:4x8') == chips.find('TPU v5 lite')
    assert chips.find('tpu7x:2x2x1') == chips.find('v7x') != chips.find('v6e')
    with pytest.raises(ValueError, match='one of v4, v5e, v5p, v6e, v7x'):
        chips.find('v3')


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tpu_compile.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu\]'"):
        tpu_compile.devices('v5e')


def test_schedules_are_asked_for_before_libtpu_is_loaded(monkeypatch):
    monkeypatch.setattr(tpu_compile.importlib.util, 'find_spec', lambda name: True)
    monkeypatch.setattr(tpu_compile, 'library', tpu_compile.Library(prepared=True, loaded=True))
    with pytest.raises(ValueError, match='before the first compilation'):
        tpu_compile.prepare(schedules=True)


def test_the_kernels_know_every_chip_and_its_vmem():
    """By every kind that JAX gives it; the core has these figures of its own, since it imports no instruments."""
    assert tiles.CHIPS == {kind: (chip.name, chip.vmem_bytes) for chip in CHIPS.values() for kind in chip.kinds}


@pytest.mark.libtpu
@pytest.mark.parametrize('name', CHIPS)
def test_every_listed_slice_is_known_to_libtpu(name):
    """As many devices as the name's sides multiply to, twice that on v7x, whose device is a core."""
    chip = CHIPS[name]
    for topology in chips.topologies(chip):
        found = tpu_compile.devices(topology)
        sides = [int(side) for side in topology.split(':')[1].split('x')]
        assert len(found) == np.prod(sides) * (2 if name == 'v7x' else 1), topology
        assert found[0].device_kind in chip.kinds and found[0].num_cores == chip.cores


@pytest.mark.libtpu
def test_an_unknown_slice_raises_and_lists_those_there_are():
    with pytest.raises(ValueError, match='v5e:3x3.*v5e:2x4, v5e:4x4'):
        tpu_compile.devices('v5e:3x3')
    with pytest.raises(ValueError, match='takes 16 devices, v5e has 8'):
        tpu_compile.mesh('v5e', (16,), ('x',))


@pytest.mark.libtpu
def test_memory_is_what_the_shapes_say():
    """Two arguments of 4 MiB, an output of 4 MiB; donated, the output lies in the argument."""
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    plain = compile_for('v5e', lambda a, b: a + b, x, x)
    assert (plain.argument_bytes, plain.output_bytes, plain.alias_bytes) == (2**23, 2**22, 0)
    assert plain.peak_bytes >= 3 * 2**22 and 'ENTRY' in plain.text and plain.flops >= 2**20
    donated = compile_for('v5e', lambda a, b: a + b, x, x, donate=(0,))
    assert donated.alias_bytes == 2**22 and donated.peak_bytes < plain.peak_bytes


@pytest.mark.libtpu
def test_a_program_is_compiled_for_a_mesh_of_its_own():
    """A sum over 8 devices is one all-reduce, and each device holds an eighth of the argument."""
    over = tpu_compile.mesh('v6e:2x4', (2, 4), ('dp', 'mp'))
    x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=NamedSharding(over, PartitionSpec(('dp', 'mp'))))
    add = jax.shard_map(lambda x: jax.lax.psum(x.sum(0), ('dp', 'mp')), mesh=over,
                        in_specs=PartitionSpec(('dp', 'mp')), out_specs=PartitionSpec())
    compiled = compile_for('v6e:2x4', add, x, over=over)
    assert compiled.argument_bytes == 64 * 1024 * 4 // 8 and 'all-reduce' in compiled.text


@pytest.mark.libtpu
@pytest.mark.parametrize('name', CHIPS)
def test_a_pallas_kernel_compiles_for_every_chip(name, tmp_path):
    """Also one that asks Pallas which chip it is for (a floor division does); its schedule is in the folder."""
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * (pl.program_id(0) // 3).astype(jnp.float32)

    block = pl.BlockSpec((8, 128), lambda i: (i, 0))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    compiled = compile_for(name, lambda x: pl.pallas_call(kernel, out_shape=x, grid=(8,), in_specs=[block],
                                                          out_specs=block)(x), x, dump=tmp_path)
    assert 'tpu_custom_call' in compiled.text and compiled.chip.name == name
    assert list(tmp_path.glob('*-packed-bundles-post-ra.txt')) and not list(tpu_compile.library.schedules.iterdir())
