"""The serving benchmark: its client's figures on a server whose times are known, its rows and its report."""
import asyncio
import json
import types

import numpy as np
import pytest

from instruments.bench import serving_mixes, serving_report
from instruments.bench.contenders import ours
from instruments.bench.contenders.contender import Settings, openai_protocol
from instruments.bench.serving_load import Ask, Outcome, ask_one, closed_loop, open_loop, percentile, summary
from instruments.bench.serving_machine import taken, tree
from mistake import Mistake
from program import flags
from program.parse import parse

BENCH = serving_mixes.Bench(list(range(5000)), lambda ids: ' '.join(map(str, ids)), 1, 1.0, 1.0, {}, ['a b c'])
PROTOCOL = openai_protocol('m', ignore_eos=True)


class Fake:
    """A server of streams over asyncio: `tokens` pieces, `gap` seconds apart, in chunks cut in odd places."""

    def __init__(self, gap=0.02, status=200, short=0, cut=7):
        self.gap, self.status, self.short, self.cut = gap, status, short, cut
        self.bodies, self.now, self.most, self.gone = [], 0, 0, 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, '127.0.0.1', 0)
        return self, f'http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}'

    async def __aexit__(self, *error):
        self.server.close()

    async def serve(self, reader, writer):
        head = await reader.readuntil(b'\r\n\r\n')
        size = int(head.lower().split(b'content-length: ')[1].split(b'\r\n')[0])
        body = json.loads(await reader.readexactly(size))
        self.bodies.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.status != 200:
                writer.write(f'HTTP/1.1 {self.status} No\r\nContent-Length: 4\r\n\r\nfull'.encode())
                return
            writer.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n')
            tokens = body['max_tokens'] - self.short
            events = [{'choices': [{'text': 'é'}]}] * tokens + [{'choices': [], 'usage': {'completion_tokens': tokens}}]
            for event in events:
                await asyncio.sleep(self.gap)
                self.chunks(writer, f'data: {json.dumps(event, ensure_ascii=False)}\n\n'.encode())
                await writer.drain()
            self.chunks(writer, b'data: [DONE]\n\n')
            writer.write(b'0\r\n\r\n')
        except ConnectionError:
            self.gone += 1
        finally:
            self.now -= 1
            writer.close()

    def chunks(self, writer, data):
        for i in range(0, len(data), self.cut):
            part = data[i:i + self.cut]
            writer.write(b'%x\r\n%s\r\n' % (len(part), part))


def ask(tokens=5, **fields):
    return Ask((1, 2, 3), 'abc', tokens, **fields)


def run(work, **fields):
    async def main():
        async with Fake(**fields) as (fake, url):
            return fake, await work(url)
    return asyncio.run(main())


def test_times_of_a_stream_are_those_of_its_pieces():
    """Chunks that cut lines and characters change nothing; the prompt goes out as ids."""
    fake, found = run(lambda url: ask_one(url, PROTOCOL, ask()))
    assert found.completed and found.text == 'ééééé' and found.tokens == 5 and len(found.times) == 5
    assert 0.02 <= found.ttft <= 0.2 and 0.02 <= found.tpot <= 0.2 and len(found.itl) == 4
    assert fake.bodies[0]['prompt'] == [1, 2, 3] and fake.bodies[0]['ignore_eos'] and fake.bodies[0]['stream']


def test_an_answer_of_another_length_and_a_refusal_are_failures():
    _, found = run(lambda url: ask_one(url, PROTOCOL, ask()), short=1)
    assert not found.completed and found.error == '4 tokens, not 5'
    _, found = run(lambda url: ask_one(url, PROTOCOL, ask()), status=429)
    assert (found.status, found.error, found.completed) == (429, 'full', False)
    assert summary([found])['refused'] == summary([found])['failed'] == 1


def test_a_client_that_leaves_closes_its_connection():
    async def work(url):
        found = await ask_one(url, PROTOCOL, ask(200, leaves=2))
        await asyncio.sleep(0.2)
        return found
    fake, found = run(work, gap=0.01)
    assert found.left and len(found.times) == 2 and (fake.now, fake.gone) == (0, 1)
    assert (summary([found])['left'], summary([found])['failed']) == (1, 0)


def test_a_closed_loop_keeps_so_many_under_way_and_an_open_one_does_not_wait():
    fake, found = run(lambda url: closed_loop(url, PROTOCOL, [ask(n) for n in (3, 1, 2, 4, 5)], 2))
    assert fake.most == 2 and [outcome.tokens for outcome in found] == [3, 1, 2, 4, 5]
    fake, found = run(lambda url: open_loop(url, PROTOCOL, [ask(30)] * 6, 100.0))
    assert fake.most == 6 and all(outcome.completed for outcome in found)


def outcome(start, ttft, end, tokens):
    return Outcome(ask(tokens), start, 200, times=[ttft, end], end=end, tokens=tokens)


def test_figures_are_those_of_a_sum_by_hand():
    """Two requests: 0.5 s to the first token and 0.1 s a token; 3 s and 0.2 s."""
    figures = summary([outcome(10.0, 0.5, 1.5, 11), outcome(11.0, 3.0, 5.0, 11)], slo=(2.0, 0.15))
    assert figures['duration'] == 6.0 and figures['completed'] == 2 and figures['total_output_tokens'] == 22
    assert figures['output_throughput'] == round(22 / 6, 3) and figures['total_token_throughput'] == round(28 / 6, 3)
    assert figures['request_goodput'] == round(1 / 6, 4) and figures['mean_ttft_ms'] == 1750.0
    assert figures['median_tpot_ms'] == 150.0 and figures['p99_e2el_ms'] == 1500 + 0.99 * 3500


def test_percentiles_are_numpy_s():
    values = np.random.default_rng(0).exponential(size=37).tolist()
    assert all(np.isclose(percentile(values, share), np.quantile(values, share)) for share in (0, 0.5, 0.9, 0.99, 1))


def test_prompts_have_the_lengths_of_their_mix_and_are_the_same_for_all():
    first, again = (BENCH.asks(300, *serving_mixes.MIXED, seed=3) for _ in range(2))
    assert first == again != BENCH.asks(300, *serving_mixes.MIXED, seed=4)
    sizes, tokens = [len(a.prompt) for a in first], [a.tokens for a in first]
    assert 16 <= min(sizes) < 40 and 250 < max(sizes) <= 512 and 16 <= min(tokens) and max(tokens) <= 256
    assert 75 < np.median(sizes) < 110  # the middle of 16 and 512 is 90.5
    assert first[0].text == ' '.join(map(str, first[0].prompt))


def test_a_counter_of_metrics_is_summed_over_its_labels():
    text = '# HELP x\npallama_active 2\n'
    text += 'pallama_cached_tokens_total{a="1 2"} 3\npallama_cached_tokens_total{a="2"} 4.0\n'
    assert serving_mixes.read_counter(text, 'cached_tokens_total') == 7
    assert serving_mixes.read_counter(text, 'active') == 2 and serving_mixes.read_counter(text, 'slots') is None


def test_a_process_s_memory_and_time_are_seen():
    import os
    memory, seconds = taken(os.getpid())
    assert os.getpid() in tree(os.getpid()) and memory > 10e6 and seconds > 0.1


def row(contender, mix, repeat=0, point=1, **figures):
    before = {'loadavg': 0.1, 'read_gb_s': 10.0 + repeat}
    return {'contender': contender, 'mix': mix, 'repeat': repeat, 'point': point, 'bits': 32.0, 'before': before,
            'after': before, **figures}


def test_the_report_has_medians_ranges_losses_and_faults():
    rows = [row('ours f32', 'M1', n, median_ttft_ms=value, mbu=0.5) for n, value in enumerate((10.0, 30.0, 20.0))]
    rows += [row('llama-server F32', 'M1', error='Mistake: gone')]
    found = serving_report.medians(rows)
    assert found[0]['figures']['median_ttft_ms'] == [20.0, 10.0, 30.0] and found[0]['read_gb_s'] == [10.0, 12.0]
    text = serving_report.tables(found)
    assert '| ours f32 | 32 | 1 | 20 (10 to 30) | 50 | 0 |' in text and 'Mistake: gone' in text
    assert 'FAILED: Mistake: gone' in serving_report.line(rows[-1])


def test_scores_stand_beside_those_of_transformers():
    """Of two contexts one is answered alike; the largest difference is 0.6 nats."""
    judge = row('transformers batch 1', 'M5', scores=[-1.0, -2, -3, -4, -4, -3, -2, -1])
    mine = row('ours f32', 'M5', scores=[-1.0, -2, -3, -4, -4, -3, -1.5, -1.6])
    found = serving_report.compared([mine, judge])[0]
    assert found['max_abs_diff'] == pytest.approx(0.6) and found['same_choice'] == 0.5 and 'scores' not in found


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip('matplotlib')
    rows = serving_report.medians([row('a', 'M1', output_throughput=5.0), row('a', 'M2', 0, 4, output_throughput=9.0)])
    serving_report.draw(rows, tmp_path / 'x.png')
    assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('kind, most', [('F32', 0.0), ('F16', 1e-3), ('Q8_0', 0.02)])
def test_a_gguf_file_in_another_type_has_the_same_weights(tmp_path, kind, most):
    gguf = pytest.importorskip('gguf')
    from instruments.bench.contenders import llama
    weights = np.random.default_rng(0).uniform(-1, 1, (8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / 'a.gguf', 'llama')
    writer.add_block_count(3)
    writer.add_array('tokenizer.ggml.tokens', ['a', 'b'])
    writer.add_tensor('output.weight', weights)
    writer.add_tensor('norm.weight', weights[0])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    reader = gguf.GGUFReader(llama.write(str(tmp_path / 'a.gguf'), kind, tmp_path / 'b.gguf'))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors['output.weight'].tensor_type.name == kind and tensors['norm.weight'].tensor_type.name == 'F32'
    read = gguf.quants.dequantize(tensors['output.weight'].data, tensors['output.weight'].tensor_type)
    assert np.abs(read - weights).max() <= most
    assert reader.fields['tokenizer.ggml.tokens'].contents() == ['a', 'b']
    assert reader.fields['llama.block_count'].contents() == 3


@pytest.mark.parametrize('dtype', ours.BITS)
def test_serve_py_knows_the_flags_of_our_own_contender(dtype):
    settings = Settings(slots=8, length=1792, input_length=1536, threads=2, reuse=False)
    _, *given = ours.contender(dtype, 'gguf::model.gguf').command(5007, settings)
    read = parse(given, flags.SERVE, '')
    assert read.lm_server.model_name == 'pallama'  # the name by which the client asks
    assert (read.lm_server.batch_size, read.lm_server.prefix_reuse, read.seq_length) == (8, False, 1792)


def test_a_contender_that_does_not_answer_is_refused_before_it_is_measured():
    async def server():
        async with Fake(status=404) as (_, url):
            running = types.SimpleNamespace(url=url, protocol=PROTOCOL, contender=types.SimpleNamespace(name='fake'))
            await asyncio.to_thread(serving_mixes.warm, BENCH, running)

    with pytest.raises(Mistake, match='fake does not answer: full'):
        asyncio.run(server())
