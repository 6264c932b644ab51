"""Text in, text or scores out: a batched engine of a few compiled programs.  Before: sampling.py; after: api.py.

Requests are sorted by length and cut into batches of `batch_size` rows (dummy rows fill the last one).  Prompts are
padded on the right to a length bucket, 16 32 64 128 ..., so programs are few and padding is below a factor of two:

  prefill[T]   prompts through the network into a cache of T slots; the head at each row's last token; a first new token
  grow[S, 2S]  a longer cache: it starts at twice the prompt's bucket and doubles only for a batch that needs more
  decode[S]    token after token in one lax.while_loop on the device, until every row has stopped, or the budget or the
               cache is used up: no step runs for a batch that has stopped
  score[T, P]  log-likelihoods of at most P tokens after places of a row of at most T; the head at those places only

Each is one `jax.shard_map` over ('dp', 'fsdp', 'mp'): rows split over dp and fsdp, heads and vocabulary over mp.  They
are compiled ahead of use and kept (`compilations` counts them): a shape seen before, or warmed up, never waits again.

EasyLM's server pads on the left behind one bos, with positions that skip the padding: the sequence is the one we pad on
the right.  Only a text scored without any prefix differs: EasyLM asks a padding token for its first token, we ask bos.
"""
import dataclasses
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.tokenizer import Tokenizer
from model.cache import Cache, init_cache
from model.config import Compute, LlamaConfig
from model.llama import DTYPES, Llama, hidden_states, partitions
from model.loss import logits, token_cross_entropy
from model.partition import BATCH, all_gather, pytree
from serving.sampling import choose, row_keys

SMALLEST_PROMPT, SMALLEST_TEXT, SMALLEST_CACHE = 16, 4, 64  # buckets, in tokens
PROGRAMS = ('generate', 'loglikelihood')  # what `warm_up` can compile, by the names of the endpoints


class RequestError(ValueError):
    """A request that cannot be served as it stands; the message is for the client.  The engine is untouched."""


class Generation(NamedTuple):
    """The answer to one prompt.

    token_ids: the new tokens without EOS.  prompt_tokens: how many the model saw, bos included.  finish_reason: 'stop'
    at EOS, 'length' at the budget.  truncated: the prompt was too long and lost its beginning.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    truncated: bool


class Rows(NamedTuple):
    """What stays the same of a batch while it is decoded; [B] each.  real: not a dummy row."""

    lengths_B: np.ndarray
    requests_B: np.ndarray
    temperature_B: np.ndarray
    real_B: np.ndarray


@pytree
class State:
    """A batch in decoding.  output_BW holds the `step` tokens chosen; token_B, the last, is not yet in the cache."""

    cache: Cache
    token_B: jax.Array
    output_BW: jax.Array
    finished_B: jax.Array
    finite_B: jax.Array
    step: jax.Array
    running: jax.Array


class ScoreRow(NamedTuple):
    """One row to score: its tokens; the positions whose next token is asked for, and that token; whose question it is.

    spans: (pair, its slice of positions and targets).
    """

    tokens: list[int]
    positions: list[int]
    targets: list[int]
    spans: list[tuple[int, slice]]


def score_rows(pairs: list[tuple[list[int], list[int]]]) -> list[ScoreRow]:
    """The rows that answer all (prefix, text) pairs.  Texts of one token after the same prefix share a row: the answers
    of a classification cost one pass together.
    """
    rows, shared = [], {}
    for pair, (before, after) in enumerate(pairs):
        key = tuple(before)
        if len(after) == 1 and key in shared:
            row = shared[key]
        else:
            row = ScoreRow(before + after[:-1], [], [], [])
            rows.append(row)
            if len(after) == 1:
                shared[key] = row
        start = len(row.targets)
        row.positions.extend(range(len(before) - 1, len(before) - 1 + len(after)))
        row.targets.extend(after)
        row.spans.append((pair, slice(start, start + len(after))))
    return rows


def bucket(length: int, limit: int, smallest: int, per_octave: int = 1) -> int:
    """The smallest of `smallest` * 2^n * (1 + i / per_octave), or `limit` itself, that holds `length` <= limit."""
    size = smallest
    while 2 * size < length:
        size *= 2
    sizes = (size + size * i // per_octave for i in range(per_octave + 1))
    return min(next(s for s in sizes if s >= length), limit)


class Engine:
    """Generates from and scores with one model.  Not thread-safe: one thread calls it (EngineThread).

    input_length: most tokens of a prompt, bos included.  seq_length - input_length: most new tokens (EasyLM's meaning).
    top_k 0 and top_p 1.0 switch their filter off; do_sample=False makes every request greedy.
    score_buckets: lengths an octave that `loglikelihood` pads to: more waste less, and compile more programs.
    Raises ValueError, before any work, for values that cannot go together.
    """

    def __init__(self, params: Llama, config: LlamaConfig, compute: Compute, tokenizer: Tokenizer, mesh: Mesh, *,
                 batch_size: int, input_length: int, seq_length: int, top_k: int = 50, top_p: float = 1.0,
                 do_sample: bool = True, add_bos_token: bool = True, seed: int = 42, score_buckets: int = 1):
        check_lengths(input_length, seq_length, config)
        check_sampling(top_k, top_p)
        check_batch_size(batch_size, mesh)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size=}: '
                             'they do not belong together (--tokenizer.vocab_file)')
        # the network casts each weight to the compute dtype before use anyway: doing it once saves memory and reading
        self._params = jax.tree.map(lambda x: x.astype(DTYPES[compute.dtype]), params)
        self.config, self.compute, self.tokenizer, self.mesh = config, compute, tokenizer, mesh
        self.batch_size, self.input_length, self.seq_length = batch_size, input_length, seq_length
        self.top_k, self.top_p, self.do_sample, self.seed = top_k, top_p, do_sample, seed
        self._bos = [tokenizer.bos_token_id] if add_bos_token else []
        self._score_buckets = score_buckets
        self.compilations = 0
        self._programs = {}
        self._requests = 0

    @property
    def max_new_tokens(self) -> int:
        return self.seq_length - self.input_length

    # ------------------------------------------------------------ requests

    def generate(self, prompts: list[str], temperature: float, max_new_tokens: int | None = None,
                 progress: Callable[[int], None] = lambda done: None) -> list[Generation]:
        """One Generation per prompt, in order.  temperature 0 is greedy; `progress` hears how many prompts are new.

        A prompt's tokens depend on the seed, the number of prompts ever before it and the temperature, and not on the
        batch around it.  At most seq_length - input_length new tokens; max_new_tokens can lower that.
        Raises RequestError for max_new_tokens out of range, FloatingPointError for logits that are not finite.
        """
        budget = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= budget <= self.max_new_tokens:
            raise RequestError(f'{max_new_tokens=} must be from 1 to {self.max_new_tokens} (seq_length - input_length)')
        encoded = [self._encode_prompt(prompt, index) for index, prompt in enumerate(prompts)]
        first, self._requests = self._requests, self._requests + len(prompts)
        temperature = temperature if self.do_sample else 0.0
        answers = [None] * len(prompts)
        for chosen in self._batches([len(ids) for ids, _ in encoded]):
            outputs = self._generate_batch([encoded[i][0] for i in chosen], [first + i for i in chosen],
                                           temperature, budget)
            for i, output in zip(chosen, outputs, strict=True):
                ids, truncated = encoded[i]
                answers[i] = self._answer(output, len(ids), truncated)
            progress(len(chosen))
        return answers

    def loglikelihood(self, prefixes: list[str], texts: list[str],
                      progress: Callable[[int], None] = lambda done: None) -> list[tuple[float, bool]]:
        """(log-likelihood of text after prefix in nats, whether greedy decoding would give that text) of each pair.

        Prefix and text are tokenised apart and joined, as EasyLM does it; only the text's tokens are scored.
        Several texts of one token after the same prefix cost no more than one of them.
        Raises RequestError for a pair longer than seq_length, FloatingPointError for a score that is not finite.
        """
        pairs = [self._encode_pair(prefix, text, index)
                 for index, (prefix, text) in enumerate(zip(prefixes, texts, strict=True))]
        return self._score_pairs(pairs, progress)

    def _score_pairs(self, pairs: list[tuple[list[int], list[int]]],
                     progress: Callable[[int], None] = lambda done: None) -> list[tuple[float, bool]]:
        rows, answers = score_rows(pairs), [None] * len(pairs)
        for chosen in self._batches([len(row.tokens) for row in rows]):
            batch = [rows[i] for i in chosen]
            nll_BP, correct_BP = self._score_batch(batch)
            for row, nll_P, correct_P in zip(batch, nll_BP, correct_BP, strict=False):
                for pair, span in row.spans:
                    score = -float(nll_P[span].sum(dtype=np.float64))
                    if not np.isfinite(score):
                        raise FloatingPointError(f'log-likelihood {score}: the weights may be damaged')
                    answers[pair] = (score, bool(correct_P[span].all()))
            progress(sum(len(row.spans) for row in batch))
        return answers

    def _encode_prompt(self, prompt: str, index: int) -> tuple[list[int], bool]:
        """(token ids, whether the beginning was cut off); bos stays at position 0."""
        ids = self.tokenizer.encode(prompt)
        room = self.input_length - len(self._bos)
        if not self._bos + ids:
            raise RequestError(f'prefix_text[{index}] is empty, and there is no bos (--add_bos_token=False) to go on')
        return self._bos + ids[-room:], len(ids) > room

    def _encode_pair(self, prefix: str, text: str, index: int) -> tuple[list[int], list[int]]:
        """(bos and prefix, text) as token ids; nothing is cut off: the score of a part says nothing of the whole."""
        before, after = self._bos + self.tokenizer.encode(prefix), self.tokenizer.encode(text)
        if not before:
            raise RequestError(f'prefix_text[{index}] is empty, and there is no bos (--add_bos_token=False) to go on')
        if len(before) + len(after) > self.seq_length + 1:
            raise RequestError(f'prefix_text[{index}] and text[{index}] have {len(before)} (with bos) and {len(after)} '
                               f'tokens: at most {self.seq_length + 1} together (seq_length + 1) can be scored')
        return before, after

    def _answer(self, output: list[int], prompt_tokens: int, truncated: bool) -> Generation:
        """Cuts the tokens of one row at EOS."""
        eos = self.tokenizer.eos_token_id
        reason = 'stop' if eos in output else 'length'
        ids = output[:output.index(eos)] if eos in output else output
        # sentencepiece drops the blank that begins a text, byte-level BPE keeps it: an answer begins without it in both
        text = self.tokenizer.decode(ids).removeprefix(' ')
        return Generation(text, ids, prompt_tokens, reason, truncated)

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Indices of requests, those of like length together, at most batch_size in a batch."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        return [order[i:i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    # ------------------------------------------------------------ one batch, on the host

    def _generate_batch(self, prompts: list[list[int]], requests: list[int], temperature: float,
                        budget: int) -> list[list[int]]:
        """The tokens chosen for each prompt; a row that stopped early repeats EOS."""
        longest = max(map(len, prompts))
        length = bucket(longest, self.input_length, SMALLEST_PROMPT)
        needed = length + budget
        tokens_BT = self._padded(prompts, length)
        rows = Rows(self._column([len(prompt) for prompt in prompts], np.int32, dummy=1),
                    self._column([request % 2**32 for request in requests], np.uint32),
                    self._column([temperature] * len(prompts), np.float32), self._column([True] * len(prompts), bool))
        state = self._run('prefill', self._params, tokens_BT, rows)
        while bool(state.running) and int(state.step) < budget:
            length = self._longer(length, needed)
            state = self._run('grow', state, static=length)
            # choosing token n puts token n - 1 into slot longest + n - 1 at the furthest, which must be below `length`
            state = self._run('decode', self._params, state, rows, np.int32(min(budget, length - longest + 1)))
        if not np.asarray(state.finite_B).all():
            raise FloatingPointError('logits are not finite: the weights may be damaged')
        return np.asarray(state.output_BW)[:len(prompts), :int(state.step)].tolist()

    def _longer(self, length: int, needed: int) -> int:
        """The next cache length: double, at least SMALLEST_CACHE, at most the bucket of prompt and whole answer."""
        return min(max(2 * length, SMALLEST_CACHE), bucket(needed, self.seq_length, SMALLEST_CACHE))

    def _score_batch(self, rows: list[ScoreRow]) -> tuple[np.ndarray, np.ndarray]:
        """(nll_BP, correct_BP) of the rows' targets; what lies beyond a row's targets means nothing."""
        longest, most = max(len(row.tokens) for row in rows), max(len(row.targets) for row in rows)
        length = bucket(longest, self.seq_length, SMALLEST_PROMPT, self._score_buckets)
        count = bucket(most, max(most, self.seq_length), SMALLEST_TEXT)
        tokens_BT = self._padded([row.tokens for row in rows], length)
        positions_BP, targets_BP = (self._padded([getattr(row, name) for row in rows], count)
                                    for name in ('positions', 'targets'))
        return jax.device_get(self._run('score', self._params, tokens_BT, positions_BP, targets_BP))

    def _padded(self, rows: list[list[int]], length: int) -> np.ndarray:
        padded_BT = np.zeros((self.batch_size, length), np.int32)
        for row, ids in enumerate(rows):
            padded_BT[row, :len(ids)] = ids
        return padded_BT

    def _column(self, values: list, dtype, dummy=0) -> np.ndarray:
        return np.array(values + [dummy] * (self.batch_size - len(values)), dtype)

    # ------------------------------------------------------------ the programs, inside shard_map

    def _prefill(self, params, tokens_BT, rows: Rows) -> State:
        B, T = tokens_BT.shape
        cache = init_cache(self.config, B, T, DTYPES[self.compute.dtype], lax.axis_size('mp'))
        # padding stands after a row's last token, where causality hides it from every token that matters
        h_BTM, cache = hidden_states(params, tokens_BT, jnp.ones_like(tokens_BT), self.config, self.compute,
                                     cache=cache)
        h_B1M = jnp.take_along_axis(h_BTM, rows.lengths_B[:, None, None] - 1, axis=1)
        output_BW = jnp.zeros((B, self.max_new_tokens), jnp.int32)
        state = State(cache, output_BW[:, 0], output_BW, ~rows.real_B, jnp.ones(B, bool), jnp.int32(0), jnp.bool_(True))
        return self._choose(params, state, h_B1M, rows)

    def _decode(self, params, state: State, rows: Rows, limit) -> State:
        def step(state):
            positions_B1 = (rows.lengths_B + state.step - 1)[:, None]
            h_B1M, cache = hidden_states(params, state.token_B[:, None], jnp.ones_like(positions_B1), self.config,
                                         self.compute, positions_BT=positions_B1, cache=state.cache)
            return self._choose(params, dataclasses.replace(state, cache=cache), h_B1M, rows)

        return lax.while_loop(lambda state: state.running & (state.step < limit), step, state)

    def _choose(self, params, state: State, h_B1M, rows: Rows) -> State:
        """Chooses token number `step` of every row.  Every mp device sees all logits, so all of them choose alike."""
        logits_BV = all_gather(logits(params, h_B1M)[:, 0], 'B V/mp -> B V')
        finite_B = jnp.isfinite(logits_BV).all(axis=-1) | state.finished_B
        # ids past the tokenizer's last (a vocabulary padded to a round size) mean nothing
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < self.tokenizer.vocab_size, logits_BV, -jnp.inf)
        keys_B = row_keys(self.seed, rows.requests_B, rows.lengths_B + state.step)
        token_B = choose(logits_BV, keys_B, rows.temperature_B, self.top_k, self.top_p)
        token_B = jnp.where(state.finished_B, self.tokenizer.eos_token_id, token_B)
        finished_B = state.finished_B | (token_B == self.tokenizer.eos_token_id)
        # the devices of one loop must leave it together: their layers exchange data
        running = lax.pmax(~finished_B.all(), ('dp', 'fsdp'))
        return State(state.cache, token_B, lax.dynamic_update_slice(state.output_BW, token_B[:, None], (0, state.step)),
                     finished_B, state.finite_B & finite_B, state.step + 1, running)

    def _grow(self, state: State, length: int) -> State:
        longer = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0), (0, 0))), state.cache)
        return dataclasses.replace(state, cache=longer)

    def _score(self, params, tokens_BT, positions_BP, targets_BP):
        """(nll_BP float32, correct_BP bool) of targets_BP as the tokens after positions_BP."""
        h_BTM, _ = hidden_states(params, tokens_BT, jnp.ones_like(tokens_BT), self.config, self.compute)
        h_BPM = jnp.take_along_axis(h_BTM, positions_BP[..., None], axis=1)
        return token_cross_entropy(params, h_BPM, targets_BP)

    # ------------------------------------------------------------ compiling

    def warm_up(self, programs: tuple[str, ...] = PROGRAMS) -> Iterator[None]:
        """Compiles, without running, every program that a request of the named kinds can need; yields after each.

        Of loglikelihood, those for texts of up to SMALLEST_TEXT tokens; longer texts compile when they come.
        """
        B, shape = self.batch_size, jax.ShapeDtypeStruct
        if 'generate' in programs:
            rows = Rows(*(shape((B,), dtype) for dtype in (np.int32, np.uint32, np.float32, bool)))
            for length in self._buckets(self.input_length):
                state = self._compile('prefill', self._params, shape((B, length), np.int32), rows).out_info
                yield
                needed = length + self.max_new_tokens
                while length < needed:
                    length = self._longer(length, needed)
                    state = self._compile('grow', state, static=length).out_info
                    self._compile('decode', self._params, state, rows, shape((), np.int32))
                    yield
        if 'loglikelihood' in programs:
            few_BP = shape((B, bucket(1, self.seq_length, SMALLEST_TEXT)), np.int32)
            for length in self._buckets(self.seq_length, self._score_buckets):
                self._compile('score', self._params, shape((B, length), np.int32), few_BP, few_BP)
                yield

    def _buckets(self, limit: int, per_octave: int = 1) -> list[int]:
        sizes = [bucket(1, limit, SMALLEST_PROMPT, per_octave)]
        while sizes[-1] < limit:
            sizes.append(bucket(sizes[-1] + 1, limit, SMALLEST_PROMPT, per_octave))
        return sizes

    def _run(self, name: str, *arguments, static: int | None = None):
        return self._compile(name, *arguments, static=static)(*arguments)

    def _compile(self, name: str, *arguments, static: int | None = None) -> jax.stages.Compiled:
        """The program `name` for the shapes of `arguments` (arrays or ShapeDtypeStructs), kept or compiled now."""
        key = (name, static, *(x.shape for x in jax.tree.leaves(arguments)))
        if key not in self._programs:
            function, in_specs, out_specs, donated = self._definition(name, static)
            # check_vma=False: that mp devices choose alike from the same gathered logits is not in the types
            program = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            self._programs[key] = jax.jit(program, in_shardings=self._shardings(in_specs),
                                          out_shardings=self._shardings(out_specs),
                                          donate_argnums=donated).lower(*arguments).compile()
            self.compilations += 1
        return self._programs[key]

    def _shardings(self, specs):
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs,
                            is_leaf=lambda node: isinstance(node, PartitionSpec))

    def _definition(self, name: str, static: int | None):
        """(function, in_specs, out_specs, donated arguments) of a program."""
        params, everywhere = partitions(self.config), PartitionSpec()
        rows = Rows(BATCH, BATCH, BATCH, BATCH)
        slots = PartitionSpec(None, BATCH[0], None, 'mp', None)
        state = State(Cache(slots, slots), BATCH, BATCH, BATCH, BATCH, everywhere, everywhere)
        return {
            'prefill': (self._prefill, (params, BATCH, rows), state, ()),
            'grow': (lambda state: self._grow(state, static), (state,), state, ()),
            'decode': (self._decode, (params, state, rows, everywhere), state, (1,)),
            'score': (self._score, (params, BATCH, BATCH, BATCH), (BATCH, BATCH), ()),
        }[name]


def check_lengths(input_length: int, seq_length: int, config: LlamaConfig) -> None:
    """Raises ValueError naming the flags: 2 <= input_length < seq_length <= max_sequence_length."""
    if not 2 <= input_length < seq_length:
        raise ValueError(f'{input_length=} must be at least 2 and less than {seq_length=}: their difference is the '
                         'number of new tokens (--input_length, --seq_length)')
    if seq_length > config.max_sequence_length:
        raise ValueError(f'{seq_length=} is more than the model was made for, {config.max_sequence_length=}: '
                         'lower --seq_length (and --input_length)')


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError naming the flags unless every device gets the same number of rows, at least one."""
    replicas = mesh.shape['dp'] * mesh.shape['fsdp']
    if batch_size < 1 or batch_size % replicas:
        raise ValueError(f'{batch_size=} must be a multiple of dp*fsdp={replicas}, over which its rows are split: '
                         'change --lm_server.batch_size (evaluate.py: --batch_size) or --mesh_dim')


def check_sampling(top_k: int, top_p: float) -> None:
    """Raises ValueError naming the flag."""
    if top_k < 0:
        raise ValueError(f'{top_k=} must be at least 0; 0 switches it off (--top_k)')
    if not 0 < top_p <= 1:
        raise ValueError(f'{top_p=} must be above 0 and at most 1; 1.0 switches it off (--top_p)')


# ---------------------------------------------------------------- the thread that owns JAX


class QueueFull(Exception):
    """As many requests wait as may wait."""


class EngineFailed(Exception):
    """The engine raised something unforeseen; it takes no more work."""


class EngineThread:
    """One thread calls the engine; requests stand in a bounded line before it.

    Work is any function of the engine: `submit(lambda engine: engine.generate(...))`.  The first work is to warm up.
    A RequestError or FloatingPointError concerns one request; after any other exception no work is done (`failure`).
    """

    def __init__(self, engine, queue_size: int, warm_up: tuple[str, ...] = PROGRAMS):
        self.failure: BaseException | None = None
        self._engine = engine
        self._closing = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix='engine')
        self._places = threading.BoundedSemaphore(queue_size + 1)  # + the one that is being served
        self._queue_size = queue_size
        self.warm = self._executor.submit(self._warm_up, warm_up)
        self.warm.add_done_callback(self._note_failure)

    @property
    def ready(self) -> bool:
        """Warmed up, not failed, not closing."""
        return self.warm.done() and self.failure is None and not self._closing

    def submit(self, work: Callable) -> Future:
        """A Future of work(engine); raises QueueFull or EngineFailed.  What the work raises is in the Future."""
        if self.failure is not None:
            raise EngineFailed
        if not self._places.acquire(blocking=False):
            raise QueueFull(f'{self._queue_size} requests are waiting already')
        future = self._executor.submit(self._work, work)
        future.add_done_callback(lambda _: self._places.release())
        future.add_done_callback(self._note_failure)
        return future

    def _work(self, work: Callable):
        if self.failure is not None:
            raise EngineFailed
        return work(self._engine)

    def _warm_up(self, programs: tuple[str, ...]) -> None:
        for _ in self._engine.warm_up(programs):
            if self._closing:
                return

    def close(self) -> None:
        """Waits for the work that is under way or in line, not for warming up; afterwards nothing may be submitted."""
        self._closing = True
        self._executor.shutdown(wait=True)

    def _note_failure(self, future: Future) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, RequestError | FloatingPointError | EngineFailed):
            self.failure = error
            traceback.print_exception(error)
