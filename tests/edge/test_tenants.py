"""The tenants file: what it may say, and who may then do what."""

import logging
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talksplat import tenants
from talksplat.tenants import Tenants, TenantsError, TenantsFile

ACME_KEY, GLOBEX_KEY = "A" * 43, "G" * 43  # the same in every process: names of tests hold them
ACME, GLOBEX = tenants.hash_of(ACME_KEY), tenants.hash_of(GLOBEX_KEY)
TEXT = f"""
streams = 12
[tenants.acme]
keys = ["{ACME}"]
avatars = ["ava", "kim"]
streams = 4
requests_per_second = 60
[tenants.globex]
keys = ["{GLOBEX}", "{tenants.hash_of("another")}"]
avatars = ["*"]
streams = 2
requests_per_second = 0.5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(TEXT)
    return path


def test_a_file_says_who_there_is_and_what_they_may(path: Path) -> None:
    found = Tenants.read(path)
    assert found.streams == 12
    assert set(found.by_name) == {"acme", "globex"}
    acme = found.by_name["acme"]
    assert (acme.streams, acme.requests_per_second, acme.avatars) == (4, 60.0, frozenset({"ava", "kim"}))


def test_a_key_is_its_tenants_and_nobody_elses() -> None:
    found = Tenants.parse(TEXT)
    for key, name in ((ACME_KEY, "acme"), (GLOBEX_KEY, "globex"), ("another", "globex")):
        owner = found.of_key(key)
        assert owner is not None
        assert owner.name == name
    for wrong in ("", ACME, ACME_KEY[:-1], ACME_KEY + "\n", "\udcff", "é"):  # a hash is no key
        assert found.of_key(wrong) is None


def test_an_avatar_is_its_tenants_alone() -> None:
    found = Tenants.parse(TEXT)
    assert found.may_use("acme", "ava")
    assert not found.may_use("acme", "lee")
    assert found.may_use("globex", "lee")
    for nobody in ("", "nobody", "Acme", "*"):
        assert not found.may_use(nobody, "ava")
        assert not found.knows(nobody)
    assert found.others("acme", "ava") == ["globex"]
    assert found.others("globex", "lee") == []
    assert found.others("globex", "ava") == ["acme"]


def test_the_canary_may_use_every_avatar_and_is_nobodys_tenant() -> None:
    found = Tenants.parse(TEXT, canary="canary-5e1f")
    assert found.knows("canary-5e1f")
    assert found.may_use("canary-5e1f", "lee")
    assert "canary-5e1f" not in found.by_name
    assert found.others("acme", "kim") == ["globex"]
    assert not Tenants.parse(TEXT).may_use("canary-5e1f", "ava")
    assert "5e1f" not in repr(found)


def test_new_keys_differ_and_match_their_hashes() -> None:
    made = [tenants.key() for _ in range(50)]
    assert len({key for key, _ in made}) == 50
    assert all(tenants.hash_of(key) == digest and len(key) >= 43 for key, digest in made)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("streams = 12", "streams = 12\nlimit = 1", "the file has the unknown limit"),
        ("streams = 12", "", "the file lacks streams"),
        ("streams = 12", "streams = -1", "streams of the file is -1, expected a whole number of at least 1"),
        ("streams = 12", "streams = true", "streams of the file is True"),
        ("streams = 12", "streams = 1.5", "streams of the file is 1.5"),
        ("streams = 12", "streams = ", "no TOML"),
        ("streams = 4", "streams = 0", "streams of tenants.acme is 0"),
        ("streams = 4", "stream = 4", "tenants.acme has the unknown stream"),
        ("= 60", "= -60", "requests_per_second is -60, expected a number above 0"),
        ("= 60", "= nan", "requests_per_second is nan"),
        ("= 60", "= inf", "requests_per_second is inf"),
        ("= 60", '= "60"', "requests_per_second is '60'"),
        (f'["{ACME}"]', f'["{ACME_KEY}"]', "no SHA-256"),
        (f'["{ACME}"]', f'["{ACME.upper()}"]', "no SHA-256"),
        (f'["{ACME}"]', f'"{ACME}"', "tenants.acme.keys is no list of strings"),
        (f'["{ACME}"]', f'["{ACME}", "{ACME}"]', "tenants.acme.keys has the same entry twice"),
        (f'["{ACME}"]', f'["{GLOBEX}"]', "acme and globex have the same key"),
        ('["ava", "kim"]', '["../ava"]', "'../ava' is no avatar id"),
        ('["ava", "kim"]', "[1]", "tenants.acme.avatars is no list of strings"),
        ("[tenants.acme]", "[tenants.'a/b']", "'a/b' is no tenant's name"),
        ("[tenants.acme]", "[tenants.Acme]", "'Acme' is no tenant's name"),
        ("[tenants.acme]", "[tenants.globex]", "no TOML"),
        (TEXT, "streams = 1\ntenants = 3", "expected a table for each tenant"),
        (TEXT, "streams = 1\ntenants.acme = 3", "tenants.acme is 3, expected a table"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_a_sentence(path: Path, before: str, after: str, reason: str) -> None:
    path.write_text(TEXT.replace(before, after, 1))
    with pytest.raises(TenantsError) as caught:
        Tenants.read(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert ACME_KEY not in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused(path: Path) -> None:
    with pytest.raises(TenantsError, match="No such file"):
        Tenants.read(path.with_name("nothing"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TenantsError, match="can't be read"):
        Tenants.read(path)


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


@given(st.text(max_size=200) | st.text(alphabet="[]{}=\"'.,\n tenasrm0123", max_size=60))
def test_any_text_gives_tenants_or_their_error(text: str) -> None:
    try:
        found = Tenants.parse(text)
    except TenantsError:
        return
    assert _is_toml(text)
    assert found.streams >= 1


@pytest.fixture
def pass_a_second(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    now = 0.0
    monkeypatch.setattr("talksplat.tenants.time.monotonic", lambda: now)

    def later() -> None:
        nonlocal now
        now += 1.01

    return later


def test_a_changed_file_is_noticed_after_a_second(path: Path, pass_a_second: Callable[[], None]) -> None:
    file = TenantsFile(path)
    replacement = path.with_suffix(".new")
    replacement.write_text(TEXT.replace('["ava", "kim"]', '["lee"]'))
    os.replace(replacement, path)
    assert file.tenants.may_use("acme", "ava")  # the file is not looked at for every request
    pass_a_second()
    assert not file.tenants.may_use("acme", "ava")
    assert file.tenants.may_use("acme", "lee")


def test_the_last_sound_file_is_kept_when_the_next_is_broken_or_gone(
    path: Path, pass_a_second: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    file = TenantsFile(path)
    for breaking in (lambda: path.write_text("streams = "), path.unlink):
        breaking()
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                pass_a_second()
                assert file.tenants.may_use("acme", "ava")
        assert len(caplog.records) == 1, "said once"
        caplog.clear()
    path.write_text(TEXT.replace("streams = 12", "streams = 13"))
    pass_a_second()
    assert file.tenants.streams == 13


def test_the_environment_names_the_file_and_the_canary(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tenants.FILE_VARIABLE, raising=False)
    assert TenantsFile.of_environment() is None
    monkeypatch.setenv(tenants.FILE_VARIABLE, str(path))
    monkeypatch.setenv(tenants.CANARY_VARIABLE, "canary-5e1f")
    file = TenantsFile.of_environment()
    assert file is not None
    assert file.tenants.knows("canary-5e1f")


def test_a_file_that_is_broken_from_the_start_is_refused(path: Path) -> None:
    path.write_text("")
    with pytest.raises(TenantsError, match="lacks streams, tenants"):
        TenantsFile(path)
