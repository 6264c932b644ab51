"""What stands for the engine in tests of the HTTP side: a thread that answers works at once, or when it is let; and
what stands for the compiled programs under a true engine."""
import itertools
import threading
from types import SimpleNamespace

import numpy as np

from serving.programs import Chosen, Programs, Scores
from serving.text_stream import TextStream
from serving.texts import Question
from serving.work import Cancelled, Delta, Generate, Generated, QueueFull, Score, Scored, Token


class FakeThread:
    """Stands for an EngineThread.  answers: the token ids of every answer; `gate` holds works back until it is set.

    works: all that was submitted.  error: an exception in the place of answers.  cancelled: tickets.
    """

    def __init__(self, tokenizer=None, answer=()):
        self.tokenizer, self.answer = tokenizer, list(answer)
        self.ready, self.failure, self.closing, self.full = True, None, False, False
        self.works, self.cancelled, self.error, self.refuse = [], [], None, None
        self.gate, self.begun, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()
        self._tickets = itertools.count(1)

    def stats(self):
        return dict(slots=4, active=1, waiting=2, prompt_tokens_total=10, cached_tokens_total=4,
                    generation_tokens_total=7, decode_steps_total=5, prefill_pieces_total=3, jit_compiles_after_ready=0,
                    works={'finished': 2, 'failed': 1, 'cancelled': 0})

    def submit(self, works, on_event):
        if self.full:
            raise QueueFull('2 requests are waiting already')
        if self.refuse is not None:
            raise self.refuse
        ticket = next(self._tickets)
        self.works += works
        threading.Thread(target=self._run, args=(ticket, works, on_event), daemon=True).start()
        return ticket

    def cancel(self, ticket):
        self.cancelled.append(ticket)
        self.gate.set()

    def close(self, seconds=None):
        self.closing = True

    def _run(self, ticket, works, on_event):
        self.begun.set()
        for index, work in enumerate(works):
            if work.streamed if isinstance(work, Generate) else False:
                self._stream(ticket, index, work, on_event)
                continue
            assert self.gate.wait(10)
            on_event(index, Cancelled() if ticket in self.cancelled else self.error or self._result(work))
        self.ended.set()

    def _tokens(self, ids, top):
        return [Token(i, -0.5 * (place + 1), ((i, -0.5 * (place + 1)), (i + 1, -9.0))[:top])
                for place, i in enumerate(ids)]

    def _result(self, work):
        if isinstance(work, Score):
            return Scored([self._tokens(ids, work.logprobs or 0) for ids in work.texts],
                          [[True] * len(ids) for ids in work.texts], 1)
        ids = list(work.choices[0]) if work.choices else self.answer
        tokens = self._tokens(ids, work.logprobs or 0)
        stream = TextStream(self.tokenizer, work.stop)
        for token_id in ids:
            stream.add(token_id)
        stream.finish()
        return Generated(stream.text, ids, tokens, len(work.prompt_ids), 'stop', work.truncated, 1)

    def _stream(self, ticket, index, work, on_event):
        stream, held = TextStream(self.tokenizer, work.stop), []
        for token in self._tokens(self.answer, work.logprobs or 0):
            text, held = stream.add(token.id), [*held, token]
            if text:
                on_event(index, Delta(text, held))
                held = []
            if not self.gate.wait(10) or ticket in self.cancelled:
                return on_event(index, Cancelled())
        if (text := stream.finish()) or held:
            on_event(index, Delta(text, held))
        on_event(index, self._result(work))


class LengthThread(FakeThread):
    """Answers with what LengthTexts put into the works."""

    def _result(self, work):
        if isinstance(work, Score):
            return Scored([[Token(0, -float(work.texts[0][0]), ())]], [[True]], 0)
        return Generated('|'.join(work.stop) if work.stop else f' {work.prompt_ids[0]}', [1], [], 2,
                         'length' if work.stop else 'stop', work.prompt_ids[0] > 30, 0)


class LengthTexts:
    """Stands for Texts: works hold the lengths of the texts; `calls` is what was asked."""

    template, input_length, seq_length = None, 100, 200

    def __init__(self):
        self.calls, self.error = [], None

    @property
    def tokenizer(self):
        return self

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors='replace')

    vocab_size = 256

    def prompt_work(self, prompt, *, max_new_tokens, **fields):
        return Generate(tuple(self.encode(prompt)), max_new_tokens, **fields)

    def _question(self, call, works, answer=list):
        if self.error is not None:
            raise self.error
        self.calls.append(call)
        return Question(works, answer)

    def generate(self, prompts, sampling, max_new_tokens=None, num_beams=1):
        return self._question((prompts, sampling.temperature), [Generate((len(prompt),), 8) for prompt in prompts])

    def greedy_until(self, prompts, stops, max_length):
        return self._question((prompts, stops, max_length), [
            Generate((len(prompt),), 8, stop=tuple(stop)) for prompt, stop in zip(prompts, stops, strict=True)])

    def loglikelihood_rolling(self, texts):
        return self._question(texts, [Score((1,), ((len(text),),)) for text in texts], self._scores)

    def loglikelihood(self, prefixes, texts):
        works = [Score((1,), ((len(prefix + text),),)) for prefix, text in zip(prefixes, texts, strict=True)]
        return self._question((prefixes, texts), works, self._scores)

    @staticmethod
    def _scores(results):
        return [(scored.texts[0][0].logprob, scored.greedy[0][0]) for scored in results]


class FakePrograms:
    """Stands for Programs, without a device: every next token is `token`, every log-probability -1.

    before(name, arguments): called before each program.  calls: of each program that was run, name and first arguments.
    damaged: slots whose logits are not finite.
    """

    groups, whole, compilations = 1, False, 0
    config = SimpleNamespace(vocab_size=640)
    choice_shape = staticmethod(Programs.choice_shape)

    def __init__(self, token=40, slots=2, length=200):
        self.token, self.slots, self.length = token, slots, length
        self.calls, self.damaged = [], set()
        self.before = lambda name, arguments: None

    def new_cache(self):
        return None

    def rows_for(self, count):
        return count

    def pieces_for(self, count):
        return count

    def warm_up(self, params, cache, names, num_beams=1):
        for name in names:
            self.before('warm_up', (name,))
            yield

    def run(self, name, params, cache, *arguments):
        self.before(name, arguments)
        first = arguments[0] if name == 'decode' else arguments[0].tokens_RC
        slots_R = arguments[1] if name == 'decode' else arguments[0].slots_R
        self.calls.append((name, np.asarray(first).tolist(), np.asarray(slots_R).tolist()))
        fill = lambda R, value: np.full(R, value)
        if name == 'score':
            R = len(arguments[1])
            return None, Scores(fill(R, -1.0), fill(R, True), fill(R, True), fill((R, 20), 0), fill((R, 20), -1.0))
        R, finite_R = len(slots_R), np.array([slot not in self.damaged for slot in slots_R])
        return None, Chosen(fill(R, self.token), fill(R, -1.0), finite_R, fill((R, 20), 0), fill((R, 20), -1.0))
