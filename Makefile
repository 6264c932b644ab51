# make quickstart        fetch, measure, fine-tune on 1,024 reviews, measure again
# make quickstart-full   the same with one epoch of all 8,485 training reviews
# make test              all tests
# make test-long         the tests that take about a minute each (two processes train, the curve on more meshes, kernels)
# make test-oracle       what we write, read by transformers itself (installs torch)
# make test-tpu          the kernels through the TPU compiler, without a TPU (installs libtpu, 700 MB)
# make compile-tpu       every kernel at every shape for v4, v5e, v5p and v6e
# make benchmark-tpu     the table of the kernels' static times: hours
# make benchmark-cpu     seconds a training step beside a torch loop (installs torch)
# make lint              ruff
# Each target sets up what it needs: a virtual environment in .venv with the exact versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CACHE := $(shell echo $${PALLAMA_CACHE:-$$HOME/.cache/pallama})
RUNS ?= runs
MODEL := gguf::$(CACHE)/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf
REVIEWS := $(CACHE)/rotten_tomatoes
.PHONY: quickstart quickstart-full test test-long test-oracle test-tpu compile-tpu benchmark-tpu benchmark-cpu lint model assets

$(VENV)/installed-%: pyproject.toml constraints.txt
	@echo "== installing the extra '$*' into $(VENV) (a minute or two the first time)"
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar=off -c constraints.txt -e '.[$*]' & pid=$$!; seconds=0; \
	  while sleep 1 && kill -0 $$pid 2>/dev/null; do seconds=$$((seconds + 1)); \
	    [ $$((seconds % 8)) -ne 0 ] || echo "   ... pip works, $$seconds s"; done; wait $$pid
	@touch $@

model: $(VENV)/installed-all
	@echo "== the model (93 MB) into $(CACHE)"
	$(BIN)/python fetch.py --name=smollm2-135m-instruct

assets: model
	@echo "== the reviews (2.5 MB) into $(CACHE)"
	$(BIN)/python fetch.py --name=rotten_tomatoes

# XLA's other library for matrix products on the CPU: about a tenth faster here than its default (LOG.md)
quickstart quickstart-full: export XLA_FLAGS := --xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT
quickstart quickstart-full: assets
	PYTHON=$(BIN)/python RUN=$(RUNS)/$@ MODEL='$(MODEL)' REVIEWS='$(REVIEWS)' RECIPE=configs/$(subst -,_,$@).py \
	  sh quickstart.sh $(if $(filter quickstart,$@),--sample_size=1024)

test: $(VENV)/installed-test model
	@echo "== running the tests, one process a core"
	$(BIN)/python -m pytest -n auto --maxprocesses=8

test-long: $(VENV)/installed-test
	$(BIN)/python -m pytest -m long -n auto --maxprocesses=8

test-oracle: $(VENV)/installed-oracle
	@echo "== running the tests against transformers"
	$(BIN)/python -m pytest -m oracle tests/test_transformers.py

test-tpu: $(VENV)/installed-test $(VENV)/installed-tpu
	$(BIN)/python -m pytest -m libtpu

compile-tpu: $(VENV)/installed-test $(VENV)/installed-tpu
	$(BIN)/python -m instruments.bench.compile_all --target=v4,v5e,v5p,v6e

benchmark-tpu: $(VENV)/installed-test $(VENV)/installed-tpu
	$(BIN)/python -m instruments.bench.attention --target=v5e,v6e

benchmark-cpu: $(VENV)/installed-oracle
	$(BIN)/python -m instruments.bench.cpu_training --variant=ynn:--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT --output=$(RUNS)/benchmark_cpu.json

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
