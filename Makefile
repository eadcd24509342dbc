# Every target does its own set-up: a virtual environment in .venv with the locked versions.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# The environment sees this checkout; none of its tools reports home or writes there, also by hand.
define PTH
$(CURDIR)
import os; os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
import os; os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import os; os.environ.setdefault("DVC_NO_ANALYTICS", "1")
import os; os.environ.setdefault("MPLCONFIGDIR", "$(CURDIR)/.venv/matplotlib")
endef
export PTH

# What `pip install` would write for [project.scripts].
define AEGAN
#!$(CURDIR)/$(BIN)/python
from pipelines.cli import main
main()
endef
export AEGAN

# MLflow: load no pickles, start no job workers, use the stages' store.
MLFLOW := PATH="$(CURDIR)/$(BIN):$$PATH" MLFLOW_TRACKING_URI=$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} \
	MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	PYTHONWARNINGS=ignore mlflow

.PHONY: run submit test test-cluster test-quick check mlflow serve refresh tune lock clean

run: .venv/installed ## images -> trained, evaluated, registered model and a report
	@$(BIN)/dvc repro
	@echo
	@echo "report:  file://$(CURDIR)/report/index.html"
	@echo "MLflow:  make mlflow"

submit: .venv/installed ## the same on the Ray cluster that RAY_ADDRESS names (docs/submitting.md)
	@$(BIN)/python -m pipelines.submit

test: .venv/installed ## the whole test suite
	$(BIN)/python -m pytest

test-quick: .venv/installed ## what runs in minutes: no servers, no long training
	$(BIN)/python -m pytest -m "not slow and not integration"

test-cluster: .venv/installed ## a Ray cluster on this machine that loses workers, nodes, its bucket
	$(BIN)/python -m pytest tests/cluster

check: .venv/installed ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mlflow: .venv/installed ## open the MLflow page on this machine
	$(MLFLOW) ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --workers 1

serve: .venv/installed ## answer requests with the registered model (docs/serving.md)
	$(MLFLOW) models serve -m models:/aegan@candidate --env-manager local --host 127.0.0.1 --port 5001

refresh: .venv/installed ## look at the source again, then re-run what changed
	$(BIN)/dvc repro --force --single-item download
	@$(MAKE) --no-print-directory run

tune: .venv/installed ## search better settings, off by default (docs/tuning.md)
	@$(BIN)/dvc repro tune/dvc.yaml
	@echo
	@echo "results:     artifacts/tune"
	@echo "use them:    $(BIN)/python -m pipelines.params artifacts/tune/tuned.yaml && make run"

lock: .venv/installed ## resolve the newest permitted versions into requirements.lock
	$(BIN)/pip-compile --quiet --upgrade --strip-extras --allow-unsafe --extra dev --extra server \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header \
		--output-file requirements.lock pyproject.toml
	sed -i.bak 's/+cpu$$//' requirements.lock && rm requirements.lock.bak # whichever build was found

infra/.env: ## random passwords for infra/compose.yaml
	infra/make_env.sh

clean: ## forget all results; the source images and .venv stay
	rm -rf artifacts data report runs dvc.lock tune/dvc.lock

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("error: Python 3.11 to 3.13 is needed, this is {}; name one: make PYTHON=python3.11".format(sys.version.split()[0]))'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@echo "$$PTH" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/aegan.pth"
	@echo "$$AEGAN" > $(BIN)/aegan && chmod +x $(BIN)/aegan
	@touch $@
