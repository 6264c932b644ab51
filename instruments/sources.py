"""Identify what a stored figure was made by: hashes of source files, versions of packages."""
import hashlib
import importlib.metadata
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


def digest(*places: str) -> str:
    """Hash the .py and .json files at these places of the repository, folders with all that is in them."""
    found = set()
    for place in places:
        path = ROOT / place
        found |= set(path.rglob('*')) if path.is_dir() else {path}
    sha = hashlib.sha256()
    for path in sorted(path for path in found if path.suffix in ('.py', '.json')):
        sha.update(path.relative_to(ROOT).as_posix().encode() + b'\0' + path.read_bytes())
    return sha.hexdigest()


def version(package: str) -> str | None:
    """Look up a package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
