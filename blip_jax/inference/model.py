"""What `blip_jax.load` returns: a model with its weights and its vocabulary."""

import dataclasses
import functools
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from blip_jax.convert import opening
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.data import transforms
from blip_jax.inference import images as images_lib
from blip_jax.inference import matching
from blip_jax.models import card as card_lib
from blip_jax.models import decoding, families, generation, med
from blip_jax.runtime import sharding
from blip_jax.tasks import caption as caption_lib

log = logging.getLogger(__name__)

Image = images_lib.Image


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
    images: Image | Iterable[Image],
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
        nothing is compiled twice; a few pictures are a smaller one.
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
    write = self.captioner(prompt, **options)
    captions = []
    read = images_lib.ImageReader(self.image, urls)
    for pixels, number in images_lib.batches(
      images, read, batch_size, self.mesh
    ):
      captions += write(pixels, seed)[:number]
    return captions

  def captioner(
    self, prompt: str | None = None, **options: Any
  ) -> Callable[..., list[Caption]]:
    """A function of pixels [I, H, W, 3] of the model's size, of a seed of
    samples, and of a number below 2**32 for each picture, which its draws
    depend on beside the seed; by default that is a matter of its pixels.

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
    room = decoding.num_positions_for(
      settings.max_length, config.med.max_positions
    )

    def write(
      pixels: UInt8[np.ndarray, "I H W 3"],
      seed: int = 0,
      draws: Sequence[int] | None = None,
    ) -> list[Caption]:
      if draws is None:
        draws = [zlib.crc32(image) for image in pixels]
      batch = {"pixels": pixels, "draws": np.array(draws, np.uint32)}
      with sharding.activate(self.mesh):
        found = _generate(
          (self.module, room),
          self.params,
          sharding.put_batch(batch, self.mesh),
          np.array(ids, np.int32),
          settings,
          seed,
        )
      found = jax.tree.map(sharding.local_rows, found)
      matching.refuse_nan(found.token_log_probs)
      span = slice(len(ids), int(settings.max_length))
      return [
        self._caption(generation.Generated(*row), prompt, span)
        for row in zip(*found, strict=True)
      ]

    return write

  def match(
    self,
    images: Image | Iterable[Image],
    texts: str | Sequence[str],
    *,
    pairwise: bool = False,
    legacy_cls: bool = False,
    batch_size: int = 8,
    urls: bool = False,
    num_frames: int = 0,
  ) -> matching.Match:
    """Says how well pictures and texts go together.

    Args:
      images: as for `caption`.
      texts: read as in training: lower case, most punctuation taken out, 30
        words, 35 tokens.
      pairwise: whether text i is of picture i alone; else all texts are
        compared with all pictures.
      legacy_cls: gives the numbers of the original's demo and of Hugging Face:
        texts are read as they are, and look at the picture from [CLS] where
        training had [ENC].
      batch_size: pictures at a time. Each is encoded and projected once,
        however many texts look at it.
      urls: as for `caption`.
      num_frames: taken of each video, whose path an image then is (section
        5.6; the original takes 8); 0: they are pictures.

    Raises:
      ValueError: the model does not match, there is nothing to compare, a text
        has no words, pairs are of unequal length, or a picture cannot be read.
    """
    self._needs("itm_head", "match pictures with texts")
    read = images_lib.ImageReader(self.image, urls, num_frames)
    return self.matcher.match(
      images, texts, read, pairwise, legacy_cls, batch_size
    )

  def embed_images(
    self,
    images: Image | Iterable[Image],
    *,
    batch_size: int = 8,
    urls: bool = False,
    num_frames: int = 0,
  ) -> Float[np.ndarray, "I C"]:
    """Unit vectors in the space that pictures, or videos, share with texts.

    Raises:
      ValueError: the model has no such space, there are no pictures, or one
        cannot be read.
    """
    self._needs("vision_proj", "embed pictures where texts are")
    read = images_lib.ImageReader(self.image, urls, num_frames)
    return self.matcher.embed_images(images, read, batch_size)

  def embed_texts(
    self, texts: str | Sequence[str], *, batch_size: int = 64
  ) -> Float[np.ndarray, "M C"]:
    """Unit vectors in the space that texts share with pictures.

    Raises:
      ValueError: the model has no such space, there are no texts, or one has
        no words.
    """
    self._needs("text_proj", "embed texts where pictures are")
    return self.matcher.embed_texts(texts, batch_size)

  def features(
    self,
    images: Image | Iterable[Image] | None = None,
    texts: str | Sequence[str] | None = None,
    *,
    batch_size: int = 8,
    urls: bool = False,
  ) -> matching.HiddenStates:
    """Hidden states of pictures, of texts, or, where both are given, of texts
    that look at their picture: the original's feature extractor.

    The three live in different spaces, so that a cosine between them says
    nothing; `embed_images` and `embed_texts` share one. The first token stands
    for the whole.

    Raises:
      ValueError: the model lacks a tower for it, pairs are of unequal length,
        or something cannot be read.
    """
    if images is None and texts is None:
      raise ValueError("features: give images=, texts= or both")
    if texts is not None:
      self._needs("text_encoder", "read texts")
    read = images_lib.ImageReader(self.image, urls)
    return self.matcher.features(images, texts, read, batch_size)

  def _needs(self, part: str, what: str) -> None:
    if part not in self.params:
      raise ValueError(
        f"{self.card.source or 'this model'} is of the family "
        f"{self.card.family!r}, which cannot {what}; load one that can, such "
        "as 'model_base_retrieval_coco' or 'Salesforce/blip-itm-base-coco'"
      )

  @functools.cached_property
  def matcher(self) -> matching.Matcher:
    """For whoever has texts in tokens, or chooses the pairs to look at."""
    return matching.Matcher(self.module, self.params, self.tokenizer, self.mesh)

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
  found = caption_lib.generate(
    module, params, batch["pixels"], prompt, settings, room, keys
  )
  return jax.tree.map(
    lambda x: nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1))),
    found,
  )


def quick_dtype() -> str:
  """Of activations, where numbers need not be compared with others'."""
  # CPUs that lack bfloat16 emulate it, many times slower.
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


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
  checkpoint = opening.open_checkpoint(
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
