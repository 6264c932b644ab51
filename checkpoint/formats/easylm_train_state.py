"""Reads EasyLM's whole train state (`trainstate::`): a run goes on where EasyLM left it.  Neighbours: easylm.py.

The file is a flax TrainState as flax.serialization.to_state_dict lays it out: step, params, opt_state.  opt_state is
optax 0.1.7's: a tuple by position ('0', '1', ..) of the chain clip -> AdamW or Adafactor (themselves chains) ->
scheduled weight decay, inside MultiSteps where gradients are accumulated.  States without arrays leave no key.  Every
part counts optimizer steps by itself.  Momenta and second moments are trees like the weights, so they are turned like
them: rotary order, transposed head.  `layout` is the whole of it, for reading and for writing (easylm_writer.py).
"""
import numpy as np

from checkpoint.formats.easylm import Reader
from mistake import Mistake

_ADAMW = [  # key below the chain -> what lies there; a name without scalar meaning is a tree like the weights
    ('1/0/count', 'count'), ('1/0/mu/params', 'momentum'), ('1/0/nu/params', 'second_moment'), ('1/2/count', 'count')]
_PARAMETER_SCALE = [
    ('1/0/count', 'count'), ('1/0/v_row/params', 'unfactored'), ('1/0/v_col/params', 'unfactored'),
    ('1/0/v/params', 'second_moment'), ('1/1/count', 'count'), ('1/3/count', 'count'), ('1/3/ema/params', 'momentum'),
    ('2/inner_state/count', 'count')]


def layout(parameter_scale: bool, accumulated: bool) -> list[tuple[str, str]]:
    """[(key, what)] in the order of the file.

    what: 'step' (micro-steps), 'count' (optimizer steps), 'micro_step' (of the optimizer step begun), or a tree like
    the weights: 'params', 'momentum', 'second_moment', 'mean_gradient', and 'unfactored', a zero for each weight.
    """
    inner = 'opt_state/inner_opt_state/' if accumulated else 'opt_state/'
    chain = [(inner + key, what) for key, what in (_PARAMETER_SCALE if parameter_scale else _ADAMW)]
    weights = [('step', 'step'), ('params/params', 'params')]
    if not accumulated:
        return weights + chain
    return (weights + [('opt_state/mini_step', 'micro_step'), ('opt_state/gradient_step', 'count')] + chain
            + [('opt_state/acc_grads/params', 'mean_gradient')])


class TrainStateReader:
    """A train state opened for reading.

    scalars: 'optimizer.count' and 'optimizer.micro_step', int32, by the names of our checkpoints.
    Raises Mistake if the file was saved with another kind of optimizer.
    """

    def __init__(self, file: Reader, parameter_scale: bool, accumulated: bool):
        self._file = file
        self._check('optimizer.accumulate_gradient_steps', 'opt_state/acc_grads/', accumulated, ' above 1', '=1')
        inner = 'opt_state/inner_opt_state/' if accumulated else 'opt_state/'
        self._check('optimizer.adamw_optimizer.multiply_by_parameter_scale', f'{inner}1/3/ema/', parameter_scale,
                    '=True', '=False')
        self._roots = {what: key for key, what in layout(parameter_scale, accumulated)}
        self.scalars = {'optimizer.count': self._file.array(self._roots['count']).astype(np.int32),
                        'optimizer.micro_step': np.int32(self._file.array(self._roots['micro_step']))
                        if accumulated else np.int32(0)}

    def _check(self, flag: str, root: str, wanted: bool, yes: str, no: str) -> None:
        stored = any(key.startswith(root) for key in self._file.keys)
        if stored != wanted:
            raise Mistake(f'{self._file.path} was saved with {flag}{yes if stored else no}: set the flag so, or '
                             'take the weights alone with trainstate_params::')

    def tree(self, what: str) -> Reader:
        """A reader of 'params', 'momentum', 'second_moment' or 'mean_gradient': names, shape, tensor."""
        return self._file.under(self._roots[what] + '/')


def read_step(file: Reader) -> int:
    """Read the micro-steps that EasyLM had done."""
    step = file.array('step')
    if step.shape or step.dtype != np.int32 or step < 0:
        raise Mistake(f'{file.path}: step={step} must be a whole number')
    return int(step)
