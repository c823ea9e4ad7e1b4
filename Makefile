# Every target works on a fresh machine with Python 3.10 to 3.13, pip, git and a C++ compiler. The first target creates
# $(VENV) and installs the versions pinned in constraints.txt. Later targets find the stamp and start at once.
#   PYTHON=python3.12   the Python that creates the environment
#   ARGS='...'          additional arguments for the command of the target
#   CONFIG=FILE         the comparison of gpu-compare
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CONFIG ?= configs/gpu_smollm2.yaml

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
# PATH finds `deepspeed`, and `ninja`, which builds DeepSpeed's C++ operators. The environment keeps the compiled
# operators, because another environment would compile them again.
RUN := PATH="$(BIN):$$PATH" TORCH_EXTENSIONS_DIR="$(abspath $(VENV))/torch_extensions"
# Two workers, each with whole files, because a worker keeps its ranks alive from one test to the next. The files come in
# the order of tests/conftest.py.
RUN_TESTS := $(RUN) OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

CHECK_PYTHON := import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	"error: hift_ds needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.12" % v)
CHECK_HEADERS := import os, sys, sysconfig; \
	sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
CHECK_DEVICE := import sys; from deepspeed.accelerator import get_accelerator; \
	sys.exit(3 if get_accelerator().device_name() == "cpu" else 0)
# Sets the shell's `device` to 0 if $(PYTHON) finds a GPU. An unpacked copy (docs/offline.md) has a file COMMIT. No
# environment is set up for it: its packages are beside it, and there may be no network.
FIND_DEVICE = device=0; said=$$("$(PYTHON)" -c '$(CHECK_DEVICE)' 2>&1 >/dev/null) || device=$$?; \
	if [ -f COMMIT ] && [ $$device = 3 ]; then \
		echo "error: DeepSpeed finds no GPU with $(PYTHON); see nvidia-smi, and DS_ACCELERATOR, which must not be cpu" >&2; \
		exit 1; \
	elif [ -f COMMIT ] && [ $$device != 0 ]; then \
		echo "error: deepspeed cannot be imported by $(PYTHON); in this shell, run: . '$(abspath ..)/env.sh'" >&2; \
		echo "$$said" | tail -n 1 >&2; \
		exit 1; \
	fi

.DEFAULT_GOAL := help
.PHONY: help setup quickstart compare test test-fast test-slow lint typecheck format bench gpu-check gpu-compare clean

help:
	@echo "make setup        set up $(VENV), and do nothing else"
	@echo "make quickstart   set up, then fine-tune a small model with HiFT (writes runs/quickstart)"
	@echo "make compare      set up, then compare all methods on a tiny model and built-in tasks, with a report"
	@echo "make test         set up, then run the tests without the long proofs (ten minutes on two cores)"
	@echo "make test-fast    set up, then run the tests that start no ranks (2.5 minutes on two cores)"
	@echo "make test-slow    set up, then run the long proofs (hours), which make test leaves out"
	@echo "make lint         set up, then run ruff check, ruff format --check and mypy"
	@echo "make format       set up, then sort the imports and format the code"
	@echo "make bench        set up, then measure step times of HiFT, full fine-tuning and a plain loop"
	@echo "make gpu-check    check weights, memory and step times on this machine's GPU, with what is installed"
	@echo "make gpu-compare  compare methods by $(CONFIG) on this machine's GPU, with what is installed"
	@echo "make clean        remove $(VENV), builds and caches (runs/ stays)"

setup: $(KERNELS)

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "error: $(PYTHON) is not found: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c '$(CHECK_PYTHON)'
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "error: $(PYTHON) lacks venv and ensurepip (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null && "$(PYTHON)" -c '$(CHECK_HEADERS)' || \
		echo "warning: no C++ compiler, or no Python.h (Debian, Ubuntu: apt install g++ python3-dev):" \
			"DeepSpeed cannot build CPU Adam, which offload_optimizer: cpu needs" >&2
	@echo "== setup: $(VENV) with $$("$(PYTHON)" --version)"
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)"
	@echo "== setup: torch, as pinned in constraints.txt"
	@"$(BIN)/python" -m pip install "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@echo "== setup: hift_ds and everything else it needs, as pinned in constraints.txt"
	@"$(BIN)/python" -m pip install -c constraints.txt -e '.[all]'
	@touch "$@"

# A kernel that cannot be compiled is not an error here. Only the commands that need it fail.
$(KERNELS): $(STAMP)
	@echo "== setup: DeepSpeed's C++ kernels (minutes, once)"
	@$(RUN) python -m hift_ds.launch.runtime.kernels
	@touch "$@"

quickstart: $(STAMP)
	@echo "== quickstart: python launch/quickstart.py $(ARGS)"
	@$(RUN) python launch/quickstart.py $(ARGS)

compare: $(STAMP)
	@echo "== compare: python -m evaluation.compare --config configs/compare_tiny.yaml $(ARGS)"
	@$(RUN) python -m evaluation.compare --config configs/compare_tiny.yaml $(ARGS)

test: $(KERNELS)
	@echo "== test: pytest $(ARGS) (without the long proofs of make test-slow)"
	@$(RUN_TESTS) $(ARGS)

test-fast: $(KERNELS)
	@echo "== test-fast: pytest -m fast $(ARGS)"
	@$(RUN_TESTS) -m fast $(ARGS)

test-slow: $(KERNELS)
	@echo "== test-slow: pytest -m slow $(ARGS)"
	@$(RUN_TESTS) -m slow --timeout=3600 $(ARGS)

lint: $(STAMP)
	@echo "== lint: ruff check"
	@$(RUN) ruff check .
	@echo "== lint: ruff format --check"
	@$(RUN) ruff format --check .
	@$(MAKE) --no-print-directory typecheck

typecheck: $(STAMP)
	@echo "== typecheck: mypy"
	@$(RUN) mypy

format: $(STAMP)
	@$(RUN) ruff check --select I --fix .
	@$(RUN) ruff format .

bench: $(STAMP)
	@echo "== bench: python -m evaluation.efficiency $(ARGS)"
	@$(RUN) python -m evaluation.efficiency $(ARGS)

# With a GPU, $(PYTHON) runs what is installed for it. Without one, the environment runs the same code on a tiny model.
gpu-check:
	@$(FIND_DEVICE); if [ $$device = 0 ]; then \
		echo "== gpu-check: $(PYTHON) -m evaluation.gpu_check $(ARGS)"; \
		"$(PYTHON)" -m evaluation.gpu_check $(ARGS); \
	else \
		$(MAKE) --no-print-directory $(STAMP) && echo "== gpu-check: without a GPU, on a tiny model" && \
		$(RUN) python -m evaluation.gpu_check $(ARGS); \
	fi

# As gpu-check. Without a GPU, the tiny model of `make compare` is trained in two processes.
gpu-compare:
	@$(FIND_DEVICE); if [ $$device = 0 ]; then \
		echo "== gpu-compare: $(PYTHON) -m evaluation.compare --config $(CONFIG) $(ARGS)"; \
		"$(PYTHON)" -m evaluation.compare --config "$(CONFIG)" $(ARGS); \
	else \
		$(MAKE) --no-print-directory $(STAMP) && echo "== gpu-compare: without a GPU, on a tiny model" && \
		$(RUN) python -m evaluation.compare --config configs/compare_tiny.yaml --jobs 2 $(ARGS); \
	fi

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find hift_ds launch evaluation tests -name __pycache__ -type d -prune -exec rm -rf {} +
