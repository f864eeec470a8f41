"""Job `demo`: a web page to try models on this machine."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import PIL.Image

from blip_jax import train
from blip_jax.cli import recipes
from blip_jax.data import datasets, scenes, thumbnails
from blip_jax.inference import index, loading
from blip_jax.inference.model import Model
from blip_jax.runtime import config as run_config
from blip_jax.runtime import files, stopping
from blip_jax.runtime.config import Config
from blip_jax.serve import ports
from blip_jax.serve.actions import Actions, Gallery

log = logging.getLogger(__name__)

# Where the quick start leaves its model.
QUICK_START = "runs/quickstart"
# Examples to click on, and the side of their images in pixels.
EXAMPLES = 6
EXAMPLE_SIDE = 256
# Where Gradio reads the folder of uploads.
_UPLOADS = "GRADIO_TEMP_DIR"


def demo(config: Config, workdir: str) -> dict[str, float]:
  """Shows the page until SIGTERM or Ctrl-C.

  Args:
    config: from `defaults.demo`.
    workdir: where the index of the images and the examples go.

  Returns:
    Nothing: no metrics.

  Raises:
    ImportError: the extra [demo] is not installed.
    ValueError: the port is in use, or a model or the images cannot be loaded.
  """
  run_config.at_least(1, config, "max_mb", "queue")
  with own_uploads():  # Gradio looks where when it is imported
    page_lib = _import_page()
    ports.check(config.host, config.port)
    _show(page_lib, config, workdir)
  return {}


def _show(page_lib: Any, config: Config, workdir: str) -> None:
  actions = Actions([*load_models(config).values()])
  gallery = None
  if actions.lacks("embed") is None:
    gallery = open_gallery(config, workdir, actions.model("embed"))
  examples = write_examples(pathlib.Path(workdir) / "examples")
  page = page_lib.build(actions, gallery, examples, config.max_mb << 20)
  page.queue(max_size=config.queue, default_concurrency_limit=1)
  _, url, _ = page.launch(
    server_name=config.host,
    server_port=config.port or ports.free(config.host),
    max_file_size=config.max_mb << 20,
    mcp_server=config.mcp,
    theme=page_lib.THEME,
    footer_links=["api"],
    share=False,
    ssr_mode=False,
    quiet=True,
    prevent_thread_lock=True,
  )
  print(f"The demo is at {url} ; Ctrl-C ends it", flush=True)
  try:
    page.block_thread()
  except stopping.Stopped:  # as the page says
    stopping.fulfilled()
  finally:
    page.close(verbose=False)


@contextlib.contextmanager
def own_uploads() -> Iterator[None]:
  """Keeps uploads where only this user can read them, until the page ends.

  Gradio keeps them in one folder of the machine, where they stay, and where the
  next user may not write. A GRADIO_TEMP_DIR that is set is used instead.
  """
  if os.environ.get(_UPLOADS):
    yield
    return
  with files.temporary_folder() as folder:
    os.environ[_UPLOADS] = str(folder)
    try:
      yield
    finally:
      del os.environ[_UPLOADS]


def _import_page() -> Any:
  try:
    from blip_jax.serve import page
  except ImportError as error:
    raise ImportError(
      "the demo page needs Gradio: pip install 'blip_jax[demo]' (from a "
      f"checkout, pip install -e '.[demo]'); {error}"
    ) from error
  return page


def load_models(config: Config) -> dict[str, Model]:
  """The models of `config.model`, or that of the quick start, by name."""
  names = [name for name in config.model if name] or [quick_start()]
  dtype = config.dtype or loading.quick_dtype()
  return {name: loading.load(name, dtype=dtype) for name in names}


def quick_start() -> str:
  """The workdir of the quick start's model, which is trained if need be."""
  workdir = files.absolute(QUICK_START)
  if not files.is_file(os.path.join(workdir, "results.json")):
    log.info(
      "No model was given: training that of the quick start in %s, which takes "
      "some minutes. --config.model takes another one",
      QUICK_START,
    )
    train.train(recipes.load("quickstart"), workdir)
  return workdir


def open_gallery(config: Config, workdir: str, model: Model) -> Gallery:
  """Embeds the images of `config.images`, unless that is done."""
  source = datasets.open_images(config.images, config.image_root)
  folder = config.index or os.path.join(workdir, "index")
  return Gallery(source, index.build(folder, model, source, 8, 8))


def write_examples(folder: pathlib.Path) -> list[tuple[str, str]]:
  """Writes images of Scenes, and returns their paths and texts to match."""
  files.make_folder(folder)
  source = scenes.Scenes("val", num=EXAMPLES)
  texts = [source[number]["caption"] for number in range(EXAMPLES)]
  examples = []
  for number in range(EXAMPLES):
    path = folder / f"scene-{number}.png"
    pixels = thumbnails.fit(source[number]["image"], EXAMPLE_SIDE)
    PIL.Image.fromarray(pixels).save(path)
    others = [texts[(number + step) % EXAMPLES] for step in (1, 2)]
    examples.append((str(path), "\n".join([texts[number], *others])))
  return examples
