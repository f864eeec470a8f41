"""A loaded model, and what its abilities share."""

import dataclasses
import functools
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Int

from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.data import transforms
from blip_jax.inference import images as images_lib
from blip_jax.inference import matching, saliency
from blip_jax.inference import texts as texts_lib
from blip_jax.models import blip, decoding, float8, med, stepwise, tying
from blip_jax.models import card as card_lib
from blip_jax.runtime import devices

Image = images_lib.Image
# One or any number of them; where there is `num_frames`, also videos.
Images = Image | Iterable[Image | images_lib.Video]
# Rows of the images that can be read, and the numbers of these images.
Kept = Int[np.ndarray, " k"]

# What errors say that a model can do, by its family.
ABILITIES = {
  "caption": "caption images",
  "dialog": "choose answers in dialogs about images",
  "feature": "embed images and texts",
  "itm": "match and embed images and texts",
  "nlvr": "compare two images with a statement",
  "pretrain": "caption, match and embed",
  "retrieval": "match and embed images and texts",
  "vqa": "answer questions about images",
}
_ARRAYS = (jax.Array, np.ndarray)
_LOAD_A_MATCHER = (
  "Load one that can, such as 'model_base_retrieval_coco' or "
  "'Salesforce/blip-itm-base-coco'"
)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Loaded:
  """A model with its weights and its vocabulary; see `inference.model.Model`.

  Abilities are subclasses that add methods, and no attributes.
  """

  card: card_lib.Card
  module: nn.Module
  params: med.Params
  tokenizer: tokenizer_lib.Tokenizer | None
  mesh: jax.sharding.Mesh

  def __repr__(self) -> str:
    vit, med_config = self.card.config.vit, self.card.config.med
    height, width = vit.image_size
    number = sum(
      x.size
      for path, x in jax.tree.leaves_with_path(tying.drop_tied(self.params))
      if path[-1].key != float8.SCALE
    )
    axes = ", ".join(f"{axis}={n}" for axis, n in self.mesh.shape.items())
    return (
      f"{self.card.family} model from {self.card.source or 'a training run'}\n"
      f"  image tower: {vit.depth} layers of width {vit.width}; images of "
      f"{height} x {width} pixels in patches of {vit.patch_size}\n"
      f"  text tower: {med_config.depth} layers of width {med_config.width}; "
      f"{med_config.vocab_size} tokens\n"
      f"  {number:,} parameters; activations {self.dtype}; mesh "
      f"{axes}"
    )

  @functools.cached_property
  def dtype(self) -> str:
    """As `blip_jax.load` takes it."""
    is_float8 = float8.is_used(self.params)
    return float8.NAME if is_float8 else self.card.config.vit.dtype

  def apply(self, *args, method: str | None = None, **kwargs) -> Any:
    """Calls a method of the Flax module with these parameters, no dropout.

    It is compiled once for all arrays of the same shapes.

    Args:
      args: arguments of the method, as JAX or NumPy arrays; others, such as
        flags, are constants of the program.
      method: its name, such as "image_features"; `__call__` by default.
      kwargs: keyword arguments of the method.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [x if isinstance(x, _ARRAYS) else None for x in leaves]
    constants = [None if isinstance(x, _ARRAYS) else x for x in leaves]
    call = _Call(self.module, method, tree, tuple(constants))
    return _apply(call, self.params, arrays)

  @functools.cached_property
  def matcher(self) -> matching.Matcher:
    """For callers that tokenise texts or choose the pairs themselves.

    Raises:
      ValueError: the family has no separate encoders (`nlvr`).
    """
    if not isinstance(self.module, blip.Blip):
      raise self._lacks("cannot encode images and texts", _LOAD_A_MATCHER)
    return matching.Matcher(self.module, self.params, self.tokenizer, self.mesh)

  @functools.cached_property
  def _explainer(self) -> saliency.Explainer:
    assert isinstance(self.module, blip.Blip), self.card.family
    tokenizer = texts_lib.vocabulary(self.tokenizer, "read text")
    return saliency.Explainer(self.module, self.params, tokenizer, self.mesh)

  @functools.cached_property
  def _decoding_params(self) -> med.Params:
    """The parameters as decoding uses them, prepared once for all batches."""
    decoder = {"text_decoder": self.params["text_decoder"]}
    return {**self.params, **_prepare(self.module, decoder)}

  @functools.cached_property
  def image(self) -> transforms.EvalImage:
    """Resizes a decoded image to the model's image size."""
    return transforms.EvalImage(self.card.config.vit.image_size)

  def _read(
    self,
    images: Images,
    batch_size: int | None,
    urls: bool,
    allow_private: bool,
    num_frames: int = 0,
    on_error: str = "raise",
    progress: bool = False,
  ) -> Generator[images_lib.Batch, None, None]:
    """Batches of images, or of videos; arguments as for `Model.caption`."""
    read = images_lib.ImageReader(self.image, urls, num_frames, allow_private)
    size = self._batch_size(batch_size, num_frames)
    return images_lib.batches(images, read, size, self.mesh, on_error, progress)

  def _batch_size(
    self, batch_size: int | None, num_frames: int = 0, of_image: int = 1
  ) -> int:
    """The number of images, or of what takes the memory of `of_image`, that
    suits the devices, or the number that is wanted."""
    decoding.at_least("batch_size", batch_size or 0, 0)
    decoding.at_least("num_frames", num_frames, 0)
    size = devices.images_per_batch(self.mesh.devices, num_frames)
    return batch_size or max(size // of_image, 1)

  def _require(self, part: str, ability: str) -> None:
    if part not in self.params:
      raise self._lacks(f"cannot {ability}", _LOAD_A_MATCHER)

  def _lacks(self, what: str, advice: str) -> ValueError:
    return ValueError(
      f"{self.card.source or 'this model'} is of the family "
      f"{self.card.family!r}, which {what}; it can "
      f"{ABILITIES[self.card.family]}. {advice}"
    )


# Compiled once for all models of the same sizes.
_prepare = jax.jit(stepwise.prepare, static_argnums=0)


class _Call(NamedTuple):
  """What of a call of `Loaded.apply` its program is compiled for.

  Attributes:
    module: whose method is called.
    method: its name, or None.
    tree: the structure of its arguments.
    constants: their leaves, with None in place of arrays.
  """

  module: nn.Module
  method: str | None
  tree: Any
  constants: tuple[Any, ...]


@functools.partial(jax.jit, static_argnums=0)
def _apply(call: _Call, params: med.Params, arrays: list[Any]) -> Any:
  pairs = zip(arrays, call.constants, strict=True)
  leaves = [constant if array is None else array for array, constant in pairs]
  args, kwargs = jax.tree.unflatten(call.tree, leaves)
  return call.module.apply(
    {"params": params}, *args, method=call.method, **kwargs
  )
