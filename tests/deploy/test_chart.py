"""The chart as the real Helm renders it, against Kubernetes' own schemas and what it repeats of the project."""

import os
import re
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml
from helm import unpack
from kubernetes_validate import validate
from prometheus import tool

from talksplat import cli, edge
from talksplat.server import CANARY_FILE, ROOT, Ports, Server

CHART = ROOT / "deploy" / "helm" / "talksplat"
ADAPTER = yaml.safe_load((ROOT / "deploy" / "helm" / "prometheus-adapter.yaml").read_text())["rules"]["custom"][0]
KUBERNETES = ("1.27", "1.37")  # the first that the chart takes, and the last that is known

Values: TypeAlias = dict[str, Any]
Manifest: TypeAlias = dict[str, Any]

LEAST: Values = {
    "tenants": {"secret": "who"},
    "edge": {"tls": {"secret": "certificate"}},
    "avatars": {"volume": {"claim": "faces"}},
}
STORE = {"bucket": "faces/live", "endpoint": "https://s3.example", "secret": "store-keys"}
DIGEST = f"sha256:{'0' * 64}"
WITHOUT_EDGE: Values = {
    "edge": {"enabled": False},
    "avatars": {"volume": {"claim": "faces", "path": "live"}},
    "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "studio"}}}]},
}
SETS: dict[str, Values] = {
    "least": LEAST,
    "gpu": LEAST
    | {
        "image": {
            "repository": "registry.example/talksplat",
            "digest": DIGEST,
            "pullSecrets": [{"name": "r"}],
        },
        "replicas": {
            "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "16Gi"}},
            "nodeSelector": {"gpu": "l4"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
    },
    "store": LEAST | {"avatars": {"objectStore": STORE}, "edge": LEAST["edge"] | {"service": {"type": "LoadBalancer"}}},
    "without edge": WITHOUT_EDGE,
    "fixed": LEAST | {"autoscaling": {"enabled": False}, "replicas": {"count": 5}, "networkPolicy": {"enabled": False}},
    "monitor": LEAST | {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
}


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Helm itself."""
    folder = tmp_path_factory.mktemp("helm")
    unpack(folder, "helm")
    return folder / "helm"


Render: TypeAlias = Callable[[Values], list[Manifest]]


@pytest.fixture(scope="module")
def run(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    home = tmp_path_factory.mktemp("home")

    def run(command: list[str], values: Values) -> subprocess.CompletedProcess[str]:
        file = home / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        return subprocess.run(
            [helm, *command, CHART, "-f", file], capture_output=True, text=True, env={**os.environ, "HOME": str(home)}
        )

    return run


@pytest.fixture(scope="module")
def render(run: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    rendered: dict[str, list[Manifest]] = {}

    def render(values: Values) -> list[Manifest]:
        key = yaml.safe_dump(values)
        if key not in rendered:
            done = run(["template", "live", "--namespace", "faces"], values)
            assert done.returncode == 0, done.stderr
            rendered[key] = [each for each in yaml.safe_load_all(done.stdout) if each]
        return rendered[key]

    return render


@pytest.fixture(params=list(SETS.values()), ids=list(SETS))
def manifests(request: pytest.FixtureRequest, render: Render) -> list[Manifest]:
    return render(request.param)


def one(manifests: list[Manifest], kind: str, component: str = "replica") -> Manifest:
    (found,) = (each for each in manifests if each["kind"] == kind and _component(each) == component)
    return found


def _component(manifest: Manifest) -> str:
    return str(manifest["metadata"]["labels"]["app.kubernetes.io/component"])


def pods(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Each deployment with its pod's spec."""
    for each in manifests:
        if each["kind"] == "Deployment":
            yield each, each["spec"]["template"]["spec"]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def server_of(manifests: list[Manifest]) -> Manifest:
    container: Manifest = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize("values", SETS.values(), ids=SETS.keys())
def test_helm_finds_nothing_wrong(values: Values, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run(["lint", "--strict"], values)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_every_manifest(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] != "ServiceMonitor":  # the Prometheus operator's own
            validate(manifest, version, strict=True)


def test_the_first_version_is_the_one_that_the_chart_asks_for() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


def test_a_wrong_manifest_would_be_found(render: Render) -> None:
    wrong = one(render(LEAST), "Deployment") | {"spec": {"replica": 1}}
    with pytest.raises(Exception, match=r"selector|replica"):
        validate(wrong, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "Avatars come from"),
        (LEAST | {"avatars": {"volume": {"claim": "a"}, "objectStore": STORE}}, "set one of the two"),
        (LEAST | {"avatars": {"objectStore": {"bucket": "faces"}}}, "needs endpoint and secret"),
        (LEAST | {"tenants": {"secret": ""}}, "needs tenants.secret"),
        (LEAST | {"edge": {"tls": {"secret": ""}}}, "edge.tls.secret is needed"),
        (LEAST | {"image": {"tag": "latest"}}, "tag"),
        (LEAST | {"replica": {"count": 3}}, "replica"),
        (LEAST | {"tenants": {"toml": "streams = 1"}}, "toml"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(
    values: Values, reason: str, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run(["template", "live"], values)
    assert done.returncode != 0
    assert reason in done.stderr


def test_selectors_select_exactly_their_own_pods(manifests: list[Manifest]) -> None:
    labels = {_component(each): each["spec"]["template"]["metadata"]["labels"] for each, _ in pods(manifests)}

    def selected(selector: dict[str, str]) -> set[str]:
        return {name for name, own in labels.items() if selector.items() <= own.items()}

    for each in manifests:
        spec = each["spec"]
        selector = {
            "Service": lambda spec: spec["selector"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            "HorizontalPodAutoscaler": lambda spec: labels[spec["scaleTargetRef"]["name"].rsplit("-", 1)[1]],
        }.get(each["kind"], lambda spec: spec["selector"]["matchLabels"])(spec)
        assert selected(selector) == {_component(each)}, each["kind"]
    for each, pod in pods(manifests):
        for spread in pod["topologySpreadConstraints"]:
            assert selected(spread["labelSelector"]["matchLabels"]) == {_component(each)}


def test_the_autoscaler_and_a_fixed_number_exclude_each_other(manifests: list[Manifest]) -> None:
    scaled = any(each["kind"] == "HorizontalPodAutoscaler" for each in manifests)
    assert scaled != ("replicas" in one(manifests, "Deployment")["spec"])
    if scaled:
        target = one(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", one(manifests, "Deployment")["metadata"]["name"])


def test_no_secret_is_in_the_output(manifests: list[Manifest]) -> None:
    assert not any(each["kind"] in ("Secret", "ConfigMap") for each in manifests)
    for _, pod in pods(manifests):
        for container in containers(pod):
            for variable in container.get("env", []):
                if re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}


def test_every_image_is_pinned(manifests: list[Manifest]) -> None:
    for _, pod in pods(manifests):
        for container in containers(pod):
            assert re.search(r"(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"])


def test_containers_may_as_little_as_possible(manifests: list[Manifest]) -> None:
    for _, pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            mounted = [volume["name"] for volume in container["volumeMounts"]]
            assert set(mounted) <= {volume["name"] for volume in pod["volumes"]}
            assert "tmp" in mounted


def test_ports_are_those_of_the_server(manifests: list[Manifest]) -> None:
    expected = vars(Ports())
    assert {port["name"]: port["containerPort"] for port in server_of(manifests)["ports"]} == expected
    service = one(manifests, "Service")["spec"]
    assert service["clusterIP"] == "None"  # or DNS would not list the pods
    assert {port["name"]: port["port"] for port in service["ports"]} == expected
    assert all(port["targetPort"] == port["name"] for port in service["ports"])


def test_the_edge_finds_the_replicas_and_listens_where_its_service_leads(render: Render) -> None:
    manifests = render(LEAST)
    (container,) = one(manifests, "Deployment", "edge")["spec"]["template"]["spec"]["containers"]
    arguments = cli._parser().parse_args(container["args"])
    assert arguments.replicas == f"{one(manifests, 'Service')['metadata']['name']}.faces.svc"
    assert container["ports"] == [{"name": "tls", "containerPort": arguments.port}]
    assert arguments.port == edge.PORT
    assert one(manifests, "Service", "edge")["spec"]["ports"][0]["targetPort"] == "tls"
    folders = {volume["mountPath"] for volume in container["volumeMounts"]}
    files = (arguments.tenants, arguments.certificate, arguments.certificate_key)
    assert {str(file.parent) for file in files} | {str(arguments.run_dir)} <= folders


def test_the_server_is_told_what_is_mounted(manifests: list[Manifest]) -> None:
    container = server_of(manifests)
    arguments = cli._parser().parse_args(container["args"])
    mounts = {volume["mountPath"]: volume for volume in container["volumeMounts"]}
    assert mounts[str(arguments.avatars)]["readOnly"]
    assert str(arguments.run_dir) in mounts
    assert "/dev/shm" in mounts
    assert (arguments.tenants is not None) == ("/etc/talksplat" in mounts)
    assert arguments.host != "127.0.0.1"
    pod = one(manifests, "Deployment")["spec"]["template"]["spec"]
    shm = {volume["name"]: volume for volume in pod["volumes"]}["shm"]["emptyDir"]
    assert shm["medium"] == "Memory"
    assert shm["sizeLimit"]


def test_probes_tell_a_fresh_canary_from_an_old_one(render: Render, tmp_path: Path) -> None:
    container = server_of(render(LEAST))
    arguments = cli._parser().parse_args(container["args"])
    file = tmp_path / CANARY_FILE

    def passes(probe: str) -> bool:
        command = container[f"{probe}Probe"]["exec"]["command"]
        own = [part.replace(str(arguments.run_dir), str(tmp_path)) for part in command]
        assert own != command
        return subprocess.run(own, capture_output=True).returncode == 0

    probes = ("startup", "readiness", "liveness")
    assert [passes(probe) for probe in probes] == [False, False, False]
    file.touch()
    assert [passes(probe) for probe in probes] == [True, True, True]
    for age, expected in ((60, [True, False, True]), (600, [True, False, False])):
        then = file.stat().st_atime - age
        os.utime(file, (then, then))
        assert [passes(probe) for probe in probes] == expected


def test_only_the_edge_reaches_tritons_doors(render: Render) -> None:
    rules = one(render(LEAST), "NetworkPolicy")["spec"]["ingress"]
    by_port = {port["port"]: rule["from"] for rule in rules for port in rule["ports"]}
    edge_labels = one(render(LEAST), "Deployment", "edge")["spec"]["selector"]["matchLabels"]
    only_edge = [{"podSelector": {"matchLabels": edge_labels}}]
    assert set(by_port) == {"http", "grpc", "metrics"}
    assert by_port["http"] == by_port["grpc"] == only_edge
    assert by_port["metrics"] != only_edge
    without = one(render(WITHOUT_EDGE), "NetworkPolicy")["spec"]["ingress"][0]
    assert without["from"] == WITHOUT_EDGE["networkPolicy"]["clients"]
    nobody = one(render({**WITHOUT_EDGE, "networkPolicy": {"prometheus": []}}), "NetworkPolicy")["spec"]
    assert not nobody["ingress"]  # and not a rule that lets everybody in


def test_a_store_is_copied_before_and_while_a_replica_serves(render: Render) -> None:
    pod = one(render(SETS["store"]), "Deployment")["spec"]["template"]["spec"]
    (first,), (_, copies) = pod["initContainers"], pod["containers"]
    assert first["args"] == ["copy", "store:faces/live", "/avatars"]
    assert {"name": "FROM", "value": "store:faces/live"} in copies["env"]
    keys = [each["valueFrom"]["secretKeyRef"]["name"] for each in copies["env"] if "valueFrom" in each]
    assert keys == [STORE["secret"]] * 2


def test_time_to_stop_is_left(manifests: list[Manifest]) -> None:
    pod = one(manifests, "Deployment")["spec"]["template"]["spec"]
    (_, seconds) = server_of(manifests)["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + 10


def test_the_adapter_makes_the_metric_that_the_autoscaler_asks_for(render: Render) -> None:
    (metric,) = one(render(LEAST), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == ADAPTER["name"]["as"]


def test_the_adapters_query_is_the_recorded_one_by_pod() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())["groups"]
    rules = {rule["record"]: rule["expr"] for group in groups for rule in group["rules"] if "record" in rule}
    query = ADAPTER["metricsQuery"].replace("<<.GroupBy>>", "instance")
    query = query.replace("{<<.LabelMatchers>>}", "").replace("<<.LabelMatchers>>,", "")
    assert query.split() == rules["talksplat:queue_to_compute:ratio"].split()


def test_the_servers_page_has_what_the_adapter_asks_for(server: Server) -> None:
    server.canary(20)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    page = opener.open(server.metrics_url, timeout=10).read().decode()
    there = set(re.findall(r"^(\w+)", page, re.MULTILINE))
    asked = set(re.findall(r"\b(?:nv|talksplat)_\w+", ADAPTER["metricsQuery"] + ADAPTER["seriesQuery"]))
    assert len(asked) == 4
    assert asked <= there
    for model in ("audio_encoder", "vad", "avatar"):
        assert re.search(rf'^nv_inference_queue_duration_us{{.*model="{model}"', page, re.MULTILINE)


def test_prometheus_answers_the_adapters_query(tmp_path: Path) -> None:
    matchers = 'namespace="faces",pod=~"live-0|live-1"'
    query = ADAPTER["metricsQuery"].replace("<<.LabelMatchers>>", matchers).replace("<<.GroupBy>>", "pod")
    series = []
    for pod, waited in (("live-0", 120), ("live-1", 360)):
        labels = f'namespace="faces",pod="{pod}"'
        model = f'{labels},model="vad"'
        series += [
            {"series": f"nv_inference_queue_duration_us{{{model}}}", "values": "0+0x20"},
            {"series": f"nv_inference_compute_infer_duration_us{{{model}}}", "values": "0+60000x20"},
            {"series": f"talksplat_wait_ms_sum{{{labels}}}", "values": f"0+{waited}x20"},
            {"series": f"talksplat_chunk_ms_sum{{{labels}}}", "values": f"0+{waited + 60}x20"},
        ]
    expected = [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in (("live-0", 1), ("live-1", 3))]
    question = {"expr": query, "eval_time": "2m", "exp_samples": expected}
    test = {"tests": [{"interval": "10s", "input_series": series, "promql_expr_test": [question]}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run([tool("promtool"), "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
