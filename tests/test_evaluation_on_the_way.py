"""Evaluation while training: evaluate.py's figures on the run's own weights, the best kept, early stopping."""
import json
import pathlib
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_device
from test_processes import article
from test_processes import run as run_processes

import evaluate
import train
from checkpoint import native
from data.prompt import PromptTemplate
from data.tokenizer import load_tokenizer
from evaluation import free_text
from mistake import Mistake
from model.config import Compute, LlamaConfig
from model.partition import make_mesh
from model.weights import init_params
from program import evaluation as program_evaluation
from program import flags, parse, settings
from program.model import Model

ROOT = pathlib.Path(__file__).parent.parent
OPTIMIZER = '--optimizer.adamw_optimizer.'


def run(*arguments) -> None:
    train.main(parse.parse(['train.py', *arguments], flags.TRAIN, ''))


@pytest.fixture
def reviews(golden, tmp_path) -> pathlib.Path:
    """20 of the training reviews with their labels."""
    texts = [json.loads(line)['text'] for line in (golden / 'easylm/train_200.jsonl').read_text().splitlines()[:20]]
    parts = [re.fullmatch(r'\[Text\]: (.*)\n\[Sentiment\]: (.*)', text) for text in texts]
    path = tmp_path / 'reviews.jsonl'
    path.write_text(''.join(json.dumps(dict(text=part[1], label=part[2])) + '\n' for part in parts))
    return path


def training(golden, output, reviews, *more) -> list[str]:
    return [*article(golden, output, '--mesh_dim=1,4,2')[1:], f'--evaluate.input={reviews}', '--evaluate.batch_size=8',
            *more]


def metrics(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def of_labels(row: dict) -> list[float]:
    return [row[f'label_{name}'] for name in ('accuracy', 'f1', 'loss')]


@pytest.fixture
def cache_keys():
    """Put back what a profile changes for the whole process: names in the keys of cached programs."""
    yield
    jax.config.update('jax_compilation_cache_include_metadata_in_key', False)


def test_what_is_measured_on_the_way_is_evaluate_py_s_of_the_saved_checkpoint(golden, reviews, tmp_path, cache_keys):
    """On mesh 1,4,2, after a learning rate that moves the labels: accuracy, macro F1 and loss within 1e-6.  The same
    run leaves a profile, whose names are the code's."""
    run(*training(golden, tmp_path / 'run', reviews, '--total_steps=3', '--evaluate_every=2', '--profile_steps=1:3',
                  '--evaluate.sample_size=8', '--keep_best=loss', '--checkpointer.keep=9',
                  OPTIMIZER + 'lr_warmup_steps=0'))
    rows = {row['step'] + 1: of_labels(row) for row in metrics(tmp_path / 'run') if 'label_loss' in row}
    assert sorted(rows) == [2, 3] and rows[2][2] != rows[3][2]
    step = native.latest_step(tmp_path / 'run')
    evaluate.main(parse.parse([
        'evaluate.py', f'--load_checkpoint={tmp_path}/run/step_{step:08d}', f'--input={reviews}', '--sample_size=8',
        '--mesh_dim=1,4,2', f'--output_dir={tmp_path}/out', '--samples=0'], flags.EVALUATE, ''))
    report = json.loads((tmp_path / 'out/evaluation.json').read_text())['results']['loglikelihood']
    assert rows[step] == pytest.approx([report['accuracy'], report['macro_f1'], report['loss']], abs=1e-6)
    profile, = (tmp_path / 'run/profile').rglob('*.xplane.pb')
    content = profile.read_bytes()
    for name in ('/attention/', '/ffn/', '/optimizer/', 'jvp(loss)/', 'transpose(jvp(loss))/'):
        assert name.encode() in content, name


def test_texts_measured_on_the_way_are_evaluate_py_s_of_the_saved_checkpoint(golden, reviews, tmp_path, monkeypatch):
    """Beside adapters, of the same sample; the best by token F1 is kept, nothing but what texts are measured by can be.
    """
    asked, measure = [], free_text.measure
    monkeypatch.setattr(free_text, 'measure', lambda generate, records: asked.append(records) or measure(generate,
                                                                                                         records))
    rows = [json.loads(line) for line in reviews.read_text().splitlines()[:9]]
    records = tmp_path / 'records.jsonl'
    records.write_text(''.join(json.dumps(dict(prompt=f'[Text]: {row["text"]}\n[Sentiment]:',
                                               completion=f' {row["label"]}')) + '\n' for row in rows))
    command = training(golden, tmp_path / 'run', records, '--total_steps=2', '--evaluate_every=1',
                       '--evaluate.task=text', '--evaluate.max_new_tokens=9', '--evaluate.sample_size=6',
                       '--lora.rank=4', OPTIMIZER + 'multiply_by_parameter_scale=False',
                       OPTIMIZER + 'lr_warmup_steps=0')
    run(*command, '--keep_best=token_f1')
    *_, row = metrics(tmp_path / 'run')
    base, = (word for word in command if word.startswith('--load_checkpoint='))
    evaluate.main(parse.parse([
        'evaluate.py', base, *(word for word in command if word.startswith(('--load_llama', '--tokenizer.vocab'))),
        f'--adapter={tmp_path}/run/step_00000002', f'--input={records}', '--task=text', '--max_new_tokens=9',
        '--sample_size=6', '--mesh_dim=1,4,2', f'--output_dir={tmp_path}/out', '--rouge=False', '--batch_size=8'],
        flags.EVALUATE, ''))
    whole = json.loads((tmp_path / 'out/evaluation.json').read_text())
    report = whole['results']['text']['measures']
    assert [one['prompt'] for one in whole['records']] == [record.prompt for record in asked[-1]]
    assert {'exact_match', 'token_f1'} <= set(report)
    for name in ('exact_match', 'token_f1'):
        assert row[f'text_{name}'] == pytest.approx(report[name]['value'], abs=1e-12)
    assert native.Step(tmp_path / 'run').meta['best']['metric'] == 'token_f1'
    with pytest.raises(Mistake, match="keep_best='accuracy' is not measured with evaluate.task=text: choose "
                                      'exact_match, token_f1, field_f1'):
        run(*command, '--keep_best=accuracy')
    with pytest.raises(Mistake, match="evaluate.text_field='text' has no effect with evaluate.task=text"):
        run(*command, '--evaluate.text_field=text')
    with pytest.raises(Mistake, match="evaluate.max_new_tokens=8, but the completion ' Positive' has 9 tokens"):
        run(*command, '--evaluate.max_new_tokens=8', f'--logger.output_dir={tmp_path}/other')


# ---------------------------------------------------------------- the engine


def small_model(golden, mesh=None) -> Model:
    config = LlamaConfig(640, 64, 96, 2, 4, max_sequence_length=128)
    tokenizer = load_tokenizer(golden / 'easylm' / 'tokenizer.model')
    return Model(mesh or one_device(), config, Compute(), tokenizer, None, True)


def evaluation(reviews, **changes) -> settings.Evaluation:
    values = dict(every=Fraction(1), in_epochs=False, input=str(reviews), split='', text_field='', label_field='',
                  sample_size=0, batch_size=4, task='label', max_new_tokens=8, keep_best='', patience=0)
    return settings.Evaluation(**values | changes)


def test_the_weights_are_read_where_they_lie_and_let_go(golden, reviews, monkeypatch):
    """While the engine works, the only new arrays are its cache, though it computes in bfloat16; afterwards there are
    none.  Programs are compiled at the first evaluation; the second reads other weights, the first being donated by
    then."""
    model, made = small_model(golden)._replace(compute=Compute('bf16')), []
    size = lambda: sum(array.nbytes for array in jax.live_arrays())

    class Watched(program_evaluation.Engine):
        def __init__(self, programs, params, tokenizer):
            super().__init__(programs, params, tokenizer)
            cache = sum(x.nbytes for x in jax.tree.leaves(self._cache))
            made.append((programs, params, size() - cache))

    monkeypatch.setattr(program_evaluation, 'Engine', Watched)
    measure = program_evaluation.open_labelled(evaluation(reviews, sample_size=4), model, None, True, 42, lambda: None)
    params = init_params(model.config, model.mesh, 0)
    before = size()
    first = measure(params)
    programs, seen, during = made.pop()
    assert seen is params and before == size() == during
    del seen
    compiled = programs.compilations
    params = jax.jit(lambda params: jax.tree.map(lambda x: 2 * x, params), donate_argnums=0)(params)
    second = measure(params)
    assert made[0][0].compilations == compiled > 0
    assert first['label_loss'] != second['label_loss']


def test_a_set_that_does_not_fit_the_run_is_refused_before_anything_is_compiled(golden, reviews, tmp_path):
    """Another template than the records', labels that it lacks, a text that is too long, rows that the mesh does not
    divide, a sample larger than the set."""
    other = PromptTemplate(prefix='Film: ', suffix='\nVerdict:', labels=('Negative', 'Positive'))
    record = dict(text=other.record('fine', 1))
    (tmp_path / 'set.jsonl').write_text(json.dumps(record) + '\n')
    (tmp_path / 'labels_set.json').write_text(json.dumps(dict(labels=[1], template=other.to_dict())))
    (tmp_path / 'long.jsonl').write_text(json.dumps(dict(text='endless ' * 60, label=1)) + '\n')
    open_ = lambda path, template=None, mesh=None, **changes: program_evaluation.open_labelled(
        evaluation(path, **changes), small_model(golden, mesh), template, True, 42, lambda: None)
    with pytest.raises(ValueError, match=r"set.jsonl' was prepared for 'Film: .* but the run trains '\[Text\]: "):
        open_(tmp_path / 'set.jsonl', PromptTemplate())
    with pytest.raises(ValueError, match="label='Negative' is no label; use 0, 1, bad, false, good, true .prepare"):
        open_(reviews, PromptTemplate(labels=('bad', 'good')))
    with pytest.raises(ValueError, match="'endless endless .* tokens, with 8 of an answer more than the model's 128"):
        open_(tmp_path / 'long.jsonl', PromptTemplate())
    with pytest.raises(ValueError, match='evaluate.batch_size=4 must be divisible by dp.fsdp=8'):
        open_(reviews, mesh=make_mesh('1,8,1'))
    with pytest.raises(ValueError, match='evaluate.sample_size=21 must be between 0 .all. and 20'):
        open_(reviews, sample_size=21)
    with pytest.raises(ValueError, match="evaluate.input='/no/such' does not exist; --evaluate.input must name"):
        open_('/no/such')
    with pytest.raises(ValueError, match="evaluate.split='test' chooses within a directory, evaluate.input="):
        open_(reviews, split='test')
    (tmp_path / 'odd.csv').write_text('a,b,c\n1,2,3\n')
    with pytest.raises(ValueError, match='choose with --evaluate.text_field=NAME and --evaluate.label_field=NAME'):
        open_(tmp_path / 'odd.csv')


# ---------------------------------------------------------------- the best, and when to stop


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations that find {step: accuracy}, and a step that computes nothing: returns that dictionary."""
    found = {}

    def open_measure(run, model, template, dataset, epoch, lora):
        def measure(state, done):
            return dict(label_accuracy=found[done], label_f1=found[done], label_loss=1 - found[done])
        return run.evaluation.every_steps(epoch), measure

    class Step:
        compile_seconds = 0.0

        def __init__(self, *arguments, frozen):
            pass

        def __call__(self, state, batch):
            return state, {name: jnp.float32(1) for name in ('loss', 'accuracy', 'learning_rate', 'gradient_norm',
                                                              'param_norm')}

    monkeypatch.setattr(train, 'open_measure', open_measure)
    monkeypatch.setattr(train, 'CompiledStep', Step)
    return found


def test_the_best_step_stays_over_a_resume_and_patience_ends_the_run(golden, reviews, tmp_path, scripted, capsys):
    """keep=1 and a checkpoint a step: step 2 is the best of 1..3, and of 4 and 5 after the resume, where the third
    evaluation that is no better ends the run.  It is said which is best and how to serve it."""
    arguments = training(golden, tmp_path / 'run', reviews, '--evaluate_every=1', '--keep_best=accuracy',
                         '--patience=3', '--save_model_freq=1', '--save_milestone_freq=0')
    scripted |= {1: 0.5, 2: 0.8, 3: 0.7, 4: 0.8, 5: 0.75}
    run(*arguments, '--total_steps=3')
    assert native.steps(tmp_path / 'run') == [2, 3]
    capsys.readouterr()
    run(*arguments, '--total_steps=9', '--resume=True')
    assert native.steps(tmp_path / 'run') == [2, 5]
    said = capsys.readouterr().out
    for words in ('stopped at step 5 of 9: the last 3 evaluations were no better (patience=3)',
                  f'best by accuracy on {reviews}: step 2, accuracy 80.00%, macro F1 80.00%, loss 0.2000',
                  f'serve the best: python serve.py --load_checkpoint={tmp_path}/run/step_00000002',
                  f'serve the newest: python serve.py --load_checkpoint={tmp_path}/run\n'):
        assert words in said, said
    assert [row.get('label_accuracy') for row in metrics(tmp_path / 'run')] == [0.5, 0.8, 0.7, 0.8, 0.75]
    run(*arguments, '--total_steps=9', '--resume=True')
    assert 'stopped at step 5 already: best by accuracy' in capsys.readouterr().out
    for change, says in (('--keep_best=f1', 'the best by --keep_best=accuracy'),
                         ('--evaluate.sample_size=10', 'the best by --evaluate.sample_size=0')):
        with pytest.raises(ValueError, match=says):
            run(*arguments, '--total_steps=9', '--resume=True', change)


def test_an_evaluation_that_is_better_saves_and_the_end_is_saved_once(golden, reviews, tmp_path, scripted):
    """No --save_model_freq: 1 and 3 are better, 4 is the end and worse; keep=1 leaves the best and the newest.  Then
    the best is the end itself."""
    scripted |= {1: 0.5, 2: 0.4, 3: 0.6, 4: 0.3}
    common = training(golden, tmp_path / 'a', reviews, '--evaluate_every=1', '--keep_best=loss',
                      '--save_milestone_freq=0', '--checkpointer.save_optimizer_state=False')
    run(*common, '--total_steps=4')
    assert native.steps(tmp_path / 'a') == [3, 4]
    run(*common, f'--logger.output_dir={tmp_path}/b', '--total_steps=3')
    assert native.steps(tmp_path / 'b') == [3]
    assert native.Step(tmp_path / 'b').meta['best'] == dict(metric='loss', step=3, waited=0, row=dict(
        label_accuracy=0.6, label_f1=0.6, label_loss=0.4))


def test_half_epochs_of_a_stream(golden, reviews, tmp_path, scripted, capsys):
    """total_steps=0 and epochs=2 are as many batches as two passes fill; evaluations fall on half passes, rounded
    up."""
    scripted |= {step: 0.5 for step in range(100)}
    run(*training(golden, tmp_path / 'run', reviews, '--total_steps=0', '--epochs=2', '--evaluate_every=0.5epoch',
                  '--save_milestone_freq=0', '--checkpointer.save_optimizer_state=False'))
    tokens, length = re.search(r'(\d+) tokens a pass, ([\d.]+) batches an epoch', capsys.readouterr().out).groups()
    epoch = Fraction(int(tokens), 8 * 128)
    assert float(length) == pytest.approx(float(epoch), abs=0.01)
    measured = [row['step'] + 1 for row in metrics(tmp_path / 'run') if 'label_loss' in row]
    assert measured == [-(-epoch * k // 2) for k in range(1, 5)]
    with pytest.raises(ValueError, match='evaluate_every=0.01epoch is less than a step: an epoch has'):
        run(*training(golden, tmp_path / 'other', reviews, '--total_steps=2', '--evaluate_every=0.01epoch'))


@pytest.mark.parametrize('arguments, says', [
    (['--patience=2'], 'patience=2 needs --keep_best'),
    (['--keep_best=f1', '--checkpointer.format=easylm'], "keep_best='f1' needs --checkpointer.format=native"),
])
def test_flags_that_contradict_are_refused_first(arguments, says):
    given = ['train.py', '--evaluate_every=1', '--evaluate.input=x', *arguments]
    with pytest.raises(ValueError, match=says):
        settings.read_run(parse.parse(given, flags.TRAIN, ''))


@pytest.mark.long
def test_two_processes_measure_what_one_does(golden, reviews, tmp_path):
    """2 x 4 devices and 1 x 8: the figures of both evaluations within 1e-5, the best kept by both."""
    flags_of = lambda name: training(golden, tmp_path / name, reviews, '--total_steps=2', '--evaluate_every=1',
                                     '--keep_best=loss', '--log_all_worker=True')
    codes, logs = run_processes(2, 4, ['train.py', *flags_of('two')], tmp_path)
    assert codes == [0, 0], logs
    run(*flags_of('one'))
    files = [tmp_path / 'two/metrics.jsonl', tmp_path / 'two/metrics-1.jsonl', tmp_path / 'one/metrics.jsonl']
    first, second, one = ([of_labels(json.loads(line)) for line in file.read_text().splitlines()] for file in files)
    assert first == second
    np.testing.assert_allclose(first, one, atol=1e-5)
    assert native.steps(tmp_path / 'two') == native.steps(tmp_path / 'one')
