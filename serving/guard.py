"""Refuse requests by their sender, key, form, size and slowness, before the endpoints.  After: api.py."""
import asyncio
import hashlib
import hmac
import json
import re

import h11
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

LOOPBACK = ('127.0.0.1', 'localhost', '[::1]')
MAX_DEPTH = 32  # of lists and objects in a body
MAX_HEADER_BYTES = 16_384
MAX_OVER = 8  # times max_body_bytes: so much of a body that is too large is read before it is refused
HEADER_SECONDS = 20.0  # in which the headers of a request must come
OPEN = ('/health', '/ready', '/')  # with /page/...: all that answers without the key


class RequestGuard:
    """Refuses by Host header, API key, Content-Type (application/json, not compressed), size and time of the body.

    max_body_bytes: of one request.  body_seconds: how long its body may take to arrive.
    allowed_hosts: names the Host header may have, without port; None allows all (a server on a network).
    key_digest: sha256 of the API key; None where there is none.  draining() -> whether new requests are turned away.
    """

    def __init__(self, app, max_body_bytes: int, body_seconds: float, allowed_hosts: tuple[str, ...] | None,
                 key_digest: bytes | None = None, draining=lambda: False):
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds
        self.allowed_hosts, self.key_digest, self.draining = allowed_hosts, key_digest, draining

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        headers = {name: value.decode('latin-1') for name, value in scope['headers']}
        refused, body = self._refusal(scope['method'], scope['path'], headers), b''
        if refused is None and scope['method'] == 'POST':
            try:
                body = await asyncio.wait_for(self._body(receive), self.body_seconds)
            except TimeoutError:
                refused = 408, f'the body did not arrive within {self.body_seconds:g} seconds'
            if body is None:
                refused = 413, f'more than {self.max_body_bytes} bytes of body (--lm_server.max_body_bytes)'
        if refused is not None:
            status, message = refused
            more = {'Connection': 'close'} | ({'WWW-Authenticate': 'Bearer'} if status == 401 else {}) | (
                {'Retry-After': '5'} if status == 503 else {})
            code = 'invalid_api_key' if status == 401 else None
            return await refusal(scope['path'], status, message, more, code=code)(scope, receive, send)

        async def replay():
            nonlocal body
            if body is None:
                return await receive()  # from here on only news of a disconnect
            message, body = dict(type='http.request', body=body, more_body=False), None
            return message

        await self.app(scope, replay, send)

    def _refusal(self, method: str, path: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b'host', '').lower()
        name = host.rpartition(':')[0] if host.rpartition(':')[2].isdigit() else host
        if self.allowed_hosts is not None and name not in self.allowed_hosts:
            return 400, f'this server answers only to the host names {", ".join(self.allowed_hosts)}'
        if self.key_digest is not None and not (path in OPEN or path.startswith('/page/')):
            kind, _, key = headers.get(b'authorization', '').partition(' ')
            given = hashlib.sha256(key.strip().encode('latin-1')).digest()
            if not hmac.compare_digest(given, self.key_digest) or kind.lower() != 'bearer':
                return 401, 'send the header Authorization: Bearer KEY with the API key of this server'
        kind = headers.get(b'content-type', '').partition(';')[0].strip().lower()
        if method == 'POST' and self.draining():
            return 503, 'the server is stopping and takes no new requests'
        if method == 'POST' and kind != 'application/json':
            return 415, 'send the header Content-Type: application/json'
        if headers.get(b'content-encoding', 'identity').lower() != 'identity':
            return 415, 'compressed bodies are not accepted'
        return None

    async def _body(self, receive) -> bytes | None:
        """Read the whole body; None if it is larger than allowed.

        What is too much is thrown away as it comes, up to MAX_OVER times what is allowed: a client hears no answer
        while it sends, and loses it where the connection is closed before.
        """
        pieces, size, more = [], 0, True
        while more:
            message = await receive()
            if message['type'] == 'http.disconnect':
                break  # nobody hears the answer
            piece, more = message.get('body', b''), message.get('more_body', False)
            size += len(piece)
            if size <= self.max_body_bytes:
                pieces.append(piece)
            elif size > MAX_OVER * self.max_body_bytes:
                return None
        return b''.join(pieces) if size <= self.max_body_bytes else None


def openai_error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """Write a refusal as OpenAI's API does."""
    kind = 'rate_limit_error' if status == 429 else 'server_error' if status >= 500 else 'invalid_request_error'
    return {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


def refusal(path: str, status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None,
            code: str | None = None) -> JSONResponse:
    """Make the answer that refuses a request: one line, in OpenAI's form below /v1/."""
    content = openai_error(status, message, param, code) if path.startswith('/v1/') else {'detail': message}
    return JSONResponse(content, status, headers)


# ---------------------------------------------------------------- JSON

_NESTING = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)  # a string, an opening or a closing


def parse_json(body: bytes):
    """Parse a body as JSON and nothing more: no NaN, no Infinity, no key twice, not nested deeper than MAX_DEPTH.

    Raises json.JSONDecodeError.
    """
    try:
        text = body.decode('utf-8')
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError('invalid UTF-8', '', error.start) from None
    if text.count('[') + text.count('{') > MAX_DEPTH:
        depth = 0
        for match in _NESTING.finditer(text):
            depth += (match[1] is not None) - (match[2] is not None)
            if depth > MAX_DEPTH:
                raise json.JSONDecodeError(f'nested deeper than {MAX_DEPTH}', text, match.start())

    def no_number(literal: str):
        raise json.JSONDecodeError(f'{literal} is no JSON number', text, text.find(literal))

    def once(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise json.JSONDecodeError('a key stands twice in an object', text, 0)
        return found

    try:
        return json.loads(text, parse_constant=no_number, object_pairs_hook=once)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python's limit of digits
        raise json.JSONDecodeError('a number with too many digits', text, 0) from None


# ---------------------------------------------------------------- the connection


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 that closes a connection whose headers do not come within HEADER_SECONDS."""

    _waiting = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch()

    def data_received(self, data):
        super().data_received(data)
        self._watch()

    def on_response_complete(self):
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc):
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self):
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self):
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
