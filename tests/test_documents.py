"""The documents: printed commands are run, tables are those of the committed rows, and README is one page."""
import dataclasses
import json
import os
import pathlib
import re
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest

from evaluation.accuracy import wilson_interval
from instruments.bench import attention, shapes
from instruments.documents import commands, figures
from instruments.documents.commands import Failed, Runner, read_fences, run_fences
from instruments.planning.one_mesh import MeshPlan
from instruments.tpu.estimate import Estimate

ROOT = pathlib.Path(__file__).parent.parent
SMALL = shapes.AttentionShape(B=1, T=64, H=2, K=1, D=64)
DOCUMENTS = [ROOT / name for name in commands.documents(ROOT)]
SERVER = """
import http.server, os, signal, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'Ready!')
server = http.server.HTTPServer(('127.0.0.1', int(sys.argv[1].split('=')[1])), Ready)
signal.signal(signal.SIGTERM, lambda *_: os._exit(int(sys.argv[2])))
server.serve_forever()
"""


@pytest.fixture
def runner(tmp_path):
    (tmp_path / 'outputs').mkdir()
    (tmp_path / 'clone').mkdir()
    (tmp_path / 'clone/server.py').write_text(SERVER)
    runner = Runner(tmp_path / 'clone', tmp_path / 'outputs', timeout=30)
    yield runner
    runner.kill()


def document(*fences: tuple[str, str]) -> str:
    return '\n'.join(f'Words.\n```{language}\n{body}\n```' for language, body in fences)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


# ---------------------------------------------------------------- the runner


def test_commands_run_in_the_order_printed_and_see_what_earlier_ones_wrote(runner, capsys):
    """Comments and other languages are left out; a backslash and an open quote join lines; `python` is this one."""
    text = document(('bash', "# not a command\necho one > a\n\ncat a > b \\\n  && echo 'two\nthree' >> b"),
                    ('yaml', 'false'),
                    ('bash', "python -c 'import sys; print(sys.executable)' >> b"))
    summary = run_fences(read_fences('README.md', text), runner)
    assert (runner.directory / 'b').read_text() == f'one\ntwo\nthree\n{sys.executable}\n'
    assert summary.startswith('3 commands ran, 0 listed')
    assert capsys.readouterr().out.count('exit code 0') == 3


def test_a_command_that_fails_fails_the_document_and_shows_its_output(runner):
    """What follows it is not run; a failure before a pipe and a command that hangs count too."""
    text = document(('bash', 'echo the reason; exit 3\ntouch later'))
    with pytest.raises(Failed, match=r'exit 3\nended with exit code 3; its output ends\nthe reason'):
        run_fences(read_fences('README.md', text), runner)
    assert not (runner.directory / 'later').exists()
    with pytest.raises(Failed, match='ended with exit code 1'):
        runner.run('false | cat')
    with pytest.raises(Failed, match='did not end within 0.5 s'):
        Runner(runner.directory, runner.directory, timeout=0.5).run('sleep 60')


def test_a_marked_fence_is_listed_with_its_reason_and_not_run(runner, capsys):
    text = document(('bash tpu', 'touch marked'), ('bash', 'touch plain'), ('bash cloud hours', 'touch marked\nfalse'))
    summary = run_fences(read_fences('BUILD.md', text), runner)
    assert summary.startswith('1 commands ran, 3 listed (tpu 1, cloud 2)')
    assert not (runner.directory / 'marked').exists() and (runner.directory / 'plain').exists()
    out = capsys.readouterr().out
    assert '-- not run here (needs a TPU): touch marked' in out
    assert '-- not run here (needs a Google Cloud project, takes hours): false' in out


def test_a_server_stays_for_the_next_fence_and_must_end_with_0(runner):
    """The fence after `serve` finds it ready, the one after that finds it gone."""
    port = free_port()
    ask = f'python -c "import urllib.request as r; print(r.urlopen(\'http://127.0.0.1:{port}/\').read())"'
    text = document(('bash serve', f'python server.py --lm_server.port={port} 0'), ('bash', ask), ('bash', f'! {ask}'))
    assert run_fences(read_fences('README.md', text), runner).startswith('3 commands ran')
    text = document(('bash serve', f'python server.py --lm_server.port={port} 7'), ('bash', ask))
    with pytest.raises(Failed, match='ended with exit code 7'):
        run_fences(read_fences('README.md', text), runner)
    with pytest.raises(Failed, match='is not ready after [0-4] s'):
        runner.serve(f'echo --lm_server.port={port}')


@pytest.mark.parametrize('text, says', [
    (document(('bash sometimes', 'true')), r"README.md:2: \['sometimes'\] is none of the marks"),
    ('```bash\ntrue\n', 'README.md:1: this fence is not closed'),
    (document(('bash', "echo 'open")), "README.md:2: the command \"echo 'open\" does not end in its fence"),
])
def test_a_document_that_cannot_be_read_is_refused_with_its_line(text, says):
    with pytest.raises(ValueError, match=says):
        read_fences('README.md', text)


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_the_documents_is_valid_bash(path):
    """And none with something left out (…) stands where it would be run."""
    for fence in read_fences(path.name, path.read_text()):
        for command in fence.commands:
            checked = subprocess.run(['bash', '-n', '-c', command], capture_output=True, text=True)
            assert not checked.returncode, (path.name, fence.line, checked.stderr)
            assert fence.reasons or '…' not in command, (path.name, fence.line)


# ---------------------------------------------------------------- the figures


@pytest.mark.parametrize('path', figures.documents(), ids=lambda path: path.name)
def test_the_tables_are_those_of_the_committed_rows(path):
    """A figure changed by hand, in a document or in a row, is noticed; `make figures` writes the blocks again."""
    text = path.read_text()
    assert figures.rewritten(text, path.name) == text


def test_every_block_stands_in_a_document_and_unknown_ones_are_refused():
    named = {name for path in figures.documents() for _, name, _, _ in figures.BLOCK.findall(path.read_text())}
    assert named == set(figures.BLOCKS)
    with pytest.raises(ValueError, match="X.md: block 'weather' is none of"):
        figures.rewritten('<!-- figures: weather -->\n<!-- end -->\n', 'X.md')
    with pytest.raises(ValueError, match='not closed'):
        figures.rewritten('<!-- figures: plans -->\n', 'X.md')


@pytest.mark.parametrize('path', sorted(ROOT.glob('docs/figures/*.json')), ids=lambda path: path.name)
def test_rows_say_where_they_come_from(path):
    """Command, machine, versions, date and commit; the rows of easylm.json name tests instead (test_article.py)."""
    held = json.loads(path.read_text())
    assert held['rows']
    assert path.stem == 'easylm' or all(held[name] for name in ('command', 'machine', 'versions', 'date', 'commit'))


def test_rows_have_the_names_that_the_tools_write():
    """So that a new plan.py --output or rows.jsonl takes the place of what stands there; `model` and `topology` of the
    larger plans are the table's own."""
    read = {name: json.loads((ROOT / f'docs/figures/{name}.json').read_text())
            for name in ('plans', 'lora_plans', 'kernels')}
    plan, estimated = ({field.name for field in dataclasses.fields(x)} for x in (MeshPlan, Estimate))
    for row in read['plans']['rows'] + read['plans']['larger'] + read['plans']['largest']:
        assert set(row) - {'model', 'topology'} <= plan and set(row.get('estimate') or ()) <= estimated
        assert set(row.get('parts', ())) <= {'parameters', 'optimizer', 'activations'}
    for row in read['lora_plans']['rows']:
        assert set(row) - {'model', 'topology', 'flags'} == plan and set(row['estimate']) == estimated
        assert set(row['parts']) == {'base', 'adapters', 'optimizer', 'activations'}
    for row in read['kernels']['rows']:
        about = attention.describe(row['shape'], SMALL, row['kernel'], row['pass'], None, row['target'])
        assert set(row) <= {*about, 'method', 'ms', 'bundles', 'hot'}
        assert row['shape'] in {**shapes.ATTENTION, **shapes.DECODE} and row['kernel'] in attention.KERNELS


def test_the_results_table_has_wilson_intervals_and_kernels_the_fastest_other():
    """By hand: 8 of 10 right is 49.02 to 94.33 %; 2 ms beside 8 and 4 is 0.50."""
    row = dict(model='m', training='t', total=10, correct=8, commit='c', date='d')
    assert wilson_interval(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert '| m | t | 80.00 % of 10 | 49.02 to 94.33 % |  | c, d |' in figures.results(dict(rows=[row]))
    rows = [{'shape': 's1', 'pass': 'forward', 'target': 'v5e', 'kernel': kernel, 'ms': ms, 'bundles': 1200}
            for kernel, ms in (('ours', 2.0), ('flash', 8.0), ('splash', 4.0))]
    assert '| 2.000 | 4.000 splash | **0.50** | 1.2k (1.2k) |' in figures.kernels(dict(rows=rows))


# ---------------------------------------------------------------- README and CI


def test_the_readme_is_one_page():
    """At most 9,000 bytes, no line above 160 columns."""
    text = (ROOT / 'README.md').read_bytes()
    assert len(text) <= 9000
    assert not [line for line in text.decode().splitlines() if len(line) > 160]


def test_the_readme_s_figures_stand_in_its_blocks():
    """No measured figure (a number with a unit) is written by hand, outside the blocks and the commands."""
    text = re.sub(r'```.*?```', '', figures.BLOCK.sub('', (ROOT / 'README.md').read_text()), flags=re.DOTALL)
    units = r'%|ms|s|min|minutes|hours|[kMGT]i?B|tokens/s|times|steps'
    assert not re.findall(rf'\d[\d.,]* ?(?:{units})(?![\w/])', text)


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_links_of_the_documents_lead_to_files(path):
    for target in re.findall(r'\]\(([^)#]+)\)', path.read_text()):
        assert '://' in target or (path.parent / target).exists(), target


@pytest.mark.parametrize('change, says', [
    ({}, None), (dict(correct=849), 'less than 80%'), (dict(total=320, correct=300), 'of 320 reviews'),
    (dict(steps=63), 'not 0 to 63'),
])
def test_ci_refuses_a_quickstart_that_did_not_reach_its_accuracy(tmp_path, change, says):
    """All 1,062 reviews, 850 of them right, 64 rows of metrics."""
    report = dict(total=1062, correct=850, steps=64) | change
    (tmp_path / 'after').mkdir()
    (tmp_path / 'model').mkdir()
    (tmp_path / 'after/evaluation.json').write_text(json.dumps(dict(results=dict(loglikelihood=report))))
    rows = (json.dumps(dict(step=n)) + '\n' for n in range(report['steps']))
    (tmp_path / 'model/metrics.jsonl').write_text(''.join(rows))
    main = runpy.run_path(str(ROOT / '.ci/check_quickstart.py'))['main']
    if says is None:
        main(tmp_path)
    else:
        with pytest.raises(SystemExit, match=says):
            main(tmp_path)


# ---------------------------------------------------------------- the quickstart

PROGRAM = """#!/bin/sh
[ "$1" = - ] && exec {python} "$@"
echo "$1" >> called
for word; do case $word in
  --output_dir=*|--logger.output_dir=*) out=${{word#*=}}; mkdir -p "$out" ;;
esac; done
case $1 in
  evaluate.py)
    echo '{{"results": {{"loglikelihood":' > "$out/evaluation.json"
    echo '{{"accuracy": 0.75, "total": 4, "interval_95": [0.3, 0.95]}}}}}}' >> "$out/evaluation.json"
    echo > "$out/confusion_matrix.png" ;;
  train.py)
    if [ ! -f trained ]; then touch training; sleep 30; exit 130; fi
    [ -f "$out/metrics.jsonl" ] || echo > "$out/metrics.jsonl"; sleep 1.1 ;;
esac
"""


def test_the_quickstart_goes_on_where_it_was_stopped_and_ends_with_the_accuracy(tmp_path):
    """Ctrl-C during the training says how to go on; then the first evaluation is kept, and at the third call both."""
    program = tmp_path / 'python'
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    environment = dict(PATH=os.environ['PATH'], PYTHON=str(program), RUN='run', MODEL='m', REVIEWS='r', RECIPE='c',
                       GO_ON='make quickstart')

    def quickstart(stop: bool = False) -> tuple[int, list[str], list[str]]:
        (tmp_path / 'called').unlink(missing_ok=True)
        process = subprocess.Popen(['sh', ROOT / 'quickstart.sh'], cwd=tmp_path, env=environment, text=True,
                                   stdout=subprocess.PIPE, start_new_session=True)
        while stop and not (tmp_path / 'training').exists():
            assert process.poll() is None
            time.sleep(0.05)
        if stop:
            os.killpg(process.pid, signal.SIGINT)
        lines = process.communicate(timeout=60)[0].splitlines()
        return process.returncode, lines, (tmp_path / 'called').read_text().split()

    code, lines, called = quickstart(stop=True)
    assert (code, lines[-1]) == (130, 'Stopped. What is done is kept: make quickstart goes on from there.')
    assert called == ['evaluate.py', 'prepare_data.py', 'prepare_data.py', 'train.py']
    (tmp_path / 'trained').touch()
    code, lines, called = quickstart()
    assert (code, called) == (0, ['prepare_data.py', 'prepare_data.py', 'train.py', 'evaluate.py'])
    assert lines[-2:] == [f'accuracy of the {model} model: 75.00% of 4 test reviews (95 % interval 30.00% to 95.00%)'
                          for model in ('pretrained', 'fine-tuned')]
    code, lines, called = quickstart()
    assert (code, called) == (0, ['prepare_data.py', 'prepare_data.py', 'train.py'])
