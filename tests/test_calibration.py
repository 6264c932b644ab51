"""Claims about evaluation/calibration.py, and its way through evaluate.py into a checkpoint and out of it."""
import json
import math

import numpy as np
import pytest

from evaluation import calibration
from mistake import Mistake


def drawn(temperature, count=4000, classes=3, seed=0):
    """Log-likelihoods, and labels drawn from their softmax at a temperature: the scores are off by just that."""
    random = np.random.default_rng(seed)
    scores_RC = random.normal(scale=3, size=(count, classes))
    p_RC = calibration.probabilities(scores_RC, temperature)
    return scores_RC, [int(random.choice(classes, p=p)) for p in p_RC]


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    """Within 8 % from 4,000 reviews; ECE and Brier fall where it is not 1, and the labels stay."""
    scores_RC, labels_R = drawn(temperature)
    found = calibration.fit_temperature(scores_RC, labels_R)
    assert abs(math.log(found / temperature)) < 0.08
    report = calibration.report(scores_RC, labels_R, found)
    assert report['after']['ece'] < 0.03 and report['after']['nll'] <= report['before']['nll']
    if temperature == 2.5:
        assert report['before']['ece'] > 0.15 and report['before']['brier'] > report['after']['brier'] + 0.03
    before, after = (calibration.probabilities(scores_RC, t).argmax(axis=1) for t in (1.0, found))
    np.testing.assert_array_equal(before, after)


def test_measures_by_hand():
    """Three reviews, two in one bin: p of the chosen label 0.8, 0.8 and 0.6, right, wrong, right."""
    p = np.array([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4]])
    found = calibration.measures(np.log(p), [0, 0, 0], 1.0)
    assert found['ece'] == pytest.approx((2 * abs(0.5 - 0.8) + abs(1 - 0.6)) / 3)
    assert found['brier'] == pytest.approx((2 * 0.2 ** 2 + 2 * 0.8 ** 2 + 2 * 0.4 ** 2) / 3)
    assert found['nll'] == pytest.approx(-(math.log(0.8) + math.log(0.2) + math.log(0.6)) / 3)
    assert calibration.measures(np.array([[-math.inf, -5.0]]), [1], 1.0) == {'ece': 0.0, 'brier': 0.0, 'nll': 0.0}


@pytest.mark.parametrize('content', ['{}', '[1]', 'no', '{"temperature": "x"}', '{"temperature": 0}',
                                     '{"temperature": NaN}'])
def test_a_file_that_is_no_calibration_is_named(tmp_path, content):
    """Its name and the remedy; without a file, or a directory, the temperature is 1."""
    assert calibration.read_temperature(tmp_path) == calibration.read_temperature(None) == 1.0
    (tmp_path / 'calibration.json').write_text(content)
    with pytest.raises(Mistake, match=r'calibration\.json.*--calibrate'):
        calibration.read_temperature(tmp_path)


def test_what_is_kept_is_read_again(tmp_path):
    """The temperature, to the bit."""
    path = calibration.write(tmp_path, calibration.report(np.array([[-1.0, -2.0]]), [0], 1.7))
    assert calibration.read_temperature(tmp_path) == 1.7 and json.loads(path.read_text())['after']['ece'] > 0
