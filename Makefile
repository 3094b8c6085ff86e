# Works from any directory: make -C path/to/fastlora test
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3
# One thread is the fastest on a busy machine for models as small as the tests'; the demo sets its own.
export OMP_NUM_THREADS ?= 1
# That share the test files; Triton's interpreter is one more.
PROCESSES ?= 2
RUN := $(ROOT).venv/bin/python

.PHONY: demo test bench docs lint sanitize setup clean

demo: ## train, adapt and draw: results in fastlora-demo/
	@$(PYTHON) $(ROOT)tools/setup_env.py demo
	cd $(ROOT) && $(RUN) -m fastlora.cli demo

test: setup ## the whole test suite
	cd $(ROOT) && $(RUN) -m pytest tests --processes $(PROCESSES)

bench: setup ## the benchmarks; see benchmarks/results/README.md
	cd $(ROOT) && $(RUN) -m pytest --benchmark-only

docs: setup ## the guides and the reference: docs/_build/index.html
	cd $(ROOT) && $(RUN) -m sphinx -W --keep-going -b html docs docs/_build

lint: setup
	cd $(ROOT) && $(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(ROOT).venv/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

sanitize: setup ## the native code's tests under AddressSanitizer and UBSan, and ThreadSanitizer
	cd $(ROOT) && $(RUN) tools/sanitize.py

setup:
	@$(PYTHON) $(ROOT)tools/setup_env.py

clean:
	rm -rf $(ROOT).venv $(ROOT)build $(ROOT)docs/_build $(ROOT)fastlora-demo
