# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
# Any PyTorch from 2.1 on; set TORCH to take another build, such as TORCH="torch==2.13.0+cu130" with your own index.
TORCH ?= torch==2.13.0

PY := .venv/bin/python
READY := .venv/.ready
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1
export GRADIO_ANALYTICS_ENABLED ?= False

STRESS_SECONDS ?= 3600

# Python of the machine with the card, which has no network: `make gpu-wheels` fetches wheels for it.
GPU_PYTHON ?= 3.12
GPU_PLATFORMS ?= manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64

# The tests of other parts than the core say nothing of a device.
OTHERS := bench cli comfy decision fidelity hosts imports javascript kept panel playground release settings tuning_bench webui zoo
CORE_TESTS = $(filter-out $(foreach name,$(OTHERS),tests/test_$(name)%),$(wildcard tests/test_*.py))

.PHONY: help demo test stress test-webui lint types format bench bench-quick gpu gpu-wheels playground release clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): requirements/dev.txt requirements/dev-no-deps.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/dev-no-deps.txt
	@touch $@

demo: $(READY) ## pictures of the embedded model with and without agent attention, with times
	$(PY) -m agentsd demo

playground: $(READY) ## the panel in a local web page, on the embedded model
	$(PY) -m agentsd playground

test: $(READY) ## all tests, the linter and the type checker
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n auto --dist loadscope

stress: $(READY) ## 20,000 random cases on tiny models, for as long as STRESS_SECONDS
	$(PY) tests/stress.py --seconds $(STRESS_SECONDS)

test-webui: $(READY) ## the tests on a real WebUI; AGENTSD_WEBUI names its folder
	$(PY) -m pytest tests/webui

types: $(READY) ## the type checker alone
	$(PY) -m mypy

lint: $(READY) ## the linter alone
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY) ## let the linter rewrite the code
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(READY) ## the speed table (hours on two cores; stop and go on at will)
	$(PY) -m benchmarks.bench --resume

bench-quick: $(READY) ## the same in under two minutes
	$(PY) -m benchmarks.bench --preset quick

gpu: $(READY) ## everything that can be measured on a card, in eight minutes (stop and go on at will); then the core's tests
	$(PY) -m benchmarks.gpu
	AGENTSD_DEVICE=cuda $(PY) -m pytest $(CORE_TESTS)

gpu-wheels: $(READY) ## what the card's benchmark needs on a machine without a network, into wheels/ (docs/measurements.md)
	rm -rf wheels
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest wheels \
		--implementation cp --python-version $(GPU_PYTHON) $(addprefix --platform ,$(GPU_PLATFORMS)) \
		-r requirements/gpu.txt -r requirements/dev-no-deps.txt
	@du -sm wheels

release: test ## all that can be checked of a release without a network, then the wheel, in dist/
	@test -z "$$(git status --porcelain)" || { echo "commit first: $$(git status --porcelain | head -3)"; exit 1; }
	@! grep -n "unreleased" CHANGELOG.md || { echo "CHANGELOG.md: write the date of the release"; exit 1; }
	@! grep -nE "example\.com|Icon = \"\"" pyproject.toml || { echo "pyproject.toml: see CONTRIBUTING.md, Publishing"; exit 1; }
	rm -rf dist
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

clean: ## remove the environment and all output
	rm -rf .venv out outputs wheels dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
