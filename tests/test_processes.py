"""Several processes of one run on this machine, each with its own virtual devices: they meet, train and save as one.

Every program runs in processes of its own, started at free ports; what must not be a program runs in threads.
"""
import inspect
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import train
from checkpoint import native
from hosts import processes, start
from mistake import Mistake
from model.config import MODELS
from model.partition import make_mesh
from program import flags, parse, settings

ROOT = pathlib.Path(__file__).parent.parent
OPTIMIZER = '--optimizer.adamw_optimizer.'
SLOW = 240  # seconds after which a test gives up: many times what a quiet machine needs


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def launch(count: int, devices: int, program: list[str], directory) -> list[subprocess.Popen]:
    """`count` processes of `devices` devices each; what they print goes to directory/log-K."""
    port, started = free_port(), []
    environment = os.environ | dict(JAX_PLATFORMS='cpu', PYTHONPATH=str(ROOT), PYTHONUNBUFFERED='1',
                                    XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} '
                                    '--xla_backend_optimization_level=0')  # compiles a third faster
    for index in range(count):
        distributed = ['--jax_distributed.initialize_jax_distributed=True', f'--jax_distributed.process_id={index}',
                       f'--jax_distributed.num_processes={count}',
                       f'--jax_distributed.coordinator_address=127.0.0.1:{port}']
        with open(directory / f'log-{index}', 'w') as log:
            started.append(subprocess.Popen([sys.executable, *program, *distributed], cwd=ROOT,
                                            env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def run(*arguments) -> tuple[list[int], list[str]]:
    """(exit codes, logs) of `start`."""
    started = launch(*arguments)
    try:
        codes = [process.wait(SLOW) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(arguments[3] / f'log-{index}').read_text() for index in range(len(started))]
    return codes, ['\n'.join(line for line in log.splitlines() if 'Gloo' not in line) for log in logs]


# ---------------------------------------------------------------- the roll call, in threads


def roll(*processes, seconds=5.0, port=None) -> list[str]:
    """What each of the processes (num_processes, process_id) hears: '' or the error."""
    port, heard = port or free_port(), {}

    def one(place, count, index):
        try:
            start.meet(f'127.0.0.1:{port}', count, index, seconds)
            heard[place] = ''
        except ValueError as error:
            heard[place] = str(error)

    threads = [threading.Thread(target=one, args=(place, *who)) for place, who in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SLOW)
    return [heard[place] for place in range(len(processes))]


def test_all_processes_meet_in_any_order():
    assert roll((3, 2), (3, 1), (3, 0)) == ['', '', '']


def test_a_process_that_does_not_come_is_named_to_all():
    """Two of three: both hear within the time which one is missing, and the flag."""
    began = time.monotonic()
    for error in roll((3, 0), (3, 1), seconds=0.5):
        assert 'jax_distributed.num_processes=3' in error and 'did not come within 0.5 s: [2]' in error
    assert time.monotonic() - began < 5


@pytest.mark.parametrize('second, third, says', [
    ((3, 1), (4, 2), 'num_processes=3 on process 0, but 4 on process 2'),
    ((3, 1), (3, 1), 'process_id=1 was given to two processes: number them 0..2')])
def test_numbers_that_do_not_fit_together_are_named_to_all(second, third, says):
    """Process 0 and the one that is wrong hear it at once; who has not come by then hears that nobody is there."""
    errors = roll((3, 0), second, third, seconds=1.0)
    assert says in errors[0] and any(says in error for error in errors[1:]) and all(errors)


def test_wrong_addresses_and_numbers_end_at_once_or_in_time():
    with pytest.raises(ValueError, match='process_id=2 must be from 0 .*num_processes=2'):
        start.meet('127.0.0.1:1', 2, 2, 60)
    for address in ('host', 'host:', ':80', 'host:http', 'host:70000'):
        with pytest.raises(ValueError, match=f"coordinator_address='{address}' must be HOST:PORT"):
            start.meet(address, 2, 1, 60)
    port = free_port()
    with pytest.raises(ValueError, match=f"coordinator_address='127.0.0.1:{port}': process 1 did not .* within 0.3 s"):
        start.meet(f'127.0.0.1:{port}', 2, 1, 0.3)
    with socket.create_server(('', 0)) as taken, pytest.raises(ValueError, match='cannot listen on port'):
        start.meet(f'127.0.0.1:{taken.getsockname()[1]}', 2, 0, 60)


def test_strangers_at_the_port_do_not_disturb_the_roll_call():
    """Somebody sends HTTP first: process 0 goes on waiting for process 1."""
    port = free_port()

    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(('127.0.0.1', port), timeout=1) as connection:
                    connection.sendall(b'GET / HTTP/1.0\r\n\r\n')
                    connection.recv(1)
                return
            except OSError:
                time.sleep(0.01)

    answers = []
    leader = threading.Thread(target=lambda: answers.append(roll((2, 0), port=port)))
    leader.start()
    stranger()
    assert roll((2, 1), port=port) == ['']
    leader.join(SLOW)
    assert answers == [['']]


# ---------------------------------------------------------------- checkpoints, without a model

WORKER = """
import json, pathlib
import jax, numpy as np, jax.numpy as jnp
from program import flags, parse
from hosts import start
from checkpoint import native
from mistake import Mistake
from hosts import processes
from jax.sharding import NamedSharding, PartitionSpec as P
from model.partition import make_mesh

{functions}

@start.failing_together()
def main(config):
    start.start_processes(config)
    mesh, directory = make_mesh(config.mesh_dim), config.logger.output_dir
    made = lambda name, value, *axes: jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, P(*axes)), lambda index: value[index])
    arrays = {{name: made(name, *entry) for name, entry in contents().items()}}
    def outcome(work):
        try:
            return str(work())
        except (ValueError, OSError) as error:
            return f'{{type(error).__name__}}: {{error}}'
    said = body(directory, arrays, outcome)
    pathlib.Path(f'{{directory}}-{{processes.index()}}.json').write_text(json.dumps(said))

parse.run(main, flags.TRAIN)
"""


def contents():
    """name -> (array, its axes): split, replicated, a chunk of rows that does not divide the part, and a scalar."""
    values = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    return {'split': (values, 'fsdp', 'mp'), 'rows': (values * 2, ('dp', 'fsdp')), 'whole': (values[:3] * 3,),
            'half': (values.astype(jnp.bfloat16), None, 'mp'), 'step': (np.int32(7),)}


def workers(tmp_path, count, devices, body) -> list:
    """What `body` (a function of this file, by its source) returned in each of `count` processes."""
    functions = '\n'.join(inspect.getsource(function) for function in (contents, body))
    program = tmp_path / 'worker.py'
    program.write_text(WORKER.format(functions=functions.replace(f'def {body.__name__}(', 'def body(')))
    codes, logs = run(count, devices, [str(program), f'--logger.output_dir={tmp_path}/run', '--mesh_dim=1,4,2'],
                      tmp_path)
    assert codes == [0] * count, logs
    return [json.loads((tmp_path / f'run-{index}.json').read_text()) for index in range(count)]


def saves_and_restores(directory, arrays, outcome):
    native.CHUNK_BYTES = 5 * 8 * 4  # five rows of a part: six do not divide by that
    native.check_shared(directory)
    native.save(directory, 1, arrays, {}, {}, keep=1)
    native.save(directory, 2, arrays, {'cursor': 5}, {'tokenizer.model': b'abc'}, keep=1)
    targets = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in arrays.items()}
    read = []
    verify = native._verify
    native._verify = lambda path, manifest, names: (read.extend(names), verify(path, manifest, names))
    restored = native.Step(directory).restore(targets)
    for name, array in arrays.items():
        for a, b in zip(array.addressable_shards, restored[name].addressable_shards, strict=True):
            assert np.array_equal(a.data, b.data) and a.index == b.index, name
    return sorted(set(read))


def equal_bits(a, b):
    return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_one_checkpoint_of_two_processes_is_read_by_one_and_by_four(tmp_path):
    """Saved on 2 x 4 devices; in this process on another mesh every bit is there; 4 x 2 restore their own parts and
    save again, to the same files with the same sha256.  Each process verifies what it reads, all together everything.
    """
    verified = [set(names) for names in workers(tmp_path, 2, 4, saves_and_restores)]
    directory = tmp_path / 'run'
    assert native.steps(directory) == [2] and len(list(directory.iterdir())) == 1
    expected = {name: value for name, (value, *_) in contents().items()}
    targets = {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(
        make_mesh('2,1,4'), P(None, 'mp') if value.ndim else P())) for name, value in expected.items()}
    restored = native.Step(directory).restore(targets)
    assert all(equal_bits(restored[name], value) for name, value in expected.items())
    step = native.Step(directory)
    assert step.meta == {'cursor': 5} and step.read_file('tokenizer.model') == b'abc'
    files = step.files
    arrays = {name for name in files if name.startswith('arrays/')}
    assert verified[0] | verified[1] == arrays and all(len(part) < len(arrays) for part in verified)
    (directory / 'step_00000002').rename(tmp_path / 'kept')
    workers(tmp_path, 4, 2, saves_and_restores)
    assert native.Step(directory).files == files


def fails_on_one(directory, arrays, outcome):
    write, commit, begin, results, left = native._write_parts, native._commit, native._begin, [], []

    def attempt(step=2, arrays=arrays):
        results.append(outcome(lambda: native.save(directory, step, arrays, {}, {}, keep=1)))
        left.extend(path.name for path in pathlib.Path(directory).glob('*.tmp-*'))

    def full(path, *rest):
        raise OSError('disk full')

    def other_disk(temporary, *rest):
        next(temporary.rglob('c/0/1')).unlink()
        commit(temporary, *rest)

    attempt(1)
    attempt(2, {name: value * np.nan if name == 'split' else value for name, value in arrays.items()})
    native._write_parts = full if processes.index() == 1 else write
    attempt()
    native._write_parts, native._commit = write, other_disk
    attempt()
    native._commit = commit
    attempt(1)
    native._begin = lambda *arguments: None
    attempt()
    native._begin = begin
    results.append(outcome(lambda: native.check_shared(f'{directory}-of-{processes.index()}')))
    results.append(outcome(lambda: processes.refuse_difference('it', str(processes.index()), 'do')))
    attempt()
    return results, left


def test_what_fails_on_one_process_fails_on_all_and_leaves_the_step_before(tmp_path):
    """NaN, a full disk on process 1, a file that process 0 does not see, a step that exists, directories that are not
    shared: an error on both, each naming the reason, nothing left behind; and then a save succeeds.
    """
    (first, left), (second, _) = workers(tmp_path, 2, 4, fails_on_one)
    says = [('step_00000001$',) * 2, ("array 'split' holds NaN",) * 2,
            ('^OSError: process 1 failed.*disk full', '^OSError: disk full'),
            ('does not see it', 'process 0 failed.*does not see it.*file system that all processes share'),
            ('exists already', 'process 0 failed.*exists already'),
            ('process 1 failed|arrays', 'which process 0 made, is not seen by process 1'),
            ('is another directory than that of process 1',) * 2,
            ('it is 0 on process 0 and 1 on process 1: do',) * 2, ('step_00000002$',) * 2]
    for heard, wanted in zip(zip(first, second, strict=True), says, strict=True):
        assert all(re.search(want, one) for one, want in zip(heard, wanted, strict=True)), (heard, wanted)
    assert left == [] and [path.name for path in (tmp_path / 'run').iterdir()] == ['step_00000002']


# ---------------------------------------------------------------- the program


def article(golden, output, *more) -> list[str]:
    """The article's command at the size of EasyLM's test model."""
    return ['train.py', f'--load_llama_config=json::{golden}/easylm/model.json', f'--logger.output_dir={output}',
            f'--load_checkpoint=params::{golden}/easylm/streaming_params_fp32', '--train_dataset.type=json',
            f'--tokenizer.vocab_file={golden}/easylm/tokenizer.model', '--train_dataset.text_processor.fields=text',
            f'--train_dataset.json_dataset.path={golden}/easylm/train_200.jsonl', '--log_freq=1',
            '--train_dataset.json_dataset.seq_length=128', '--train_dataset.json_dataset.batch_size=8',
            OPTIMIZER + 'lr=0.02', OPTIMIZER + 'end_lr=0.02', OPTIMIZER + 'lr_warmup_steps=4',
            OPTIMIZER + 'lr_decay_steps=100000000', OPTIMIZER + 'weight_decay=0.001', OPTIMIZER + 'b2=0.9',
            OPTIMIZER + 'bf16_momentum=True', OPTIMIZER + 'multiply_by_parameter_scale=True',
            '--checkpointer.save_optimizer_state=True', '--save_milestone_freq=4', *more]


def rows(directory, name='metrics.jsonl') -> list[dict]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def compare(ours: list[dict], theirs: list[dict], loss: float, gradient: float, params: float) -> None:
    """Loss, norms within these relative errors; step, rate and place in the data exact."""
    for a, b in zip(ours, theirs, strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=loss), a['step']
        assert a['gradient_norm'] == pytest.approx(b['gradient_norm'], rel=gradient), a['step']
        assert a['param_norm'] == pytest.approx(b['param_norm'], rel=params), a['step']
        for exact in ('step', 'dataset_file_loc', 'dataset_example_index', 'dataset_total_tokens'):
            assert a[exact] == b[exact], (exact, a['step'])
        assert a['learning_rate'] == pytest.approx(b['learning_rate'], rel=1e-6), a['step']


def train_here(*arguments) -> None:
    train.main(parse.parse(list(arguments), flags.TRAIN, ''))


@pytest.mark.long
def test_processes_train_save_resume_and_die_together(golden, tmp_path):
    """2 processes x 4 devices are 1 x 8, and EasyLM: 8 steps of the article's run.  Process 0 alone logs, unless all
    shall.  Its checkpoint of step 4 goes on the same on 4 x 2 and another mesh.  When one of the four is killed then,
    the others end, at the latest when its heartbeat is missed (15 s here).

    The bound of loss is 2^k roundings after k steps (this learning rate doubles differences every step, LOG.md), that
    of the gradient's norm ten times as much; norms of the weights keep single precision.
    """
    codes, logs = run(2, 4, article(golden, tmp_path / 'two', '--mesh_dim=1,4,2', '--total_steps=8',
                                    '--log_all_worker=True'), tmp_path)
    assert codes == [0, 0], logs
    assert [path.name for path in sorted((tmp_path / 'two').iterdir())] == [
        'metrics-1.jsonl', 'metrics.jsonl', 'step_00000004', 'step_00000008']
    assert all('2 processes' in log and 'saved' in log for log in logs)
    two = rows(tmp_path / 'two')
    assert [row['loss'] for row in two] == [row['loss'] for row in rows(tmp_path / 'two', 'metrics-1.jsonl')]
    train_here(*article(golden, tmp_path / 'one', '--mesh_dim=1,4,2', '--total_steps=8'))
    one = rows(tmp_path / 'one')
    compare(two, one, 2**8 * 2**-24, 10 * 2**8 * 2**-24, 1e-6)
    compare(two, json.loads((golden / 'easylm/train_curve.json').read_text())[:8], 2e-3, 1e-2, 1e-4)

    shutil.copytree(tmp_path / 'two/step_00000004', tmp_path / 'four/step_00000004')
    (tmp_path / 'soon.py').write_text('import train\nfrom program import flags, parse\nfrom hosts import start\n'
                                      'start.HEARTBEAT_SECONDS = 15\n'
                                      'parse.run(train.main, flags.TRAIN)\n')
    four = launch(4, 2, [str(tmp_path / 'soon.py'), *article(
        golden, tmp_path / 'four', '--mesh_dim=2,2,2', '--total_steps=1000', '--resume=True')[1:]], tmp_path)
    try:
        written, began = tmp_path / 'four/metrics.jsonl', time.monotonic()
        while not (written.exists() and len(rows(tmp_path / 'four')) > 4) and time.monotonic() < began + SLOW:
            assert all(process.poll() is None for process in four), (tmp_path / 'log-0').read_text()
            time.sleep(0.1)
        four[3].kill()
        assert all(process.wait(15 + 30) for process in four)
    finally:
        for process in four:
            process.kill()
    compare(rows(tmp_path / 'four')[:4], one[4:], 2**8 * 2**-24, 10 * 2**8 * 2**-24, 1e-6)
    assert not list((tmp_path / 'four').glob('metrics-*')) and 'compiled' not in (tmp_path / 'log-1').read_text()


def fails_alone(directory, arrays, outcome):
    if processes.index() == 1:
        raise Mistake('broken here')
    processes.exchange('')


def test_a_mistake_on_one_process_ends_all_with_its_line(tmp_path):
    """Process 1 says what is wrong and exits with 2; process 0, which waits for it, repeats it within seconds."""
    began = time.monotonic()
    with pytest.raises(AssertionError) as error:
        workers(tmp_path, 2, 4, fails_alone)
    assert time.monotonic() - began < 60
    logs = [(tmp_path / f'log-{index}').read_text() for index in range(2)]
    assert '[2, 2] == [0, 0]' in str(error.value), logs
    assert 'worker.py: broken here' in logs[1] and 'Traceback' not in logs[1]
    assert 'process 1 failed: broken here; so process 0 ends too' in logs[0]


def test_easylm_s_format_is_refused_before_several_processes_train(golden, monkeypatch):
    monkeypatch.setattr(train.processes, 'count', lambda: 2)
    run = settings.read_run(parse.parse(article(golden, 'x', '--checkpointer.format=easylm'), flags.TRAIN, ''))
    with pytest.raises(ValueError, match='format=easylm is written by one process, and this run has 2: leave it nat'):
        train.checkpoint_writer(run, SimpleNamespace(config=MODELS['3b']), None, SimpleNamespace(values={}), None, 1)
