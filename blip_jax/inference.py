"""What `blip_jax.load` returns: a model with its weights and its vocabulary."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from blip_jax.convert import source
from blip_jax.data import datasets, transforms
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.models import card as card_lib
from blip_jax.models import decoding, families, generation, med
from blip_jax.runtime import ahead, sharding
from blip_jax.tasks import caption as caption_lib

log = logging.getLogger(__name__)

# A path, a URL, encoded bytes, uint8 pixels, or one of PIL's.
Picture = str | os.PathLike | bytes | np.ndarray | PIL.Image.Image
# Of a picture that a URL names.
MAX_DOWNLOAD_BYTES = 64 << 20
TIMEOUT_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Caption:
  """A text about a picture.

  Attributes:
    text: without the prompt.
    log_prob: natural logarithm of its probability, given picture and prompt,
      [SEP] included unless the text was cut.
    token_log_probs: of each of its tokens, which sum to `log_prob`.
    tokens: their words or pieces of words.
    score: what several of one picture are ranked by.
    others: further captions of the same picture, the best first.
  """

  text: str
  log_prob: float
  token_log_probs: tuple[float, ...]
  tokens: tuple[str, ...]
  score: float
  others: tuple["Caption", ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that is ready to be used.

  Attributes:
    card: its family and sizes, prompt and generation defaults.
    module: the Flax module; its methods say what can be asked of it.
    params: on the mesh, as the module takes them.
    tokenizer: None where no vocabulary was found; `load` warns then.
    mesh: where the parameters are.
  """

  card: card_lib.Card
  module: nn.Module
  params: med.Params
  tokenizer: tokenizer_lib.Tokenizer | None
  mesh: jax.sharding.Mesh

  def apply(self, *args, method: str | None = None, **kwargs) -> Any:
    """Calls a method of the module, without dropout, with these parameters.

    Takes NumPy's arrays as well as JAX's.
    """
    args, kwargs = jax.tree.map(
      lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x,
      (args, kwargs),
    )
    return self.module.apply(
      {"params": self.params}, *args, method=method, **kwargs
    )

  def caption(
    self,
    images: Picture | Iterable[Picture],
    *,
    prompt: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    urls: bool = False,
    **options: Any,
  ) -> list[Caption]:
    """Writes about pictures.

    Args:
      images: one picture or any number, each a path, encoded bytes, a uint8
        array [H, W, 3], or an image of PIL's.
      prompt: what the captions go on from; the model's own by default.
      batch_size: pictures at a time. The last batch is filled up, so that
        nothing is compiled twice.
      seed: of what is sampled. A sample depends on the seed and on its
        picture, not on the pictures beside it.
      urls: whether a picture may be an http(s) URL, which is then fetched.
      options: num_beams, max_length, min_length, max_new_tokens,
        repetition_penalty, no_repeat_ngram_size, length_norm,
        num_return_sequences, sample, temperature, top_k, top_p: see
        `decoding.Decoding`. Lengths are in tokens and count the prompt.

    Returns:
      One caption a picture, in order; of several each, the best, which has the
      `others`.

    Raises:
      ValueError: the model writes no captions, an option cannot be, or a
        picture cannot be read; says which.
    """
    if isinstance(images, Picture) and np.ndim(images) < 4:
      images = [images]
    write = self.captioner(prompt, **options)
    batch_size = sharding.whole_batch(batch_size, self.mesh)
    read = functools.partial(self._pixels, urls=urls)
    captions = []
    with contextlib.closing(
      ahead.map_ahead(read, enumerate(images), 2 * batch_size)
    ) as pictures:
      while batch := list(itertools.islice(pictures, batch_size)):
        captions += write(_filled_up(batch, batch_size), seed)[: len(batch)]
    return captions

  def captioner(
    self, prompt: str | None = None, **options: Any
  ) -> Callable[[UInt8[np.ndarray, "I H W 3"], int], list[Caption]]:
    """A function of pixels of the model's size, and of a seed of samples.

    For whoever loads pictures by other means than `caption`; each number of
    pictures is compiled once. The arguments are those of `caption`.
    """
    if self.card.family not in ("caption", "pretrain"):
      raise ValueError(
        f"{self.card.source or 'this model'} is of the family "
        f"{self.card.family!r}, which has no decoder that writes captions; "
        "load a captioner, such as 'model_base_caption_capfilt_large' or "
        "'Salesforce/blip-image-captioning-base'"
      )
    if self.tokenizer is None:
      raise ValueError(
        "this model has no vocabulary, so it cannot write; load it with "
        "tokenizer=, a folder with its vocab.txt"
      )
    config = self.card.config
    prompt = self.card.prompt if prompt is None else prompt
    ids = self.tokenizer.prompt_ids(prompt)
    settings = decoding.make(
      self.card.generation, len(ids), config.med.max_positions, **options
    )
    room = decoding.room_for(settings.max_length, config.med.max_positions)

    def write(pixels, seed=0):
      draws = np.array([zlib.crc32(image) for image in pixels], np.uint32)
      batch = {"pixels": pixels, "draws": draws}
      with sharding.activate(self.mesh):
        found = _generate(
          (self.module, room),
          self.params,
          sharding.put_batch(batch, self.mesh),
          np.array(ids, np.int32),
          settings,
          seed,
        )
      found = jax.tree.map(sharding.own_rows, found)
      span = slice(len(ids), int(settings.max_length))
      return [
        self._caption(generation.Generated(*row), prompt, span)
        for row in zip(*found, strict=True)
      ]

    return write

  def _pixels(self, item: tuple[int, Picture], urls: bool):
    """A numbered picture in the model's size.

    Raises:
      ValueError: it cannot be read.
    """
    number, picture = item
    try:
      return self.image(open_picture(picture, urls))
    except transforms.BadSample as error:
      raise ValueError(f"picture {number}: {error}") from error

  @functools.cached_property
  def image(self) -> transforms.EvalImage:
    """Brings a decoded picture to the model's size."""
    return transforms.EvalImage(self.card.config.vit.image_size)

  def _caption(self, found, prompt: str, span: slice) -> Caption:
    """The best of one picture's texts, with the others; `span` is where the
    words behind the prompt are."""
    texts = self.tokenizer.decode(found.ids, prompt)
    best, *others = [
      self._one(text, ids[span].tolist(), log_probs[span].tolist(), score)
      for text, ids, log_probs, score in zip(texts, *found, strict=True)
    ]
    return dataclasses.replace(best, others=tuple(others))

  def _one(self, text, ids, log_probs, score) -> Caption:
    sep = self.tokenizer.sep_id
    end = ids.index(sep) + 1 if sep in ids else len(ids)
    return Caption(
      text,
      log_prob=sum(log_probs[:end]),
      token_log_probs=tuple(log_probs[:end]),
      tokens=tuple(self.tokenizer.pieces(ids[:end])),
      score=float(score),
    )


@functools.partial(jax.jit, static_argnums=0)
def _generate(module_and_room, params, batch, prompt, settings, seed):
  """Texts of pictures. The draws of a picture are a matter of what it shows."""
  module, room = module_and_room
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = fold(jax.random.key(seed), batch["draws"])
  found = caption_lib.write(
    module, params, batch["pixels"], prompt, settings, room, keys
  )
  return jax.tree.map(
    lambda x: nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1))),
    found,
  )


def open_picture(picture: Picture, urls: bool = False) -> transforms.Image:
  """Pixels of a picture, however it is given.

  Raises:
    transforms.BadSample: it cannot be read.
    ValueError: it is a URL, and `urls` is not set.
  """
  if isinstance(picture, PIL.Image.Image):
    picture = np.asarray(picture.convert("RGB"))
  if isinstance(picture, str) and picture.startswith(("http://", "https://")):
    if not urls:
      raise ValueError(
        f"{picture}: is a URL, and nothing is fetched unless asked for; set "
        "urls=True"
      )
    picture = _fetch(picture)
  return transforms.decode(picture, datasets.MAX_PIXELS)


def _fetch(url: str) -> bytes:
  try:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
      content = response.read(MAX_DOWNLOAD_BYTES + 1)
  except OSError as error:
    raise transforms.BadSample("missing", f"{url}: {error}") from error
  if len(content) > MAX_DOWNLOAD_BYTES:
    found = f"{url}: more than {MAX_DOWNLOAD_BYTES} bytes"
    raise transforms.BadSample("too_large", found)
  return content


def _filled_up(pictures: Sequence, size: int) -> UInt8[np.ndarray, "I H W 3"]:
  blank = [np.zeros_like(pictures[0])] * (size - len(pictures))
  return np.stack([*pictures, *blank])


def load(
  name_or_path: str | os.PathLike,
  *,
  task: str | None = None,
  image_size: int | None = None,
  dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
  model_config: str | os.PathLike | None = None,
  tokenizer: str | os.PathLike | None = None,
  drop: Sequence[str] = (),
) -> Model:
  """Loads a released checkpoint, one of yours, or one of Hugging Face's.

  Args:
    name_or_path: "model_base_retrieval_coco", "Salesforce/blip-vqa-base", a
      .pth or .safetensors file, a Hugging Face folder, or a workdir of a run.
    task: as what, if not as what it was trained for: "feature", "caption",
      "vqa", "itm", "retrieval", "nlvr" or "pretrain".
    image_size: pixels a side, if not those that it was trained for.
    dtype: of activations, "float32" or "bfloat16"; parameters stay float32.
    mesh: where to put it, from `sharding.make_mesh`; each device reads its own
      part. One device by default.
    model_config: a config file, for weights of widths that BERT and ViT do not
      have.
    tokenizer: a folder with vocab.txt or a hub id, if none lies beside the
      weights.
    drop: regular expressions for names in the file that may be left out.

  Raises:
    ValueError: there is no such checkpoint, or it is damaged or does not fit;
      says which argument helps.
  """
  checkpoint = source.open_checkpoint(
    name_or_path,
    task=task,
    image_size=image_size,
    model_config=model_config,
    tokenizer=tokenizer,
    keep_momentum=False,
    drop=drop,
  )
  for warning in checkpoint.report.warnings:
    log.warning("%s: %s", name_or_path, warning)
  if mesh is None:
    mesh = sharding.one_device()
  card = checkpoint.card
  config = dataclasses.replace(
    card.config,
    vit=dataclasses.replace(card.config.vit, dtype=dtype),
    med=dataclasses.replace(card.config.med, dtype=dtype),
  )
  params = checkpoint.on_mesh("params", mesh)
  if card.family == "pretrain":
    params = med.tie(params)
  return Model(
    card,
    families.build(card.family, config),
    params,
    checkpoint.tokenizer,
    mesh,
  )
