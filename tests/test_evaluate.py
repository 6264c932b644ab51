"""evaluate.py: from the command line to evaluation.json, with a fake model, a true engine, an earlier evaluation."""
import json
import math
from types import SimpleNamespace

import jax
import pytest

import evaluate
import prepare_data
from data.labelled import Example
from data.prompt import PromptTemplate
from evaluate import main
from evaluation import labels
from evaluation.labels import Asked, change_text
from model.partition import make_mesh
from program import flags
from program import model as program_model
from program.parse import parse as parse_flags

REVIEWS = [('a warm and honest film', 1), ('a waste of a fine idea', 0), ('falls apart halfway', 0), ('sparkles', 1)]


def parse(*arguments):
    return parse_flags(['evaluate.py', *arguments], flags.EVALUATE, '')


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / 'reviews.jsonl'
    path.write_text(''.join(json.dumps({'text': text, 'label': label}) + '\n' for text, label in REVIEWS))
    return path


@pytest.fixture
def fake(monkeypatch):
    """A server that calls every review with an `i` in it positive; fake['says'] is what it generates."""
    state = {'says': 'Positive'}

    def loglikelihood(prefixes, texts, progress):
        progress(len(texts))
        return [(0.0 if ('i' in prefix.split('\n')[0]) == ('Positive' in text) else -math.inf, True)
                for prefix, text in zip(prefixes, texts, strict=True)]

    def generate(prompts, tokens, progress):
        progress(len(prompts))
        return [state['says']] * len(prompts)

    monkeypatch.setattr(evaluate, 'open_server', lambda config: Asked(loglikelihood, generate, str.split))
    return state


def run(reviews, output, *more):
    main(parse('--url=http://127.0.0.1:5007', f'--input={reviews}', f'--output_dir={output}', *more))
    return json.loads((output / 'evaluation.json').read_text())


def test_an_evaluation_holds_its_inputs_and_every_review(fake, reviews, tmp_path, capsys):
    """Only 'sparkles' has no i and is positive; 'falls apart halfway' has none and is negative: 2 of 4."""
    found = run(reviews, tmp_path / 'out', '--method=both', '--samples=1')
    by_score, by_text = found['results']['loglikelihood'], found['results']['generate']
    assert (by_score['confusion'], by_score['misclassified']) == ([[1, 1, 0], [1, 1, 0]], [1, 3])
    assert by_text['confusion'] == [[0, 2, 0], [0, 2, 0]]
    assert found['reviews'][3] == {'text': 'sparkles', 'label': 'Positive',
                                   'loglikelihood': {'prediction': 'Negative', 'log_likelihood': [0.0, None]},
                                   'generate': {'prediction': 'Positive', 'text': 'Positive'}}
    assert found['samples'] == [{'text': REVIEWS[0][0], 'label': 'Positive', 'generated': 'Positive'}]
    assert found['data'][0]['file'] == str(reviews) and len(found['data'][0]['sha256']) == 64
    assert found['flags']['url'] == 'http://127.0.0.1:5007' and found['versions']['python']
    assert found['template'] == PromptTemplate().to_dict() and by_score['prompt_tokens'] == 23
    assert (tmp_path / 'out' / 'confusion_matrix.png').stat().st_size > 10_000
    said = capsys.readouterr().out
    assert 'accuracy 50.00%  (2 of 4;' in said and 'Positive, not Negative: sparkles' in said
    assert f'wrote {tmp_path}/out/evaluation.json' in said


def test_an_earlier_evaluation_is_compared_review_by_review(fake, reviews, tmp_path, capsys):
    """The samples are those of the earlier one, and the change is counted per review."""
    fake['says'] = 'I knew\nwhen'
    run(reviews, tmp_path / 'before', '--method=generate', '--samples=2')
    fake['says'] = 'Positive'
    run(reviews, tmp_path / 'after', '--method=generate', f'--before={tmp_path}/before/evaluation.json')
    said = capsys.readouterr().out
    assert 'accuracy 0.00% then, 50.00% now (+50.00 points); 2 became right, 0 became wrong' in said
    assert f'| {REVIEWS[1][0]} | Negative | I knew when | Positive |' in said
    assert said.count('| I knew when |') == 2


def test_the_change_counts_both_directions():
    """b and c were wrong and are right, a the other way round; i was not evaluated before and does not count."""
    before = dict(zip('abcdefgh', [1, 0, 0, 1, 1, 0, 0, 1], strict=True))
    now = dict(zip('abcdefghi', [0, 1, 1, 1, 1, 0, 0, 1, 1], strict=True))
    assert change_text(now, before) == ('the 8 reviews evaluated before: accuracy 50.00% then, 62.50% now '
                                        '(+12.50 points); 2 became right, 1 became wrong')


def test_an_earlier_evaluation_of_other_reviews_is_refused(fake, reviews, tmp_path):
    """Other data, another method, and a file that is no evaluation: each says what to do."""
    run(reviews, tmp_path / 'before')
    before, other = f'--before={tmp_path}/before/evaluation.json', tmp_path / 'other.jsonl'
    other.write_text(reviews.read_text().replace('sparkles', 'sparkled'))
    with pytest.raises(ValueError, match='evaluated reviews that are not among these 4: use the same --input'):
        run(other, tmp_path / 'a', before)
    with pytest.raises(ValueError, match='has results of loglikelihood and none of method generate'):
        run(reviews, tmp_path / 'a', before, '--method=generate')
    with pytest.raises(ValueError, match=r'reviews.jsonl.* is no evaluation.json'):
        run(reviews, tmp_path / 'a', f'--before={reviews}')
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('arguments, message', [
    ((), "url='' and load_checkpoint='': name exactly one"),
    (('--url=http://127.0.0.1:1', '--load_checkpoint=x'), 'name exactly one'),
    (('--url=http://127.0.0.1:1', '--batch_size=0'), 'batch_size=0 must be at least 1'),
    (('--url=http://127.0.0.1:1', '--input=nowhere'), "input='nowhere' does not exist"),
])
def test_flags_that_cannot_work_are_refused_first(arguments, message):
    """Before any model is asked."""
    with pytest.raises(ValueError, match=message):
        main(parse(*arguments))


def test_an_evaluation_is_not_overwritten(fake, reviews, tmp_path):
    """A second run into the same directory is refused."""
    run(reviews, tmp_path / 'out')
    with pytest.raises(ValueError, match='holds an evaluation.json already: choose another --output_dir'):
        run(reviews, tmp_path / 'out')


def test_labels_other_than_the_checkpoints_are_refused(reviews):
    """The template comes from the checkpoint; --labels may repeat it, decides where there is none."""
    stored = PromptTemplate(prefix='Review: ', labels=('bad', 'good'))
    trained = SimpleNamespace(template=stored)
    template = lambda *arguments, source=trained: evaluate.read_input(
        parse(f'--input={reviews}', *arguments), source)[2]
    assert template('--load_checkpoint=x') is stored
    assert template('--load_checkpoint=x', '--labels=bad, good') is stored
    with pytest.raises(ValueError, match="labels='good,bad', but load_checkpoint='x' was trained to answer bad,good"):
        template('--load_checkpoint=x', '--labels=good,bad')
    assert template('--url=u', '--labels=no,yes', source=None) == PromptTemplate(labels=('no', 'yes'))
    assert template('--url=u', source=None) == PromptTemplate()


def test_labels_of_raw_data_are_found_where_nothing_names_them(tmp_path):
    """No checkpoint with a template, no --labels: the labels of the file, with the article's prompt."""
    path = tmp_path / 'a.csv'
    path.write_text('ticket,team\nx,shipping\ny,billing\n')
    files, examples, template = evaluate.read_input(parse('--url=u', f'--input={path}'), None)
    assert (examples, template) == ([('x', 1), ('y', 0)], PromptTemplate(labels=('billing', 'shipping')))


@pytest.fixture
def prepared(tmp_path, reviews):
    """What prepare_data.py writes of the reviews, with a template of their own."""
    prepare_data.main(parse_flags([
        'prepare_data.py', f'--input={reviews}', f'--output={tmp_path / "data"}', '--labels=bad,good',
        '--shuffle=False', r'--template=Film: {text}\nVerdict:'], flags.PREPARE, ''))
    return tmp_path / 'data' / 'reviews.jsonl'


def test_what_prepare_data_wrote_is_evaluated_with_its_labels_and_template(prepared, tmp_path, monkeypatch):
    """The server is asked with the prompts of the records; both files are in evaluation.json."""
    asked = []

    def loglikelihood(prefixes, texts, progress):
        asked.extend(prefixes)
        return [(-float('good' in text), True) for text in texts]

    monkeypatch.setattr(evaluate, 'open_server', lambda config: Asked(
        loglikelihood, lambda prompts, tokens, progress: ['bad'] * len(prompts), None))
    found = run(prepared, tmp_path / 'out')
    assert set(asked) == {f'Film: {text}\nVerdict:' for text, _ in REVIEWS}
    assert [(row['text'], row['label']) for row in found['reviews']] == [(t, ('bad', 'good')[n]) for t, n in REVIEWS]
    report = found['results']['loglikelihood']
    assert report['per_label']['bad'] == {'precision': 0.5, 'recall': 1.0, 'f1': pytest.approx(2 / 3), 'cases': 2}
    assert report['macro_f1'] == pytest.approx(1 / 3) and report['majority_baseline'] == 0.5
    assert [row['file'] for row in found['data']] == [str(prepared), str(prepared.with_name('labels_reviews.json'))]


def test_records_prepared_for_another_template_are_refused(prepared):
    """The checkpoint's prompt, its labels, and --labels must be those of labels_NAME.json."""
    stored = PromptTemplate('Film: ', '\nVerdict:', labels=('bad', 'good'))
    source = SimpleNamespace(template=stored)
    checkpoint = '--load_checkpoint=x', f'--input={prepared}'
    assert evaluate.read_input(parse(*checkpoint, '--labels=bad,good'), source)[2] == stored
    with pytest.raises(ValueError, match=r"labels='a,b', but input=.* was prepared with the labels bad,good"):
        evaluate.read_input(parse('--url=u', f'--input={prepared}', '--labels=a,b'), None)
    for other in (PromptTemplate(labels=stored.labels), PromptTemplate('Film: ', '\nVerdict:', labels=('good', 'bad'))):
        with pytest.raises(ValueError, match=r"prepared for 'Film: ..\\nVerdict:' and the labels bad,good, but load_"):
            evaluate.read_input(parse(*checkpoint), SimpleNamespace(template=other))


def test_a_review_that_both_methods_misread_alike_is_listed_once(fake, reviews, tmp_path, capsys):
    """By score 1 and 3 are wrong, by text 1 and 2: 1 says Positive both times and is listed once."""
    run(reviews, tmp_path / 'out', '--method=both', '--samples=0')
    said = capsys.readouterr().out
    assert '1 misclassified reviews are those above' in said
    assert said.count(f'  Negative, not Positive: {REVIEWS[1][0]}') == 1
    assert said.count(f'  Negative, not Positive: {REVIEWS[2][0]}') == 1 and said.count('not Negative: sparkles') == 1


def test_weights_that_give_no_number_name_the_method(fake, reviews, tmp_path):
    """The engine's FloatingPointError becomes the caller's error."""
    def broken(prefixes, texts, progress):
        raise FloatingPointError('log-likelihood nan is not finite')
    with pytest.raises(ValueError, match="method='loglikelihood': log-likelihood nan is not finite .--load_checkpoint"):
        labels.evaluate(Asked(broken, None, None), [Example('a', 0)], [], PromptTemplate(), ('loglikelihood',), 1, 1)


def engine_flags(golden, reviews, output):
    return parse(f'--load_checkpoint=params::{golden}/easylm/streaming_params_trained',
                 f'--load_llama_config=json::{golden}/easylm/model.json',
                 f'--tokenizer.vocab_file={golden}/easylm/tokenizer.model', f'--input={reviews}',
                 f'--output_dir={output}', '--samples=1', '--sample_tokens=4', '--max_new_tokens=8', '--batch_size=4')


def test_a_true_engine_agrees_with_easylms_server(golden, tmp_path, monkeypatch):
    """The engine gives ' Positive' after a prompt the log-likelihood that EasyLM's server gave it; evaluation.json
    holds those of the answer as training tokenized it, without a second blank, here higher for every review."""
    asked = [row for row in json.loads((golden / 'easylm' / 'serve.json').read_text())
             if row['request'].get('text', [''])[0] == ' Positive'][0]
    prompts, easylm = asked['request']['prefix_text'], asked['response']['log_likelihood']
    texts = [prompt.removeprefix('[Text]: ').removesuffix('\n[Sentiment]:') for prompt in prompts]
    path = tmp_path / 'reviews.jsonl'
    path.write_text(''.join(json.dumps({'text': text, 'label': 1}) + '\n' for text in texts))
    monkeypatch.setattr(program_model, 'keep_compilations', lambda: None)
    monkeypatch.setattr(program_model, 'make_mesh', lambda mesh_dim: make_mesh('1,1,1', jax.devices()[:1]))
    config = engine_flags(golden, path, tmp_path / 'out')
    model = evaluate.open_engine(config, PromptTemplate(), [Example(text, 1) for text in texts])
    found = model.loglikelihood(prompts, [' Positive'] * len(prompts), lambda done: None)
    assert [score for score, _ in found] == pytest.approx(easylm, abs=2e-4)
    monkeypatch.setattr(evaluate, 'open_engine', lambda *arguments: model)
    main(config)
    rows = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())['reviews']
    scores = [row['loglikelihood']['log_likelihood'][1] for row in rows]
    assert scores == pytest.approx([score for score, _ in model.loglikelihood(
        prompts, ['Positive'] * len(prompts), lambda done: None)], abs=1e-5)
    assert all(score > apart for score, apart in zip(scores, easylm, strict=True))


def test_a_review_longer_than_the_model_is_named(golden, tmp_path, monkeypatch):
    """Found before the weights are read."""
    monkeypatch.setattr(program_model, 'keep_compilations', lambda: None)
    path = tmp_path / 'reviews.jsonl'
    path.write_text(json.dumps({'text': 'endless ' * 60, 'label': 1}) + '\n')
    with pytest.raises(ValueError, match="review 'endless endless .* tokens, .* new ones more than the model's 128"):
        main(engine_flags(golden, path, tmp_path / 'out'))
