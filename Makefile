# Makes the environment and calls Snakemake; nothing else.
#   make first     one run on the simulated films as far as its first pictures, in three minutes; make demo carries on from it
#   make demo      the whole study on the simulated films        make test   every test
#   make study STUDY=nih DATA_ROOT=/path/to/nih                  the same on real films; JOBS=…, RUNS="…", PROFILE=slurm
#   make report STUDY=demo   makes the study's one page anew, outputs/demo/report.html
#   make reference STUDY=demo   copies the tables and figures of a study that go into git to outputs/reference
#   make check STUDY=nih   reads its stored films and weights again: are they still what was written?
#   make lab       JupyterLab on the notebooks                   make bench  speed against peers
#   make clean-states      removes the training states of finished runs, and says how much that is
PYTHON ?= python3
VENV ?= .venv
STUDY ?= demo
# These reach the shell as its variables alone, as they were typed: none is ever part of a command's text, and $ means nothing in them.
TOLD := $(foreach name,STUDY DATA_ROOT RUNS JOBS GPUS PROFILE OUTPUTS,$(if $(filter undefined,$(origin $(name))),,$(name)))
$(foreach name,$(TOLD),$(eval override $(name) := $$(value $(name))))
export $(TOLD)
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup first demo study report check reference test lab bench lock clean-states

help:
	@sed -n '2,9p' Makefile | cut -c3-

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
STRIP = "$(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin/python" -m nbstripout --keep-id --extra-keys "$(LANGUAGE:%=metadata.language_info.%)"

demo: override STUDY := demo
demo: study

# A file that is newer but the same starts nothing anew, were it as long as the list of NIH's films (by default: 1 MB).
first study: setup
	@refuse() { printf '%s\n' "$$1" >&2; exit 2; }; \
	jobs=$${JOBS:-$$(getconf _NPROCESSORS_ONLN)}; gpus=$${GPUS:-$$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU)}; \
	case $$jobs in ''|0*|*[!0-9]*|?????*) refuse "JOBS=$$jobs: how many jobs run side by side is a whole number from 1 to 9999";; esac; \
	case $$gpus in ''|*[!0-9]*|?????*) refuse "GPUS=$$gpus: how many GPUs there are is a whole number, 0 for none";; esac; \
	mkdir -p .snakemake 2>/dev/null && [ -w .snakemake ] || refuse "$$PWD/.snakemake must be a folder that can be written: Snakemake's notes"; \
	set -- $(filter first,$@) --nolock --rerun-incomplete --keep-going --max-checksum-file-size 1GB --quiet host reason; \
	if [ -z "$$PROFILE" ]; then \
	  set -- "$$@" rules --cores "$$jobs"; [ "$$gpus" -eq 0 ] || set -- "$$@" --resources "gpu=$$gpus"; \
	elif [ -f "params/profiles/$$PROFILE/config.yaml" ]; then set -- "$$@" --profile "params/profiles/$$PROFILE"; \
	else refuse "PROFILE=$$PROFILE: there is no params/profiles/$$PROFILE/config.yaml; name a folder of params/profiles, such as slurm"; fi; \
	exec snakemake "$$@"

report: setup
	@python -m lib.report "$$STUDY"

reference: setup
	@python -m lib.reference "$$STUDY"

check: setup
	@python -m lib.preflight "$$STUDY"

test: setup
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: setup
	jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

bench: setup
	python -m tests.bench

# Names are never split into words: half of one could be the name of another run.
clean-states:
	@folder=$${OUTPUTS:-outputs}; [ -e "$$folder" ] || exit 0; CDPATH= cd -- "$$folder" || exit 2; set --; \
	for record in ./*/*/seed*/run.json; do \
	  if grep -qs '"status": "finished"' "$$record"; then \
	    for state in "$${record%run.json}"state/epoch-*.pt; do [ ! -f "$$state" ] || set -- "$$@" "$$state"; done; \
	  fi; \
	done; \
	[ $$# = 0 ] || { du -ch "$$@" | tail -1 | sed 's/total/of training states removed/' && rm -- "$$@"; }

# Exact versions with hashes from pyproject.toml (needs uv), and the conda file that follows from it.
lock:
	uv pip compile pyproject.toml --extra test --extra slurm --universal --python-version 3.11 --generate-hashes --no-annotate --no-header -o requirements.lock
