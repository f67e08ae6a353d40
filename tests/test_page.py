"""The server's page in a real Chromium: typing, watching, replaying, filling holes, comparing.

Run: pip install playwright==1.65.2; apt-get install chromium; pytest -m browser tests/test_page.py
SCREENSHOTS=folder keeps pictures of it.
"""

import os
from pathlib import Path

import pytest

from llada.models.building import load_for_inference
from serving import LENGTH, serve

pytestmark = pytest.mark.browser
MASK = "▒"


@pytest.fixture(scope="module")
def server(model_dir):
    # MODEL: a trained checkpoint, for pictures that are worth looking at
    folder = os.environ.get("MODEL", str(model_dir))
    server = serve(load_for_inference(folder, chat=True)[0], folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"],
        )
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark", "phone"])
def page(request, chromium, server):
    size = {"width": 390, "height": 780} if request.param == "phone" else {"width": 1200, "height": 800}
    scheme = "dark" if request.param == "dark" else "light"
    context = chromium.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "400" not in m.text else None)
    page.goto(server.url)
    page.get_by_text("tiny", exact=True).wait_for()
    page.set_default_timeout(20_000)
    page.variant = request.param
    yield page
    assert errors == []
    # nothing may stand outside a narrow screen
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


def picture(page, name):
    if "SCREENSHOTS" in os.environ:
        Path(os.environ["SCREENSHOTS"]).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{os.environ['SCREENSHOTS']}/{name}-{page.variant}.png", full_page=True)


def ask(page, text):
    page.fill("#question", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant:last-child .notes:not(:empty)")
    return page.locator(".message.assistant").last


def test_an_answer_denoises_and_can_be_replayed(page):
    answer = ask(page, "<b>hello</b>")
    assert page.locator(".message.user").last.inner_text() == "<b>hello</b>"  # text, not markup
    canvas, slider = answer.locator(".canvas"), answer.locator("input[type=range]")
    num_steps = int(slider.get_attribute("max"))
    assert num_steps > 1
    whole = canvas.inner_text()
    slider.fill("0")
    assert canvas.inner_text().count(MASK) == LENGTH
    slider.focus()
    page.keyboard.press("ArrowRight")  # the keyboard moves through the steps
    assert canvas.inner_text().count(MASK) == LENGTH - 1
    assert answer.locator(".fresh").count() == 1
    slider.fill(str(num_steps // 2))
    picture(page, "chat")
    answer.get_by_role("button", name="Replay", exact=True).click()
    answer.get_by_text(f"step {num_steps} of {num_steps}").wait_for()
    assert canvas.inner_text() == whole


def test_a_replay_is_a_file_of_its_own(page, tmp_path):
    answer = ask(page, "</script><script>document.title = 'broken'</script>")
    with page.expect_download() as download:
        answer.get_by_role("button", name="Save replay").click()
    file = tmp_path / "replay.html"
    download.value.save_as(file)
    text = file.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "")
    other = page.context.new_page()
    other.goto(file.as_uri())
    assert other.title() == "LLaDA replay"
    other.locator("input[type=range]").fill("0")
    assert other.locator(".canvas").inner_text().count(MASK) == LENGTH
    other.close()


def test_a_hole_in_a_text_is_filled(page):
    page.get_by_role("tab", name="Infill").click()
    page.fill("#hole", "8")
    before, hole, after = "one two ", "three", " four"
    page.fill("#text", before + hole + after)
    page.evaluate(
        "([s, e]) => document.getElementById('text').setSelectionRange(s, e)",
        [len(before), len(before + hole)],
    )
    page.click("#fill-button")
    page.wait_for_selector("#filled .notes:not(:empty)")
    text = page.input_value("#text")
    assert text.startswith(before)
    assert text.endswith(after)
    assert page.locator("#filled .given").all_inner_texts() == [before, after]
    picture(page, "infill")


def test_two_settings_stand_side_by_side(page):
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowLeft")  # tabs go round
    page.fill("#settings-right input[name=max_tokens]", "8")
    page.select_option("#settings-right select[name=remasking]", "random")
    page.fill("#both", "hello")
    page.get_by_role("button", name="Run both").click()
    page.wait_for_selector("#right .notes:not(:empty)")
    assert page.locator("#left .canvas span:not(.given)").count() == LENGTH
    assert page.locator("#right .canvas span:not(.given)").count() == 8
    picture(page, "compare")


def test_settings_are_sent_and_refusals_are_shown(page):
    if not page.locator("#settings input[name=temperature]").is_visible():
        page.locator("#panel").get_by_text("Settings", exact=True).click()  # folded on a phone
    page.fill("#settings input[name=temperature]", "5")
    page.fill("#question", "hello")
    page.click("#send")
    page.wait_for_selector(".message.error")
    assert "temperature" in page.locator(".message.error").inner_text()
    page.fill("#settings input[name=temperature]", "")
    assert ask(page, "again").locator(".canvas").inner_text()


def test_an_answer_that_is_a_script_is_text(page, server, monkeypatch):
    spelled = dict.fromkeys(range(1000), "<script>document.title = 'broken'</script>")
    monkeypatch.setattr(server.service, "_spelled", spelled)
    monkeypatch.setattr(server.service.tokenizer, "decode", lambda *_, **__: "<img src=x onerror=alert(1)>")
    answer = ask(page, "hello")
    assert "<script>" in answer.locator(".canvas").inner_text()
    assert "<img" in answer.inner_text()
    assert answer.locator("img, script").count() == 0
    assert page.title() == "LLaDA"


def test_light_and_dark_can_be_switched(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != before
    page.click("#theme")
    assert page.evaluate(colour) == before
