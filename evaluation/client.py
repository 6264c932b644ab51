"""Put the questions of an evaluation to a running server instead of an engine in this process.

POST /loglikelihood {"prefix_text": [..], "text": [..]} -> {"log_likelihood": [..], "is_greedy": [..]}
POST /generate {"prefix_text": [..], "temperature": 0.0} -> {"output_text": [..]}
POST /classify {"texts": [..], "labels": [..], "template": ".."} -> {"results": [{"label": .., "probability": ..}]}

The first two are EasyLM's endpoints, so that its servers can be evaluated as well.  Neighbours: serving/api.py answers
them; client.py and evaluate.py ask.
"""
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from mistake import Mistake

BUSY = (429, 503)
ATTEMPTS = 6


class Server:
    """Asks the server at `url`.  Several threads may ask at once.

    batch_size: texts in one request.  timeout: seconds for one answer.  key: what the server wants to be shown (bearer
    token), '' for none.  attempts: how often a busy server is asked.  patient: a connection that is lost counts as a
    busy server, once the server has answered anything; `waits(reason, seconds)` is told of every pause.
    """

    def __init__(self, url: str, batch_size: int, timeout: float = 600.0, key: str = '', attempts: int = ATTEMPTS,
                 patient: bool = False, waits: Callable[[str, float], None] = lambda reason, seconds: None):
        if not url.startswith(('http://', 'https://')):
            raise Mistake(f'{url=} must begin with http:// or https://, for example --url=http://127.0.0.1:5007')
        self.url, self.batch_size, self.timeout = url.rstrip('/'), batch_size, timeout
        self.attempts, self.patient, self.waits, self.answered = attempts, patient, waits, False
        self.headers = {'Content-Type': 'application/json'} | ({'Authorization': f'Bearer {key}'} if key else {})

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

    def generate(self, prompts: list[str], progress: Callable[[int], None] = lambda done: None,
                 temperature: float = 0.0) -> list[str]:
        """Continue each prompt, greedily at temperature 0; the server sets the length."""
        texts = []
        for i in range(0, len(prompts), self.batch_size):
            part = prompts[i:i + self.batch_size]
            texts += self._post('/generate', {'prefix_text': part, 'temperature': temperature}, len(part),
                                {'output_text': str})['output_text']
            progress(len(part))
        return texts

    def loglikelihood_rolling(self, texts: list[str]) -> list[tuple[float, bool]]:
        """Score every token of each text: (log-likelihood in nats, is greedy)."""
        found = []
        for i in range(0, len(texts), self.batch_size):
            part = texts[i:i + self.batch_size]
            answer = self._post('/loglikelihood-rolling', {'text': part}, len(part),
                                {'log_likelihood': int | float, 'is_greedy': bool})
            found += zip(answer['log_likelihood'], answer['is_greedy'], strict=True)
        return found

    def greedy_until(self, prompts: list[str], stops: list[list[str]], max_length: int | None = None) -> list[str]:
        """Continue each prompt greedily up to one of its stop texts, or for max_length tokens (None: the server's)."""
        return [text for text, _, _ in self.continued(prompts, stops, max_length)]

    def continued(self, prompts: list[str], stops: list[list[str]], max_length: int | None = None,
                  progress: Callable[[int], None] = lambda done: None) -> list[tuple[str, bool | None, bool | None]]:
        """Continue as greedy_until does: (text, whether max_length cut it off, whether the prompt lost its beginning).

        None for what the server does not say (EasyLM's).
        """
        found, most = [], {} if max_length is None else {'max_length': max_length}
        for i in range(0, len(prompts), self.batch_size):
            part = prompts[i:i + self.batch_size]
            said = self._post('/greedy-until', {'prefix_text': part, 'until': stops[i:i + self.batch_size], **most},
                              len(part), {'output_text': str})
            ends = said.get('finish_reason', [None] * len(part))
            found += zip(said['output_text'], [end and end == 'length' for end in ends],
                         said.get('truncated', [None] * len(part)), strict=True)
            progress(len(part))
        return found

    def classify(self, texts: list[str], labels: list[str] | None = None, template: str = '') -> list[dict]:
        """The label of each text: {'label': name or None, 'probability': .., 'probabilities': {name: ..}}.

        Without labels and template (with {text} in it) those of the served model hold.
        """
        found, asked = [], {name: value for name, value in (('labels', labels), ('template', template)) if value}
        for i in range(0, len(texts), self.batch_size):
            part = texts[i:i + self.batch_size]
            results = self._post('/classify', {'texts': part, **asked}, len(part), {'results': dict})['results']
            for result in results:
                if not isinstance(result.get('label', 0), str | None) or not isinstance(
                        result.get('probability'), int | float):
                    raise Mistake(f'url={self.url!r} answered /classify without label and probability: {result!r:.200}')
            found += results
        return found

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
        request = urllib.request.Request(self.url + path, body, self.headers)
        for attempt in range(self.attempts):
            last, wait = attempt == self.attempts - 1, min(2.0 ** attempt, 30.0)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    text = response.read()
                self.answered = True
                return text
            except urllib.error.HTTPError as error:
                self.answered = True
                said = error.read(300).decode('utf-8', 'replace')
                if error.code not in BUSY or last:
                    raise Mistake(f'url={self.url!r} refused {path}: {error.code} {error.reason} {said}') from None
                after = error.headers.get('Retry-After', '')
                wait = min(float(after), 30.0) if after.isdigit() else wait
                self._wait(f'{error.code} {error.reason}', wait)
            except (OSError, http.client.HTTPException) as error:  # IncompleteRead: it went away within an answer
                reason = getattr(error, 'reason', error)
                slow = isinstance(reason, TimeoutError)  # asked again it would only have more to do
                if last or slow or not (self.patient and self.answered):
                    raise Mistake(f'url={self.url!r} gave no answer to {path}: {reason}; is the server running there '
                                  f'(serve.py), and does it answer within {self.timeout:g} s?') from None
                self._wait(f'connection lost: {reason}', wait)
        raise AssertionError('the loop returns or raises')

    def _wait(self, reason: str, seconds: float) -> None:
        self.waits(reason, seconds)
        time.sleep(seconds)
