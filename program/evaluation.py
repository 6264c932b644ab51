"""Evaluate labels or free texts while training: evaluate.py's own measures, on the weights of the run's state.

Before: serving/texts.py, serving/engine.py, evaluation/accuracy.py.  train.py hands what comes of it to
training/loop.py.
"""
import re
from collections.abc import Callable

from tqdm import tqdm

from data.labelled import Example, Labels, read_labelled, read_prepared
from data.parts import sample
from data.prompt import PromptTemplate
from data.tables import labelled_files
from evaluation import accuracy, free_text
from mistake import Mistake
from model.config import Compute
from model.lora import Lora
from model.partition import check_rows, rows_unit
from model.weights import Llama
from program.model import Model
from program.settings import Evaluation
from serving.engine import Engine
from serving.programs import Programs
from serving.texts import Texts


def read_examples(evaluation: Evaluation, template: PromptTemplate | None, seed: int
                  ) -> tuple[list[Example], PromptTemplate]:
    """Read the labelled set, or its sample, and the template to ask with, as evaluate.py does for the checkpoint.

    template: that of the run's records, or None.  Raises Mistake for a set that was prepared for another one.
    """
    try:
        examples, template = _read(evaluation, template)
        size = evaluation.sample_size
        return (sample(examples, size=size, seed=seed) if size else examples), template
    except Mistake as error:  # what are flags of evaluate.py there are --evaluate.NAME here
        said = re.sub(r'--(input|split|text_field|label_field)\b', r'--evaluate.\1', str(error))
        said = re.sub(r'(?<![\w.-])(input|split|sample_size)(?==)', r'evaluate.\1', said)
        raise Mistake(said.replace(', or set --labels', '')) from None


def _read(evaluation: Evaluation, template: PromptTemplate | None) -> tuple[list[Example], PromptTemplate]:
    files = labelled_files(evaluation.input, evaluation.split)
    prepared = None if evaluation.text_field or evaluation.label_field else read_prepared(files[0])
    if not prepared:
        found = read_labelled(evaluation.input, evaluation.split, evaluation.text_field, evaluation.label_field,
                              template and Labels(template.labels))
        return found.examples, template or PromptTemplate(labels=found.labels)
    examples, stored = prepared
    if template and template != stored:
        raise Mistake(f'input={evaluation.input!r} was prepared for {stored.prompt("..")!r} and the labels '
                      f'{",".join(stored.labels)}, but the run trains {template.prompt("..")!r} and '
                      f'{",".join(template.labels)}: prepare both with one --template and --labels')
    return examples, stored


def open_labelled(evaluation: Evaluation, model: Model, template: PromptTemplate | None, add_bos_token: bool, seed: int,
                  wait_for_all: Callable[[], object], lora: Lora | None = None) -> Callable[[Llama], dict]:
    """Make the function weights -> {label_accuracy, label_f1, label_loss}; nothing is compiled yet.

    label_f1 is the macro F1, label_loss the mean of -log p(label) normalised over the labels (evaluation/accuracy.py).
    The weights are read where they lie, float32 as training has them: no copy is made, and none is kept.  Programs are
    compiled at the first call and kept.  All processes call it together; wait_for_all: as in CompiledStep.
    """
    examples, template = read_examples(evaluation, template, seed)
    encode = model.tokenizer.encode
    answers = accuracy.answer_texts(template, encode, examples[0].text)
    lengths = [add_bos_token + len(encode(template.prompt(example.text))) for example in examples]
    answer = max(len(encode(answer)) for answer in answers)
    texts, programs = room(evaluation, model, [example.text for example in examples], lengths, answer, add_bos_token,
                           template, wait_for_all, lora)

    def measure(params: Llama) -> dict:
        engine = Engine(programs, params, model.tokenizer)

        def loglikelihood(prefixes: list[str], texts_: list[str], progress: Callable[[int], None]):
            question = texts.loglikelihood(prefixes, texts_)
            return question.answer(engine.run(question.works, lambda index: progress(len(question.works[index].texts))))

        with tqdm(total=len(examples), desc='evaluate', unit='text', leave=False, disable=None) as bar:  # on terminals
            predictions = accuracy.score_by_loglikelihood(loglikelihood, examples, template, answers, bar.update)
        report = accuracy.accuracy_report(examples, predictions, template)
        return dict(label_accuracy=report['accuracy'], label_f1=report['macro_f1'], label_loss=report['loss'])

    return measure


def open_texts(evaluation: Evaluation, model: Model, add_bos_token: bool, seed: int,
               wait_for_all: Callable[[], object], lora: Lora | None = None) -> Callable[[Llama], dict]:
    """Make the function weights -> {text_exact_match, text_token_f1, ..}, as `open_labelled` does for labels.

    Answers are greedy, up to evaluate.max_new_tokens; the measures are free_text.measure's (ROUGE-L is left to
    evaluate.py).
    """
    try:
        _, records = free_text.read_records(evaluation.input, evaluation.split)
    except Mistake as error:
        raise Mistake(re.sub(r'(?<![\w.-])(input|task)(?==)', r'evaluate.\1', str(error))) from None
    if evaluation.sample_size:
        records = sample(records, size=evaluation.sample_size, seed=seed, stratified=False)
    free_text.check_room(records, model.tokenizer.encode, evaluation.max_new_tokens, 'evaluate.max_new_tokens')
    prompts = [record.prompt for record in records]
    lengths = [add_bos_token + len(model.tokenizer.encode(prompt)) for prompt in prompts]
    texts, programs = room(evaluation, model, prompts, lengths, evaluation.max_new_tokens, add_bos_token, None,
                           wait_for_all, lora)

    def measure(params: Llama) -> dict:
        engine = Engine(programs, params, model.tokenizer)

        def generate(prompts: list[str]) -> list[str]:
            question = texts.generate(prompts, max_new_tokens=evaluation.max_new_tokens)
            with tqdm(total=len(prompts), desc='evaluate', unit='text', leave=False, disable=None) as bar:
                return [answer.text for answer in
                        question.answer(engine.run(question.works, lambda index: bar.update()))]

        return {f'text_{name}': value for name, value in free_text.measure(generate, records).items()}

    return measure


def room(evaluation: Evaluation, model: Model, called: list[str], lengths: list[int], answer: int, add_bos_token: bool,
         template: PromptTemplate | None, wait_for_all: Callable[[], object], lora: Lora | None
         ) -> tuple[Texts, Programs]:
    """Make what asks and what computes, with room for the longest of prompts of these `lengths` and its answer.

    Raises Mistake, with the words of `called`, where the model has no such room.
    """
    check_rows(evaluation.batch_size, model.mesh, 'evaluate.batch_size')
    longest, most = max(lengths), model.config.max_sequence_length
    if longest + answer > most:
        raise Mistake(f'evaluate.input={evaluation.input!r}: {called[lengths.index(longest)][:60]!r} has {longest} '
                      f'tokens, with {answer} of an answer more than the model\'s {most}: leave it out')
    texts = Texts(model.tokenizer, model.config, input_length=longest, seq_length=longest + answer,
                  add_bos_token=add_bos_token, template=template)
    return texts, Programs(model.config, Compute(model.compute.dtype, model.compute.attention), model.mesh,
                           slots=evaluation.batch_size // rows_unit(model.mesh), length=texts.seq_length,
                           vocabulary=model.tokenizer.vocab_size, answer_tokens=answer, weight_dtype='fp32', lora=lora,
                           wait_for_all=wait_for_all)
