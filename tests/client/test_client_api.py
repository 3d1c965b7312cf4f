"""The public surface of `talksplat_client`."""

import inspect
import subprocess
import sys

import pytest

import talksplat_client
from talksplat_client import AsyncClient, AsyncStream, Client, Limits, Retry, Stream, Timeout


def test_all_lists_exactly_what_can_be_used() -> None:
    modules = {name for name, value in vars(talksplat_client).items() if inspect.ismodule(value)}
    public = {name for name in vars(talksplat_client) if not name.startswith("_")} - modules
    assert set(talksplat_client.__all__) == public
    assert talksplat_client.__all__ == sorted(talksplat_client.__all__)


@pytest.mark.parametrize(("blocking", "asynchronous"), [(Client, AsyncClient), (Stream, AsyncStream)])
def test_the_twins_have_the_same_surface(blocking: type, asynchronous: type) -> None:
    def surface(cls: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(value).parameters) if callable(value) else []
            for name, value in vars(cls).items()
            if not name.startswith("_") or name == "__init__"
        }

    assert surface(blocking) == surface(asynchronous)


def test_it_imports_neither_the_server_nor_the_export_nor_the_media_extra() -> None:
    code = """
import sys, talksplat_client, talksplat_client.cli
print(*sorted({name.split(".")[0] for name in sys.modules} & {"talksplat", "talksplat_export", "torch", "av", "soxr"}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Timeout(connect=0),
        lambda: Timeout(chunk=-1),
        lambda: Timeout(utterance=float("nan")),
        lambda: Timeout(recovery=-1),
        lambda: Limits(in_flight=0),
        lambda: Retry(first=0),
        lambda: Retry(first=2, longest=1),
        lambda: Retry(factor=0.5),
        lambda: Client("http://127.0.0.1:8000"),
        lambda: Client("127.0.0.1"),
        lambda: Client([]),
        lambda: AsyncClient("localhost:"),
    ],
)
def test_senseless_settings_are_refused_when_they_are_made(wrong: object) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match=r"expected|no address"):
        wrong()


def test_recovery_can_be_switched_off() -> None:
    assert Timeout(recovery=0).recovery == 0
