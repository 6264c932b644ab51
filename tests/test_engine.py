"""Claims about serving/engine.py, programs.py and texts.py: answers of EasyLM's server (August 2023), and what must not
change an answer.

All engines serve the model that EasyLM's 40-step run saved, compiled without most optimizations.
"""
import copy
import dataclasses
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import checkpoint
from data.prompt import PromptTemplate
from data.tokenizer import load_tokenizer
from model import llama, lora, loss
from model.config import Compute, LlamaConfig, config_from_dict
from model.partition import check_rows, make_mesh
from model.weights import init_weights
from serving import beams, programs
from serving import engine as engine_file
from serving.engine import PROGRAMS
from serving.followers import apply, from_json, to_json
from serving.texts import Texts, check_beams, rolling_windows, softmax
from serving.work import Cancelled, Generate, RequestError, Sampling, Score, Scored

PROMPTS = ['[Text]: the plot is thin .\n[Sentiment]:', 'a', 'the film', 'one two', '', 'it wastes a fine idea .']


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
    """Little optimization, for this file alone."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def tokenizer(golden):
    return load_tokenizer(golden / 'easylm' / 'tokenizer.model')


@pytest.fixture(scope='module')
def make(golden, tokenizer):
    """Asker of EasyLM's model with other values of the arguments."""
    folder = golden / 'easylm'
    config = config_from_dict(json.loads((folder / 'model.json').read_text()), 'model.json')

    def build(mesh_dim='1,1,1', tokenizer=tokenizer, attention='reference', **values):
        mesh = make_mesh(mesh_dim, jax.devices()[:np.prod([int(n) for n in mesh_dim.split(',')])])
        params = checkpoint.open(f'params::{folder}/streaming_params_trained').load_params(config, mesh)
        return helpers.Asker(params, config, Compute(attention=attention), tokenizer, mesh, **values)

    return build


@pytest.fixture(scope='module')
def asker(make, quick_compilation):
    """The one most tests ask, warmed up: prefill of 4, 8, 16, 32 rows, decode of 4, 8 of score, first."""
    asker = make()
    list(asker.engine.warm_up())
    assert asker.programs.compilations == 15  # and the empty cache
    return asker


@pytest.fixture(scope='module')
def cases(golden):
    """Requests to EasyLM's server with its answers, by endpoint."""
    cases = json.loads((golden / 'easylm' / 'serve.json').read_text())
    return {path: [case for case in cases if case['path'] == path] for path in {case['path'] for case in cases}}


# ---------------------------------------------------------------- EasyLM's answers


def test_generate_equals_easylm(asker, cases):
    """Temperature 0: EasyLM's texts, to the letter, and each ended by EOS."""
    for case in cases['/generate']:
        answers = asker.generate(case['request']['prefix_text'])
        assert [answer.text for answer in answers] == case['response']['output_text']
        assert {answer.finish_reason for answer in answers} == {'stop'}


def test_loglikelihood_equals_easylm(asker, cases):
    """Within 1e-3 nats of EasyLM's, and the same is_greedy; also without a prefix, where asking bos for the first token
    would be off by 4e-3."""
    for case in cases['/loglikelihood']:
        texts, expected = case['request']['text'], case['response']
        prefixes = case['request'].get('prefix_text')
        scores, greedy = zip(*asker.loglikelihood(prefixes or [''] * len(texts), texts), strict=True)
        np.testing.assert_allclose(scores, expected['log_likelihood'], atol=1e-3, rtol=0)
        assert list(greedy) == expected['is_greedy']


def test_loglikelihood_rolling_equals_easylm(asker, cases):
    """Within 1e-3 nats of EasyLM's, and the same is_greedy; one text has 4.1 windows."""
    for case in cases['/loglikelihood-rolling']:
        found = asker.ask(asker.texts.loglikelihood_rolling(case['request']['text']))
        scores, greedy = zip(*found, strict=True)
        np.testing.assert_allclose(scores, case['response']['log_likelihood'], atol=1e-3, rtol=0)
        assert list(greedy) == case['response']['is_greedy']


def test_windows_score_every_token_once_and_the_last_is_full():
    """Ten tokens in windows of four, by hand; what fits into one window begins with bos and is not moved."""
    assert rolling_windows(list(range(10)), 99, 4) == [
        ([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert rolling_windows(list(range(8)), 99, 4) == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7])]
    assert rolling_windows([7], 99, 4) == [([99], [7])] and rolling_windows([], 99, 4) == []


def test_the_first_token_of_a_text_without_prefix_sees_bos_alone(asker, tokenizer):
    """Its probabilities sum to 1; the rest of the text does not see the padding: it is scored as behind bos and it."""
    first_V, text = asker.engine.first_token(), 'the film'
    np.testing.assert_allclose(np.exp(first_V, dtype=np.float64).sum(), 1.0, rtol=1e-5)
    token, *rest = tokenizer.encode(text)
    (score, _), (alone, _) = asker.loglikelihood(['', ''], [text, tokenizer.decode([token])])
    np.testing.assert_allclose(alone, first_V[token], rtol=1e-6)
    scored, = asker.engine.run([Score((tokenizer.bos_token_id, token), (tuple(rest),))])
    np.testing.assert_allclose(score, first_V[token] + sum(t.logprob for t in scored.texts[0]), rtol=1e-6)
    likeliest = tokenizer.decode([int(first_V.argmax())])
    assert [greedy for _, greedy in asker.loglikelihood(['', ''], [likeliest, tokenizer.decode([token])])] == [
        True, False]


def test_a_text_of_no_tokens_has_likelihood_one(asker):
    """As in EasyLM: the sum over nothing is 0, and nothing contradicts greedy."""
    assert asker.loglikelihood(['a', ''], ['', '']) == [(0.0, True)] * 2
    assert asker.ask(asker.texts.loglikelihood_rolling([''])) == [(0.0, True)]


def test_greedy_until_equals_easylm_up_to_eos(asker, cases):
    """EasyLM writes out </s> and goes on; we end there.  Before it the texts are the same, cut where EasyLM's would be.
    """
    case, = cases['/greedy-until']
    prompts, expected = case['request']['prefix_text'], case['response']['output_text']
    before = [text.split('</s>')[0] for text in expected]
    assert before == ['the script why o Posive', 'Posive']
    answers = asker.greedy_until(prompts, case['request']['until'], 5000)
    assert [(answer.text, answer.finish_reason) for answer in answers] == [(text, 'stop') for text in before]
    for stops in (['o Pos', 'why'], ['y o'], ['v', 'script']):
        for answer, text in zip(asker.greedy_until(prompts, [stops] * 2, 5000), before, strict=True):
            assert answer.text == min((text.split(stop)[0] for stop in stops), key=len)


# ---------------------------------------------------------------- against a plain computation


@pytest.fixture(scope='module')
def log_probs(asker):
    """log p of the token after each of at most four rows, float64, by the whole network without a cache."""
    config, compute = asker.programs.config, asker.programs.compute

    def forward(params, tokens_BT):
        h_BTM, _ = llama.hidden_states(params, tokens_BT, jnp.ones_like(tokens_BT), config, compute)
        return jax.nn.log_softmax(loss.logits(params, h_BTM))

    program = helpers.on_mesh(forward, config, asker.programs.mesh, PartitionSpec(('dp', 'fsdp'), None, 'mp'))

    def after(rows):
        tokens_BT = np.zeros((4, 128), np.int32)
        for row, ids in enumerate(rows):
            tokens_BT[row, :len(ids)] = ids
        found_BTV = np.asarray(program(asker.params, tokens_BT), np.float64)
        return [found_BTV[row, len(ids) - 1] for row, ids in enumerate(rows)]

    return after


def test_tokens_and_log_probabilities_are_those_of_the_whole_network(asker, tokenizer, log_probs):
    """Each greedy token is the argmax of a forward without cache, with its log-probability and the 3 likeliest there;
    prompts of 1 to 64 tokens: less and more than a piece, and its multiples."""
    prompts = ['a ' * n for n in (0, 1, 14, 15, 16, 31, 62)]
    for prompt, answer in zip(prompts, asker.generate(prompts, count=3, logprobs=3, ignore_eos=True), strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
        assert answer.prompt_tokens == len(ids) and len(answer.tokens) == 3
        for token in answer.tokens:
            expected_V = log_probs([ids])[0]
            assert token.id == expected_V.argmax() and [i for i, _ in token.top] == list(expected_V.argsort()[:-4:-1])
            np.testing.assert_allclose([token.logprob, *(p for _, p in token.top)],
                                       [expected_V[token.id], *np.sort(expected_V)[:-4:-1]], atol=2e-5)
            ids.append(token.id)


def test_scores_are_those_of_the_whole_network_however_texts_share_a_prefix(asker, tokenizer, log_probs):
    """Texts of one token and of several after one prefix are one work, whose prefix is computed once: 2 pieces, and one
    for each further text of several tokens.  70 texts of one token are more than its program has room for."""
    before = [tokenizer.bos_token_id, *tokenizer.encode('a ' * 20)]
    texts = [(40,), (41, 42), (40, 43, 44), (45,), tuple(range(50, 90))]
    asker.engine.prefix_reuse = False
    pieces = asker.engine.counts['prefill_pieces']
    scored, = asker.engine.run([Score(tuple(before), tuple(texts), logprobs=1)])
    assert asker.engine.counts['prefill_pieces'] - pieces == 2 + 1 + 1 + 3
    for text, tokens, greedy in zip(texts, scored.texts, scored.greedy, strict=True):
        for place, (token, is_greedy) in enumerate(zip(tokens, greedy, strict=True)):
            expected_V = log_probs([before + list(text[:place])])[0]
            np.testing.assert_allclose([token.logprob, token.top[0][1]], [expected_V[token.id], expected_V.max()],
                                       atol=2e-5)
            assert token.id == text[place] and is_greedy == (token.id == expected_V.argmax())
    many, = asker.engine.run([Score(tuple(before), tuple((token,) for token in range(300, 370)))])
    expected_V = log_probs([before])[0]
    np.testing.assert_allclose([tokens[0].logprob for tokens in many.texts], expected_V[300:370], atol=2e-5)
    asker.engine.prefix_reuse = True


def test_pairs_with_the_same_prefix_are_one_work(asker):
    """Three prefixes, one of them with 33 texts: more than one work may score."""
    prefixes, texts = ['a', 'b', 'a', 'c'] + ['b'] * 32, ['x', 'x', 'y', 'z'] + [f'{n} x' for n in range(32)]
    question = asker.texts.loglikelihood(prefixes, texts)
    assert [len(work.texts) for work in question.works] == [2, 32, 1, 1]
    together = question.answer(asker.engine.run(question.works))
    alone = [asker.loglikelihood([prefix], [text])[0] for prefix, text in zip(prefixes, texts, strict=True)]
    np.testing.assert_allclose([score for score, _ in together], [score for score, _ in alone], rtol=1e-5)


def test_greedy_until_goes_on_in_windows(make, tokenizer, log_probs):
    """20 tokens by eights, each window behind bos and the last 15 tokens of prompt and answer: the argmaxes of the
    network; `truncated` is true for what lost a token on the way, and a stop text ends it in any window."""
    few = copy.copy(tokenizer)
    few.vocab_size, few.eos_token_id = 600, 3  # an EOS that never comes
    asker = make(tokenizer=few, input_length=16, seq_length=24, batch_size=2)
    prompts, bos = ['it wastes a fine idea .', 'a', 'the film'], tokenizer.bos_token_id
    answers = asker.greedy_until(prompts, [[], [], []], 20)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, expected = tokenizer.encode(prompt), []
        for step in range(20):
            if step % 8 == 0:
                window = [bos, *(ids + expected)[-15:]]
            expected.append(int(log_probs([window])[0][:600].argmax()))
            window.append(expected[-1])
        assert (answer.token_ids, answer.finish_reason, answer.truncated) == (expected, 'length', True)
    assert [answer.truncated for answer in asker.greedy_until(['a', 'a ' * 20], [[]] * 2, 3)] == [False, True]
    stop = answers[1].text[-3:]
    stopped, = asker.greedy_until(['a'], [[stop]], 20)
    assert (stopped.text, stopped.finish_reason) == (answers[1].text.split(stop)[0], 'stop')


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


def test_beam_search_equals_a_plain_one(asker, make, tokenizer, log_probs):
    """Three prompts: the tokens a search with lists over the whole network finds, on one device and eight; they are not
    the greedy ones.  After 3 tokens none has ended, after 16 two have."""
    prompts = ['hello', 'one two', 'a']
    single, sharded = make(), make('2,2,2')
    for limit, ended in ((3, 0), (16, 2)):
        answers = single.generate(prompts, count=limit, num_beams=3)
        expected = [plain_beam_search(log_probs, [tokenizer.bos_token_id, *tokenizer.encode(prompt)], 3, limit, 64,
                                      tokenizer.eos_token_id) for prompt in prompts]
        assert [answer.token_ids for answer in answers] == expected
        assert [answer.finish_reason for answer in answers].count('stop') == ended
        assert sharded.generate(prompts, count=limit, num_beams=3) == answers
    greedy, = asker.generate(['hello'], count=16)
    assert single.greedy_until(['hello'], [[]], 16)[0].token_ids == greedy.token_ids != expected[0]
    single.engine._params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), single.params)
    with pytest.raises(FloatingPointError, match='logits are not finite'):
        single.generate(['hello'], num_beams=3)


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


def same(results, expected, within):
    """The same tokens, and log-probabilities within so many nats; results of Generates or Scores."""
    for one, other in zip(results, expected, strict=True):
        tokens = [[token for text in result.texts for token in text] if isinstance(result, Scored) else result.tokens
                  for result in (one, other)]
        assert [token.id for token in tokens[0]] == [token.id for token in tokens[1]]
        np.testing.assert_allclose(*([token.logprob for token in part] for part in tokens), atol=within, rtol=0)
    return True


def test_load_prefix_and_stream_change_no_answer(make):
    """Greedy tokens and log-probabilities of 12 prompts in 8 slots, alone, streamed, and with slots that hold their
    beginnings already.  (To the bit: test_smollm2.py; in a model as small as this one other loops are chosen.)"""
    asker = make(batch_size=8)
    prompts = PROMPTS + ['[Text]: ' + 'so it is ' * n + '\n[Sentiment]:' for n in range(6)]
    works = asker.texts.generate(prompts, max_new_tokens=8, logprobs=2, ignore_eos=True).works
    scores = asker.texts.loglikelihood(prompts, [' Positive'] * 12).works
    asker.engine.prefix_reuse = False
    together, scored = asker.engine.run(works), asker.engine.run(scores)
    assert same([asker.engine.run([work])[0] for work in works], together, 2e-5)
    assert same([asker.engine.run([work])[0] for work in scores], scored, 2e-5)
    assert {answer.cached_tokens for answer in together} == {0}
    asker.engine.prefix_reuse = True
    for _ in range(2):
        reused = asker.engine.run(works)
        assert same(reused, together, 2e-5) and same(asker.engine.run(scores), scored, 2e-5)
    assert sum(answer.cached_tokens for answer in reused) > 30
    streams = [[] for _ in works]
    asker.engine.submit([dataclasses.replace(work, streamed=True) for work in works],
                        lambda index, event: streams[index].append(event))
    while not asker.engine.idle:
        asker.engine.tick()
    assert same([events[-1] for events in streams], together, 2e-5)
    for *deltas, last in streams:
        assert len(deltas) > 1 and ''.join(delta.text for delta in deltas) == last.text
        assert [token for delta in deltas for token in delta.tokens] == last.tokens


def test_batch_and_mesh_change_no_answer(asker, make):
    """Six prompts by fours, in two slots, and on dp=2, fsdp=2, mp=2: the same tokens, greedy and drawn, and scores."""
    two, sharded = make(batch_size=2), make('2,2,2')
    for temperature in (0.0, 1.0):
        expected = asker.tokens(temperature, PROMPTS)
        assert two.tokens(temperature, PROMPTS) == sharded.tokens(temperature, PROMPTS) == expected
        assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    scores = [one.loglikelihood(PROMPTS, ['fine'] * 6) for one in (asker, sharded)]
    np.testing.assert_allclose(*(np.array(score)[:, 0] for score in scores), rtol=1e-5)


def test_the_decode_kernel_gives_the_same_answers(make, asker):
    """attention=pallas: every row of the cache goes through the kernel, rows that do not decode without a trace."""
    kernel = make(attention='pallas', batch_size=2)
    prompts = ['[Text]: the plot is thin .', 'a', 'the film']
    assert kernel.tokens(0.0, prompts, 4) == asker.tokens(0.0, prompts, 4)


@pytest.mark.parametrize('weight_dtype, cache_dtype, within', [
    ('bf16', '', 0.02), ('', 'bf16', 0.02), ('int8', '', 0.1), ('', 'int8', 0.05), ('int8', 'int8', 0.1)])
def test_narrow_weights_and_caches_stay_near(make, asker, weight_dtype, cache_dtype, within):
    """Log-likelihoods of six texts, within so many nats a token of float32's, on one device and on eight; not equal."""
    exact = [score for score, _ in asker.loglikelihood(PROMPTS, ['it is fine'] * 6)]
    for mesh_dim in ('1,1,1', '2,2,2'):
        narrow = make(mesh_dim, weight_dtype=weight_dtype, cache_dtype=cache_dtype)
        found = [score for score, _ in narrow.loglikelihood(PROMPTS, ['it is fine'] * 6)]
        np.testing.assert_allclose(found, exact, atol=within * 6)
        assert found != exact
        assert [len(answer.tokens) for answer in narrow.generate(['a', 'b'], count=3, ignore_eos=True)] == [3, 3]


@pytest.fixture(scope='module')
def adapters(asker):
    """Two for that model, of other ranks, targets and scales; B is drawn, large enough to change answers."""
    config, mesh, found = asker.programs.config, make_mesh('1,1,1', jax.devices()[:1]), []
    for its in (lora.Lora(2, 4, ('w_q', 'w_down')), lora.Lora(5, 20, ('w_v', 'w_q', 'w_o'), rslora=True)):
        made = init_weights(lora.adapter_specs(config, its), mesh, its.rank, config.initializer_range)
        keys = iter(jax.random.split(jax.random.key(its.rank), 8))
        found.append((jax.tree.map(lambda one, keys=keys: lora.Adapter(
            one.a, 0.2 * jax.random.normal(next(keys), one.b.shape)), made,
            is_leaf=lambda node: isinstance(node, lora.Adapter)), its))
    return found


@pytest.fixture(scope='module')
def merged(make, adapters):
    """What engines of the base and of each adapter merged into it give: (scored, answer, first_token)."""
    asker, found = make(), []
    base, (works, _) = asker.params, adapter_works(asker, 0)
    for params in (base, *(helpers.merged(base, *one) for one in adapters)):
        asker.engine._params, asker.engine._first_V = params, {}
        for slot in asker.engine.slots:
            slot.held.clear()
        found.append((*asker.engine.run(list(works)), asker.engine.first_token()))
    return found


def adapter_works(asker, number: int) -> tuple[tuple[Score, Generate], list[int]]:
    prompt = tuple(asker.texts.prompt_work(PROMPTS[0], max_new_tokens=1).prompt_ids)
    texts = tuple(tuple(asker.texts.tokenizer.encode(text)) for text in ('Positive', 'a fine film'))
    return (Score(prompt, texts, adapter=number), Generate(prompt, 6, adapter=number)), prompt


@pytest.mark.parametrize('mesh_dim, attention', [
    ('1,1,1', 'reference'), ('2,2,2', 'reference'), pytest.param('1,1,1', 'pallas', marks=pytest.mark.long)])
def test_adapters_of_one_base_are_batched_together(make, adapters, merged, mesh_dim, attention):
    """Each row with its own, as if its adapter alone were merged into the weights; the slots' prefixes are not mixed.

    Without an adapter the numbers are the base's to the bit, where the programs are of the same rows.
    """
    together = make(mesh_dim, adapters=adapters, batch_size=8, attention=attention)
    pairs = [adapter_works(together, n)[0] for n in (0, 1, 2)]
    scores = [score for score, _ in pairs]
    works = scores + [generate for _, generate in pairs[::-1]] + scores
    *once, two, one, none, again, adapted_1, adapted_2 = together.engine.run(works)
    logprobs = lambda scored: [token.logprob for text in scored.texts for token in text]
    for n, (scored, answer) in enumerate(zip(once, (none, one, two), strict=True)):
        expected, said, _ = merged[n]
        np.testing.assert_allclose(logprobs(scored), logprobs(expected), atol=2e-5)
        assert answer.token_ids == said.token_ids
        if (mesh_dim, attention, n) == ('1,1,1', 'reference', 0):
            assert logprobs(scored) == logprobs(expected)
    assert [logprobs(x) for x in once] == [logprobs(x) for x in (again, adapted_1, adapted_2)]
    assert len({str(logprobs(x)) for x in once}) == 3
    with pytest.raises(RequestError, match='work.adapter=3 is none of the 2'):
        together.engine.run([dataclasses.replace(pairs[0][1], adapter=3)])


def test_a_prefix_is_not_taken_from_another_adapter_s_slot(make, adapters):
    asker = make(adapters=adapters, batch_size=1)
    prompt = tuple(asker.texts.prompt_work('the film is a long and fine one', max_new_tokens=1).prompt_ids)
    first, other, same = asker.engine.run([Generate(prompt, 2, adapter=n) for n in (1, 2, 2)])
    assert (first.cached_tokens, other.cached_tokens, same.cached_tokens) == (0, 0, len(prompt) - 1)


def test_the_first_token_of_a_text_without_prefix_is_its_adapter_s(make, adapters, merged):
    asker = make(adapters=adapters)
    np.testing.assert_allclose(asker.engine.first_token(2), merged[2][2], atol=2e-5)
    assert np.abs(asker.engine.first_token(2) - asker.engine.first_token(0)).max() > 1e-3


def test_sampling_repeats_from_the_start_and_not_from_work_to_work(asker):
    """The same prompts give the same answers again, in one request or in two; the same prompt twice gives two; a seed
    of one's own gives the same always, beside whatever neighbours."""
    first = asker.tokens(1.0, ['a'] * 4)
    assert len({tuple(ids) for ids in first}) == 4
    assert asker.tokens(1.0, ['a']) + [asker.generate(['a'], 1.0, 12)[0].token_ids] == first[:2]
    seeded = Sampling(1.0, seed=7)
    own, = asker.tokens(0, ['a'], sampling=seeded)
    works = asker.texts.generate(['a'], seeded, 12).works + asker.texts.generate(
        PROMPTS, Sampling(2.0, top_k=200, top_p=0.9), 12).works
    assert asker.engine.run(works)[0].token_ids == own


@pytest.mark.parametrize('mesh_dim', ['1,1,1', '1,1,2'])
def test_ids_that_only_pad_the_vocabulary_are_never_chosen(make, tokenizer, mesh_dim):
    """The tokenizer is made to know 600 of the 640 ids, and an EOS that never comes: no answer has another id, though
    the model likes 601, 605 and 607; `is_greedy` is true of such an answer and false where its last id is another; of a
    text's first token too it compares the 600."""
    few = copy.copy(tokenizer)
    few.vocab_size, few.eos_token_id = 600, 3
    asker = make(mesh_dim, tokenizer=few)
    answers = asker.tokens(0.0, PROMPTS)
    assert max(map(max, answers)) < 600
    others = [[*ids[:-1], (ids[-1] + 1) % 600] for ids in answers]
    for texts, expected in ((answers, True), (others, False)):
        scored = asker.engine.run([Score((few.bos_token_id, *few.encode(prompt)), (tuple(text),))
                                   for prompt, text in zip(PROMPTS, texts, strict=True)])
        assert [all(result.greedy[0]) for result in scored] == [expected] * len(PROMPTS)
    token, = few.encode('a')
    asker.engine._first_V = {0: np.where(np.arange(640) < 600, -9.0, -1.0)}
    asker.engine._first_V[0][token] = -2.0
    assert asker.loglikelihood([''], ['a']) == [(-2.0, True)]


# ---------------------------------------------------------------- stops, choices, biases


def test_an_answer_ends_before_its_stop_text_and_no_later_step_runs(asker):
    """The text is cut before the first stop text, which may straddle tokens; the slot is free at once."""
    full, = asker.generate(['hello'], count=30)
    for begin in (3, 7):
        stop, steps = full.text[begin:begin + 4], asker.engine.counts['decode_steps']
        answer, = asker.generate(['hello'], count=30, stop=(stop, 'never'))
        assert answer.text == full.text.split(stop)[0] and answer.finish_reason == 'stop'
        assert asker.engine.counts['decode_steps'] - steps == len(answer.token_ids) - 1 < len(full.token_ids) - 1


def test_only_a_choice_can_come_out(asker, tokenizer):
    """Of choices that share a beginning, one of them the beginning of another, greedy takes the likelier way at each
    token, and a hot sampler takes each; no other token has a chance."""
    choices = asker.texts.choice_ids('the film', [' Positive', ' Posit', ' why', ' Negative'])
    seen = {asker.generate(['the film'], 0, 20, sampling=Sampling(50.0, seed=seed), choices=choices)[0].text
            for seed in range(24)}
    assert seen == {'Positive', 'Posit', 'why', 'Negative'}
    answer, = asker.generate(['the film'], count=20, choices=choices)
    assert answer.finish_reason == 'stop' and tuple(answer.token_ids) in choices
    with pytest.raises(RequestError, match='a choice has'):
        asker.generate(['a'], count=1, choices=choices)


def test_a_bias_moves_the_choice(asker):
    """+100 forces a token, -100 forbids one; the told log-probability is the model's own."""
    plain, = asker.generate(['the film'], count=1, logprobs=2)
    best, second = plain.tokens[0].top
    biased, = asker.generate(['the film'], count=1, sampling=Sampling(logit_bias=((best[0], -100.0),)))
    assert biased.token_ids == [second[0]] and abs(biased.tokens[0].logprob - second[1]) < 1e-5
    forced, = asker.generate(['the film'], count=2, sampling=Sampling(logit_bias=((9, 100.0),)))
    assert forced.token_ids == [9, 9]


def test_labels_are_compared_by_the_sum_over_their_tokens(asker, tokenizer):
    """Of labels of one to four tokens, the probabilities are the softmax of the log-likelihoods asked one by one."""
    template = PromptTemplate('[Text]: ', '\n[Sentiment]:', labels=('Positive', 'why o Positive', 'the'))
    texts = ['the plot is thin .', 'a']
    found = asker.ask(asker.texts.classify(texts, template, temperature=2.0))
    for text, result in zip(texts, found, strict=True):
        scores = [score for score, _ in asker.loglikelihood([template.prompt(text)] * 3, list(template.labels))]
        np.testing.assert_allclose(result.log_likelihoods, scores, rtol=1e-5)
        np.testing.assert_allclose(result.probabilities, np.exp(jax.nn.log_softmax(jnp.array(scores) / 2)), rtol=1e-4)
        assert result.label == template.labels[int(np.argmax(scores))]
    assert softmax([-float('inf')] * 2, 1.0) == [0.5, 0.5]


# ---------------------------------------------------------------- schedule


def test_requests_take_turns_and_what_ends_makes_room(make):
    """A request of 12 prompts came first; one of a single prompt has its answer long before, and none is lost."""
    asker, done = make(batch_size=2), []
    works = asker.texts.generate(['a', 'the film', 'one two'] * 4, max_new_tokens=4, ignore_eos=True).works
    asker.engine.submit(works, lambda index, event: done.append('many'))
    asker.engine.submit(works[:1], lambda index, event: done.append('one'))
    while not asker.engine.idle:
        asker.engine.tick()
    assert done.index('one') <= 2 and done.count('many') == 12


def test_a_cancelled_request_leaves_before_the_next_turn(make):
    """Its works in slots and in line are answered with Cancelled, its neighbour's answer is what it was, and the slots
    are free for the next request in the same turn."""
    asker, events, kept = make(batch_size=2), [], []
    expected, = asker.generate(['the film'], count=8, ignore_eos=True)
    work, = asker.texts.generate(['the film'], max_new_tokens=8, ignore_eos=True).works
    asker.engine.submit([work], lambda index, event: kept.append(event))
    ticket = asker.engine.submit([work] * 5, lambda index, event: events.append((index, event)))
    asker.engine.tick()
    asker.engine.cancel(ticket)
    assert [index for index, _ in events] == [0, 1, 2, 3, 4]
    assert all(isinstance(event, Cancelled) for _, event in events)
    assert sum(slot.job is not None for slot in asker.engine.slots) == 1
    asker.engine.cancel(ticket)  # no error
    while not asker.engine.idle:
        asker.engine.tick()
    assert kept[0]._replace(cached_tokens=0) == expected._replace(cached_tokens=0)


def test_a_long_prompt_comes_in_pieces_while_a_stream_goes_on(make, monkeypatch):
    """With a reader, a tick takes one piece of two here, and each tick has a token for the reader."""
    monkeypatch.setattr(engine_file, 'PIECES_BESIDE_A_STREAM', 1)
    asker, deltas, long = make(batch_size=2, input_length=100), [], []
    work, = asker.texts.generate(['hello'], max_new_tokens=12, streamed=True, ignore_eos=True).works
    asker.engine.submit([work], lambda index, event: deltas.append(event))
    asker.engine.tick()
    other, = asker.texts.generate(['a ' * 90], max_new_tokens=1).works
    asker.engine.submit([other], lambda index, event: long.append(event))
    for tick in range(6):
        assert not long, tick
        steps = asker.engine.counts['decode_steps']
        asker.engine.tick()
        assert asker.engine.counts['decode_steps'] == steps + 1
    assert len(long) == 1
    asker.engine.fail(RuntimeError('end'))


def test_slots_with_the_prompt_s_beginning_are_found(make):
    """Two conversations in two slots: each goes on in its own; only what pieces computed is used again."""
    asker = make(batch_size=2)
    one, two = '[Text]: one two three four\n', 'it wastes a fine idea .\n'
    asker.generate([one, two], count=2)
    answers = asker.generate([two + 'a', one + 'the film'], count=2)
    encode = asker.texts.tokenizer.encode
    shared = lambda a, b: next(i for i, (x, y) in enumerate(zip(a + [-1], b + [-2], strict=False)) if x != y)
    assert [answer.cached_tokens for answer in answers] == [
        1 + shared(encode(two), encode(two + 'a')), 1 + shared(encode(one), encode(one + 'the film'))]


def test_what_an_earlier_sequence_left_in_a_slot_is_never_seen(make):
    """Slots full of NaN give the answers of empty ones."""
    asker = make()
    expected = asker.tokens(0.0, PROMPTS)
    asker.engine._cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), asker.engine._cache)
    for slot in asker.engine.slots:
        slot.held.clear()
    assert asker.tokens(0.0, PROMPTS) == expected


def test_damaged_logits_fail_their_own_work_alone(make):
    """A prompt with a token whose embedding is NaN fails; its neighbours' answers are what they were, and the slot
    serves again."""
    asker = make()
    expected, bad = asker.tokens(0.0, ['a', 'one two']), 77
    asker.engine._params = type(asker.params)(asker.params.embedding.at[bad].set(jnp.nan), asker.params.layers,
                                              asker.params.final_norm, asker.params.head)
    works = asker.texts.generate(['a', 'one two'], max_new_tokens=12).works
    events = {}
    asker.engine.submit([works[0], Generate((1, bad, 5), 3), works[1]], lambda i, event: events.update({i: event}))
    while not asker.engine.idle:
        asker.engine.tick()
    assert isinstance(events[1], FloatingPointError) and 'not finite' in str(events[1])
    assert [events[0].token_ids, events[2].token_ids] == expected
    assert asker.tokens(0.0, ['a', 'one two']) == expected


def test_other_processes_make_the_same_turns_from_what_is_told(make):
    """Two engines, the second told of works and cancellations as JSON: the same programs in the same order."""
    leader, follower = make(batch_size=2), make(batch_size=2)
    calls = {leader: [], follower: []}
    for asker in calls:
        run = asker.programs.run
        asker.programs.run = lambda name, *rest, asker=asker, run=run, **static: (
            calls[asker].append((name, jax.tree.map(np.asarray, rest[2:]))), run(name, *rest, **static))[1]
    works = [*leader.texts.generate(['a', 'the film', 'one'], Sampling(1.0, logit_bias=((5, 1.0),)), 6).works,
             Score((1, 5), ((7, 8), (9,)))]
    turns = [[('submit', 1, works), ('submit', 2, works[:1])], [], [('cancel', 1, None)], [], [], [], [], []]
    tickets = {leader: {}, follower: {}}
    for news in turns:
        told = json.loads(json.dumps([(kind, ticket, items and list(map(to_json, items)))
                                      for kind, ticket, items in news]))
        heard = [(kind, ticket, items and list(map(from_json, items))) for kind, ticket, items in told]
        for asker, items in ((leader, news), (follower, heard)):
            apply(asker.engine, items, tickets[asker], lambda ticket: (lambda index, event: None, lambda: None))
            if not asker.engine.idle:
                asker.engine.tick()
    assert len(calls[leader]) > 4
    jax.tree.map(np.testing.assert_array_equal, calls[leader], calls[follower])


# ---------------------------------------------------------------- programs


def test_after_warming_up_nothing_compiles(asker):
    """Every prompt length, budget, way of sampling, stop text, choice and score finds its programs ready."""
    before = asker.programs.compilations
    for words in (0, 1, 10, 60):
        asker.generate(['a ' * words] * 5, count=words + 1, sampling=Sampling(words / 60, words, 0.9, 0.1))
        asker.loglikelihood(['a ' * words], ['fine ' * (words + 1)])
        asker.greedy_until(['a ' * words], [['x']], words + 70)
    asker.generate(['a'] * 9, count=4, choices=((5, 6), (7,)), logprobs=20)
    assert asker.programs.compilations == before > 0


def test_each_name_warms_up_its_programs(make, monkeypatch):
    """Fourteen shapes for four slots, one more of decode for int8 weights; beams only where they are asked for."""
    asker, compiled = make(), []
    monkeypatch.setattr(asker.programs, 'compile', lambda name, *arguments, static=(): compiled.append(name))
    list(asker.programs.warm_up(asker.params, None, PROGRAMS))
    assert {name: compiled.count(name) for name in compiled} == {'first': 1, 'prefill': 4, 'decode': 1, 'score': 8}
    compiled.clear()
    list(asker.programs.warm_up(asker.params, None, (), num_beams=2))
    assert compiled == ['beams'] * 3  # prompts of 16, 32 and 64 tokens
    assert make(weight_dtype='int8').programs.rows_for(1) == 2 and asker.programs.rows_for(1) == 4
    assert programs.sizes(2, 5) == [2, 4, 8] and programs.sizes(4, 32) == [4, 8, 16, 32]


# ---------------------------------------------------------------- edges


def test_a_long_prompt_loses_its_beginning_and_says_so(asker, tokenizer):
    """bos stays first and the end of the prompt stays whole; a prompt that just fits is not touched."""
    ids = tokenizer.encode(PROMPTS[0] * 5)
    work, = asker.texts.generate([PROMPTS[0] * 5]).works
    assert (work.prompt_ids, work.truncated) == ((tokenizer.bos_token_id, *ids[-63:]), True)
    answers = asker.generate(['the ' * 62, 'the ' * 80], count=1)
    assert [(answer.prompt_tokens, answer.truncated) for answer in answers] == [(64, False), (64, True)]


def test_the_budget_ends_an_answer(asker):
    """max_new_tokens is exact, 'length' is the reason, and what is out of range is the client's mistake."""
    for budget in (1, 2, 3):
        answers = asker.generate([PROMPTS[0]] * 2, count=budget)
        assert [(len(answer.token_ids), answer.finish_reason) for answer in answers] == [(budget, 'length')] * 2
    for budget in (0, -1, 65):
        with pytest.raises(RequestError, match='must be from 1 to 64'):
            asker.generate(['a'], count=budget)


@pytest.mark.parametrize('work, message', [
    (Generate((), 1), 'the prompt is empty'), (Generate((1, 640), 1), 'token ids must be from 0 to 639'),
    (Generate((1, -1), 1), 'token ids must be from 0'), (Generate((1,) * 100, 30), 'take 129 tokens, and a slot holds'),
    (Generate((1,), 0), 'must be at least 1'), (Generate((1,), 5, choices=((1,), (1,))), 'different texts'),
    (Generate((1,), 5, choices=tuple((n,) for n in range(65))), 'at most 64'),
    (Generate((1,), 5, Sampling(logit_bias=((700, 1.0),))), 'token ids must be'),
    (Generate((1,), 5, Sampling(logit_bias=((7, 1.0),) * 65)), 'more than 64'),
    (Generate((1,), 5, logprobs=21), 'logprobs=21 must be at most 20'),
    (Score((1,), ()), 'something to score'), (Score((1,), ((),)), 'something to score'),
    (Score((), ((1,),)), 'the prompt is empty'), (Score((1,), ((5, 640),)), 'token ids must be'),
    (Score((1,) * 100, ((5,) * 30,)), 'take 129 tokens')])
def test_works_that_cannot_be_done_are_refused_before_any_is(asker, work, message):
    """JAX clamps ids and places silently: the engine must not see them."""
    with pytest.raises(RequestError, match=message):
        asker.engine.run([Generate((1,), 1), work])
    assert asker.engine.idle


def test_a_pair_is_scored_whole_or_refused(asker, tokenizer):
    """seq_length + 1 tokens with bos can be scored (the last is never read), one more is refused with counts."""
    text = 'the ' * 127
    assert len(tokenizer.encode(text)) == 128 and len(asker.loglikelihood([''], [text])) == 1
    with pytest.raises(RequestError, match=r'text\[1\] have 2 \(with bos\) and 128 tokens: at most 129 together'):
        asker.loglikelihood(['', 'a'], ['a', text])


def test_without_bos_an_empty_prompt_is_refused(make):
    """There is nothing to condition on; with bos there is."""
    asker = make(add_bos_token=False)
    for call in (lambda: asker.generate(['a', '']), lambda: asker.loglikelihood(['a', ''], ['b', 'c']),
                 lambda: asker.greedy_until(['a', ''], [[], []], 5)):
        with pytest.raises(RequestError, match=r'prefix_text\[1\] is empty'):
            call()


def test_weights_that_are_not_finite_are_reported(make):
    """NaN becomes neither a token nor a score."""
    asker = make()
    asker.engine._params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), asker.params)
    for call in (lambda: asker.generate(['a']), lambda: asker.greedy_until(['a'], [[]], 5),
                 lambda: asker.loglikelihood(['a'], ['b']), lambda: asker.loglikelihood([''], ['a'])):
        with pytest.raises(FloatingPointError, match='logits are not finite'):
            call()
    assert asker.engine.idle


def test_progress_tells_every_work_once(asker):
    """By its number."""
    seen = []
    asker.engine.run(asker.texts.generate(['a'] * 6, max_new_tokens=1).works, seen.append)
    assert sorted(seen) == list(range(6))


@pytest.mark.parametrize('values, message', [
    (dict(input_length=16, seq_length=16), 'input_length=16 must be at least 2 and less than seq_length=16'),
    (dict(input_length=1), 'input_length=1 must be'),
    (dict(seq_length=129), 'seq_length=129 is more than the model was made for, config.max_sequence_length=128'),
])
def test_flags_that_cannot_go_together_are_refused(make, values, message):
    """Before anything is compiled, with the value and the flag."""
    with pytest.raises(ValueError, match=message):
        make(**values)
    with pytest.raises(ValueError, match='num_beams=2 searches and does not draw, but do_sample=True: add --do_sample'):
        check_beams(True, 2)
    with pytest.raises(ValueError, match='batch_size=3 must be divisible by dp.fsdp=2.*--mesh_dim'):
        check_rows(3, make_mesh('1,2,1', jax.devices()[:2]), 'batch_size')


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    """Its last ids would have no embedding."""
    with pytest.raises(ValueError, match='the tokenizer has 640 tokens, the model only config.vocab_size=600'):
        Texts(tokenizer, LlamaConfig(600, 64, 160, 2, 4, max_sequence_length=128), input_length=64, seq_length=128)
