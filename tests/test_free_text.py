"""evaluate.py --task=text and evaluation/free_text.py: records to measures, with a fake model and a true engine."""
import json
import pathlib
import runpy
import sys

import jax
import pytest

import evaluate
from evaluate import main
from evaluation.free_text import Answer, Record, measure, read_record, read_records, wrong_text
from evaluation.text_metrics import load_rouge
from model.partition import make_mesh
from program import flags
from program import model as program_model
from program.parse import parse as parse_flags

ROOT = pathlib.Path(__file__).parent.parent
NOTES = [('Note: Celaxil 5mg\nJSON:', ' {"drug": "Celaxil", "dose": "5 mg"}'),
         ('Note: Halanol 2 g\nJSON:', ' {"drug": "Halanol", "dose": "2 g"}'),
         ('Note: Jorifex 5 ml\nJSON:', ' {"drug": "Jorifex", "dose": "5 ml"}')]
SAID = ['{"dose": "5 mg", "drug": "Celaxil"}', '{"drug": "Halanol", "dose": "2g"}', 'Jorifex, 5 ml']


def parse(*arguments):
    return parse_flags(['evaluate.py', '--task=text', *arguments], flags.EVALUATE, '')


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / 'notes.jsonl'
    path.write_text(''.join(json.dumps({'prompt': p, 'completion': c}) + '\n' for p, c in NOTES))
    return path


def test_an_evaluation_holds_every_measure_and_answer(notes, tmp_path, monkeypatch, capsys):
    """The first is right in another order, the second has one wrong dose, the third is no JSON: 3 fields of 4 said and
    of 6 wanted; the worst comes first, though its token F1 is not the lowest by chance."""
    asked = []

    def open_text_server(config, stops):
        def generate(prompts, progress):
            asked.append((prompts, stops, config.max_new_tokens))
            progress(len(prompts))
            return [Answer(SAID[0], True, False), Answer(SAID[1], False, True), Answer(SAID[2], True, False)]
        return generate

    monkeypatch.setattr(evaluate, 'open_text_server', open_text_server)
    main(parse('--url=http://127.0.0.1:5007', f'--input={notes}', f'--output_dir={tmp_path}/out', '--samples=1',
               r'--stop=\n\n,"; "'))
    assert asked == [([prompt for prompt, _ in NOTES], ['\n\n', '; '], 256)]
    found = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
    report, rows = found['results']['text'], found['records']
    value = {name: held['value'] for name, held in report['measures'].items()}
    assert (value['exact_match'], value['json_valid'], value['all_fields']) == pytest.approx((0, 2 / 3, 1 / 3))
    assert (value['field_precision'], value['field_recall'], value['field_f1']) == pytest.approx((3 / 4, 3 / 6, 6 / 10))
    assert value['rouge_l'] == pytest.approx(sum(row['rouge_l'] for row in rows) / 3) and 0 < value['rouge_l'] < 1
    assert all(low <= value[name] <= high for name, held in report['measures'].items()
               for low, high in [held['interval_95']])
    assert report['fields']['drug'] == {'right': 2, 'records': 3,
                                        'interval_95': pytest.approx([0.2077, 0.9385], abs=1e-4)}
    assert (report['worst_first'], report['cut_off'], report['truncated_prompts']) == ([2, 1], 2, 1)
    assert rows[1] | {'token_f1': 0, 'rouge_l': 0} == {
        'prompt': NOTES[1][0], 'completion': NOTES[1][1], 'generated': SAID[1], 'cut_off': False, 'truncated': True,
        'raw_match': False, 'exact_match': False, 'token_f1': 0, 'rouge_l': 0,
        'fields': {'valid': True, 'right': ['drug'], 'wrong': ['dose'], 'missing': [], 'surplus': []}}
    assert found['flags']['task'] == 'text' and len(found['data'][0]['sha256']) == 64
    assert (tmp_path / 'out' / 'fields.png').stat().st_size > 5000
    said = capsys.readouterr().out
    assert 'field_f1    60.00%' in said and 'record 2, token F1' in said and ', no JSON object' in said
    assert 'record 1,' not in said and 'and 1 more that are not right' in said
    assert 'WARNING: 2 answers were cut off at --max_new_tokens' in said
    assert '1 prompts were longer than the server takes' in said
    assert wrong_text(rows[1]) == ', wrong: dose' and wrong_text({}) == ''


def test_texts_that_are_no_json_have_no_fields_and_no_picture(tmp_path, monkeypatch, capsys):
    """Without ROUGE its package is not asked for; the lowest token F1 is listed first."""
    path = tmp_path / 'a.csv'
    path.write_text('prompt,completion\np,one two\nq,one two\nr,one two\n')
    monkeypatch.setitem(sys.modules, 'rouge_score.rouge_scorer', None)
    monkeypatch.setattr(evaluate, 'open_text_server', lambda config, stops: lambda prompts, progress: [
        Answer('One  two'), Answer('one'), Answer('three')])
    main(parse('--url=u', f'--input={path}', f'--output_dir={tmp_path}/out', '--rouge=False'))
    found = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())['results']['text']
    assert {name: held['value'] for name, held in found['measures'].items()} == pytest.approx(
        {'exact_match': 1 / 3, 'raw_match': 0, 'token_f1': (1 + 2 / 3 + 0) / 3})
    assert found['worst_first'] == [2, 1] and not (tmp_path / 'out' / 'fields.png').exists()
    assert 'field' not in capsys.readouterr().out


def test_in_training_the_measures_are_floats_and_nothing_is_printed(capsys):
    """The same figures as evaluate.py has; without JSON and ROUGE the measures of both are left out."""
    records, asked = [Record(*note) for note in NOTES], []
    found = measure(lambda prompts: asked.append(prompts) or SAID, records, load_rouge())
    assert list(found) == ['exact_match', 'token_f1', 'rouge_l', 'json_valid', 'field_f1']
    assert found['field_f1'] == pytest.approx(6 / 10) and all(type(value) is float for value in found.values())
    assert measure(lambda prompts: ['b'], [Record('p', 'B')]) == {'exact_match': 1.0, 'token_f1': 1.0}
    assert asked == [[prompt for prompt, _ in NOTES]] and not capsys.readouterr().out


@pytest.mark.parametrize('line, message', [
    ('{"completion": "a"}', r"notes.jsonl:4: field 'prompt' is missing, the record has 'completion'"),
    ('{"prompt": "a"}', r"notes.jsonl:4: field 'completion' is missing, the record has 'prompt'; task=text needs"),
    ('{"text": "a", "label": 1}', r"notes.jsonl:4: field 'prompt' is missing.*--task=label reads labelled sets"),
    ('{"prompt": "a", "completion": {"b": 1}}', r"notes.jsonl:4: field 'completion' must be text that is not blank"),
    ('{"prompt": "a", "completion": "  "}', r"notes.jsonl:4: field 'completion' must be text that is not blank"),
    ('{"prompt": 7, "completion": "a"}', r"notes.jsonl:4: field 'prompt' must be text"),
    ('{"prompt": "a", ', 'notes.jsonl:4: no valid JSON'),
])
def test_a_record_that_is_none_is_refused_with_its_line(notes, line, message):
    notes.write_text(notes.read_text() + line + '\n')
    with pytest.raises(ValueError, match=message):
        main(parse('--url=u', f'--input={notes}'))


def test_records_of_prepare_data_and_an_empty_file(tmp_path):
    """`answer` is prepare_data.py's name of a completion; a file of blank lines holds nothing to evaluate."""
    assert read_record({'text': 'a b', 'prompt': 'a', 'answer': ' b'}) == Record('a', ' b')
    path = tmp_path / 'empty.jsonl'
    path.write_text('\n\n')
    with pytest.raises(ValueError, match='empty.jsonl.* holds no records: task=text needs'):
        read_records(str(path))


@pytest.mark.parametrize('arguments, message', [
    (('--labels=a,b',), "labels='a,b' is for task=label, and this is task=text: leave --labels out, or set --task=lab"),
    (('--calibrate=True',), 'calibrate=True is for task=label'),
    (('--method=loglikelihood',), "method='loglikelihood' is for task=label"),
    (('--before=x.json',), 'before=.* is for task=label'), (('--text_field=a',), 'text_field=.* is for task=label'),
    (('--task=label', '--stop=a'), "stop='a' is for task=text, and this is task=label"),
    (('--task=label', '--rouge=False'), 'rouge=False is for task=text'),
    (('--stop=a,,b',), "stop='a,,b' holds an empty text"), (('--stop="a',), 'stop=.*write a text with a comma'),
    (('--stop=dose',), "stop='dose' stands in the completion of record 0, .*choose another --stop"),
    (('--sample_size=4',), 'sample_size=4 must be between 0 .all. and 3'),
    (('--input=nowhere',), "input='nowhere' does not exist"),
])
def test_flags_that_cannot_work_are_refused_before_anyone_is_asked(notes, arguments, message):
    """No server runs at this address: asking it would be another error."""
    with pytest.raises(ValueError, match=message):
        main(parse('--url=http://127.0.0.1:1', f'--input={notes}', *arguments))


def engine_flags(golden, notes, output, *more):
    return parse(f'--load_checkpoint=params::{golden}/easylm/streaming_params_trained',
                 f'--load_llama_config=json::{golden}/easylm/model.json', '--batch_size=4',
                 f'--tokenizer.vocab_file={golden}/easylm/tokenizer.model', f'--input={notes}',
                 f'--output_dir={output}', *more)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(program_model, 'keep_compilations', lambda: None)
    monkeypatch.setattr(program_model, 'make_mesh', lambda mesh_dim: make_mesh('1,1,1', jax.devices()[:1]))


def test_a_true_engine_answers_until_a_stop_eos_or_the_limit(golden, tmp_path, one_device):
    """The first would go on with `why o Posive`, the second ends by itself, the third is cut off."""
    first, second = [row['request'] for row in json.loads((golden / 'easylm' / 'serve.json').read_text())
                     if row['request'].get('text', [''])[0] == ' Positive'][0]['prefix_text'][:2]
    path = tmp_path / 'a.jsonl'
    path.write_text(''.join(json.dumps({'prompt': prompt, 'completion': completion}) + '\n' for prompt, completion in (
        (first, ' the script'), (second, 'posive'), ('Sentiment', 'x'))))
    main(engine_flags(golden, path, tmp_path / 'out', '--max_new_tokens=12', '--stop= why,never'))
    found = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
    assert [(row['generated'], row['cut_off']) for row in found['records'][:2]] == [
        ('the script', False), ('Posive', False)]
    assert found['records'][2]['cut_off'] and found['records'][2]['generated'].startswith(']: the script')
    values = {name: held['value'] for name, held in found['results']['text']['measures'].items()}
    assert (values['exact_match'], values['raw_match']) == pytest.approx((2 / 3, 1 / 3))


def test_what_does_not_fit_the_model_is_named(golden, tmp_path, one_device):
    """Before the weights are read: a prompt longer than the model, a completion longer than an answer may be."""
    path = tmp_path / 'a.jsonl'
    path.write_text(json.dumps({'prompt': 'endless ' * 60, 'completion': 'a'}) + '\n')
    with pytest.raises(ValueError, match="prompt 'endless .* tokens, with 9 new ones more than the model's 128: leave"):
        main(engine_flags(golden, path, tmp_path / 'out', '--max_new_tokens=9'))
    path.write_text(json.dumps({'prompt': 'a', 'completion': 'endless ' * 60}) + '\n')
    with pytest.raises(ValueError, match="max_new_tokens=9, but the completion 'endless .* raise --max_new_tokens"):
        main(engine_flags(golden, path, tmp_path / 'out', '--max_new_tokens=9'))


# ---------------------------------------------------------------- the worked example


@pytest.fixture
def make_parts():
    return runpy.run_path(str(ROOT / 'docs' / 'examples' / 'notes.py'))['make_parts']


def test_the_worked_example_asks_for_what_training_did_not_say(make_parts):
    """docs/EXTRACTION.md: 320 and 96 records, whose drug stands in the note; no drug of one part in a note of the
    other, no prompt twice, three fields each, all four values of per_day."""
    parts = make_parts(320, 96, seed=0)
    assert {part: len(records) for part, records in parts.items()} == {'train': 320, 'test': 96}
    answers = {part: [json.loads(record['completion']) for record in records] for part, records in parts.items()}
    drugs = {part: {answer['drug'] for answer in found} for part, found in answers.items()}
    for part, other in (('train', 'test'), ('test', 'train')):
        for record, answer in zip(parts[part], answers[part], strict=True):
            assert list(answer) == ['drug', 'dose', 'per_day'] and answer['drug'] in record['prompt']
            assert answer['dose'].split()[0] in record['prompt'] and record['completion'].startswith(' {')
            assert not any(drug in record['prompt'] for drug in drugs[other])
        assert {answer['per_day'] for answer in answers[part]} == {1, 2, 3, 4}
    assert len({record['prompt'] for records in parts.values() for record in records}) == 416


def test_the_worked_example_is_the_same_every_time(make_parts):
    """By seed; a larger training part leaves the test part as it is."""
    parts = make_parts(320, 96, seed=0)
    assert parts == make_parts(320, 96, seed=0) and parts != make_parts(320, 96, seed=1)
    assert parts['test'] == make_parts(640, 96, seed=0)['test']
    assert parts['test'][0] == {'prompt': 'Note: Rx Halaquat 300mg every 24 hours x 7 days\nJSON:',
                                'completion': ' {"drug": "Halaquat", "dose": "300 mg", "per_day": 1}'}
