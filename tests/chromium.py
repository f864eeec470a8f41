"""The browser that slow tests drive: the program chromium, or what
`playwright install chromium` has downloaded."""

import os
import shutil

import pytest
from playwright.sync_api import Browser, Playwright, sync_playwright


def needed() -> None:
  """Skips a test where there is no browser; pip cannot install one."""
  with sync_playwright() as playwright:
    if not os.path.exists(_path(playwright)):
      pytest.skip("needs the program chromium, or `playwright install`")


def launch(playwright: Playwright, *arguments: str) -> Browser:
  return playwright.chromium.launch(
    executable_path=_path(playwright), args=["--no-sandbox", *arguments]
  )


def _path(playwright: Playwright) -> str:
  return shutil.which("chromium") or playwright.chromium.executable_path
