"""The page in a real browser, each tab used as a person would; skipped where there is none."""

import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import playwright.sync_api as api
import pytest
from PIL import Image

from vqrae.demo.models import open_models
from vqrae.demo.page import build_page
from vqrae.demo.server import serve

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH: {', '.join(NAMES)}"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def visit(browser: api.Browser, folders: list[Path], closing: list) -> tuple[api.Page, str]:
    """A visitor of a page about these models, and its address."""
    page = build_page(open_models(folders))
    address = serve(page, port=None, wait=False)
    closing.append(page)
    visitor = browser.new_page()
    visitor.set_default_timeout(180_000)  # of a busy machine
    visitor.goto(address)
    return visitor, address


@pytest.fixture
def closing() -> Iterator[list]:
    """Pages that are closed when the test ends."""
    pages: list = []
    yield pages
    for page in pages:
        page.close()


def test_each_tab_is_used(
    browser: api.Browser,
    closing: list,
    tokenizer_folder: Path,
    llava: Path,
    generator: Path,
    tmp_path: Path,
) -> None:
    folders = [tokenizer_folder, llava, generator]
    visitor, address = visit(browser, folders, closing)
    faults: list[str] = []
    visitor.on("pageerror", lambda error: faults.append(str(error)))

    # Reconstruct: a scene is there at once; a patch shows its neighbours; own images, also bad ones
    original = visitor.locator("img[alt=original]")
    original.wait_for()
    visitor.locator("[data-patch='10']:visible").click()
    visitor.get_by_text("Row 2, column 3").wait_for()
    assert visitor.locator("figure:visible").count() == 3 + 9
    upload = visitor.locator("input[type=file]:visible")
    bad = {"text.png": b"hello", "empty.png": b"", "script.svg": b"<svg><script/></svg>"}
    bad["large.png"] = bytes(10 * 2**20 + 1)
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        upload.set_input_files(tmp_path / name)
        visitor.locator(".fault").get_by_text(f"{name}: ").wait_for()
    before = original.get_attribute("src")
    Image.new("CMYK", (90, 60), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    upload.set_input_files(tmp_path / "red.jpg")
    visitor.wait_for_function(
        "before => document.querySelector('img[alt=original]').src !== before", arg=before
    )
    api.expect(visitor.locator(".fault")).to_have_count(0)

    # Understand: two images, a question, an empty one
    visitor.get_by_role("tab", name="Understand").click()
    visitor.get_by_role("button", name="Add a scene").click()
    visitor.locator("img[alt='image 1']:visible").wait_for()
    visitor.locator("input[type=file]:visible").set_input_files(tmp_path / "red.jpg")
    visitor.locator("img[alt='image 2']:visible").wait_for()
    visitor.get_by_role("button", name="Ask").click()
    visitor.get_by_text("got an empty question: write one").wait_for()
    visitor.get_by_label("Question").fill("what color is the <b>star</b> ?")
    visitor.get_by_role("button", name="Ask").click()
    visitor.get_by_text("words that the model does not know").wait_for()
    assert visitor.locator(".asked img:visible").count() == 2
    assert "<b>star</b>" in visitor.locator(".asked").inner_text()
    assert visitor.locator(".answered").inner_text().strip("…")

    # Generate: a prompt that is refused, and one that is not
    visitor.get_by_role("tab", name="Generate").click()
    prompt, start = visitor.get_by_label("Prompt"), visitor.get_by_role("button", name="Generate")
    prompt.fill("a" * 10_000)
    start.click()
    visitor.get_by_text("got a prompt of 10,000 characters, expected at most 1,000").wait_for()
    prompt.fill("a red circle 🟥")
    start.click()
    visitor.get_by_text("64 of 64 codes").wait_for()
    visitor.get_by_text("words have no id").wait_for()
    assert visitor.locator("img[alt^=seed]:visible").count() == 4

    # Edit codes: pick one up, paint a stroke, exchange two patches, undo
    visitor.get_by_role("tab", name="Edit codes").click()
    edit(visitor)

    assert faults == []
    shown = visitor.content()
    for path in ("", "config", "gradio_api/info"):
        with urllib.request.urlopen(address + path) as response:
            shown += response.read().decode()
    private = [*folders, tmp_path, Path(__file__).parents[2]]
    assert not any(str(folder) in shown for folder in private)


def edit(visitor: api.Page) -> None:
    """Use the tools of the last tab."""
    grid = visitor.locator(".framed:has(img[alt=edited])")
    grid.locator("[data-patch='63']").click()
    code = grid.locator("[data-patch='63']").get_attribute("title").rpartition(" ")[2]
    api.expect(visitor.get_by_label("to paint with")).to_have_value(code)
    visitor.get_by_label("Paint", exact=True).check()
    first, last = (grid.locator(f"[data-patch='{patch}']").bounding_box() for patch in (0, 3))
    visitor.mouse.move(first["x"] + 5, first["y"] + 5)
    visitor.mouse.down()
    visitor.mouse.move(last["x"] + 5, last["y"] + 5, steps=12)
    visitor.mouse.up()
    visitor.get_by_text("of 64 patches changed").filter(has_text="4 of").wait_for()
    visitor.get_by_role("button", name="Undo all").click()
    visitor.get_by_text("0 of 64 patches changed").wait_for()


def test_several_codebooks_and_a_missing_model(
    browser: api.Browser, closing: list, unitok_folder: Path
) -> None:
    visitor, _ = visit(browser, [unitok_folder], closing)
    visitor.get_by_text(
        "Understand: there is no understanding model here; bash scripts/train_llava.sh"
    ).wait_for()
    assert visitor.get_by_role("tab", name="Understand").is_disabled()
    assert visitor.get_by_role("tab", name="Generate").is_disabled()
    visitor.locator("[data-patch='10']:visible").click()
    visitor.get_by_text("of codebook 4").wait_for()
    visitor.get_by_role("tab", name="Edit codes").click()
    visitor.get_by_label("Paint", exact=True).check()
    visitor.get_by_label("4 codes to paint with").fill("1 2 3")
    visitor.locator("[data-patch='10']:visible").click()
    visitor.get_by_text("got '1 2 3', expected 4 codes from 0 to 63").wait_for()
    visitor.get_by_label("4 codes to paint with").fill("1 2 3 4")
    visitor.locator("[data-patch='10']:visible").click()
    visitor.get_by_text("1 of 16 patches changed").wait_for()
