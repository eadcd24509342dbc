# Every target does its own set-up: a virtual environment in .venv with the locked versions.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 # one for all that starts Ray, one for the rest

.PHONY: run doctor submit test test-cluster test-faults test-pages test-quick coverage check mlflow serve bench-serving up status down test-stack refresh retrain test-retrain tune docs lock clean tidy help

run: .venv/installed ## images -> trained, evaluated, registered model and a report
	@$(BIN)/dvc repro
	@echo
	@echo "report:    file://$(CURDIR)/report/index.html"
	@test ! -f artifacts/explore/explorer.html || echo "explorer:  file://$(CURDIR)/artifacts/explore/explorer.html"
	@echo "MLflow:    make mlflow"

submit: .venv/installed ## the same on the Ray cluster that RAY_ADDRESS names (docs/submitting.md)
	@$(BIN)/python -m pipelines.submit

doctor: .venv/installed ## what a run would find here and on the cluster: memory, disk, bucket, registry, nodes
	@$(BIN)/python -m pipelines.project.doctor

test: .venv/installed ## the whole test suite
	$(PYTEST)

test-quick: .venv/installed ## what runs in minutes: no servers, no long training
	$(PYTEST) -m "not slow and not integration"

test-cluster: .venv/installed ## a Ray cluster on this machine that loses workers, nodes, its bucket
	$(PYTEST) tests/cluster

test-pages: .venv/installed ## the explorer and all other pages in Chromium, offline (apt-get install chromium)
	$(BIN)/python -m pytest -n 0 tests/integration/test_explorer.py tests/integration/test_pages.py

test-faults: .venv/installed ## every fault and attack of docs/reliability.md and docs/security.md, with their counts
	$(PYTEST) -m fault --thorough

coverage: .venv/installed ## the whole test suite, and which lines it runs, also in the processes it starts
	$(PYTEST) --cov --cov-report=term

check: .venv/installed ## format, lint, types, declared dependencies
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/deptry .

mlflow: export PORT := $(PORT)
mlflow: .venv/installed ## open the MLflow page on this machine (PORT=5000); it asks for the password shown
	@$(BIN)/python -m pipelines.serving.mlflow_page $(if $(PORT),"$$PORT")

serve: export MODEL := $(MODEL)
serve: export PORT := $(PORT)
serve: .venv/installed ## answer requests with a model (MODEL=models:/aegan@champion PORT=5001, docs/serving.md)
	@$(BIN)/python -m pipelines.serve $(if $(MODEL),--model "$$MODEL") $(if $(PORT),--port "$$PORT")

up: .venv/installed ## start PostgreSQL, S3 and MLflow on this machine, what of them does not run (docs/stack.md)
	@$(BIN)/python -m pipelines.project.stack up $(if $(POSTGRESQL_PORT),--postgresql-port "$$POSTGRESQL_PORT") \
		$(if $(MLFLOW_PORT),--mlflow-port "$$MLFLOW_PORT") $(if $(S3_PORT),--s3-port "$$S3_PORT") \
		$(if $(S3_ENDPOINT),--s3-endpoint "$$S3_ENDPOINT")

status: .venv/installed ## where they are, since when, how much they hold
	@$(BIN)/python -m pipelines.project.stack status

down: .venv/installed ## end them; the data stay in .stack/
	@$(BIN)/python -m pipelines.project.stack down

test-stack: .venv/installed ## the tests of these three
	$(PYTEST) tests/integration/test_stack.py

bench-serving: .venv/installed ## requests a second beside `mlflow models serve`, and 10,000 requests (MODEL=FOLDER)
	$(BIN)/python -m benchmarks.serving load $(MODEL)
	$(BIN)/python -m benchmarks.serving endure $(MODEL)

refresh: .venv/installed ## look at the source again, then re-run what changed
	$(BIN)/dvc repro --force --single-item download
	@$(MAKE) --no-print-directory run

retrain: .venv/installed ## look for new images; check, train, compare, promote by itself (docs/retraining.md)
	@$(BIN)/aegan retrain

test-retrain: .venv/installed ## the days of a project that is retrained by itself
	$(PYTEST) --thorough tests/integration/test_retrain.py tests/integration/test_retrain_servers.py \
		tests/pipelines/test_retraining_parts.py tests/pipelines/test_retraining_check.py

tune: .venv/installed ## search better settings, off by default (docs/tuning.md)
	@$(BIN)/dvc repro tune/dvc.yaml
	@echo
	@echo "results:     artifacts/tune"
	@echo "use them:    $(BIN)/python -m pipelines.params artifacts/tune/tuned.yaml && make run"

docs: .venv/installed ## the pages of docs/ and of every public function as a site, in site/
	$(BIN)/mkdocs build --strict
	@echo "file://$(CURDIR)/site/index.html"

lock: .venv/installed ## resolve the newest permitted versions into requirements.lock
	$(BIN)/pip-compile --quiet --upgrade --strip-extras --allow-unsafe --extra dev --extra notify --extra server \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header \
		--output-file requirements.lock pyproject.toml
	sed -i.bak 's/+cpu$$//' requirements.lock && rm requirements.lock.bak # whichever build was found

help: ## this list
	@grep -hE '^[a-z./-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

infra/.env: ## random passwords for infra/compose.yaml
	infra/make_env.sh

clean: ## remove the files that runs have written, and nothing else; .venv and MLflow's stay
	@$(PYTHON) -m pipelines.project.clean

tidy: .venv/installed ## sizes of what runs leave behind, and what nothing names; YES=1 removes that, DAYS=14, KEEP=5 versions
	@$(BIN)/python -m pipelines.project.tidy $(if $(YES),--yes) $(if $(DAYS),--days $(DAYS)) $(if $(KEEP),--keep $(KEEP))

# A moved or copied project makes what names its folder anew; the packages are there already.
ifneq ($(shell cat .venv/installed 2>/dev/null),$(CURDIR))
.PHONY: .venv/installed
endif
.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("error: Python 3.11 to 3.13 is needed, this is {}; name one: make PYTHON=python3.11".format(sys.version.split()[0]))'
	@echo "installing into .venv: about 3 GB, a few minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pipelines.project.environment
	@echo "$(CURDIR)" > $@
