"""The page in a real Chromium, with a microphone that plays real speech, before the real server of `make web`."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from make_avatar import write_avatar

pytest.importorskip("playwright", reason="playwright is not installed: make .venv/.dev")

from playwright.sync_api import FileChooser, Page, Route, expect

from loadtests import page as bench
from loadtests.page import Chromium, Stats, Visit, Web
from talksplat import edge
from talksplat.edge import MissingNginxError, find_nginx
from talksplat.server import ROOT, Ports, Server

SILENCE = 2.4  # seconds between two greetings: the second falls into the answer to the first
AXE = ROOT / "client" / "web" / "node_modules" / "axe-core" / "axe.min.js"
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
INFER = "**/v2/models/{}/infer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[Web]:
    try:
        find_nginx(lua=False)
        bench.find_chromium()
    except (MissingNginxError, bench.MissingChromiumError) as error:
        pytest.skip(str(error))
    write_avatar(folder / "avatars", "red")
    shutil.copytree(ROOT / "avatars" / "ava", folder / "avatars" / "ava")
    with Web(folder / "run", folder / "avatars") as web:
        yield web
        left = psutil.Process(web.process.pid).children(recursive=True)
    assert web.process.returncode == 0
    assert web.output.read_text().endswith("Stopped.\n")
    assert not [each for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def chromium(web: Web, folder: Path) -> Iterator[Chromium]:
    """One browser: to start it takes a second. Not for the session: its driver's loop is in the way of asyncio's."""
    with Chromium(bench.greeting(folder / "microphone.wav", SILENCE)) as chromium:
        yield chromium


@pytest.fixture
def visit(chromium: Chromium, web: Web) -> Iterator[Visit]:
    """A viewer on a desktop, with the face there."""
    with opened(chromium, web.url) as visit:
        visit.is_("idle")
        yield visit


@contextlib.contextmanager
def opened(chromium: Chromium, url: str, **options: Any) -> Iterator[Visit]:
    """A page whose scripts go well, and do nothing that its policy forbids; some tests have requests fail."""
    with chromium.visit(url, **options) as visit:
        yield visit
        unexpected = [error for error in visit.errors if "Failed to load resource" not in error]
        assert unexpected == []


def answering(model: str, status: int, error: str) -> Callable[[Page], None]:
    """Have a model answer so."""

    def prepare(page: Page) -> None:
        body = json.dumps({"error": error})
        page.route(
            INFER.format(model), lambda route: route.fulfill(status=status, body=body, content_type="application/json")
        )

    return prepare


def said(stats: Stats, who: str) -> list[str]:
    return [caption["text"] for caption in stats["captions"] if caption["who"] == who]


# Frames


def test_half_a_minute_of_speech_is_drawn_in_time(visit: Visit, folder: Path) -> None:
    """Bounds for a machine that does other work meanwhile; `python -m loadtests.page` has the figures."""
    bench.talk(visit, bench.recording(folder / "speech.wav", 33))
    seen = visit.observe(30)
    stats = visit.stats()
    assert stats["state"] == "speaking"
    assert seen["out_of_order"] == 0
    assert float(str(seen["frames_per_s"])) >= 20, seen
    assert float(str(seen["skew_p95_ms"])) <= 90, seen
    assert len(stats["skewsMs"]) > 500
    assert any("people" in text for text in said(stats, "avatar"))
    expect(visit.page.locator("#captions > *").first).to_contain_text("welcome")


def test_the_picture_changes_while_the_avatar_speaks_and_rests(visit: Visit, folder: Path) -> None:
    def changes() -> int:
        pictures = set()
        for _ in range(6):
            pictures.add(visit.page.evaluate("() => document.querySelector('#face').toDataURL()"))
            visit.page.wait_for_timeout(150)
        return len(pictures)

    assert changes() > 2
    bench.talk(visit, bench.recording(folder / "short.wav", 3))
    assert changes() > 4


# Conversation


def test_who_speaks_is_heard_answered_and_may_interrupt(visit: Visit) -> None:
    visit.page.evaluate(
        """() => {
          const devices = navigator.mediaDevices, open = devices.getUserMedia.bind(devices);
          devices.getUserMedia = terms => { window.opened = 1 + (window.opened ?? 0); return open(terms); };
          for (let click = 0; click < 2; click++) document.querySelector("#talk").click(); // the second while it asks
        }"""
    )
    expect(visit.page.locator("#talk")).to_have_attribute("aria-pressed", "true")
    assert visit.page.evaluate("() => window.opened") == 1
    visit.is_("listening")
    stats = visit.is_("speaking")
    first = said(stats, "you")[0]  # others follow where the machine is slow, and "Hello" is over before it listens
    assert first.lower().endswith("and welcome.")
    assert said(stats, "avatar")[0] == "Hello!"
    for stage in ("endOfSpeech", "recognition", "voice", "firstFrame", "answer"):
        assert 0 < stats["stages"][stage] < 20_000, stage
    expect(visit.page.locator("#captions > *").nth(1)).to_have_text("ava: Hello!")

    stats = visit.wait_for(lambda stats: "interruption" in stats["stages"])  # by the next greeting
    assert stats["state"] == "listening"
    assert 0 < stats["stages"]["interruption"] < 3000
    visit.wait_for(lambda stats: len(said(stats, "you")) >= 2)
    visit.page.click("#talk")
    expect(visit.page.locator("#talk")).to_have_attribute("aria-pressed", "false")
    assert visit.stats()["outOfOrder"] == 0


def test_a_text_is_spoken_and_captioned(visit: Visit) -> None:
    text = "I answer from a script, since no language model is connected."  # long enough to be stopped
    visit.page.fill("#text", text)
    visit.page.click("#say")
    visit.is_("speaking")
    expect(visit.page.locator("#captions > *")).to_have_text(f"ava: {text}")
    expect(visit.page.locator("#text")).to_have_value("")
    visit.page.click("#stop")
    visit.is_("idle")
    expect(visit.page.locator("#stop")).to_be_hidden()


# Avatars


def test_another_avatar_is_loaded_with_its_progress_shown(chromium: Chromium, web: Web) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        if b'"operation":"preload"' in (route.request.post_data_buffer or b"") and b"red" in (
            route.request.post_data_buffer or b""
        ):
            held.append(route)
        else:
            route.continue_()

    with opened(chromium, web.url, prepare=lambda page: page.route(INFER.format("rasterizer"), hold)) as visit:
        visit.is_("idle")
        assert visit.page.locator("#avatar option").all_text_contents() == ["ava", "red"]
        visit.page.select_option("#avatar", "red")
        expect(visit.page.locator("#loading")).to_contain_text("Loading red")
        expect(visit.page.locator("#progress")).to_be_visible()
        held[0].continue_()
        stats = visit.is_("idle")
        visit.wait_for(lambda after: after["framesDrawn"] > stats["framesDrawn"] + 5)
        expect(visit.page.locator("#loading")).to_be_hidden()
        expect(visit.page.locator("#face")).to_have_attribute("aria-label", "The face of red, generated by AI")


def test_only_the_avatar_that_was_picked_last_is_shown(chromium: Chromium, web: Web) -> None:
    """Also where an earlier choice, of the same avatar, is answered first."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        if b'"operation":"preload"' in (route.request.post_data_buffer or b""):
            held.append(route)
        else:
            route.continue_()

    with opened(chromium, web.url, prepare=lambda page: page.route(INFER.format("rasterizer"), hold)) as visit:
        visit.wait_for(lambda _: len(held) == 1)
        for count, avatar in enumerate(("red", "ava"), 2):
            visit.page.select_option("#avatar", avatar)
            while len(held) < count:
                visit.page.wait_for_timeout(20)
        held[0].continue_()
        held[1].continue_()
        visit.page.wait_for_timeout(300)
        assert visit.stats()["state"] == "starting"
        held[2].continue_()
        visit.is_("idle")
        stats = visit.wait_for(lambda stats: stats["framesDrawn"] > 10)
        assert stats["outOfOrder"] == 0


def test_an_avatar_may_be_named_in_the_address(chromium: Chromium, web: Web) -> None:
    with opened(chromium, f"{web.url}?avatar=red") as visit:
        visit.is_("idle")
        expect(visit.page.locator("#avatar")).to_have_value("red")


# What goes wrong


def test_an_unknown_avatar_is_named(chromium: Chromium, web: Web) -> None:
    with opened(chromium, f"{web.url}?avatar=nobody") as visit:
        expect(visit.page.get_by_role("alert")).to_have_text("There is no avatar nobody here.")


def test_a_microphone_that_is_not_allowed_is_explained(chromium: Chromium, web: Web) -> None:
    with opened(chromium, web.url, microphone=False) as visit:
        visit.is_("idle")
        visit.page.click("#talk")
        expect(visit.page.get_by_role("alert")).to_contain_text("The microphone is not allowed. Allow it")
        expect(visit.page.locator("#talk")).to_have_attribute("aria-pressed", "false")


def test_a_file_without_sound_is_refused_in_a_sentence(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no sound")
    visit.page.set_input_files("#file", tmp_path / "notes.txt")
    expect(visit.page.get_by_role("alert")).to_have_text("This browser finds no sound in notes.txt.")


def test_a_text_that_the_voice_refuses_is_explained(chromium: Chromium, web: Web) -> None:
    reason = "This text is not prepared, and no phonemiser is installed."
    with opened(chromium, web.url, prepare=answering("tts", 400, reason)) as visit:
        visit.is_("idle")
        visit.page.fill("#text", "Something else.")
        visit.page.press("#text", "Enter")
        expect(visit.page.get_by_role("alert")).to_have_text(reason)
        visit.is_("idle")


def test_a_server_that_wants_a_key_is_given_one(chromium: Chromium, web: Web) -> None:
    keys: list[str | None] = []

    def ask_for_a_key(route: Route) -> None:
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer opens":
            route.continue_()
        else:
            route.fulfill(status=401, body='{"error":"An API key is needed."}')

    with opened(chromium, web.url, prepare=lambda page: page.route("**/v2/**", ask_for_a_key)) as visit:
        dialog = visit.page.get_by_role("dialog")
        expect(dialog).to_contain_text("This server wants an API key.")
        field = visit.page.get_by_label("API key of this server")
        field.fill("is no ключ")
        field.press("Enter")
        expect(dialog).to_be_visible()
        field.fill("opens")
        field.press("Enter")
        visit.is_("idle")
        assert keys[0] is None
        settings = visit.page.get_by_role("button", name="Settings")
        settings.click()
        field.fill("else")
        field.press("Escape")
        expect(dialog).to_be_hidden()
        settings.click()
        field.fill("else")
        dialog.get_by_role("button", name="Cancel").click()
        expect(dialog).to_be_hidden()
        settings.click()
        expect(field).to_have_value("opens")
        assert visit.stats()["state"] == "idle"
        assert visit.page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]


def test_behind_the_edge_it_talks_with_a_key(chromium: Chromium, server: Server, tmp_path: Path) -> None:
    try:
        find_nginx()
    except MissingNginxError as error:
        pytest.skip(str(error))
    address = edge.Address(tmp_path / "certificate.pem", tmp_path / "key.pem", port=Ports.free().http)
    edge.make_certificate(address.certificate, address.certificate_key, address.host)
    key = edge.make_tenants(tmp_path / "tenants.toml")
    nginx = edge.Edge(tmp_path / "tenants.toml", [server.ports], address, tmp_path / "edge")
    nginx.start()
    try:
        with opened(chromium, f"https://{address.url}/?avatar=red", ignore_https_errors=True) as visit:
            visit.page.get_by_label("API key of this server").fill(key)
            visit.page.get_by_role("button", name="Save").click()
            visit.is_("idle")
            visit.page.click("#talk")
            stats = visit.is_("speaking")
            assert said(stats, "you") == ["Hello, and welcome."]
    finally:
        nginx.stop()


def test_a_server_that_is_not_there_yet_is_waited_for(chromium: Chromium, web: Web) -> None:
    with opened(chromium, web.url, prepare=lambda page: page.route("**/v2/**", lambda route: route.abort())) as visit:
        expect(visit.page.get_by_role("status")).to_have_text("No server answers. Trying again …")
        visit.page.unroute("**/v2/**")
        visit.is_("idle", 30)


# For everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("look", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nobody_is_shut_out(chromium: Chromium, web: Web, look: dict[str, Any], scheme: str) -> None:
    """By axe-core's rules, WCAG 2.2 A and AA and its best practices: at rest, after a talk, and in the settings."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed: make types")
    with opened(chromium, web.url, color_scheme=scheme, **look) as visit:
        page = visit.page
        page.evaluate(AXE.read_text())
        visit.is_("idle")
        wide, height = page.evaluate("() => [document.documentElement.scrollWidth - innerWidth, innerHeight]")
        assert wide <= 0
        for control in ("#face", "#talk", "#text"):  # without scrolling
            box = page.locator(control).bounding_box()
            assert box is not None
            assert box["y"] >= 0, control
            assert box["y"] + box["height"] <= height, control
        assert violations(page) == []

        page.fill("#text", "You are welcome.")
        page.press("#text", "Enter")
        visit.is_("speaking")
        page.click(".meter summary")
        assert violations(page) == []
        page.get_by_role("button", name="Settings").click()
        assert violations(page) == []


def violations(page: Page) -> list[str]:
    found: list[dict[str, Any]] = page.evaluate("async () => (await axe.run()).violations")
    return [f"{each['id']}: {each['help']} {[node['html'] for node in each['nodes']]}" for each in found]


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.page
    choosers: list[FileChooser] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))

    def tab_to(selector: str) -> None:
        for _ in range(15):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                outline = "() => getComputedStyle(document.activeElement.closest('.line') ?? document.activeElement)"
                assert page.evaluate(f"{outline}.outlineStyle") == "solid", selector  # it is seen where one is
                return
        raise AssertionError(f"Tab never comes to {selector}")

    tab_to("#avatar")
    tab_to("#open-settings")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("() => document.activeElement.id") == "open-settings"
    tab_to("#talk")
    page.keyboard.press("Space")
    expect(page.locator("#talk")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Space")
    expect(page.locator("#talk")).to_have_attribute("aria-pressed", "false")
    tab_to("#text")
    page.keyboard.type("You are welcome.")
    page.keyboard.press("Enter")
    visit.is_("speaking")
    page.keyboard.press("Escape")
    visit.is_("idle", 2)
    tab_to("#open-file")
    page.keyboard.press("Enter")
    visit.wait_for(lambda _: choosers)
    tab_to("summary")
    page.keyboard.press("Enter")
    expect(page.locator("#stages")).to_be_visible()


# Last: it leaves another server


def test_the_page_goes_on_when_the_server_was_killed(web: Web, visit: Visit, folder: Path) -> None:
    bench.talk(visit, bench.recording(folder / "broken.wav", 4))
    web.kill_server()
    stats = visit.is_("reconnecting", 30)
    expect(visit.page.get_by_role("status")).to_have_text("The server is away. It goes on here as soon as it is back.")
    assert stats["reconnects"] == 0
    after = visit.is_("speaking", 60)  # what was not said yet is
    visit.wait_for(lambda later: later["framesDrawn"] > after["framesDrawn"] + 10)
    stats = visit.is_("idle", 30)
    assert stats["reconnects"] >= 1
    assert stats["outOfOrder"] == 0
    assert len(said(stats, "avatar")) >= 1
