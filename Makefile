# make demo    everything from nothing, then the main job on a real guest
# make test    everything from nothing, then all tests of every day
# make test-long  everything from nothing, then all tests there are: hours
# make unit    the everyday loop: less than a minute
# make host    the tests of every day that need no guest
# make lint    ruff, mypy --strict, clang-format
# make bench   ratios against QEMU's built-in way and the host's limits, same run
# make sanitize  native tests and the fuzzers' corpus under ASan and UBSan
# make fuzz    coverage-guided fuzzing of the C core (needs clang), FUZZ_SECONDS each
#
# Nothing here needs root, and nothing outside .venv/, build/ and the cache folder is touched
# (VHOSTD_CACHE, default ~/.cache/vhostd: QEMU, guest kernels).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
BUILD_INPUTS := pyproject.toml Makefile $(wildcard c_src/*.[ch]) vhostd/_native/build.py
PYTEST_FLAGS ?=
UNIT_TESTS := $(addprefix tests/,protocol session devices transport memory backend images fakes tidy) \
	$(addprefix tests/test_,$(addsuffix .py,config units log qmp systemd))
FUZZ_SECONDS ?= 60

.PHONY: all demo test test-long unit host lint bench fuzz sanitize stack clean

all: $(VENV)/stamp

# The stamp is written last, so that an interrupted installation is done again.
$(VENV)/stamp: $(BUILD_INPUTS)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11: set PYTHON=" >&2; exit 1; }
	@command -v gcc >/dev/null || { echo "make: gcc not found: install gcc and libc6-dev" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { echo "make: cannot create $(VENV): install python3-venv" >&2; exit 1; }
	@rm -f $@
	$(RUN) -m pip install --quiet --disable-pip-version-check "setuptools>=77" "cffi>=1.17" wheel
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(VENV)/stamp
	@$(RUN) -m tests.vm.stack --kernels 6.12
	@$(RUN) -m tests.demo

stack: $(VENV)/stamp
	@$(RUN) -m tests.vm.stack --kernels 6.1,6.12,7

# Two at a time; what measures times runs alone. No test depends on one before it in the same
# worker, so that the worker that is done first takes work from the other.
TWO := -n 2 --dist worksteal

test: $(VENV)/stamp stack
	$(RUN) -m pytest -m "not guest and not long and not alone" $(TWO) $(PYTEST_FLAGS)
	$(RUN) -m pytest -m "alone and not guest and not long" $(PYTEST_FLAGS)
	$(RUN) -m pytest -m "guest and not long" $(TWO) $(PYTEST_FLAGS)

# Whole where the tests of every day take a sample: the same tests with long arguments, and
# those that are only run here.
LONG_FLAGS := --hypothesis-profile=long --repeats=10000 --every-place --rounds=1000 --kills=50 --takeovers=50 --timeout=7200

test-long: $(VENV)/stamp stack
	$(RUN) -m pytest -m "not guest" $(LONG_FLAGS) $(PYTEST_FLAGS)
	$(RUN) -m pytest -m guest -n 2 $(LONG_FLAGS) $(PYTEST_FLAGS)

# The everyday loop: no process but pytest's own, or few and short ones.
unit: $(VENV)/stamp
	$(RUN) -m pytest -q $(TWO) -m "not long" $(UNIT_TESTS) $(PYTEST_FLAGS)

host: $(VENV)/stamp
	$(RUN) -m pytest -m "not guest and not long and not alone" $(TWO) $(PYTEST_FLAGS)
	$(RUN) -m pytest -m "alone and not guest and not long" $(PYTEST_FLAGS)

lint: $(VENV)/stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.h')

bench: $(VENV)/stamp
	@$(RUN) -m tests.vm.stack --kernels 6.12
	@$(RUN) -m tests.bench

fuzz: $(VENV)/stamp
	$(MAKE) -f tests/fuzz/fuzz.mk fuzz-run FUZZ_SECONDS=$(FUZZ_SECONDS)

sanitize: $(VENV)/stamp
	$(RUN) -m tests.native.sanitize
	$(MAKE) -f tests/fuzz/fuzz.mk fuzz-replay

clean:
	rm -rf $(VENV) build *.egg-info vhostd/_native/_core*.so vhostd/_native/_core.c
