"""The page that captions in a browser: its build, words, pixels and use.

The page as a whole needs npm and a browser.
"""

import functools
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import PIL.Image
import playwright
import pytest
from blip_jax.tools.browser import __main__ as browser

from blip_jax.data import scenes
from blip_jax.export import artifacts, programs
from tests import chromium, helpers

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "tools" / "browser"
# Playwright brings it along.
NODE = pathlib.Path(playwright.__file__).parent / "driver" / "node"


def node(program, given):
  """Runs a module of JavaScript; it reads JSON, and prints JSON."""
  done = subprocess.run(
    [
      *(NODE, "--input-type=module", "-e"),
      "import { readFileSync } from 'node:fs';\n"
      "const given = JSON.parse(readFileSync(0, 'utf8'));\n" + program,
    ],
    input=json.dumps(given),
    cwd=PAGE,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


RESIZE = f"""
const {{ resize }} = await import("{PAGE}/resize.js");
const [width, height, newWidth, newHeight, pixels] = given;
const rows = (top, count) =>
  pixels.slice(top * width * 4, (top + count) * width * 4);
const found = resize(rows, width, height, newWidth, newHeight);
console.log(JSON.stringify(Array.from(found)));
"""


@pytest.mark.parametrize(
  "shape, size",
  [
    ((90, 120), 32),
    ((31, 40), 48),
    ((1, 1), 8),
    ((2, 700), 16),
    ((24, 24), 24),
  ],
)
def test_pixels_are_those_of_pil(shape, size):
  """PIL's two passes, rows first; some versions turn them for tall images."""
  rgba = np.random.default_rng(0).integers(0, 256, (*shape, 4), np.uint8)
  image = PIL.Image.fromarray(rgba[..., :3])
  for new in ((size, shape[0]), (size, size)):
    image = image.resize(new, PIL.Image.Resampling.BICUBIC)
  found = node(RESIZE, [*shape[::-1], size, size, rgba.ravel().tolist()])
  np.testing.assert_array_equal(
    np.array(found).reshape(size, size, 3), np.asarray(image)
  )


WORDS = f"""
const {{ Vocabulary }} = await import("{PAGE}/words.js");
const vocabulary = new Vocabulary(given.vocabulary, given.prompt);
const found = given.rows.map((row) => vocabulary.decode(row));
console.log(JSON.stringify(found));
"""


@pytest.mark.parametrize("prompt", ["", "a picture of "])
def test_words_are_those_of_the_tokenizer(prompt):
  tokenizer = helpers.scenes_tokenizer()
  rng = np.random.default_rng(0)
  start = tokenizer.prompt_ids(prompt)
  rows = [
    [*start, *row] for row in rng.integers(0, tokenizer.vocab_size, (300, 9))
  ]
  texts = ["it's red, isn't it?", "xyz - 'a' ... b!", "", "the dog 's ball."]
  for text in texts:
    ids, mask = tokenizer.encode([text], 40)
    rows.append([*start, *ids[0, 1 : mask.sum()]])
  rows = [[int(id) for id in row] for row in rows]
  vocabulary = tokenizer.files()["vocab.txt"]
  found = node(WORDS, dict(vocabulary=vocabulary, prompt=start, rows=rows))
  assert found == tokenizer.decode(rows, prompt)


def write_model(folder, **facts):
  """What the build reads of an exported model."""
  folder.mkdir(exist_ok=True)
  said = {"inputs": {"pixels": {"shape": [facts.get("batch", 1), 8, 8, 3]}}}
  (folder / "caption.json").write_text(json.dumps(said))
  for name in ("caption.onnx", "vocab.txt"):
    (folder / name).write_text("x")
  return folder


def test_mistakes_in_a_build(tmp_path, capsys, monkeypatch):
  model = write_model(tmp_path / "model")
  monkeypatch.setenv("PATH", "")

  def message(exported, out):
    assert browser.main([str(exported), str(out)]) == 1
    return capsys.readouterr().err

  found = message(model, model)
  assert "exists already" in found
  out = tmp_path / "out"
  assert "npm, which is not installed" in message(model, out)
  found = message(write_model(tmp_path / "many", batch=4), out)
  assert "batches of 1, found 4" in found
  found = message(tmp_path / "none", out)
  assert "no caption.onnx, caption.json, vocab.txt" in found
  assert "--format onnx --programs caption" in found

  def pack(words, **_):
    pathlib.Path(words[-1], "a.tgz").write_bytes(b"another")

  monkeypatch.setattr(subprocess, "run", pack)
  assert "expected SHA-512" in message(model, out)
  assert not out.exists()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """A model, the folder of its page, and the page's address."""
  if not shutil.which("npm"):
    pytest.skip("needs the program npm")
  chromium.needed()
  if jax.__version_info__ >= (0, 11):
    pytest.skip("jax2onnx 0.13.0 cannot read programs of this JAX")
  folder = tmp_path_factory.mktemp("page")
  model = helpers.make_model("caption", text_depth=2)
  chosen = programs.programs_of(model, ["caption"], num_return_sequences=2)
  artifacts.write(model, chosen, folder / "exported", "onnx", 1)
  browser.build(folder / "exported", folder / "page")
  handler = functools.partial(
    http.server.SimpleHTTPRequestHandler, directory=folder / "page"
  )
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield model, folder / "page", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def browse(url, images, shots):
  """What the page says of each image; fails on requests to other hosts."""
  words = [sys.executable, "-m", "tests.browse_captions", url, str(shots)]
  done = subprocess.run(
    [*words, *map(str, images)], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


def write_images(folder):
  """Drawings, and what else a visitor may drop: (path, its message) pairs."""
  paths = []
  for i in range(6):
    ending = ("png", "jpg", "webp")[i % 3]
    paths.append(folder / f"{i}.{ending}")
    pixels = scenes.Scenes("val", 16 << i % 4)[i]["image"]
    PIL.Image.fromarray(pixels).save(paths[-1])
  for name, size in (("tiny", (1, 1)), ("wide", (20_000, 2))):
    paths.append(folder / f"{name}.png")
    PIL.Image.new("RGB", size, "red").save(paths[-1])
  text, large, many = (folder / x for x in ("a.txt", "b.png", "c.png"))
  text.write_text("no image")
  large.touch()
  os.truncate(large, 65 << 20)  # no bytes on the disk
  PIL.Image.new("1", (9000, 9000)).save(many)
  return paths, [
    (text, "a.txt is not an image that this browser can read"),
    (large, "b.png is too large: 65 MB, at most 64 MB"),
    (many, "c.png is too large: 9000 x 9000 pixels, at most 80 million"),
  ]


@pytest.mark.slow
def test_captions_in_a_browser_without_a_network(page, tmp_path):
  """The model's own captions; mistakes are messages, and the page goes on."""
  model, _, url = page
  good, bad = write_images(tmp_path)
  order = [bad[0][0], *good[:2], bad[1][0], bad[2][0], *good[2:]]
  found = browse(url, order, tmp_path / "shots")
  captions = model.caption(good, num_return_sequences=2)
  expected = [[each.text, each.others[0].text] for each in captions]
  assert len({texts[0] for texts in expected}) > 2
  assert [found[str(path)]["captions"] for path in good] == expected
  for path, message in bad:
    assert found[str(path)]["error"].startswith(message)
    assert not found[str(path)]["captions"]


@pytest.mark.slow
def test_a_missing_model_is_a_message(page, tmp_path):
  _, folder, url = page
  os.rename(folder / "model/caption.onnx", folder / "model/gone.onnx")
  try:
    found = browse(url, [], tmp_path)
  finally:
    os.rename(folder / "model/gone.onnx", folder / "model/caption.onnx")
  message = "The model is missing: no model/caption.onnx next to this page."
  assert found["start"] == message
