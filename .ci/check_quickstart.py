"""Check what `make quickstart` left: the fine-tuned model's accuracy on all test reviews, and one row a training step.

    python .ci/check_quickstart.py runs/quickstart
"""
import json
import pathlib
import sys

REVIEWS, STEPS, LEAST = 1062, 64, 0.80


def main(run: pathlib.Path) -> None:
    report = json.loads((run / 'after/evaluation.json').read_text(encoding='utf-8'))['results']['loglikelihood']
    rows = [json.loads(line) for line in (run / 'model/metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    steps = [row['step'] for row in rows]
    print(f'{run}: {report["correct"]} of {report["total"]} reviews right, {len(steps)} steps in metrics.jsonl')
    if report['total'] != REVIEWS:
        sys.exit(f'the evaluation is of {report["total"]} reviews, not of all {REVIEWS}')
    if report['correct'] < LEAST * REVIEWS:
        sys.exit(f'{report["correct"]} of {REVIEWS} reviews right is less than {LEAST:.0%}')
    if steps != list(range(STEPS)):
        sys.exit(f'metrics.jsonl has the steps {steps}, not 0 to {STEPS - 1}')


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
