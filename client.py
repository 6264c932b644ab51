"""Put the questions of a large file to a running server: the article's curl, with a progress bar, and again where it
stopped.

    python client.py data/eval_test.json
    python client.py data/test.jsonl --method=classify --url=http://127.0.0.1:5007 --parallel=8

It reads what prepare_data.py writes: a request {"prefix_text": [..]}, or records with `prompt` and `text`; the labels
are those of labels_NAME.json beside them, and at the end the accuracy is printed.  Another file of JSON lines must have
`prompt` (or with --method=classify `text`), and may have `label`.

Every answer is appended to --output as it comes, with the number of its question; the first line says which input it
belongs to.  A busy server (429, 503) and a lost connection are waited for.  After Ctrl-C, or when the server is gone
for good, the same command goes on where the file stands.
"""
import fcntl
import hashlib
import json
import os
import queue
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

from data.labelled import read_prepared
from data.prompt import PromptTemplate
from evaluation.accuracy import parse_answer, wilson_interval
from evaluation.client import Server
from mistake import Mistake
from program import flags, parse


class Questions(NamedTuple):
    """texts: what is sent.  labels: the right answers, None where nobody said.  template: of prepared files."""

    texts: list[str]
    labels: list[str] | None
    template: PromptTemplate | None


def main(config) -> None:
    if not config.input:
        raise Mistake("input='' must name a file of questions: python client.py data/eval_test.json")
    path = Path(config.input)
    content = path.read_bytes()
    questions = read_questions(path, content, config.method)
    output = Path(config.output or path.with_name(
        f'{"answers" if config.method == "generate" else "classes"}_{path.stem.removeprefix("eval_")}.jsonl'))
    if output.resolve() == path.resolve():
        raise Mistake(f'output={config.output!r} is the input: name another --output')
    head = {'input': path.name, 'sha256': hashlib.sha256(content).hexdigest(), 'questions': len(questions.texts),
            'method': config.method, 'temperature': config.temperature}
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, 'a', encoding='utf-8') as file:
        lock(file)
        answers = read_answers(output, head)
        before = len(answers)
        if not output.stat().st_size:
            append(file, head)
        ask(file, questions, answers, config)
    if questions.labels:
        print(accuracy_text(questions, answers, config.method))
    print(f'wrote {len(answers) - before} answers to {output}' + (f', {before} were there' if before else ''))


def ask(file: TextIO, questions: Questions, answers: dict[int, dict], config) -> None:
    """Ask what has no answer yet; each goes into `answers` and the file as it comes."""
    total = len(questions.texts)
    key = read_key(config.api_key_file) if config.api_key_file else ''
    with tqdm(total=total, initial=len(answers), desc=config.method, unit='text', smoothing=0.05) as bar:
        server = Server(config.url, config.batch_size, config.timeout, key, config.attempts, patient=True,
                        waits=lambda reason, seconds: bar.write(f'{reason}; again in {seconds:g} s', sys.stderr))
        missing = [number for number in range(total) if number not in answers]
        batches = [missing[i:i + config.batch_size] for i in range(0, len(missing), config.batch_size)]
        try:
            for numbers, found in asked(batches, asker(server, questions, config), config.parallel):
                rows = [{'question': number, **answer} for number, answer in zip(numbers, found, strict=True)]
                append(file, *rows)
                answers |= {row['question']: row for row in rows}
                bar.update(len(rows))
        except (KeyboardInterrupt, Mistake):
            bar.close()
            command = shlex.join(['python', *sys.argv])
            print(f'{len(answers)} of {total} answers are in {file.name}; to go on:\n  {command}', file=sys.stderr)
            raise


# ---------------------------------------------------------------- what is asked


def read_questions(path: Path, content: bytes, method: str) -> Questions:
    """The questions of a file.  Raises Mistake, naming file and line, for what holds none."""
    prepared = read_prepared(path)
    if prepared:
        examples, template = prepared
        texts = [example.text if method == 'classify' else template.prompt(example.text) for example in examples]
        return Questions(texts, [template.labels[example.label] for example in examples], template)
    try:
        text = content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise Mistake(f'{path}: byte {error.start} is no UTF-8') from None
    return _lines(path, text, method) if path.suffix == '.jsonl' else _request(path, text, method)


def _request(path: Path, text: str, method: str) -> Questions:
    """A body of POST /generate; its template and labels stand in labels_NAME.json beside eval_NAME.json."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise Mistake(f'{path}: no JSON ({error}); JSON lines are read from a file NAME.jsonl') from None
    prompts = body.get('prefix_text') if isinstance(body, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise Mistake(f'{path}: must be {{"prefix_text": ["..", ..]}}, as prepare_data.py writes eval_NAME.json')
    notes = path.with_name(f'labels_{path.stem.removeprefix("eval_")}.json')
    if not (path.stem.startswith('eval_') and notes.is_file()):
        if method == 'classify':
            raise Mistake(f'{path}: method={method!r} sends texts, these are prompts, and {notes.name} is not beside '
                          'them to say where the text stands: use NAME.jsonl, or --method=generate')
        return Questions(prompts, None, None)
    try:
        noted = json.loads(notes.read_text(encoding='utf-8'))
        template = PromptTemplate.from_dict(noted['template'], source=str(notes))
        labels = [template.labels[label] for label in noted['labels']]
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise Mistake(f'{notes}: not as prepare_data.py writes it ({error!r})') from None
    texts = [prompt.removeprefix(template.prefix).removesuffix(template.suffix) for prompt in prompts]
    if len(labels) != len(prompts) or [template.prompt(text) for text in texts] != prompts:
        raise Mistake(f'{notes} does not belong to {path}: prepare them again')
    return Questions(texts if method == 'classify' else prompts, labels, template)


def _lines(path: Path, text: str, method: str) -> Questions:
    """Records, one a line."""
    field, texts, labels = 'text' if method == 'classify' else 'prompt', [], []
    for number, line in enumerate(text.split('\n'), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise Mistake(f'{path}:{number}: no JSON ({error})') from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise Mistake(f'{path}:{number}: {method=} needs a text {field!r} in every line, this is {line!r:.80}')
        if method == 'classify' and {'prompt', 'answer'} <= set(row):
            raise Mistake(f'{path}:{number}: a record of prepare_data.py without labels_{path.stem}.json beside it: '
                          'its text holds the answer already')
        texts.append(row[field])
        labels.append(row.get('label'))
    if not texts:
        raise Mistake(f'{path}: no questions in it')
    return Questions(texts, list(map(str, labels)) if None not in labels else None, None)


def read_key(file: str) -> str:
    """The key in a file, without the line's end."""
    key = Path(file).read_text(encoding='utf-8').strip()
    if not key or not key.isascii() or not key.isprintable() or ' ' in key:
        raise Mistake(f'api_key_file={file!r} must hold one key, letters and signs without a blank')
    return key


# ---------------------------------------------------------------- asking


def asker(server: Server, questions: Questions, config) -> Callable[[list[int]], list[dict]]:
    """What asks the questions of a batch, by their numbers."""
    template = questions.template

    def generate(numbers: list[int]) -> list[dict]:
        texts = [questions.texts[number] for number in numbers]
        return [{'output_text': text} for text in server.generate(texts, temperature=config.temperature)]

    def classify(numbers: list[int]) -> list[dict]:
        own = {} if template is None else {'labels': list(template.labels), 'template': template.prompt('{text}')}
        return server.classify([questions.texts[number] for number in numbers], **own)

    return generate if config.method == 'generate' else classify


def asked(batches: list[list[int]], ask: Callable[[list[int]], list[dict]],
          parallel: int) -> Iterator[tuple[list[int], list[dict]]]:
    """(numbers, answers) of each batch as they come, `parallel` of them under way.

    The first error ends it: no batch is begun after it, those under way are still handed out.  The threads are daemons,
    so that Ctrl-C does not wait for answers.
    """
    todo, done, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    for batch in batches:
        todo.put(batch)

    def work() -> None:
        while not stop.is_set():
            try:
                numbers = todo.get_nowait()
            except queue.Empty:
                break
            try:
                done.put((numbers, ask(numbers), None))
            except Exception as error:  # told to the one who waits
                stop.set()
                done.put((numbers, [], error))
        done.put(None)

    threads = min(parallel, len(batches))
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    failure = None
    try:
        while threads:
            item = done.get()
            if item is None:
                threads -= 1
            elif item[2] is not None:
                failure = failure or item[2]
            else:
                yield item[:2]
    finally:
        stop.set()
    if failure:
        raise failure


# ---------------------------------------------------------------- the answers


def read_answers(output: Path, head: dict) -> dict[int, dict]:
    """{number: row} of an unfinished file of answers to the same questions; a last line that was cut off is taken away.

    Raises Mistake for a file of other questions, or of no answers at all.
    """
    if not output.exists() or not output.stat().st_size:
        return {}
    remedy = f'output={str(output)!r}: move it away, or name another --output'
    content = output.read_bytes()
    whole = content[:content.rfind(b'\n') + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.decode('utf-8').splitlines() or ['null']]
    except ValueError:
        raise Mistake(f'{remedy}: it is no file of answers') from None
    if not isinstance(first, dict) or set(first) != set(head):
        raise Mistake(f'{remedy}: it is no file of answers')
    if other := [f'{name} {first[name]!r}, not {value!r}' for name, value in head.items() if first[name] != value]:
        raise Mistake(f'{remedy}: its answers are for {"; ".join(other)}')
    answers = {}
    for line in lines:
        number = line.get('question') if isinstance(line, dict) else None
        if type(number) is not int or not 0 <= number < head['questions'] or number in answers:
            raise Mistake(f'{remedy}: {line!r:.80} is no answer of its own')
        answers[number] = line
    if whole != content:
        os.truncate(output, len(whole))
    return answers


def lock(file: TextIO) -> None:
    """Keep the file from a second client until this one ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Mistake(f'output={file.name!r} is being written by another client.py: wait for it, or name another '
                      '--output') from None


def append(file: TextIO, *rows: dict) -> None:
    file.write(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
    file.flush()


def accuracy_text(questions: Questions, answers: dict[int, dict], method: str) -> str:
    """Accuracy with its 95 % interval; a generated text is read as evaluate.py reads it."""
    names = tuple(questions.template.labels if questions.template else sorted(set(questions.labels)))
    right = none = 0
    for number, label in enumerate(questions.labels):
        if method == 'classify':
            said = answers[number]['label']
        else:
            at = parse_answer(answers[number]['output_text'], names)
            said = names[at] if at < len(names) else None
        right += said == label
        none += said is None
    total = len(questions.labels)
    low, high = wilson_interval(right, total)
    return (f'accuracy {right / total:.2%} ({right} of {total}, 95 % interval {low:.2%} to {high:.2%}), '
            f'{none} without a label')


if __name__ == '__main__':
    if sys.argv[1:] and not sys.argv[1].startswith('-'):
        sys.argv[1] = f'--input={sys.argv[1]}'  # client.py FILE
    parse.run(main, flags.CLIENT)
