r"""Be a model of lm-evaluation-harness: `pallama`, over HTTP or around an engine in this process.

    python -m evaluation.harness run --model pallama --model_args url=http://127.0.0.1:5007 \
        --tasks reviews --include_path tasks

is the harness's own command line with the model registered (pip install lm-eval).  Over HTTP it asks EasyLM's endpoints
/loglikelihood, /loglikelihood-rolling and /greedy-until, so that EasyLM's servers can be evaluated as well; in process
`lm_eval.simple_evaluate(model=Pallama(InProcess(texts, run)), ..)`.  Neighbours: client.py asks, serving/texts.py.
"""
from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from evaluation.client import Server
from mistake import Mistake


class InProcess:
    """Answers as Server does, out of an engine.  texts: a serving.texts.Texts; run(question) -> its answer."""

    def __init__(self, texts: Any, run: Callable[[Any], list]):
        self.texts, self.run = texts, run

    def loglikelihood(self, prefixes: list[str], texts: list[str]) -> list[tuple[float, bool]]:
        return self.run(self.texts.loglikelihood(prefixes, texts))

    def loglikelihood_rolling(self, texts: list[str]) -> list[tuple[float, bool]]:
        return self.run(self.texts.loglikelihood_rolling(texts))

    def greedy_until(self, prompts: list[str], stops: list[list[str]], max_length: int | None) -> list[str]:
        most = self.texts.max_new_tokens if max_length is None else max_length
        return [answer.text for answer in self.run(self.texts.greedy_until(prompts, stops, most))]


@register_model('pallama')
class Pallama(LM):
    """backend: a Server or an InProcess, made from `url` where it is None (--model_args url=..,batch=..)."""

    def __init__(self, backend: Server | InProcess | None = None, url: str = '', batch: int = 32,
                 batch_size: Any = None, device: Any = None, max_batch_size: Any = None):
        super().__init__()
        if batch_size not in (None, 1, '1'):
            batch = int(batch_size)
        self.backend = backend or Server(url, int(batch))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._found(self.backend.loglikelihood, [request.args[0] for request in requests],
                           [request.args[1] for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [nats for nats, _ in self._found(self.backend.loglikelihood_rolling,
                                                [request.args[0] for request in requests])]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedily; a task that samples is refused."""
        groups, answers = {}, {}
        for number, request in enumerate(requests):
            prompt, wanted = request.args
            stops, most = _generation(wanted)
            groups.setdefault(most, []).append((number, prompt, stops))
        for most, members in groups.items():
            numbers, prompts, stops = zip(*members, strict=True)
            answers |= zip(numbers, self.backend.greedy_until(list(prompts), list(stops), most), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _found(self, ask: Callable, *columns: list[str]) -> list[tuple[float, bool]]:
        return ask(*columns) if columns[0] else []


def _generation(wanted: dict) -> tuple[list[str], int | None]:
    """(stop texts, most tokens or None) of a task's generation_kwargs.  Raises Mistake for what is not greedy."""
    wanted = dict(wanted)
    until, most = wanted.pop('until', []), wanted.pop('max_gen_toks', None)
    if wanted.pop('do_sample', False) or wanted.pop('temperature', 0) not in (0, None):
        raise Mistake('generation_kwargs: this model answers greedily: set do_sample: false and temperature: 0')
    if wanted:
        raise Mistake(f'generation_kwargs: {", ".join(wanted)} is not understood: until and max_gen_toks are')
    stops = [until] if isinstance(until, str) else list(until)
    if not stops:
        raise Mistake('generation_kwargs: until is empty: name the text that ends an answer')
    return stops, most


if __name__ == '__main__':
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
