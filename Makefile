# install: .venv with every pinned package, this one and its plugin, and the weights. demo, check, test follow from it.
PYTHON ?= python3
VENV ?= .venv
# An extra package index for torch: https://download.pytorch.org/whl/cpu for a CPU build where PyPI would give CUDA's.
TORCH_INDEX ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PLUGIN := rag/llama_index_plugin
DEMO := build/demo

.PHONY: install demo check test test-all bench format clean

install: $(INSTALLED)
	@$(BIN)/stripedrag setup

$(INSTALLED): constraints.txt pyproject.toml $(PLUGIN)/pyproject.toml $(wildcard kernels/native/*)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch -e '.[test]' -e $(PLUGIN)
	@touch $@

# The main job: index a folder of documents, then ask it two questions.
demo: install
	@echo; echo '$$ stripedrag index eval/data/xquad --to $(DEMO)'
	@$(BIN)/stripedrag index eval/data/xquad --to $(DEMO)
	@echo; echo '$$ stripedrag ask $(DEMO) "$(QUESTION_1)"'
	@$(BIN)/stripedrag ask $(DEMO) "$(QUESTION_1)"
	@echo; echo '$$ stripedrag ask $(DEMO) "$(QUESTION_2)"'
	@$(BIN)/stripedrag ask $(DEMO) "$(QUESTION_2)"
QUESTION_1 := When did Genghis Khan die?
QUESTION_2 := When was the Warsaw Uprising?

check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python .ci/check_docs.py

test: install
	@HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m "not slow"

test-all: install
	@HF_HUB_OFFLINE=1 $(BIN)/pytest -q

bench: install
	@for name in filter rows layer decode generate stripe; do $(BIN)/stripedrag bench $$name --to build/bench/$$name.json || exit 1; done

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV)
