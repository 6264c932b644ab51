"""The HTTP face of the engine, in the words of EasyLM's server.  Before: engine.py; the program is serve.py.

  POST /generate       {"prefix_text": [str], "temperature": float?}  ->  {"prefix_text", "output_text", "temperature"}
                       and, added to EasyLM's answer, "truncated": [bool], "finish_reason": ["stop" | "length"]
  POST /loglikelihood  {"prefix_text": [str]?, "text": [str]}
                       ->  {"prefix_text", "text", "log_likelihood", "is_greedy"}
  GET  /ready          "Ready!\\n", or 503 while programs compile and after the engine has failed

Every refusal is {"detail": one line}: 400 what is wrong with the request, 408 a body that does not come, 413 too large,
415 not application/json, 429 the line is full, 500 the engine failed.  The form is checked before the engine is asked.
No field of a request is ever a path, an id or code; nothing of a request is logged.  A page of another site cannot use
a server on this computer: its Host header would be no loopback name, and its form cannot send application/json.
"""
import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from serving.engine import EngineFailed, EngineThread, QueueFull, RequestError

MAX_TEXTS = 100_000
MAX_TEMPERATURE = 100.0
LOOPBACK = ('127.0.0.1', 'localhost', '[::1]')
ALLOWED = {  # field -> what it must be, for the client to read
    'prefix_text': f'a list of 1 to {MAX_TEXTS} strings of valid Unicode',
    'text': f'a list of 1 to {MAX_TEXTS} strings of valid Unicode',
    'temperature': f'a finite number from 0 to {MAX_TEMPERATURE:g}, or null for the default',
}


@dataclass(frozen=True)
class Options:
    """allowed_hosts: names the Host header may have, without port; None allows all (a server on a network).

    max_body_bytes: of one request.  body_seconds: how long its body may take to arrive.
    """

    default_temperature: float = 1.0
    max_body_bytes: int = 4_000_000
    body_seconds: float = 30.0
    allowed_hosts: tuple[str, ...] | None = LOOPBACK


def _whole_characters(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and cannot be encoded."""
    if any('\ud800' <= character <= '\udfff' for character in text):
        raise ValueError('half a surrogate pair')
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class GenerateRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra='forbid')

    prefix_text: Texts
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None


class LoglikelihoodRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra='forbid')

    prefix_text: Texts | None = None
    text: Texts


def make_app(thread: EngineThread, options: Options) -> FastAPI:
    """The application; `thread` does the work."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(Guard, options=options)
    app.add_exception_handler(RequestValidationError, _refuse)

    @app.post('/generate')
    async def generate(body: GenerateRequest, request: Request):
        temperature = options.default_temperature if body.temperature is None else body.temperature
        answers = await _result(request, thread, lambda engine: engine.generate(body.prefix_text, temperature))
        return JSONResponse(dict(prefix_text=body.prefix_text, output_text=[answer.text for answer in answers],
                                 temperature=temperature, truncated=[answer.truncated for answer in answers],
                                 finish_reason=[answer.finish_reason for answer in answers]))

    @app.post('/loglikelihood')
    async def loglikelihood(body: LoglikelihoodRequest, request: Request):
        prefixes = [''] * len(body.text) if body.prefix_text is None else body.prefix_text
        if len(prefixes) != len(body.text):
            raise HTTPException(400, f'prefix_text has {len(prefixes)} strings, text {len(body.text)}: they are pairs')
        answers = await _result(request, thread, lambda engine: engine.loglikelihood(prefixes, body.text))
        return JSONResponse(dict(prefix_text=prefixes, text=body.text, log_likelihood=[score for score, _ in answers],
                                 is_greedy=[greedy for _, greedy in answers]))

    @app.get('/ready')
    async def ready():
        if thread.ready:
            return PlainTextResponse('Ready!\n')
        return PlainTextResponse('the engine failed\n' if thread.failure else 'compiling\n', 503)

    return app


async def _result(request: Request, thread: EngineThread, work):
    """What the engine answers, or the HTTPException that says why not.  A client that leaves the line is forgotten."""
    try:
        future = thread.submit(work)
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
    """The first mistake in one line: the field, and what it must be.  The value itself is not repeated."""
    first = error.errors()[0]
    _, *path = first['loc']
    fields = 'prefix_text, temperature' if request.url.path == '/generate' else 'prefix_text, text'
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


class Guard:
    """ASGI middleware: who may ask (Host), in which form (application/json, not compressed), how much, how slowly."""

    def __init__(self, app, options: Options):
        self.app, self.options = app, options

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        headers = {name: value.decode('latin-1') for name, value in scope['headers']}
        refusal, body = self._refusal(scope['method'], headers), b''
        if refusal is None and scope['method'] == 'POST':
            try:
                body = await asyncio.wait_for(self._body(receive), self.options.body_seconds)
            except TimeoutError:
                refusal = 408, f'the body did not arrive within {self.options.body_seconds:g} seconds'
            if body is None:
                refusal = 413, f'more than {self.options.max_body_bytes} bytes of body (--lm_server.max_body_bytes)'
        if refusal is not None:
            status, detail = refusal
            return await JSONResponse({'detail': detail}, status, {'Connection': 'close'})(scope, receive, send)

        async def replay():
            nonlocal body
            if body is None:
                return await receive()  # from here on only news of a disconnect
            message, body = dict(type='http.request', body=body, more_body=False), None
            return message

        await self.app(scope, replay, send)

    def _refusal(self, method: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b'host', '').lower()
        name = host.rpartition(':')[0] if host.rpartition(':')[2].isdigit() else host
        if self.options.allowed_hosts is not None and name not in self.options.allowed_hosts:
            return 400, f'this server answers only to the host names {", ".join(self.options.allowed_hosts)}'
        kind = headers.get(b'content-type', '').partition(';')[0].strip().lower()
        if method == 'POST' and kind != 'application/json':
            return 415, 'send the header Content-Type: application/json'
        if headers.get(b'content-encoding', 'identity').lower() != 'identity':
            return 415, 'compressed bodies are not accepted'
        return None

    async def _body(self, receive) -> bytes | None:
        """The whole body, or None as soon as it is larger than allowed."""
        body, more = b'', True
        while more:
            message = await receive()
            body, more = body + message.get('body', b''), message.get('more_body', False)
            if len(body) > self.options.max_body_bytes:
                return None
        return body
