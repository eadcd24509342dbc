"""infra/Dockerfile: the lock's environment and all that a job needs, without a container engine."""

import fnmatch
import json
import re
import subprocess
from pathlib import Path

from ruamel.yaml import YAML

from tests.options import options_of

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "infra/Dockerfile").read_text()
LOCK = (ROOT / "requirements.lock").read_text()
STEPS = [
    step
    for step in re.sub(r"\\\n|^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).splitlines()
    if step.strip()
]


def test_all_packages_are_those_of_the_lock():
    (step,) = (step for step in STEPS if "pip install" in step)
    installed = [part.split() for part in step.removeprefix("RUN ").split("&&")]
    arguments = [word for words in installed for word in words if not word.startswith("-")]
    assert arguments == [
        *("pip", "install", '"$TORCH_INDEX"', '"$(grep', "'^torch=='", 'requirements.lock)"'),
        *("pip", "install", "requirements.lock"),
    ]
    assert [words[-2] for words in installed] == ["'^torch=='", "-r"]


def test_the_search_for_the_version_of_pytorch_finds_one():
    search = re.search(r"\$\((grep [^)]*)\)", DOCKERFILE)
    assert search is not None
    found = subprocess.check_output(["sh", "-c", search[1]], cwd=ROOT, text=True)
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+\n", found)


def test_no_version_is_repeated_but_that_of_python():
    assert re.findall(r"\d+\.\d+(?:\.\d+)?", "\n".join(STEPS).replace("0.0.0.0", "")) == ["3.11.14"]


def test_both_stages_have_the_same_pinned_base():
    assert "ARG BASE=python:3.11.14-slim-trixie" in STEPS
    bases = [step.split()[1] for step in STEPS if step.startswith("FROM")]
    assert bases == ["${BASE}", "${BASE}", "pipeline", "pipeline"]


def test_the_image_that_serves_begins_with_options_that_the_command_knows():
    assert "FROM pipeline AS serve" in STEPS
    (entry,) = (json.loads(step.partition(" ")[2]) for step in STEPS if "ENTRYPOINT" in step)
    (options,) = (json.loads(step.partition(" ")[2]) for step in STEPS if step.startswith("CMD"))
    assert entry[:3] == ["python", "-m", "pipelines.serve"]
    assert STEPS[-1] == "FROM pipeline"  # what is built unless another is named
    given = options_of("serve", [*entry[3:], *options])
    assert (given["host"], given["model"]) == ("0.0.0.0", "models:/aegan@champion")


def test_the_container_is_not_root():
    users = [step for step in STEPS if step.startswith("USER")]
    assert users == ["USER 1000"]  # a number, which Kubernetes' runAsNonRoot wants
    after = STEPS[STEPS.index("USER 1000") :]
    assert [step for step in after if step.startswith("RUN")] == [
        "RUN dvc config --local core.no_scm true"
    ]


def test_ray_demands_a_token_in_the_image():
    assert "RAY_AUTH_MODE=token" in DOCKERFILE


def test_the_image_has_no_secret_and_no_result(image):
    files = [str(file.relative_to(image)) for file in image.rglob("*") if file.is_file()]
    unwanted = (".env*", ".dvc/config.local", ".git/*", "data/*", "runs/*", "*.db", "*.pem")
    assert [name for name in files for rule in unwanted if fnmatch.fnmatch(name, rule)] == []


def test_the_image_has_the_code_of_every_stage(image):
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"].values()
    code = {name for stage in stages for name in stage["deps"] if (ROOT / name).exists()}
    code = {name for name in code if name.startswith(("aegan", "pipelines"))}
    assert len(code) > 30
    assert [name for name in code if not (image / name).exists()] == []
