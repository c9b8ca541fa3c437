# Every target makes and fills .venv by itself. With PYTHON=path/to/python, an interpreter that
# already has torch is used instead, and nothing is installed.

BASE ?= python3
VENV := .venv

ifdef PYTHON
PY := PYTHONPATH=src $(PYTHON)
PY_TRITON := PYTHONPATH=build/triton:src $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
PY_TRITON := PYTHONPATH=build/triton $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: run test test-slow test-integrations test-triton coverage bench docs lint sanitize neon format clean

run: $(READY)
	$(PY) -m batchnorm demo

test: $(READY)
	$(PY) -m pytest -m "not slow and not cuda"

test-slow: $(READY)
	$(PY) -m pytest -m "slow and not cuda"

# The callbacks with the real libraries, which are no requirement of anything else.
test-integrations: $(READY)
	$(PY) -m pip install --quiet --requirement requirements/integrations.txt
	$(PY) -m pytest tests/test_integrations.py -m "not cuda"

# The Triton kernels without a GPU: run by Triton's interpreter in numpy, and compiled for Hopper.
# Two lanes side by side; the suite of every backend runs with this one.
test-triton: $(READY) build/triton/ready
	(	$(PY_TRITON) -m pytest tests/kernels/test_ahead.py tests/kernels/test_launch.py && \
		TRITON_INTERPRET=1 $(PY_TRITON) -m pytest \
			tests/kernels/test_triton.py tests/kernels/test_hostile.py tests/kernels/test_session.py \
	) & kernels=$$!; \
	TRITON_INTERPRET=1 $(PY_TRITON) -m pytest -m "not slow" -k "triton and not threads" \
		tests/test_ops.py tests/test_bounds.py tests/test_accuracy.py; \
	suite=$$?; wait $$kernels && exit $$suite

build/triton/ready: requirements/triton.txt | $(READY)
	$(or $(PYTHON),$(VENV)/bin/python) -m pip install --quiet --upgrade --no-deps \
		--target build/triton --requirement requirements/triton.txt
	touch $@

coverage: $(READY)
	$(PY) -m pytest -m "not cuda" --cov --cov-report=term

bench: $(READY)
	$(PY) -m batchnorm bench --out benchmarks/data/latest
	$(PY) benchmarks/readme.py benchmarks/data/latest/rows.csv README.md README.zh.md

docs: $(READY)
	$(PY) -m mkdocs build --strict --quiet

lint: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# Memory errors, undefined behaviour and races of the native kernels, without Python around them.
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

$(VENV)/ready: requirements/dev.txt pyproject.toml CMakeLists.txt $(wildcard native/*)
	$(BASE) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --requirement requirements/dev.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .hypothesis .coverage
