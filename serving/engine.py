"""Slots and their schedule: many requests through one model at a time.  Before: programs.py, work.py; after: texts.py.

Each `tick` makes one turn:

  1. free slots take works that wait, of one request after the other in turn, each the slot that holds most of its
     prompt's beginning already (which is then not computed again)
  2. one program takes pieces of prompts: of all slots that have some, the oldest first; few while somebody reads a
     stream, whose next token must not wait long
  3. one program takes one more token for every slot that answers

So works of whatever requests are computed together, an answer that ends makes room at once, and a work that nobody
wants any more is gone before the next turn.  Where the same program has the same numbers for a row whatever the other
rows are (programs.py), an answer depends on its own request alone.

Only what pieces computed is used again from a slot, never what decoding did: its numbers are the same but for rounding,
and an answer must not depend on what was asked before it.
"""
import dataclasses
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from data.tokenizer import Tokenizer
from model.config import Compute, LlamaConfig
from model.lora import Lora, adapted, stacked
from model.partition import rows_unit
from model.weights import Llama
from serving.programs import FEW_TARGETS, MOST_PIECES, PIECE, Chosen, Pieces, Programs, Scores, cast_weights
from serving.sampling import Choice
from serving.text_stream import TextStream
from serving.work import (
    MAX_LISTED,
    MAX_LOGPROBS,
    Cancelled,
    Delta,
    Event,
    Generate,
    Generated,
    RequestError,
    Score,
    Scored,
    Token,
    Work,
)

PIECES_BESIDE_A_STREAM = 8  # in one tick: 128 tokens, after which a reader's next token comes
PROGRAMS = ('prefill', 'decode', 'score', 'first')
DAMAGED = 'logits are not finite: the weights may be damaged'
OnEvent = Callable[[int, Event], None]


class Pass(NamedTuple):
    """A stretch of a Score's tokens, to be computed from position `start` on, and what is asked in it.

    asked: (position, target, text, place in the text), by position.
    """

    start: int
    ids: tuple[int, ...]
    asked: list[tuple[int, int, int, int]]


@dataclasses.dataclass
class Request:
    """The works of one client: those that wait, and how many are not finished."""

    on_event: OnEvent
    waiting: deque
    open: int
    on_admitted: Callable[[], None]


@dataclasses.dataclass
class Slot:
    """A row of the cache.  held: the tokens it has, as far as pieces computed them, with `adapter`.  used: the tick of
    its last use."""

    group: int
    row: int
    held: list[int] = dataclasses.field(default_factory=list)
    job: 'GenerateJob | ScoreJob | None' = None
    used: int = 0
    adapter: int = 0


@dataclasses.dataclass
class GenerateJob:
    """A Generate in a slot.  ids: what is to be in the cache before the next token; done: how many of them are."""

    ticket: int
    index: int
    work: Generate
    slot: Slot
    order: int
    seed: int
    ids: list[int]
    stream: TextStream
    done: int = 0
    cached: int = 0
    out: list[Token] = dataclasses.field(default_factory=list)
    told: int = 0
    in_window: int = 0
    truncated: bool = False

    @property
    def answering(self) -> bool:
        return self.done == len(self.ids)

    @property
    def position(self) -> int:
        """Position of the next token in the cache's row, as `out` stands."""
        return len(self.ids) + self.in_window


@dataclasses.dataclass
class ScoreJob:
    """A Score in a slot: passes that are left; done: position up to which the present one is computed."""

    ticket: int
    index: int
    work: Score
    slot: Slot
    order: int
    passes: deque
    found: list[list]
    done: int = 0
    asked: int = 0  # of the present pass, how many are answered
    cached: int = 0
    answering = False


class Piece(NamedTuple):
    job: GenerateJob | ScoreJob
    start: int
    ids: tuple[int, ...]


class Engine:
    """Answers works with one model.  Not thread-safe: one thread calls it (thread.py), or a program by `run`.

    params: as cast_weights made them for `programs`, beside stacks of so many `adapters` where it has some.  seed: of
    works that bring none: same seed and same sequence of works, same answers.  prefix_reuse False computes every prompt
    from its beginning.
    """

    def __init__(self, programs: Programs, params: Llama, tokenizer: Tokenizer, *, seed: int = 42,
                 prefix_reuse: bool = True, adapters: int = 0):
        self.programs, self.tokenizer, self.seed, self.prefix_reuse = programs, tokenizer, seed, prefix_reuse
        self.adapters = adapters
        self._params = params
        self._cache = programs.new_cache()
        self.slots = [Slot(group, row) for row in range(programs.slots) for group in range(programs.groups)]
        self._requests: dict[int, Request] = {}
        self._turn: deque[int] = deque()  # tickets with works that wait, the next one first
        self._tickets = self._works = self._ticks = 0
        self._first_V: dict[int, np.ndarray] = {}  # of each adapter
        self.counts = Counter()

    # ------------------------------------------------------------ requests

    def check(self, work: Work) -> None:
        """Raise RequestError for a work that the engine cannot do; works on any thread."""
        if isinstance(work, Score):
            longest = len(work.prefix_ids) + max(map(len, work.texts), default=0) - 1
            lists = work.prefix_ids, *work.texts
            if not work.texts or not all(work.texts):
                raise RequestError('there must be something to score in every text')
        else:
            longest = len(work.prompt_ids) + (work.window or work.max_new_tokens) - 1
            lists = work.prompt_ids, *work.choices
            lengths = {len(choice) for choice in work.choices}
            if 0 in lengths or len(work.choices) > MAX_LISTED or len(set(work.choices)) < len(work.choices):
                raise RequestError(f'choices must be at most {MAX_LISTED} different texts, none of them empty')
            if lengths and max(lengths) > work.max_new_tokens:
                raise RequestError(f'a choice has {max(lengths)} tokens, and {work.max_new_tokens=}')
            if len(work.sampling.logit_bias) > MAX_LISTED:
                raise RequestError(f'logit_bias has more than {MAX_LISTED} tokens')
            lists = *lists, [token for token, _ in work.sampling.logit_bias]
            if work.max_new_tokens < 1:
                raise RequestError(f'{work.max_new_tokens=} must be at least 1')
        if not lists[0]:
            raise RequestError('the prompt is empty')
        if not 0 <= work.adapter <= self.adapters:
            raise RequestError(f'{work.adapter=} is none of the {self.adapters} that are here')
        most = self.programs.config.vocab_size
        if any(not 0 <= token < most for ids in lists for token in ids):
            raise RequestError(f'token ids must be from 0 to {most - 1}')
        if longest > self.programs.length:
            raise RequestError(f'prompt and answer take {longest} tokens, and a slot holds {self.programs.length} '
                               '(--seq_length)')
        if (work.logprobs or 0) > MAX_LOGPROBS:
            raise RequestError(f'logprobs={work.logprobs} must be at most {MAX_LOGPROBS}')

    def submit(self, works: list[Work], on_event: OnEvent, on_admitted: Callable[[], None] = lambda: None) -> int:
        """Let works wait for slots: the number by which they are cancelled.

        on_event(index of the work, event) is called in ticks; on_admitted() once, when the first has a slot.
        """
        self._tickets += 1
        self._requests[self._tickets] = Request(on_event, deque(enumerate(works)), len(works), on_admitted)
        self._turn.append(self._tickets)
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """End what a request still waits for; its works are answered with Cancelled.  An unknown ticket is no error."""
        self._end_all(ticket, Cancelled())

    def run(self, works: list[Work], progress: Callable[[int], None] = lambda index: None) -> list[Generated | Scored]:
        """Do works to their end: their results in order.  Raises what one of them raised.

        progress(index): that work is done.
        """
        results: dict[int, Generated | Scored] = {}
        if not works:
            return []

        def on_event(index: int, event: Event) -> None:
            if isinstance(event, Exception):
                raise event
            if not isinstance(event, Delta):
                results[index] = event
                progress(index)

        for work in works:
            self.check(work)
        ticket = self.submit(works, on_event)
        try:
            while len(results) < len(works):
                self.tick()
        finally:
            if ticket in self._requests:
                self._requests[ticket].on_event = lambda index, event: None
                self.cancel(ticket)
        return [results[index] for index in range(len(works))]

    def knows(self, ticket: int) -> bool:
        """Whether a request still waits for something."""
        return ticket in self._requests

    @property
    def idle(self) -> bool:
        """Whether a tick would have nothing to do."""
        return not self._requests

    # ------------------------------------------------------------ a tick

    def tick(self) -> None:
        """Make one turn."""
        self._ticks += 1
        self._admit()
        if pieces := self._next_pieces():
            (self._score if isinstance(pieces[0].job, ScoreJob) else self._prefill)(pieces)
        if jobs := [slot.job for slot in self.slots if slot.job and slot.job.answering]:
            self._decode(jobs)

    def _admit(self) -> None:
        while self._turn:
            request = self._requests[self._turn[0]]
            index, work = request.waiting[0]
            alone = isinstance(work, Generate) and work.num_beams > 1
            slot = None if alone else self._slot_for(work)
            if slot is None and not alone:
                return
            ticket = self._turn.popleft()
            request.waiting.popleft()
            if request.waiting:
                self._turn.append(ticket)
            self._works += 1
            if not alone:
                make = self._score_job if isinstance(work, Score) else self._generate_job
                slot.job = make(ticket, index, work, slot)
            if index == 0:
                request.on_admitted()
            if alone:
                return self._search(ticket, index, work)

    def _slot_for(self, work: Work) -> Slot | None:
        """Find the free slot that holds most of the work's beginning, of equals the one that was used longest ago."""
        free = [slot for slot in self.slots if slot.job is None]
        if not free:
            return None
        ids = work.prefix_ids if isinstance(work, Score) else work.prompt_ids
        return max(free, key=lambda slot: (self._common(slot, ids, work.adapter), -slot.used))

    def _common(self, slot: Slot, ids: tuple[int, ...], adapter: int) -> int:
        """Count the tokens that need not be computed: all but the last of `ids` at most, which is asked."""
        if not self.prefix_reuse or slot.adapter != adapter:
            return 0
        most = min(len(slot.held), len(ids) - 1)
        return next((i for i in range(most) if slot.held[i] != ids[i]), most)

    def _generate_job(self, ticket: int, index: int, work: Generate, slot: Slot) -> GenerateJob:
        seed = work.sampling.seed
        seed = zlib.crc32(f'{self.seed},{self._works}'.encode()) if seed is None else seed % 2**32
        job = GenerateJob(ticket, index, work, slot, self._works, seed, list(work.prompt_ids),
                          TextStream(self.tokenizer, work.stop), truncated=work.truncated)
        self._begin(job, work.prompt_ids)
        job.cached = job.done
        return job

    def _score_job(self, ticket: int, index: int, work: Score, slot: Slot) -> ScoreJob:
        before, first, *others = len(work.prefix_ids), *work.texts
        asked = [(before - 1, text[0], number, 0) for number, text in enumerate(work.texts)]
        asked += [(before - 1 + place, token, 0, place) for place, token in enumerate(first) if place]
        passes = [Pass(0, (*work.prefix_ids, *first[:-1]), asked)]
        passes += [Pass(before, text[:-1], [(before - 1 + place, token, number, place)
                                            for place, token in enumerate(text) if place])
                   for number, text in enumerate(others, 1) if len(text) > 1]
        job = ScoreJob(ticket, index, work, slot, self._works, deque(passes), [[None] * len(t) for t in work.texts])
        self._begin(job, work.prefix_ids)
        job.cached = job.done
        return job

    def _begin(self, job: GenerateJob | ScoreJob, ids: tuple[int, ...]) -> None:
        """Take over what the slot holds of `ids`."""
        job.done = self._common(job.slot, ids, job.work.adapter)
        job.slot.adapter = job.work.adapter
        del job.slot.held[job.done:]
        self.counts['cached_tokens'] += job.done

    def _next_pieces(self) -> list[Piece]:
        """Choose pieces for one program: of the oldest work and of others of its kind, what fits, group by group."""
        jobs = sorted((slot.job for slot in self.slots if slot.job and not slot.job.answering), key=lambda j: j.order)
        if not jobs:
            return []
        read = any(slot.job and slot.job.answering and slot.job.work.streamed for slot in self.slots)
        most = PIECES_BESIDE_A_STREAM if read else MOST_PIECES
        room = [most] * self.programs.groups
        targets = [most * PIECE] * self.programs.groups
        pieces = []
        for job in jobs:
            if type(job) is not type(jobs[0]):
                continue
            start, ids = (0, job.ids) if isinstance(job, GenerateJob) else job.passes[0][:2]
            group = job.slot.group
            for begin in range(job.done, start + len(ids), PIECE):
                if not room[group] or not targets[group]:
                    break
                part = tuple(ids[begin - start:begin - start + PIECE])
                if isinstance(job, ScoreJob):
                    count = sum(begin <= place[0] < begin + PIECE for place in job.passes[0].asked[job.asked:])
                    targets[group] -= min(count, targets[group])
                room[group] -= 1
                pieces.append(Piece(job, begin, part))
        return pieces

    def _arrays(self, pieces: list[Piece]) -> tuple[Pieces, list[int]]:
        """Make the program's pieces, and the row of each; rows without a piece belong to their group's spare slot."""
        counts = Counter(piece.job.slot.group for piece in pieces)
        R, G = self.programs.pieces_for(max(counts.values())), self.programs.groups
        arrays = Pieces(np.zeros((G * R, PIECE), np.int32), np.full(G * R, self.programs.slots, np.int32),
                        np.zeros(G * R, np.int32), np.zeros(G * R, np.int32))
        taken, rows = Counter(), []
        for job, start, ids in pieces:
            group = job.slot.group
            row = group * R + taken[group]
            taken[group] += 1
            arrays.tokens_RC[row, :len(ids)] = ids
            arrays.slots_R[row], arrays.starts_R[row], arrays.adapters_R[row] = job.slot.row, start, job.work.adapter
            rows.append(row)
        self.counts['prefill_pieces'] += len(pieces)
        self.counts['prompt_tokens'] += sum(len(piece.ids) for piece in pieces)
        return arrays, rows

    def _prefill(self, pieces: list[Piece]) -> None:
        arrays, rows = self._arrays(pieces)
        asked_R, jobs = np.zeros(len(arrays.slots_R), np.int32), {}
        for (job, start, ids), row in zip(pieces, rows, strict=True):
            job.done = start + len(ids)
            job.slot.held += ids
            if job.answering:
                asked_R[row], jobs[row] = len(ids) - 1, job
        chosen = self._call('prefill', arrays, asked_R, *self._choice(jobs, len(asked_R)))
        self._take(jobs, chosen)

    def _decode(self, jobs: list[GenerateJob]) -> None:
        programs, counts = self.programs, Counter(job.slot.group for job in jobs)
        R, G = programs.rows_for(max(counts.values())), programs.groups
        tokens_R, slots_R = np.zeros(G * R, np.int32), np.full(G * R, programs.slots, np.int32)
        positions_R = np.full(G * R, -1 if programs.whole else 0, np.int32)
        adapters_R, taken, rows = np.zeros(G * R, np.int32), Counter(), {}
        for job in jobs:
            group = job.slot.group
            row = group * R + (job.slot.row if programs.whole else taken[group])
            taken[group] += 1
            tokens_R[row], slots_R[row], positions_R[row] = job.out[-1].id, job.slot.row, job.position - 1
            adapters_R[row], rows[row] = job.work.adapter, job
        chosen = self._call('decode', tokens_R, slots_R, positions_R, adapters_R, *self._choice(rows, G * R))
        self.counts['decode_steps'] += 1
        self._take(rows, chosen)

    def _choice(self, jobs: dict[int, GenerateJob], R: int) -> tuple[Choice, np.bool_]:
        """Say how each row's token is chosen, and whether one wants to be told the likeliest."""
        choice = Choice(*(np.zeros(x.shape, x.dtype) for x in dataclasses.astuple(self.programs.choice_shape(R))))
        choice.top_p_R[:] = 1
        choice.listed_RA[:] = -1
        for row, job in jobs.items():
            sampling = job.work.sampling
            for name in ('temperature', 'top_k', 'top_p', 'min_p'):
                getattr(choice, f'{name}_R')[row] = getattr(sampling, name)
            choice.seed_R[row], choice.position_R[row] = job.seed, len(job.work.prompt_ids) + len(job.out)
            bias = dict(sampling.logit_bias)
            listed = self._allowed(job) if job.work.choices else list(bias)
            choice.listed_RA[row, :len(listed)] = listed
            choice.bias_RA[row, :len(listed)] = [bias.get(token, 0) for token in listed]
            choice.only_R[row] = bool(job.work.choices)
        return choice, np.bool_(any(job.work.logprobs for job in jobs.values()))

    def _allowed(self, job: GenerateJob) -> list[int]:
        """List the tokens with which one of the choices goes on, EOS where one is complete."""
        out = tuple(token.id for token in job.out)
        left = [choice[len(out):] for choice in job.work.choices if choice[:len(out)] == out]
        return sorted({rest[0] if rest else self.tokenizer.eos_token_id for rest in left})

    def _take(self, jobs: dict[int, GenerateJob], chosen: Chosen) -> None:
        """Give every row's token to its job."""
        for row, job in jobs.items():
            if not chosen.finite_R[row]:
                self._finish(job, FloatingPointError(DAMAGED))
                continue
            top = zip(chosen.top_RN[row], chosen.top_logprob_RN[row], strict=True) if job.work.logprobs else ()
            token = Token(int(chosen.token_R[row]), float(chosen.logprob_R[row]),
                          tuple((int(i), float(p)) for i, p in list(top)[:job.work.logprobs]))
            self._add(job, token)

    def _add(self, job: GenerateJob, token: Token) -> None:
        work, eos = job.work, self.tokenizer.eos_token_id
        if token.id == eos and not work.ignore_eos:
            return self._answer(job, 'stop')
        job.out.append(token)
        job.in_window += 1
        self.counts['generation_tokens'] += 1
        text = job.stream.add(token.id)
        if job.stream.stopped:
            return self._answer(job, 'stop', text)
        if work.choices and self._allowed(job) == [eos]:
            return self._answer(job, 'stop', text)
        if len(job.out) == work.max_new_tokens:
            return self._answer(job, 'length', text)
        if work.streamed and text:
            self._tell(job, text)
        if work.window and job.in_window == work.window:
            self._roll(job)

    def _roll(self, job: GenerateJob) -> None:
        """Begin again with the last tokens of prompt and answer, as many as a prompt may have."""
        room = self.programs.length - job.work.window
        ids = [*job.ids, *(token.id for token in job.out[-job.in_window:])]
        if len(ids) > room:
            bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids, job.truncated = bos + ids[len(ids) - room + len(bos):], True
        job.ids, job.in_window = ids, 0
        self._begin(job, tuple(ids))

    def _tell(self, job: GenerateJob, text: str) -> None:
        self._requests[job.ticket].on_event(job.index, Delta(text, job.out[job.told:]))
        job.told = len(job.out)

    def _answer(self, job: GenerateJob, reason: str, text: str = '') -> None:
        text += '' if job.stream.stopped else job.stream.finish()
        if job.work.streamed and (text or job.told < len(job.out)):
            self._tell(job, text)
        self._finish(job, Generated(job.stream.text, [token.id for token in job.out], job.out,
                                    len(job.work.prompt_ids), reason, job.truncated, job.cached))

    def _score(self, pieces: list[Piece]) -> None:
        arrays, rows = self._arrays(pieces)
        R, G = len(arrays.slots_R) // self.programs.groups, self.programs.groups
        asked = [[] for _ in range(G)]  # of each group: (row, column, job, question)
        for (job, start, ids), row in zip(pieces, rows, strict=True):
            job.done, group, first = start + len(ids), job.slot.group, job.passes[0]
            if first.start == 0 and start < (before := len(job.work.prefix_ids)):
                job.slot.held += ids[:before - start]
            while job.asked < len(first.asked) and first.asked[job.asked][0] < job.done:
                if len(asked[group]) == R * PIECE:
                    job.done = start  # the piece is computed again, for those that have no room here
                    break
                position = first.asked[job.asked][0]
                asked[group].append((row, position - start, job, first.asked[job.asked]))
                job.asked += 1
        P = R * FEW_TARGETS if max(map(len, asked)) <= R * FEW_TARGETS else R * PIECE
        places_P, targets_P = np.zeros(G * P, np.int32), np.zeros(G * P, np.int32)
        for group, questions in enumerate(asked):
            for i, (row, column, _, question) in enumerate(questions, group * P):
                places_P[i], targets_P[i] = (row - group * R) * PIECE + column, question[1]
        tell = np.bool_(any(piece.job.work.logprobs for piece in pieces))
        scores = self._call('score', arrays, places_P, targets_P, tell)
        for group, questions in enumerate(asked):
            for i, (_, _, job, question) in enumerate(questions, group * P):
                self._note(job, question, scores, i)
        for job in {id(piece.job): piece.job for piece in pieces}.values():
            self._advance(job)

    def _note(self, job: ScoreJob, question, scores: Scores, i: int) -> None:
        _, target, text, place = question
        top = zip(scores.top_PN[i], scores.top_logprob_PN[i], strict=True) if job.work.logprobs else ()
        top = tuple((int(token), float(p)) for token, p in list(top)[:job.work.logprobs])
        logprob, greedy = float(scores.logprob_P[i]), bool(scores.greedy_P[i])
        finite = bool(scores.finite_P[i])
        if place == 0 and job.work.as_first:
            first_V = self.first_token(job.work.adapter)
            known_V = first_V[:self.tokenizer.vocab_size]
            logprob, greedy, finite = float(first_V[target]), bool(first_V[target] >= known_V.max()), True
        job.found[text][place] = Token(target, logprob, top), greedy, finite

    def _advance(self, job: ScoreJob) -> None:
        """Go on to the next pass when the present one is computed and answered; finish behind the last."""
        first = job.passes[0]
        if job.done < first.start + len(first.ids) or job.asked < len(first.asked):
            return
        job.passes.popleft()
        if job.passes:
            job.done, job.asked = job.passes[0].start, 0
            return
        if not all(finite for text in job.found for _, _, finite in text):
            return self._finish(job, FloatingPointError(DAMAGED))
        self._finish(job, Scored([[token for token, _, _ in text] for text in job.found],
                                 [[greedy for _, greedy, _ in text] for text in job.found], job.cached))

    def _search(self, ticket: int, index: int, work: Generate) -> None:
        """Do a beam search, whole."""
        eos = self.tokenizer.eos_token_id
        T = next(size for size in self.programs.beam_buckets() if size >= len(work.prompt_ids))
        tokens_BT = np.zeros((1, T), np.int32)
        tokens_BT[0, :len(work.prompt_ids)] = work.prompt_ids
        output_BW, finite_B, step = jax.device_get(self.programs.run(
            'beams', self._params, tokens_BT, np.array([len(work.prompt_ids)], np.int32),
            np.array([work.adapter], np.int32), np.int32(work.max_new_tokens), np.int32(eos),
            static=self.programs.beam_static(work.num_beams)))
        ids = output_BW[0, :int(step)].tolist()
        reason = 'stop' if eos in ids else 'length'
        ids = ids[:ids.index(eos)] if eos in ids else ids
        stream = TextStream(self.tokenizer)
        text = ''.join(map(stream.add, ids)) + stream.finish()
        self._end(ticket, index, Generated(text, ids, [], len(work.prompt_ids), reason, work.truncated, 0)
                  if finite_B.all() else FloatingPointError(DAMAGED))

    # ------------------------------------------------------------ ends

    def _finish(self, job: GenerateJob | ScoreJob, event: Event) -> None:
        job.slot.job, job.slot.used = None, self._ticks
        self._end(job.ticket, job.index, event)

    def _end(self, ticket: int, index: int, event: Event) -> None:
        request = self._requests[ticket]
        request.open -= 1
        if not request.open:
            del self._requests[ticket]
        request.on_event(index, event)

    def _end_all(self, ticket: int, error: Exception) -> None:
        request = self._requests.get(ticket)
        if request is None:
            return
        ends = [index for index, _ in request.waiting]
        if request.waiting:
            self._turn.remove(ticket)
            request.waiting.clear()
        for slot in self.slots:
            if slot.job and slot.job.ticket == ticket:
                ends.append(slot.job.index)
                slot.job, slot.used = None, self._ticks
        for index in sorted(ends):
            self._end(ticket, index, error)

    def fail(self, error: Exception) -> None:
        """Answer everything that runs or waits with `error`."""
        for ticket in list(self._requests):
            self._end_all(ticket, error)

    # ------------------------------------------------------------ programs

    def _call(self, name: str, *arguments):
        self._cache, result = self.programs.run(name, self._params, self._cache, *arguments)
        return jax.device_get(result)

    def first_token(self, adapter: int = 0) -> np.ndarray:
        """Compute log p [V] of every token as the first of a text without prefix, once: it is a constant of the model.

        EasyLM's definition: it pads the missing prefix, hides the padding from every token, and asks the last padding
        token.  That token sees bos alone and not itself, and no later token sees it.
        Raises FloatingPointError for weights that are not finite.
        """
        if adapter not in self._first_V:
            tokens_12 = np.array([[self.tokenizer.bos_token_id, self.tokenizer.pad_token_id]], np.int32)
            first_V = np.asarray(self.programs.run('first', self._params, tokens_12, np.array([adapter], np.int32)))
            if not np.isfinite(first_V).all():
                raise FloatingPointError(DAMAGED)
            self._first_V[adapter] = first_V
        return self._first_V[adapter]

    def warm_up(self, names: tuple[str, ...] = PROGRAMS, num_beams: int = 1) -> Iterator[None]:
        """Compile, and run once where it has no effect, all that the named programs can need; yields after each."""
        yield from self.programs.warm_up(self._params, self._cache, names, num_beams)
        if 'first' in names:
            self.first_token()
        yield


def make_engine(load_params: Callable[[], Llama], config: LlamaConfig, compute: Compute, mesh: Mesh,
                tokenizer: Tokenizer, *, batch_size: int, length: int, answer_tokens: int = 1, weight_dtype: str = '',
                cache_dtype: str = '', seed: int = 42, prefix_reuse: bool = True,
                adapters: Sequence[tuple[Llama, Lora]] = ()) -> Engine:
    """Load and cast the weights, and make an engine of batch_size slots: a multiple of the mesh's dp*fsdp.

    adapters: of these weights; works have them by their number, from 1 on.  length, answer_tokens, weight_dtype,
    cache_dtype: see Programs; the others: see Engine.
    """
    stacks = stacked(list(adapters), config, mesh) if adapters else None
    programs = Programs(config, compute, mesh, slots=batch_size // rows_unit(mesh), length=length,
                        vocabulary=tokenizer.vocab_size, answer_tokens=answer_tokens, weight_dtype=weight_dtype,
                        cache_dtype=cache_dtype, stacks=stacks and stacks[1])
    params = jax.block_until_ready(cast_weights(load_params(), config, mesh, programs.weight_dtype))
    params = adapted(params, *stacks) if stacks else params
    return Engine(programs, params, tokenizer, seed=seed, prefix_reuse=prefix_reuse, adapters=len(adapters))
