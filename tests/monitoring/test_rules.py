"""The configuration of Prometheus, checked and tested by its own tool, and against the numbers it repeats."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import tool

from loadtests.slo import Slo
from talksplat import metrics
from talksplat.log import SLOW_MS
from talksplat.server import ROOT, Ports

FOLDER = ROOT / "deploy" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
EDGE = set(re.findall(r"# TYPE (\w+)", (ROOT / "deploy" / "nginx" / "edge.lua").read_text()))
ALERTS = [rule for rule in RULES if "alert" in rule]


def run(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_config_and_rules() -> None:
    run("check", "config", FOLDER / "prometheus.yml")


def test_rules_do_what_their_tests_say() -> None:
    run("test", "rules", FOLDER / "rules.test.yml")


def test_every_alert_is_tested_says_what_to_do_and_how_bad_it_is() -> None:
    tests = (FOLDER / "rules.test.yml").read_text()
    for alert in ALERTS:
        assert alert["alert"] in tests
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert len(alert["annotations"]["description"]) > 40
        assert alert["annotations"]["summary"]


def test_the_targets_are_the_servers_own_ports() -> None:
    assert yaml.safe_load((FOLDER / "targets" / "talksplat.yml").read_text()) == [
        {"targets": [f"127.0.0.1:{Ports().metrics}"]}
    ]


def test_latency_is_judged_by_the_objective_everywhere() -> None:
    (slow,) = (alert for alert in ALERTS if alert["alert"] == "TalksplatSlow")
    assert slow["expr"].endswith(f"> {Slo().first_frame_p95_ms:g}")
    assert Slo().first_frame_p95_ms in metrics.CHUNK_BUCKETS  # else the quantile is a guess just there
    assert Slo().first_frame_p95_ms == SLOW_MS
    (dropping,) = (alert for alert in ALERTS if alert["alert"] == "TalksplatDroppingChunks")
    assert dropping["expr"].endswith(f"> {Slo().deadline_miss_pct / 100:g}")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_metrics_that_there_are(rule: dict[str, Any]) -> None:
    records = {each["record"] for each in RULES if "record" in each}
    for name in re.findall(r"\b(talksplat[a-z0-9_:]+)", rule["expr"]):
        assert name in (records | EDGE) or re.sub(r"_(bucket|sum|count)$", "", name) in metrics.FAMILIES
