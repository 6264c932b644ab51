"""Keep the best of a run's evaluations, and say when none has been better for long.  Next: loop.py.

What is known travels in the manifest of every checkpoint (`mark`), so a resumed run goes on with it.
"""
import dataclasses

METRICS = {  # name -> that of a row of metrics
    'accuracy': 'label_accuracy', 'f1': 'label_f1', 'loss': 'label_loss',  # of labels
    'exact_match': 'text_exact_match', 'token_f1': 'text_token_f1', 'field_f1': 'text_field_f1'}  # of free texts


@dataclasses.dataclass
class Best:
    """The best evaluation so far by `metric`, one of METRICS; loss is better when it is lower.

    patience: evaluations without a better one after which the run stops; 0: it never does.  step: micro-steps done at
    the best one, None before the first; row: its figures.  waited: evaluations since.
    """

    metric: str
    patience: int = 0
    step: int | None = None
    row: dict = dataclasses.field(default_factory=dict)
    waited: int = 0

    @property
    def name(self) -> str:
        """Return the metric's name in a row of metrics."""
        return METRICS[self.metric]

    @property
    def exhausted(self) -> bool:
        """Tell whether so many evaluations were no better that the run is to stop."""
        return bool(self.patience) and self.waited >= self.patience

    def add(self, step: int, row: dict) -> bool:
        """Take the evaluation after `step` micro-steps: whether it is better than all before (an equal one is not)."""
        sign = -1 if self.metric == 'loss' else 1
        better = self.step is None or sign * row[self.name] > sign * self.row[self.name]
        if better:
            self.step, self.row, self.waited = step, dict(row), 0
        else:
            self.waited += 1
        return better

    @property
    def mark(self) -> dict:
        """Return, JSON-able, what a checkpoint keeps of it: all but the patience."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != 'patience'}
