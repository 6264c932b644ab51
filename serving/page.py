"""Hold the page in memory: the files of page/, read once, and the headers they go out with.  After: api.py.

GET / is index.html, GET /page/NAME each other file; nothing of a request is ever a path on disk.  The page holds no
secret and asks for the API key itself, so these paths answer without one.
"""
from pathlib import Path
from typing import NamedTuple

KINDS = {'.html': 'text/html; charset=utf-8', '.css': 'text/css; charset=utf-8',
         '.js': 'text/javascript; charset=utf-8'}
HEADERS = {  # its own scripts and styles alone, and no server but this one
    'Content-Security-Policy': "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',
    'Cache-Control': 'no-store',
}


class PageFile(NamedTuple):
    """One file: its Content-Type and its bytes."""

    kind: str
    content: bytes


def read_page() -> dict[str, PageFile]:
    """Read {path of the URL: its file}."""
    files = sorted(file for file in Path(__file__).with_name('page').iterdir() if file.suffix in KINDS)
    return {'/' if file.name == 'index.html' else f'/page/{file.name}': PageFile(KINDS[file.suffix], file.read_bytes())
            for file in files}
