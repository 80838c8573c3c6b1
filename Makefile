# Two commands for a newcomer:   make demo   ·   make test
# Every target sets itself up: it makes $(VENV) and installs into it what settings.ini asks for, in the versions
# of constraints.txt, and again only when one of those files changed. No step needs root, a GPU or the network
# once the installation is done.

PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
READY = $(VENV)/.ready
QUIET = TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::DeprecationWarning
PATIENT = OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 # threads that wait do not burn the core that others need
ALONE = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 # as many processes as cores, one thread each
# the scripts in bench/ that need no argument
CLAIMS = packing planted jobs explain_speed explain_tokenshap explain_accuracy explain_interactions \
  logits_unbiased logits_size logits_student logits_speed logits_distil
.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help install demo test check format nb nbs lab docs bench slow torture hooks readme constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v=sys.version_info[:2]; v >= (3, 11) or sys.exit("Python 3.11 or later is needed; %s is %d.%d. Name another: make PYTHON=python3.12 ..." % ((sys.executable,) + v))'
	@[ -x "$(VENV)/bin/python" ] || $(PYTHON) -m venv "$(VENV)"
	@echo "installing into $(VENV) (a few minutes, once)"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch "$@"

install: $(READY) ## set up the environment, and nothing else

demo: $(READY) ## explain why the tiny model called twenty reviews good or bad
	@rm -rf demo/reviews
	@$(QUIET) "$(BIN)/llm-analysis" explain run tiny/reviews --max-samples 20 --output-dir demo/reviews

test: $(READY) ## run every notebook and every test
	@$(QUIET) $(PATIENT) $(ALONE) "$(BIN)/nbdev_test" --timing
	@$(QUIET) $(PATIENT) $(ALONE) "$(BIN)/python" -m pytest -n 2 --dist loadfile

$(VENV)/.ray: $(READY)
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	@touch "$@"

check: $(VENV)/.ray ## what CI runs: formatted, cleaned, exported, git unchanged, tests passed
	@PATH="$(BIN):$$PATH" sh tools/unchanged.sh
	@$(MAKE) --no-print-directory test

format: $(READY) ## format notebooks and scripts, strip what git should not see, export the package
	@"$(BIN)/ruff" check --quiet --fix . && "$(BIN)/ruff" format --quiet .
	@"$(BIN)/nbdev_clean" && "$(BIN)/nbdev_export"

nb: $(READY) ## execute and save one notebook: make nb NB=nbs/00_core.ipynb (SLOW=1 runs slow cells too)
	@$(QUIET) "$(BIN)/nbdev_export"
	@$(QUIET) "$(BIN)/python" tools/nb.py "$(NB)"
	@"$(BIN)/nbdev_clean" --fname "$(NB)"

nbs: $(READY) ## execute and save all notebooks
	@$(QUIET) "$(BIN)/nbdev_export"
	@set -e; for f in $$(find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' | sort); do \
	  $(QUIET) $(PATIENT) "$(BIN)/python" tools/nb.py "$$f"; done
	@"$(BIN)/nbdev_clean"

lab: $(READY) ## open JupyterLab on the notebooks
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab]'
	@"$(BIN)/jupyter" lab --ip=127.0.0.1 --notebook-dir=nbs

$(VENV)/.docs: $(READY)
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch "$@"

docs: $(VENV)/.docs ## build the site into _docs, from what the notebooks store (with Quarto, where it is on the PATH)
	@PATH="$(BIN):$$PATH" $(QUIET) "$(BIN)/python" tools/docs.py

$(VENV)/.bench: $(READY)
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch "$@"

bench: $(VENV)/.bench ## measure every claim of speed and accuracy beside the peers (an hour or more); see bench/RESULTS.md
	@missed=; for f in $(CLAIMS); do echo "== bench/$$f.py"; \
	  $(QUIET) $(ALONE) "$(BIN)/python" bench/$$f.py || missed="$$missed $$f"; done; \
	  [ -z "$$missed" ] || { echo "not every claim held in:$$missed"; exit 1; }

slow: $(VENV)/.ray ## the cells and tests that are too slow for every day (re-training included: up to an hour)
	@$(QUIET) $(PATIENT) "$(BIN)/nbdev_test" --flags slow --timing
	@$(QUIET) $(PATIENT) "$(BIN)/python" -m pytest -m slow

torture: $(VENV)/.ray ## kill, stop and restart long runs for an hour: every row exactly once (SEEDS="0 1" for fewer)
	@$(QUIET) $(PATIENT) "$(BIN)/python" tests/test_jobs_storm.py $(SEEDS)
	@$(QUIET) $(PATIENT) "$(BIN)/python" tests/test_jobs_upload.py
	@$(QUIET) $(PATIENT) "$(BIN)/python" tests/test_jobs_ray.py $(SEEDS)
	@$(QUIET) $(PATIENT) "$(BIN)/python" tests/test_logits_run.py

readme: $(READY) ## write README.md from nbs/index.ipynb
	@"$(BIN)/python" tools/readme.py

hooks: $(READY) ## let git merge notebooks cell by cell
	@PATH="$(BIN):$$PATH" git config --local include.path ../.gitconfig && echo "notebooks are merged by nbdev-merge"

constraints: ## resolve the requirements anew in a fresh environment and write constraints.txt
	@$(PYTHON) -m venv build/resolve && build/resolve/bin/python -m pip install --quiet -e '.[dev,docs,ray]'
	@{ echo "# The set that is tested. Made by: make constraints"; \
	  build/resolve/bin/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.txt

clean: ## remove what the other targets made, environment included
	@rm -rf "$(VENV)" _docs _proc demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
