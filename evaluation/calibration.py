"""How far the probabilities of labels can be believed, and one temperature that mends it.

    p_y = exp(s_y / T) / Σ exp(s / T)             s: log-likelihoods of the labels' answers; T = 1 without calibration
    T   = argmin of the mean of -log p_label       on reviews that neither trained nor test the model

ECE: predictions in 15 equal bins of their probability, the mean over all of |share that is right - mean probability| of
their bin.  Brier: the mean of Σ_y (p_y - [y is the label])².  (Temperature scaling, ECE with 15 bins: Guo et al.,
arXiv 1706.04599.  Brier, Monthly Weather Review 78, 1950.)  No label changes: T is the same for all.
Neighbours: accuracy.py (the report), evaluate.py --calibrate (keeps T in the checkpoint), /classify (uses it).
"""
import json
import math
from pathlib import Path

import numpy as np

from mistake import Mistake

BINS = 15
RANGE = 0.05, 20.0  # temperatures that are looked at
FILE = 'calibration.json'


def probabilities(scores_RC: np.ndarray, temperature: float) -> np.ndarray:
    """Normalise log-likelihoods / temperature over the labels of each review."""
    z_RC = np.asarray(scores_RC, np.float64) / temperature
    p_RC = np.exp(z_RC - z_RC.max(axis=1, keepdims=True))
    return p_RC / p_RC.sum(axis=1, keepdims=True)


def measures(scores_RC: np.ndarray, labels_R: list[int], temperature: float) -> dict[str, float]:
    """Compute {'ece', 'brier', 'nll'} (nats) of reviews whose labels are labels_R."""
    p_RC, rows_R = probabilities(scores_RC, temperature), np.arange(len(labels_R))
    sure_R, right_R = p_RC.max(axis=1), p_RC.argmax(axis=1) == labels_R
    bin_R = np.minimum((sure_R * BINS).astype(int), BINS - 1)
    ece = sum(abs(right_R[bin_R == b].mean() - sure_R[bin_R == b].mean()) * (bin_R == b).mean()
              for b in np.unique(bin_R))
    brier = ((p_RC - np.eye(p_RC.shape[1])[labels_R]) ** 2).sum(axis=1).mean()
    nll = -np.log(np.maximum(p_RC[rows_R, labels_R], 1e-300)).mean()
    return {'ece': float(ece), 'brier': float(brier), 'nll': float(nll)}


def fit_temperature(scores_RC: np.ndarray, labels_R: list[int]) -> float:
    """Find the temperature in RANGE at which the labels are likeliest."""
    from scipy.optimize import minimize_scalar  # comes with jax; a server does not need it
    found = minimize_scalar(lambda log_t: measures(scores_RC, labels_R, math.exp(log_t))['nll'],
                            bounds=(math.log(RANGE[0]), math.log(RANGE[1])), method='bounded',
                            options={'xatol': 1e-6})
    return math.exp(found.x)


def report(scores_RC: np.ndarray, labels_R: list[int], temperature: float) -> dict:
    """Report what the temperature changes: {'temperature', 'before', 'after'} with `measures`."""
    return {'temperature': temperature, 'before': measures(scores_RC, labels_R, 1.0),
            'after': measures(scores_RC, labels_R, temperature)}


def write(checkpoint: Path, calibration: dict) -> Path:
    """Keep a fitted temperature, and what it was fitted on, in a checkpoint's directory."""
    path = checkpoint / FILE
    path.write_text(json.dumps(calibration, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return path


def read_temperature(checkpoint: Path | None) -> float:
    """Read the temperature that a checkpoint's directory keeps; 1.0 where it keeps none (or None is no directory).

    Raises Mistake, naming the file, for one that `write` did not make.
    """
    path = checkpoint and checkpoint / FILE
    if not path or not path.is_file():
        return 1.0
    try:
        temperature = float(json.loads(path.read_text(encoding='utf-8'))['temperature'])
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f'{path} is no calibration of evaluate.py ({error!r}): delete it, or --calibrate again') from None
    if not RANGE[0] <= temperature <= RANGE[1]:
        raise Mistake(f'{path}: {temperature=} must be from {RANGE[0]} to {RANGE[1]}: delete it, or --calibrate again')
    return temperature
