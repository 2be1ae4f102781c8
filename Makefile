# make demo: the main job on a made-up brain, or on VOLUME=file. make test: all tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH = torch==2.13.0
PIP = $(BIN)/pip -qq --disable-pip-version-check
EXTRA = $(BIN)/python -c "import sys, tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][sys.argv[1]])"
SOURCES = setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)
WHEELS ?= wheels
OUT ?= build/gpu-check
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test browser lint docs fuzz bench bench-gpu gpu-wheels gpu-check wheel-check clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info)' \
	  || { echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1); pass PYTHON=/path/to/python3.12"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch first and pinned: any other order can pull another build of it
$(VENV)/torch.stamp: $(BIN)/python
	@echo "installing $(TORCH)"
	@$(PIP) install "$(TORCH)" 2>/dev/null || $(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp $(SOURCES)
	@echo "building and installing ddmd"
	@$(PIP) install "$(TORCH)" -e ".[phantom]"
	@touch $@

# more than the demo needs, so that nothing is built twice
$(VENV)/test.stamp: $(VENV)/torch.stamp $(SOURCES)
	@echo "building and installing ddmd and what its tests need"
	@$(PIP) install "$(TORCH)" -e ".[test]" cmake ninja
	@touch $(VENV)/demo.stamp $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	@$(PIP) install $$($(EXTRA) lint)
	@touch $@

demo: $(VENV)/demo.stamp
ifdef VOLUME
	@$(BIN)/ddmd detect "$(VOLUME)" -o out/demo --overwrite
else
	@echo "making a phantom (1 mm) with three lesions"
	@$(BIN)/ddmd phantom out/phantom --seed 1 > /dev/null
	@$(BIN)/ddmd detect out/phantom/phantom-1_flair.nii.gz -o out/demo --overwrite
	@echo "where the lesions really are: out/phantom/phantom-1_lesion.nii.gz"
endif

test: $(VENV)/test.stamp
	@$(BIN)/cmake -S . -B build/ctest -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" > build-ctest.log 2>&1 \
	  && $(BIN)/cmake --build build/ctest --target ddmd_test >> build-ctest.log 2>&1 \
	  || { cat build-ctest.log; exit 1; }
	@rm -f build-ctest.log
	@build/ctest/ddmd_test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Chromium for the tests of `ddmd report`, which skip themselves where there is none.
browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
	  && apt-get update -qq > build-browser.log 2>&1 \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >> build-browser.log 2>&1; \
	then rm -f build-browser.log; echo "Chromium is installed"; \
	else rm -f build-browser.log; echo "no Chromium, and no way to install it: the tests of the report's page will be skipped"; fi

lint: $(VENV)/lint.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Two minutes of mutated volumes, weights and tables: each must end in success or one clear line.
# The same ones every time, so that a change is judged by what it changes; make fuzz SEED=$$RANDOM looks further.
SEED ?= 1
fuzz: $(VENV)/test.stamp
	@$(BIN)/python -m tests.fuzz --seconds 120 --seed $(SEED)

# The documentation site, in build/site. A warning is an error, and nothing is fetched.
$(VENV)/docs.stamp: $(BIN)/python
	@$(PIP) install $$($(EXTRA) docs)
	@touch $@

docs: $(VENV)/docs.stamp
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# --benchmark-only measures; results go where benchmarks.table reads them
RESULT = benchmarks/results/$(shell $(BIN)/python -c "from benchmarks.timing import machine; print(machine())" 2>/dev/null)-$(shell date +%F).json
bench bench-gpu: $(VENV)/test.stamp
	@mkdir -p benchmarks/results
	@$(BIN)/python -m pytest benchmarks/test_ops.py --benchmark-only --benchmark-json="$(RESULT)" -o addopts=-q
	@$(BIN)/python -m benchmarks.end_to_end
	@$(BIN)/python -m benchmarks.table

# What gpu-check needs beyond an image with torch, Triton, pytest and the usual scientific packages.
gpu-wheels: $(VENV)/torch.stamp
	@$(PIP) download --no-deps --only-binary=:all: -d "$(WHEELS)" nibabel zlib-ng monai diffusers importlib-metadata nilearn \
	  pytest-benchmark py-cpuinfo accelerate tensorboard tensorboard-data-server absl-py grpcio markdown protobuf werkzeug

# On a machine with a GPU, offline, in under nine minutes: build, test, measure, sanitize, and the table of goals.
# WHEELS holds what its Python lacks.
gpu-check:
	@benchmarks/gpu_check.sh "$(WHEELS)" "$(OUT)"

# The sdist, the wheel built from it, and the main job with each in a fresh environment.
wheel-check: $(VENV)/test.stamp
	@$(PIP) install build twine auditwheel
	@packaging/build.sh $(BIN)/python build/packages
	@packaging/try_wheel.sh $(PYTHON) build/packages build/try-wheel "$(TORCH)"

clean:
	rm -rf build out $(VENV) *.egg-info
