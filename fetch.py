"""Fetch the models and the labelled set of the examples, by name, into a cache; none of them is in the repository.

    python fetch.py --list=True
    python fetch.py --name=smollm2-135m-instruct
    python fetch.py --name=rotten_tomatoes

Every other program understands these names wherever it takes a path.  program/assets.py has the table.
"""
from pathlib import Path

from program import flags, parse
from program.assets import ASSETS, cache_directory, fetch


def main(config) -> None:
    cache = Path(config.cache_dir) if config.cache_dir else cache_directory()
    if config.list or not config.name:
        for name, asset in ASSETS.items():
            state = 'fetched' if (cache / name).exists() else 'not fetched'
            print(f'{name}  ({asset.licence}; {state})\n    {asset.about}')
        print(f'cache: {cache}')
        return
    path = fetch(config.name, cache, config.verify)
    print(f'{path}\nuse it with {ASSETS[config.name].use.format(path=path)}')


if __name__ == '__main__':
    parse.run(main, flags.ASSETS)
