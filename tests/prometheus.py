"""Debian's Prometheus as a part that tests use."""

import http.client
import json
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import yaml

from talksplat.server import HOST, ROOT

FOLDER = ROOT / "deploy" / "prometheus"
SCRAPE_SECONDS = 0.2


def tool(name: str) -> str:
    """The path of a program of Prometheus; skips the test where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: apt install prometheus)")
    return path


class Prometheus:
    """The real one, with the project's own configuration: only faster, and with these targets."""

    def __init__(self, folder: Path, servers: list[str], edge: str, port: int) -> None:
        self._port = port
        shutil.copytree(FOLDER, folder)
        for name, targets in (("talksplat", servers), ("edge", [edge])):
            (folder / "targets" / f"{name}.yml").write_text(yaml.safe_dump([{"targets": targets}]))
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{SCRAPE_SECONDS * 1000:.0f}ms")
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        rules = yaml.safe_load((folder / "rules.yml").read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                if "for" in rule:
                    rule["for"] = "1s"  # nobody waits for minutes here
        (folder / "rules.yml").write_text(yaml.safe_dump(rules))
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={HOST}:{port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The result now: labels and value of each series."""
        answer = self.get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        return [(each["metric"], float(each["value"][1])) for each in answer["result"]]

    def value(self, expression: str) -> float:
        """Of a query with one series, or none, which counts as 0."""
        result = self.query(expression)
        assert len(result) <= 1, result
        return result[0][1] if result else 0.0

    def get(self, path: str) -> Any:
        """The data of an answer; {"result": []} while it does not answer yet."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            assert self._process.poll() is None, "Prometheus has ended"
            return {"result": []}
        finally:
            connection.close()
        assert body["status"] == "success", body
        return body["data"]
