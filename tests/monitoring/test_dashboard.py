"""The dashboard: of the form that Grafana's own library knows, and with queries that the real Prometheus answers.

Grafana itself is not run.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus import Prometheus
from waiting import wait_for
from watched import Watched

from talksplat import metrics
from talksplat.server import ROOT
from talksplat_client import Client, TalksplatError, Tls

FOLDER = ROOT / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboards" / "talksplat.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expanded(expression: str) -> str:
    """As Grafana would send it: its variables are gone."""
    return expression.replace("$__rate_interval", "5s").replace("$instance", ".*")


def queries() -> Iterator[Any]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")


def test_grafanas_own_library_reads_all_of_it() -> None:
    plugins.register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert missing(DASHBOARD, read) == []  # what it does not know it leaves out


def test_that_would_show_a_field_that_grafana_does_not_know() -> None:
    plugins.register_default_plugins()
    wrong = json.loads(json.dumps(DASHBOARD))
    wrong["panels"][1]["fieldConfig"]["default"] = {}
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(wrong)))
    assert missing(wrong, read) == [".panels.1.fieldConfig.default"]


def missing(wanted: Any, found: Any, path: str = "") -> list[str]:
    """Where ``found`` lacks something of ``wanted`` or has something else."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            place
            for key, value in wanted.items()
            for place in (missing(value, found[key], f"{path}.{key}") if key in found else [f"{path}.{key}"])
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        return [
            place
            for number, (a, b) in enumerate(zip(wanted, found, strict=True))
            for place in missing(a, b, f"{path}.{number}")
        ]
    return [] if wanted == found else [path]


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_provisioning_names_folder_and_data_source() -> None:
    (source,) = yaml.safe_load((FOLDER / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((FOLDER / "provisioning" / "dashboards" / "talksplat.yml").read_text())["providers"]
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert (source["type"], provider["type"]) == ("prometheus", "file")
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


def test_every_metric_of_ours_is_shown() -> None:
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    for name in metrics.FAMILIES:
        assert re.search(rf"\b{name}(_bucket|_sum|_count)?\b", shown), name


@pytest.fixture(scope="module")
def busy(watched: Watched, prometheus: Prometheus) -> Prometheus:
    """After traffic of every kind: speaking and resting faces, drops, refusals."""
    for index in range(30):
        watched.chunk(index=4 * index)
        watched.speak(index=4 * index)
    watched.refused(avatar="nobody")
    wait_for(lambda: prometheus.value("sum(rate(talksplat_refused_total[5s]))") > 0)
    return prometheus


@pytest.mark.parametrize("expression", list(queries()))
def test_prometheus_answers_a_query_with_data(
    expression: str, watched: Watched, busy: Prometheus, request: pytest.FixtureRequest
) -> None:
    if "talksplat_edge" in expression:
        address = request.getfixturevalue("address")
        request.getfixturevalue("edge")
        with Client(address.url, api_key="wrong", tls=Tls(address.certificate)) as client:
            for _ in range(2):
                with pytest.raises(TalksplatError):
                    client.avatars()
                wait_for(lambda: busy.value("sum(talksplat_edge_requests_total)"))

    def data() -> list[float]:
        return [value for _, value in busy.query(expanded(expression)) if not math.isnan(value)]

    if not data():  # the traffic may be longer ago than a rate looks back
        watched.chunk()
        watched.chunk(index=4)
        wait_for(data)


def test_prometheus_takes_the_variables_query(busy: Prometheus) -> None:
    (variable,) = (each for each in DASHBOARD["templating"]["list"] if each["name"] == "instance")
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
    assert found
    selector, label = found.groups()
    assert len({labels[label] for labels, _ in busy.query(selector)}) == 2
