"""Refuse requests by their sender, form, size and slowness, before the endpoints: ASGI middleware.  After: api.py."""
import asyncio

from fastapi.responses import JSONResponse

LOOPBACK = ('127.0.0.1', 'localhost', '[::1]')


class RequestGuard:
    """Refuses by Host header, Content-Type (application/json, not compressed), size and time of the body.

    max_body_bytes: of one request.  body_seconds: how long its body may take to arrive.
    allowed_hosts: names the Host header may have, without port; None allows all (a server on a network).
    """

    def __init__(self, app, max_body_bytes: int, body_seconds: float, allowed_hosts: tuple[str, ...] | None):
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds
        self.allowed_hosts = allowed_hosts

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        headers = {name: value.decode('latin-1') for name, value in scope['headers']}
        refusal, body = self._refusal(scope['method'], headers), b''
        if refusal is None and scope['method'] == 'POST':
            try:
                body = await asyncio.wait_for(self._body(receive), self.body_seconds)
            except TimeoutError:
                refusal = 408, f'the body did not arrive within {self.body_seconds:g} seconds'
            if body is None:
                refusal = 413, f'more than {self.max_body_bytes} bytes of body (--lm_server.max_body_bytes)'
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
        if self.allowed_hosts is not None and name not in self.allowed_hosts:
            return 400, f'this server answers only to the host names {", ".join(self.allowed_hosts)}'
        kind = headers.get(b'content-type', '').partition(';')[0].strip().lower()
        if method == 'POST' and kind != 'application/json':
            return 415, 'send the header Content-Type: application/json'
        if headers.get(b'content-encoding', 'identity').lower() != 'identity':
            return 415, 'compressed bodies are not accepted'
        return None

    async def _body(self, receive) -> bytes | None:
        """Read the whole body; None as soon as it is larger than allowed."""
        body, more = b'', True
        while more:
            message = await receive()
            body, more = body + message.get('body', b''), message.get('more_body', False)
            if len(body) > self.max_body_bytes:
                return None
        return body
