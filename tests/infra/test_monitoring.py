"""infra/monitoring: what Prometheus asks is there, what Grafana shows comes from it."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

INFRA = Path(__file__).parents[2] / "infra"
DASHBOARD = json.loads((INFRA / "monitoring/grafana/aegan.json").read_text())
SERVICES = YAML(typ="safe").load((INFRA / "compose.yaml").read_text())["services"]


def read(name: str) -> dict:
    return YAML(typ="safe").load((INFRA / "monitoring" / name).read_text())


def test_prometheus_asks_the_port_on_which_ray_exports():
    (job,) = read("prometheus.yaml")["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert found["names"] == [name for name in SERVICES if name.startswith("ray-")]
    for name in found["names"]:
        assert f"--metrics-export-port={found['port']}" in SERVICES[name]["command"]


def test_grafana_asks_prometheus():
    (source,) = read("datasource.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    asked = [panel["datasource"] for panel in DASHBOARD["panels"]]
    asked += [variable["datasource"] for variable in DASHBOARD["templating"]["list"]]
    assert {item["uid"] for item in asked} == {source["uid"]}


def test_grafana_finds_the_dashboard_where_it_is_mounted():
    (provider,) = read("grafana/provider.yaml")["providers"]
    mounts = [volume.split(":") for volume in SERVICES["grafana"]["volumes"]]
    assert ["./monitoring/grafana", provider["options"]["path"], "ro"] in mounts


@pytest.mark.parametrize("title", ["Images per second", "Losses", "GPU use", "GPU memory"])
def test_the_dashboard_shows(title):
    (panel,) = (panel for panel in DASHBOARD["panels"] if panel["title"] == title)
    assert all(target["expr"] for target in panel["targets"])


def test_panels_do_not_overlap():
    cells = [
        (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + row)
        for panel in DASHBOARD["panels"]
        for column in range(panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
