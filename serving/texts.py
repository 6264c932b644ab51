"""From texts to the engine's works and back: what a server and evaluate.py ask alike.  Before: engine.py.

A `Question` is the works that answer it, and how their results become the answer.  Who does the works (a thread behind
HTTP, or `Engine.run` in one's own program) has no part in it, so both answer the same.
"""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from data.prompt import PromptTemplate
from data.tokenizer import Tokenizer
from mistake import Mistake
from model.config import LlamaConfig
from serving.work import GREEDY, Generate, Generated, RequestError, Sampling, Score, Scored, Work

SHARE = 32  # texts after one prefix that one work scores: more would keep a slot from others for long


class Question(NamedTuple):
    """works: what the engine is to do.  answer(results in the order of works) -> the answer."""

    works: list[Work]
    answer: Callable[[list[Generated | Scored]], Any]


class Classified(NamedTuple):
    """The label of one text.  probabilities, log_likelihoods (nats): of each label, in the template's order."""

    label: str
    probabilities: list[float]
    log_likelihoods: list[float]


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


def softmax(scores: list[float], temperature: float) -> list[float]:
    """Normalise log-likelihoods / temperature over the labels."""
    best = max(scores)
    if best == -math.inf:
        return [1 / len(scores)] * len(scores)
    weights = [math.exp((score - best) / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


class Texts:
    """Asks one model's engine in texts.

    input_length: most tokens of a prompt, bos included; seq_length - input_length: most new ones (EasyLM's meaning).
    Raises Mistake, before any work, for values that cannot go together.
    """

    def __init__(self, tokenizer: Tokenizer, config: LlamaConfig, *, input_length: int, seq_length: int,
                 add_bos_token: bool = True, template: PromptTemplate | None = None):
        check_lengths(input_length, seq_length, config)
        if tokenizer.vocab_size > config.vocab_size:
            raise Mistake(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size=}: '
                          'they do not belong together (--tokenizer.vocab_file)')
        self.tokenizer, self.template = tokenizer, template
        self.input_length, self.seq_length = input_length, seq_length
        self._bos = [tokenizer.bos_token_id] if add_bos_token else []

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer."""
        return self.seq_length - self.input_length

    # ------------------------------------------------------------ generating

    def generate(self, prompts: list[str], sampling: Sampling = GREEDY, max_new_tokens: int | None = None,
                 **fields) -> Question:
        """Ask for one Generated a prompt; a prompt that is too long loses its beginning, and the answer says so.

        At most seq_length - input_length new tokens; max_new_tokens can lower that.  fields: of Generate.
        Raises RequestError for max_new_tokens out of range.
        """
        budget = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= budget <= self.max_new_tokens:
            raise RequestError(f'{max_new_tokens=} must be from 1 to {self.max_new_tokens} (seq_length - input_length)')
        works = []
        for index, prompt in enumerate(prompts):
            ids, truncated = self._window(self._encode(prompt, index))
            works.append(Generate(tuple(ids), budget, sampling, truncated=truncated, **fields))
        return Question(works, list)

    def greedy_until(self, prompts: list[str], stops: list[list[str]], max_length: int) -> Question:
        """Ask to continue each prompt greedily until EOS, max_length tokens, or its first stop text: list[Generated].

        An answer longer than seq_length - input_length is made in several windows: each begins with the last tokens, at
        most input_length with bos, of prompt and answer so far (`truncated` says whether any were dropped).
        """
        works = []
        for index, (prompt, stop) in enumerate(zip(prompts, stops, strict=True)):
            ids, truncated = self._window(self._encode(prompt, index))
            works.append(Generate(tuple(ids), max_length, stop=tuple(stop), truncated=truncated,
                                  window=min(self.max_new_tokens, max_length)))
        return Question(works, list)

    def prompt_work(self, prompt: str | list[int], *, max_new_tokens: int, **fields) -> Generate:
        """Make the work of a prompt whose answer must fit behind it (OpenAI's meaning); ids are taken as they are.

        Raises RequestError for an empty prompt, and for one that leaves no room for max_new_tokens.
        """
        ids = self._bos + self._encode(prompt, 0) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError('the prompt is empty')
        if len(ids) + max_new_tokens > self.seq_length:
            raise RequestError(f'the prompt has {len(ids)} tokens, with {max_new_tokens=} more than the '
                               f'{self.seq_length} that this server keeps (--seq_length)')
        return Generate(tuple(ids), max_new_tokens, **fields)

    def prompt_score(self, ids: list[int], logprobs: int | None = None) -> Score:
        """Make the work that scores every token of a prompt after its first."""
        if not 2 <= len(ids) <= self.seq_length:
            raise RequestError(f'the prompt has {len(ids)} tokens: from 2 to {self.seq_length} can be scored')
        return Score((ids[0],), (tuple(ids[1:]),), logprobs)

    def choice_ids(self, prompt: str, choices: list[str]) -> tuple[tuple[int, ...], ...]:
        """Encode each choice as what comes after the prompt.

        Where the tokenizer joins the end of the prompt with a choice, the choice is encoded apart.
        """
        before, found = self.tokenizer.encode(prompt), []
        for choice in choices:
            both = self.tokenizer.encode(prompt + choice)
            after = both[len(before):] if both[:len(before)] == before else self.tokenizer.encode(choice)
            if not after:
                raise RequestError(f'the choice {choice!r} has no tokens')
            found.append(tuple(after))
        if len(set(found)) < len(found):
            raise RequestError('choices must differ in their tokens')
        return tuple(found)

    # ------------------------------------------------------------ scoring

    def loglikelihood(self, prefixes: list[str], texts: list[str]) -> Question:
        """Ask for each pair (log-likelihood of text after prefix in nats, whether greedy decoding would give it).

        Prefix and text are tokenised apart and joined, as EasyLM does it; only the text's tokens are scored.  Greedy
        decoding chooses no id that only pads the vocabulary, though the likelihoods are those among all ids.
        Texts after the same prefix share its computation.  A text of no tokens has likelihood 1 and is greedy.  The
        first token of a text without prefix: see Engine.first_token.
        Raises RequestError for a pair longer than seq_length.
        """
        pairs = [self._encode_pair(prefix, text, index)
                 for index, (prefix, text) in enumerate(zip(prefixes, texts, strict=True))]
        return self._score_pairs(pairs, first=True)

    def loglikelihood_rolling(self, texts: list[str]) -> Question:
        """Ask for each text, of any length, (log-likelihood of all its tokens in nats, whether each is the likeliest).

        The first token follows bos (also where prompts go without bos); a text longer than seq_length is scored in
        windows (`rolling_windows`).
        """
        windows = [rolling_windows(self.tokenizer.encode(text), self.tokenizer.bos_token_id, self.seq_length)
                   for text in texts]
        asked = self._score_pairs([pair for pairs in windows for pair in pairs], first=False)

        def answer(results):
            scores = iter(asked.answer(results))
            parts = [[next(scores) for _ in pairs] for pairs in windows]
            return [(math.fsum(score for score, _ in part), all(greedy for _, greedy in part)) for part in parts]

        return Question(asked.works, answer)

    def classify(self, texts: list[str], template: PromptTemplate, temperature: float = 1.0) -> Question:
        """Ask for the label of each text: list[Classified].

        A label's log-likelihood is the sum over the tokens of its answer behind the prompt, not divided by their
        number: what generating would come out with, and what training made likely.  Probabilities are the softmax of
        the log-likelihoods / temperature over the template's labels.
        Raises RequestError for a text whose prompt and label are longer than seq_length.
        """
        answers = [template.answer(label) for label in range(len(template.labels))]
        works = []
        for index, text in enumerate(texts):
            prompt = template.prompt(text)
            before = self._bos + self._encode(prompt, index)
            after = self.choice_ids(prompt, answers)
            if (length := len(before) + max(map(len, after))) > self.seq_length + 1:
                raise RequestError(f'texts[{index}] has {length} tokens with template and label: at most '
                                   f'{self.seq_length + 1} (seq_length + 1)')
            works.append(Score(tuple(before), after))

        def answer(results: list[Scored]) -> list[Classified]:
            found = []
            for scored in results:
                scores = [math.fsum(token.logprob for token in tokens) for tokens in scored.texts]
                found.append(Classified(template.labels[scores.index(max(scores))], softmax(scores, temperature),
                                        scores))
            return found

        return Question(works, answer)

    def _score_pairs(self, pairs: list[tuple[list[int], list[int]]], first: bool) -> Question:
        """Score after[i] behind before[i]; `first`: without a prefix the first token is scored as EasyLM does."""
        works: list[dict] = []
        places: list[tuple[int, int] | None] = []  # of each pair: its work, and its text there
        shared: dict[tuple[int, ...], int] = {}
        for before, after in pairs:
            if not after:
                places.append(None)
                continue
            key = tuple(before)
            if key not in shared or len(works[shared[key]]) == SHARE:
                shared[key] = len(works)
                works.append({})
            known = works[shared[key]]
            places.append((shared[key], known.setdefault(tuple(after), len(known))))
        of_work = {number: key for key, number in shared.items()}
        # a prefix with more than SHARE texts has several works
        keys = [of_work.get(number) for number in range(len(works))]
        for place, (before, _) in zip(places, pairs, strict=True):
            if place is not None:
                keys[place[0]] = tuple(before)
        scores = [Score(key, tuple(texts), as_first=first and list(key) == self._bos)
                  for key, texts in zip(keys, works, strict=True)]

        def answer(results: list[Scored]) -> list[tuple[float, bool]]:
            found = []
            for place in places:
                if place is None:
                    found.append((0.0, True))
                    continue
                scored, text = results[place[0]], place[1]
                found.append((math.fsum(token.logprob for token in scored.texts[text]), all(scored.greedy[text])))
            return found

        return Question(scores, answer)

    # ------------------------------------------------------------ encoding

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
