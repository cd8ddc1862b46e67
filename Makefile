# Two commands from a fresh clone: `make demo` and `make test`. Each sets up .venv by itself.
#
#   make test ARGS="-k rotary -x"    options for pytest
#   make demo ARGS="--lora"          options for the demonstration
#   make bench ARGS="decode --shape small --batch 1 4"
#   make test TORCH="torch==2.11.0"  another torch (a fresh .venv: run `make clean` first)
#   make test JOBS=1                 one process

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
            $p -c 'import sys; sys.version_info >= (3, 11) and print("$p")' 2>/dev/null)))
VENV   ?= .venv
JOBS   ?= logical
ARGS   ?=

# A pinned release takes the build for CPUs where one is at hand; a range takes the newest build
# for CUDA, several GB. A machine with a GPU is asked for the latter.
TORCH  ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11,torch==2.13.0)

RUN    := $(VENV)/bin/python
READY  := $(VENV)/.ready
PYTEST := $(RUN) -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal
TYPED  := build/typed

# The oldest releases that setup.cfg names, in an environment of their own, and what users rely on
# most: the laws, generate, the key of plans, the training graph.
OLDEST     := build/oldest
OLD_PACKAGES := torch transformers peft rich
OLD_TESTS  := tests/laws tests/generate tests/compat tests/cache/test_key.py \
              tests/engine/test_train_graph.py
oldest      = $(shell sed -n 's/^ *$(1)>=\([0-9.]*\)$$/$(1)==\1.*/p' setup.cfg | head -1)

.PHONY: test test-oldest test-deep test-device golden mutants demo bench bench-peers lint format clean

test: $(READY)
	$(PYTEST) $(ARGS)

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal $(OLD_TESTS) $(ARGS)

test-deep: $(READY)
	HYPOTHESIS_PROFILE=deep $(PYTEST) -m deep $(ARGS)

# What users rely on, on a device that is not the CPU: one that tests/other_device compiles.
test-device: $(READY)
	PYTHONPATH=tests $(PYTEST) -p other_device.on_pretend tests/laws $(ARGS)

# The generated sources that tests/golden keeps, written anew.
golden: $(READY)
	$(RUN) tests/golden/regenerate.py

# Break the source on purpose and show the test that notices, on a copy of the tree.
mutants: $(READY)
	$(RUN) tests/mutation/run.py $(ARGS)

demo: $(READY)
	$(RUN) examples/grpo.py $(ARGS)

# Speed, as ratios against transformers and against what the machine allows; all workloads on the
# shape of Qwen2-0.5B unless ARGS names others.
bench: $(READY)
	$(RUN) benchmarks/run.py $(ARGS)

# The same against vLLM on a CPU, in a process and an environment of its own, which the first run
# makes under build/peers.
bench-peers: $(READY)
	$(RUN) benchmarks/bench_peers.py $(ARGS)

# passes/ is installed as hybrid_fx.passes; mypy reads a copy that stands as it is installed.
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	cp -r hybrid_fx $(TYPED)/ && cp -r passes $(TYPED)/hybrid_fx/passes
	$(RUN) -m mypy --config-file setup.cfg $(TYPED)/hybrid_fx

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(OLDEST)/.ready: setup.cfg pyproject.toml
	"$(PYTHON)" -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q "$(call oldest,torch)"
	$(OLDEST)/bin/python -m pip install -q -e ".[test]" \
	    $(foreach p,$(OLD_PACKAGES),"$(call oldest,$(p))")
	@touch $@

# The stamp is written last: an interrupted set-up is started again. A python that already has a
# torch for its GPU lends it to .venv.
$(READY): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one: make PYTHON=..."; exit 1; }
	@if "$(PYTHON)" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then site=--system-site-packages; else site=; fi; \
	set -x; "$(PYTHON)" -m venv $$site $(VENV)
	$(RUN) -m pip install -q "$(TORCH)"
	$(RUN) -m pip install -q -e ".[test]"
	@touch $(READY)
