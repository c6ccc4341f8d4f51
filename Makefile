# `make help` lists what there is. Everything made lands in .venv, build/ and node_modules.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ARGS ?=
JOBS ?= 2
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
# The tools of .venv, for every recipe and every test; nginx may live in /usr/sbin.
export PATH := $(CURDIR)/.venv/bin:$(PATH):/usr/sbin

ASAN := build/asan
CPP := $(wildcard $(addsuffix /*.cpp,csrc tests/core bench) $(addsuffix /*.hpp,csrc tests/core bench))
EXTENSION := CMakeLists.txt pyproject.toml $(wildcard csrc/*)
NODE := $(addsuffix /node_modules/.made,$(patsubst %/,%,$(dir $(wildcard tests/*/package.json tests/*/*/package.json))))

# Sanitizers map fixed addresses: some kernels randomise too widely for older ones.
FIXED := $(shell setarch -R true 2>/dev/null && echo setarch -R)
export ASAN_OPTIONS ?= detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS ?= print_stacktrace=1
export TSAN_OPTIONS ?= halt_on_error=1:second_deadlock_stack=1

##@ Use

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^##@/ { print "\n" substr($$0, 5) } /^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: run
run: .venv/.installed ## serve, with anything in ARGS: make run ARGS="--upstream http://127.0.0.1:8080"
	@pyserve serve $(ARGS)

.PHONY: build
build: .venv/.installed ## build what csrc/ needs and install into .venv; Python files are used in place

##@ Test

.PHONY: test
test: lint test-core test-python test-asan test-wheel ## all that CI runs

.PHONY: test-core
test-core: core-address core-thread ## native tests under ASan + UBSan, then under TSan

.PHONY: test-python
test-python: .venv/.installed .venv/.dev $(NODE) ## Python tests, end to end included; ARGS="-k name" picks
	.ci/need curl nginx -- true
	.ci/need chromium -- true
	pytest $(ARGS)

.PHONY: test-asan
test-asan: $(ASAN)/venv/.installed .venv/.dev ## Python unit tests on an extension built with ASan + UBSan
	$(asan_env) $(FIXED) $(ASAN)/venv/bin/python -m pytest --capture=sys --timeout=300 tests/pyserve $(ARGS)

.PHONY: test-wheel
test-wheel: .venv/.installed .venv/.dev ## a wheel, built from the sdist, serves in an empty environment
	python tests/wheel_smoke.py

.PHONY: soak
soak: export PYSERVE_SOAK := 1
soak: export PYTEST_ADDOPTS := --timeout=7200
soak: export CTEST_TIMEOUT_S := 7200
soak: test-core test-python ## the long counts: minutes become hours

.PHONY: bench
bench: .venv/.installed .venv/.bench ## pyserve beside other servers, some minutes; ARGS="fan-out --rounds 5" picks, ARGS=--help tells
	.ci/need benchmark nginx -- true
	cmake -G Ninja -S . -B build/bench -DCMAKE_BUILD_TYPE=Release -DPYSERVE_NATIVE_BENCH=ON --log-level=WARNING
	cmake --build build/bench
	python bench/run.py $(ARGS)

##@ Keep

.PHONY: lint
lint: .venv/.installed .venv/.dev ## ruff, mypy, clang-format: look, change nothing
	ruff check
	ruff format --check
	mypy
	clang-format --dry-run -Werror $(CPP)

.PHONY: format
format: .venv/.dev ## what lint can mend by itself
	ruff check --fix --exit-zero
	ruff format
	clang-format -i $(CPP)

.PHONY: clean
clean: ## remove all that make has made
	rm -rf build dist .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis $(dir $(NODE))
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- How it is made. A file .made, .installed or .dev records when its rule last succeeded.

# Native tests, a build for each sanitizer; they need neither Python's headers nor pybind11.
.PHONY: core-address core-thread
core-address core-thread: core-%: .venv/.made
	.ci/need doctest -- $(MAKE) --no-print-directory run-core-$*

.PHONY: run-core-address run-core-thread
run-core-address run-core-thread: run-core-%:
	cmake -G Ninja -S . -B build/core-$* -DPYSERVE_SANITIZE=$* -DPYSERVE_NATIVE_TESTS=ON -DPYSERVE_WERROR=ON --log-level=WARNING
	cmake --build build/core-$*
	$(FIXED) ctest --test-dir build/core-$* --output-on-failure --timeout $${CTEST_TIMEOUT_S:-600}

.venv/.made: pyproject.toml
	.ci/need compiler python
	test -x .venv/bin/pip || { rm -rf .venv && $$(.ci/need --python) -m venv .venv; }
	pip install -q --upgrade "pip>=25.1" # dependency groups
	pip install -q --group build
	touch $@

.venv/.dev: .venv/.made
	pip install -q --group dev
	touch $@

.venv/.bench: .venv/.made
	pip install -q --group bench
	touch $@

editable = install -q --no-build-isolation -e .

.venv/.installed: .venv/.made $(EXTENSION)
	pip $(editable) -Cbuild-dir=build/extension
	touch $@

# The same packages as .venv (through a .pth: nothing is installed twice) under another pyserve.
$(ASAN)/venv/.installed: .venv/.installed $(EXTENSION)
	test -x $(@D)/bin/python || python -m venv --without-pip $(@D)
	python -c 'import site; print(site.getsitepackages()[0])' > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	pip --python $(@D)/bin/python $(editable) --no-deps -Cbuild-dir=$(ASAN)/extension \
		-Ccmake.build-type=RelWithDebInfo -Cinstall.strip=false \
		-Ccmake.define.PYSERVE_SANITIZE=address -Ccmake.define.PYSERVE_WERROR=ON
	touch $@

# Python itself is not built with ASan: its runtime must be loaded first, and libstdc++ with it,
# or exceptions are not seen. Leaks are off: Python keeps too much. Its allocator is off: it hides
# overflows. And pytest must not capture the report of a process that dies (--capture=sys).
runtime = $(shell $${CXX:-c++} -print-file-name=$(1))
asan_env = LD_PRELOAD="$(call runtime,libasan.so) $(call runtime,libstdc++.so)" \
	ASAN_OPTIONS=$(ASAN_OPTIONS):detect_leaks=0 PYTHONMALLOC=malloc

%/node_modules/.made: %/package.json
	.ci/need node npm -- npm install --prefix $* --no-audit --no-fund --no-package-lock --silent
	test ! -d $(@D) || touch $@ # without npm it was skipped
