"""Serve the engine over HTTP, in the words of EasyLM's server.  Before: thread.py, guard.py.

  POST /generate               {"prefix_text": [str], "temperature": float?}
                               -> {"prefix_text", "output_text", "temperature"} + "truncated", "finish_reason"
  POST /greedy-until           {"prefix_text": [str], "until": [str | [str]], "max_length": int?}
                               -> {"prefix_text", "until", "max_length", "output_text"} + "truncated", "finish_reason"
  POST /chat                   {"prompt": str, "context": str?, "temperature": float?}
                               -> {"response", "context", "temperature"} + "truncated", "finish_reason"
  POST /loglikelihood          {"prefix_text": [str]?, "text": [str]}
                               -> {"prefix_text", "text", "log_likelihood", "is_greedy"}
  POST /loglikelihood-rolling  {"text": [str]} -> {"text", "log_likelihood", "is_greedy"}
  GET  /ready                  "Ready!\\n", or 503 while programs compile and after the engine has failed
  GET  /                       page.html, to try the model by hand

The fields behind + are added to EasyLM's answer, for every prompt: whether it was too long (input_length) and lost its
beginning, which in /greedy-until can also happen on the way, as the answer grows; and whether the answer ended by
itself ("stop": EOS or a stop text) or at its limit ("length").
/loglikelihood refuses a pair that is too long, whose score would be that of another text; rolling takes any length.

Every refusal is {"detail": one line}: 400 what is wrong with the request, 408 a body that does not come, 413 too large,
415 not application/json, 429 the line is full, 500 the engine failed.  The form is checked before the engine is asked.
No field of a request is ever a path, an id or code; nothing of a request is printed unless `logging` is set.  A page of
another site cannot use a server on this computer: its Host header would be no loopback name, and its form cannot send
application/json.
"""
import asyncio
import base64
import hashlib
import html
import pprint
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from serving.engine import Generation, RequestError
from serving.guard import LOOPBACK, RequestGuard
from serving.thread import EngineFailed, EngineThread, QueueFull

MAX_TEXTS = 100_000
MAX_TEMPERATURE = 100.0
MAX_STOPS, MAX_STOP_LENGTH = 64, 1_000
MAX_CHAT_LENGTH = 1_000_000
ALLOWED = {  # field -> what it must be, for the client to read
    'prefix_text': f'a list of 1 to {MAX_TEXTS} strings of valid Unicode',
    'text': f'a list of 1 to {MAX_TEXTS} strings of valid Unicode',
    'temperature': f'a finite number from 0 to {MAX_TEMPERATURE:g}, or null for the default',
    'until': f'a list with one item for each prefix_text: a string of 1 to {MAX_STOP_LENGTH} characters of valid '
             f'Unicode, or a list of at most {MAX_STOPS} of them',
    'max_length': 'a whole number of at least 1, or null for the largest',
    'prompt': f'a string of valid Unicode, of at most {MAX_CHAT_LENGTH} characters',
    'context': f'a string of valid Unicode, of at most {MAX_CHAT_LENGTH} characters',
}


@dataclass(frozen=True)
class Options:
    """Holds the lm_server flags: texts put around prefix, text and what is said in a chat; `notes` for the page; ours.

    max_body_bytes, body_seconds, allowed_hosts: see guard.py.
    """

    default_temperature: float = 1.0
    greedy_until_max_length: int = 5000
    prepend_to_prefix: str = ''
    append_to_prefix: str = ''
    prepend_to_text: str = ''
    append_to_text: str = ''
    chat_prepend_text: str = ''
    chat_user_prefix: str = ''
    chat_user_suffix: str = ''
    chat_lm_prefix: str = ''
    chat_lm_suffix: str = ''
    notes: str = ''
    logging: bool = False
    max_body_bytes: int = 4_000_000
    body_seconds: float = 30.0
    allowed_hosts: tuple[str, ...] | None = LOOPBACK


# ---------------------------------------------------------------- requests


def _whole_characters(text: str) -> str:
    """Refuse half a surrogate pair: JSON can spell it, but it is no character and cannot be encoded."""
    if any('\ud800' <= character <= '\udfff' for character in text):
        raise ValueError('half a surrogate pair')
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
ChatText = Annotated[Text, Field(max_length=MAX_CHAT_LENGTH)]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra='forbid')


class GenerateBody(Body):
    prefix_text: Texts
    temperature: Temperature = None


class GreedyUntilBody(Body):
    prefix_text: Texts
    until: Annotated[list[Stop | Stops], Field(min_length=1, max_length=MAX_TEXTS)]
    max_length: Annotated[int, Field(ge=1)] | None = None


class ChatBody(Body):
    prompt: ChatText
    context: ChatText = ''
    temperature: Temperature = None


class LoglikelihoodBody(Body):
    prefix_text: Texts | None = None
    text: Texts


class RollingBody(Body):
    text: Texts


BODIES = {'/generate': GenerateBody, '/greedy-until': GreedyUntilBody, '/chat': ChatBody,
          '/loglikelihood': LoglikelihoodBody, '/loglikelihood-rolling': RollingBody}


# ---------------------------------------------------------------- endpoints


def make_app(thread: EngineThread, options: Options) -> FastAPI:
    """Make the application; `thread` does the work."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(RequestGuard, max_body_bytes=options.max_body_bytes, body_seconds=options.body_seconds,
                       allowed_hosts=options.allowed_hosts)
    app.add_exception_handler(RequestValidationError, _refuse)
    page, policy = page_of(options)

    async def respond(request: Request, body: Body, answer, method: str, **arguments) -> JSONResponse:
        """Call the engine's method; `answer` makes the response out of its result."""
        if options.logging:
            print(f'{request.url.path} is asked\n{pprint.pformat(body.model_dump())}', flush=True)
        content = answer(await _result(request, thread, method, arguments))
        if options.logging:
            print(f'{request.url.path} answers\n{pprint.pformat(content)}', flush=True)
        return JSONResponse(content)

    def temperature_of(body) -> float:
        return options.default_temperature if body.temperature is None else body.temperature

    def prefixes_of(texts: list[str]) -> list[str]:
        return [options.prepend_to_prefix + text + options.append_to_prefix for text in texts]

    def texts_of(texts: list[str]) -> list[str]:
        return [options.prepend_to_text + text + options.append_to_text for text in texts]

    @app.post('/generate')
    async def generate(body: GenerateBody, request: Request):
        temperature, prompts = temperature_of(body), prefixes_of(body.prefix_text)
        return await respond(
            request, body,
            lambda answers: dict(prefix_text=body.prefix_text, output_text=[answer.text for answer in answers],
                                 temperature=temperature, **_added(answers)),
            'generate', prompts=prompts, temperature=temperature)

    @app.post('/greedy-until')
    async def greedy_until(body: GreedyUntilBody, request: Request):
        _check_pairs('prefix_text', body.prefix_text, 'until', body.until)
        most = options.greedy_until_max_length
        max_length = most if body.max_length is None else body.max_length
        if max_length > most:
            raise HTTPException(400, f'max_length must be at most {most} here (--lm_server.greedy_until_max_length)')
        prompts = prefixes_of(body.prefix_text)
        stops = [[stop] if isinstance(stop, str) else stop for stop in body.until]
        return await respond(
            request, body,
            lambda answers: dict(prefix_text=body.prefix_text, until=body.until, max_length=max_length,
                                 output_text=[answer.text for answer in answers], **_added(answers)),
            'greedy_until', prompts=prompts, stops=stops, max_length=max_length)

    @app.post('/chat')
    async def chat(body: ChatBody, request: Request):
        temperature = temperature_of(body)
        context = (body.context + options.chat_user_prefix + body.prompt + options.chat_user_suffix +
                   options.chat_lm_prefix)

        def answer(answers: list[Generation]) -> dict:
            said, = answers
            return dict(response=said.text, context=context + said.text + options.chat_lm_suffix,
                        temperature=temperature, truncated=said.truncated, finish_reason=said.finish_reason)

        return await respond(request, body, answer, 'generate', prompts=[options.chat_prepend_text + context],
                             temperature=temperature)

    @app.post('/loglikelihood')
    async def loglikelihood(body: LoglikelihoodBody, request: Request):
        prefixes = [''] * len(body.text) if body.prefix_text is None else body.prefix_text
        _check_pairs('prefix_text', prefixes, 'text', body.text)
        return await respond(request, body,
                             lambda scores: dict(prefix_text=prefixes, text=body.text, **_scores(scores)),
                             'loglikelihood', prefixes=prefixes_of(prefixes), texts=texts_of(body.text))

    @app.post('/loglikelihood-rolling')
    async def loglikelihood_rolling(body: RollingBody, request: Request):
        return await respond(request, body, lambda scores: dict(text=body.text, **_scores(scores)),
                             'loglikelihood_rolling', texts=texts_of(body.text))

    @app.get('/ready')
    async def ready():
        if thread.ready:
            return PlainTextResponse('Ready!\n')
        return PlainTextResponse('the engine failed\n' if thread.failure else 'compiling\n', 503)

    @app.get('/')
    async def index():
        return HTMLResponse(page, headers={
            'Content-Security-Policy': policy, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer',
            'Cache-Control': 'no-store'})

    return app


def page_of(options: Options) -> tuple[str, str]:
    """Return page.html with the notes as text, and its Content-Security-Policy: own script, own style, this server."""
    page = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
    digests = []
    for tag in ('script', 'style'):
        source = re.search(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL).group(1)
        digests.append(base64.b64encode(hashlib.sha256(source.encode()).digest()).decode())
    policy = (f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}'; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    page = page.replace('[TEMPERATURE]', f'{options.default_temperature:g}')
    return page.replace('[NOTES]', html.escape(options.notes)), policy


def _check_pairs(name: str, values: list, other_name: str, others: list) -> None:
    if len(values) != len(others):
        raise HTTPException(400, f'{name} has {len(values)} items, {other_name} {len(others)}: they are pairs')


def _added(answers: list[Generation]) -> dict:
    return dict(truncated=[answer.truncated for answer in answers],
                finish_reason=[answer.finish_reason for answer in answers])


def _scores(scores: list[tuple[float, bool]]) -> dict:
    return dict(log_likelihood=[score for score, _ in scores], is_greedy=[greedy for _, greedy in scores])


async def _result(request: Request, thread: EngineThread, method: str, arguments: dict):
    """Await the engine's answer, or raise the HTTPException that says why not; forget a client that leaves the line."""
    try:
        future = thread.submit(method, **arguments)
    except QueueFull as error:
        raise HTTPException(429, f'{error}: try again later', {'Retry-After': '1'}) from None
    except EngineFailed:
        raise HTTPException(500, FAILED) from None
    future = asyncio.wrap_future(future)
    gone = asyncio.create_task(_disconnected(request))
    await asyncio.wait([future, gone], return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not future.done():
        future.cancel()
        raise HTTPException(499, 'the client is gone')
    error = future.exception()
    if isinstance(error, RequestError):
        raise HTTPException(400, str(error))
    if isinstance(error, FloatingPointError):
        raise HTTPException(500, str(error))
    if error is not None:
        raise HTTPException(500, FAILED)
    return future.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())['type'] != 'http.disconnect':
        pass


FAILED = "the engine failed and takes no more requests; the server's log says why"


async def _refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    """Name the first mistake in one line: the field, and what it must be; the value itself is not repeated."""
    first = error.errors()[0]
    _, *path = first['loc']
    fields = ', '.join(BODIES[request.url.path].model_fields)
    if first['type'] == 'json_invalid':
        detail = f'the body is not JSON: {first["ctx"]["error"]} at character {first["loc"][1]}'
    elif not path or path[0] not in ALLOWED and first['type'] != 'extra_forbidden':
        detail = f'the body must be a JSON object with the fields {fields}'
    elif first['type'] == 'extra_forbidden':
        detail = f'{str(path[0])[:40]!r} is no field of {request.url.path}: its fields are {fields}'
    else:
        where = path[0] + ''.join(f'[{part}]' for part in path[1:] if isinstance(part, int))
        detail = f'{where}: {first["msg"]}; {path[0]} must be {ALLOWED[path[0]]}'
    return JSONResponse({'detail': detail}, 400)
