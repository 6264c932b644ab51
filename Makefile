# make help says what there is.  Each target sets up what it needs: a virtual environment in .venv with the exact
# versions of constraints.txt, and what it fetches in ~/.cache/pallama (or $PALLAMA_CACHE).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CACHE := $(shell echo $${PALLAMA_CACHE:-$$HOME/.cache/pallama})
RUNS ?= runs
MODEL := gguf::$(CACHE)/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf
REVIEWS := $(CACHE)/rotten_tomatoes
.PHONY: help quickstart quickstart-full test test-long test-oracle test-tpu test-browser compile-tpu benchmark-tpu benchmark-cpu bench-serve lint figures readme model assets

help:  ## this list
	@sed -n 's/^\([a-z -]*\):.*## *\(.*\)/  make \1#\2/p' Makefile | \
	  while IFS='#' read -r target text; do printf '%-26s%s\n' "$$target" "$$text"; done
	@echo 'PYTHON=python3.13 VENV=.venv313 take another Python; RUNS=DIRECTORY takes the place of runs/.'

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
quickstart: assets  ## fetch, measure, fine-tune on 1,024 reviews, measure again
	PYTHON=$(BIN)/python RUN=$(RUNS)/quickstart MODEL='$(MODEL)' REVIEWS='$(REVIEWS)' RECIPE=configs/quickstart.py \
	  GO_ON='make quickstart' sh quickstart.sh --sample_size=1024

quickstart-full: assets  ## the same with one epoch of all 8,485 training reviews
	PYTHON=$(BIN)/python RUN=$(RUNS)/quickstart-full MODEL='$(MODEL)' REVIEWS='$(REVIEWS)' RECIPE=configs/quickstart_full.py \
	  GO_ON='make quickstart-full' sh quickstart.sh

test: $(VENV)/installed-test model  ## the tests, but for those of the four targets below
	@echo "== running the tests, one process a core"
	$(BIN)/python -m pytest -n auto --maxprocesses=8

test-long: $(VENV)/installed-test  ## those of about a minute each: two processes train, the curve on more meshes, kernels
	$(BIN)/python -m pytest -m long -n auto --maxprocesses=8

test-oracle: $(VENV)/installed-oracle  ## what we write, read by transformers itself (installs torch)
	@echo "== running the tests against transformers"
	$(BIN)/python -m pytest -m oracle tests/test_transformers.py

test-tpu: $(VENV)/installed-test $(VENV)/installed-tpu  ## kernels and steps through the TPU compiler, without a TPU (installs libtpu, 700 MB)
	$(BIN)/python -m pytest -m libtpu

test-browser: $(VENV)/installed-browser  ## the server's page in a headless Chromium (needs chromium and chromedriver)
	$(BIN)/python -m pytest -m browser tests/test_page.py

readme: $(VENV)/installed-test  ## run every command that README.md, BUILD.md and docs/ print, in a bare clone of HEAD
	$(BIN)/python -m instruments.documents.commands

lint: $(VENV)/installed-test  ## ruff
	$(BIN)/ruff check .

figures: $(VENV)/installed-test  ## write the tables of the documents from docs/figures/*.json
	$(BIN)/python -m instruments.documents.figures

compile-tpu: $(VENV)/installed-test $(VENV)/installed-tpu  ## every kernel at every shape for v4, v5e, v5p and v6e
	$(BIN)/python -m instruments.bench.compile_all --target=v4,v5e,v5p,v6e

benchmark-tpu: $(VENV)/installed-test $(VENV)/installed-tpu  ## the table of the kernels' static times: hours
	$(BIN)/python -m instruments.bench.attention --target=v5e,v6e

benchmark-cpu: $(VENV)/installed-oracle  ## seconds a training step beside a torch loop (installs torch)
	$(BIN)/python -m instruments.bench.cpu_training --variant=ynn:--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT --output=$(RUNS)/benchmark_cpu.json

# llama.cpp's own server, out of the source that pip's package brings
LLAMA := $(RUNS)/llama_cpp
$(LLAMA)/build/bin/llama-server: $(VENV)/installed-bench
	@echo "== building llama-server (half an hour on two cores)"
	mkdir -p $(LLAMA)
	$(BIN)/python -m pip download --progress-bar=off --no-deps --no-binary llama-cpp-python -c constraints.txt -d $(LLAMA) llama-cpp-python
	tar xzf $(LLAMA)/llama_cpp_python-*.tar.gz -C $(LLAMA)
	cmake -S $(LLAMA)/llama_cpp_python-*/vendor/llama.cpp -B $(LLAMA)/build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON
	cmake --build $(LLAMA)/build --target llama-server -j 2

MINUTES ?= 5
MIXES ?= M1,M2,M3,M4,M5,M6,M7,M8,M9
bench-serve: assets $(LLAMA)/build/bin/llama-server  ## our server beside llama.cpp and transformers: hours (MIXES=M1,M2 MINUTES=1 for fewer)
	$(BIN)/python -m instruments.bench.serving --checkpoint='$(MODEL)' --text=$(REVIEWS)/train.jsonl --mixes=$(MIXES) --minutes=$(MINUTES) --llama_server=$(LLAMA)/build/bin/llama-server --output=$(RUNS)/serving
