"""Serve OpenAI's completions and chats.  Before: api.py, chat.py.

  POST /v1/completions        prompt: str, [str], [token id] or [[token id]]; echo, logprobs, n, stop, seed, stream ...
  POST /v1/chat/completions   messages (text alone) through the chat template; response_format for a choice
  GET  /v1/models
  POST /tokenize              {"text" or "prompt": str, "add_special_tokens": bool?} -> {"tokens", "count"}
  POST /detokenize            {"tokens": [int]} -> {"text"}

What is as in OpenAI's API is not described here.  What is not:
- A field that is not listed is refused with 400, never ignored, and so is a penalty other than 0.  `user` is accepted
  and not used.  `model` may be left out.
- temperature is --lm_server.default_temperature where none is given; nothing is cut off by top_k where none is given.
- Caps: n 4, stop 8 texts of 64 characters, logprobs and top_logprobs 20 (OpenAI: 5), logit_bias 64, 64 prompts.
- max_tokens=0 with echo and logprobs scores the prompt.  top_logprobs always hold the token that stands there.
- A token that is no text of its own (half a character, a control token) is called token_id:N.
- With a seed the k-th of n answers has seed + k.
- From vLLM: top_k, min_p, ignore_eos, structured_outputs {"choice": [str]}, of which one comes out and nothing else.
- response_format json_schema: a schema of texts, {"enum": [str]}, with or without "type": "string".  As the content has
  to be JSON for that schema, it is the chosen text in quotation marks.
- prompt and max_tokens together must fit seq_length: nothing is cut off.
"""
import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Iterable
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field

from data.chat import ChatTemplate, Message
from serving.api import MAX_CHAT_LENGTH, REFUSALS, Body, Options, Text, Variant, find_model
from serving.asking import Asking, Refused
from serving.text_stream import BROKEN, TextStream
from serving.texts import Texts
from serving.work import MAX_LISTED, MAX_LOGPROBS, Delta, Event, Generate, Generated, Sampling, Token

MAX_PROMPTS, MAX_N, MAX_MESSAGES = 64, 4, 1024
MAX_STOPS, MAX_STOP_LENGTH, MAX_CHOICE_LENGTH = 8, 64, 1_000
MAX_ID, MAX_TOKENS = 2**31 - 1, 10_000_000
MAX_SEED = 2**32


def maybe(kind, rule: str, **limits):
    """A field that may be null or left out; `rule` is what it must be."""
    return Annotated[Annotated[kind, Field(**limits)] | None, Field(description=f'{rule}, or null')]


def number(low: float, high: float):
    return maybe(float, f'a number from {low:g} to {high:g}', ge=low, le=high, allow_inf_nan=False)


def whole(low: int, high: int):
    return maybe(int, f'a whole number from {low} to {high}', ge=low, le=high)


TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[Text, Field(max_length=MAX_CHAT_LENGTH)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Choices = Annotated[list[Annotated[Text, Field(min_length=1, max_length=MAX_CHOICE_LENGTH)]],
                    Field(min_length=1, max_length=MAX_LISTED)]
Zero = Annotated[Annotated[float, Field(ge=0, le=0)] | None, Field(description='0: there are no penalties here')]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class StreamOptions(Body):
    include_usage: bool = False


class StructuredOutputs(Body):
    choice: Choices


class Sampled(Body):
    """Hold the fields that completions and chats have in common."""

    model: maybe(str, 'the name that /v1/models tells', max_length=1000) = None
    temperature: number(0, 100) = None
    top_p: maybe(float, 'a number above 0, at most 1', gt=0, le=1, allow_inf_nan=False) = None
    top_k: maybe(int, 'a whole number, 0 or -1 for all', ge=-1, le=MAX_ID) = None
    min_p: number(0, 1) = None
    seed: whole(0, MAX_SEED - 1) = None
    n: whole(1, MAX_N) = None
    stop: Annotated[StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None, Field(
        description=f'a string of 1 to {MAX_STOP_LENGTH} characters, a list of at most {MAX_STOPS} of them, or null')
    ] = None
    logit_bias: Annotated[Annotated[dict[Annotated[str, Field(pattern=r'^[0-9]{1,10}$')], Bias],
                                    Field(max_length=MAX_LISTED)] | None,
                          Field(description=f'at most {MAX_LISTED} token ids with a number from -100 to 100')] = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    ignore_eos: maybe(bool, 'true or false') = None
    structured_outputs: Annotated[StructuredOutputs | None, Field(
        description=f'{{"choice": [1 to {MAX_LISTED} strings of 1 to {MAX_CHOICE_LENGTH} characters]}}')] = None
    stream: maybe(bool, 'true or false') = None
    stream_options: Annotated[StreamOptions | None, Field(description='{"include_usage": true or false}')] = None
    user: maybe(Text, 'a string (not used)', max_length=1000) = None

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, options: Options, answer: int) -> Sampling:
        """How the answer of this number, from 0, is drawn."""
        temperature = options.default_temperature if self.temperature is None else self.temperature
        return Sampling(temperature if options.do_sample else 0.0, max(self.top_k or 0, 0),
                        1.0 if self.top_p is None else self.top_p, self.min_p or 0.0,
                        None if self.seed is None else (self.seed + answer) % MAX_SEED,
                        tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()))


class CompletionBody(Sampled):
    prompt: Annotated[Prompt | Ids | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] |
                      Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)], Field(
        description=f'a string, a list of 1 to {MAX_PROMPTS} strings, a list of token ids, or 1 to {MAX_PROMPTS} lists '
                    'of token ids')]
    max_tokens: whole(0, MAX_TOKENS) = None
    echo: maybe(bool, 'true or false') = None
    logprobs: whole(0, MAX_LOGPROBS) = None
    best_of: whole(1, MAX_N) = None


def joined(content):
    """Join a content that comes in text parts; anything else is judged as it is."""
    if isinstance(content, list) and content and all(
            isinstance(part, dict) and set(part) == {'type', 'text'} and part['type'] == 'text' and
            isinstance(part['text'], str) for part in content):
        return ''.join(part['text'] for part in content)
    return content


class TextPart(Body):
    type: Literal['text']
    text: Text


class ChatMessage(Body):
    role: Literal['system', 'user', 'assistant']
    content: Annotated[Prompt, BeforeValidator(joined, json_schema_input_type=Prompt | list[TextPart])]


class JsonSchema(Body):
    name: Annotated[Text, Field(max_length=1000)]
    description: str | None = None
    schema_: Annotated[dict, Field(alias='schema')]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal['text', 'json_schema']
    json_schema: JsonSchema | None = None


class ChatCompletionBody(Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, description=(
        f'a list of 1 to {MAX_MESSAGES} objects with role (system, user or assistant) and content (a string, or a list '
        'of {"type": "text", "text": string})'))]
    max_tokens: whole(1, MAX_TOKENS) = None
    max_completion_tokens: whole(1, MAX_TOKENS) = None
    logprobs: maybe(bool, 'true or false') = None
    top_logprobs: whole(0, MAX_LOGPROBS) = None
    response_format: Annotated[ResponseFormat | None, Field(
        description='{"type": "text"}, or {"type": "json_schema", "json_schema": {"name": ..., "schema": {"enum": '
                    '[strings]}}}')] = None


class TokenizeBody(Body):
    text: maybe(Text, 'a string', max_length=MAX_CHAT_LENGTH) = None
    prompt: maybe(Text, 'a string', max_length=MAX_CHAT_LENGTH) = None
    add_special_tokens: Annotated[bool, Field(description='true or false')] = True
    model: maybe(str, 'a string', max_length=1000) = None


class DetokenizeBody(Body):
    tokens: Annotated[list[TokenId], Field(max_length=MAX_CHAT_LENGTH, description='a list of token ids')]
    model: maybe(str, 'a string', max_length=1000) = None


# ---------------------------------------------------------------- endpoints


def add_endpoints(app: FastAPI, asking: Asking, texts: Texts, options: Options, models: dict[str, Variant]) -> None:
    """Add the endpoints to an application; models: what they serve, by name."""
    created, write = int(time.time()), Writer(texts)
    bos = list(texts.prompt_work('a', max_new_tokens=0).prompt_ids)[:-len(texts.tokenizer.encode('a'))]

    def model_of(body) -> Variant:
        return find_model(body.model, options, models)

    def logged(request: Request, what: str, content) -> None:
        if options.logging:
            print(f'{request.url.path} {what}\n{content!r}', flush=True)

    @app.post('/v1/completions', responses=REFUSALS)
    async def completions(body: CompletionBody, request: Request):
        variant = model_of(body)
        logged(request, 'is asked', body)
        asked = await asking.apart(Completions, body, texts, options, write)
        return await respond(request, body, asked, variant)

    @app.post('/v1/chat/completions', responses=REFUSALS)
    async def chat_completions(body: ChatCompletionBody, request: Request):
        variant = model_of(body)
        if variant.chat is None:
            raise Refused(400, 'this model has no chat template (--lm_server.chat_template): use /v1/completions',
                          param='messages')
        logged(request, 'is asked', body)
        asked = await asking.apart(Chats, body, texts, options, write, variant.chat)
        return await respond(request, body, asked, variant)

    async def respond(request: Request, body: Sampled, asked: 'Asked', variant: Variant):
        asked.works = variant.works(asked.works)
        if body.stream:
            return await asking.stream(request, asked.works, asked.pieces, asked.first(), asked.last)
        content = asked.whole(await asking.ask(request, asked.works))
        logged(request, 'answers', content)
        return JSONResponse(content)

    @app.get('/v1/models')
    async def list_models():
        return JSONResponse({'object': 'list', 'data': [{
            'id': name, 'object': 'model', 'created': created, 'owned_by': 'pallama',
            'max_model_len': texts.seq_length} for name in models]})

    @app.post('/tokenize', responses=REFUSALS)
    async def tokenize(body: TokenizeBody):
        model_of(body)
        if (body.text is None) == (body.prompt is None):
            raise Refused(400, 'say either text or prompt', param='text')
        text = body.text if body.prompt is None else body.prompt

        ids = (bos if body.add_special_tokens else []) + await asking.apart(texts.tokenizer.encode, text)
        return JSONResponse({'tokens': ids, 'count': len(ids)})

    @app.post('/detokenize', responses=REFUSALS)
    async def detokenize(body: DetokenizeBody):
        model_of(body)
        return JSONResponse({'text': await asking.apart(texts.tokenizer.decode, body.tokens)})


# ---------------------------------------------------------------- tokens in words


class Writer:
    """Writes tokens as texts."""

    def __init__(self, texts: Texts):
        self._tokenizer = texts.tokenizer
        self._before = texts.tokenizer.encode('a')[-1:]
        self._length = len(texts.tokenizer.decode(self._before))
        self.token = functools.lru_cache(maxsize=65_536)(self._token)

    def _token(self, token_id: int) -> str:
        """The text of a token behind another one; token_id:N for one that has none."""
        text = self._tokenizer.decode([*self._before, token_id])[self._length:]
        return f'token_id:{token_id}' if not text or BROKEN in text else text

    def offsets(self, ids: Iterable[int]) -> list[int]:
        """Where the text of each token begins in the text of all."""
        stream, found = TextStream(self._tokenizer), []
        for token_id in ids:
            found.append(len(stream.text))
            stream.add(token_id)
        return found

    def top(self, token: Token) -> dict[str, float]:
        """{text: log-probability} of the likeliest tokens and of the one that stands there."""
        found: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.id, token.logprob)):
            text = self.token(token_id)
            found[text] = max(logprob, found.get(text, logprob))
        return found

    def chat_token(self, token: Token) -> dict:
        def one(token_id: int, logprob: float) -> dict:
            text = self.token(token_id)
            known = None if text == f'token_id:{token_id}' else list(text.encode())
            return {'token': text, 'logprob': logprob, 'bytes': known}

        return {**one(token.id, token.logprob), 'top_logprobs': [one(*other) for other in token.top]}


# ---------------------------------------------------------------- what is asked


class Asked:
    """One request: `works`, and how their events and results become the answer.

    The answers are numbered prompt by prompt, n of each; work i < len(answers) is answer i, then come works that score
    prompts.  Made beside the event loop; raises RequestError and Refused.
    """

    kind = piece_kind = 'text_completion'
    prefix = 'cmpl-'

    def __init__(self, body: Sampled, texts: Texts, options: Options, write: Writer):
        self.body, self.texts, self.options, self.write = body, texts, options, write
        self.n = body.n or 1
        self.head = {'id': self.prefix + secrets.token_hex(12), 'created': int(time.time()),
                     'model': options.model_name if body.model is None else body.model}
        if body.stream_options is not None and not body.stream:
            raise Refused(400, 'stream_options go with stream=true', param='stream_options')
        self.works: list = []

    def generate(self, prompt: str | list[int], max_tokens: int | None, choices: list[str] | None,
                 logprobs: int | None, stop: tuple[str, ...] = ()) -> list[Generate]:
        """Make the works of n answers to a prompt; max_tokens None: as many as fit."""
        body, fields = self.body, {}
        if choices is not None:
            for name in ('stop', 'ignore_eos'):
                if getattr(body, name):
                    raise Refused(400, f'{name} does not go with a choice: the answer is one of the choices',
                                  param=name)
            before = prompt if isinstance(prompt, str) else ''
            fields['choices'] = self.texts.choice_ids(before, choices)
            longest = max(map(len, fields['choices']))
            if max_tokens is not None and max_tokens < longest:
                raise Refused(400, f'the longest choice has {longest} tokens: more than max_tokens', param='max_tokens')
            max_tokens, stop = longest, ()
        work = self.texts.prompt_work(prompt, max_new_tokens=max_tokens or 1, stop=(*body.stops(), *stop),
                                      logprobs=logprobs, ignore_eos=bool(body.ignore_eos),
                                      streamed=bool(body.stream), **fields)
        if max_tokens is None:
            room = self.texts.seq_length - len(work.prompt_ids)
            work = dataclasses.replace(work, max_new_tokens=room)
        return [dataclasses.replace(work, sampling=body.sampling(self.options, k)) for k in range(self.n)]

    def usage(self, results: list) -> dict:
        """Count tokens: each prompt once."""
        answers = [result for result in results if isinstance(result, Generated)]
        prompt, new = sum(self.prompt_lengths), sum(len(answer.token_ids) for answer in answers)
        cached = sum(answer.cached_tokens for answer in answers[::self.n])
        return {'prompt_tokens': prompt, 'completion_tokens': new, 'total_tokens': prompt + new,
                'prompt_tokens_details': {'cached_tokens': cached}}

    def pieces(self, index: int, event: Event) -> list[dict]:
        """Write what is sent for one event of a stream."""
        if isinstance(event, Delta):
            return [self.piece([self.part(index, event)])] if event.text or event.tokens else []
        return [self.piece([self.end(index, event)])]

    def piece(self, choices: list[dict], usage: dict | None = None) -> dict:
        options = self.body.stream_options
        more = {'usage': usage} if options is not None and options.include_usage else {}
        return {**self.head, 'object': self.piece_kind, 'choices': choices, **more}

    def first(self) -> list[dict]:
        return []

    def last(self, results: list) -> list[dict]:
        options = self.body.stream_options
        return [self.piece([], self.usage(results))] if options is not None and options.include_usage else []


class Completions(Asked):
    """A request of /v1/completions."""

    def __init__(self, body: CompletionBody, texts: Texts, options: Options, write: Writer):
        super().__init__(body, texts, options, write)
        if body.best_of not in (None, self.n):
            raise Refused(400, f'best_of must be n, which is {self.n}: no answer is thrown away here', param='best_of')
        given = body.prompt
        alone = isinstance(given, str) or isinstance(given[0], int)
        self.prompts = [given] if alone else given
        most = 16 if body.max_tokens is None else body.max_tokens
        choices = body.structured_outputs and body.structured_outputs.choice
        self.scored = bool(body.echo) and body.logprobs is not None
        if most == 0 and not body.echo:
            raise Refused(400, 'max_tokens=0 asks for nothing: it goes with echo=true', param='max_tokens')
        if self.scored and body.stream:
            raise Refused(400, 'echo with logprobs cannot be streamed', param='stream')
        if most == 0 and (choices is not None or self.n > 1 or body.stream):
            raise Refused(400, 'max_tokens=0 has no answers: leave n, stream and structured_outputs out',
                          param='max_tokens')
        self.ids = [list(texts.prompt_work(prompt, max_new_tokens=0).prompt_ids) for prompt in self.prompts]
        self.prompt_lengths = [len(ids) for ids in self.ids]
        if most > 0:
            for prompt in self.prompts:
                limit = None if choices is not None and body.max_tokens is None else most
                self.works += self.generate(prompt, limit, choices, body.logprobs)
        self.answers = len(self.prompts) * self.n
        self.scores: dict[int, int] = {}  # prompt -> its work
        for place, ids in enumerate(self.ids):
            if self.scored and len(ids) > 1:
                self.scores[place] = len(self.works)
                self.works.append(texts.prompt_score(ids, body.logprobs))
        vocabulary = texts.tokenizer.vocab_size
        if not self.works and any(i >= vocabulary for ids in self.ids for i in ids):
            raise Refused(400, f'token ids must be from 0 to {vocabulary - 1}', param='prompt')

    def echoed(self, index: int) -> str:
        """The prompt before answer `index`, where it is asked for."""
        prompt = self.prompts[index // self.n]
        if not self.body.echo:
            return ''
        return prompt if isinstance(prompt, str) else self.texts.tokenizer.decode(prompt)

    def whole(self, results: list) -> dict:
        """Write the whole answer."""
        return {**self.head, 'object': self.kind, 'usage': self.usage(results),
                'choices': [self.choice(index, results) for index in range(self.answers)]}

    def choice(self, index: int, results: list) -> dict:
        answer = results[index] if self.body.max_tokens != 0 else None
        text = self.echoed(index)
        logprobs, place = None, index // self.n
        if self.body.logprobs is not None:
            tokens: list[Token | None] = []
            if self.scored:
                tokens = [None, *(results[self.scores[place]].texts[0] if place in self.scores else ())]
            begin = self.ids[place][:1] if self.scored else []
            logprobs = self.logprobs(begin, tokens, answer.tokens if answer else [], len(text))
        return {'index': index, 'text': text + (answer.text if answer else ''), 'logprobs': logprobs,
                'finish_reason': answer.finish_reason if answer else 'length'}

    def logprobs(self, begin: list[int], prompt: list[Token | None], answer: list[Token], length: int) -> dict:
        """Write OpenAI's four lists.  begin: the prompt's first token, of which there is no score.

        length: characters of the text before the answer.
        """
        known = [token for token in prompt if token is not None]
        ids, new = [*begin, *(token.id for token in known)], [token.id for token in answer]
        offsets = [*self.write.offsets(ids), *(length + offset for offset in self.write.offsets(new))]
        tokens = [*([None] * len(begin)), *known, *answer]
        return {'tokens': [self.write.token(token_id) for token_id in (*ids, *new)],
                'token_logprobs': [token and token.logprob for token in tokens],
                'top_logprobs': [token and self.write.top(token) for token in tokens], 'text_offset': offsets}

    def first(self) -> list[dict]:
        self.told = [len(self.echoed(index)) for index in range(self.answers)]  # characters, of each answer
        return [self.piece([{'index': index, 'text': self.echoed(index), 'logprobs': None, 'finish_reason': None}])
                for index in range(self.answers) if self.body.echo]

    def part(self, index: int, delta: Delta) -> dict:
        logprobs = self.logprobs([], [], delta.tokens, self.told[index]) if self.body.logprobs is not None else None
        self.told[index] += len(delta.text)
        return {'index': index, 'text': delta.text, 'logprobs': logprobs, 'finish_reason': None}

    def end(self, index: int, answer: Generated) -> dict:
        return {'index': index, 'text': '', 'logprobs': None, 'finish_reason': answer.finish_reason}


class Chats(Asked):
    """A request of /v1/chat/completions."""

    kind, piece_kind, prefix = 'chat.completion', 'chat.completion.chunk', 'chatcmpl-'

    def __init__(self, body: ChatCompletionBody, texts: Texts, options: Options, write: Writer, chat: ChatTemplate):
        super().__init__(body, texts, options, write)
        if None not in (body.max_tokens, body.max_completion_tokens) and (
                body.max_tokens != body.max_completion_tokens):
            raise Refused(400, 'max_tokens and max_completion_tokens differ: say one', param='max_completion_tokens')
        most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused(400, 'top_logprobs go with logprobs=true', param='top_logprobs')
        choices = self.choices()
        prompt = chat.prompt([Message(message.role, message.content) for message in body.messages], texts.tokenizer)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.works = self.generate(prompt, most, choices, logprobs, chat.stop)
        self.prompt_lengths = [len(self.works[0].prompt_ids)]

    def choices(self) -> list[str] | None:
        """List what may come out: of structured_outputs as it is, of response_format in quotation marks."""
        form, outputs = self.body.response_format, self.body.structured_outputs
        if form is None or form.type == 'text':
            if form is not None and form.json_schema is not None:
                raise Refused(400, 'response_format: json_schema goes with type json_schema', param='response_format')
            return outputs and outputs.choice
        if outputs is not None:
            raise Refused(400, 'response_format and structured_outputs both say what comes out: say one',
                          param='response_format')
        schema = form.json_schema.schema_ if form.json_schema else {}
        texts = schema.get('enum')
        fits = set(schema) <= {'enum', 'type'} and schema.get('type', 'string') == 'string'
        if not fits or not isinstance(texts, list) or not 1 <= len(texts) <= MAX_LISTED or not all(
                isinstance(text, str) and len(text) <= MAX_CHOICE_LENGTH for text in texts):
            raise Refused(400, 'response_format: the schema must be {"enum": [strings]} or {"type": "string", "enum": '
                               f'[strings]}}, of at most {MAX_LISTED} strings of at most {MAX_CHOICE_LENGTH} '
                               'characters: no other schema can be honoured', param='response_format')
        return [json.dumps(text, ensure_ascii=any('\ud800' <= c <= '\udfff' for c in text)) for text in texts]

    def whole(self, results: list) -> dict:
        """Write the whole answer."""
        return {**self.head, 'object': self.kind, 'usage': self.usage(results), 'choices': [
            {'index': index, 'message': {'role': 'assistant', 'content': answer.text, 'refusal': None},
             'logprobs': self.logprobs(answer.tokens), 'finish_reason': answer.finish_reason}
            for index, answer in enumerate(results)]}

    def logprobs(self, tokens: list[Token]) -> dict | None:
        if not self.body.logprobs:
            return None
        return {'content': [self.write.chat_token(token) for token in tokens], 'refusal': None}

    def first(self) -> list[dict]:
        return [self.piece([{'index': index, 'delta': {'role': 'assistant', 'content': ''}, 'logprobs': None,
                             'finish_reason': None}]) for index in range(self.n)]

    def part(self, index: int, delta: Delta) -> dict:
        return {'index': index, 'delta': {'content': delta.text}, 'logprobs': self.logprobs(delta.tokens),
                'finish_reason': None}

    def end(self, index: int, answer: Generated) -> dict:
        return {'index': index, 'delta': {}, 'logprobs': None, 'finish_reason': answer.finish_reason}
