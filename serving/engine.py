"""Generate and score text in batches, with a few compiled programs.  Before: sampling.py; after: thread.py.

Requests are sorted by length and cut into batches of `batch_size` rows (dummy rows fill the last one).  Prompts are
padded on the right to a length bucket, 16 32 64 128 ..., so programs are few and padding is below a factor of two:

  prefill[T]   prompts through the network into a cache of T slots; the head at each row's last token; a first new token
  grow[S, 2S]  a longer cache: it starts at twice the prompt's bucket and doubles only for a batch that needs more
  decode[S]    token after token in one lax.while_loop on the device, until every row has stopped, or the budget or the
               cache is used up: no step runs for a batch that has stopped
  beams[T]     prompts through the network, then a beam search to its end in one loop (num_beams > 1; beams.py)
  score[T, P]  log-likelihoods of at most P tokens after places of a row of at most T; the head at those places only
  first        log-likelihoods of all tokens as the first of a text that nothing stands before

Each is one `jax.shard_map` over ('dp', 'fsdp', 'mp'): rows split over dp and fsdp, heads and vocabulary over mp.  They
are compiled ahead of use and kept (`compilations` counts them): a shape seen before, or warmed up, never waits again.

EasyLM's server pads on the left behind one bos, with positions that skip the padding: the sequence is the one we pad on
the right.  The padding matters only to a text without any prefix, there and here: see `_first_token`.
"""
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.tokenizer import Tokenizer
from mistake import Mistake
from model.cache import Cache, init_cache, longer
from model.config import Compute, LlamaConfig
from model.llama import hidden_states
from model.loss import is_likeliest, logits, token_cross_entropy
from model.partition import BATCH, DTYPES, all_gather, check_rows, pytree
from model.weights import Llama, partitions
from serving import beams
from serving.sampling import choose, row_keys

SMALLEST_PROMPT, SMALLEST_TEXT, SMALLEST_CACHE = 16, 4, 64  # buckets, in tokens
PROGRAMS = ('generate', 'greedy_until', 'chat', 'loglikelihood')  # what `warm_up` can compile: EasyLM's names
CHECK_EVERY = 16  # tokens between two looks for a stop text


class RequestError(Mistake):
    """A request that cannot be served as it stands; the message is for the client.  The engine is untouched."""


class Generation(NamedTuple):
    """The answer to one prompt.

    token_ids: the new tokens without EOS.  prompt_tokens: how many the model saw, bos included.  finish_reason: 'stop'
    at EOS or a stop text, 'length' at the budget.  truncated: the prompt was too long and lost its beginning.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    truncated: bool


class BatchRows(NamedTuple):
    """The part of a batch that stays the same while it is decoded; [B] each.  real: not a dummy row."""

    lengths_B: np.ndarray
    requests_B: np.ndarray
    temperature_B: np.ndarray
    real_B: np.ndarray


@pytree
class Decoding:
    """A batch in decoding.  output_BW holds the `step` tokens chosen; token_B, the last, is not yet in the cache."""

    cache: Cache
    token_B: jax.Array
    output_BW: jax.Array
    finished_B: jax.Array
    finite_B: jax.Array
    step: jax.Array
    running: jax.Array


class ScoreRow(NamedTuple):
    """One row to score: its tokens, the positions whose next token is asked for, and that token.

    spans: (pair that asks, its slice of positions and targets).
    """

    tokens: list[int]
    positions: list[int]
    targets: list[int]
    spans: list[tuple[int, slice]]


def score_rows(pairs: list[tuple[list[int], list[int]]]) -> list[ScoreRow]:
    """Make the rows that answer all (prefix, text) pairs.  A text of no tokens has none.

    Texts of one token after the same prefix share a row: the answers of a classification cost one pass together.
    """
    rows, shared = [], {}
    for pair, (before, after) in enumerate(pairs):
        if not after:
            continue
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


def rolling_windows(ids: list[int], bos: int, window: int) -> list[tuple[list[int], list[int]]]:
    """Cut (before, after) pairs that score each of `ids` once, none longer than `window` + 1 tokens: EasyLM's windows.

    The first begins with bos, each other with the token before its first; they do not overlap, except that the last is
    moved to the left until it is full, so that what it scores has more before it.
    """
    tokens, pairs = [bos, *ids], []
    for start in range(0, len(ids), window):
        begin = max(0, min(start, len(ids) - window))
        pairs.append((tokens[begin:start + 1], ids[start:start + window]))
    return pairs


def before_stops(text: str, stops: list[str]) -> str:
    """Cut `text` before the first of each stop text, one after the other, as EasyLM does."""
    for stop in stops:
        text = text.split(stop, maxsplit=1)[0]
    return text


def bucket(length: int, limit: int, smallest: int, per_octave: int = 1) -> int:
    """Find the smallest of `smallest` * 2^n * (1 + i / per_octave), or `limit` itself, that holds `length` <= limit."""
    size = smallest
    while 2 * size < length:
        size *= 2
    sizes = (size + size * i // per_octave for i in range(per_octave + 1))
    return min(next(s for s in sizes if s >= length), limit)


class Engine:
    """Generates from and scores with one model.  Not thread-safe: one thread calls it (EngineThread).

    params: cast here to the dtype of `compute`, which says how the network is computed.  mesh: batch_size must be a
    multiple of its dp*fsdp.  seed: of the draws; same seed, same sequence of requests, same answers.
    input_length: most tokens of a prompt, bos included.  seq_length - input_length: most new tokens (EasyLM's meaning).
    top_k 0 and top_p 1.0 switch their filter off; do_sample=False makes every request greedy, or with num_beams above 1
    a beam search, for which temperature, top_k and top_p mean nothing.
    score_buckets: lengths an octave that `loglikelihood` pads to: more waste less, and compile more programs.
    Raises Mistake, before any work, for values that cannot go together.
    """

    def __init__(self, params: Llama, config: LlamaConfig, compute: Compute, tokenizer: Tokenizer, mesh: Mesh, *,
                 batch_size: int, input_length: int, seq_length: int, top_k: int = 50, top_p: float = 1.0,
                 do_sample: bool = True, num_beams: int = 1, add_bos_token: bool = True, seed: int = 42,
                 score_buckets: int = 1):
        check_lengths(input_length, seq_length, config)
        check_beams(do_sample, num_beams)
        check_rows(batch_size, mesh, 'batch_size')
        if tokenizer.vocab_size > config.vocab_size:
            raise Mistake(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size=}: '
                          'they do not belong together (--tokenizer.vocab_file)')
        # the network casts each weight to the compute dtype before use anyway: doing it once saves memory and reading
        self._params = jax.tree.map(lambda x: x.astype(DTYPES[compute.dtype]), params)
        self.config, self.compute, self.tokenizer, self.mesh = config, compute, tokenizer, mesh
        self.batch_size, self.input_length, self.seq_length = batch_size, input_length, seq_length
        self.top_k, self.top_p, self.do_sample, self.num_beams, self.seed = top_k, top_p, do_sample, num_beams, seed
        self._bos = [tokenizer.bos_token_id] if add_bos_token else []
        self._score_buckets = score_buckets
        self.compilations = 0
        self._programs = {}
        self._requests = 0
        self._first_V = None

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer."""
        return self.seq_length - self.input_length

    # ------------------------------------------------------------ requests

    def generate(self, prompts: list[str], temperature: float, max_new_tokens: int | None = None,
                 progress: Callable[[int], None] = lambda done: None) -> list[Generation]:
        """Return one Generation per prompt, in order.  temperature 0 is greedy; progress(n): n more prompts are done.

        A prompt's tokens depend on the seed, the number of prompts ever before it and the temperature, and not on the
        batch around it.  At most seq_length - input_length new tokens; max_new_tokens can lower that.
        Raises RequestError for max_new_tokens out of range, FloatingPointError for logits that are not finite.
        """
        budget = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= budget <= self.max_new_tokens:
            raise RequestError(f'{max_new_tokens=} must be from 1 to {self.max_new_tokens} (seq_length - input_length)')
        encoded = [self._window(self._encode(prompt, index)) for index, prompt in enumerate(prompts)]
        first, self._requests = self._requests, self._requests + len(prompts)
        temperature = temperature if self.do_sample else 0.0
        answers = [None] * len(prompts)
        for chosen in self._batches([len(ids) for ids, _ in encoded]):
            batch = [encoded[i][0] for i in chosen]
            if self.num_beams > 1:
                outputs = self._beam_batch(batch, budget)
            else:
                outputs = self._generate_batch(batch, [first + i for i in chosen], temperature, budget)
            for i, output in zip(chosen, outputs, strict=True):
                (prompt, truncated), (ids, reason) = encoded[i], self._until_eos(output)
                answers[i] = Generation(self._text(ids), ids, len(prompt), reason, truncated)
            progress(len(chosen))
        return answers

    def greedy_until(self, prompts: list[str], stops: list[list[str]], max_length: int) -> list[Generation]:
        """Continue each prompt greedily until EOS, max_length tokens, or its first stop text, before which it is cut.

        An answer longer than seq_length - input_length is made in several windows: each begins with the last tokens, at
        most input_length with bos, of prompt and answer so far (`truncated` says whether any were dropped).  token_ids
        may run past the stop text.  Raises as `generate` does.
        """
        encoded = [self._encode(prompt, index) for index, prompt in enumerate(prompts)]
        outputs, going, made = [[] for _ in prompts], range(len(prompts)), 0
        reasons, truncated = ['length'] * len(prompts), [False] * len(prompts)
        while going and made < max_length:
            budget = min(self.max_new_tokens, max_length - made)
            windows = [self._window(encoded[i] + outputs[i]) for i in going]
            for batch in self._batches([len(ids) for ids, _ in windows]):
                chosen = [going[b] for b in batch]

                def stopped(row, tokens, chosen=chosen):
                    text = self._text(outputs[chosen[row]] + tokens)
                    return before_stops(text, stops[chosen[row]]) != text

                new = self._generate_batch([windows[b][0] for b in batch], [0] * len(batch), 0.0, budget, stopped)
                for row, (b, i) in enumerate(zip(batch, chosen, strict=True)):
                    truncated[i] |= windows[b][1]
                    ids, reason = self._until_eos(new[row])
                    reasons[i] = 'stop' if stopped(row, ids) else reason
                    outputs[i] += ids
            made += budget
            going = [i for i in going if reasons[i] == 'length']
        return [Generation(before_stops(self._text(ids), stops[i]), ids, len(encoded[i]) + len(self._bos), reasons[i],
                           truncated[i]) for i, ids in enumerate(outputs)]

    def loglikelihood(self, prefixes: list[str], texts: list[str],
                      progress: Callable[[int], None] = lambda done: None) -> list[tuple[float, bool]]:
        """Score each pair: (log-likelihood of text after prefix in nats, whether greedy decoding would give that text).

        Prefix and text are tokenised apart and joined, as EasyLM does it; only the text's tokens are scored.  Greedy
        decoding chooses no id that only pads the vocabulary, though the likelihoods are those among all ids.
        Several texts of one token after the same prefix cost no more than one of them.  A text of no tokens has
        likelihood 1 and is greedy.  The first token of a text without prefix: see `_first_token`.
        Raises RequestError for a pair longer than seq_length, FloatingPointError for a score that is not finite.
        """
        pairs = [self._encode_pair(prefix, text, index)
                 for index, (prefix, text) in enumerate(zip(prefixes, texts, strict=True))]
        firsts = {}
        for index, (before, after) in enumerate(pairs):
            if before == self._bos and after:
                firsts[index], pairs[index] = after[0], (before + after[:1], after[1:])
        answers = self._score_pairs(pairs, progress)
        for index, token in firsts.items():
            first_V, (score, greedy) = self._first_token(), answers[index]
            likeliest = first_V[token] == first_V[:self.tokenizer.vocab_size].max()
            answers[index] = score + float(first_V[token]), bool(greedy and likeliest)
        return answers

    def loglikelihood_rolling(self, texts: list[str]) -> list[tuple[float, bool]]:
        """Score each text, of any length: (log-likelihood of all its tokens in nats, whether each is the likeliest).

        The first token follows bos (also where prompts go without bos); a text longer than seq_length is scored in
        windows (`rolling_windows`).  Raises FloatingPointError for a score that is not finite.
        """
        windows = [rolling_windows(self.tokenizer.encode(text), self.tokenizer.bos_token_id, self.seq_length)
                   for text in texts]
        scores = iter(self._score_pairs([pair for pairs in windows for pair in pairs]))
        parts = [[next(scores) for _ in pairs] for pairs in windows]
        return [(sum((score for score, _ in part), 0.0), all(greedy for _, greedy in part)) for part in parts]

    def _first_token(self) -> np.ndarray:
        """Compute log p [V] of every token as the first of a text without prefix, once: it is a constant of the model.

        EasyLM's definition: it pads the missing prefix, hides the padding from every token, and asks the last padding
        token.  That token sees bos alone and not itself, and no later token sees it.
        Raises FloatingPointError for weights that are not finite.
        """
        if self._first_V is None:
            first_V = np.asarray(self._run('first', self._params))
            if not np.isfinite(first_V).all():
                raise FloatingPointError('log-likelihood not finite: the weights may be damaged')
            self._first_V = first_V
        return self._first_V

    def _score_pairs(self, pairs: list[tuple[list[int], list[int]]],
                     progress: Callable[[int], None] = lambda done: None) -> list[tuple[float, bool]]:
        rows, answers = score_rows(pairs), [(0.0, True)] * len(pairs)
        if without := sum(not after for _, after in pairs):
            progress(without)
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

    def _encode(self, prompt: str, index: int) -> list[int]:
        """Encode a prompt, without bos.  Raises RequestError where the model would see nothing at all."""
        ids = self.tokenizer.encode(prompt)
        if not self._bos + ids:
            raise RequestError(f'prefix_text[{index}] is empty, and there is no bos (--add_bos_token=False) to go on')
        return ids

    def _window(self, ids: list[int]) -> tuple[list[int], bool]:
        """Cut to (bos and the last of `ids`, input_length at most together, whether the first were cut off)."""
        room = self.input_length - len(self._bos)
        return self._bos + ids[-room:], len(ids) > room

    def _encode_pair(self, prefix: str, text: str, index: int) -> tuple[list[int], list[int]]:
        """Encode (bos and prefix, text) and cut nothing off: the score of a part says nothing of the whole."""
        before, after = self._bos + self._encode(prefix, index), self.tokenizer.encode(text)
        if len(before) + len(after) > self.seq_length + 1:
            raise RequestError(f'prefix_text[{index}] and text[{index}] have {len(before)} (with bos) and {len(after)} '
                               f'tokens: at most {self.seq_length + 1} together (seq_length + 1) can be scored')
        return before, after

    def _until_eos(self, output: list[int]) -> tuple[list[int], str]:
        """Split off (the tokens before EOS, finish_reason) of one row."""
        eos = self.tokenizer.eos_token_id
        return (output[:output.index(eos)], 'stop') if eos in output else (output, 'length')

    def _text(self, ids: list[int]) -> str:
        # sentencepiece drops the blank that begins a text, byte-level BPE keeps it: an answer begins without it in both
        return self.tokenizer.decode(ids).removeprefix(' ')

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Sort the indices of requests into batches of at most batch_size, those of like length together."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        return [order[i:i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    # ------------------------------------------------------------ one batch, on the host

    def _generate_batch(self, prompts: list[list[int]], requests: list[int], temperature: float, budget: int,
                        stopped: Callable[[int, list[int]], bool] | None = None) -> list[list[int]]:
        """Choose the tokens for each prompt; a row that stopped early repeats EOS.

        stopped(row, its tokens): asked every CHECK_EVERY tokens whether the row may stop.
        """
        tokens_BT, rows = self._prompts(prompts, requests, temperature)
        longest, length = max(map(len, prompts)), tokens_BT.shape[1]
        needed, limit = length + budget, 1
        state = self._run('prefill', self._params, tokens_BT, rows)
        while bool(state.running) and (step := int(state.step)) < budget:
            if step == limit:
                length = self._longer(length, needed)
                state = self._run('grow', state, static=length)
                # choosing token n puts token n - 1 into slot longest + n - 1 at the furthest: it must be below `length`
                limit = min(budget, length - longest + 1)
            until = limit if stopped is None else min(limit, step + CHECK_EVERY)
            state = self._run('decode', self._params, state, rows, np.int32(until))
            if stopped is not None:
                state = self._stop(state, len(prompts), stopped)
        if not np.asarray(state.finite_B).all():
            raise FloatingPointError('logits are not finite: the weights may be damaged')
        return np.asarray(state.output_BW)[:len(prompts), :int(state.step)].tolist()

    def _stop(self, state: Decoding, count: int, stopped: Callable[[int, list[int]], bool]) -> Decoding:
        """Mark as finished the rows that `stopped` answers yes for."""
        output_BW, finished_B = np.asarray(state.output_BW)[:, :int(state.step)], np.array(state.finished_B)
        for row in range(count):
            finished_B[row] = finished_B[row] or stopped(row, output_BW[row].tolist())
        return dataclasses.replace(state, finished_B=finished_B, running=~finished_B.all())

    def _beam_batch(self, prompts: list[list[int]], budget: int) -> list[list[int]]:
        """Find the tokens of each prompt's best beam."""
        tokens_BT, rows = self._prompts(prompts, [0] * len(prompts), 0.0)
        output_BW, finite_B, step = jax.device_get(
            self._run('beams', self._params, tokens_BT, rows, np.int32(budget)))
        if not finite_B.all():
            raise FloatingPointError('logits are not finite: the weights may be damaged')
        return output_BW[:len(prompts), :int(step)].tolist()

    def _prompts(self, prompts: list[list[int]], requests: list[int],
                 temperature: float) -> tuple[np.ndarray, BatchRows]:
        """Make (tokens_BT padded to a bucket, the batch's rows)."""
        tokens_BT = self._padded(prompts, bucket(max(map(len, prompts)), self.input_length, SMALLEST_PROMPT))
        return tokens_BT, BatchRows(
            self._column([len(prompt) for prompt in prompts], np.int32, dummy=1),
            self._column([request % 2**32 for request in requests], np.uint32),
            self._column([temperature] * len(prompts), np.float32), self._column([True] * len(prompts), bool))

    def _longer(self, length: int, needed: int) -> int:
        """Return the next cache length: double, at least SMALLEST_CACHE, at most the bucket of prompt and answer."""
        return min(max(2 * length, SMALLEST_CACHE), bucket(needed, self.seq_length, SMALLEST_CACHE))

    def _score_batch(self, rows: list[ScoreRow]) -> tuple[np.ndarray, np.ndarray]:
        """Score the rows' targets: (nll_BP, correct_BP), meaningless beyond a row's targets."""
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

    def _prefill(self, params, tokens_BT, rows: BatchRows) -> Decoding:
        B, T = tokens_BT.shape
        cache = init_cache(self.config, B, T, DTYPES[self.compute.dtype], lax.axis_size('mp'))
        # padding stands after a row's last token, where causality hides it from every token that matters
        h_BTM, cache = hidden_states(params, tokens_BT, jnp.ones_like(tokens_BT), self.config, self.compute,
                                     cache=cache)
        h_B1M = jnp.take_along_axis(h_BTM, rows.lengths_B[:, None, None] - 1, axis=1)
        output_BW = jnp.zeros((B, self.max_new_tokens), jnp.int32)
        state = Decoding(cache, output_BW[:, 0], output_BW, ~rows.real_B, jnp.ones(B, bool), jnp.int32(0),
                         jnp.bool_(True))
        return self._choose(params, state, h_B1M, rows)

    def _decode(self, params, state: Decoding, rows: BatchRows, limit) -> Decoding:
        def step(state):
            positions_B1 = (rows.lengths_B + state.step - 1)[:, None]
            h_B1M, cache = hidden_states(params, state.token_B[:, None], jnp.ones_like(positions_B1), self.config,
                                         self.compute, positions_BT=positions_B1, cache=state.cache)
            return self._choose(params, dataclasses.replace(state, cache=cache), h_B1M, rows)

        return lax.while_loop(lambda state: state.running & (state.step < limit), step, state)

    def _choose(self, params, state: Decoding, h_B1M, rows: BatchRows) -> Decoding:
        """Choose token number `step` of every row.  Every mp device sees all logits, so all of them choose alike."""
        logits_BV, finite_B = self._next_logits(params, h_B1M)
        keys_B = row_keys(self.seed, rows.requests_B, rows.lengths_B + state.step)
        token_B = choose(logits_BV, keys_B, rows.temperature_B, self.top_k, self.top_p)
        token_B = jnp.where(state.finished_B, self.tokenizer.eos_token_id, token_B)
        finished_B = state.finished_B | (token_B == self.tokenizer.eos_token_id)
        # the devices of one loop must leave it together: their layers exchange data
        running = lax.pmax(~finished_B.all(), ('dp', 'fsdp'))
        output_BW = lax.dynamic_update_slice(state.output_BW, token_B[:, None], (0, state.step))
        return Decoding(state.cache, token_B, output_BW, finished_B, state.finite_B & (finite_B | state.finished_B),
                        state.step + 1, running)

    def _next_logits(self, params, h_B1M):
        """Compute (logits_BV of the next token on every mp device, whether they are finite)."""
        logits_BV = all_gather(logits(params, h_B1M)[:, 0], 'B V/mp -> B V')
        # ids past the tokenizer's last (a vocabulary padded to a round size) mean nothing
        meant_V = jnp.arange(logits_BV.shape[-1]) < self.tokenizer.vocab_size
        return jnp.where(meant_V, logits_BV, -jnp.inf), jnp.isfinite(logits_BV).all(axis=-1)

    def _beams(self, params, tokens_BT, rows: BatchRows, limit):
        """Search with beams for `limit` tokens: (output_BW, finite_B, step).  Each prompt has E rows of the cache."""
        (B, T), E = tokens_BT.shape, self.num_beams
        length = bucket(T + self.max_new_tokens, self.seq_length, SMALLEST_CACHE)
        cache = init_cache(self.config, B, length, DTYPES[self.compute.dtype], lax.axis_size('mp'))
        h_BTM, cache = hidden_states(params, tokens_BT, jnp.ones_like(tokens_BT), self.config, self.compute,
                                     cache=cache)
        h_B1M = jnp.take_along_axis(h_BTM, rows.lengths_B[:, None, None] - 1, axis=1)
        h_R1M, cache = jnp.repeat(h_B1M, E, axis=0), jax.tree.map(lambda x: jnp.repeat(x, E, axis=1), cache)

        def choose_next(search, cache, finite_B, h_R1M):
            logits_RV, finite_R = self._next_logits(params, h_R1M)
            finite_B &= finite_R.reshape(B, E).all(axis=1) | ~search.open_B
            log_probs_BEV = jax.nn.log_softmax(logits_RV).reshape(B, E, -1)
            search, parents_BE = beams.advance(search, log_probs_BEV, self.input_length, self.tokenizer.eos_token_id)
            parents_R = (parents_BE + E * jnp.arange(B)[:, None]).reshape(-1)
            running = lax.pmax(search.open_B.any(), ('dp', 'fsdp'))
            return search, jax.tree.map(lambda x: x[:, parents_R], cache), finite_B, running

        def step(state):
            search, cache, finite_B, _ = state
            token_R1 = lax.dynamic_slice_in_dim(search.tokens_BEW, search.step - 1, 1, axis=2).reshape(B * E, 1)
            positions_R1 = (jnp.repeat(rows.lengths_B, E) + search.step - 1)[:, None]
            h_R1M, cache = hidden_states(params, token_R1, jnp.ones_like(token_R1), self.config, self.compute,
                                         positions_BT=positions_R1, cache=cache)
            return choose_next(search, cache, finite_B, h_R1M)

        search = beams.start(rows.real_B, E, self.max_new_tokens, self.tokenizer.eos_token_id)
        search, _, finite_B, _ = lax.while_loop(lambda state: state[3] & (state[0].step < limit), step,
                                                choose_next(search, cache, jnp.ones(B, bool), h_R1M))
        return beams.best(search), finite_B, search.step

    def _grow(self, state: Decoding, length: int) -> Decoding:
        return dataclasses.replace(state, cache=longer(state.cache, length))

    def _score(self, params, tokens_BT, positions_BP, targets_BP):
        """Score targets_BP as the tokens after positions_BP: (nll_BP float32, correct_BP bool)."""
        h_BTM, _ = hidden_states(params, tokens_BT, jnp.ones_like(tokens_BT), self.config, self.compute)
        h_BPM = jnp.take_along_axis(h_BTM, positions_BP[..., None], axis=1)
        nll_BP, correct_BP = token_cross_entropy(params, h_BPM, targets_BP, self.compute)
        if self.tokenizer.vocab_size < self.config.vocab_size:  # as in _next_logits: greedy decoding takes no such id
            correct_BP = is_likeliest(params, h_BPM, targets_BP, self.tokenizer.vocab_size)
        return nll_BP, correct_BP

    def _first(self, params):
        """Compute log p [V] of the token after a padding token that sees bos alone.

        In the cache bos has slot 0 and the padding token slot 1, but its position is 0: it sees slot 0 only.  No kernel
        is made for that, so the reference computes these two tokens.
        """
        compute = dataclasses.replace(self.compute, attention='reference')
        tokens_12 = jnp.array([[self.tokenizer.bos_token_id, self.tokenizer.pad_token_id]], jnp.int32)
        cache = init_cache(self.config, 1, 2, DTYPES[self.compute.dtype], lax.axis_size('mp'))
        h_12M, _ = hidden_states(params, tokens_12, None, self.config, compute, cache=cache,
                                 positions_BT=jnp.zeros((1, 2), jnp.int32))
        return jax.nn.log_softmax(all_gather(logits(params, h_12M[:, 1:])[0], 'P V/mp -> P V')[0])

    # ------------------------------------------------------------ compiling

    def warm_up(self, programs: tuple[str, ...] = PROGRAMS) -> Iterator[None]:
        """Compile, without running, every program that a request of the named kinds can need; yields after each.

        loglikelihood compiles for texts of up to SMALLEST_TEXT tokens; programs of longer texts, and of rolling ones,
        compile when these come.
        """
        B, shape = self.batch_size, jax.ShapeDtypeStruct
        rows = BatchRows(*(shape((B,), dtype) for dtype in (np.int32, np.uint32, np.float32, bool)))
        answers = {'generate', 'chat'} & set(programs)
        if answers and self.num_beams > 1:
            for length in self._buckets(self.input_length):
                self._compile('beams', self._params, shape((B, length), np.int32), rows, shape((), np.int32))
                yield
        if 'greedy_until' in programs or answers and self.num_beams == 1:
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
            self._compile('first', self._params)
            yield
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
        """Return the program `name` for the shapes of `arguments` (arrays or ShapeDtypeStructs), kept or compiled."""
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
        """Return shardings as `specs`, but with batch rows replicated, so that every host can write and read them."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, PartitionSpec() if spec == BATCH else spec), specs,
                            is_leaf=lambda node: isinstance(node, PartitionSpec))

    def _definition(self, name: str, static: int | None):
        """Define a program: (function, in_specs, out_specs, donated arguments)."""
        params, everywhere = partitions(self.config), PartitionSpec()
        rows = BatchRows(BATCH, BATCH, BATCH, BATCH)
        slots = PartitionSpec(None, BATCH[0], None, 'mp')
        state = Decoding(Cache(slots, slots), BATCH, BATCH, BATCH, BATCH, everywhere, everywhere)
        return {
            'prefill': (self._prefill, (params, BATCH, rows), state, ()),
            'grow': (lambda state: self._grow(state, static), (state,), state, ()),
            'decode': (self._decode, (params, state, rows, everywhere), state, (1,)),
            'beams': (self._beams, (params, BATCH, rows, everywhere), (BATCH, BATCH, everywhere), ()),
            'score': (self._score, (params, BATCH, BATCH, BATCH), (BATCH, BATCH), ()),
            'first': (self._first, (params,), everywhere, ()),
        }[name]


def check_lengths(input_length: int, seq_length: int, config: LlamaConfig) -> None:
    """Raise Mistake naming the flags, unless 2 <= input_length < seq_length <= max_sequence_length."""
    if not 2 <= input_length < seq_length:
        raise Mistake(f'{input_length=} must be at least 2 and less than {seq_length=}: their difference is the '
                      'number of new tokens (--input_length, --seq_length)')
    if seq_length > config.max_sequence_length:
        raise Mistake(f'{seq_length=} is more than the model was made for, {config.max_sequence_length=}: '
                      'lower --seq_length (and --input_length)')


def check_beams(do_sample: bool, num_beams: int) -> None:
    """Raise Mistake naming the flags for a search that is told to draw."""
    if num_beams > 1 and do_sample:
        raise Mistake(f'{num_beams=} searches and does not draw, but {do_sample=}: add --do_sample=False, or leave '
                      '--num_beams out')
