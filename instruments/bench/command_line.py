"""Run the programs of this room: a Mistake is one line and exit code 2, as program/parse.py has it for the others."""
import sys
from collections.abc import Callable

from absl import app

from mistake import Mistake


def run(main: Callable[[], None]) -> None:
    """Parse the flags that absl knows, call main(), and exit."""
    def called(argv):
        try:
            if len(argv) > 1:
                raise Mistake(f'{argv[1:]=}: every argument is a flag, --name=value')
            main()
        except (Mistake, OSError) as error:
            print(f'{sys.argv[0].rsplit("/", 1)[-1]}: {" ".join(str(error).split())}', file=sys.stderr)
            raise SystemExit(2) from None

    app.run(called)
