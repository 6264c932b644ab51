"""Bad bodies and the soak of a server: the same seed sends the same, and reports say what came."""
import json
import random

import pytest

from instruments.bench import serving_bad_bodies, serving_soak
from instruments.bench.serving_bad_bodies import JSON, MUTATIONS, VALID, Answer, Case, judged, mutations, written
from instruments.bench.serving_soak import Sample, ask_of, slope


def test_bad_bodies_are_the_same_for_a_seed_and_of_every_kind():
    """And the valid bodies that they come from are not changed; another seed gives others."""
    before = json.dumps(VALID)
    cases = {seed: [case for path in VALID for case in mutations(path, 100, seed)] for seed in (3, 4)}
    assert cases[3] == [case for path in VALID for case in mutations(path, 100, 3)] != cases[4]
    assert {case.kind for case in cases[3]} == set(MUTATIONS) and json.dumps(VALID) == before


def test_mutations_make_the_mistake_they_are_named_for():
    """What strict JSON refuses is refused; a key stands twice; a body is cut; a client leaves early."""
    def made(kind, seed):
        return MUTATIONS[kind]({'a': [1, 'x']}, random.Random(seed))

    for seed in range(20):
        for kind in ('truncated', 'more behind it', 'no JSON number', 'noise'):
            with pytest.raises(ValueError):
                json.loads(made(kind, seed)['body'], parse_constant=lambda name: int(name))
        assert len(json.loads(made('key twice', seed)['body'], object_pairs_hook=list)) == 2
        assert 'a' not in json.loads(made('key missing', seed)['body'])
        assert len(json.loads(made('key unknown', seed)['body'])) == 2
        assert made('client leaves', seed)['sent'] < len(written({'a': [1, 'x']}))
        with pytest.raises(UnicodeDecodeError):
            made('broken UTF-8', seed)['body'].decode()
    assert len(made('too large', 0)['body']) > 4_000_000


@pytest.mark.parametrize('path, status, kind, body, fault', [
    ('/generate', 200, 'application/json', b'{}', ''),
    ('/generate', 400, 'application/json', b'{"detail": "no"}', ''),
    ('/v1/completions', 400, 'application/json', b'{"error": {"message": "no"}}', ''),
    ('/v1/completions', 200, 'text/event-stream', b'data: {}\n\ndata: [DONE]\n\n', ''),
    ('/generate', 500, 'application/json', b'{"detail": "no"}', 'status 500'),
    ('/generate', 400, 'application/json', b'{"detail": "no\\nno"}', 'a refusal that is not one line'),
    ('/generate', 400, 'application/json', b'{"detail": [1]}', 'a refusal that is not one line'),
    ('/v1/completions', 400, 'application/json', b'{"error": {}}', 'a refusal that is not one line'),
    ('/generate', 400, 'text/html', b'<html>', 'an answer that is no JSON'),
    ('/v1/completions', 200, 'text/event-stream', b'data: {}\n\n', 'a stream without its end'),
    ('/v1/completions', 200, 'text/event-stream', b'data: {"error": {}}\n\ndata: [DONE]\n\n',
     'a stream without its end'),
])
def test_answers_are_judged(path, status, kind, body, fault):
    assert judged(Case(path, 'noise', JSON, b''), status, kind, body) == fault


def test_the_report_counts_statuses_kinds_and_faults():
    cases = [Case('/a', 'noise', JSON, b'1'), Case('/a', 'long', JSON, b'2'), Case('/b', 'long', JSON, b'3'),
             Case('/b', 'client leaves', JSON, b'4', 0)]
    row = serving_bad_bodies.report(cases, [Answer(400, '', 0.5), Answer(500, 'status 500', 2.0),
                                            Answer(500, 'status 500', 1.0), Answer(0)])
    assert row['bodies'] == 4 and row['endpoints'] == 2 and row['slowest_seconds'] == 2.0
    assert row['statuses'] == {'400': 1, '500': 2, 'left': 1}
    assert row['kinds'] == {'client leaves': {'left': 1}, 'long': {'500': 2}, 'noise': {'400': 1}}
    assert row['faults'] == {'status 500': {'count': 2, 'path': '/a', 'kind': 'long', 'headers': JSON, 'bytes': 1,
                                            'body': "b'2'"}}


def test_a_soak_asks_for_all_kinds_and_one_in_ten_leaves():
    draw, reviews = random.Random(1), ['a', 'b', 'c', 'd', 'e']
    asks = [ask_of(draw, reviews, ['Negative', 'Positive']) for _ in range(2000)]
    count = lambda path: sum(ask.path == path for ask in asks)
    assert [count(path) / 2000 for path in dict.fromkeys(serving_soak.KINDS)] == pytest.approx([0.4, 0.3, 0.3], abs=.03)
    assert sum(ask.leaves is not None for ask in asks) / 2000 == pytest.approx(0.1, abs=0.02)
    draw = random.Random(1)
    assert asks == [ask_of(draw, reviews, ['Negative', 'Positive']) for _ in range(2000)]


def test_the_soak_s_slope_is_that_of_what_follows_the_first_quarter():
    """By hand: 3 MB for 1,000 requests after a jump that is not counted; what is neither 200, left nor 429 is an
    error."""
    samples = [Sample(10.0 * i, 100 * i, int((500e6 if i else 100e6) + 3e5 * i)) for i in range(41)]
    assert slope(samples[10:]) == pytest.approx(3.0)
    end = dict(active=1.0, waiting=2.0, in_flight=1.0, jit_compiles_after_ready=0.0)
    row = serving_soak.report(samples, {'200': 7, 'left': 2, '429': 1, 'cut stream': 3}, end)
    assert row['mb_per_1000_requests'] == 3.0 and row['errors'] == 3 and row['requests'] == 13
    assert row['rss_mb'] == [100.0, 503.0, 512.0] and row['slope_minutes'] == 5.0 and row['slope_requests'] == 3000
    assert (row['slots_leaked'], row['waiting_leaked'], row['in_flight_leaked']) == (1, 2, 0)
