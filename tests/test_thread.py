"""Claims about serving/thread.py: the true engine, on programs that only pretend (fakes.py) except in the last test."""
import json
import random
import threading
import time

import helpers
import jax
import pytest
from fakes import FakePrograms

import checkpoint
from data.tokenizer import load_tokenizer
from model.config import Compute, config_from_dict
from serving import engine, programs
from serving.engine import Engine
from serving.thread import EngineThread
from serving.work import (
    Cancelled,
    Delta,
    EngineFailed,
    Generate,
    Generated,
    QueueFull,
    RequestError,
    Sampling,
    Score,
    Scored,
)


class Events:
    """Collects what one request is told; `thread` of a submit is the engine's."""

    def __init__(self, works=1):
        self.works, self.all, self.threads, self.ended = works, [], set(), threading.Event()

    def __call__(self, index, event):
        self.all.append((index, event))
        self.threads.add(threading.current_thread().name)
        if index == -1 or len(self.ends) == self.works:
            self.ended.set()

    @property
    def ends(self):
        return [(index, event) for index, event in self.all if not isinstance(event, Delta)]

    def kinds(self):
        assert self.ended.wait(10)
        return [type(event) for _, event in sorted(self.ends, key=lambda end: end[0])]


class Steps:
    """Holds each program back until `let(count)`; `held` is set while one waits."""

    def __init__(self):
        self._may, self.held, self.open = threading.Semaphore(0), threading.Event(), False

    def __call__(self, name, arguments):
        if not self._may.acquire(blocking=False) and not self.open:
            self.held.set()
            assert self._may.acquire(timeout=20)

    def let(self, count=1):
        """Let `count` programs run, and wait until the next one is held."""
        self.held.clear()
        self._may.release(count)
        assert self.held.wait(10)

    def finish(self):
        self.open = True
        self._may.release(1000)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope='module')
def tokenizer(golden):
    return load_tokenizer(golden / 'easylm' / 'tokenizer.model')


@pytest.fixture
def make(tokenizer):
    """Makes an EngineThread of two slots; `programs` of it with `before`."""
    threads = []

    def making(before=None, queue_size=8, slots=2, length=200, warm_up=(), **values):
        programs = FakePrograms(slots=slots, length=length)
        programs.before = before or programs.before
        thread = EngineThread(Engine(programs, None, tokenizer), queue_size, warm_up, **values)
        thread.programs = programs
        threads.append(thread)
        return thread

    yield making
    for thread in threads:
        getattr(thread.programs.before, 'finish', lambda: None)()
        thread.close(0)
        assert not thread._thread.is_alive()


def work(tokens=3, **fields):
    return Generate((1, 5, 6), tokens, **fields)


def submit(thread, *works):
    events = Events(len(works))
    return thread.submit(list(works), events), events


# ---------------------------------------------------------------- answers


def test_each_work_is_told_in_the_engine_s_thread_and_has_one_end(make):
    """Deltas first, for streams alone; generated, scored and failed works of one request beside each other."""
    thread = make()
    _, events = submit(thread, work(4), work(5, streamed=True), Score((1, 5), ((6, 7), (8,))), work(1))
    assert events.kinds() == [Generated, Generated, Scored, Generated] and events.threads == {'engine'}
    told = [event for index, event in events.all if index == 1]
    assert [len(event.tokens) for event in told if isinstance(event, Delta)] == [1] * 5 and len(told) == 6
    assert ''.join(delta.text for delta in told[:-1]) == told[-1].text
    assert [len(event.token_ids) for index, event in sorted(events.ends) if index in (0, 3)] == [4, 1]
    thread.programs.damaged = {0}
    _, events = submit(thread, work(), work())
    assert sorted(kind.__name__ for kind in events.kinds()) == ['FloatingPointError', 'Generated']
    assert thread.stats()['works'] == {'finished': 5, 'failed': 1, 'cancelled': 0}


def test_its_numbers_add_up(make):
    """Prompt tokens that were computed and those that a slot held, new tokens, steps and pieces, by hand."""
    steps = Steps()
    thread = make(steps, slots=1)
    _, one = submit(thread, work(3))
    _, two = submit(thread, work(3))
    assert steps.held.wait(10)
    assert (thread.stats()['active'], thread.stats()['waiting'], thread.stats()['slots']) == (1, 1, 1)
    steps.finish()
    assert one.kinds() == two.kinds() == [Generated]
    until(lambda: thread.stats()['active'] == 0)
    assert thread.stats() == {
        'slots': 1, 'active': 0, 'waiting': 0, 'prompt_tokens_total': 3 + 1, 'cached_tokens_total': 2,
        'generation_tokens_total': 6, 'decode_steps_total': 4, 'prefill_pieces_total': 2,
        'jit_compiles_after_ready': 0, 'works': {'finished': 2, 'failed': 0, 'cancelled': 0}}


def test_works_that_cannot_be_done_are_refused_whole(make):
    """Nothing of the request is done, and what is no request at all is no fault of the engine."""
    thread = make()
    for works, message in (([work(), Generate((1, 640), 1)], 'token ids must be'), ([], 'nothing to do')):
        with pytest.raises(RequestError, match=message):
            thread.submit(works, Events())
    _, events = submit(thread, work())
    assert events.kinds() == [Generated] and thread.stats()['works']['finished'] == 1
    assert thread.stats()['waiting'] == 0


# ---------------------------------------------------------------- the line


@pytest.mark.parametrize('queue_size', [0, 1, 3])
def test_as_many_requests_wait_as_may_wait(make, queue_size):
    """Beside those that have a slot, or get one at the next turn; one more is refused, until one has gone.  A request
    with more works than slots waits once."""
    steps = Steps()
    thread = make(steps, queue_size)
    kept = [submit(thread, work(9)), submit(thread, work(9), work(9), work(9))]
    assert steps.held.wait(10)
    assert (thread.stats()['active'], thread.stats()['waiting']) == (2, 0)
    kept += [submit(thread, work()) for _ in range(queue_size)]
    for _ in range(2):
        with pytest.raises(QueueFull, match=f'{queue_size} requests are waiting already'):
            submit(thread, work())
    assert thread.stats()['waiting'] == queue_size
    if queue_size:
        ticket, events = kept.pop()
        thread.cancel(ticket)
        steps.let(2)  # the rest of this turn: prefill, decode
        assert events.kinds() == [Cancelled] and thread.stats()['waiting'] == queue_size - 1
        kept.append(submit(thread, work()))
        with pytest.raises(QueueFull):
            submit(thread, work())
    steps.finish()
    assert {kind for _, events in kept for kind in events.kinds()} == {Generated}
    until(lambda: thread.stats()['active'] == thread.stats()['waiting'] == 0)
    assert submit(thread, work())[1].kinds() == [Generated]


def test_nobody_is_refused_while_there_are_free_slots(make):
    """queue_size 0, four slots: four at once are taken although the engine is busy with the first one's turn, or still
    warms up; a fifth is not."""
    for warm_up in ((), ('prefill',)):
        steps = Steps()
        thread = make(steps, 0, slots=4, warm_up=warm_up)
        kept = [submit(thread, work(9))]
        assert steps.held.wait(10)
        kept += [submit(thread, work(9)) for _ in range(3)]
        with pytest.raises(QueueFull):
            submit(thread, work())
        steps.finish()
        assert {kind for _, events in kept for kind in events.kinds()} == {Generated}


# ---------------------------------------------------------------- cancelling


def test_a_cancelled_work_leaves_before_the_next_program(make):
    """The program that runs is its last: its slot is free, and a work in line has it in the next turn."""
    steps = Steps()
    thread = make(steps, slots=1)
    ticket, events = submit(thread, work(50, streamed=True), work(50))
    assert steps.held.wait(10)
    steps.let(4)
    _, next_one = submit(thread, Generate((1, 77), 1))
    thread.cancel(ticket)
    told = len(events.all)
    steps.let()
    assert events.kinds() == [Cancelled, Cancelled] and len(events.all) - told <= 3
    assert thread.programs.calls[-1][0] == 'decode' and len(thread.programs.calls) == 5
    assert (thread.stats()['active'], thread.stats()['waiting']) == (1, 0)
    steps.finish()
    assert next_one.kinds() == [Generated] and thread.programs.calls[5][:2] == ('prefill', [[77] + [0] * 15])
    for number in (ticket, 999):
        thread.cancel(number)  # has ended, was never there: no error
    assert submit(thread, work())[1].kinds() == [Generated]
    assert thread.stats()['works'] == {'finished': 2, 'failed': 0, 'cancelled': 2}


def test_what_is_cancelled_at_once_never_runs(make):
    """Submitted and cancelled in the same turn."""
    steps = Steps()
    thread = make(steps)
    _, first = submit(thread, work(2))
    assert steps.held.wait(10)
    ticket, events = submit(thread, Generate((1, 77), 5))
    thread.cancel(ticket)
    steps.finish()
    assert events.kinds() == [Cancelled] and first.kinds() == [Generated]
    assert not any('77' in str(call) for call in thread.programs.calls)
    assert thread.stats()['waiting'] == 0


@pytest.mark.parametrize('streamed', [False, True])
def test_who_cannot_be_told_harms_nobody_else(make, capfd, streamed):
    """An on_event that raises: the traceback is printed, the request's other works are cancelled, its slot is free, and
    the others' works are done."""
    thread, index_seen = make(), []

    def broken(index, event):
        index_seen.append((index, type(event)))
        raise KeyError('nobody listens')

    _, before = submit(thread, work(30, streamed=True))
    thread.submit([work(4, streamed=streamed), work(150), work(150)], broken)
    assert before.kinds() == submit(thread, work())[1].kinds() == [Generated]
    until(lambda: thread.stats()['active'] == 0)
    assert thread.failure is None and thread.stats()['works']['finished'] == 2 + (not streamed)
    assert index_seen[-1][1] is Cancelled and thread.stats()['works']['cancelled'] == 2 + streamed
    assert 'nobody listens' in capfd.readouterr().err


def test_fifty_clients_of_whom_some_leave_keep_no_slot(make):
    """Each at its own time with one to three works, 30 % leave at a moment of their own, some are refused: every work
    that was taken has one end, and nothing runs or waits at the end."""
    thread = make(lambda name, arguments: time.sleep(0.0002), queue_size=12, slots=4)
    refused, taken = [], []

    def client(number):
        chance = random.Random(number)
        time.sleep(chance.random() / 20)
        works = [work(chance.randint(1, 60), streamed=chance.random() < 0.5) if chance.random() < 0.8 else
                 Score((1, 5, number), ((6,), (7, 8))) for _ in range(chance.randint(1, 3))]
        try:
            ticket, events = submit(thread, *works)
        except QueueFull:
            return refused.append(number)
        taken.append((len(works), events))
        if chance.random() < 0.3:
            time.sleep(chance.random() / 50)
            thread.cancel(ticket)
        assert events.ended.wait(20)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(50)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(30)
    assert len(taken) + len(refused) == 50 and len(taken) > 20
    for count, events in taken:
        assert sorted(index for index, _ in events.ends) == list(range(count))
        assert all(isinstance(event, Generated | Scored | Cancelled) for _, event in events.ends)
    stats = thread.stats()
    assert stats['active'] == stats['waiting'] == 0 and thread._open == {} and thread._engine.idle
    assert sum(stats['works'].values()) == sum(count for count, _ in taken) and stats['works']['failed'] == 0


# ---------------------------------------------------------------- the end


def test_closing_finishes_what_is_in_line_and_takes_no_more(make):
    """Running and waiting requests are answered; a new one is told that the server stops."""
    steps = Steps()
    thread = make(steps)
    thread.warm.result(10)
    assert thread.ready
    kept = [submit(thread, work(5))[1] for _ in range(5)]
    assert steps.held.wait(10)
    closing = threading.Thread(target=thread.close)
    closing.start()
    until(lambda: thread.closing)
    assert not thread.ready
    with pytest.raises(Cancelled):
        submit(thread, work())
    steps.finish()
    closing.join(10)
    assert not closing.is_alive() and not thread._thread.is_alive()
    assert [events.kinds() for events in kept] == [[Generated]] * 5


@pytest.mark.parametrize('seconds', [0, 0.1])
def test_closing_in_a_time_cancels_the_rest(make, seconds):
    """What ends in time is answered, the rest is cancelled, running or in line; it is over soon after."""
    thread = make(lambda name, arguments: time.sleep(0.005), length=2000)
    short, long = submit(thread, work(1))[1], [submit(thread, work(1000))[1] for _ in range(4)]
    assert short.ended.wait(10)
    started = time.monotonic()
    thread.close(seconds)
    assert seconds <= time.monotonic() - started < seconds + 1 and not thread._thread.is_alive()
    assert short.kinds() == [Generated] and [events.kinds() for events in long] == [[Cancelled]] * 4


def test_closing_ends_the_warming_up(make):
    """After the program that is compiled now; what came meanwhile is still answered."""
    steps, seen = Steps(), []
    thread = make(lambda name, arguments: (seen.append(name), steps(name, arguments)), warm_up=('prefill', 'decode'))
    assert steps.held.wait(10) and not thread.ready and not thread.warm.done()
    _, events = submit(thread, work())
    thread.closing = True
    steps.finish()
    thread.close()
    assert events.kinds() == [Generated] and seen[:2] == ['warm_up', 'prefill']


def test_a_failure_is_told_to_all_and_ends_the_thread(make, capfd):
    """Running and waiting requests hear EngineFailed once, also behind one whose on_event raises; later ones are
    refused, and the log has the cause."""
    steps = Steps()
    fault = lambda name, arguments: (steps(name, arguments), 1 / 0 if len(thread.programs.calls) == 3 else None)
    thread = make(fault)

    def broken(index, event):
        raise KeyError('nobody listens')

    thread.submit([work(50)], broken)
    kept = [submit(thread, work(50), work(50))[1] for _ in range(3)]
    steps.finish()
    assert [events.kinds() for events in kept] == [[EngineFailed]] * 3
    assert [events.ends[0][0] for events in kept] == [-1] * 3
    thread._thread.join(10)
    assert isinstance(thread.failure, ZeroDivisionError) and not thread.ready
    with pytest.raises(EngineFailed):
        submit(thread, work())
    assert thread.stats()['works'] == {'finished': 0, 'failed': 7, 'cancelled': 0} and thread.stats()['waiting'] == 0
    printed = capfd.readouterr().err
    assert 'ZeroDivisionError' in printed and 'nobody listens' in printed


def test_a_failure_while_warming_up_is_told(make):
    """To who waits for `warm`, and to what is in line already."""
    steps = Steps()
    thread = make(lambda name, arguments: (steps(name, arguments), 1 / 0), warm_up=('prefill',))
    _, events = submit(thread, work())
    steps.finish()
    assert events.kinds() == [EngineFailed]
    with pytest.raises(ZeroDivisionError):
        thread.warm.result(10)
    assert not thread.ready


# ---------------------------------------------------------------- the true programs


def test_nothing_compiles_after_it_is_ready(golden, tokenizer, monkeypatch):
    """Six clients at once with prompts of other lengths, ways of drawing, some with streams, one of whom leaves: no
    compilation; who asks with a seed has the tokens that it has alone."""
    for module in (programs, engine):  # two shapes of prefill are enough
        monkeypatch.setattr(module, 'MOST_PIECES', 8)
    folder = golden / 'easylm'
    config = config_from_dict(json.loads((folder / 'model.json').read_text()), 'model.json')
    jax.config.update('jax_disable_most_optimizations', True)
    params = checkpoint.open(f'params::{folder}/streaming_params_trained').load_params(config, helpers.one_device())
    asker = helpers.Asker(params, config, Compute(), tokenizer, helpers.one_device(), batch_size=2)
    thread = EngineThread(asker.engine, 32, ('prefill', 'decode'))
    assert thread.stats()['jit_compiles_after_ready'] == 0 and not thread.ready
    thread.warm.result(60)
    jax.config.update('jax_disable_most_optimizations', False)
    asked = []
    for number in range(6):
        sampling = Sampling(number / 2, top_k=number % 3 * 70, top_p=1 - number / 40, min_p=0.01, seed=number)
        asked.append(asker.texts.generate(['a ' * (60 - 10 * number), 'the film ' * 15], sampling, number + 1,
                                          logprobs=number % 3, streamed=number % 2 == 0).works)
    kept = [submit(thread, *works) for works in asked]
    thread.cancel(kept[3][0])
    answers = [[event for _, event in sorted(events.ends)] for _, events in kept if events.ended.wait(30)]
    assert len(answers) == 6 and thread.stats()['jit_compiles_after_ready'] == 0
    assert thread.stats()['active'] == thread.stats()['waiting'] == 0
    thread.close()
    for number in (0, 2, 5):
        alone = asker.engine.run(asked[number])
        assert [answer.token_ids for answer in answers[number]] == [answer.token_ids for answer in alone]
    assert asker.programs.compilations == thread._compiled
