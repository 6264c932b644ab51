"""Write a run's numbers: to DIR/metrics.jsonl always, to TensorBoard and Weights & Biases when asked for.

One JSON object per logged step: step, loss, accuracy, learning_rate, gradient_norm, param_norm, tokens_per_second,
seconds (since the run began, earlier parts of a resumed run included), and what the caller adds (data position,
evaluation).
"""
import json
import os
import pathlib
import random
import time

from mistake import Mistake


class MetricsWriter:
    """Write rows to `output_dir`/metrics.jsonl; of an earlier attempt, those before `resume_step` stay.

    process: number of the process that writes; from 1 on it is in the names (metrics-1.jsonl).  enabled: False writes
    nothing at all (all processes but the first, unless each is to have its log).
    tensorboard: also write scalars to output_dir/tensorboard (extra `tensorboard`).  wandb: keyword arguments of
    wandb.init, or None (extra `wandb`), which is asked after up to wandb_delay seconds.  Raises Mistake naming the flag
    when the extra is not installed.
    """

    def __init__(self, output_dir: pathlib.Path, *, resume_step: int = 0, tensorboard: bool = False,
                 wandb: dict | None = None, wandb_delay: float = 0.0, process: int = 0, enabled: bool = True):
        suffix = f'-{process}' if process else ''
        self.path, self.enabled, self.seconds_before = output_dir / f'metrics{suffix}.jsonl', enabled, 0.0
        if not enabled:
            return
        kept = []
        if self.path.exists():
            kept = [row for row in map(json.loads, self.path.read_text().splitlines()) if row['step'] < resume_step]
        if kept:
            self.seconds_before = kept[-1]['seconds']
        whole = self.path.with_name(f'{self.path.name}.new')  # a kill in the middle leaves the old file
        whole.write_text(''.join(json.dumps(row) + '\n' for row in kept), encoding='utf-8')
        os.replace(whole, self.path)
        self._file = open(self.path, 'a', encoding='utf-8', buffering=1)
        self._tensorboard = _open_tensorboard(output_dir / f'tensorboard{suffix}') if tensorboard else None
        self._wandb = _open_wandb(wandb, suffix, wandb_delay) if wandb is not None else None

    def write(self, step: int, row: dict) -> None:
        """Write {'step': step} | row; values are plain numbers."""
        if not self.enabled:
            return
        self._file.write(json.dumps(dict(step=step) | row) + '\n')
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if self._tensorboard:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Close the files and end the Weights & Biases run."""
        if not self.enabled:
            return
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _open_tensorboard(directory: pathlib.Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise Mistake("logger.tensorboard=True needs the extra: pip install -e '.[tensorboard]'") from None
    return SummaryWriter(str(directory))


def _open_wandb(options: dict, suffix: str, delay: float):
    try:
        import wandb
    except ImportError:
        raise Mistake("logger.online=True needs the extra: pip install -e '.[wandb]'") from None
    if 'id' in options:
        options = options | dict(id=options['id'] + suffix)
    if 'dir' in options:
        pathlib.Path(options['dir']).mkdir(parents=True, exist_ok=True)
    time.sleep(random.uniform(0, delay))
    return wandb.init(**options)
