"""Claims about several processes that serve together (serving/followers.py, serve.py).

One test starts two processes of two devices each with EasyLM's model; the others start serve.py around programs that
only pretend (fakes.py) and never touch a device, so that two processes are up in seconds.
"""
import json
import os
import random
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
from fakes import FakePrograms, LengthTexts
from fastapi.testclient import TestClient

import checkpoint
import serve
from data.tokenizer import load_tokenizer
from hosts import processes
from model.config import Compute, config_from_dict
from program import flags, parse
from serving import followers
from serving.api import Options, make_app
from serving.engine import Engine
from serving.followers import CallLine, follow, from_json, to_json
from serving.thread import EngineThread
from serving.work import Cancelled, Generate, Generated, Sampling, Score

EMITTERS = 'xla_cpu_use_fusion_emitters'  # gone from jaxlib 0.11
PRETEND = """
import os, sys, time
from types import SimpleNamespace
sys.path.insert(0, 'tests')
import serve
from data.tokenizer import load_tokenizer
from fakes import FakePrograms, LengthTexts
from program import flags, parse
from serving.engine import Engine
from serving.texts import Question
from serving.work import Generate

calls = open(os.environ['CALLS'], 'w', buffering=1)

class Recording(Engine):
    def submit(self, works, *handlers):
        print('submit', works, file=calls)
        return super().submit(works, *handlers)

    def warm_up(self, names, num_beams):
        for _ in range(int(os.environ['WARM'])):
            time.sleep(0.1)
            yield
            print('compiled', file=calls)

def before(name, arguments):
    first = arguments[0].tokens_RC if name == 'prefill' else arguments[0]
    print(name, first.tolist(), [x.tolist() for x in arguments[1:3] if hasattr(x, 'tolist')], file=calls)
    marks = {bytes([i for i in row if 0 < i < 256]) for row in first.tolist()} if name == 'prefill' else set()
    if b'slow' in marks:
        time.sleep(2)
        print('slow', file=calls)
    if b'a fault of one' in marks and '--jax_distributed.process_id=1' in sys.argv:
        raise MemoryError('no room')
    if b'a fault of one' in marks:
        time.sleep(600)  # as it would in a program that the other never starts

class Texts(LengthTexts):
    def generate(self, prompts, sampling, num_beams=1):
        return Question([Generate(tuple(prompt.encode()), 3, sampling, stop=(prompt,)) for prompt in prompts], list)

def load_engine(config, model, variants=None):
    programs = FakePrograms(slots=4)
    programs.before = before
    return Recording(programs, None, load_tokenizer(os.environ['TOKENIZER'])), Texts()

serve.open_model = lambda load, compute: SimpleNamespace(template=None, source=None)
serve.load_engine, serve.info_of, serve.chat_of = load_engine, lambda model: {}, lambda *_: None
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
def pretend(start, golden):
    """Starts a Pair around programs that pretend, after `warm` tenths of a second."""
    return lambda warm=1: start(['-c', PRETEND], WARM=str(warm), TOKENIZER=str(golden / 'easylm' / 'tokenizer.model'))


@pytest.fixture(scope='module')
def tokenizer(golden):
    return load_tokenizer(golden / 'easylm' / 'tokenizer.model')


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
    asker = helpers.Asker(params, config, Compute(), tokenizer, helpers.one_device(), input_length=16, seq_length=20)
    prompts = ['the film', 'a', 'it wastes a fine idea .', 'one two', 'hello']
    expected = [[answer.text for answer in asker.generate(prompts, sampling=Sampling(temperature, top_k=50))]
                for temperature in (0.0, 1.0)]
    until = [answer.text for answer in asker.greedy_until(prompts, [['e']] * 5, 6)]
    scores = asker.loglikelihood(prompts, ['fine'] * 5)

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
    assert 'compiled 15 programs' in pair.text('out0') and pair.text('out0').endswith('stopped\n')
    assert [line for line in pair.text('out1').splitlines() if line and not line.startswith('[Gloo]')] == []


# ---------------------------------------------------------------- an engine that pretends


def test_every_process_makes_the_same_turns_and_a_fault_of_one_ends_all(pretend):
    """Twenty requests at once, two refused, characters of all kinds: the same works reach both engines, nothing left
    out or changed, and both run the same programs, with the same tokens, slots and places, in the same order.  Then the
    other process fails where process 0 would wait for it for ever: both end with an error within 15 seconds.
    """
    pair = pretend()
    pair.wait_until_ready()
    texts = [f'{n} "é😀\u2028\x00\n' for n in range(18)] + ['too long' * 30] * 2
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: pair.post('/generate', prefix_text=[texts[n]], temperature=n / 7), range(20)))
    assert [answer.status_code for answer in answers] == [200] * 18 + [400] * 2
    calls = pair.text('calls0').splitlines()
    assert sorted(line for line in calls if line.startswith('submit')) == sorted(
        f'submit {[Generate(tuple(text.encode()), 3, Sampling(n / 7, 50), stop=(text,))]}'
        for n, text in enumerate(texts[:18]))
    assert sum(line.startswith('decode') for line in calls) >= 2 * 18 / 4
    pair.wait_for(lambda: pair.text('calls1') == pair.text('calls0'), 5)
    with pytest.raises(httpx.HTTPError):
        pair.post('/generate', prefix_text=['a fault of one'])
    assert pair.exit_codes(15) == [2, 1]
    assert 'process 1 failed: no room' in pair.text('err0') and 'MemoryError: no room' in pair.text('err1')


def test_a_client_that_leaves_is_left_by_every_process(pretend):
    """Its works that wait behind a slow one are cancelled on both, and are never run; the next request is answered."""
    pair = pretend()
    pair.wait_until_ready()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(pair.post, '/generate', prefix_text=['slow'], temperature=0)
        pair.wait_for(lambda: 'prefill' in pair.text('calls0'))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f'{pair.url}/generate', json={'prefix_text': ['gone'] * 6}, timeout=0.5)
        assert slow.result().status_code == 200
    assert pair.post('/generate', prefix_text=['next']).status_code == 200
    pair.wait_for(lambda: pair.text('calls1') == pair.text('calls0'), 5)
    calls = [line.split()[0] for line in pair.text('calls0').splitlines()]
    assert calls.count('submit') == 3 and str(list(b'gone'))[:-1] not in pair.text('calls1')
    assert calls[-4:] == ['submit', 'prefill', 'decode', 'decode']


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
        pair.wait_for(lambda: 'prefill' in pair.text('calls0') and 'prefill' in pair.text('calls1'))
        for program in pair.programs:
            program.send_signal(signal.SIGTERM)
        assert request.result().json()['finish_reason'] == ['length']
    assert pair.exit_codes(10) == [0, 0]
    calls = pair.text('calls0')
    assert calls == pair.text('calls1') and [line.split()[0] for line in calls.splitlines()[-3:]] == [
        'slow', 'decode', 'decode']


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


def test_ready_means_that_all_are(store, tokenizer):
    """503 while the other process still compiles, though process 0 is done; 200 as soon as that one is, too."""
    thread = EngineThread(Engine(FakePrograms(), None, tokenizer), 2, (), line=CallLine())
    client = TestClient(make_app(thread, LengthTexts(), Options()), base_url='http://localhost')
    time.sleep(0.2)
    assert client.get('/ready').status_code == 503
    CallLine().ready()
    thread.warm.result(10)
    assert client.get('/ready').status_code == 200
    thread.close()


def listening():
    """(the thread of another process that hears turns until the end, what it heard, 'the end' last)"""
    heard = []
    other = threading.Thread(target=lambda: heard.extend([*iter(CallLine().hear, None), 'the end']), daemon=True)
    other.start()
    return other, heard


def test_the_store_keeps_no_turn_that_was_heard(store, monkeypatch):
    """Whenever MEET_EVERY turns are told, all that were told before are gone; the line waits as long as it takes, and
    tells all of them."""
    monkeypatch.setattr(followers, 'MEET_EVERY', 10)
    monkeypatch.setattr(followers, 'ASK_SECONDS', 0.01)
    line, (other, heard) = CallLine(), listening()
    for n in range(100):
        if n == 50:
            time.sleep(0.05)
        line.tell([['submit', n, [str(n)]]])
        assert len(store.values) == (n + 1) % 10
    line.end()
    other.join(10)
    assert heard == [*([['submit', n, [str(n)]]] for n in range(100)), 'the end']


@pytest.mark.parametrize('part', [1, 7, 40, 64_000_000])
def test_a_large_turn_is_told_in_parts(store, monkeypatch, part):
    """No value in the store is larger, in bytes, and what is heard is the same; an empty turn is one too."""
    monkeypatch.setattr(followers, 'PART_BYTES', part)
    monkeypatch.setattr(followers, 'MEET_EVERY', 10)
    sizes, put = [], store.key_value_set
    store.key_value_set = lambda key, value: (sizes.append(len(value.encode())), put(key, value))[1]
    turns = [[], [['submit', 1, ['é😀\u2028\x00\n" + . end']]], [['cancel', 1, None]], ['x' * 38], []]
    line, (other, heard) = CallLine(), listening()
    for turn in turns:
        line.tell(turn)
    line.end()
    other.join(10)
    assert heard == [*turns, 'the end'] and max(sizes) <= max(part + 1, len(followers.END))
    assert len(sizes) == 1 + sum(-(-len(json.dumps(turn)) // part) for turn in turns)


@pytest.mark.parametrize('work', [
    Generate((1, 5), 3),
    Generate((1, 5), 2**40, Sampling(0.1 + 0.2, 7, 1 / 3, 1e-9, 2**63, ((5, -1.5), (6, 100.0))),
             ('é😀\u2028\x00', '"'), ((5, 6), (7,)), 20, True, True, 8, 4, True),
    Score((1,), ((5,), (6, 7))), Score((1, 2, 3), ((5,),), 3, True)])
def test_a_work_is_the_same_behind_json(work):
    """Every field, to the bit, and hashable as before: tuples stay tuples."""
    assert from_json(json.loads(json.dumps(to_json(work)))) == work
    hash(from_json(json.loads(json.dumps(to_json(work)))))


@pytest.mark.parametrize('kind', ['Sampling', '__init__', 'Engine', ''])
def test_nothing_but_works_can_be_named(kind):
    """What is written into the store can make an engine do a Generate or a Score, and nothing else."""
    with pytest.raises(KeyError):
        from_json(to_json(Generate((1,), 1)) | dict(kind=kind))
    with pytest.raises(TypeError):
        from_json(to_json(Generate((1,), 1)) | dict(other=1))


def test_an_engine_that_follows_runs_the_same_programs(store, tokenizer, monkeypatch):
    """Thirty clients of which a third leave, turns in parts, meetings in between: the follower ran what process 0 ran,
    in the same order, with the same tokens and slots; then both end."""
    monkeypatch.setattr(followers.signal, 'signal', lambda *_: None)
    monkeypatch.setattr(followers, 'PART_BYTES', 500)
    monkeypatch.setattr(followers, 'MEET_EVERY', 16)
    leader, follower = FakePrograms(slots=3), FakePrograms(slots=3)
    leader.before = follower.before = lambda name, arguments: time.sleep(0.0003)
    thread = EngineThread(Engine(leader, None, tokenizer), 30, (), line=CallLine())
    engine, ended = Engine(follower, None, tokenizer), []
    other = threading.Thread(target=lambda: ended.append(follow(engine, (), 1, CallLine())), daemon=True)
    other.start()
    thread.warm.result(10)
    chance, ends, kept = random.Random(1), [], []
    for n in range(30):
        works = [Generate((1, n, 3 + k), chance.randint(1, 20), Sampling(1.0)) if chance.random() < 0.7 else
                 Score((1, n), ((5,), (6, 7))) for k in range(chance.randint(1, 4))]
        kept.append((len(works), thread.submit(works, lambda index, event: ends.append(type(event)))))
        time.sleep(chance.random() / 200)
        if n % 3 == 0:
            thread.cancel(kept[chance.randrange(len(kept))][1])
    thread.close()
    other.join(10)
    assert ended == [None] and len(ends) == sum(count for count, _ in kept)
    assert Cancelled in ends and Generated in ends and len(leader.calls) > 50
    assert follower.calls == leader.calls


def test_a_follower_that_still_compiles_ends_with_process_0(store, tokenizer, monkeypatch):
    """Which was stopped before anybody was ready; no program is run."""
    monkeypatch.setattr(followers.signal, 'signal', lambda *_: None)
    programs = FakePrograms()
    compiling = threading.Event()
    programs.before = lambda name, arguments: (compiling.set(), time.sleep(0.05))
    other = threading.Thread(target=follow, daemon=True,
                             args=(Engine(programs, None, tokenizer), ('prefill',) * 1000, 1, CallLine()))
    other.start()
    assert compiling.wait(10)
    thread = EngineThread(Engine(FakePrograms(), None, tokenizer), 2, (), line=CallLine())
    assert not thread.ready
    thread.close()
    other.join(5)
    assert not other.is_alive() and programs.calls == []


def test_processes_with_other_files_are_refused(monkeypatch):
    """Another tokenizer behind the same path would cut other batches: the processes would wait for each other."""
    monkeypatch.setattr(processes, 'exchange', lambda text: [text, text.replace('own', 'other')])
    model = SimpleNamespace(tokenizer=SimpleNamespace(fingerprint='own'), config='sizes',
                            source=SimpleNamespace(tokenizer=None))
    with pytest.raises(ValueError, match='the tokenizer and the model is own sizes on process 0 and other sizes on'):
        serve.load_engine(parse.parse(['serve.py', '--load_checkpoint=x'], flags.SERVE, ''), model)
