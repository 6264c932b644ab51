"""Define what the engine is asked and what it answers: plain data, no JAX, no HTTP.  Next: engine.py.

A *work* is what one slot does: continue one prompt (`Generate`) or score places of one sequence (`Score`).  A *request*
is the list of works that one client asked for together.  The engine answers each work with events: a `Generate` with a
`Delta` for each token or few, then one `Generated`; a `Score` with one `Scored`; either with one exception instead.
"""
import dataclasses
from typing import NamedTuple

from mistake import Mistake

MAX_LISTED = 64  # ids that one request can name: choices' next tokens, or biases
MAX_LOGPROBS = 20  # likeliest tokens that are told beside the chosen one


class RequestError(Mistake):
    """A request that cannot be served as it stands; the message is for the client.  The engine is untouched."""


class QueueFull(Exception):
    """As many requests wait as may wait."""


class Cancelled(Exception):
    """Nobody wants the answer any more."""


class EngineFailed(Exception):
    """The engine raised something unforeseen; it takes no more work."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: logits + bias, / temperature, then top_k, top_p, min_p, then one draw.

    temperature 0: the likeliest.  top_k 0, top_p 1 and min_p 0 switch their filter off.  seed: of the draws; None for
    one that the engine makes from its own seed and the number of the work.  logit_bias: (token id, what is added).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue one prompt.

    prompt_ids: as the model sees it, with bos; at least one.  max_new_tokens: most tokens of the answer.
    stop: texts before which the answer ends.  choices: token ids, EOS not included, of the only answers allowed.
    logprobs: None, or how many likeliest tokens are told of each place beside the chosen one.
    ignore_eos: go on behind EOS.  truncated: the prompt lost its beginning before it came here (told in the answer).
    window: 0, or so many new tokens after which the slot begins again with the last tokens of prompt and answer
    (EasyLM's /greedy-until, which has no end).  num_beams: above 1, a search with so many beams; greedy otherwise.
    streamed: somebody reads the tokens as they come (Delta).  adapter: which of the engine's, 0 for none.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    truncated: bool = False
    window: int = 0
    num_beams: int = 1
    streamed: bool = False
    adapter: int = 0


@dataclasses.dataclass(frozen=True)
class Score:
    """Score each text as what comes after the prefix, whose last token is the one before a text's first.

    prefix_ids: at least one.  texts: token ids, none of them empty; they share the prefix's computation.
    logprobs: None, or how many likeliest tokens are told of each place beside the one that is scored.
    as_first: the first token of each text is scored as the first of a text that nothing stands before, as EasyLM does
    it (the program `first`); the prefix is bos alone then.  adapter: which of the engine's, 0 for none.
    """

    prefix_ids: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    logprobs: int | None = None
    as_first: bool = False
    adapter: int = 0


Work = Generate | Score


class Token(NamedTuple):
    """A token of an answer: its log-probability in nats (of the model: before bias and temperature), and `top`, the
    (id, log-probability) of the likeliest at its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Delta(NamedTuple):
    """Tell what was added: whole characters, never the beginning of a stop text, and the tokens not told before."""

    text: str
    tokens: list[Token]


class Generated(NamedTuple):
    """The answer to a Generate.

    text: all of it, the same as its Deltas together.  token_ids: the new tokens without EOS (they may run past a stop
    text).  tokens: the same with log-probabilities.  prompt_tokens: how many the model saw, bos included.
    finish_reason: 'stop' at EOS, a stop text or the end of a choice, 'length' at max_new_tokens.
    cached_tokens: of the prompt, how many were in the slot already.
    """

    text: str
    token_ids: list[int]
    tokens: list[Token]
    prompt_tokens: int
    finish_reason: str
    truncated: bool
    cached_tokens: int


class Scored(NamedTuple):
    """The answer to a Score: the tokens of each text with their log-probabilities, whether each is the likeliest that
    the tokenizer knows, and how many tokens of the prefix were in the slot already."""

    texts: list[list[Token]]
    greedy: list[list[bool]]
    cached_tokens: int


Event = Delta | Generated | Scored | Exception
