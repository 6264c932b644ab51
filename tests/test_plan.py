"""The plan of a run: what a device holds, which mesh is taken, and what an out-of-memory error is answered with."""
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from helpers import QUICK, TINY

import checkpoint
import plan as program
from instruments import sources
from instruments.planning import compiled, decoding, host, one_mesh, plan_file, search, table
from instruments.planning.compiled import CompiledStep
from instruments.planning.one_mesh import MeshPlan, Setting, read_plan
from instruments.planning.out_of_memory import out_of_memory, usable_hbm
from instruments.planning.plan_file import PlanFile
from instruments.planning.search import choose, largest_batch, valid_meshes
from instruments.tpu import chips
from instruments.tpu import compile as tpu_compile
from instruments.tpu.estimate import Estimate
from mistake import Mistake
from model.config import MODELS, Compute
from model.lora import Lora, abstract_base, adapter_specs
from model.partition import make_mesh
from model.weights import weight_specs
from program import flags, settings
from program.parse import parse as parse_flags
from training.optimizer import AdamW
from training.state import abstract_batch, abstract_state

GIB = 2**30
LEAST = Compute(remat_block='nothing_saveable')


ADAPTERS = Lora(rank=4, alpha=8, base_dtype='bf16')


def setting(mesh_dim='1,4,2', devices=None, config=TINY, compute=LEAST, accumulate=1, lora=None) -> Setting:
    return Setting(config, compute, AdamW(bf16_momentum=True), accumulate, make_mesh(mesh_dim, devices), lora=lora)


def plan(mesh_dim='1,8,1', seconds=1.0, needed=GIB, usable=2 * GIB, batch_size=8) -> MeshPlan:
    estimate = Estimate(1e12, 1e9, {'fsdp': 10**9}, seconds, 0.0, 0.0, dict(compute=0.5, hbm=0.1, interconnect=0.2))
    return one_mesh.with_verdict(MeshPlan(mesh_dim, batch_size, 1024, 1, '', dict(parameters=2**28), 8192, True,
                                          needed=needed, temporaries=GIB // 2, usable=usable,
                                          wire_bytes={'fsdp': 10**9}, estimate=estimate, compile_seconds=60.0))


def exhausted(text='total memory required for HLO temporaries (19.54G) exceeds available HBM (15.75G).'):
    return jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the ' + text)


# ---------------------------------------------------------------- meshes


def test_meshes_of_3b_on_8_devices_are_these():
    """All ten factorizations divide the model (25 heads a device would not); four rows leave out dp*fsdp = 8."""
    valid, invalid = valid_meshes(MODELS['3b'], 8, 8)
    assert valid == ['1,1,8', '1,2,4', '1,4,2', '1,8,1', '2,1,4', '2,2,2', '2,4,1', '4,1,2', '4,2,1', '8,1,1']
    assert not invalid
    valid, invalid = valid_meshes(MODELS['3b'], 8, 4)
    assert valid == ['1,1,8', '1,2,4', '1,4,2', '2,1,4', '2,2,2', '4,1,2']
    assert set(invalid) == {'1,8,1', '2,4,1', '4,2,1', '8,1,1'}
    assert invalid['8,1,1'] == ("batch_size=4 must be divisible by dp*fsdp=8 of the mesh {'dp': 8, 'fsdp': 1, "
                                "'mp': 1}: change it or --mesh_dim")


def test_a_mesh_that_would_cut_a_head_says_so():
    valid, invalid = valid_meshes(MODELS['debug'], 8, 8)
    assert len(valid) == 9 and invalid['1,1,8'].startswith('num_attention_heads=4')


# ---------------------------------------------------------------- memory


def test_moments_and_mean_gradient_are_the_optimizer():
    """Per weight 4 bytes, and of the optimizer 2 (bf16 momentum) and 4 (second moment), 4 more to accumulate; two
    counters of 4 bytes each.
    """
    batch = abstract_batch(setting().mesh, 8, 32)
    for accumulate, of_weight in ((1, 6), (2, 10)):
        parts = one_mesh.uncompiled(setting(accumulate=accumulate), batch, None).parts
        assert parts['optimizer'] == parts['parameters'] // 4 * of_weight + 8


@pytest.mark.parametrize('policy, elements', [
    ('nothing_saveable', 2 * 16 * 64),  # a layer's input: rows 8/4, T/mp = 32/2, M
    ('save:gate,up', 2 * 16 * 64 + 2 * (2 * 32 * 48)),  # and rows, T, F/mp = 96/2 of both
])
def test_what_a_layer_keeps_follows_the_policy(policy, elements):
    """One more layer keeps so many more float32 numbers on a device of mesh 1,4,2, weights aside."""
    def kept(layers):
        own = setting(config=dataclasses.replace(TINY, num_hidden_layers=layers), compute=Compute(remat_block=policy))
        return one_mesh.kept_bytes(own, abstract_batch(own.mesh, 8, 32))

    assert kept(3) - kept(2) == 4 * elements


@pytest.mark.parametrize('dtype, bf16_momentum', [('fp32', False), ('bf16', True), ('int8', False)])
def test_the_arguments_of_adapters_are_the_base_and_12_bytes_a_number(dtype, bf16_momentum):
    """On one device, to the byte: the base in its dtype (int8: factors, and embedding and head of bfloat16, beside it),
    A and B, momentum and second moment of 4 bytes each, 2 for a momentum of bfloat16, two counters; and the batch.
    """
    lora = dataclasses.replace(ADAPTERS, base_dtype=dtype)
    own = setting('1,1,1', jax.devices()[:1], lora=lora)._replace(hyper=AdamW(bf16_momentum=bf16_momentum))
    batch = abstract_batch(own.mesh, 4, 8)
    specs = jax.tree.leaves(weight_specs(TINY))
    width = dict(fp32=4, bf16=2, int8=1)[dtype]
    base = sum(width * spec.size for spec in specs)
    if dtype == 'int8':
        N, F, M, HD, KD = 3, 96, 64, 64, 16
        factors = N * (HD + 2 * KD + M + 2 * F + M)
        base += 4 * factors + sum((3 if spec.init == 'ones' else 1) * spec.size for spec in specs
                                  if spec.init == 'ones' or not spec.stacked)
    adapters = sum(spec.size for spec in jax.tree.leaves(adapter_specs(TINY, lora)))
    assert adapters == 3 * 4 * (64 + 64 + 64 + 16)
    parts = one_mesh.uncompiled(own, batch, None).parts
    assert parts['base'] == base and parts['adapters'] == 4 * adapters
    assert parts['optimizer'] == (6 if bf16_momentum else 8) * adapters + 8
    compiled_bytes = own.lower(batch).compile(compiler_options=QUICK).memory_analysis().argument_size_in_bytes
    assert compiled_bytes == base + (10 if bf16_momentum else 12) * adapters + 8 + one_mesh.device_bytes(batch)


@pytest.mark.parametrize('dtype, mesh_dim', [('fp32', '1,1,1'), ('int8', '1,4,2')])
def test_adapters_add_no_gradient_and_no_copy_of_the_base(dtype, mesh_dim):
    """Four more layers keep their inputs and the adapters' gradients, 4 bytes each: with the arguments' 12, the 16
    bytes a number.  (A base of bfloat16 XLA's CPU does widen to float32, all layers at once; the TPU compiler does not,
    see the test below.)
    """
    def compiled_bytes(layers):
        config = dataclasses.replace(TINY, hidden_size=256, intermediate_size=512, num_hidden_layers=layers)
        own = setting(mesh_dim, jax.devices()[:1 if mesh_dim == '1,1,1' else 8], config,
                      lora=dataclasses.replace(ADAPTERS, base_dtype=dtype))._replace(hyper=AdamW())
        batch = abstract_batch(own.mesh, 4, 8)
        memory = own.lower(batch).compile(compiler_options=QUICK).memory_analysis()
        return memory.temp_size_in_bytes, one_mesh.uncompiled(own, batch, None).parts

    (few, less), (many, more) = compiled_bytes(4), compiled_bytes(8)
    grown = more['adapters'] + more['activations'] - less['adapters'] - less['activations']
    assert grown <= many - few < grown + 1024
    assert more['base'] - less['base'] > 4 * grown


def test_what_adapters_keep_follows_their_dropout():
    """A mask of booleans for x of w_q, another for that of w_v, and x scaled under each: more than without."""
    kept = [one_mesh.kept_bytes(own, abstract_batch(own.mesh, 8, 32)) for own in (
        setting(lora=dataclasses.replace(ADAPTERS, dropout=dropout), compute=Compute()) for dropout in (0.0, 0.5))]
    assert kept[1] > kept[0]


def test_a_host_holds_what_loading_needs_or_two_copies_of_its_part_of_an_array():
    """3b on one host: two copies of the float32 ffn weights of all layers; were there one layer, replicated, the four
    slices that loading holds.
    """
    assert host.host_needs(MODELS['3b'], setting().mesh) == 2 * 4 * 26 * 3200 * 8640
    adapters = dataclasses.replace(ADAPTERS, base_dtype='int8')  # a slice of the int8 base is more than A and B
    assert host.host_needs(MODELS['3b'], setting().mesh, adapters) == checkpoint.source.host_bytes(
        MODELS['3b'], setting().mesh, 'int8') < 2 * 4 * 26 * 3200 * 8640
    one_layer, mesh = dataclasses.replace(MODELS['3b'], num_hidden_layers=1), setting('8,1,1').mesh
    assert host.host_needs(one_layer, mesh) == checkpoint.source.host_bytes(one_layer, mesh) == 4 * 4 * 32000 * 3200


@pytest.mark.parametrize('message, needed, available', [
    (str(exhausted()), 19.54, 15.75),
    ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of '
     '15.48G hbm. Exceeded hbm capacity by 6.47G.', 21.95, 15.48),
    ('RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 10.51G at the bottom of memory. That was not '
     'possible. There are 8.97G free, 0B reserved, and 8.97G reservable.', 10.51, 8.97),
    ('RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 196.00M. That was not possible. '
     'There are 60.94M free.; (0x0x0_HBM0)', 196 / 1024, 60.94 / 1024),
])
def test_the_words_of_compiler_and_runtime_are_understood(message, needed, available):
    shortage = out_of_memory(jax.errors.JaxRuntimeError(message))
    assert shortage == (int(needed * GIB), int(available * GIB))


def test_other_errors_are_no_lack_of_memory():
    """Not even of the scoped memory of a kernel: another mesh does not help it."""
    for message in ('INTERNAL: Mosaic failed to compile TPU kernel', 'RESOURCE_EXHAUSTED: Ran out of memory in memory '
                    'space vmem while allocating on stack. It should not be possible to run out of vmem'):
        assert out_of_memory(jax.errors.JaxRuntimeError(message)) is None


def test_a_refused_program_is_a_row_and_other_faults_say_what_they_are():
    row = one_mesh.refused(plan(), exhausted(), 5.0)
    assert (row.fits, row.reason, row.needed) == (False, 'needs 19.54 of 15.75 GiB', int(19.54 * GIB))
    row = one_mesh.refused(plan(), jax.errors.JaxRuntimeError('INTERNAL: Mosaic failed\nmore'), 5.0)
    assert (row.fits, row.reason) == (False, 'refused by the compiler: INTERNAL: Mosaic failed')


def test_a_state_too_large_is_not_compiled(monkeypatch):
    monkeypatch.setattr(Setting, 'lower', lambda *_: pytest.fail('compiled'))
    own = setting()
    row = one_mesh.plan_train(own, abstract_batch(own.mesh, 8, 32), None, 1000, {})
    assert not row.fits and row.reason == 'parameters and optimizer state alone do not fit'


# ---------------------------------------------------------------- choosing


def test_the_fastest_is_taken_and_of_equals_the_smallest():
    """Within 3 % of the fastest the one that needs least; what does not fit or has no estimate never."""
    fast, equal, slow = plan('1,8,1', 1.0, 4), plan('1,4,2', 1.029, 3), plan('8,1,1', 1.031, 2)
    too_large, unknown = plan('2,2,2', 0.1, 3 * GIB), dataclasses.replace(plan('2,1,4', 0.1, 1), estimate=None)
    assert choose([slow, fast, equal, too_large, unknown]) is equal
    assert choose([slow, fast, too_large]) is fast
    assert choose([too_large, unknown]) is None


def test_a_plan_is_json():
    for one in (plan(), dataclasses.replace(plan(), estimate=None, wire_bytes=None, temporaries=None)):
        assert read_plan(json.loads(json.dumps(dataclasses.asdict(one)))) == one


@pytest.mark.parametrize('need', [lambda n: 5 * GIB + n * GIB // 10, lambda n: GIB + int(0.4 * GIB * n ** 1.2),
                                  lambda n: 15 * GIB + n * GIB, lambda n: n * GIB // 100,
                                  lambda n: (15 if n <= 37 else 20) * GIB])
def test_the_largest_batch_is_the_largest_and_found_soon(need):
    """As trying every multiple of 4 rows would find it, in at most 12 compilations."""
    tried = []

    def try_batch(rows):
        tried.append(rows)
        return plan(needed=need(rows // 4), usable=int(15.75 * GIB), batch_size=rows)

    fitting = [4 * n for n in range(1, 20_000) if need(n) <= int(15.75 * GIB)]
    found = largest_batch(try_batch, 4)
    assert (found.batch_size if found else None) == (fitting[-1] if fitting else None)
    assert len(tried) <= 12 and len(set(tried)) == len(tried)


def test_alternatives_change_little_first():
    """The same mesh keeping less; other meshes, nearest first, as asked and keeping less; then half the rows and twice
    the accumulation.
    """
    own = setting('2,2,1', jax.devices()[:4], compute=Compute())
    found = [(one_mesh.mesh_dim_of(other.mesh), other.compute.remat_block, other.accumulate, rows)
             for other, rows in search.alternatives(own, 4)]
    others = ['1,4,1', '4,1,1', '1,2,2', '2,1,2', '1,1,4']
    less = 'nothing_saveable'
    assert found[:5] == [(mesh, '', 1, 4) for mesh in others] and found[5:11] == [
        (mesh, less, 1, 4) for mesh in ('2,2,1', *others)]
    assert found[11:15] == [('1,2,2', less, 2, 2), ('2,1,2', less, 2, 2), ('1,1,4', less, 2, 2), ('1,1,4', less, 4, 1)]


def test_adapters_are_the_last_way_out():
    """All that changes only where things lie is tried first; then rank 16 beside bfloat16, as it is and on every way,
    then beside int8.  A run of adapters keeps its own and takes the lighter base.
    """
    own = setting('2,2,1', jax.devices()[:4], compute=Compute())
    found = [(other.lora, one_mesh.mesh_dim_of(other.mesh), rows) for other, rows in search.alternatives(own, 4)]
    bf16, int8 = Lora(16, 32.0, base_dtype='bf16'), Lora(16, 32.0, base_dtype='int8')
    assert [lora for lora, *_ in found] == [None] * 15 + [bf16] * 16 + [int8] * 16
    assert found[15] == (bf16, '2,2,1', 4) and found[31] == (int8, '2,2,1', 4)
    assert [way for _, *way in found[16:31]] == [way for _, *way in found[:15]]
    lighter = [other.lora for other, _ in search.alternatives(own._replace(lora=ADAPTERS), 4)]
    assert lighter == [ADAPTERS] * 15 + [dataclasses.replace(ADAPTERS, base_dtype='int8')] * 16
    assert not search.with_lighter_base(own._replace(lora=dataclasses.replace(ADAPTERS, base_dtype='int8')))


# ---------------------------------------------------------------- before step 0


def state_and_batch(own, rows=8, length=32):
    return (abstract_state(own.config, own.hyper, own.accumulate, own.mesh),
            abstract_batch(own.mesh, rows, length))


class Quick(Setting):
    """A setting whose program compiles in less time, for the few runs of a test."""

    def lower(self, batch, state=None):
        lowered = super().lower(batch, state)
        return types.SimpleNamespace(compile=lambda: lowered.compile(compiler_options=QUICK))


def test_a_step_is_described_before_it_runs_and_its_parts_are_the_compilers():
    """The lines name memory and traffic, on a CPU no time; parameters, optimizer and batch are the argument bytes of
    the program, to the byte; the second step of a shape reuses the program.
    """
    own, lines = setting(accumulate=2), []
    shapes = abstract_batch(own.mesh, 8, 16)
    state, batch = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
                                (abstract_state(own.config, own.hyper, 2, own.mesh), shapes))
    jitted = CompiledStep(Quick(*own), lines.append)
    for _ in range(2):
        state, _ = jitted(state, batch)
    (described,), (compiled_step,) = lines, jitted.programs.values()
    assert int(state.optimizer.count) == 1
    assert described.startswith('compiled the step for 8 x 16 tokens in ')
    assert 'GiB a device: parameters ' in described and 'by mesh axis: fsdp ' in described
    assert 'estimated' not in described
    parts = one_mesh.uncompiled(own, shapes, None).parts
    assert (parts['parameters'] + parts['optimizer'] + one_mesh.device_bytes(batch) ==
            compiled_step.memory_analysis().argument_size_in_bytes)


def test_a_shape_is_compiled_once(monkeypatch):
    """Steps 2 and 4 of the same shape reuse the program; another shape is one more.  A text that cannot be read is
    said, and ends no run.
    """
    def unreadable(*_):
        raise ValueError('no such loop')

    trivial = jax.jit(lambda state, batch: (state + batch.tokens_BT.sum(), {}))
    monkeypatch.setattr(Setting, 'lower', lambda self, batch, state: trivial.lower(state, batch))
    monkeypatch.setattr(one_mesh, 'from_compiled', unreadable)
    lines, state = [], jax.numpy.int32(0)
    jitted = CompiledStep(setting(), lines.append)
    for length in (4, 4, 8, 4):
        state, _ = jitted(state, jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype),
                                              abstract_batch(setting().mesh, 8, length)))
    assert len(jitted.programs) == len(lines) == 2 and int(state) == 8 * (4 + 4 + 8 + 4)
    assert 'is not known: no such loop' in lines[0]


class Full(Setting):
    """A setting whose program does not fit."""

    def lower(self, batch, state=None):
        raise exhausted()


def test_out_of_memory_names_the_nearest_plan_that_fits(monkeypatch):
    """One line: what was needed, what there is, and the flags of the first alternative that fits."""
    tried, lines = [], []

    def plan_train(other, batch, *_):
        tried.append(other)
        fits = other.accumulate == 2
        return MeshPlan(one_mesh.mesh_dim_of(other.mesh), batch.tokens_BT.shape[0], 32, other.accumulate,
                        other.compute.remat_block, {}, 1, fits, '' if fits else 'too large', needed=GIB)

    monkeypatch.setattr(one_mesh, 'plan_train', plan_train)
    own = setting('2,2,1', jax.devices()[:4])
    with pytest.raises(ValueError) as error:
        CompiledStep(Full(*own), lines.append)(*state_and_batch(own, 4))
    assert str(error.value) == (
        "out of memory: mesh_dim='2,2,1' with 4 x 32 tokens needs 19.54 GiB where 15.75 GiB are to be had; the nearest "
        'plan that fits: --mesh_dim=1,2,2 --train_dataset.json_dataset.batch_size=2 '
        '--optimizer.accumulate_gradient_steps=2 and 2 times the --total_steps')
    assert len(tried) == 6 and '--mesh_dim=1,4,1: too large' in lines[1]
    monkeypatch.setattr(one_mesh, 'plan_train', lambda other, *_: dataclasses.replace(plan(), fits=False, reason='no'))
    with pytest.raises(ValueError, match='nothing else that was tried fits these devices'):
        CompiledStep(Full(*own), lines.append)(*state_and_batch(own, 4))


def test_the_remedy_names_flags_that_have_an_effect(monkeypatch):
    """The rows' flag is that of the data set's kind, and what the plan that fits does not keep is switched off: from
    these flags train.py has that plan.
    """
    monkeypatch.setattr(one_mesh, 'plan_train', lambda other, batch, *_: dataclasses.replace(
        plan(), fits=batch.tokens_BT.shape[0] == 2))
    own = setting('2,2,1', jax.devices()[:4], compute=Compute(remat_attention='save:q,k', remat_mlp='nothing_saveable'))
    flag = 'train_dataset.huggingface_dataset.batch_size'
    with pytest.raises(ValueError) as error:
        CompiledStep(Full(*own), lambda line: None, batch_size_flag=flag)(*state_and_batch(own, 4))
    said = str(error.value).partition('that fits: ')[2].partition(' and 2 times')[0]
    train = parse_flags(['train.py', '--llama.remat_attention=save:q,k', '--llama.remat_mlp=nothing_saveable',
                         *said.split()], flags.TRAIN, '')
    kept = [train.llama[name] for name in ('remat_block', 'remat_attention', 'remat_mlp')]
    assert kept == ['nothing_saveable', '', '']
    assert (train.mesh_dim, train.optimizer.accumulate_gradient_steps) == ('1,2,2', 2)
    assert train.train_dataset.huggingface_dataset.batch_size == 2 and 'json_dataset' not in said


def test_the_remedy_names_adapters_by_flags_that_make_them(monkeypatch):
    monkeypatch.setattr(one_mesh, 'plan_train', lambda other, *_: dataclasses.replace(
        plan(), fits=bool(other.lora) and other.lora.base_dtype == 'int8'))
    own = setting('2,2,1', jax.devices()[:4])
    with pytest.raises(Mistake) as error:
        CompiledStep(Full(*own), lambda line: None)(*state_and_batch(own, 4))
    said, _, rest = str(error.value).partition('that fits: ')[2].partition(' (')
    assert said == '--lora.rank=16 --lora.base_dtype=int8' and rest == 'adapters alone train: LoRA)'
    train = parse_flags(['train.py', *said.split()], flags.TRAIN, '')
    assert settings.read_lora(train, Compute()) == Lora(16, 32.0, base_dtype='int8', seed=42)


def test_a_step_of_adapters_takes_its_base():
    """The lines name base and adapters; a setting and a base that do not go together are the program's fault."""
    own, lines = setting('1,1,1', jax.devices()[:1], lora=ADAPTERS), []
    shapes = abstract_batch(own.mesh, 4, 8)
    state, batch, base = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
                                      (own.state(), shapes, abstract_base(TINY, own.mesh, 'bf16')))
    jitted = CompiledStep(Quick(*own), lines.append, frozen=base)
    for _ in range(2):
        state, _ = jitted(state, batch)
    assert int(state.optimizer.count) == 2 and len(lines) == 1
    assert 'GiB a device: base ' in lines[0] and ', adapters ' in lines[0] and 'parameters' not in lines[0]
    with pytest.raises(ValueError, match='a frozen base go together'):
        CompiledStep(own, lines.append)


def test_processes_wait_for_each_other_between_compiling_and_running(monkeypatch):
    """Once for each program, none while a plan that fits is looked for: there only one process may be."""
    happened = []

    class Recorded(Setting):
        def lower(self, batch, state=None):
            happened.append('compile')
            return types.SimpleNamespace(compile=lambda: lambda state, batch: (happened.append('run'), {}))

    def step_of(kind):
        return CompiledStep(kind(*setting()), lambda line: happened.append('describe'), lambda: happened.append('wait'))

    monkeypatch.setattr(CompiledStep, '_summary', lambda *_: [])
    compiled_step = step_of(Recorded)
    for length in (4, 4, 8):
        compiled_step(*state_and_batch(setting(), 8, length))
    assert happened == ['compile', 'describe', 'wait', 'run', 'run', 'compile', 'describe', 'wait', 'run']
    happened.clear()
    monkeypatch.setattr(one_mesh, 'plan_train', lambda other, *_: dataclasses.replace(plan(), fits=len(happened) > 5))
    with pytest.raises(ValueError, match='the nearest plan that fits'):
        step_of(Full)(*state_and_batch(setting(), 8))
    assert set(happened) == {'describe'} and len(happened) > 5


def test_other_faults_of_the_compiler_keep_their_name(monkeypatch):
    def lower(*_):
        raise jax.errors.JaxRuntimeError('INTERNAL: something else')

    monkeypatch.setattr(Setting, 'lower', lower)
    own = setting()
    with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
        CompiledStep(own, print)(*state_and_batch(own))


def test_resized_keeps_positions_and_segments():
    own = setting()
    batch = compiled.resized(abstract_batch(own.mesh, 8, 32, 4, segments=True), 4, own)
    assert [x.shape for x in jax.tree.leaves(batch)] == [(4, 32), (4, 32), (4, 4), (4, 4), (4, 4), (4,)]
    assert compiled.resized(abstract_batch(own.mesh, 8, 32), 4, own).loss_positions_BP is None


# ---------------------------------------------------------------- the program


def parse(*arguments):
    return parse_flags(['plan.py', '--topology=v5e:2x4', '--load_llama_config=debug', *arguments], flags.PLAN, '')


def test_a_recipe_of_train_py_is_understood(golden):
    """Row count, length, mesh and what the optimizer keeps come from it; its data and learning rates are left be."""
    configs = golden.parent.parent / 'configs'
    assert parse_flags(['plan.py', f'--config={configs}/tiny.py'], flags.PLAN, '').seq_length == 128
    config = parse_flags(['plan.py', f'--config={configs}/article_001.py', '--batch_size=16'], flags.PLAN, '')
    assert (config.mesh_dim, config.seq_length, config.batch_size) == ('1,4,2', 1024, 16)
    assert config.load_llama_config == '3b'
    assert program.hyperparameters(config.optimizer) == AdamW(bf16_momentum=True, multiply_by_parameter_scale=True)


def test_the_printed_command_says_what_was_planned():
    """train.py, given the command, has the planned mesh, batch, dtype, remat and optimizer."""
    config = parse('--llama.remat_block=save:q,k', '--optimizer.adamw_optimizer.bf16_momentum=True', '--seq_length=512',
                   '--update_llama_config=dict(num_hidden_layers=4)', '--train_dataset.type=json')
    words = shlex.split(program.command(config, plan('2,2,2', batch_size=16)))
    assert words[:2] == ['python', 'train.py'] and words[-1] == '…'
    train = parse_flags(words[1:-1], flags.TRAIN, '')
    rows = train.train_dataset.json_dataset
    assert (train.mesh_dim, rows.batch_size, rows.seq_length, train.dtype) == ('2,2,2', 16, 512, 'bf16')
    assert train.llama.remat_block == 'save:q,k' and train.optimizer.adamw_optimizer.bf16_momentum
    assert train.update_llama_config == 'dict(num_hidden_layers=4)' and train.attention == 'pallas'
    served = shlex.split(program.command(parse('--serve', '--seq_length=256'), plan('1,1,8', batch_size=4)))
    serve = parse_flags(served[1:-1], flags.SERVE, '')
    assert (serve.mesh_dim, serve.lm_server.batch_size, serve.input_length, serve.seq_length) == ('1,1,8', 4, 128, 256)


def test_adapters_are_planned_as_their_flags_say(monkeypatch):
    """plan.py's setting has them, and the command that it prints says them to train.py."""
    planned = []
    monkeypatch.setattr(program, 'plan_train', lambda own, *_: planned.append(own) or plan())
    config = parse('--lora.rank=8', '--lora.base_dtype=int8', '--lora.targets=w_q,w_down', '--mesh_dim=1,4,2')
    sizes, compute = program.model_flags(config)
    file = types.SimpleNamespace(plan=lambda mesh_dim, batch_size, compile_one: compile_one(batch_size))
    program.plan_mesh(config, sizes, compute, '1,4,2', setting().mesh, None, None, file)
    assert planned[0].lora == Lora(8, 16.0, ('w_q', 'w_down'), base_dtype='int8')
    words = shlex.split(program.command(config, plan('1,4,2')))
    train = parse_flags(words[1:-1], flags.TRAIN, '')
    assert settings.read_lora(train, compute) == dataclasses.replace(planned[0].lora, seed=train.seed)


def test_the_table_shows_base_and_adapters_as_weights():
    own = dataclasses.replace(plan(), parts=dict(base=GIB, adapters=GIB, optimizer=3 * GIB, activations=4 * GIB))
    assert table.cells(own)[2:5] == ('2.00', '3.00', '4.00')


@pytest.mark.parametrize('mesh_dim', ['!1,4,2', 'dp:1,mp:2,fsdp:4'])
def test_a_mesh_is_planned_as_it_was_written(mesh_dim, tmp_path, monkeypatch, capsys):
    """The order of devices and axes is the user's in the mesh that is compiled for, in the row that is kept, which is
    none of the mesh in its usual order, and in the command that is printed.
    """
    planned = []

    def plan_train(own, *_):
        planned.append(own.mesh)
        return dataclasses.replace(plan(), mesh_dim=own.spelling)

    monkeypatch.setattr(tpu_compile, 'devices', lambda name: jax.devices())
    monkeypatch.setattr(program, 'usable_hbm', lambda mesh: 2 * GIB)
    monkeypatch.setattr(program, 'plan_train', plan_train)
    for wanted in (mesh_dim, mesh_dim, '1,4,2'):
        program.main(parse(f'--mesh_dim={wanted}', f'--output={tmp_path}/plan.json'))
    assert planned == [make_mesh(mesh_dim), make_mesh('1,4,2')]
    written = json.loads((tmp_path / 'plan.json').read_text())
    assert [row['mesh_dim'] for row in written['rows']] == [mesh_dim, '1,4,2']
    said = capsys.readouterr().out.split('chosen: ')[1]
    assert said.startswith(f'{mesh_dim}\n') and f'--mesh_dim={mesh_dim}' in shlex.split(said)


def test_the_printed_command_names_the_flags_of_the_kind_of_data_set():
    """Without a type that is train.py's default, huggingface: its json_dataset flags would have no effect."""
    words = shlex.split(program.command(parse('--seq_length=512'), plan('2,2,2', batch_size=16)))
    rows = parse_flags(words[1:-1], flags.TRAIN, '').train_dataset
    assert (rows.type, rows.huggingface_dataset.batch_size, rows.huggingface_dataset.seq_length) == (
        'huggingface', 16, 512)


def test_a_finished_row_is_not_compiled_again(tmp_path, monkeypatch):
    """The same question finds its row in --output; another flag, or other sources, asks anew."""
    compiled_rows = []

    def compile_one(batch_size):
        compiled_rows.append(batch_size)
        return plan('1,4,2', batch_size=batch_size)

    def ask(batch_size, **flags):
        return PlanFile(tmp_path / 'plan.json', flags).plan('1,4,2', batch_size, compile_one)

    assert ask(8) == ask(8) == plan('1,4,2') and compiled_rows == [8]
    ask(16)
    ask(16)
    assert compiled_rows == [8, 16]
    ask(8, seq_length=2048)
    assert compiled_rows == [8, 16, 8]
    monkeypatch.setattr(plan_file, 'digest', lambda *_: 'other')
    ask(8, seq_length=2048)
    assert compiled_rows == [8, 16, 8, 8]
    for content in ('no JSON', '{"rows": []}', '[1]'):
        (tmp_path / 'plan.json').write_text(content)
        with pytest.raises(ValueError, match='was not written by plan.py'):
            ask(8)


def test_a_row_of_the_table_is_at_most_160_wide():
    """Of 256 chips with a traffic of all axes; numbers stay apart."""
    wide = dataclasses.replace(plan('16,16,1', 12.3456, 95 * GIB, 96 * GIB, 4096), temporaries=60 * GIB, parts=dict(
        parameters=15 * GIB, optimizer=30 * GIB, activations=22 * GIB), wire_bytes={'dp': 10**11, 'fsdp': 10**11,
                                                                                   'mp': 10**11})
    cells = table.cells(wide)
    line = table.row(cells)
    assert len(line) <= 160 and all(f' {cell} ' in f' {line} ' for cell in cells)
    assert len(table.row(table.HEADER)) == len(line)
    refused = table.cells(one_mesh.refused(dataclasses.replace(plan(), temporaries=None, estimate=None,
                                                                  wire_bytes=None), exhausted(), 5.0))
    assert refused[5:9] == ('-', '19.54', '15.75', 'no') and refused[9:14] == ('-',) * 5


@pytest.mark.parametrize('arguments, says', [
    (['--topology='], 'topology is empty'), (['--load_llama_config='], 'load_llama_config is empty'),
    (['--batch_size=0'], 'batch_size=0 must be at least 1'),
    (['--llama.remat_mlp=save:x'], "'save:x' is not known"),
    (['--lora.rank=129'], 'lora.rank=129 must be at most 128'),
    (['--serve', '--lora.rank=4'], 'lora.rank=4 is of training'),
    (['--serve', '--seq_length=4096'], 'seq_length=4096 is more than the model was made for'),
    (['--optimizer.accumulate_gradient_steps=0'], 'accumulate_gradient_steps=0 must be at least 1'),
    (['--topology=v9:2x2'], "name='v9:2x2' names no chip: one of v4, v5e"),
])
def test_wrong_flags_are_refused_before_anything_is_compiled(arguments, says):
    with pytest.raises(Mistake, match=says):
        program.main(parse(*arguments))


# ---------------------------------------------------------------- with the TPU compiler


@pytest.mark.libtpu
def test_every_mesh_of_a_small_slice_is_planned_and_one_chosen(tmp_path):
    """v5e:2x2: six rows that fit, the parts and the compiler's temporaries within what is needed; the fastest, or one
    within 3 %, is chosen; the second time nothing is compiled.
    """
    (tmp_path / 'tiny.json').write_text(json.dumps(dataclasses.asdict(TINY)))
    command = [sys.executable, 'plan.py', f'--load_llama_config=json::{tmp_path}/tiny.json', '--topology=v5e:2x2',
               '--seq_length=64', '--attention=reference', f'--output={tmp_path}/plan.json',
               '--llama.remat_block=nothing_saveable']
    # apart from this process, in which the TPU compiler writes the schedule of all that it compiles
    environment = {name: value for name, value in os.environ.items() if name != 'LIBTPU_INIT_ARGS'}
    run = lambda: subprocess.run(command, env=environment, cwd=sources.ROOT, check=True, capture_output=True,
                                 text=True).stdout
    said = run()
    written = json.loads((tmp_path / 'plan.json').read_text())
    plans = [read_plan(row) for row in written['rows']]
    assert [one.mesh_dim for one in plans] == ['1,1,4', '1,2,2', '1,4,1', '2,1,2', '2,2,1', '4,1,1']
    for one in plans:
        assert one.fits and one.usable == int(15.75 * GIB) and one.compile_seconds > 0
        assert one.parts['parameters'] + one.parts['optimizer'] + one.temporaries < one.needed < 2**25
        assert set(one.wire_bytes) and one.estimate.flops > 0 and one.seconds > 0
    assert set(plans[-1].wire_bytes) == {'dp'}
    chosen = read_plan(written['chosen'])
    assert chosen in plans and chosen.seconds <= 1.03 * min(one.seconds for one in plans)
    assert f'chosen: {chosen.mesh_dim}\n  python train.py' in said and written['command'] in said
    run()
    assert json.loads((tmp_path / 'plan.json').read_text()) == written


@pytest.mark.libtpu
@pytest.mark.parametrize('dtype', ['bf16', 'int8'])
def test_a_v5e_holds_no_copy_of_the_base_in_float32(dtype):
    """Sixteen more layers take less beside the arguments than the base itself has in its dtype: gradients of it, or a
    float32 copy, would be two to four times that.
    """
    def compiled_bytes(layers):
        config = dataclasses.replace(TINY, hidden_size=512, intermediate_size=1024, num_attention_heads=4,
                                     num_hidden_layers=layers)
        own = setting('1,1,1', tpu_compile.devices('v5e:1x1'), config, dataclasses.replace(LEAST, dtype='bf16'),
                      lora=dataclasses.replace(ADAPTERS, base_dtype=dtype))
        batch = abstract_batch(own.mesh, 1, 8)
        program = own.lower(batch).compile()
        return program.memory_analysis().temp_size_in_bytes, one_mesh.uncompiled(own, batch, None).parts

    (few, less), (many, more) = compiled_bytes(16), compiled_bytes(32)
    assert many - few < more['base'] - less['base']


@pytest.mark.libtpu
def test_usable_memory_is_what_libtpu_says():
    """GiB of a chip; on a CPU there is no limit."""
    found = {name: usable_hbm(make_mesh('1,-1,1', tpu_compile.devices(name))) / GIB for name in chips.CHIPS}
    assert found == pytest.approx(dict(v4=30.75, v5e=15.75, v5p=95.74, v6e=31.25, v7x=94.75))
    assert usable_hbm(setting().mesh) is None


@pytest.mark.libtpu
@pytest.mark.parametrize('name', ['v4:8x8x4', 'v5e:16x16', 'v5p:8x8x4', 'v6e:16x16'])
def test_256_chips_have_meshes_and_hosts(name):
    """64 hosts of 4 chips; 65b divides over 256 chips, and a device holds a 256th of it."""
    own = setting('1,32,8', tpu_compile.devices(name), MODELS['65b'])
    row = one_mesh.uncompiled(own, abstract_batch(own.mesh, 256, 2048), None)
    assert len(own.mesh.devices.flat) == 256 and len(host.host_devices(own.mesh)) == 4
    assert row.parts['parameters'] == pytest.approx(4 * 65.3e9 / 256, rel=0.01)


@pytest.mark.libtpu
def test_a_program_too_large_for_a_v5e_is_answered_with_one_that_fits():
    """9,000 layers of 164 thousand weights, 10 bytes each: 14.8 GB and 5.9 GB of gradients are refused by the compiler
    on mesh 4,1,1, and half of it fits: the nearest mesh is 2,2,1.
    """
    many = dataclasses.replace(TINY, hidden_size=128, intermediate_size=256, num_hidden_layers=9000, head_dim=16,
                               num_key_value_heads=8)
    own = setting('4,1,1', tpu_compile.devices('v5e:2x2'), many, dataclasses.replace(LEAST, dtype='bf16'))
    lines = []
    with pytest.raises(ValueError, match=r"^out of memory: mesh_dim='4,1,1' with 4 x 32 tokens needs \d+\.\d+ GiB "
                       'where 15.75 GiB are to be had; the nearest plan that fits: --mesh_dim=2,2,1$'):
        CompiledStep(own, lines.append)(*state_and_batch(own, 4, 32))
    assert 'looking for a plan' in lines[0] and '--mesh_dim=2,2,1: fits, ' in lines[-1]


@pytest.mark.libtpu
def test_decoding_is_planned():
    """tiny on v5e:2x2 as 1,1,4: bfloat16 weights, a cache of 4 slots and a spare one, and of a piece more; both fit."""
    mesh = make_mesh('1,1,4', tpu_compile.devices('v5e:2x2'))
    own = decoding.plan_decoding(TINY, Compute('bf16', 'pallas'), mesh, '1,1,4', 128, 4, chips.find('v5e'),
                                 usable_hbm(mesh))
    weights = one_mesh.device_bytes(abstract_state(TINY, AdamW(), 1, mesh).params)
    assert own.parts == dict(parameters=weights // 2, cache=2 * 2 * 3 * 5 * 256 * 128)
    assert own.fits and own.tokens == 4 and own.estimate.flops > 0
