"""The demo page: its actions, its page and API (extra [demo]), its start."""

import base64
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import urllib.error
import urllib.request

import numpy as np
import PIL.Image
import pytest

from blip_jax.cli import command_line
from blip_jax.data import scenes
from blip_jax.inference import index
from blip_jax.serve import actions as actions_lib
from blip_jax.serve import demo, ports
from tests import chromium, helpers

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Beams and so on of `Actions.caption`.
BEAMS = ("beam search", 3, 2, 9, "", 2, 0.9, 1.0, 0)
NUCLEUS = ("nucleus sampling", 3, 2, 9, "", 3, 0.9, 1.0, 1)


def png(number=0):
  content = io.BytesIO()
  pixels = scenes.Scenes("val", 16)[number]["image"]
  PIL.Image.fromarray(pixels).save(content, "PNG")
  return content.getvalue()


@pytest.fixture(scope="module")
def models():
  families = "caption", "retrieval", "vqa", "nlvr"
  return {
    family: helpers.make_model(family, text_depth=2) for family in families
  }


@pytest.fixture(scope="module")
def actions(models):
  return actions_lib.Actions([*models.values()])


@pytest.fixture(scope="module")
def gallery(models, tmp_path_factory):
  source = scenes.Scenes("val", 16, num=9)
  folder = tmp_path_factory.mktemp("gallery")
  return actions_lib.Gallery(
    source, index.build(folder, models["retrieval"], source, 8)
  )


def test_captions_are_those_of_the_model(actions, models):
  table, words, explanations = actions.caption(png(), *BEAMS)
  (best,) = models["caption"].caption(
    png(), num_beams=3, min_length=2, max_length=9, num_return_sequences=2
  )
  assert [row[1] for row in table] == [best.text, best.others[0].text]
  assert table[0][2] == pytest.approx(best.log_prob, abs=1e-3)
  assert [row[1] for row in words if row[0] == 1] == [*best.tokens]
  assert words[0][3] == pytest.approx(np.exp(words[0][2]), abs=1e-3)
  assert len(explanations) == 2
  drawn = actions_lib.overlay(explanations[0], 0, png())
  assert drawn.shape == (384, 384, 3)
  assert len(actions.caption(png(), *NUCLEUS)[0]) == 3


def test_answers_matches_and_comparisons(actions, models):
  listed = actions.answer(png(), "what color?", "yes\n no \n\nred", 2)
  expected = models["vqa"].answer(png(), "what color?", ["yes", "no", "red"])
  assert listed[0][0] == expected[0].text and len(listed) == 2
  assert listed[0][1] == pytest.approx(expected[0].prob, abs=1e-3)
  assert len(actions.answer(png(), "what color?", "", 4)) == 4
  texts = "a red star\na blue ring\na green cross"
  rows = actions.match(png(), texts)
  assert sorted(row[0] for row in rows) == sorted(texts.split("\n"))
  scores = [row[3] for row in rows]
  assert scores == sorted(scores, reverse=True)
  match = models["retrieval"].match(png(), rows[0][0])
  assert rows[0][1] == pytest.approx(match.itm_prob.item(), abs=1e-3)
  assert actions.explain(png(), "a red star").words == ("a", "red", "star")
  ((text, true, prob),) = actions.compare(png(0), png(1), "both are red")
  assert text == "both are red" and true == ("yes" if prob > 0.5 else "no")


def test_search_by_text_and_by_image(actions, gallery):
  found = actions.search(gallery, "a red star", None, 4)
  assert len(found) == 4 and re.fullmatch(r"\d+%, cos -?0\.\d\d", found[0][1])
  found = actions.search(gallery, "ignored", png(3), 2)
  assert found[0][1] == "cos 1.00"
  np.testing.assert_array_equal(
    found[0][0][::16, ::16], gallery.source[3]["image"]
  )


def test_messages_of_what_is_wrong(actions, gallery):
  for run, message in [
    (lambda: actions.caption(None, *BEAMS), "Upload an image first"),
    (lambda: actions.caption(b"no", *BEAMS), "image 0: not_an_image"),
    (lambda: actions.caption(png(), "best", *BEAMS[1:]), "method: expected"),
    (lambda: actions.match(png(), " \n"), "texts: expected one on each line"),
    (lambda: actions.match(png(), "a\n" * 65), "at most 64 lines, found 65"),
    (lambda: actions.compare(png(), None, "a"), "Upload the right image"),
    (lambda: actions.compare(png(), png(), ""), "statements: expected one"),
    (lambda: actions.search(gallery, " ", None, 2), "Type a text, or upload"),
  ]:
    with pytest.raises(ValueError, match=message):
      run()


def test_what_no_model_can_do_has_a_reason(models):
  alone = actions_lib.Actions([models["caption"]])
  assert alone.lacks("caption") is None
  for ability in ("answer", "match", "compare", "embed"):
    assert "which " in alone.lacks(ability) and "Load" in alone.lacks(ability)
    with pytest.raises(ValueError, match="is of the family 'caption'"):
      alone.model(ability)


def test_uploads_are_private_and_go_with_the_page(monkeypatch, page):
  name = "GRADIO_TEMP_DIR"
  call(page, "match", data_url(png()), "a red star")
  assert [*pathlib.Path(os.environ[name]).rglob("*.png")]  # the examples
  monkeypatch.delenv(name)
  with demo.own_uploads():
    folder = pathlib.Path(os.environ[name])
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "upload.png").write_bytes(b"")
  assert not folder.exists() and name not in os.environ
  monkeypatch.setenv(name, "mine")
  with demo.own_uploads():
    assert os.environ[name] == "mine"


def test_without_a_model_the_quick_start_is_trained_once(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  trained = []

  def train(config, workdir):
    trained.append((config.num_steps, workdir))
    pathlib.Path(workdir).mkdir(parents=True)
    (pathlib.Path(workdir) / "results.json").write_text("{}")

  monkeypatch.setattr(demo.train, "train", train)
  workdir = str(tmp_path / "runs/quickstart")
  assert demo.quick_start() == demo.quick_start() == workdir
  assert trained == [(2000, workdir)]


def test_without_gradio_the_extra_is_named(tmp_path):
  code = (
    "import sys; sys.modules['gradio'] = None\n"
    "from blip_jax import main; sys.exit(main.run(['--config', 'demo']))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith("error: the demo page needs")
  assert "'.[demo]'" in done.stderr and "Traceback" not in done.stderr


def test_the_space_starts_a_command_that_exists():
  text = (ROOT / "tools/space/Dockerfile").read_text()
  words = json.loads(text.split("CMD ")[1].replace("\\\n", ""))
  assert words[0] == "blip-jax"
  config = command_line.parse(words[1:]).config
  assert config.host == "0.0.0.0" and config.port == 7860
  card = (ROOT / "tools/space/README.md").read_text().split("---")[1]
  assert "sdk: docker\napp_port: 7860" in card
  assert all(f"  - {name}\n" in card for name in config.model)


@pytest.fixture(scope="module")
def page(models, gallery, tmp_path_factory):
  """The address of a page without a model for questions and pairs."""
  actions = actions_lib.Actions([models["caption"], models["retrieval"]])
  examples = demo.write_examples(tmp_path_factory.mktemp("examples"))
  with demo.own_uploads():
    pytest.importorskip("gradio", reason="needs the extra [demo]")
    from blip_jax.serve import page as page_lib

    yield from show(page_lib, actions, gallery, examples)


def show(page_lib, actions, gallery, examples):
  page = page_lib.build(actions, gallery, examples, 1 << 20)
  page.queue(max_size=4, default_concurrency_limit=1)
  _, url, _ = page.launch(
    server_name="127.0.0.1",
    server_port=ports.free("127.0.0.1"),
    max_file_size=1 << 20,
    ssr_mode=False,
    quiet=True,
    prevent_thread_lock=True,
  )
  yield url
  page.close(verbose=False)


def call(url, name, *data):
  """What docs/demo.md does with curl: the event and its result, as text."""
  request = urllib.request.Request(
    f"{url}gradio_api/call/{name}",
    json.dumps({"data": data}).encode(),
    {"Content-Type": "application/json"},
  )
  with urllib.request.urlopen(request) as response:
    event = json.load(response)["event_id"]
  stream = f"{url}gradio_api/call/{name}/{event}"
  with urllib.request.urlopen(stream) as response:
    return response.read().decode()


def data_url(content):
  text = base64.b64encode(content).decode()
  return {
    "url": f"data:image/png;base64,{text}",
    "meta": {"_type": "gradio.FileData"},
  }


def test_the_api_of_the_page(page, actions):
  image, text = data_url(png()), "a red star\na blue ring"
  done = call(page, "match", image, text)
  rows = json.loads(done.split("data: ")[1])[0]["data"]
  assert [row[0] for row in rows] == [r[0] for r in actions.match(png(), text)]
  done = call(page, "caption", image, *BEAMS)
  captions, *_ = json.loads(done.split("data: ")[1])
  assert [row[1] for row in captions["data"]] == [
    row[1] for row in actions.caption(png(), *BEAMS)[0]
  ]
  done = call(page, "explain", image, "a red star", "red star")
  assert "event: complete" in done and ".png" in done
  assert done.count('"caption": "') == 0
  assert call(page, "search", "a star", None, 3).count('"caption": "') == 3


def test_bad_requests_get_messages_and_the_page_stays(page):
  for image, message in [
    (data_url(b"nothing"), "not_an_image"),
    (data_url(bytes(2 << 20)), "expected at most 1"),
    ({"url": "data:image/png;base64,@@@"}, "no base64"),
    (None, "Upload an image first"),
  ]:
    if image:
      image["meta"] = {"_type": "gradio.FileData"}
    done = call(page, "match", image, "a red star")
    assert "event: error" in done and message in done, done
  # A file of the server that nobody uploaded.
  path = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
  assert "event: error" in call(page, "match", path, "a")
  with pytest.raises(urllib.error.HTTPError):
    urllib.request.urlopen(f"{page}gradio_api/file=/etc/passwd")
  assert "event: complete" in call(page, "match", data_url(png()), "a star")


def test_uploads_stay_bytes_in_a_session_that_remakes_them(tmp_path):
  """As sessions do with what an example has filled in."""
  pytest.importorskip("gradio", reason="needs the extra [demo]")
  from blip_jax.serve import widgets

  path = tmp_path / "broken.png"
  path.write_bytes(b"nothing")
  image = widgets.upload("Image", 1 << 20)
  for one in (image, type(image)(**image.constructor_args)):
    assert one.get_block_name() == "image"
    assert one.preprocess(types.SimpleNamespace(path=path)) == b"nothing"
    assert one.preprocess(None) is None
  assert not [*(ROOT / "blip_jax/serve").glob("*.pyi")]


def test_the_page_names_no_other_host_and_says_why_tabs_are_off(page):
  with urllib.request.urlopen(page + "config") as response:
    config = response.read().decode()
  assert config.count("This tab is off.") == 2
  assert json.loads(config)["analytics_enabled"] is False
  assert "fonts.googleapis" not in config


def walk(*arguments):
  """Walks through a page in Chromium; see `browse_demo`."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.browse_demo", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_questions_in_a_browser(actions, gallery, tmp_path):
  page_lib = pytest.importorskip(
    "blip_jax.serve.page", reason="needs the extra [demo]"
  )
  chromium.needed()
  (tmp_path / "scene.png").write_bytes(png())
  examples = demo.write_examples(tmp_path)
  with demo.own_uploads():
    for url in show(page_lib, actions, gallery, examples):
      walk("questions", url, tmp_path / "scene.png", tmp_path / "shots")


@pytest.mark.slow
def test_in_a_browser(tmp_path):
  """Trains the quick start, and walks through the page in Chromium."""
  pytest.importorskip("gradio", reason="needs the extra [demo]")
  chromium.needed()
  port = ports.free("127.0.0.1")
  server = subprocess.Popen(
    [
      *(sys.executable, "-m", "blip_jax.main", "--config", "demo"),
      f"--config.port={port}",
    ],
    cwd=tmp_path,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert any("The demo is at" in line for line in server.stdout)
    image = tmp_path / "runs/demo/examples/scene-1.png"
    walk("quick_start", f"http://127.0.0.1:{port}", image, tmp_path / "shots")
  finally:
    server.terminate()
    assert server.wait(60) == 0
