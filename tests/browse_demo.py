"""The demo page in headless Chromium:
`python -m tests.browse_demo WALK URL IMAGE FOLDER`.

Walks through tabs of a page, writes a screenshot of each into FOLDER, and fails
if a request leaves this machine. WALK is `quick_start`, for a page that shows
the quick start's model, or `questions`, for one with models for VQA and pairs.
"""

import pathlib
import sys
import urllib.parse

from playwright.sync_api import expect, sync_playwright

from tests import chromium

WAIT = 60_000  # milliseconds; what runs first is compiled first


def click(page, name):
  page.get_by_role("button", name=name, exact=True).click(timeout=WAIT)


def open_tab(page, name):
  page.get_by_role("tab", name=name, exact=True).click()


def upload(page, path):
  panel = page.locator("[role=tabpanel]:visible")
  with page.expect_response(lambda response: "/upload?" in response.url):
    panel.locator("input[type=file]").first.set_input_files(path)
  page.wait_for_timeout(2000)  # until the page has taken it over


def quick_start(page, image, folder, shoot):
  """What a visitor does: caption, look, match, search; other tabs are off."""
  panel = page.locator("[role=tabpanel]:visible")
  click(page, "Caption")
  toast = page.get_by_text("Upload an image first").first
  expect(toast).to_be_visible(timeout=WAIT)
  upload(page, image)
  click(page, "Caption")
  expect(panel.get_by_text("[SEP]").first).to_be_visible(timeout=WAIT)
  overlay = panel.locator(".saliency img").first
  expect(panel.get_by_label("blue").first).to_be_visible(timeout=WAIT)
  shown = overlay.get_attribute("src")
  panel.get_by_label("ring").first.check()
  expect(overlay).not_to_have_attribute("src", shown, timeout=WAIT)
  shoot("caption")

  open_tab(page, "Ask")
  expect(panel.get_by_text("This tab is off.")).to_be_visible()

  open_tab(page, "Match")
  upload(page, image)
  panel.get_by_label("Texts, one on each line").fill(
    "a red star\na blue ring left of a purple circle"
  )
  click(page, "Match")
  expect(panel.get_by_label("purple").first).to_be_visible(timeout=WAIT)
  overlay = panel.locator(".saliency img").first
  expect(overlay).to_be_visible(timeout=WAIT)
  shown = overlay.get_attribute("src")
  panel.get_by_label("purple").first.check()
  expect(overlay).not_to_have_attribute("src", shown, timeout=WAIT)
  shoot("match")

  open_tab(page, "Search")
  panel.get_by_label("Text;").fill("two stars")
  click(page, "Search")
  expect(panel.get_by_text("cos 0.").first).to_be_visible(timeout=WAIT)
  shoot("search")

  open_tab(page, "Compare")
  expect(panel.get_by_text("This tab is off.")).to_be_visible()

  broken = folder / "broken.png"
  broken.write_bytes(b"nothing")
  open_tab(page, "Caption")
  panel.locator("button.gallery-item").first.click()
  expect(panel.get_by_label("ring")).to_have_count(0, timeout=WAIT)
  panel.get_by_role("button", name="Remove Image").first.click()
  upload(page, broken)
  click(page, "Caption")
  expect(page.get_by_text("not_an_image").first).to_be_visible(timeout=WAIT)
  shoot("broken")


def questions(page, image, folder, shoot):
  """Asks about an image, with and without a list, and compares it to itself."""
  panel = page.locator("[role=tabpanel]:visible")
  answers = panel.get_by_role("grid").or_(panel.locator("table")).first
  open_tab(page, "Ask")
  upload(page, image)
  panel.get_by_label("Possible answers").fill("a cube\na ball")
  click(page, "Ask")
  expect(answers).to_contain_text("a cube", timeout=WAIT)
  expect(answers).to_contain_text("a ball")
  shoot("ask_with_a_list")
  panel.get_by_label("Possible answers").fill("")
  click(page, "Ask")
  expect(answers).not_to_contain_text("a cube", timeout=WAIT)
  shoot("ask")

  open_tab(page, "Compare")
  for number in range(2):
    files = panel.locator("input[type=file]")
    with page.expect_response(lambda response: "/upload?" in response.url):
      files.nth(number).set_input_files(image)
    page.wait_for_timeout(2000)
  panel.get_by_label("Statements, one on each line").fill("there are two")
  click(page, "Compare")
  expect(answers).to_contain_text("there are two", timeout=WAIT)
  shoot("compare")


def main(walk, url, image, folder):
  walk = {"quick_start": quick_start, "questions": questions}[walk]
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with sync_playwright() as playwright:
    browser = chromium.launch(playwright)
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    walk(
      page,
      image,
      folder,
      lambda name: page.screenshot(path=folder / f"{name}.png", full_page=True),
    )
    browser.close()
  own = urllib.parse.urlsplit(url).netloc
  away = {
    request
    for request in requests
    if request.startswith(("http", "ws"))
    and urllib.parse.urlsplit(request).netloc != own
  }
  assert requests and not away, away
  print(f"{len(requests)} requests, all to {own}")


if __name__ == "__main__":
  main(*sys.argv[1:])
