# Makes the environment and calls Snakemake; nothing else.
#   make demo      the whole study on the simulated films        make test   every test
#   make study STUDY=nih DATA_ROOT=/path/to/nih                  the same on real films; JOBS=…, RUNS="…", PROFILE=slurm
#   make lab       JupyterLab on the notebooks                   make bench  speed against peers
#   make clean-states      removes the training states of finished runs, and says how much that is
PYTHON ?= python3
STUDY ?= demo
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
VENV ?= .venv
OUTPUTS ?= outputs
GPUS ?= $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU)
export OUTPUTS
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo study test lab bench lock clean-states

help:
	@sed -n '2,5p' Makefile | cut -c3-

setup: $(VENV)/.complete

# pip checks every hash of the lock; .complete is only written when the whole environment stands.
$(VENV)/.complete: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
# jsonschema imports this one for a check of internationalised addresses that nothing here uses; it builds a grammar while it is imported,
# which would be most of papermill's start, some seventy times in a study.
	$(VENV)/bin/python -m pip uninstall --quiet --yes rfc3987-syntax
	mkdir -p $(VENV)/etc/ipython && cp params/profiles/ipython_kernel_config.py $(VENV)/etc/ipython/
# In a clone, results of a notebook that was run and saved stay out of git; .gitattributes names the filter.
	@[ ! -e .git ] || git config filter.nbstripout.clean '$(STRIP)' || true
	touch $@

# What JupyterLab writes besides outputs: the language as this very kernel tells it.
LANGUAGE = codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer version
STRIP = "$(CURDIR)/$(VENV)/bin/python" -m nbstripout --keep-id --extra-keys "$(LANGUAGE:%=metadata.language_info.%)"

demo: STUDY := demo
demo: study

# The lock is the kernel's, so that it goes with the process however that ends; Snakemake's own would outlive a kill.
LOCK = $(if $(shell command -v flock),flock --nonblock --conflict-exit-code 75 '$(OUTPUTS)/.$(STUDY).lock')
study: setup
	@mkdir -p '$(OUTPUTS)'
	@$(LOCK) snakemake --nolock --rerun-incomplete --keep-going --quiet rules host reason \
	  $(if $(PROFILE),--profile params/profiles/$(PROFILE),--cores $(JOBS) $(if $(filter-out 0,$(GPUS)),--resources gpu=$(GPUS))) \
	  --config study=$(STUDY) $(if $(DATA_ROOT),data_root='$(abspath $(DATA_ROOT))') $(if $(RUNS),runs='$(RUNS)') \
	  || { status=$$?; [ $$status != 75 ] || echo "This study is being run already: wait for it, or stop it first." >&2; exit $$status; }

test: setup
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: setup
	jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

bench: setup
	python -m tests.bench

clean-states:
	@mkdir -p '$(OUTPUTS)' && cd '$(OUTPUTS)' && finished=$$(grep -ls '"status": "finished"' */*/seed*/run.json); \
	states=$$(for record in $$finished; do ls $${record%run.json}state/epoch-*.pt 2>/dev/null; done); \
	[ -z "$$states" ] || { du -ch $$states | tail -1 | sed 's/total/of training states removed/' && rm $$states; }

# Exact versions with hashes from pyproject.toml (needs uv), and the conda file that follows from it.
lock:
	uv pip compile pyproject.toml --extra test --extra slurm --universal --python-version 3.11 --generate-hashes --no-annotate --no-header -o requirements.lock
