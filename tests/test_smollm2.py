"""The quickstart's model, SmolLM2-135M-Instruct Q4_1, against transformers 5.23 on the same dequantised weights."""
import json

import jax
import numpy as np
import pytest
from helpers import Asker

import checkpoint
from checkpoint.formats import gguf
from model.config import MODELS, Compute
from model.partition import make_mesh
from serving.work import Generate


@pytest.fixture(scope='module')
def cases(golden):
    """35 prompts with token ids, log-likelihoods of the two answers, and of five the 20 greedy tokens."""
    return json.loads((golden / 'huggingface/smollm2_135m_q4_1.json').read_text())


@pytest.fixture(scope='module')
def engine(smollm2_gguf):
    spec, mesh = f'gguf::{smollm2_gguf}', make_mesh('1,1,1', jax.devices()[:1])
    source = checkpoint.open(spec)
    params = source.load_params(source.config, mesh)
    return Asker(params, source.config, Compute(attention='reference'), source.tokenizer, mesh, batch_size=8,
                 input_length=64, seq_length=84, add_bos_token=source.add_bos_token)


def test_config_is_the_named_model(smollm2_gguf):
    """The metadata of the published file state the sizes of MODELS['smollm2_135m'], float32 roundings undone."""
    assert gguf.Reader(str(smollm2_gguf)).config == MODELS['smollm2_135m']


def test_tokenizer_gives_the_ids_of_transformers(smollm2_gguf, cases):
    """All 35 prompts and both answers have equal ids, and the prompts survive decoding."""
    tokenizer = checkpoint.open(f'gguf::{smollm2_gguf}').tokenizer
    assert len(cases) == 35
    for case in cases:
        assert tokenizer.encode(case['prompt']) == case['ids'] and tokenizer.decode(case['ids']) == case['prompt']
        for text, ids in case['label_ids'].items():
            assert tokenizer.encode(text) == ids


def test_log_likelihoods_are_those_of_transformers(engine, cases):
    """ln p(' Positive') and ln p(' Negative') after every prompt, within 1e-4."""
    prefixes, texts, expected = zip(*((case['prompt'], text, value) for case in cases
                                      for text, value in case['log_likelihood'].items()), strict=True)
    scores = [score for score, _ in engine.loglikelihood(list(prefixes), list(texts))]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_greedy_tokens_are_those_of_transformers(engine, cases):
    """The 20 tokens after each of five prompts, exactly."""
    cases = [case for case in cases if 'greedy_20' in case]
    answers = engine.generate([case['prompt'] for case in cases], 0.0, 20, ignore_eos=True)
    assert len(cases) == 5 and [answer.token_ids for answer in answers] == [case['greedy_20'] for case in cases]
    for answer in answers:
        # the blank after the prompt is dropped
        assert engine.texts.tokenizer.decode(answer.token_ids) == ' ' + answer.text


@pytest.mark.long
def test_greedy_tokens_of_a_hundred_prompts_are_those_of_transformers(smollm2_gguf, golden):
    """70 reviews, 15 chats, 7 prompts of one token and 8 of more than 300, eight at a time: 20 tokens each, exactly.

    `gap` is how far transformers' second choice stays behind, in logits: never less than 1e-4."""
    cases = json.loads((golden / 'huggingface/smollm2_135m_greedy.json').read_text())
    lengths = [len(case['ids']) for case in cases]
    assert len(cases) == 100 and lengths.count(1) == 7 and sum(length >= 300 for length in lengths) == 8
    assert min(case['gap'] for case in cases) >= 1e-4
    mesh, source = make_mesh('1,1,1', jax.devices()[:1]), checkpoint.open(f'gguf::{smollm2_gguf}')
    engine = Asker(source.load_params(source.config, mesh), source.config, Compute(attention='reference'),
                   source.tokenizer, mesh, batch_size=8, input_length=640, seq_length=660,
                   add_bos_token=source.add_bos_token)
    works = [engine.texts.prompt_work(case['ids'], max_new_tokens=20, ignore_eos=True) for case in cases]
    differ = {i: (list(result.token_ids), case['greedy_20'], case['gap']) for i, (result, case) in enumerate(
        zip(engine.engine.run(works), cases, strict=True)) if list(result.token_ids) != case['greedy_20']}
    assert not differ


def test_load_prefix_and_stream_change_no_bit(engine, cases):
    """Eight greedy answers with log-probabilities, and eight scores: together, alone, streamed, and from slots that
    hold the prompt's beginning already, equal to the bit."""
    prompts = [case['prompt'] for case in cases[:8]]
    works = engine.texts.generate(prompts, max_new_tokens=4, logprobs=2).works
    scores = engine.texts.loglikelihood(prompts, [' Positive'] * 8).works
    engine.engine.prefix_reuse = False
    together, scored = engine.engine.run(works), engine.engine.run(scores)
    assert [engine.engine.run([work])[0] for work in works] == together
    assert [engine.engine.run([work])[0] for work in scores] == scored
    engine.engine.prefix_reuse = True
    for _ in range(2):
        reused = engine.engine.run(scores) + engine.engine.run(works)
    assert sum(result.cached_tokens for result in reused) > 100
    assert [result._replace(cached_tokens=0) for result in reused] == scored + together
    streams = [[] for _ in works]
    engine.engine.submit([Generate(**{**vars(work), 'streamed': True}) for work in works],
                         lambda index, event: streams[index].append(event))
    while not engine.engine.idle:
        engine.engine.tick()
    assert [events[-1]._replace(cached_tokens=0) for events in streams] == together
