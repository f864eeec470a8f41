"""Opens a checkpoint of any kind, ours, the original's or Hugging Face's, as a
model of ours: what it is, and leaves that are read when they are wanted.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
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
from blip_jax.runtime import checkpoint, sharding, snapshot


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model with its weights, most of them still in their file.

  Attributes:
    card: what it is.
    leaves: `params/...`, and `momentum/...` if it has a twin.
    tokenizer: None where its vocabulary was not found.
    report: what became of every name.
    folder: of ours that has exactly these leaves; None if there is none.
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
    """Its twin and queues, if it has any, in the place of parameters."""
    leaves = {f"params/{p}": leaf for p, leaf in self.item("momentum").items()}
    if not leaves:
      return None
    return dataclasses.replace(self, leaves=leaves, folder=None)

  def item(self, name: str) -> weights.Leaves:
    """The leaves of `params` or `momentum`, by their paths in it."""
    return {
      path.removeprefix(f"{name}/"): leaf
      for path, leaf in self.leaves.items()
      if path.startswith(f"{name}/")
    }

  def load(
    self, wanted: Mapping[str, jax.ShapeDtypeStruct], item: str = "params"
  ) -> dict[str, Any]:
    """The arrays of some paths, each on the shards that it asks for."""
    leaves = self.item(item)
    # To copy lets other threads run, which turns to the next array meanwhile.
    with concurrent.futures.ThreadPoolExecutor() as pool:
      arrays = pool.map(
        lambda path: put(leaves[path], wanted[path].sharding), wanted
      )
      return dict(zip(wanted, arrays, strict=True))

  def on_mesh(self, item: str, mesh: Mesh) -> dict[str, Any] | None:
    """All of `params` or `momentum` as nested dicts; None if it has none."""
    leaves = self.item(item)
    if not leaves:
      return None
    if self.folder is not None:
      return snapshot.load_on_mesh(self.folder, item, mesh)
    wanted = sharding.abstract_state(snapshot.nested(_shapes(leaves)), mesh)
    return snapshot.nested(self.load(snapshot.by_path(wanted), item))

  def __str__(self) -> str:
    return f"{self.card.source}\n{self.report}"


def _shapes(leaves: weights.Leaves) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for path, leaf in leaves.items()
  }


def put(leaf: weights.Leaf, where: jax.sharding.Sharding) -> jax.Array:
  """Reads a leaf onto its shards; a host reads what its devices hold."""
  array = leaf.read()
  # A copy: JAX would keep a view of the file otherwise, and give it away.
  return jax.make_array_from_callback(
    leaf.shape, where, lambda index: _copy(np.asarray(array[index]))
  )


def _copy(view: np.ndarray) -> np.ndarray:
  """A copy that begins where JAX on CPU takes memory over without another."""
  room = np.empty(view.nbytes + 64, np.uint8)
  start = -room.ctypes.data % 64
  copy = room[start : start + view.nbytes].view(view.dtype).reshape(view.shape)
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
  """Finds a checkpoint and describes it as a model of ours.

  Args:
    name_or_path: a released name (`registry.RELEASED`), a hub id, an URL, a
      .pth or .safetensors file, a Hugging Face folder, a workdir or checkpoint
      of ours.
    task: the family that is wanted, if not the checkpoint's own; see
      `adapt.py` for what is possible.
    image_size: pixels a side, if not the checkpoint's; position embeddings are
      interpolated.
    model_config: a config file, where shapes do not tell the number of heads.
    tokenizer: a vocabulary's directory or hub id, where none lies beside the
      weights.
    keep_momentum: whether twin and queues are wanted, where there are any.
    drop: regular expressions for names in the file that may be left out.

  Raises:
    ValueError: it is none of these, is damaged or hostile, or does not fit;
      says what was found where, and which argument helps.
  """
  if task is not None and task not in families.FAMILIES:
    raise ValueError(
      f"task: expected one of {families.FAMILIES}, found {task!r}"
    )
  path = hub.fetch(name_or_path)
  name = os.fspath(name_or_path)
  if path.is_dir() and snapshot.holds_one(path):
    folder = snapshot.find(path)
    opened = _open_ours(folder)
    path = pathlib.Path(folder) / "model"
  else:
    hints = companions.hints(path, model_config)
    opened = _open_theirs(name, path, task, hints, drop)
  card, tokenizer = companions.tokenizer_of(
    opened.card, path, tokenizer, opened.report
  )
  opened = dataclasses.replace(opened, card=card, tokenizer=tokenizer)
  return _as(opened, task, image_size, keep_momentum)


def open_weights(name_or_path: str, card: card_lib.Card) -> checkpoint.Weights:
  """Weights for a run whose model `card` describes.

  A checkpoint of ours of that family is read shard by shard, unless its
  pictures have another size; anything else is opened and adapted to it.
  """
  path = hub.fetch(name_or_path)
  if path.is_dir() and snapshot.holds_one(path):
    folder = snapshot.find(path)
    theirs, grid = _card(folder), card.config.vit.grid
    if (theirs.family, theirs.config.vit.grid) == (card.family, grid):
      return snapshot.Arrays(folder)
    opened = _open_ours(folder)
  else:
    hints = model_configs.read_hints(card.to_json())
    opened = _open_theirs(name_or_path, path, card.family, hints)
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


def _as(
  opened: Checkpoint,
  task: str | None,
  image_size: int | None,
  keep_momentum: bool,
) -> Checkpoint:
  """The checkpoint as another family, or for another size of pictures."""
  card = opened.card
  if image_size is not None:
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
    card = dataclasses.replace(
      card,
      family=target,
      prompt=registry.PROMPT if target == "caption" else "",
      generation=registry.GENERATION.get(target, {}),
    )
  same = target == opened.card.family and image_size is None
  folder = opened.folder if same else None
  return dataclasses.replace(opened, card=card, leaves=leaves, folder=folder)


def _card(folder: epath.Path) -> card_lib.Card:
  file = folder / "model" / "model.json"
  if not file.exists():
    raise ValueError(
      f"{folder} has no model/model.json, which says what its parameters are"
    )
  return card_lib.Card.from_json(json.loads(file.read_text()))


def _open_ours(folder: epath.Path) -> Checkpoint:
  card, leaves = _card(folder), {}
  for item in ("params", "momentum"):
    if (folder / item).exists():
      arrays = snapshot.Arrays(folder, item)
      for name, read in arrays.readers().items():
        leaf, path = arrays.stored[name], f"{item}/{name}"
        leaves[path] = weights.Leaf(leaf.shape, leaf.dtype, read, memory=path)
  if card.family == "pretrain":
    leaves = adapt.tie(leaves)
  return Checkpoint(card, leaves, None, weights.Report(), folder)


def _open_theirs(
  name: str,
  path: pathlib.Path,
  task: str | None,
  hints: model_configs.Hints,
  drop: Sequence[str] = (),
) -> Checkpoint:
  tensors = reader.read(path)
  layout = names.layout_of(tensors)
  if layout is None:
    raise ValueError(
      f"{tensors.path}: none of its {len(tensors)} names is of a BLIP image "
      f"tower (visual_encoder.* or vision_model.*); it begins with "
      f"{weights.first_few(tensors)}"
    )
  report = weights.Report(warnings=list(hints.warnings))
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
    report.warnings += companions.traps(path, family, config, bool(released))
  prompt = (
    registry.PROMPT if family == "caption" and layout == "original" else ""
  )
  generation = registry.GENERATION.get(family, {})
  card = card_lib.Card(family, config, prompt, generation, path.name)
  return Checkpoint(card, leaves, None, report)
