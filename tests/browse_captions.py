"""The captioning page in headless Chromium, cut off from every other host:
`python -m tests.browse_captions URL FOLDER IMAGE ...`.

Prints as JSON what the page says: at the start, and of each image, which is
dropped or chosen in turns. Writes screenshots into FOLDER, and fails if the
page asks another host.
"""

import base64
import json
import pathlib
import re
import sys
import urllib.parse

from playwright.sync_api import expect, sync_playwright

from tests import chromium

WAIT = 60_000  # milliseconds
DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name));
  dispatchEvent(new DragEvent("drop", { dataTransfer: data }));
}"""


def give(page, path, dropped):
  if dropped:
    content = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(DROP, [path.name, content])
  else:
    page.locator("#file").set_input_files(path)


def said(page):
  """What the page says once it is done."""
  done = re.compile(r"Ready|browser\.|^$")
  expect(page.locator("#status")).to_have_text(done, timeout=WAIT)
  return {
    "captions": page.locator("#captions strong").all_text_contents(),
    "error": page.locator("#error").text_content(),
  }


def main(url, folder, *images):
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  own = urllib.parse.urlsplit(url).netloc
  away = []

  def route(route, request):
    if urllib.parse.urlsplit(request.url).netloc == own:
      return route.continue_()
    away.append(request.url)
    return route.abort()

  with sync_playwright() as playwright:
    # No other name or address leads anywhere.
    browser = chromium.launch(
      playwright,
      f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {own.split(':')[0]}",
    )
    page = browser.new_page(viewport={"width": 900, "height": 800})
    page.route("http*://**", route)
    page.goto(url)
    expect(page.locator("#status")).not_to_contain_text("Reading", timeout=WAIT)
    found = {"start": said(page)["error"]}
    for number, path in enumerate(map(pathlib.Path, images)):
      give(page, path, dropped=path.stat().st_size < 1 << 20 and number % 2)
      found[str(path)] = said(page)
      page.screenshot(path=folder / f"{path.name}.png")
    browser.close()
  assert not away, away
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
