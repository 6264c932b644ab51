"""Claims about several processes that serve together (serving/followers.py, serve.py).

One test starts two processes of two devices each with EasyLM's model; the others start serve.py around an engine that
only pretends, and never touches a device, so that two processes are up in seconds.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import helpers
import httpx
import jax
import numpy as np
import pytest
from fastapi.testclient import TestClient

import checkpoint
import serve
from data.tokenizer import load_tokenizer
from hosts import processes
from model.config import Compute, config_from_dict
from program import flags, parse
from serving import followers
from serving.api import Options, make_app
from serving.engine import Engine, RequestError
from serving.followers import CallLine, follow
from serving.thread import EngineThread

EMITTERS = 'xla_cpu_use_fusion_emitters'  # gone from jaxlib 0.11
PRETEND = """
import os, sys, time
from types import SimpleNamespace
import serve
from program import flags, parse
from serving.engine import Generation, RequestError

class Engine:
    compilations = 0

    def __init__(self):
        self.calls = open(os.environ['CALLS'], 'w', buffering=1)

    def warm_up(self, programs):
        for _ in range(int(os.environ['WARM'])):
            time.sleep(0.1)
            yield
            print('compiled', file=self.calls)

    def generate(self, prompts, temperature):
        print(prompts, temperature, file=self.calls)
        if prompts == ['too long']:
            raise RequestError('too long')
        if prompts == ['slow']:
            time.sleep(2)
            print('slow', file=self.calls)
        if prompts == ['a fault of one'] and '--jax_distributed.process_id=1' in sys.argv:
            raise MemoryError('no room')
        if prompts == ['a fault of one']:
            time.sleep(600)  # as it would in a program that the other never starts
        return [Generation(prompt, [], 1, 'stop', False) for prompt in prompts]

serve.open_model = lambda load, compute: SimpleNamespace(template=None)
serve.load_engine = lambda config, model: Engine()
parse.run(serve.main, flags.SERVE)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


class Pair:
    """Two processes of serve.py with the same flags, from a started and waited-for port; outputs in files."""

    def __init__(self, folder, code, arguments, **environment):
        self.port, coordinator = free_port(), free_port()
        self.url, self.folder = f'http://127.0.0.1:{self.port}', folder
        self.programs = [subprocess.Popen(
            [sys.executable, *code, f'--lm_server.port={self.port}', *arguments, '--jax_distributed.num_processes=2',
             '--jax_distributed.initialize_jax_distributed=True', f'--jax_distributed.process_id={process}',
             f'--jax_distributed.coordinator_address=127.0.0.1:{coordinator}'],
            cwd=os.path.dirname(os.path.dirname(__file__)), stdout=(folder / f'out{process}').open('w'),
            stderr=(folder / f'err{process}').open('w'), env=os.environ | environment | {
                'PALLAMA_CACHE': str(folder), 'CALLS': str(folder / f'calls{process}'),
                'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
                'XLA_FLAGS': ' '.join(['--xla_force_host_platform_device_count=2',
                                       *['--xla_cpu_use_fusion_emitters=false'] * (EMITTERS in helpers.QUICK)]),
            }) for process in range(2)]

    def text(self, name: str) -> str:
        return (self.folder / name).read_text() if (self.folder / name).exists() else ''

    def wait_for(self, condition, seconds=60):
        """Until the condition holds; an error with the outputs if it does not, or a process ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [program.poll() for program in self.programs]
            if time.monotonic() > deadline or ended != [None, None]:
                raise AssertionError((ended, [self.text(name) for name in ('out0', 'err0', 'out1', 'err1')]))
            time.sleep(0.02)

    def wait_until_ready(self):
        self.wait_for(lambda: 'ready on' in self.text('out0'))

    def post(self, path, **body):
        return httpx.post(self.url + path, json=body, timeout=60)

    def exit_codes(self, seconds=20) -> list[int]:
        return [program.wait(seconds) for program in self.programs]


@pytest.fixture
def start(tmp_path):
    """Starts a Pair, and ends it whatever happens."""
    pairs = []

    def starting(code, *arguments, **environment):
        pairs.append(Pair(tmp_path, code, arguments, **environment))
        return pairs[-1]

    yield starting
    for program in pairs[0].programs:
        program.kill()
        program.wait()


@pytest.fixture
def pretend(start):
    return lambda warm=1: start(['-c', PRETEND], WARM=str(warm))


@pytest.fixture
def quick_compilation():
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


# ---------------------------------------------------------------- the real engine


def test_two_processes_answer_as_one(golden, start, quick_compilation):
    """Greedy and drawn texts, stop texts and scores of mesh 1,2,2 over two processes are those of an engine on one
    device, a refused request in between; only process 0 has the port (the other is told the same one) and a log.

    A SIGTERM for the other process changes nothing; one for process 0 ends both with exit code 0.
    """
    folder = golden / 'easylm'
    pair = start(['serve.py'], f'--load_llama_config=json::{folder}/model.json', '--mesh_dim=1,2,2',
                 f'--load_checkpoint=params::{folder}/streaming_params_trained', '--lm_server.batch_size=4',
                 f'--tokenizer.vocab_file={folder}/tokenizer.model', '--input_length=16', '--seq_length=20')
    tokenizer = load_tokenizer(folder / 'tokenizer.model')
    config = config_from_dict(json.loads((folder / 'model.json').read_text()), 'model.json')
    params = checkpoint.open(f'params::{folder}/streaming_params_trained').load_params(config, helpers.one_device())
    engine = Engine(params, config, Compute(), tokenizer, helpers.one_device(), batch_size=4, input_length=16,
                    seq_length=20)
    prompts = ['the film', 'a', 'it wastes a fine idea .', 'one two', 'hello']
    expected = [[answer.text for answer in engine.generate(prompts, temperature)] for temperature in (0.0, 1.0)]
    until = [answer.text for answer in engine.greedy_until(prompts, [['e']] * 5, 6)]
    scores = engine.loglikelihood(prompts, ['fine'] * 5)

    pair.wait_until_ready()
    assert httpx.get(f'{pair.url}/ready').status_code == 200
    pair.programs[1].send_signal(signal.SIGTERM)
    assert pair.post('/generate', prefix_text=prompts, temperature=0).json()['output_text'] == expected[0]
    assert pair.post('/loglikelihood', text=['the film ' * 20]).status_code == 400
    assert pair.post('/generate', prefix_text=prompts, temperature=1).json()['output_text'] == expected[1]
    assert expected[0] != expected[1]
    answer = pair.post('/greedy-until', prefix_text=prompts, until=['e'] * 5, max_length=6).json()
    assert answer['output_text'] == until
    answer = pair.post('/loglikelihood', prefix_text=prompts, text=['fine'] * 5).json()
    np.testing.assert_allclose(answer['log_likelihood'], [score for score, _ in scores], rtol=1e-5)
    pair.programs[0].send_signal(signal.SIGTERM)
    assert pair.exit_codes() == [0, 0]
    assert 'compiled 3 programs' in pair.text('out0') and pair.text('out0').endswith('stopped\n')
    assert [line for line in pair.text('out1').splitlines() if not line.startswith('[Gloo]')] == []


# ---------------------------------------------------------------- an engine that pretends


def test_every_process_makes_the_same_calls_and_a_fault_of_one_ends_all(pretend):
    """Twenty requests at once, two refused, characters of all kinds: one order for both, nothing left out or changed.
    Then the other process fails where process 0 would wait for it for ever: both end with an error within 15 seconds.
    """
    pair = pretend()
    pair.wait_until_ready()
    texts = [f'{n} "é😀\u2028\x00\n' for n in range(18)] + ['too long'] * 2
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: pair.post('/generate', prefix_text=[texts[n]], temperature=n / 7), range(20)))
    assert [answer.status_code for answer in answers] == [200] * 18 + [400] * 2
    calls = pair.text('calls0').splitlines()
    assert sorted(calls) == sorted(['compiled'] + [f'{[text]} {n / 7}' for n, text in enumerate(texts)])
    pair.wait_for(lambda: len(pair.text('calls1').splitlines()) == 21, 5)
    assert pair.text('calls1').splitlines() == calls
    with pytest.raises(httpx.HTTPError):
        pair.post('/generate', prefix_text=['a fault of one'])
    assert pair.exit_codes(15) == [2, 1]
    assert 'process 1 failed: no room' in pair.text('err0') and 'MemoryError: no room' in pair.text('err1')


def test_a_signal_while_programs_compile_ends_all(pretend):
    """Sixty seconds of compiling, one SIGTERM for process 0: both end with exit code 0 within 10 seconds, not ready."""
    pair = pretend(warm=600)
    pair.wait_for(lambda: 'compiled' in pair.text('calls0') and 'compiled' in pair.text('calls1'))
    pair.wait_for(lambda: httpx.get(f'{pair.url}/ready').status_code == 503, 5)
    pair.programs[0].send_signal(signal.SIGTERM)
    assert pair.exit_codes(10) == [0, 0]
    assert len(pair.text('calls1').splitlines()) < 200 and 'ready on' not in pair.text('out0')


def test_what_runs_when_the_signal_comes_is_finished(pretend):
    """Two seconds of work, and a SIGTERM for both processes in the middle: it is answered, and made by both to its end;
    exit code 0 for both."""
    pair = pretend()
    pair.wait_until_ready()
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(pair.post, '/generate', prefix_text=['slow'], temperature=0)
        pair.wait_for(lambda: 'slow' in pair.text('calls0') and 'slow' in pair.text('calls1'))
        for program in pair.programs:
            program.send_signal(signal.SIGTERM)
        assert request.result().json()['output_text'] == ['slow']
    assert pair.exit_codes(10) == [0, 0]
    assert pair.text('calls0') == pair.text('calls1') and pair.text('calls1').endswith('slow\n')


# ---------------------------------------------------------------- in one process


class Store:
    """What a CallLine asks of JAX's key-value store, for two threads that stand for two processes."""

    def __init__(self):
        self.values, self.changed, self.barrier = {}, threading.Condition(), threading.Barrier(2)

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise followers.jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED')
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            del self.values[key]

    def wait_at_barrier(self, name, milliseconds):
        self.barrier.wait(10)


@pytest.fixture
def store(monkeypatch):
    """Lines of this test are those of process 1 of 2, through this store."""
    store = Store()
    monkeypatch.setattr(followers, 'global_state', SimpleNamespace(client=store, num_processes=2, process_id=1))
    return store


def test_ready_means_that_all_are(store):
    """503 while the other process still compiles, though process 0 is done; 200 as soon as that one is, too."""
    thread = EngineThread(SimpleNamespace(warm_up=lambda programs: iter(())), 2, line=CallLine())
    client = TestClient(make_app(thread, Options()), base_url='http://localhost')
    time.sleep(0.2)
    assert client.get('/ready').status_code == 503
    CallLine().ready()
    thread.warm.result(10)
    assert client.get('/ready').status_code == 200
    thread.close()


def test_the_store_keeps_no_call_that_was_heard(store):
    """After a hundred calls it holds none of them; the line waits as long as it takes, and tells all of them."""
    line, heard = CallLine(), []
    other = threading.Thread(target=lambda: heard.extend(iter(CallLine().hear, None)), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(followers, 'ASK_SECONDS', 0.01)
        other.start()
        for n in range(100):
            if n == 50:
                time.sleep(0.05)
            line.tell('generate', dict(prompts=[str(n)], temperature=n / 7))
        assert store.values == {}
        line.end()
        other.join(10)
    assert heard == [('generate', dict(prompts=[str(n)], temperature=n / 7)) for n in range(100)]


def test_a_call_too_large_is_the_client_s_mistake(store, monkeypatch):
    """Refused before anything is told, in bytes and not in characters; the next call is told."""
    monkeypatch.setattr(followers, 'MAX_CALL_BYTES', 60)
    line = CallLine()
    with pytest.raises(RequestError, match=r'61 bytes of text: at most 60 can be sent'):
        line.tell('generate', dict(prompts=['é' * 15]))
    assert store.values == {}
    other = threading.Thread(target=CallLine().hear, daemon=True)
    other.start()
    line.tell('generate', dict(prompts=['e' * 15]))
    other.join(10)


@pytest.mark.parametrize('method', ['__init__', '_run', 'warm_up', 'tokenizer'])
def test_only_the_methods_of_a_request_can_be_named(store, method, monkeypatch):
    """What is written into the store can make an engine answer, and nothing else."""
    monkeypatch.setattr(followers.signal, 'signal', lambda *_: None)
    store.key_value_set('pallama/calls/0', json.dumps([method, {}]))
    with pytest.raises(RuntimeError, match=f"process 0 names '{method}'"):
        follow(SimpleNamespace(warm_up=lambda programs: iter(())), (), CallLine())


def test_processes_with_other_files_are_refused(monkeypatch):
    """Another tokenizer behind the same path would cut other batches: the processes would wait for each other."""
    monkeypatch.setattr(processes, 'exchange', lambda text: [text, text.replace('own', 'other')])
    model = SimpleNamespace(tokenizer=SimpleNamespace(fingerprint='own'), config='sizes',
                            source=SimpleNamespace(tokenizer=None))
    with pytest.raises(ValueError, match='the tokenizer and the model is own sizes on process 0 and other sizes on'):
        serve.load_engine(parse.parse(['serve.py', '--load_checkpoint=x'], flags.SERVE, ''), model)
