"""The benchmark of the kernels: nothing is timed that is wrong, nothing twice, and nothing in interpret mode."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from instruments import sources
from instruments.bench import anchors, report, shapes, timing
from instruments.bench import attention as benchmark
from instruments.bench.cases import Case, with_gradient
from instruments.bench.shapes import AttentionShape, DecodeShape

ROOT = sources.ROOT
SMALL = AttentionShape(B=1, T=64, H=2, K=1, D=64)


def plain(scale=64 ** -0.5, hidden=-1e30):
    """Attention written down once more: bfloat16 inputs, float32 inside."""
    def forward(q_BTHD, k_BTKD, v_BTKD):
        q, k, v = (jnp.asarray(x, jnp.float32) for x in (q_BTHD, k_BTKD, v_BTKD))
        s_BHTS = jnp.einsum('BTHD,BSD->BHTS', q, k[:, :, 0]) * scale
        s_BHTS = jnp.where(jnp.tril(jnp.ones(s_BHTS.shape[-2:], bool))[None, None], s_BHTS, hidden)
        return jnp.einsum('BHTS,BSD->BTHD', jax.nn.softmax(s_BHTS, -1), v[:, :, 0]).astype(jnp.bfloat16)
    return forward


@pytest.mark.parametrize('backward', [False, True])
def test_a_kernel_that_is_wrong_is_not_timed(backward):
    """The right attention passes the check, forward and backward; twice the scale and a missing mask do not."""
    assert benchmark.check(Case(with_gradient(plain(), backward)), SMALL, backward) < 0.005
    for wrong in (plain(scale=0.25), plain(hidden=0.0)):
        with pytest.raises(ValueError, match='differs from kernels/reference.py'):
            benchmark.check(Case(with_gradient(wrong, backward)), SMALL, backward)


def test_decoding_is_checked_against_the_reference_too():
    """A query sees the filled positions; one that sees the whole cache is refused."""
    shape = DecodeShape(B=4, S=64, H=2, K=1, D=64, lengths='edges')

    def forward(q_BHD, k_BSKD, v_BSKD, lengths_B):
        s_BHS = jnp.einsum('BHD,BSD->BHS', q_BHD.astype(jnp.float32), k_BSKD[:, :, 0].astype(jnp.float32)) / 8
        seen_BS = jnp.arange(64)[None] < lengths_B[:, None]
        p_BHS = jnp.where(seen_BS[:, None], jax.nn.softmax(jnp.where(seen_BS[:, None], s_BHS, -1e30), -1), 0)
        return jnp.einsum('BHS,BSD->BHD', p_BHS, v_BSKD[:, :, 0].astype(jnp.float32))

    case = Case(forward, integers=(shapes.lengths(shape),))
    assert benchmark.check(case, shape, False) < 0.005
    everything = lambda q, k, v, lengths_B: forward(q, k, v, jnp.full_like(lengths_B, 64))
    with pytest.raises(ValueError, match='differs'):
        benchmark.check(dataclasses.replace(case, function=everything), shape, False)


def test_without_a_tpu_nothing_is_timed_by_the_clock():
    with pytest.raises(ValueError, match='no TPU is attached.*--target=v5e'):
        benchmark.attached_chip()


def static(ms):
    hot = dict(bound='MXU', units=dict(MXU=0.9))
    return dict(method='static', ms=ms, mxu=0.5, hot=hot, bundles=10, spills=0, vmem_bytes=2**20, hbm_bytes=2e6)


def test_a_row_that_is_there_is_not_timed_again(monkeypatch, tmp_path):
    """Two runs time each tiling once, the second none."""
    timed = []
    monkeypatch.setattr(benchmark, 'check', lambda *_: 0.001)
    monkeypatch.setattr(benchmark, 'make_case', lambda kernel, *_: timed.append(kernel) or Case(None))
    monkeypatch.setattr(benchmark, 'ours', lambda *_, **__: Case(None))
    monkeypatch.setattr(benchmark, 'static_row', lambda *_: static(0.5))
    arguments = ['s1'], ['ours', 'flash'], ['forward'], ['v5e'], tmp_path
    first = benchmark.run(*arguments)
    assert timed == ['ours', 'flash', 'flash'] and benchmark.run(*arguments) == first
    assert len(timed) == 3 and len((tmp_path / 'rows.jsonl').read_text().splitlines()) == 3


@pytest.mark.parametrize('changed, again', [
    ('kernels/flash_attention.py', ['ours']), ('kernels/tuned_tiles.json', ['ours']),
    ('instruments/bench/anchors.py', ['flash', 'flash']),
    ('instruments/kernel_time/static_cost.py', ['ours', 'flash', 'flash']),
    ('instruments/tpu/step_cost.py', ['ours', 'flash', 'flash']), ('instruments/bench/report.py', []),
])
def test_a_row_is_timed_again_when_a_source_that_it_follows_from_changes(changed, again, monkeypatch, tmp_path):
    """The kernel's own, and the instruments' that time it; how rows are printed is none of them."""
    timed = []
    monkeypatch.setattr(sources, 'ROOT', tmp_path)
    for room in ('kernels', 'instruments'):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns('__pycache__'))
    monkeypatch.setattr(benchmark, 'time_row', lambda shape, kernel, *_: timed.append(kernel) or static(0.5))
    monkeypatch.setattr(report, 'line', lambda row: '')
    arguments = ['s1'], ['ours', 'flash'], ['forward'], ['v5e'], tmp_path / 'runs'
    benchmark.run(*arguments)
    timed.clear()
    with (tmp_path / changed).open('a') as file:
        file.write('\n')
    benchmark.run(*arguments)
    assert timed == again


def test_a_row_states_useful_work_per_time(monkeypatch):
    """s1 forward in 0.966 ms on v5e: 71.2 TFLOP/s, 36.1 % of 197; its 268 MB are 33.9 % of what HBM could bring."""
    monkeypatch.setattr(benchmark, 'make_case', lambda *_: Case(None))
    monkeypatch.setattr(benchmark, 'static_row', lambda *_: static(0.966))
    row = benchmark.time_row(shapes.ATTENTION['s1'], 'flash', False, (1024, 1024), 'v5e')
    assert round(row['tflops'], 1) == 71.2 and round(row['percent_of_peak'], 1) == 36.1
    assert round(row['percent_of_hbm'], 1) == 33.9 and 'error_rms' not in row


def test_tiles_that_do_not_divide_are_left_out():
    assert anchors.grid('flash', shapes.ATTENTION['s1']) == [(512, 512), (1024, 1024)]
    assert anchors.grid('flash', dataclasses.replace(SMALL, T=512)) == [(512, 512)]
    assert anchors.grid('flash', shapes.ATTENTION['s1_segments']) == []
    assert benchmark.tilings('paged', shapes.ATTENTION['s1'], False) == []
    assert benchmark.tilings('ours', shapes.DECODE['d1'], True) == []


PROFILE = """
planes { name: "/device:TPU:0"
  lines { name: "XLA Ops" timestamp_ns: 0
    events { metadata_id: 1 offset_ps: 0 duration_ps: 966000000 }
    events { metadata_id: 2 offset_ps: 966000000 duration_ps: 5000000 }
    events { metadata_id: 1 offset_ps: 980000000 duration_ps: 970000000 } }
  lines { name: "Steps" timestamp_ns: 0 events { metadata_id: 1 offset_ps: 0 duration_ps: 7 } }
  event_metadata { key: 1 value { id: 1 name: "%attend.1 = bf16[8]{0} custom-call(...)" } }
  event_metadata { key: 2 value { id: 2 name: "%copy.3 = bf16[8]{0} copy(...)" } } }
planes { name: "/host:CPU" lines { name: "XLA Ops" events { metadata_id: 1 offset_ps: 0 duration_ps: 9 } }
  event_metadata { key: 1 value { id: 1 name: "attend.1" } } }
"""


def test_the_profile_gives_the_executions_of_the_kernel_alone():
    """Two executions on the device of 966 and 970 us; the copy, the host and the other lines do not count."""
    data = jax.profiler.ProfileData
    profile = data.from_serialized_xspace(data.text_proto_to_serialized_xspace(PROFILE))
    assert timing.kernel_durations(profile, ['attend.1']) == {'attend.1': [966000.0, 970000.0]}


def rows():
    row = dict(shape='s1', target='v5e', chip='v5e', jax='0.10.2', libtpu='0.0.42.1', tflops=1.0, percent_of_peak=2.0,
               percent_of_hbm=3.0, flops=1e9, least_bytes=1e6, **{'pass': 'forward'})
    return [row | static(0.5) | dict(kernel='ours', tiles='tuned'),
            row | static(1.2) | dict(kernel='flash', tiles=[512, 512]),
            row | static(1.0) | dict(kernel='flash', tiles=[1024, 1024]),
            row | dict(kernel='splash', tiles=[2048, 2048, 512], error='VMEM')]


def test_the_table_shows_the_best_tiles_and_our_ratio_to_the_best_other():
    lines = report.table(rows()).splitlines()
    assert len(lines) == 8 and '| ours | tuned | 0.500 |' in lines[2] and lines[2].endswith('| 0.50 |')
    assert '| flash | 1024,1024 | 1.000 |' in lines[3]
    assert 'not a measurement' in lines[6]
    assert lines[7] == 'Refused by the compiler: v5e s1 forward splash 2048,2048,512.'


def test_a_case_that_lies_in_vmem_is_marked():
    """Fewer bytes than the least that must cross HBM: the time does not hold their transfer, and the table says so."""
    assert ' *' not in report.table(rows())
    text = report.table([rows()[0] | dict(hbm_bytes=1e5)])
    assert '| 0.500 * |' in text and 'XLA keeps operands' in text


def test_the_roofline_is_a_picture(tmp_path):
    report.roofline(rows(), tmp_path / 'roofline.png')
    assert (tmp_path / 'roofline.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='no row'):
        report.roofline(rows()[3:], tmp_path / 'empty.png')


def test_rows_are_json(tmp_path):
    assert json.loads(json.dumps(benchmark.describe('d1', shapes.DECODE['d1'], 'paged', 'forward', (128, 8), 'v5e')))


def test_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, '-m', 'instruments.bench.attention', '--target=v5e', '--shapes=s9'],
                          cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert done.stderr.startswith("attention.py: ['s9'] is none of SHAPES=['s1', ")
