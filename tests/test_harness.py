"""evaluation/harness.py: lm-evaluation-harness runs a local task over HTTP and in process (pip install lm-eval)."""
import json
import math
import sys

import pytest

pytest.importorskip('lm_eval', reason='pip install lm-eval')

from evaluation.client import Server  # noqa: E402
from evaluation.harness import InProcess, Pallama  # noqa: E402
from mistake import Mistake  # noqa: E402
from tests.test_client import served  # noqa: E402,F401

REVIEWS = [('a fine film', 1), ('a poor film', 0), ('fine acting', 1), ('fine, but dull', 0)]


def nats(prefix: str, text: str) -> float:
    """A model that thinks every review with `fine` in it positive."""
    return -0.5 if ('Positive' in text) == ('fine' in prefix) else -2.0


def reply(path, body):
    if path == '/loglikelihood':
        scores = [nats(prefix, text) for prefix, text in zip(body['prefix_text'], body['text'], strict=True)]
    elif path == '/loglikelihood-rolling':
        scores = [-float(len(text)) for text in body['text']]
    else:
        assert path == '/greedy-until' and body['max_length'] == 8 and body['until'] == [['\n']] * len(body['until'])
        return 200, {'output_text': ['Positive' if 'fine' in prompt else 'Negative' for prompt in body['prefix_text']]}
    return 200, {'log_likelihood': scores, 'is_greedy': [False] * len(scores)}


class FakeTexts:
    """Questions that hold their own answer."""

    max_new_tokens = 8

    def loglikelihood(self, prefixes, texts):
        return [(nats(*pair), False) for pair in zip(prefixes, texts, strict=True)]

    def loglikelihood_rolling(self, texts):
        return [(-float(len(text)), False) for text in texts]

    def greedy_until(self, prompts, stops, max_length):
        assert max_length == 8 and stops == [['\n']] * len(prompts)
        return [type('Generated', (), {'text': 'Positive' if 'fine' in prompt else 'Negative'}) for prompt in prompts]


@pytest.fixture
def tasks(tmp_path):
    """A directory with three tasks on the same four reviews; three of four are labelled as the model thinks."""
    data = tmp_path / 'reviews.jsonl'
    data.write_text(''.join(json.dumps({'text': text, 'label': label}) + '\n' for text, label in REVIEWS))
    common = {'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(data)}}, 'test_split': 'test'}
    prompt = '[Text]: {{text}}\n[Sentiment]:'
    kinds = {
        'choose': {'output_type': 'multiple_choice', 'doc_to_text': prompt, 'doc_to_target': 'label',
                   'doc_to_choice': ['Negative', 'Positive'], 'metric_list': [{'metric': 'acc'}]},
        'say': {'output_type': 'generate_until', 'doc_to_text': prompt,
                'doc_to_target': "{{['Negative', 'Positive'][label]}}", 'metric_list': [{'metric': 'exact_match'}],
                'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 8, 'do_sample': False}},
        'read': {'output_type': 'loglikelihood_rolling', 'doc_to_text': '', 'doc_to_target': '{{text}}',
                 'metric_list': [{'metric': 'bits_per_byte'}]}}
    for name, kind in kinds.items():
        (tmp_path / f'{name}.yaml').write_text(json.dumps({'task': f'pallama_{name}', **common, **kind}))
    return tmp_path


def evaluate(tasks, backend):
    import lm_eval
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model=Pallama(backend), task_manager=manager, bootstrap_iters=0,
                                    tasks=['pallama_choose', 'pallama_say', 'pallama_read'])['results']
    return (found['pallama_choose']['acc,none'], found['pallama_say']['exact_match,none'],
            found['pallama_read']['bits_per_byte,none'])


def test_a_local_task_gives_the_same_over_http_and_in_process(tasks, served, monkeypatch):  # noqa: F811
    """Choices by their scores, an answer up to a stop text, and every token of a text; nothing comes from the hub."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tasks / 'cache'))
    url, state = served
    state['reply'] = reply
    over_http = evaluate(tasks, Server(url, 3))
    assert over_http == evaluate(tasks, InProcess(FakeTexts(), lambda question: question))
    assert over_http[:2] == (0.75, 0.75) and math.isclose(over_http[2], 1 / math.log(2))
    assert {path for path, _ in state['asked']} == {'/loglikelihood', '/loglikelihood-rolling', '/greedy-until'}


@pytest.mark.parametrize('wanted, says', [
    ({'until': ['\n'], 'do_sample': True}, 'greedily'), ({'until': ['\n'], 'temperature': 0.7}, 'greedily'),
    ({'until': ['\n'], 'top_p': 0.9}, 'top_p is not understood'), ({'until': []}, 'until is empty')])
def test_what_is_not_greedy_is_refused(wanted, says):
    with pytest.raises(Mistake, match=says):
        Pallama(InProcess(FakeTexts(), lambda question: question)).generate_until(
            [type('Request', (), {'args': ('p', wanted)})])


def test_it_is_registered_under_its_name():
    from lm_eval.api.registry import get_model
    assert get_model('pallama') is Pallama and 'evaluation.harness' in sys.modules
