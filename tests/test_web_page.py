"""The web page in a real Chromium: upload, ask, move sliders, compare; scripts/test_web.sh runs this."""

import io
import os
import shutil

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.cli.chat.conversation import Conversation
from llava_pitome.cli.web.command import temporary_folder
from llava_pitome.cli.web.page import EXAMPLES, build, launch, write_examples
from llava_pitome.cli.web.session import InitialChoices, Session
from llava_pitome.embedded import render, scenes
from llava_pitome.embedded.questions import ask
from llava_pitome.integrations.serve.command import listen

SEED = 5
IMAGE = Image.fromarray(render.render(scenes.scene(SEED)))
QUESTION = ask(scenes.scene(SEED), 1)[0].text


def chromium() -> str | None:
    """The browser: $CHROMIUM, or one that is installed, or else Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((path for n in names if (path := shutil.which(n))), None)


@pytest.fixture(scope="module")
def url():
    with temporary_folder() as folder:
        page = build(Session(*load("embedded"), 16), write_examples(folder), InitialChoices())
        with listen("127.0.0.1", 0) as sock:
            port = sock.getsockname()[1]
        yield launch(page, "127.0.0.1", port, 1, wait=False)
        page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    page.goto(url)
    yield page
    page.close()


@pytest.fixture
def file(tmp_path):
    IMAGE.save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def upload(page: Page, file) -> None:
    page.locator("#image input[type=file]").set_input_files(file)
    expect(page.locator("#image img")).to_have_count(1)
    page.locator("#question textarea").fill(QUESTION)


@pytest.fixture
def uploaded(page, file):
    upload(page, file)
    return page


def answer(page: Page, tokens: int) -> str:
    page.locator("#ask").click()
    expect(page.locator("#numbers")).to_contain_text(f"{tokens} image tokens of 196")
    return page.locator("#answer").inner_text().strip()


def move(page: Page, slider: str, value: float) -> None:
    field = page.locator(f"{slider} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def drawing(page: Page, name: str) -> Image.Image:
    image = page.locator(f"{name} img")
    expect(image).to_be_visible()
    return Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())).convert("RGB")


def offline(ratio: float) -> str:
    model, processor = load("embedded")
    with merge_tokens(model, MergeConfig(ratio=ratio), processor):
        conversation = Conversation(model, processor, 16)
        conversation.add_image(IMAGE)
        return "".join(conversation.ask(QUESTION)).strip()


def test_a_question_about_an_upload_is_answered_as_offline(uploaded):
    assert answer(uploaded, 65) == offline(0.9)
    expect(uploaded.locator("#numbers")).to_contain_text("GFLOPs")
    assert drawing(uploaded, "#overlay").size == drawing(uploaded, "#energy").size
    expect(uploaded.locator("#caption")).to_contain_text("65 tokens")


def test_the_ratio_changes_tokens_answer_and_overlay(uploaded):
    answer(uploaded, 65)
    before = drawing(uploaded, "#overlay").tobytes()
    move(uploaded, "#ratio", 0.8)
    expect(uploaded.locator("#amount")).to_contain_text("19 image tokens of 196")
    assert answer(uploaded, 19) == offline(0.8)
    expect(uploaded.locator("#caption")).to_contain_text("19 tokens")
    assert drawing(uploaded, "#overlay").tobytes() != before


def test_the_layer_slider_shows_the_tokens_after_a_layer(uploaded):
    answer(uploaded, 65)
    expect(uploaded.locator("#caption")).to_contain_text("65 tokens")
    last = drawing(uploaded, "#overlay").tobytes()
    move(uploaded, "#layer", 1)
    expect(uploaded.locator("#caption")).to_contain_text("after layer 1 of the vision tower: 177 tokens")
    assert drawing(uploaded, "#overlay").tobytes() != last
    move(uploaded, "#layer", 0)
    expect(uploaded.locator("#caption")).to_contain_text("the image: 196 patches")


def test_compare_also_answers_without_merging(uploaded):
    uploaded.locator("#compare input").check()
    answer(uploaded, 65)
    expect(uploaded.locator("#plain-numbers")).to_contain_text("196 image tokens of 196")
    assert uploaded.locator("#plain").inner_text().strip() == offline(1.0)


def test_an_example_can_be_chosen(page):
    question = ask(scenes.scene(EXAMPLES[0]), 1)[0].text
    page.get_by_text(question).click()
    expect(page.locator("#image img")).to_be_visible()
    expect(page.locator("#question textarea")).to_have_value(question)
    assert answer(page, 65)


def test_an_error_is_shown_in_words(uploaded):
    uploaded.locator("#question textarea").fill(" ")
    uploaded.locator("#ask").click()
    expect(uploaded.get_by_text("the question is empty")).to_be_visible()


CLIPBOARD = """bytes => {
    const file = new Blob([new Uint8Array(bytes)], {type: "image/png"});
    navigator.clipboard.read = async () => [new ClipboardItem({"image/png": file})];
}"""


def test_an_image_is_pasted(page, file):
    page.evaluate(CLIPBOARD, list(file.read_bytes()))
    page.locator("#image").get_by_label("Paste from clipboard").click()
    expect(page.locator("#image img")).to_be_visible()
    page.locator("#question textarea").fill(QUESTION)
    assert answer(page, 65) == offline(0.9)


def test_a_truncated_image_is_refused_and_the_next_is_answered(page, file, tmp_path):
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(file.read_bytes()[:300])
    upload(page, truncated)
    page.locator("#ask").click()
    expect(page.get_by_text("is truncated")).to_be_visible()
    page.locator("#image").get_by_label("Remove Image").click()
    upload(page, file)
    assert answer(page, 65) == offline(0.9)


def test_concurrent_users_get_their_own_answers(browser, url, file):
    pages = {ratio: browser.new_page() for ratio in (0.9, 0.8, 0.95)}
    tokens = {ratio: MergeConfig(ratio=ratio).tokens_at(196, 11) for ratio in pages}
    for ratio, page in pages.items():
        page.goto(url)
        upload(page, file)
        move(page, "#ratio", ratio)
        expect(page.locator("#amount")).to_contain_text(f"{tokens[ratio]} image tokens")
    for page in pages.values():
        page.locator("#ask").click()
    for ratio, page in pages.items():
        expect(page.locator("#numbers")).to_contain_text(f"{tokens[ratio]} image tokens of 196")
        assert page.locator("#answer").inner_text().strip() == offline(ratio)
        page.close()
