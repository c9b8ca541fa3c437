# Every target first creates a virtual environment and installs what it needs: .venv, created with BASE,
# with the torch of requirements/torch.txt. With PYTHON=path/to/python, build/venv-path-to-python is
# created instead; it uses the torch of that interpreter (2.11 or newer, any build).

BASE ?= python3

ifdef PYTHON
VENV := build/venv-$(subst /,-,$(PYTHON))
TORCH := $(VENV)/torch.txt
SAYS_TORCH := torch of $(PYTHON)
else
VENV := .venv
TORCH := requirements/torch.txt
SAYS_TORCH := torch 2.13 (on Linux pip takes a CUDA build: 2.8 GB to download, 5 GB on disk, 3 minutes or more)
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
READY_RUN := $(VENV)/ready-run
READY := $(VENV)/ready
TRITON := $(VENV)/triton
KERNELS := tests/backends/triton

# The tests to run, for example TESTS=tests/cli/test_command.py; by default all.
TESTS ?=

.PHONY: run test test-slow audit test-integrations test-pages test-triton coverage bench docs lint sanitize neon format clean

run: $(READY_RUN)
	$(PY) -m batchnorm demo

# One process per core, at most 4: each test computes on one thread.
test: $(READY)
	$(PY) -m pytest -m "not slow and not audit and not cuda" -n auto --maxprocesses 4 --dist worksteal $(TESTS)

test-slow: $(READY)
	$(PY) -m pytest -m "slow and not audit and not cuda" -n auto --maxprocesses 2 --dist worksteal $(TESTS)

# Long tests that .ci/run does not run: networks step by step, millions of values on every code path.
# --dist loadfile runs tests of a file in one process: two tests of huge tensors would exceed memory.
audit: $(READY)
	$(PY) -m pytest -m "audit and not cuda" -n auto --maxprocesses 2 --dist loadfile --timeout 900 $(TESTS)

# Tests of callbacks with the real libraries, and of ONNX files; only they need these packages.
test-integrations: $(READY)
	@echo "Installing requirements/integrations.txt"
	$(PIP) --constraint $(TORCH) --requirement requirements/integrations.txt
	$(PY) -m pytest tests/interop tests/diagnosis tests/surgery tests/docs -k "trainers or onnx or keras or pt2e or schedule_free" -m "not cuda and not audit"

# Tests of the pages in a browser (Debian: chromium); without it they are reported as skipped.
test-pages: $(READY)
	$(PIP) --requirement requirements/pages.txt
	$(PY) -m pytest tests/report tests/demo -k "in_browser" -m "not cuda" -rs

# The Triton kernels without a GPU: run by Triton's interpreter in numpy, and compiled for Hopper.
# Two commands in parallel: tests of the kernels, and the tests of all backends with this backend.
test-triton: $(READY) $(TRITON)/ready
	(	PYTHONPATH=$(TRITON) $(PY) -m pytest $(KERNELS)/test_driver.py \
			$(KERNELS)/test_compiled_ahead.py && \
		TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(PY) -m pytest $(KERNELS)/test_kernels.py \
			$(KERNELS)/test_session.py \
	) & kernels=$$!; \
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(PY) -m pytest -m "not slow and not audit" -k "triton and not threads" \
		-n auto --maxprocesses 2 --dist worksteal \
		tests/backends/test_contract.py tests/backends/test_accuracy_bounds.py; \
	suite=$$?; wait $$kernels && exit $$suite

$(TRITON)/ready: requirements/triton.txt | $(READY)
	@echo "Installing Triton into $(TRITON): 0.2 GB to download, 0.7 GB on disk"
	$(PIP) --upgrade --no-deps --target $(TRITON) --requirement requirements/triton.txt
	touch $@

coverage: $(READY)
	$(PY) -m pytest -m "not audit and not cuda" --cov --cov-report=term

# Measures layers in two memory regimes: "kept" preloads tcmalloc (Debian: libtcmalloc-minimal4), or
# sets glibc's tunables without it. benchmarks/networks.py measures networks.
bench: $(READY)
	$(PY) -m batchnorm bench --out benchmarks/data/latest

docs: $(READY)
	$(PY) -m mkdocs build --strict --quiet

lint: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) benchmarks/figures.py --check
	$(PY) -m batchnorm.diagnosis.page docs/rules.md --check

# Looks for memory errors, undefined behaviour and races in the native kernels, run without Python.
sanitize:
	cmake -S . -B build/asan -DBATCHNORM_STRESS=ON -DBATCHNORM_OPENMP=OFF -DBATCHNORM_SANITIZE=address,undefined
	cmake --build build/asan --parallel 2
	UBSAN_OPTIONS=halt_on_error=1 build/asan/stress
	cmake -S . -B build/tsan -DBATCHNORM_STRESS=ON -DBATCHNORM_OPENMP=OFF -DBATCHNORM_SANITIZE=thread
	cmake --build build/tsan --parallel 2
	TSAN_OPTIONS=halt_on_error=1 build/tsan/stress

# The kernels for AArch64, compiled and run by an emulator (Debian: g++-aarch64-linux-gnu, qemu-user).
neon:
	cmake -S . -B build/neon -DCMAKE_TOOLCHAIN_FILE=native/aarch64.cmake -DBATCHNORM_STRESS=ON -DBATCHNORM_OPENMP=OFF
	cmake --build build/neon --parallel 2
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/stress

format: $(READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

$(PY):
ifdef PYTHON
	$(PYTHON) requirements/share_torch.py $(VENV)
else
	$(BASE) -m venv $(VENV)
endif

# Packages for the demo.
$(READY_RUN): requirements/torch.txt requirements/run.txt pyproject.toml CMakeLists.txt $(wildcard native/*) | $(PY)
	@echo "Installing what the demo needs into $(VENV): 50 MB to download, 0.5 GB on disk, a minute,"
	@echo "with $(SAYS_TORCH)"
	$(PIP) --requirement $(TORCH) --requirement requirements/run.txt
	@echo "Compiling the CPU kernels: 1 to 3 minutes on two cores"
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Packages for tests, lint, pages and measurements; third-party networks only with the pinned torch.
$(READY): requirements/dev.txt requirements/networks.txt $(READY_RUN)
	@echo "Installing what tests, lint and pages need into $(VENV): 70 MB to download, 0.3 GB on disk, a minute"
	$(PIP) --requirement $(TORCH) --requirement requirements/dev.txt \
		$$(grep -q -f requirements/torch.txt $(TORCH) && echo --requirement requirements/networks.txt)
	touch $@

clean:
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .hypothesis .coverage
