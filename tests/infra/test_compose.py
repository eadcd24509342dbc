"""infra/compose.yaml, read: the specification, and what must hold beyond it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

INFRA = Path(__file__).parents[2] / "infra"
TEXT = (INFRA / "compose.yaml").read_text()
COMPOSE = YAML(typ="safe").load(TEXT)
SERVICES = COMPOSE["services"]
OWN_IMAGE = "aegan:${AEGAN_BUILD:-cpu}"


def check(*files: Path) -> subprocess.CompletedProcess[str]:
    """Compare files with the Compose specification."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, *files], capture_output=True, text=True, check=False)


def test_the_files_are_as_the_specification_says(tmp_path):
    files = [INFRA / "compose.yaml", INFRA / "compose.gpu.yaml"]
    result = check(*files)
    assert result.returncode == 0, result.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(TEXT.replace("healthcheck:", "health:", 1))
    assert check(wrong).returncode == 1


def test_the_gpu_file_changes_only_services_that_there_are():
    gpu = YAML(typ="safe").load((INFRA / "compose.gpu.yaml").read_text())
    assert gpu["services"].keys() <= SERVICES.keys()


def test_every_variable_is_in_the_example_and_no_other():
    names = re.findall(r"\$\{([A-Z0-9_]+)", TEXT)
    example = re.findall(r"^([A-Z0-9_]+)=", (INFRA / ".env.example").read_text(), re.MULTILINE)
    assert set(names) == set(example)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_this_machine_only(name):
    ports = SERVICES[name].get("ports", [])
    assert [port for port in ports if not str(port).startswith("127.0.0.1:")] == []


def test_only_what_people_use_is_published():
    published = {name for name, service in SERVICES.items() if "ports" in service}
    assert published == {"s3", "mlflow", "ray-head", "grafana"}


def test_postgres_is_reached_by_mlflow_alone():
    assert COMPOSE["networks"]["database"]["internal"] is True
    users = {name for name, service in SERVICES.items() if "database" in service["networks"]}
    assert users == {"postgres", "mlflow"}
    assert SERVICES["postgres"]["networks"] == ["database"]


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name):
    image = SERVICES[name]["image"]
    assert image == OWN_IMAGE or re.fullmatch(r"[a-z/]+:v?\d+\.\d+(\.\d+)?(-[a-z0-9.]+)?", image)


def test_the_own_image_is_built_where_it_is_used():
    """Else Compose looks for it in a registry."""
    own = [service for service in SERVICES.values() if service["image"] == OWN_IMAGE]
    assert len(own) == 3
    for service in own:
        build = service["build"]
        assert (INFRA / build["context"] / build["dockerfile"]).exists()
        assert build == own[0]["build"]


@pytest.mark.parametrize("name", SERVICES)
def test_containers_have_no_more_rights_than_their_user(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "pid", "network_mode", "devices"}


@pytest.mark.parametrize("name", SERVICES)
def test_everything_that_a_service_refers_to_is_there(name):
    service = SERVICES[name]
    assert set(service["networks"]) <= COMPOSE["networks"].keys()
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (INFRA / source).exists()
    needed = service.get("depends_on", {})
    assert set(needed) <= SERVICES.keys()
    if isinstance(needed, dict):
        assert all("healthcheck" in SERVICES[other] for other in needed)


def test_ray_authenticates_on_every_node():
    for name in ("ray-head", "ray-worker"):
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_TOKEN:?")


def test_mlflow_lets_in_the_hosts_by_which_it_is_called():
    (option,) = (word for word in SERVICES["mlflow"]["command"] if "--allowed-hosts" in word)
    allowed = option.partition("=")[2].split(",")
    called = SERVICES["ray-worker"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert called in allowed
    assert "127.0.0.1:5000" in allowed  # published
    assert "*" not in option
