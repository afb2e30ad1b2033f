"""The demo as people use it: in a real browser, with good and bad input, by one visitor or several.

`SCREENSHOTS=docs/assets` saves screenshots for the documentation.
"""

import io
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import PHOTO
from PIL import Image

from flextok_hf import FlexTokPipeline, embedded_model
from flextok_hf.models.nested_dropout import token_ladder


pytestmark = pytest.mark.slow

MEMORY_GROWTH_MB = 64  # allocators keep some pages; a leak over 20 requests would be larger
NUM_REQUESTS = 20


@pytest.fixture(scope="session")
def pipe():
    pipe = FlexTokPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tab(page, name):
    """Open a tab, also if it is in the menu of a narrow page; returns its panel."""
    page.get_by_role("tab").first.wait_for()  # counting does not wait for the page
    if page.get_by_role("tab", name=name).count() == 0:
        page.get_by_role("button", name="More tabs").click()
        page.locator(".overflow-dropdown").get_by_role("button", name=name).click()
    else:
        page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def send(panel, path):
    panel.locator("input[type=file]").first.set_input_files(path)


def shown_image(page, panel, label):
    """Return the image under a label as PIL, once it is shown."""
    frame = panel.locator(".block").filter(has=page.get_by_text(label, exact=True)).last
    source = frame.locator("img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def assert_same_image(shown, expected):
    """Compare images up to one gray level, because two processes may round differently."""
    difference = np.asarray(shown).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 1


def wait_for_count(panel, count):
    panel.get_by_text(re.compile(rf"^{count} of {count} images: ")).wait_for()


def generate(panel, prompt, seed=0):
    panel.get_by_placeholder("a cat").fill(prompt)
    panel.get_by_label("Seed").fill(str(seed))
    panel.get_by_role("button", name="Generate", exact=True).click()


def is_named(control):
    """Return whether a screen reader has something to say for a control."""
    return control.evaluate(
        "e => !!(e.innerText || e.ariaLabel || e.title || e.placeholder || e.getAttribute('aria-labelledby')"
        " || [...(e.labels || [])].some(label => label.innerText))"
    )


def error_message(page):
    """Return the error message on the page, and close it."""
    note = page.get_by_test_id("toast-body").last
    note.wait_for()
    message = note.get_by_test_id("toast-text").inner_text()
    note.get_by_test_id("toast-close").click()
    note.wait_for(state="detached")
    return message


def keep_screenshot(page, name):
    """Save a screenshot of the page in 64 colors, if the environment specifies a folder."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.evaluate("document.activeElement && document.activeElement.blur()")
        page.wait_for_timeout(500)
        image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        image.quantize(64, dither=Image.Dither.NONE).save(Path(folder) / f"demo-{name}.png", optimize=True)


def test_a_photo_is_reconstructed_and_the_slider_changes_it(open_page, pipe):
    page = open_page()
    panel = tab(page, "Reconstruct")
    send(panel, PHOTO)
    facts = panel.locator("#reconstruct-facts")
    facts.get_by_text(f"{pipe.num_registers} tokens").wait_for()
    whole = facts.inner_text()
    expected = pipe.reconstruct(PHOTO, generator=seeded(0))
    assert_same_image(shown_image(page, panel, "Reconstruction"), expected[-1][0])
    keep_screenshot(page, "reconstruct")

    slider = panel.get_by_role("slider")
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 1, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    facts.get_by_text("1 token", exact=True).wait_for()
    assert facts.inner_text() != whole
    assert re.search(r"1 token, 10 bits \(1 bytes?\), PSNR \d+\.\d dB", facts.inner_text())
    assert_same_image(shown_image(page, panel, "Reconstruction"), expected[0][0])


def test_a_prompt_appears_step_by_step_and_ends_with_the_image_of_the_pipeline(open_page, pipe):
    page = open_page()
    panel = tab(page, "Generate")
    counts = token_ladder(pipe.num_registers)
    page.evaluate(  # what the page says meanwhile, as it may be too short for looking from here
        """() => {
            window.said = new Set();
            const note = () => window.said.add(document.querySelector("#generate-progress").innerText.trim());
            new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    start = time.monotonic()
    generate(panel, "a red apple", seed=3)
    wait_for_count(panel, len(counts))
    said = page.evaluate("[...window.said]")
    earlier = [text for text in said if re.match(rf"[1-{len(counts) - 1}] of {len(counts)} images", text)]
    assert earlier, "images are shown before the last one"
    seconds = (time.monotonic() - start) / len(counts)
    print(f"\n{seconds:.2f} s per image, {len(counts)} images in a stream")
    expected = pipe("a red apple", generator=seeded(3)).images[0]
    assert_same_image(shown_image(page, panel, "The image so far"), expected)
    assert panel.locator(".grid-container img").count() == len(counts)
    keep_screenshot(page, "generate")


def test_the_steps_of_an_image_can_be_gone_through_again(open_page, pipe):
    page = open_page()
    panel = tab(page, "Generate")
    prompt = panel.get_by_placeholder("a cat")
    prompt.fill("a red apple")
    prompt.press("Enter")  # without the mouse
    count = len(token_ladder(pipe.num_registers))
    wait_for_count(panel, count)
    panel.get_by_role("button", name="Download the animation").and_(page.locator(":enabled")).wait_for()
    last = shown_image(page, panel, "The image so far")
    panel.locator("#generate-scrub").get_by_role("slider").press("Home")
    panel.get_by_text(re.compile(rf"^1 of {count} images: 1 token$")).wait_for()
    page.wait_for_timeout(500)
    first = shown_image(page, panel, "The image so far")
    assert first != last


def test_a_photo_is_shown_from_every_number_of_tokens(open_page, pipe):
    page = open_page()
    panel = tab(page, "Reconstruct")
    send(panel, PHOTO)
    panel.locator("#reconstruct-facts").get_by_text(f"{pipe.num_registers} tokens").wait_for()
    panel.get_by_role("button", name="From 1, 2, 4, ... tokens").click()
    wait_for_count(panel, len(token_ladder(pipe.num_registers)))
    assert panel.locator(".grid-container img").count() == len(token_ladder(pipe.num_registers))


def test_a_riddle_is_solved(open_page):
    page = open_page()
    panel = tab(page, "Guess")
    facts = panel.locator("#guess-facts")
    panel.get_by_role("button", name="New image").click()
    facts.get_by_text(re.compile(r"^1 token\.")).wait_for()
    choices = panel.get_by_role("radio")
    assert choices.count() == 4
    panel.get_by_role("button", name="More tokens").click()
    facts.get_by_text(re.compile(r"^2 tokens\.")).wait_for()
    choices.first.check()
    panel.get_by_role("button", name="Guess", exact=True).click()
    facts.get_by_text(re.compile(r"[01] of 1 right")).wait_for()
    panel.get_by_role("button", name="More tokens").click()
    assert "Ask for a new image first" in error_message(page)


def test_the_names_that_the_model_knows_are_listed(open_page):
    page = open_page()
    panel = tab(page, "Generate")
    panel.get_by_role("button", name="What this model knows").click()
    panel.get_by_text(re.compile(r"\bpenguin\b")).wait_for()


def test_a_photo_is_varied_four_times(open_page):
    page = open_page()
    panel = tab(page, "Vary")
    send(panel, PHOTO)
    panel.locator("img").first.wait_for()
    panel.get_by_role("button", name="Vary", exact=True).click()
    wait_for_count(panel, 5)
    sources = {image.get_attribute("src") for image in panel.locator(".grid-container img").all()}
    assert len(sources) == 5
    keep_screenshot(page, "vary")


def test_a_token_is_replaced(open_page, pipe):
    page = open_page()
    panel = tab(page, "Tokens")
    panel.get_by_label("Or a prompt").fill("a cat")
    panel.get_by_role("button", name="Generate tokens").click()
    token_ids = pipe("a cat", num_inference_steps=1, output_type="latent", generator=seeded(0)).token_ids
    cell = panel.get_by_test_id("cell-1-1")  # row and column, from 0
    cell.get_by_text(str(token_ids[0, 1].item()), exact=True).click()
    page.wait_for_function("document.querySelector('[aria-label=\"Token to replace\"]').value == '2'")
    new_id = (token_ids[0, 1].item() + 333) % pipe.codebook_size
    panel.get_by_label("New id").fill(str(new_id))
    panel.get_by_role("button", name="Replace").click()
    cell.get_by_text(str(new_id), exact=True).wait_for()
    page.wait_for_timeout(500)
    changed = token_ids.clone()
    changed[0, 1] = new_id
    expected = pipe.detokenize(changed, generator=seeded(0)).images[0]
    assert_same_image(shown_image(page, panel, "After"), expected)
    keep_screenshot(page, "tokens")


def test_wrong_input_gives_a_readable_message_and_the_page_still_works(open_page, tmp_path, pipe):
    (tmp_path / "text.png").write_text("not an image")
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    page = open_page()
    panel = tab(page, "Reconstruct")
    send(panel, tmp_path / "text.png")
    page.get_by_test_id("toast-text").wait_for()
    keep_screenshot(page, "error")
    assert "not an image" in error_message(page)

    page = open_page()
    panel = tab(page, "Reconstruct")
    send(panel, tmp_path / "huge.png")
    assert "too large" in error_message(page)

    page = open_page()
    panel = tab(page, "Reconstruct")
    send(panel, tmp_path / "two.gif")
    panel.locator("#reconstruct-facts").get_by_text(f"{pipe.num_registers} tokens").wait_for()
    assert shown_image(page, panel, "What the model sees").getpixel((0, 0)) == (255, 0, 0)

    panel = tab(page, "Generate")
    generate(panel, "")
    assert "Enter a prompt" in error_message(page)
    generate(panel, "c" * 10_000)
    assert "10,000 characters" in error_message(page)
    generate(panel, "a cat")
    wait_for_count(panel, len(token_ladder(pipe.num_registers)))


def test_a_file_above_the_limit_is_refused(open_page, tmp_path):
    noise = torch.randint(0, 256, (3000, 3000, 3), dtype=torch.uint8, generator=seeded(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "heavy.png", compress_level=0)
    page = open_page()
    send(tab(page, "Reconstruct"), tmp_path / "heavy.png")
    assert re.search("exceeds|too large|maximum", error_message(page))


def test_two_simultaneous_visitors_get_their_own_images(open_page, pipe):
    prompts = ("a cat", "a red apple")
    pages = [open_page() for _ in prompts]
    panels = [tab(page, "Generate") for page in pages]
    for panel, prompt in zip(panels, prompts):
        generate(panel, prompt, seed=1)
    for page, panel, prompt in zip(pages, panels, prompts):
        wait_for_count(panel, len(token_ladder(pipe.num_registers)))
        expected = pipe(prompt, generator=seeded(1)).images[0]
        assert_same_image(shown_image(page, panel, "The image so far"), expected)


def test_closing_a_tab_during_a_job_does_not_block_others(open_page, pipe):
    leaving, staying = open_page(), open_page()
    panel = tab(leaving, "Generate")
    generate(panel, "a cat")
    panel.get_by_text(re.compile("^[0-9]+ of ")).wait_for()
    leaving.close()
    panel = tab(staying, "Generate")
    generate(panel, "a red apple")
    wait_for_count(panel, len(token_ladder(pipe.num_registers)))


def test_the_page_fits_on_a_phone(open_page):
    page = open_page(width=390, height=844)
    for name in ("Generate", "Reconstruct", "Vary", "Guess", "Tokens"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    panel = tab(page, "Generate")
    generate(panel, "a cat")
    panel.get_by_role("button", name="Download the animation").and_(page.locator(":enabled")).wait_for()
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "after drawing"
    keep_screenshot(page, "phone")


@pytest.mark.parametrize("width", [390, 1100])
def test_every_control_of_every_tab_has_a_name(open_page, width):
    page = open_page(width=width)
    for name in ("Generate", "Reconstruct", "Vary", "Guess", "Tokens"):
        panel = tab(page, name)
        controls = panel.locator("button, input, textarea, select, [role=slider]").filter(visible=True).all()
        assert len(controls) > 2
        unnamed = [control.evaluate("e => e.outerHTML.slice(0, 200)") for control in controls if not is_named(control)]
        assert not unnamed, name


def test_twenty_queued_requests_do_not_leak_memory(server, pipe):
    from gradio_client import Client, handle_file

    client = Client(server.url, verbose=False)

    def submit(seed):
        return client.submit(handle_file(str(PHOTO)), pipe.num_registers, seed, api_name="/reconstruct")

    for job in [submit(seed) for seed in range(3)]:  # warm up: threads and allocators
        job.result(timeout=120)
    before = server.memory_mb()
    start = time.monotonic()
    jobs = [submit(seed) for seed in range(NUM_REQUESTS)]
    answers = [job.result(timeout=300) for job in jobs]
    seconds = time.monotonic() - start
    after = server.memory_mb()
    print(f"\n{NUM_REQUESTS} queued requests in {seconds:.1f} s; memory {before:.0f} MB before, {after:.0f} MB after")
    assert all(f"{pipe.num_registers} tokens" in facts for _, _, facts in answers)
    assert after - before < MEMORY_GROWTH_MB
