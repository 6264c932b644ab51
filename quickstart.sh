#!/bin/sh
# The article's four steps with a small model: prepare, train, evaluate, serve.  The Makefile calls it and sets PYTHON,
# RUN (a directory), MODEL, REVIEWS and RECIPE; the arguments go to prepare_data.py.
set -eu
step() { printf '\n== %s\n' "$1"; shift; printf '$ %s\n' "$*"; "$@"; }
began=$(date +%s)

if [ ! -f "$RUN/before/evaluation.json" ]; then
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
rm -rf "$RUN/after"
step "4 of 4: the fine-tuned model on all test reviews" \
  "$PYTHON" evaluate.py --load_checkpoint="$RUN/model" --input="$REVIEWS" --split=test --sample_tokens=24 \
  --output_dir="$RUN/after" --before="$RUN/before/evaluation.json"

cat <<END

== done in $(($(date +%s) - began)) s
The confusion matrices: $RUN/before/confusion_matrix.png and $RUN/after/confusion_matrix.png
The training curve, a row a step: $RUN/model/metrics.jsonl

Next, serve the model, and ask it from another terminal:
  $PYTHON serve.py --load_checkpoint=$RUN/model --input_length=128 --seq_length=144 --lm_server.batch_size=16
  curl "http://127.0.0.1:5007/generate" -H "Content-Type: application/json" -X POST \\
    --data-binary '{"prefix_text": ["[Text]: a fine film .\\n[Sentiment]:"], "temperature": 0}'
  curl "http://127.0.0.1:5007/generate" -H "Content-Type: application/json" -X POST \\
    --data-binary @$RUN/data/eval_test.json
Longer: make quickstart-full trains on all 8,485 reviews once.
END
