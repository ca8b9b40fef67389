# `make train` and `make test` do all of their own set-up in ./.venv; nothing is needed but python3 (3.11 or newer).

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --disable-pip-version-check

.PHONY: train test test-more test-all test-torch test-cuda-dispatch fuzz mutants kill-matrix bench results-age lint docs site site-links setup setup-dev clean

# As many steps of the debug configuration as two slow cores finish in under three minutes. STEPS=200 trains all of it,
# also afterwards: the run goes on from its checkpoint.
STEPS ?= 50

train: setup  ## the debug configuration on 4 local ranks
	NGPU=4 PYTHON="$(CURDIR)/.venv/bin/python" ./run_train.sh --training.steps $(STEPS)

# More workers than cores: a test that starts a run waits as often as it computes.
WORKERS ?= 3

# Tests start many processes; each would compile the package anew where the environment forbids to keep bytecode.
test test-more test-all: export PYTHONDONTWRITEBYTECODE :=

test: setup-dev  ## what must pass before every commit; by files
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25

test-more: setup-dev  ## what is slower and still wanted on every commit: .ci/run runs it after `make test`
	.venv/bin/python -m pytest -m more -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25 \
	    $$(grep -rlw --include='test_*.py' 'mark.more' tests)

test-all: setup-dev  ## the long tests too
	.venv/bin/python -m pytest -m "not cuda_dispatch"

# Another release of torch, in an environment of its own. The layouts are a sample with at least one row for each axis.
TORCH ?= 2.14.1

test-torch: .venv-torch-$(TORCH)/.installed  ## unit tests and layouts with another torch; docs/torch-versions.md has the results
	.venv-torch-$(TORCH)/bin/python -m pytest tests/unit tests/distributed/equivalence -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-cuda-dispatch: .venv-torch-$(TORCH)/.installed  ## the dispatch on CUDA without a GPU; RECORD=1 keeps the figures
	tests/cuda_dispatch/with_driver.sh .venv-torch-$(TORCH)/bin/python $(if $(RECORD),benchmarks/cuda_dispatch.py,-m pytest tests/cuda_dispatch -m cuda_dispatch)

CASES ?= 20000

fuzz: setup-dev  ## damaged bytes for every reader; RECORD=FILE keeps the counts
	.venv/bin/python tests/fuzz/run.py --cases $(CASES) $(if $(RECORD),--record $(RECORD))

mutants: setup-dev  ## break the code in many small ways, one at a time, and see that a test fails
	.venv/bin/python tests/mutants/run.py

bench: setup-dev  ## speed on this CPU: ours and the bare loop, eager and compiled; at most 25 minutes
	.venv/bin/python benchmarks/cpu_table.py

results-age: setup-dev  ## the results that are older than the code they measure
	.venv/bin/python benchmarks/results_age.py

TRIALS ?= 60

kill-matrix: setup-dev  ## kill runs anywhere, start them again, compare to the bit; goes on where it was stopped
	.venv/bin/python benchmarks/kill_matrix.py --trials $(TRIALS)

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: setup-dev  ## write docs/configuration.md, docs/cli.md and the cards anew
	.venv/bin/python -m quadriga.cli docs

site: setup-dev  ## the documentation as web pages, in docs/_build/html; a warning is an error
	.venv/bin/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

site-links: setup-dev  ## ask for every address outside of the site; needs a network, so it is no test
	.venv/bin/python -m sphinx -b linkcheck -q -D module_pages_package= docs docs/_build/linkcheck

setup: .venv/.installed
setup-dev: .venv/.installed-dev

# The stamps are newer than what they were made from, so that set-up is not repeated.
.venv/.created:
	@for python in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        "$$python" -m venv .venv || { echo "make: $$python could not create .venv (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	        touch $@; exit 0; \
	    fi; \
	done; \
	echo "make: Quadriga needs Python 3.11 or newer and found none; name one with: make PYTHON=/path/to/python3" >&2; exit 1

# The package is editable: the command `quadriga` runs the code of this checkout. setuptools is there because torch needs
# it, so nothing else is downloaded to build.
.venv/.installed: requirements.txt pyproject.toml .venv/.created
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(PIP) -r requirements-dev.txt
	@touch $@

.venv-torch-%/.installed: requirements.txt requirements-dev.txt pyproject.toml .venv/.created
	.venv/bin/python -m venv $(@D)
	grep -hv -e '^torch==' -e '^-r ' requirements.txt requirements-dev.txt > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --disable-pip-version-check torch==$* -r $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf docs/_api docs/_build .venv .venv-torch-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
