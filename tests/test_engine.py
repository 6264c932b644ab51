"""Claims about serving/engine.py: answers of EasyLM's server (August 2023), and what must not change an answer.

All engines serve the model that EasyLM's 40-step run saved.  Programs are few and compiled without most optimizations,
so that the file runs in seconds.
"""
import copy
import json
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import checkpoint
from data.tokenizer import load_tokenizer
from model import llama, loss
from model.config import Compute, LlamaConfig, config_from_dict
from model.partition import make_mesh
from serving import beams
from serving import engine as engine_file
from serving.engine import Engine, RequestError, bucket, rolling_windows, score_rows

PROMPTS = ['[Text]: the plot is thin .\n[Sentiment]:', 'a', 'the film', 'one two', '', 'it wastes a fine idea .']


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
    """Few buckets and little optimization, for this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_file, 'SMALLEST_PROMPT', 64)
        jax.config.update('jax_disable_most_optimizations', True)
        yield
        jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def tokenizer(golden):
    return load_tokenizer(golden / 'easylm' / 'tokenizer.model')


@pytest.fixture(scope='module')
def make(golden, tokenizer):
    """Engine of EasyLM's model with other values of the arguments."""
    folder = golden / 'easylm'
    config = config_from_dict(json.loads((folder / 'model.json').read_text()), 'model.json')

    def build(mesh_dim='1,1,1', tokenizer=tokenizer, **values):
        mesh = make_mesh(mesh_dim, jax.devices()[:np.prod([int(n) for n in mesh_dim.split(',')])])
        params = checkpoint.open(f'params::{folder}/streaming_params_trained').load_params(config, mesh)
        values = dict(batch_size=4, input_length=64, seq_length=128) | values
        return Engine(params, config, Compute(), tokenizer, mesh, **values)

    return build


@pytest.fixture(scope='module')
def engine(make, quick_compilation):
    """The engine most tests ask, warmed up: prefill[64], grow[64, 128], decode[128], first, score[64], score[128]."""
    engine = make()
    list(engine.warm_up())
    assert engine.compilations == 6
    return engine


@pytest.fixture(scope='module')
def cases(golden):
    """Requests to EasyLM's server with its answers, by endpoint."""
    cases = json.loads((golden / 'easylm' / 'serve.json').read_text())
    return {path: [case for case in cases if case['path'] == path] for path in {case['path'] for case in cases}}


def tokens(engine, temperature, prompts=PROMPTS, count=12):
    """The tokens of each answer, as if they were the engine's first."""
    engine._requests = 0
    return [answer.token_ids for answer in engine.generate(prompts, temperature, count)]


# ---------------------------------------------------------------- EasyLM's answers


def test_generate_equals_easylm(engine, cases):
    """Temperature 0: EasyLM's texts, to the letter, and each ended by EOS."""
    for case in cases['/generate']:
        answers = engine.generate(case['request']['prefix_text'], 0.0)
        assert [answer.text for answer in answers] == case['response']['output_text']
        assert {answer.finish_reason for answer in answers} == {'stop'}


def test_loglikelihood_equals_easylm(engine, cases):
    """Within 1e-3 nats of EasyLM's, and the same is_greedy; also without a prefix, where asking bos for the first token
    would be off by 4e-3."""
    for case in cases['/loglikelihood']:
        texts, expected = case['request']['text'], case['response']
        prefixes = case['request'].get('prefix_text')
        scores, greedy = zip(*engine.loglikelihood(prefixes or [''] * len(texts), texts), strict=True)
        np.testing.assert_allclose(scores, expected['log_likelihood'], atol=1e-3, rtol=0)
        assert list(greedy) == expected['is_greedy']


def test_loglikelihood_rolling_equals_easylm(engine, cases):
    """Within 1e-3 nats of EasyLM's, and the same is_greedy; one text has 4.1 windows."""
    for case in cases['/loglikelihood-rolling']:
        scores, greedy = zip(*engine.loglikelihood_rolling(case['request']['text']), strict=True)
        np.testing.assert_allclose(scores, case['response']['log_likelihood'], atol=1e-3, rtol=0)
        assert list(greedy) == case['response']['is_greedy']


def test_windows_score_every_token_once_and_the_last_is_full():
    """Ten tokens in windows of four, by hand; what fits into one window begins with bos and is not moved."""
    assert rolling_windows(list(range(10)), 99, 4) == [
        ([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert rolling_windows(list(range(8)), 99, 4) == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7])]
    assert rolling_windows([7], 99, 4) == [([99], [7])] and rolling_windows([], 99, 4) == []


def test_the_first_token_of_a_text_without_prefix_sees_bos_alone(engine, tokenizer):
    """Its probabilities sum to 1; the rest of the text does not see the padding: it is scored as behind bos and it."""
    first_V, text = engine._first_token(), 'the film'
    np.testing.assert_allclose(np.exp(first_V, dtype=np.float64).sum(), 1.0, rtol=1e-5)
    token, *rest = tokenizer.encode(text)
    (score, _), (alone, _) = engine.loglikelihood(['', ''], [text, tokenizer.decode([token])])
    np.testing.assert_allclose(alone, first_V[token], rtol=1e-6)
    (after, _), = engine._score_pairs([([tokenizer.bos_token_id, token], rest)])
    np.testing.assert_allclose(score, first_V[token] + after, rtol=1e-6)
    likeliest = tokenizer.decode([int(first_V.argmax())])
    assert [greedy for _, greedy in engine.loglikelihood(['', ''], [likeliest, tokenizer.decode([token])])] == [
        True, False]


def test_a_text_of_no_tokens_has_likelihood_one(engine):
    """As in EasyLM: the sum over nothing is 0, and nothing contradicts greedy."""
    assert engine.loglikelihood(['a', ''], ['', '']) == [(0.0, True)] * 2
    assert engine.loglikelihood_rolling(['']) == [(0.0, True)]


def test_greedy_until_equals_easylm_up_to_eos(engine, cases):
    """EasyLM writes out </s> and goes on; we end there.  Before it the texts are the same, cut where EasyLM's would be.
    """
    case, = cases['/greedy-until']
    prompts, expected = case['request']['prefix_text'], case['response']['output_text']
    before = [text.split('</s>')[0] for text in expected]
    assert before == ['the script why o Posive', 'Posive']
    answers = engine.greedy_until(prompts, case['request']['until'], 5000)
    assert [(answer.text, answer.finish_reason) for answer in answers] == [(text, 'stop') for text in before]
    for stops in (['o Pos', 'why'], ['y o'], ['v', 'script']):
        for answer, text in zip(engine.greedy_until(prompts, [stops] * 2, 5000), before, strict=True):
            assert answer.text == min((text.split(stop)[0] for stop in stops), key=len)


def test_decoding_equals_the_forward_pass(engine, cases):
    """Each token of a greedy answer, EOS included, is the argmax of a forward without cache; a changed one is not."""
    prompts = cases['/generate'][0]['request']['prefix_text']
    answers = [answer.token_ids + [engine.tokenizer.eos_token_id] for answer in engine.generate(prompts, 0.0)]
    pairs = [(engine._window(engine._encode(prompt, 0))[0], answer)
             for prompt, answer in zip(prompts, answers, strict=True)]
    assert [greedy for _, greedy in engine._score_pairs(pairs)] == [True] * 3
    changed = [(prompt, answer[:-2] + [7, answer[-1]]) for prompt, answer in pairs]
    assert [greedy for _, greedy in engine._score_pairs(changed)] == [False] * 3


def test_answers_of_one_token_share_a_row(engine):
    """Three texts of one token after a prefix are one row, a longer text its own; scores are those asked one by one."""
    pairs = [([1, 20, 30], [40]), ([1, 20, 30], [41]), ([1, 20], [30, 40]), ([1, 20, 30], [42]), ([1, 21], [40])]
    assert [len(row.spans) for row in score_rows(pairs)] == [3, 1, 1]
    together, alone = engine._score_pairs(pairs), [engine._score_pairs([pair])[0] for pair in pairs]
    np.testing.assert_allclose([score for score, _ in together], [score for score, _ in alone], rtol=1e-5)


def test_no_step_runs_after_the_last_row_stopped(engine, cases, monkeypatch):
    """EasyLM's three answers have 10, 6 and 6 tokens: with EOS 11 choices, or 7 without the first, of 64 allowed."""
    steps, run = [], engine._run

    def spy(name, *arguments, static=None):
        state = run(name, *arguments, static=static)
        steps.append((name, int(state.step)))
        return state

    monkeypatch.setattr(engine, '_run', spy)
    prompts = cases['/generate'][0]['request']['prefix_text']
    assert [len(answer.token_ids) for answer in engine.generate(prompts, 0.0)] == [10, 6, 6]
    engine.generate(prompts[1:], 0.0)
    assert steps == [('prefill', 1), ('grow', 1), ('decode', 11), ('prefill', 1), ('grow', 1), ('decode', 7)]


def test_greedy_until_stops_where_the_text_does_and_done_rows_leave(engine, monkeypatch):
    """A stop text is noticed within CHECK_EVERY tokens, however often one looks; the others go on by themselves."""
    prompts, stops = ['it wastes a fine idea .', 'hello', 'a'], [[]] * 3
    full = [answer.text for answer in engine.greedy_until(prompts, stops, 64)]
    stops = [[text[9:12]] for text in full]
    expected = [text.split(stop)[0] for text, (stop,) in zip(full, stops, strict=True)]
    assert all(0 < len(text) < 12 for text in expected)
    steps, run = [], engine._run

    def spy(name, *arguments, static=None):
        state = run(name, *arguments, static=static)
        steps.append(int(state.step))
        return state

    monkeypatch.setattr(engine, '_run', spy)
    for every in (1, 16, 64):
        monkeypatch.setattr(engine_file, 'CHECK_EVERY', every)
        steps.clear()
        answers = engine.greedy_until(prompts, stops, 64)
        assert [(answer.text, answer.finish_reason) for answer in answers] == [(text, 'stop') for text in expected]
        assert max(steps) <= 12 + every


# ---------------------------------------------------------------- against a plain computation


@pytest.fixture(scope='module')
def log_probs(engine):
    """log p of the token after each of at most four rows, float64, by the whole network without a cache."""
    def forward(params, tokens_BT):
        h_BTM, _ = llama.hidden_states(params, tokens_BT, jnp.ones_like(tokens_BT), engine.config, engine.compute)
        return jax.nn.log_softmax(loss.logits(params, h_BTM))

    program = helpers.on_mesh(forward, engine.config, engine.mesh, PartitionSpec(('dp', 'fsdp'), None, 'mp'))

    def after(rows):
        tokens_BT = np.zeros((4, 96), np.int32)
        for row, ids in enumerate(rows):
            tokens_BT[row, :len(ids)] = ids
        found_BTV = np.asarray(program(engine._params, tokens_BT), np.float64)
        return [found_BTV[row, len(ids) - 1] for row, ids in enumerate(rows)]

    return after


def test_greedy_until_goes_on_in_windows(make, tokenizer, log_probs, monkeypatch):
    """20 tokens by eights, each window behind bos and the last 15 tokens of prompt and answer: the argmaxes of the
    network.  Rows whose window is not the last are asked again; `truncated` is true for what lost a token on the way.
    """
    few = copy.copy(tokenizer)
    few.vocab_size, few.eos_token_id = 600, 3  # an EOS that never comes
    engine = make(tokenizer=few, input_length=16, seq_length=24, batch_size=2)
    batches, run = [], engine._generate_batch
    monkeypatch.setattr(engine, '_generate_batch', lambda prompts, *more: batches.append(len(prompts)) or run(
        prompts, *more))
    prompts, bos = ['it wastes a fine idea .', 'a', 'the film'], tokenizer.bos_token_id
    answers = engine.greedy_until(prompts, [[], [], []], 20)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, expected = tokenizer.encode(prompt), []
        for step in range(20):
            if step % 8 == 0:
                window = [bos, *(ids + expected)[-15:]]
            expected.append(int(log_probs([window])[0][:600].argmax()))
            window.append(expected[-1])
        assert (answer.token_ids, answer.finish_reason, answer.truncated) == (expected, 'length', True)
    assert batches == [2, 1] * 3
    assert [answer.truncated for answer in engine.greedy_until(['a', 'a ' * 20], [[]] * 2, 3)] == [False, True]
    batches.clear()
    stop = answers[1].text[:4]  # in the first window
    engine.greedy_until(prompts, [[], [stop], []], 20)
    assert batches == [2, 1, 2, 2]


def plain_beam_search(log_probs, prompt, num_beams, limit, input_length, eos):
    """Beam search with lists: the tokens of the best continuation."""
    running, ended = [(0.0, [])], []
    for step in range(limit):
        after = log_probs([prompt + ids for _, ids in running])
        ways = sorted(((score + more, ids + [token]) for (score, ids), row in zip(running, after, strict=True)
                       for token, more in enumerate(row)), reverse=True)[:2 * num_beams]
        running = [way for way in ways if way[1][-1] != eos][:num_beams]
        ended += [(score / (input_length + step), ids[:-1]) for score, ids in ways if ids[-1] == eos]
        ended = sorted(ended, reverse=True)[:num_beams]
        if len(ended) == num_beams and running[0][0] / (input_length + step + 1) <= ended[-1][0]:
            break
    return ended[0][1] if ended else running[0][1]


def test_beam_search_equals_a_plain_one(engine, make, tokenizer, log_probs):
    """Three prompts in one batch: the tokens a search with lists over the whole network finds, on one device and eight,
    alone and together; they are not the greedy ones.  After 3 tokens none has ended, after 16 two have."""
    prompts = ['hello', 'one two', 'a']
    single, sharded = (make(mesh_dim, do_sample=False, num_beams=3) for mesh_dim in ('1,1,1', '2,2,2'))
    for limit, ended in ((3, 0), (16, 2)):
        answers = single.generate(prompts, 0.7, limit)
        expected = [plain_beam_search(log_probs, [tokenizer.bos_token_id, *tokenizer.encode(prompt)], 3, limit, 64,
                                      tokenizer.eos_token_id) for prompt in prompts]
        assert [answer.token_ids for answer in answers] == expected
        assert [answer.finish_reason for answer in answers].count('stop') == ended
        assert [single.generate([prompt], 0.0, limit)[0] for prompt in prompts] == answers
        assert sharded.generate(prompts, 0.0, limit) == answers
    greedy, = engine.generate(['hello'], 0.0, 16)
    assert single.greedy_until(['hello'], [[]], 16) == [greedy] and greedy.token_ids != expected[0]
    single._params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), single._params)
    with pytest.raises(FloatingPointError, match='logits are not finite'):
        single.generate(['hello'], 0.0)


def test_a_prompt_that_is_done_stays_as_it_is():
    """Two beams, tokens 0 (EOS), 1, 2; input_length 1.  Row 0 is open and takes a better end; row 1, which is done, has
    the same numbers and does not."""
    log_p = jnp.log(jnp.array([[[0.9, 0.06, 0.04], [0.2, 0.5, 0.3]]] * 2))
    tokens_BEW = jnp.tile(jnp.array([[[1, 0, 0], [2, 0, 0]]]), (2, 1, 1))
    ended_BEW = jnp.tile(jnp.array([[[0, 0, 0], [0, 0, 0]]]), (2, 1, 1))
    search = beams.Beams(tokens_BEW, jnp.array([[-1.0, -2.0]] * 2), ended_BEW, jnp.array([[-2.0, -3.0]] * 2),
                         jnp.ones((2, 2), bool), jnp.array([True, False]), jnp.int32(1))
    search, parents_BE = jax.jit(beams.advance)(search, log_p, 1, 0)
    assert parents_BE.tolist() == [[1, 1]] * 2 and search.tokens_BEW[0].tolist() == [[2, 1, 0], [2, 2, 0]]
    np.testing.assert_allclose(search.ended_scores_BE, [[(-1 + np.log(0.9)) / 2, (-2 + np.log(0.2)) / 2], [-2, -3]],
                               rtol=1e-6)
    assert beams.best(search).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert search.open_B.tolist() == [True, False]


# ---------------------------------------------------------------- what must not change an answer


def test_batch_and_mesh_change_no_answer(engine, make):
    """Six prompts by fours, alone, and on dp=2, fsdp=2, mp=2: the same tokens, greedy and sampled; the same scores."""
    alone, sharded = make(batch_size=1), make('2,2,2')
    for temperature in (0.0, 1.0):
        expected = tokens(engine, temperature)
        assert tokens(alone, temperature) == tokens(sharded, temperature) == expected
        assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    scores = [engine.loglikelihood(PROMPTS, ['fine'] * 6) for engine in (engine, sharded)]
    np.testing.assert_allclose(*(np.array(score)[:, 0] for score in scores), rtol=1e-5)


def test_a_growing_cache_changes_no_answer_and_unknown_ids_are_never_chosen(make, tokenizer, monkeypatch):
    """Caches of 16, 32 and 48 slots give the tokens that 16 and 48 give.  The tokenizer is made to know 600 of the 640
    ids and an EOS that never comes: no answer has another id, though the model likes 601, 605 and 607."""
    few = copy.copy(tokenizer)
    few.vocab_size, few.eos_token_id = 600, 3
    monkeypatch.setattr(engine_file, 'SMALLEST_PROMPT', 16)
    engine = make(tokenizer=few, input_length=16, seq_length=48)
    expected = tokens(engine, 0.0, count=32)
    monkeypatch.setattr(engine_file, 'SMALLEST_CACHE', 20)
    assert tokens(engine, 0.0, count=32) == expected
    assert [key[:2] for key in engine._programs] == [
        ('prefill', None), ('grow', 48), ('decode', None), ('grow', 32), ('decode', None), ('grow', 48)]
    assert {len(ids) for ids in expected} == {32} and max(map(max, expected)) < 600


@pytest.mark.parametrize('mesh_dim, chunk', [('1,1,1', loss.CHUNK_ELEMENTS), ('1,1,2', 2500)])
def test_greedy_answers_are_greedy_where_the_vocabulary_is_padded(make, tokenizer, monkeypatch, mesh_dim, chunk):
    """`is_greedy` is true of what greedy decoding gives with 600 of 640 ids, though the model likes 601, 605 and 607,
    and false where the last id is another; of a text's first token too it compares the 600.  With the head whole, and
    over two devices in chunks.
    """
    few = copy.copy(tokenizer)
    few.vocab_size, few.eos_token_id = 600, 3
    monkeypatch.setattr(loss, 'CHUNK_ELEMENTS', chunk)
    engine = make(mesh_dim, tokenizer=few)
    before, answers = [[few.bos_token_id, *few.encode(prompt)] for prompt in PROMPTS], tokens(engine, 0.0)
    others = [[*ids[:-1], (ids[-1] + 1) % 600] for ids in answers]
    for texts, expected in ((answers, True), (others, False)):
        scores = engine._score_pairs(list(zip(before, texts, strict=True)))
        assert [is_greedy for _, is_greedy in scores] == [expected] * len(PROMPTS)
    token, = few.encode('a')
    engine._first_V = np.where(np.arange(640) < 600, -9.0, -1.0)
    engine._first_V[token] = -2.0
    assert engine.loglikelihood([''], ['a']) == [(-2.0, True)]


def test_sampling_repeats_from_the_start_and_not_from_request_to_request(engine):
    """The same prompts give the same answers again, in one request or in two; the same prompt twice gives two."""
    first = tokens(engine, 1.0, ['a'] * 4)
    assert len({tuple(ids) for ids in first}) == 4
    assert tokens(engine, 1.0, ['a']) + [engine.generate(['a'], 1.0, 12)[0].token_ids] == first[:2]


def test_do_sample_false_is_greedy(engine, monkeypatch):
    """The flag overrules the request's temperature."""
    expected = tokens(engine, 0.0)
    monkeypatch.setattr(engine, 'do_sample', False)
    assert tokens(engine, 5.0) == expected


# ---------------------------------------------------------------- programs


def test_buckets_are_powers_of_two_up_to_the_limit():
    """The smallest bucket that holds the length; the limit itself is the last one."""
    assert [bucket(n, 100, 16) for n in (1, 16, 17, 32, 33, 64, 65, 100)] == [16, 16, 32, 32, 64, 64, 100, 100]
    assert bucket(1, 10, 16) == 10
    quarters = [bucket(n, 100, 16, 4) for n in (1, 17, 21, 32, 33, 41, 64, 65, 97)]
    assert quarters == [16, 20, 24, 32, 40, 48, 64, 80, 100]


def test_after_warming_up_nothing_compiles(engine):
    """Every prompt length, budget, temperature and stop text finds its programs ready."""
    before = engine.compilations
    for words in (0, 1, 10, 60):
        engine.generate(['a ' * words] * 5, words / 60, words + 1)
        engine.loglikelihood(['a ' * words], ['fine'])
        engine.greedy_until(['a ' * words], [['x']], words + 70)
    assert engine.compilations == before > 0


@pytest.mark.parametrize('programs, num_beams, expected', [
    (('generate',), 1, {'prefill', 'grow', 'decode'}), (('chat',), 1, {'prefill', 'grow', 'decode'}),
    (('greedy_until',), 3, {'prefill', 'grow', 'decode'}), (('chat',), 3, {'beams'}),
    (('loglikelihood',), 1, {'first', 'score'}), ((), 1, set())])
def test_each_name_warms_up_what_its_endpoint_needs(make, monkeypatch, programs, num_beams, expected):
    """EasyLM's names: only its greedy_until does without beams."""
    engine, compiled = make(do_sample=False, num_beams=num_beams), set()
    monkeypatch.setattr(engine, '_compile', lambda name, *arguments, static=None: SimpleNamespace(
        out_info=compiled.add(name)))
    list(engine.warm_up(programs))
    assert compiled == expected


def test_the_second_request_of_a_shape_compiles_nothing(engine):
    """A text longer than those warmed up compiles one program, once."""
    before = engine.compilations
    engine.loglikelihood([''], ['a ' * 50])
    assert engine.compilations == before + 1
    engine.loglikelihood(['the film', 'a'], ['a ' * 45, 'a'])
    assert engine.compilations == before + 1


# ---------------------------------------------------------------- edges


def test_a_long_prompt_loses_its_beginning_and_says_so(engine, tokenizer):
    """bos stays first and the end of the prompt stays whole; a prompt that just fits is not touched."""
    ids = tokenizer.encode(PROMPTS[0] * 5)
    assert engine._window(engine._encode(PROMPTS[0] * 5, 0)) == ([tokenizer.bos_token_id, *ids[-63:]], True)
    answers = engine.generate(['the ' * 62, 'the ' * 80], 0.0, 1)
    assert [(answer.prompt_tokens, answer.truncated) for answer in answers] == [(64, False), (64, True)]


def test_the_budget_ends_an_answer(engine):
    """max_new_tokens is exact, 'length' is the reason, and what is out of range is the client's mistake."""
    for budget in (1, 2, 3):
        answers = engine.generate([PROMPTS[0]] * 2, 0.0, budget)
        assert [(len(answer.token_ids), answer.finish_reason) for answer in answers] == [(budget, 'length')] * 2
    for budget in (0, -1, 65):
        with pytest.raises(RequestError, match='must be from 1 to 64'):
            engine.generate(['a'], 0.0, budget)


def test_a_pair_is_scored_whole_or_refused(engine, tokenizer):
    """seq_length + 1 tokens with bos can be scored (the last is never read), one more is refused with counts."""
    text = 'the ' * 127
    assert len(tokenizer.encode(text)) == 128 and len(engine._encode_pair('', text, 0)[1]) == 128
    with pytest.raises(RequestError, match=r'text\[1\] have 2 \(with bos\) and 128 tokens: at most 129 together'):
        engine.loglikelihood(['', 'a'], ['a', text])


def test_without_bos_an_empty_prompt_is_refused(engine, monkeypatch):
    """There is nothing to condition on; with bos there is."""
    monkeypatch.setattr(engine, '_bos', [])
    for call in (lambda: engine.generate(['a', ''], 0.0), lambda: engine.loglikelihood(['a', ''], ['b', 'c']),
                 lambda: engine.greedy_until(['a', ''], [[], []], 5)):
        with pytest.raises(RequestError, match=r'prefix_text\[1\] is empty'):
            call()


def test_weights_that_are_not_finite_are_reported(engine, monkeypatch):
    """NaN becomes neither a token nor a score."""
    monkeypatch.setattr(engine, '_params', jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), engine._params))
    with pytest.raises(FloatingPointError, match='logits are not finite'):
        engine.generate(['a'], 0.0)
    monkeypatch.setattr(engine, '_first_V', None)
    with pytest.raises(FloatingPointError, match='logits are not finite'):
        engine.greedy_until(['a'], [[]], 5)
    with pytest.raises(FloatingPointError, match='log-likelihood nan'):
        engine.loglikelihood(['a'], ['b'])
    with pytest.raises(FloatingPointError, match='log-likelihood not finite'):
        engine.loglikelihood([''], ['a'])


def test_progress_counts_every_prompt_once(engine):
    """Dummy rows are not counted."""
    seen = []
    engine.generate(['a'] * 6, 0.0, 1, seen.append)
    engine.loglikelihood(list('abcde'), ['b'] * 5, seen.append)
    engine.loglikelihood(['a', 'b'], ['', 'a'], seen.append)
    assert seen == [4, 2, 4, 1, 1, 1]


@pytest.mark.parametrize('values, message', [
    (dict(input_length=16, seq_length=16), 'input_length=16 must be at least 2 and less than seq_length=16'),
    (dict(input_length=1), 'input_length=1 must be'),
    (dict(seq_length=129), 'seq_length=129 is more than the model was made for, config.max_sequence_length=128'),
    (dict(mesh_dim='1,2,1', batch_size=3), 'batch_size=3 must be divisible by dp.fsdp=2.*--mesh_dim'),
    (dict(num_beams=2), 'num_beams=2 searches and does not draw, but do_sample=True: add --do_sample=False'),
])
def test_flags_that_cannot_go_together_are_refused(make, values, message):
    """Before anything is compiled, with the value and the flag."""
    with pytest.raises(ValueError, match=message):
        make(**values)


def test_a_tokenizer_larger_than_the_model_is_refused(engine, tokenizer):
    """Its last ids would have no embedding."""
    with pytest.raises(ValueError, match='the tokenizer has 640 tokens, the model only config.vocab_size=600'):
        Engine(engine._params, LlamaConfig(600, 64, 160, 2, 4, max_sequence_length=128), Compute(), tokenizer,
               engine.mesh, batch_size=1, input_length=64, seq_length=128)
