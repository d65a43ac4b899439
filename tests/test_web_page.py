"""The web page in a real Chromium: upload, ask, move sliders, compare; scripts/test_web.sh runs this."""

import io
import os
import shutil

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.cli.chat.conversation import Conversation
from llava_pitome.cli.web import examples
from llava_pitome.cli.web.desk import Desk
from llava_pitome.cli.web.files import folder
from llava_pitome.cli.web.launching import launch
from llava_pitome.cli.web.page import build
from llava_pitome.cli.web.start import Start
from llava_pitome.embedded import render, scenes
from llava_pitome.embedded.questions import ask
from llava_pitome.integrations.serve.listening import listening

SEED = 5
QUESTION = ask(scenes.scene(SEED), 1)[0].text


def chromium() -> str | None:
    """The browser: $CHROMIUM, or one that is installed, or else Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((found for n in names if (found := shutil.which(n))), None)


@pytest.fixture(scope="module")
def address():
    with folder() as files:
        page = build(Desk(*load("embedded"), 16), examples.write(files), Start())
        with listening("127.0.0.1", 0) as sock:
            port = sock.getsockname()[1]
        yield launch(page, "127.0.0.1", port, 1, wait=False)
        page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    found = browser.new_page(viewport={"width": 1400, "height": 1000})
    found.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    found.goto(address)
    yield found
    found.close()


@pytest.fixture
def uploaded(page, tmp_path):
    file = tmp_path / "scene.png"
    Image.fromarray(render.render(scenes.scene(SEED))).save(file)
    page.locator("#picture input[type=file]").set_input_files(file)
    expect(page.locator("#picture img")).to_be_visible()
    page.locator("#question textarea").fill(QUESTION)
    return page


def answered(page: Page, tokens: int) -> str:
    page.locator("#ask").click()
    expect(page.locator("#numbers")).to_contain_text(f"{tokens} image tokens of 196")
    return page.locator("#answer").inner_text().strip()


def move(page: Page, slider: str, value: float) -> None:
    field = page.locator(f"{slider} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def drawn(page: Page, which: str) -> Image.Image:
    picture = page.locator(f"{which} img")
    expect(picture).to_be_visible()
    source = picture.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def offline(config: MergeConfig) -> str:
    model, processor = load("embedded")
    with merge_tokens(model, config, processor):
        talk = Conversation(model, processor, 16)
        talk.show(Image.fromarray(render.render(scenes.scene(SEED))))
        return "".join(talk.ask(QUESTION)).strip()


def test_a_picture_is_uploaded_and_the_question_answered_as_offline(uploaded):
    assert answered(uploaded, 65) == offline(MergeConfig(ratio=0.9))
    expect(uploaded.locator("#numbers")).to_contain_text("GFLOPs")
    assert drawn(uploaded, "#overlay").size == drawn(uploaded, "#energy").size
    expect(uploaded.locator("#where")).to_contain_text("65 tokens")


def test_the_ratio_changes_tokens_answer_and_overlay(uploaded):
    answered(uploaded, 65)
    before = drawn(uploaded, "#overlay").tobytes()
    move(uploaded, "#ratio", 0.8)
    expect(uploaded.locator("#amount")).to_contain_text("19 image tokens of 196")
    assert answered(uploaded, 19) == offline(MergeConfig(ratio=0.8))
    expect(uploaded.locator("#where")).to_contain_text("19 tokens")
    assert drawn(uploaded, "#overlay").tobytes() != before


def test_the_layer_slider_looks_into_the_tower(uploaded):
    answered(uploaded, 65)
    expect(uploaded.locator("#where")).to_contain_text("65 tokens")
    last = drawn(uploaded, "#overlay").tobytes()
    move(uploaded, "#layer", 1)
    expect(uploaded.locator("#where")).to_contain_text("behind layer 1 of the tower: 177 tokens")
    assert drawn(uploaded, "#overlay").tobytes() != last
    move(uploaded, "#layer", 0)
    expect(uploaded.locator("#where")).to_contain_text("the picture: 196 patches")


def test_compare_answers_beside_without_merging(uploaded):
    uploaded.locator("#compare input").check()
    answered(uploaded, 65)
    expect(uploaded.locator("#plain-numbers")).to_contain_text("196 image tokens of 196")
    assert uploaded.locator("#plain").inner_text().strip() == offline(MergeConfig(ratio=1.0))


def test_an_example_can_be_picked(page):
    question = ask(scenes.scene(examples.SEEDS[0]), 1)[0].text
    page.get_by_text(question).click()
    expect(page.locator("#picture img")).to_be_visible()
    expect(page.locator("#question textarea")).to_have_value(question)
    assert answered(page, 65)


def test_what_is_wrong_is_said_in_words(uploaded):
    uploaded.locator("#question textarea").fill(" ")
    uploaded.locator("#ask").click()
    expect(uploaded.get_by_text("the question is empty")).to_be_visible()


PASTED = """bytes => {
    const file = new Blob([new Uint8Array(bytes)], {type: "image/png"});
    navigator.clipboard.read = async () => [new ClipboardItem({"image/png": file})];
}"""


def test_a_picture_is_pasted(page):
    file = io.BytesIO()
    Image.fromarray(render.render(scenes.scene(SEED))).save(file, "PNG")
    page.evaluate(PASTED, list(file.getvalue()))
    page.locator("#picture").get_by_label("Paste from clipboard").click()
    expect(page.locator("#picture img")).to_be_visible()
    page.locator("#question textarea").fill(QUESTION)
    assert answered(page, 65) == offline(MergeConfig(ratio=0.9))


def test_a_truncated_picture_is_refused_in_words_and_the_next_is_answered(page, tmp_path):
    whole = tmp_path / "scene.png"
    Image.fromarray(render.render(scenes.scene(SEED))).save(whole)
    half = tmp_path / "half.png"
    half.write_bytes(whole.read_bytes()[:300])
    page.locator("#picture input[type=file]").set_input_files(half)
    expect(page.locator("#picture img")).to_have_count(1)
    page.locator("#question textarea").fill(QUESTION)
    page.locator("#ask").click()
    expect(page.get_by_text("the picture is truncated")).to_be_visible()
    page.locator("#picture").get_by_label("Remove Image").click()
    page.locator("#picture input[type=file]").set_input_files(whole)
    expect(page.locator("#picture img")).to_have_count(1)
    assert answered(page, 65) == offline(MergeConfig(ratio=0.9))


def test_several_people_wait_for_each_other_and_all_get_their_own(browser, address, tmp_path):
    file = tmp_path / "scene.png"
    Image.fromarray(render.render(scenes.scene(SEED))).save(file)
    pages = [browser.new_page() for _ in range(3)]
    wanted = {ratio: MergeConfig(ratio=ratio).tokens_at(196, 11) for ratio in (0.9, 0.8, 0.95)}
    for page, ratio in zip(pages, wanted, strict=True):
        page.goto(address)
        page.locator("#picture input[type=file]").set_input_files(file)
        expect(page.locator("#picture img")).to_be_visible()
        page.locator("#question textarea").fill(QUESTION)
        move(page, "#ratio", ratio)
        expect(page.locator("#amount")).to_contain_text(f"{wanted[ratio]} image tokens")
    for page in pages:
        page.locator("#ask").click()
    for page, ratio in zip(pages, wanted, strict=True):
        expect(page.locator("#numbers")).to_contain_text(f"{wanted[ratio]} image tokens of 196")
        assert page.locator("#answer").inner_text().strip() == offline(MergeConfig(ratio=ratio))
        page.close()
