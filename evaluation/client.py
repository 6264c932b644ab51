"""Put the questions of an evaluation to a running server instead of an engine in this process.

POST /loglikelihood {"prefix_text": [..], "text": [..]} -> {"log_likelihood": [..], "is_greedy": [..]}
POST /generate {"prefix_text": [..], "temperature": 0.0} -> {"output_text": [..]}

These are EasyLM's endpoints, so that its servers can be evaluated as well.  Neighbours: serving/api.py answers them.
"""
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from mistake import Mistake

BUSY = (429, 503)
ATTEMPTS = 6


class Server:
    """Asks the server at `url`.  batch_size: texts in one request.  timeout: seconds for one answer."""

    def __init__(self, url: str, batch_size: int, timeout: float = 600.0):
        if not url.startswith(('http://', 'https://')):
            raise Mistake(f'{url=} must begin with http:// or https://, for example --url=http://127.0.0.1:5007')
        self.url, self.batch_size, self.timeout = url.rstrip('/'), batch_size, timeout

    def loglikelihood(self, prefixes: list[str], texts: list[str],
                      progress: Callable[[int], None] = lambda done: None) -> list[tuple[float, bool]]:
        """Score each text after its prefix, as Engine.loglikelihood: (log-likelihood in nats, is greedy)."""
        found = []
        for i in range(0, len(prefixes), self.batch_size):
            part = slice(i, i + self.batch_size)
            answer = self._post('/loglikelihood', {'prefix_text': prefixes[part], 'text': texts[part]},
                                len(texts[part]), {'log_likelihood': int | float, 'is_greedy': bool})
            found += zip(answer['log_likelihood'], answer['is_greedy'], strict=True)
            progress(len(texts[part]))
        return found

    def generate(self, prompts: list[str], progress: Callable[[int], None] = lambda done: None) -> list[str]:
        """Continue each prompt greedily; the server sets the length."""
        texts = []
        for i in range(0, len(prompts), self.batch_size):
            part = prompts[i:i + self.batch_size]
            texts += self._post('/generate', {'prefix_text': part, 'temperature': 0.0}, len(part),
                                {'output_text': str})['output_text']
            progress(len(part))
        return texts

    def _post(self, path: str, body: dict, count: int, fields: dict[str, type]) -> dict:
        """Ask and return the answer, in which every field is a list of `count` values of its type."""
        text = self._send(path, json.dumps(body).encode())
        try:
            answer = json.loads(text)
        except ValueError:
            raise Mistake(f'url={self.url!r} answered {path} with no JSON: {text[:200]!r}') from None
        for field, kind in fields.items():
            values = answer.get(field) if isinstance(answer, dict) else None
            if not isinstance(values, list) or len(values) != count or not all(isinstance(v, kind) for v in values):
                raise Mistake(f'url={self.url!r} answered {path} without {count} {field!r}: {text[:200]!r}')
        return answer

    def _send(self, path: str, body: bytes) -> bytes:
        """Send a request, again to a busy server after as many seconds as it says; refuse any other refusal."""
        request = urllib.request.Request(self.url + path, body, {'Content-Type': 'application/json'})
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                said = error.read(300).decode('utf-8', 'replace')
                if error.code not in BUSY or attempt == ATTEMPTS - 1:
                    raise Mistake(f'url={self.url!r} refused {path}: {error.code} {error.reason} {said}') from None
                wait = error.headers.get('Retry-After', '')
                time.sleep(min(float(wait) if wait.isdigit() else 2.0 ** attempt, 30.0))
            except OSError as error:
                reason = getattr(error, 'reason', error)
                raise Mistake(f'url={self.url!r} gave no answer to {path}: {reason}; is the server running there '
                                 f'(serve.py), and does it answer within {self.timeout:g} s?') from None
        raise AssertionError('the loop returns or raises')
