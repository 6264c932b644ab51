"""Keep the rows of plan.py in a JSON file, so that each is compiled once for the same flags and sources."""
import dataclasses
import json
import pathlib
from collections.abc import Callable

from checkpoint.writing import appears_whole
from instruments.planning.one_mesh import MeshPlan, read_plan
from instruments.sources import digest, version
from mistake import Mistake

SOURCES = ('model', 'kernels', 'training', 'serving', 'instruments', 'data')  # a row follows from them and its flags
PACKAGES = ('jax', 'jaxlib', 'libtpu')


class PlanFile:
    """Hold the rows of one question.

    path: of the JSON file; None keeps the rows in memory only.
    flags: all that the rows follow from but mesh and batch size, JSON-ready; rows of other flags, sources or packages
      are dropped.
    Raises Mistake for a file that is none of ours.
    """

    def __init__(self, path: pathlib.Path | None, flags: dict):
        self._path = path
        packages = {name: version(name) for name in PACKAGES}
        self._question = dict(flags=flags, sources=digest(*SOURCES), packages=packages)
        self._rows = self._held() if path and path.exists() else []

    def _held(self) -> list[dict]:
        try:
            held = json.loads(self._path.read_text(encoding='utf-8'))
            return held['rows'] if held['question'] == self._question else []
        except (ValueError, KeyError, TypeError):
            raise Mistake(f'output={str(self._path)!r} was not written by plan.py: choose another file') from None

    def plan(self, mesh_dim: str, batch_size: int, compile_one: Callable[[int], MeshPlan]) -> MeshPlan:
        """Look up the row of a mesh, as the user wrote it, and a batch size; or make it by compile_one(batch_size)."""
        for values in self._rows:
            if (values['mesh_dim'], values['batch_size']) == (mesh_dim, batch_size):
                return read_plan(values)
        plan = compile_one(batch_size)
        self._rows.append(dataclasses.asdict(plan))
        self._write()
        return plan

    def finish(self, best: MeshPlan, command: str) -> None:
        """Write the plan that was chosen, and the command that runs it, beside the rows."""
        self._write(chosen=dataclasses.asdict(best), command=command)

    def _write(self, **more) -> None:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with appears_whole(self._path, replace=True) as temporary:
                temporary.write_text(json.dumps(dict(question=self._question, rows=self._rows) | more, indent=1) + '\n',
                                     encoding='utf-8')
