#!/bin/sh
# The article's four steps with a small model: prepare, train, evaluate, serve.  The Makefile calls it and sets PYTHON,
# RUN (a directory), MODEL, REVIEWS, RECIPE and GO_ON (the command that calls it); the arguments go to prepare_data.py.
# What is done already is kept: stopped at any point, the same command goes on.
set -eu
step() { printf '\n== %s\n' "$1"; shift; printf '$ %s\n' "$*"; "$@"; }
trap 'printf "\nStopped. What is done is kept: %s goes on from there.\n" "$GO_ON"; exit 130' INT
began=$(date +%s)

if [ ! -f "$RUN/before/confusion_matrix.png" ]; then  # the last file that evaluate.py writes
  rm -rf "$RUN/before"
  step "1 of 4: how well does the pretrained model do on test reviews, without any training? (a sample of 320)" \
    "$PYTHON" evaluate.py --load_checkpoint="$MODEL" --input="$REVIEWS" --split=test --sample_size=320 \
    --sample_tokens=24 --output_dir="$RUN/before"
fi
step "2 of 4: labelled reviews become text records" \
  "$PYTHON" prepare_data.py --input="$REVIEWS" --split=train --record_fields=text,prompt,answer --output="$RUN/data" "$@"
step "and the test reviews the body of a request" \
  "$PYTHON" prepare_data.py --input="$REVIEWS" --split=test --output="$RUN/data"
step "3 of 4: fine-tune" \
  "$PYTHON" train.py --config="$RECIPE" --load_checkpoint="$MODEL" \
  --train_dataset.json_dataset.path="$RUN/data/train.jsonl" --logger.output_dir="$RUN/model" --resume=True
# an evaluation of this very model is kept: it is newer than the last row of the training
if [ ! "$RUN/after/confusion_matrix.png" -nt "$RUN/model/metrics.jsonl" ]; then
  rm -rf "$RUN/after"
  step "4 of 4: the fine-tuned model on all test reviews" \
    "$PYTHON" evaluate.py --load_checkpoint="$RUN/model" --input="$REVIEWS" --split=test --sample_tokens=24 \
    --output_dir="$RUN/after" --before="$RUN/before/evaluation.json"
fi

cat <<END

== done in $(($(date +%s) - began)) s
The confusion matrices: $RUN/before/confusion_matrix.png and $RUN/after/confusion_matrix.png
The training curve, a row a step: $RUN/model/metrics.jsonl

Next, serve the model, and ask it from another terminal:
  $PYTHON serve.py --load_checkpoint=$RUN/model --input_length=128 --seq_length=144
  curl "http://127.0.0.1:5007/generate" -H "Content-Type: application/json" -X POST \\
    --data-binary '{"prefix_text": ["[Text]: a fine film .\\n[Sentiment]:"], "temperature": 0}'
Longer: make quickstart-full trains on all 8,485 reviews once.

END
"$PYTHON" - "$RUN" <<'END'
import json, sys
for part, name in ('before', 'the pretrained model'), ('after', 'the fine-tuned model'):
    with open(f'{sys.argv[1]}/{part}/evaluation.json', encoding='utf-8') as file:
        report = json.load(file)['results']['loglikelihood']
    low, high = report['interval_95']
    print(f'accuracy of {name}: {report["accuracy"]:.2%} of {report["total"]:,} test reviews (95 % interval {low:.2%} to {high:.2%})')
END
