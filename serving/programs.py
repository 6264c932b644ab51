"""The compiled programs of serving: ids in, ids and scores out.  Before: sampling.py, beams.py; after: engine.py.

A slot is a row of the cache that holds one sequence.  Text comes into it in *pieces* of PIECE tokens: a program takes R
pieces, of whatever slots, several of one slot among them, and what is asked of a prompt is asked at a piece's token.

  prefill[R]   R pieces of prompts into the cache; the head at one token of each; a next token for it
  score[R, P]  R pieces, and the log-likelihoods of P tokens after places of them; the head at those places only
  decode[R]    one more token for R slots
  beams[T]     one prompt through the network, then a beam search to its end in one loop (beams.py)
  first        log-likelihoods of all tokens as the first of a text that nothing stands before

Each is one `jax.shard_map` over ('dp', 'fsdp', 'mp'): heads and vocabulary are split over mp; dp * fsdp *groups* of
devices have slots and rows of their own.  R is a power of two a group, so programs are few (`sizes`), and attention
loops to the furthest token, so that no length of text compiles anything.  Each group has one slot more than it serves:
rows without work write there.

**A row's numbers do not depend on the rows beside it.**  That holds to the bit where the platform's matrix products
have it so, for decode as for pieces: hence never fewer than four rows (XLA's CPU takes other loops for one, and since
jax 0.11 for two), or two of int8, whose sums are exact, and at least 64 tokens of pieces.  tests/test_smollm2.py holds
it on the CPU.
"""
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.cache import Cache, init_cache
from model.config import Compute, LlamaConfig
from model.llama import hidden_states
from model.lora import Lora, adapted, adapted_partitions, stacked_partitions, with_rows
from model.loss import logits
from model.partition import BATCH, DTYPES, all_gather, pytree, rows_unit
from model.quantized import quantize, quantized_partitions
from model.weights import Llama, partitions
from serving import beams
from serving.sampling import Choice, choose
from serving.work import MAX_LISTED, MAX_LOGPROBS

PIECE = 16  # tokens of a prompt that are computed as one row
MOST_PIECES = 32  # in one program, of each group: 512 tokens
FEW_TARGETS = 4  # of each piece, where few are scored
PLACES_AT_ONCE = 64  # whose logits exist together while scoring
FEWEST_ROWS, FEWEST_INT8_ROWS, FEWEST_PIECES = 4, 2, 4  # see above


@pytree
class Pieces:
    """R pieces of text.  slots_R: of the group.  starts_R: position of their first token.  adapters_R: which of the
    model's adapters each has, 0 for none."""

    tokens_RC: jax.Array
    slots_R: jax.Array
    starts_R: jax.Array
    adapters_R: jax.Array


@pytree
class Chosen:
    """Hold what comes after each row: the token, its log-probability (the model's, before bias and temperature), and
    whether all logits were finite; top: the likeliest tokens with theirs, zeros where no row asked."""

    token_R: jax.Array
    logprob_R: jax.Array
    finite_R: jax.Array
    top_RN: jax.Array
    top_logprob_RN: jax.Array


@pytree
class Scores:
    """Hold what is known of each scored token: its log-probability, whether it is the likeliest known id, and whether
    all logits were finite; top as in Chosen."""

    logprob_P: jax.Array
    greedy_P: jax.Array
    finite_P: jax.Array
    top_PN: jax.Array
    top_logprob_PN: jax.Array


def sizes(least: int, most: int) -> list[int]:
    """List `least` times powers of two, as many as it takes to hold `most` rows."""
    found = [least]
    while found[-1] < most:
        found.append(2 * found[-1])
    return found


def cast_weights(params: Llama, config: LlamaConfig, mesh: Mesh, dtype: str) -> Llama:
    """Make the weights that the programs read: dtype 'int8', or a float one, to which all are cast."""
    if dtype == 'int8':
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), quantized_partitions(config),
                                 is_leaf=lambda node: isinstance(node, PartitionSpec))
        return jax.jit(lambda params: quantize(params, config), out_shardings=shardings)(params)
    return jax.tree.map(lambda x: x.astype(DTYPES[dtype]), params)


class Programs:
    """Compiles, keeps and calls the programs of one model.

    slots: of each group.  length: tokens that a slot holds.  vocabulary: ids that the tokenizer knows; others are never
    chosen.  weight_dtype, cache_dtype: '' for the compute dtype; weights can be 'int8', and the cache too.
    answer_tokens: most of an answer, the rest of `length` being for the prompt; `beams` is told them.  lora: the
    weights are `adapted` by these adapters, kept as they train.  stacks: they are `adapted` by stacks of these, of
    which each row has its own.  wait_for_all: called between compiling a program and running it (processes compile at
    their own pace, and collectives between CPUs wait for half a minute only).
    `compilations` counts what was compiled.
    """

    def __init__(self, config: LlamaConfig, compute: Compute, mesh: Mesh, *, slots: int, length: int, vocabulary: int,
                 answer_tokens: int = 1, weight_dtype: str = '', cache_dtype: str = '', lora: Lora | None = None,
                 stacks: Lora | None = None, wait_for_all: Callable[[], object] = lambda: None):
        self.config, self.compute, self.mesh, self._wait_for_all = config, compute, mesh, wait_for_all
        self.slots, self.length, self.vocabulary, self.answer_tokens = slots, length, vocabulary, answer_tokens
        self.weight_dtype, self.lora, self.stacks = weight_dtype or compute.dtype, lora, stacks
        self._fewest = FEWEST_INT8_ROWS if self.weight_dtype == 'int8' else FEWEST_ROWS
        self.cache_dtype = jnp.int8 if cache_dtype == 'int8' else DTYPES[cache_dtype or compute.dtype]
        self.groups = rows_unit(mesh)
        self.whole = compute.attention == 'pallas'  # the decode kernel takes every row of the cache
        self.compilations = 0
        self._programs = {}

    # ------------------------------------------------------------ what can be asked

    def new_cache(self) -> Cache:
        """Make the empty cache: every slot of every group and each group's spare one."""
        return self.run('new_cache')

    def rows_for(self, count: int) -> int:
        """Return how many rows a group's decode has for `count` sequences of it."""
        return self.slots + 1 if self.whole else next(n for n in sizes(self._fewest, self.slots) if n >= count)

    def pieces_for(self, count: int) -> int:
        """Return how many rows a group's prefill or score has for `count` pieces of it."""
        return next(n for n in sizes(FEWEST_PIECES, MOST_PIECES) if n >= count)

    def warm_up(self, params, cache, names: tuple[str, ...], num_beams: int = 1) -> Iterator[None]:
        """Compile, without running, every shape of the named programs; yields after each."""
        one = jax.ShapeDtypeStruct((1,), np.int32)
        if 'first' in names:
            self.compile('first', params, jax.ShapeDtypeStruct((1, 2), np.int32), one)
            yield
        for name in (name for name in names if name != 'first'):
            for arguments in self.shapes(name):
                self.compile(name, params, cache, *arguments)
                yield
        if num_beams > 1:
            number = jax.ShapeDtypeStruct((), np.int32)
            for length in self.beam_buckets():
                self.compile('beams', params, jax.ShapeDtypeStruct((1, length), np.int32), one, one, number, number,
                             static=self.beam_static(num_beams))
                yield

    def shapes(self, name: str) -> list[tuple]:
        """List the arguments of a program behind params and cache, of each of its shapes."""
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
        G, flag = self.groups, jax.ShapeDtypeStruct((), bool)
        if name == 'decode':
            every = [self.slots + 1] if self.whole else sizes(self._fewest, self.slots)
            return [(*[ints(G * R)] * 4, self.choice_shape(G * R), flag) for R in every]
        pieces = [(R, Pieces(ints(G * R, PIECE), *[ints(G * R)] * 3)) for R in sizes(FEWEST_PIECES, MOST_PIECES)]
        if name == 'prefill':
            return [(piece, ints(G * R), self.choice_shape(G * R), flag) for R, piece in pieces]
        return [(piece, ints(G * P), ints(G * P), flag) for R, piece in pieces for P in (FEW_TARGETS * R, PIECE * R)]

    def beam_static(self, num_beams: int) -> tuple[int, int, int]:
        """Say what is compiled into `beams`: beams, most tokens of an answer, most of a prompt."""
        return num_beams, self.answer_tokens, self.length - self.answer_tokens

    def beam_buckets(self) -> list[int]:
        """List the lengths to which a beam search's prompt is padded: powers of two from 16, and the longest."""
        longest, found = self.length - self.answer_tokens, [16]
        while found[-1] < longest:
            found.append(2 * found[-1])
        return [*found[:-1], longest]

    @staticmethod
    def choice_shape(R: int) -> Choice:
        """Describe the Choice of R rows."""
        kinds = dict(temperature_R=np.float32, top_k_R=np.int32, top_p_R=np.float32, min_p_R=np.float32,
                     seed_R=np.uint32, position_R=np.int32, only_R=bool)
        shapes = {name: jax.ShapeDtypeStruct((R,), kind) for name, kind in kinds.items()}
        return Choice(**shapes, listed_RA=jax.ShapeDtypeStruct((R, MAX_LISTED), np.int32),
                      bias_RA=jax.ShapeDtypeStruct((R, MAX_LISTED), np.float32))

    # ------------------------------------------------------------ the programs, inside shard_map

    def _new_cache(self) -> Cache:
        return init_cache(self.config, self.slots + 1, self.length + PIECE, self.cache_dtype, lax.axis_size('mp'))

    def _through(self, params, cache: Cache, tokens_RC, slots_R, starts_R, adapters_R):
        positions_RC = starts_R[:, None] + jnp.arange(tokens_RC.shape[1], dtype=jnp.int32)[None]
        return hidden_states(with_rows(params, adapters_R), tokens_RC, None, self.config, self.compute,
                             positions_BT=positions_RC, cache=cache, rows_B=slots_R)

    def _prefill(self, params, cache, pieces: Pieces, asked_R, choice: Choice, tell):
        """asked_R: the token of each piece that a next one is chosen after.  tell: whether `top` is wanted."""
        h_RCM, cache = self._through(params, cache, pieces.tokens_RC, pieces.slots_R, pieces.starts_R,
                                     pieces.adapters_R)
        h_R1M = jnp.take_along_axis(h_RCM, asked_R[:, None, None], axis=1)
        return cache, self._choose(params, h_R1M, choice, tell)

    def _decode(self, params, cache, tokens_R, slots_R, positions_R, adapters_R, choice: Choice, tell):
        """tokens_R: each slot's last token, not yet in the cache, of position positions_R."""
        h_R1M, cache = self._through(params, cache, tokens_R[:, None], None if self.whole else slots_R, positions_R,
                                     adapters_R)
        return cache, self._choose(params, h_R1M, choice, tell)

    def _choose(self, params, h_R1M, choice: Choice, tell) -> Chosen:
        """Every mp device sees all logits, so all of them choose alike."""
        z_RV = all_gather(logits(params, h_R1M)[:, 0], 'R V/mp -> R V')
        finite_R, lse_R = jnp.isfinite(z_RV).all(axis=-1), jax.nn.logsumexp(z_RV, axis=-1)
        z_RV = self._meant(z_RV)
        token_R = choose(z_RV, choice)
        logprob_R = jnp.take_along_axis(z_RV, token_R[:, None], axis=-1)[:, 0] - lse_R
        return Chosen(token_R, logprob_R, finite_R, *self._top(z_RV, lse_R, tell))

    def _meant(self, z_RV):
        """Hide ids past the tokenizer's last (a vocabulary padded to a round size): they mean nothing."""
        return jnp.where(jnp.arange(z_RV.shape[-1])[None] < self.vocabulary, z_RV, -jnp.inf)

    def _top(self, z_RV, lse_R, tell):
        """Find the likeliest ids of each row and their log-probabilities; zeros unless `tell`."""
        N = min(MAX_LOGPROBS, self.vocabulary)

        def likeliest():
            top_RN, ids_RN = lax.top_k(z_RV, N)
            return ids_RN, top_RN - lse_R[:, None]

        none = jnp.zeros((z_RV.shape[0], N), jnp.int32), jnp.zeros((z_RV.shape[0], N), jnp.float32)
        return lax.cond(tell, likeliest, lambda: none)

    def _score(self, params, cache, pieces: Pieces, places_P, targets_P, tell) -> tuple[Cache, Scores]:
        """Score targets_P as the tokens after places_P, which count through [R, C].  tell: whether `top` is wanted."""
        h_RCM, cache = self._through(params, cache, pieces.tokens_RC, pieces.slots_R, pieces.starts_R,
                                     pieces.adapters_R)
        h_PM = h_RCM.reshape(-1, h_RCM.shape[-1])[places_P]
        P, size = places_P.shape[0], min(places_P.shape[0], PLACES_AT_ONCE)

        def some(part):
            h_QM, targets_Q = part
            z_QV = all_gather(logits(params, h_QM[:, None])[:, 0], 'Q V/mp -> Q V')
            finite_Q = jnp.isfinite(z_QV).all(axis=-1)
            lse_Q = jax.nn.logsumexp(z_QV, axis=-1)
            target_Q = jnp.take_along_axis(z_QV, targets_Q[:, None], axis=-1)[:, 0]
            z_QV = self._meant(z_QV)  # likelihoods are those among all ids, greedy decoding takes only known ones
            top = self._top(z_QV, lse_Q, tell)
            return Scores(target_Q - lse_Q, target_Q >= z_QV.max(axis=-1), finite_Q, *top)

        scores = lax.map(some, (h_PM.reshape(P // size, size, -1), targets_P.reshape(P // size, size)))
        return cache, jax.tree.map(lambda x: x.reshape(P, *x.shape[2:]), scores)

    def _first(self, params, tokens_12, adapters_1):
        """Compute log p [V] of the token after a padding token that sees bos alone: tokens_12 are bos and padding.

        In the cache bos has place 0 and the padding token place 1, but its position is 0: it sees place 0 only.
        """
        cache = init_cache(self.config, 1, 2, DTYPES[self.compute.dtype], lax.axis_size('mp'))
        compute = dataclasses.replace(self.compute, attention='reference')
        h_12M, _ = hidden_states(with_rows(params, adapters_1), tokens_12, None, self.config, compute, cache=cache,
                                 positions_BT=jnp.zeros((1, 2), jnp.int32))
        return jax.nn.log_softmax(all_gather(logits(params, h_12M[:, 1:])[0], 'P V/mp -> P V')[0])

    def _beams(self, params, tokens_BT, lengths_B, adapters_B, limit, eos, num_beams: int, most: int,
               input_length: int):
        """Search with beams for `limit` tokens: (output_BW, finite_B, step).  Each prompt has E rows of a cache."""
        (B, T), E = tokens_BT.shape, num_beams
        cache = init_cache(self.config, B, T + most, DTYPES[self.compute.dtype], lax.axis_size('mp'))
        h_BTM, cache = hidden_states(with_rows(params, adapters_B), tokens_BT, jnp.ones_like(tokens_BT), self.config,
                                     self.compute, cache=cache)
        h_B1M = jnp.take_along_axis(h_BTM, lengths_B[:, None, None] - 1, axis=1)
        each = with_rows(params, jnp.repeat(adapters_B, E))
        h_R1M, cache = jnp.repeat(h_B1M, E, axis=0), jax.tree.map(lambda x: jnp.repeat(x, E, axis=1), cache)

        def choose_next(search, cache, finite_B, h_R1M):
            logits_RV = all_gather(logits(params, h_R1M)[:, 0], 'R V/mp -> R V')
            finite_R, logits_RV = jnp.isfinite(logits_RV).all(axis=-1), self._meant(logits_RV)
            finite_B &= finite_R.reshape(B, E).all(axis=1) | ~search.open_B
            log_probs_BEV = jax.nn.log_softmax(logits_RV).reshape(B, E, -1)
            search, parents_BE = beams.advance(search, log_probs_BEV, input_length, eos)
            parents_R = (parents_BE + E * jnp.arange(B)[:, None]).reshape(-1)
            return search, jax.tree.map(lambda x: x[:, parents_R], cache), finite_B, search.open_B.any()

        def step(state):
            search, cache, finite_B, _ = state
            token_R1 = lax.dynamic_slice_in_dim(search.tokens_BEW, search.step - 1, 1, axis=2).reshape(B * E, 1)
            positions_R1 = (jnp.repeat(lengths_B, E) + search.step - 1)[:, None]
            h_R1M, cache = hidden_states(each, token_R1, jnp.ones_like(token_R1), self.config, self.compute,
                                         positions_BT=positions_R1, cache=cache)
            return choose_next(search, cache, finite_B, h_R1M)

        search = beams.start(jnp.ones(B, bool), E, most, eos)
        search, _, finite_B, _ = lax.while_loop(lambda state: state[3] & (state[0].step < limit), step,
                                                choose_next(search, cache, jnp.ones(B, bool), h_R1M))
        return beams.best(search), finite_B, search.step

    # ------------------------------------------------------------ compiling

    def run(self, name: str, *arguments, static: tuple = ()):
        """Call a program, compiled now if it was not before."""
        return self.compile(name, *arguments, static=static)(*arguments)

    def compile(self, name: str, *arguments, static: tuple = ()) -> jax.stages.Compiled:
        """Return the program `name` for the shapes of `arguments` (arrays or ShapeDtypeStructs), kept or compiled."""
        key = (name, static, *(x.shape for x in jax.tree.leaves(arguments[1:])))
        if key not in self._programs:
            function, in_specs, out_specs, donated = self._definition(name, static or ())
            # check_vma=False: that mp devices choose alike from the same gathered logits is not in the types
            program = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            self._programs[key] = jax.jit(program, in_shardings=self._shardings(in_specs),
                                          out_shardings=self._shardings(out_specs),
                                          donate_argnums=donated).lower(*arguments).compile()
            self.compilations += 1
            self._wait_for_all()
        return self._programs[key]

    def _shardings(self, specs):
        """Return shardings as `specs`, but with batch rows replicated, so that every host can write and read them."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, PartitionSpec() if spec == BATCH else spec), specs,
                            is_leaf=lambda node: isinstance(node, PartitionSpec))

    def _definition(self, name: str, static: tuple):
        """Define a program: (function, in_specs, out_specs, donated arguments)."""
        params = (quantized_partitions if self.weight_dtype == 'int8' else partitions)(self.config)
        if self.stacks:
            params = adapted(params, stacked_partitions(self.config, self.stacks), self.stacks)
        if self.lora:
            params = adapted_partitions(self.config, self.lora)
        everywhere = PartitionSpec()
        rows = PartitionSpec(None, BATCH[0], None, 'mp')
        factors = PartitionSpec(None, BATCH[0], None, 'mp', None) if self.cache_dtype == jnp.int8 else None
        cache = Cache(rows, rows, factors)
        pieces, chosen = Pieces(*[BATCH] * 4), Chosen(*[BATCH] * 5)
        choice, scores = Choice(*[BATCH] * 9), Scores(*[BATCH] * 5)
        return {
            'new_cache': (self._new_cache, (), cache, ()),
            'prefill': (self._prefill, (params, cache, pieces, BATCH, choice, everywhere), (cache, chosen), (1,)),
            'score': (self._score, (params, cache, pieces, BATCH, BATCH, everywhere), (cache, scores), (1,)),
            'decode': (self._decode, (params, cache, *[BATCH] * 4, choice, everywhere), (cache, chosen), (1,)),
            'first': (self._first, (params, everywhere, everywhere), everywhere, ()),
            'beams': (lambda *arguments: self._beams(*arguments, *static),
                      (params, *[everywhere] * 5), (everywhere,) * 3, ()),
        }[name]
