"""How well a checkpoint, or a running server, labels the reviews of a labelled set, or answers prompts with texts.

    python evaluate.py --load_checkpoint=runs/tuned --input=data/test.jsonl
    python evaluate.py --load_checkpoint=runs/tuned --input=rotten_tomatoes --split=test
    python evaluate.py --load_checkpoint=runs/tuned --input=rotten_tomatoes --split=test --before=base/evaluation.json
    python evaluate.py --url=http://127.0.0.1:5007 --input=reviews.json --method=both
    python evaluate.py --load_checkpoint=runs/tuned --input=notes/test.jsonl --task=text

--task=label prints the accuracy with its 95 % interval, precision, recall and F1 of each label, the confusion matrix,
misclassified reviews and what the model generates for a few reviews; with --before, that beside what it generated then,
and how many reviews changed sides.  Everything is in evaluation.json in --output_dir, the confusion matrix also in
confusion_matrix.png.  A NAME.jsonl that prepare_data.py wrote has its labels and template beside it, in
labels_NAME.json; else the template is the checkpoint's, or the article's with the labels of the data.

--task=text takes records {"prompt": .., "completion": ..} and generates greedily until EOS, --max_new_tokens or a text
of --stop.  It prints exact match, token F1 and ROUGE-L, and where completions are JSON objects how many answers are,
and precision, recall and F1 of their fields, all with 95 % intervals, and the worst answers.  Every answer is in
evaluation.json, a bar for each field in fields.png.
"""
import csv
import datetime
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path

from checkpoint import Source
from checkpoint.adapter import describe_adapter
from data.labelled import Example, Labels, parse_labels, read_labelled, read_prepared
from data.parts import sample
from data.prompt import PromptTemplate
from data.tables import labelled_files
from data.tokenizer import load_tokenizer
from evaluation import accuracy, calibration, free_text, labels, text_metrics
from evaluation.client import Server
from evaluation.free_text import Answer, Record
from evaluation.labels import Asked
from hosts import processes
from hosts.start import failing_together, start_processes
from mistake import Mistake
from model.partition import check_rows
from program import flags, parse, settings
from program.model import Model, describe, open_model, open_source
from serving.engine import Engine, make_engine
from serving.texts import Texts

PACKAGES = ('jax', 'jaxlib', 'numpy', 'sentencepiece', 'tokenizers', 'rouge_score')
OF_TASK = {  # flags that the other task knows nothing of
    'label': ('text_field', 'label_field', 'labels', 'method', 'before', 'calibrate', 'sample_tokens'),
    'text': ('stop', 'rouge'),
}
MAX_NEW_TOKENS = {'label': 8, 'text': 256}  # where --max_new_tokens is not given


@failing_together()
def main(config) -> None:
    output = output_directory(config)
    start_processes(config)
    source = open_source(settings.read_load(config))
    (evaluate_texts if config.task == 'text' else evaluate_labels)(config, source, output)


def evaluate_labels(config, source: Source | None, output: Path) -> None:
    if config.calibrate and not (source and source.native):
        raise Mistake(f'load_checkpoint={config.load_checkpoint!r} cannot keep a temperature: convert it first '
                      '(convert.py --format=native)')
    files, examples, template = read_input(config, source)
    if config.sample_size:
        examples = sample(examples, size=config.sample_size, seed=config.seed)
    before = read_before(config.before, examples, template, methods(config)) if config.before else None
    shown = ([Example(row['text'], template.labels.index(row['label'])) for row in before['samples']] if before
             else examples[:config.samples])
    asked = open_server(config) if config.url else open_engine(config, template, examples + shown, source)
    result = labels.evaluate(asked, examples, shown, template, methods(config), config.max_new_tokens,
                             config.sample_tokens, quiet=processes.index() > 0)
    if processes.index() > 0:
        return  # every process asks the engine, process 0 says what came of it
    labels.print_result(result, before)
    if directory := source and source.native and Path(source.native.path):
        labels.add_calibration(result, examples, calibration.read_temperature(directory), config.calibrate)
    result = write_result(config, output, source, files, {'template': template.to_dict()}, result)
    accuracy.draw_confusion(result['results'], output / 'confusion_matrix.png', subtitle(config, result))
    print(f'wrote {output}/evaluation.json and {output}/confusion_matrix.png')
    if config.calibrate:
        found = result['results']['loglikelihood']['calibration']
        path = calibration.write(directory, {**found, 'date': result['date'], 'data': result['data'],
                                             'reviews': len(examples)})
        print(f'wrote {path}: serve.py uses its temperature')


def evaluate_texts(config, source: Source | None, output: Path) -> None:
    rouge_l, stops = text_metrics.load_rouge() if config.rouge else None, read_stops(config.stop)
    files, records = free_text.read_records(config.input, config.split)
    if config.sample_size:
        records = sample(records, size=config.sample_size, seed=config.seed, stratified=False)
    free_text.check_stops(records, stops)
    generate = open_text_server(config, stops) if config.url else open_text_engine(config, records, stops, source)
    try:
        result = free_text.evaluate(generate, records, rouge_l, config.seed, quiet=processes.index() > 0)
    except FloatingPointError as error:  # the engine's word for weights it cannot compute with
        raise Mistake(f'{error} (--load_checkpoint, --dtype)') from None
    if processes.index() > 0:
        return
    free_text.print_result(result, config.samples)
    result = write_result(config, output, source, files, {}, result)
    report, picture = result['results']['text'], ''
    if report['fields']:
        free_text.draw_fields(report, output / 'fields.png', subtitle(config, result))
        picture = f' and {output}/fields.png'
    print(f'wrote {output}/evaluation.json{picture}')


def write_result(config, output: Path, source: Source | None, files: list[Path], about: dict, result: dict) -> dict:
    """Write evaluation.json: the result, behind what it was made of; returns all of it."""
    result = {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
              'flags': json.loads(config.to_json()),
              'data': [{'file': str(file), 'sha256': hashlib.sha256(file.read_bytes()).hexdigest()} for file in files],
              'adapter': describe_adapter(source) if source and source.adapter else None,
              **about, 'versions': versions(), **result}
    output.mkdir(parents=True, exist_ok=True)
    (output / 'evaluation.json').write_text(
        json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + '\n', encoding='utf-8')
    return result


def subtitle(config, result: dict) -> str:
    """What was evaluated, and when: a line for a picture."""
    named = [config.url or config.load_checkpoint, config.adapter, Path(config.input).name, config.split,
             result['date'][:10]]
    return ' · '.join(filter(None, named))


# ---------------------------------------------------------------- what the flags say


def methods(config) -> tuple[str, ...]:
    return ('loglikelihood', 'generate') if config.method == 'both' else (config.method,)


def output_directory(config) -> Path:
    """Where to write; before any work it refuses flags that cannot go together, and fills in what the task says."""
    if bool(config.url) == bool(config.load_checkpoint):
        raise Mistake(f'url={config.url!r} and load_checkpoint={config.load_checkpoint!r}: name exactly one of them')
    if config.url and config.adapter:
        raise Mistake(f'adapter={config.adapter!r} has no effect on the server of url={config.url!r}: start serve.py '
                      'with it')
    other = 'text' if config.task == 'label' else 'label'
    for flag in flags.EVALUATE:
        if flag.name in OF_TASK[other] and (value := config[flag.name]) != flag.default:
            raise Mistake(f'{flag.name}={value!r} is for task={other}, and this is task={config.task}: leave '
                          f'--{flag.name} out, or set --task={other}')
    if config.task == 'label':
        config.method = config.method or 'loglikelihood'
    config.max_new_tokens = config.max_new_tokens or MAX_NEW_TOKENS[config.task]
    output = Path(config.output_dir or f'runs/evaluation-{datetime.datetime.now():%Y%m%d-%H%M%S}')
    if config.calibrate and (config.url or config.method == 'generate'):
        raise Mistake(f'{config.calibrate=} needs log-likelihoods and a checkpoint to keep the temperature in: use '
                      '--load_checkpoint=DIRECTORY and --method=loglikelihood')
    if (output / 'evaluation.json').exists():
        raise Mistake(f'output_dir={str(output)!r} holds an evaluation.json already: choose another --output_dir')
    return output


def read_input(config, source: Source | None) -> tuple[list[Path], list[Example], PromptTemplate]:
    """Read the files, the examples in them, and the template to ask with.

    The template is the checkpoint's, and what the flag `labels` or the labels_NAME.json of a prepared file say must
    agree with it.  Without a checkpoint that has one it is that of labels_NAME.json, else the article's with the labels
    that are named or stand in the data.
    """
    stored = source and source.template
    named = parse_labels(config.labels) if config.labels else None
    trained = stored and f'load_checkpoint={config.load_checkpoint!r} was trained to answer {",".join(stored.labels)}'
    if stored and named and stored.labels != named.names:
        raise Mistake(f'labels={config.labels!r}, but {trained}: leave --labels out')
    files = labelled_files(config.input, config.split)
    prepared = None if config.text_field or config.label_field else read_prepared(files[0])
    if prepared:
        examples, template = prepared
        if stored and stored != template:
            raise Mistake(f'input={config.input!r} was prepared for {template.prompt("..")!r} and the labels '
                          f'{",".join(template.labels)}, but {trained} to {stored.prompt("..")!r}: prepare it with the '
                          '--template and --labels of the training records')
        if named and named.names != template.labels:
            raise Mistake(f'labels={config.labels!r}, but input={config.input!r} was prepared with the labels '
                          f'{",".join(template.labels)}: leave --labels out')
        return [*files, files[0].with_name(f'labels_{files[0].stem}.json')], examples, template
    found = read_labelled(config.input, config.split, config.text_field, config.label_field,
                          named or (Labels(stored.labels) if stored else None))
    return files, found.examples, stored or PromptTemplate(labels=found.labels)


def read_stops(flag: str) -> list[str]:
    """The texts of --stop: parted by commas, quoted as in CSV where one has a comma, with \\n for a line's end."""
    try:
        stops = [stop.replace('\\n', '\n') for stop in next(csv.reader([flag], strict=True), ())]
    except csv.Error as error:
        raise Mistake(f'stop={flag!r}: {error}; write a text with a comma as "one, two"') from None
    if '' in stops:
        raise Mistake(f'stop={flag!r} holds an empty text: leave it out')
    return stops


def read_before(path: str, examples: list[Example], template: PromptTemplate, wanted: tuple[str, ...]) -> dict:
    """An earlier evaluation.json, which must be of these reviews or a part of them, by one of these methods."""
    try:
        before = json.loads(Path(path).read_text(encoding='utf-8'))
        reviews = {(row['text'], row['label']) for row in before['reviews']}
        known = set(before['results']) & set(wanted)
        unknown = {row['label'] for row in before['samples']} - set(template.labels)
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f'before={path!r} is no evaluation.json of evaluate.py ({error!r})') from None
    if unknown or not reviews <= {(example.text, template.labels[example.label]) for example in examples}:
        raise Mistake(f'before={path!r} evaluated reviews that are not among these {len(examples)}: use the same '
                         '--input and --split, and no smaller --sample_size')
    if not known:
        raise Mistake(f'before={path!r} has results of {", ".join(before["results"])} and none of method '
                         f'{", ".join(wanted)}: choose --method accordingly')
    return before


# ---------------------------------------------------------------- whom to ask


def open_server(config) -> Asked:
    server = Server(config.url, config.batch_size)
    encode = load_tokenizer(config.tokenizer.vocab_file).encode if config.tokenizer.vocab_file else None
    return Asked(server.loglikelihood, lambda prompts, tokens, progress: server.generate(prompts, progress), encode)


def open_engine(config, template: PromptTemplate, examples: list[Example], source: Source | None = None) -> Asked:
    """An engine of the checkpoint with room for the longest of `examples`."""
    model = open_model(settings.read_load(config), settings.read_compute(config), source)
    encode = model.tokenizer.encode
    answer = max(len(encode(template.answer(label))) for label in range(len(template.labels)))
    new = max(config.max_new_tokens, config.sample_tokens, answer)
    texts, engine = start_engine(config, model, [template.prompt(example.text) for example in examples], new, template,
                                 lambda number: f'review {examples[number].text[:60]!r}', '--sample_tokens')

    def loglikelihood(prefixes: list[str], answers: list[str], progress: Callable[[int], None]):
        question = texts.loglikelihood(prefixes, answers)
        return question.answer(engine.run(question.works, lambda index: progress(len(question.works[index].texts))))

    def generate(prompts: list[str], tokens: int, progress: Callable[[int], None]) -> list[str]:
        question = texts.generate(prompts, max_new_tokens=tokens)
        return [answer.text for answer in question.answer(engine.run(question.works, lambda index: progress(1)))]

    return Asked(loglikelihood, generate, encode)


def start_engine(config, model: Model, prompts: list[str], new: int, template: PromptTemplate | None,
                 called: Callable[[int], str], flag: str) -> tuple[Texts, Engine]:
    """An engine with room for the longest of `prompts` and `new` tokens behind it, before its weights are needed.

    Raises Mistake where the model has no such room: it calls the prompt called(number), and names the flag to lower.
    """
    most = model.config.max_sequence_length
    lengths = [len(model.tokenizer.encode(prompt)) + 1 for prompt in prompts]  # and bos
    if max(lengths) + new > most:
        raise Mistake(f'{called(lengths.index(max(lengths)))} has {max(lengths)} tokens, with {new} new ones more than '
                      f'the model\'s {most}: leave it out, or lower {flag}')
    beside = f' and adapter {config.adapter}' if config.adapter else ''
    print(f'{config.load_checkpoint}{beside}: {describe(model)}')
    check_rows(config.batch_size, model.mesh, 'batch_size')
    texts = Texts(model.tokenizer, model.config, input_length=max(lengths), seq_length=max(lengths) + new,
                  add_bos_token=model.add_bos_token, template=template)
    return texts, make_engine(lambda: model.load_params(config.seed), model.config, model.compute, model.mesh,
                              model.tokenizer, batch_size=config.batch_size, length=texts.seq_length,
                              weight_dtype=config.weight_dtype, cache_dtype=config.cache_dtype, seed=config.seed)


# ---------------------------------------------------------------- whom to ask for texts: generate(prompts, progress)


def open_text_server(config, stops: list[str]) -> Callable:
    server = Server(config.url, config.batch_size)

    def generate(prompts: list[str], progress: Callable[[int], None]) -> list[Answer]:
        return [Answer(*said) for said in server.continued(prompts, [stops] * len(prompts), config.max_new_tokens,
                                                           progress)]

    return generate


def open_text_engine(config, records: list[Record], stops: list[str], source: Source | None) -> Callable:
    """An engine with room for the longest prompt.  Raises Mistake for a completion that is longer than an answer."""
    model = open_model(settings.read_load(config), settings.read_compute(config), source)
    free_text.check_room(records, model.tokenizer.encode, config.max_new_tokens, 'max_new_tokens')
    texts, engine = start_engine(config, model, [record.prompt for record in records], config.max_new_tokens, None,
                                 lambda number: f'prompt {records[number].prompt[:60]!r}', '--max_new_tokens')

    def generate(prompts: list[str], progress: Callable[[int], None]) -> list[Answer]:
        question = texts.generate(prompts, stop=tuple(stops))
        answers = question.answer(engine.run(question.works, lambda index: progress(1)))
        return [Answer(answer.text, answer.finish_reason == 'length', answer.truncated) for answer in answers]

    return generate


def versions() -> dict[str, str]:
    found = {dist.metadata['Name']: dist.version for dist in importlib.metadata.distributions()}
    return {'python': platform.python_version(), **{name: found[name] for name in PACKAGES if name in found}}


if __name__ == '__main__':
    parse.run(main, flags.EVALUATE)
