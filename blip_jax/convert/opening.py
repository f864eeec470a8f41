"""Opens any checkpoint as a native model with lazily read parameters.

A checkpoint may be native, the original's or Hugging Face's.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from blip_jax.convert import (
  adapt,
  companions,
  hub,
  model_configs,
  names,
  reader,
  registry,
  weights,
)
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.models import card as card_lib
from blip_jax.models import families
from blip_jax.runtime import files, saved_arrays, sharding, snapshot, start

# What is read of a native checkpoint, and so has to be sound.
_READ = ("params", "momentum", "model")


@dataclasses.dataclass(frozen=True, repr=False)
class Checkpoint:
  """A model and its parameters, which are read from their files when used.

  Attributes:
    card: describes the model.
    leaves: `params/...`, and `momentum/...` if there are momentum encoders.
    tokenizer: None if no vocabulary was found.
    report: what happened to every name.
    folder: the native checkpoint that holds exactly these leaves; None if
      there is none.
  """

  card: card_lib.Card
  leaves: weights.Leaves
  tokenizer: tokenizer_lib.Tokenizer | None
  report: weights.Report
  folder: epath.Path | None = None

  @property
  def stored(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters."""
    return _shapes(self.item("params"))

  @property
  def momentum(self) -> "Checkpoint | None":
    """Momentum encoders and queues as `params`; None if there are none."""
    leaves = {f"params/{p}": leaf for p, leaf in self.item("momentum").items()}
    if not leaves:
      return None
    return dataclasses.replace(self, leaves=leaves, folder=None)

  def item(self, name: str) -> weights.Leaves:
    """The leaves of `params` or `momentum`, by the rest of their paths."""
    return {
      path.removeprefix(f"{name}/"): leaf
      for path, leaf in self.leaves.items()
      if path.startswith(f"{name}/")
    }

  def load(
    self, leaves: Mapping[str, jax.ShapeDtypeStruct], item: str = "params"
  ) -> dict[str, Any]:
    """Loads some arrays.

    Args:
      leaves: paths in the item, and the sharding of each array.
      item: `params` or `momentum`.
    """
    stored = self.item(item)
    # Copying releases the GIL, and other threads read the next arrays.
    with concurrent.futures.ThreadPoolExecutor() as pool:
      arrays = pool.map(
        lambda path: put(stored[path], _sharding(leaves[path])), leaves
      )
      return dict(zip(leaves, arrays, strict=True))

  def on_mesh(self, item: str, mesh: Mesh) -> dict[str, Any] | None:
    """All of `params` or `momentum` as nested dicts; None if there is none."""
    leaves = self.item(item)
    if not leaves:
      return None
    if self.folder is not None:
      return saved_arrays.load_on_mesh(self.folder, item, mesh)
    abstract = sharding.abstract_state(
      saved_arrays.nested(_shapes(leaves)), mesh
    )
    return saved_arrays.nested(self.load(saved_arrays.by_path(abstract), item))

  def __repr__(self) -> str:
    return (
      f"Checkpoint({self.card.source!r}, {self.card.family} model, "
      f"{len(self.leaves)} arrays)"
    )

  def __str__(self) -> str:
    return f"{self.card.source}\n{self.report}"


def _shapes(leaves: weights.Leaves) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for path, leaf in leaves.items()
  }


def _sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
  assert leaf.sharding is not None, leaf
  return leaf.sharding


def put(leaf: weights.Leaf, where: jax.sharding.Sharding) -> jax.Array:
  """Reads a leaf onto its shards; each host copies what its devices hold."""
  array = leaf.read()
  # JAX on CPU would otherwise keep a view of the file, and may donate it.
  return jax.make_array_from_callback(
    leaf.shape, where, lambda index: _copy(np.asarray(array[index]))
  )


def _copy(view: np.ndarray) -> np.ndarray:
  """A copy aligned to 64 bytes, which JAX on CPU does not copy again."""
  buffer = np.empty(view.nbytes + 64, np.uint8)
  first = -buffer.ctypes.data % 64
  copy = buffer[first : first + view.nbytes]
  copy = copy.view(view.dtype).reshape(view.shape)
  copy[...] = view
  return copy


def open_checkpoint(
  name_or_path: str | os.PathLike,
  *,
  task: str | None = None,
  image_size: int | None = None,
  model_config: str | os.PathLike | None = None,
  tokenizer: str | os.PathLike | None = None,
  keep_momentum: bool = True,
  drop: Sequence[str] = (),
) -> Checkpoint:
  """Finds a checkpoint and describes it as a native model.

  Args:
    name_or_path: a released name (`registry.RELEASED`), a hub id, a URL, a
      .pth or .safetensors file, a Hugging Face folder, or a workdir or
      checkpoint of this project.
    task: family of the result; by default the checkpoint's own. `adapt.py`
      says what is possible.
    image_size: side of the images in pixels; by default the checkpoint's.
      Position embeddings are interpolated.
    model_config: a config file, if the shapes do not determine the number of
      attention heads.
    tokenizer: a vocabulary's folder or hub id, if there is none next to the
      weights.
    keep_momentum: whether to keep momentum encoders and queues, if any.
    drop: regular expressions for names in the file that may be left out.

  Raises:
    ValueError: there is no such checkpoint, or it is damaged, hostile, or does
      not fit; says what was found where, and which argument helps.
  """
  if task is not None and task not in families.FAMILIES:
    raise ValueError(
      f"task: expected one of {families.FAMILIES}, found {task!r}"
    )
  path = hub.fetch(name_or_path)
  hints = None
  with _named(path):
    name = os.fspath(name_or_path)
    if files.is_folder(path) and snapshot.holds_one(path):
      folder = snapshot.find_sound(path, _READ)
      opened = _open_native(folder)
      path = pathlib.Path(folder) / "model"
    else:
      hints = companions.hints(path, model_config)
      opened = _open_external(name, path, task, hints, drop)
    card, vocabulary = companions.tokenizer_of(
      opened.card, path, tokenizer, opened.report, hints
    )
    opened = dataclasses.replace(opened, card=card, tokenizer=vocabulary)
    opened.report.warnings += companions.image_warnings(
      companions.folder_of(path), card
    )
    return _adapt(opened, task, image_size, keep_momentum)


def open_weights(name_or_path: str, card: card_lib.Card) -> start.Weights:
  """Opens weights for a run.

  A native checkpoint of the same family and image size is read shard by shard;
  anything else is opened and adapted.

  Args:
    name_or_path: as of `open_checkpoint`.
    card: describes the model of the run.

  Raises:
    ValueError: as `open_checkpoint`.
  """
  path = hub.fetch(name_or_path)
  with _named(path):
    if files.is_folder(path) and snapshot.holds_one(path):
      folder = snapshot.find_sound(path, _READ)
      stored, grid = _card(folder), card.config.vit.grid
      opened = _open_native(folder)
      same = (stored.family, stored.config.vit.grid) == (card.family, grid)
      if same and opened.folder is not None:
        return saved_arrays.Arrays(folder)
    else:
      hints = model_configs.read_hints(card.to_json())
      opened = _open_external(name_or_path, path, card.family, hints)
    leaves = adapt.to_family(
      opened.leaves,
      opened.card.family,
      card.family,
      card.config,
      opened.report,
    )
    source = opened.card.source or str(path)
    card = dataclasses.replace(card, source=source)
    return dataclasses.replace(opened, card=card, leaves=leaves)


def describe(
  name_or_path: str | os.PathLike,
) -> tuple[card_lib.Card, pathlib.Path]:
  """Describes a checkpoint without reading its parameters.

  Args:
    name_or_path: as of `open_checkpoint`.

  Returns:
    Its card, and the folder with its companion files.

  Raises:
    ValueError: as `open_checkpoint`.
  """
  path = hub.fetch(name_or_path)
  with _named(path):
    if files.is_folder(path) and snapshot.holds_one(path):
      folder = snapshot.find(path)
      return _card(folder), pathlib.Path(folder) / "model"
    hints = companions.hints(path, None)
    card = _open_external(os.fspath(name_or_path), path, None, hints).card
    return card, path if files.is_folder(path) else path.parent


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
  """Makes every error about a checkpoint name it."""
  try:
    yield
  except ValueError as error:
    if str(path) in str(error):
      raise
    raise ValueError(f"{path}: {error}") from error
  # What computing sizes makes of tensors that are absent, or of another rank.
  except (LookupError, TypeError, ArithmeticError) as error:
    raise ValueError(
      f"{path}: expected the tensors of a BLIP model, found names or shapes "
      f"that none has ({error!r:.200}); fetch this checkpoint again"
    ) from error


def _side(image_size: Any, patch_size: int) -> int:
  """The side of a square image; raises `ValueError` unless patches fill it."""
  is_number = isinstance(image_size, int | np.integer)
  if (
    not is_number
    or isinstance(image_size, bool)
    or image_size <= 0
    or image_size % patch_size
  ):
    raise ValueError(
      "image_size: expected the side of square images in pixels, a positive "
      f"multiple of the patch size, {patch_size}, found {image_size!r}"
    )
  return int(image_size)


def _adapt(
  opened: Checkpoint,
  task: str | None,
  image_size: int | None,
  keep_momentum: bool,
) -> Checkpoint:
  """Adapts a checkpoint to another family or image size."""
  card = opened.card
  if image_size is not None:
    image_size = _side(image_size, card.config.vit.patch_size)
    vit = dataclasses.replace(
      card.config.vit, image_size=(image_size, image_size)
    )
    config = dataclasses.replace(card.config, vit=vit)
    card = dataclasses.replace(card, config=config)
  target = task or card.family
  leaves = adapt.to_family(
    opened.leaves,
    opened.card.family,
    target,
    card.config,
    opened.report,
    keep_momentum,
  )
  adapt.check(leaves, target, card.config)
  if target != card.family:
    # The original's captioners have a prompt whatever they start from. A run of
    # this package has seen none if its card has none.
    layout = "original" if card.source else "orbax"
    card = dataclasses.replace(
      card,
      family=target,
      prompt=card_lib.prompt_of(target, layout),
      generation=card_lib.GENERATION.get(target, {}),
    )
  same = target == opened.card.family and image_size is None
  folder = opened.folder if same else None
  return dataclasses.replace(opened, card=card, leaves=leaves, folder=folder)


def _card(folder: epath.Path) -> card_lib.Card:
  file = folder / "model" / "model.json"
  if not files.exists(file):
    raise ValueError(
      f"{folder} has no model/model.json, which describes its parameters; "
      "copy the complete folder of the checkpoint"
    )
  return model_configs.read_card(file)


def _open_native(folder: epath.Path) -> Checkpoint:
  card, leaves = _card(folder), {}
  for item in ("params", "momentum"):
    if files.exists(folder / item):
      arrays = saved_arrays.Arrays(folder, item)
      for name, read in arrays.readers().items():
        leaf, path = arrays.stored[name], f"{item}/{name}"
        leaves[path] = weights.Leaf(leaf.shape, leaf.dtype, read, memory=path)
  stacked = weights.stack_layers(leaves)
  is_current = stacked.keys() == leaves.keys()
  if card.family == "pretrain":
    stacked = adapt.tie(stacked)
  return Checkpoint(
    card, stacked, None, weights.Report(), folder if is_current else None
  )


def _open_external(
  name: str,
  path: pathlib.Path,
  task: str | None,
  hints: model_configs.Hints,
  drop: Sequence[str] = (),
) -> Checkpoint:
  report = weights.Report(warnings=list(hints.warnings))
  tensors = weights.unwrap(reader.read(path), report, drop)
  layout = names.layout_of(tensors)
  if layout is None:
    raise ValueError(
      f"{tensors.path}: none of its {len(tensors)} names belongs to a BLIP "
      "image tower (visual_encoder.* or vision_model.*); the first names are "
      f"{weights.first_few(tensors)}"
    )
  if tensors.ignored:
    report.drop("not weights", *tensors.ignored)
  leaves = weights.from_external(tensors, layout, report, drop)
  family = adapt.family_of(leaves)
  config = model_configs.from_shapes(leaves, task or family, hints)
  released = registry.find(name) or registry.find(path.name)
  if released:
    known = (released.mismatch(family, config), released.note)
    report.warnings += filter(None, known)
  if layout == "hf":
    report.warnings += companions.hugging_face_warnings(
      family, config, released is not None
    )
  prompt = card_lib.prompt_of(family, layout)
  generation = card_lib.GENERATION.get(family, {})
  if layout == "hf" and generation:
    folder = companions.folder_of(path)
    generation = {**generation, **companions.generation(folder, report)}
  card = card_lib.Card(family, config, prompt, generation, path.name)
  return Checkpoint(card, leaves, None, report)
