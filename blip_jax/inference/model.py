"""What `blip_jax.load` returns: a model with its weights and its vocabulary."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.data import transforms
from blip_jax.inference import (
  answering,
  captioning,
  choosing,
  comparing,
  explanation,
  matching,
  saliency,
)
from blip_jax.inference import images as images_lib
from blip_jax.inference import texts as texts_lib
from blip_jax.models import blip, decoding, generation, med, nlvr
from blip_jax.models import card as card_lib
from blip_jax.runtime import devices, sharding

Image = images_lib.Image
# One or any number of them; where there is `num_frames`, also videos.
Images = Image | Iterable[Image | images_lib.Video]
# Rows of the images that can be read, and the numbers of these images.
Kept = Int[np.ndarray, " k"]

# What errors say that a model can do, by its family.
_ABILITIES = {
  "caption": "caption images",
  "dialog": "choose answers in dialogs about images",
  "feature": "embed images and texts",
  "itm": "match and embed images and texts",
  "nlvr": "compare two images with a statement",
  "pretrain": "caption, match and embed",
  "retrieval": "match and embed images and texts",
  "vqa": "answer questions about images",
}
_LOAD_A_MATCHER = (
  "Load one that can, such as 'model_base_retrieval_coco' or "
  "'Salesforce/blip-itm-base-coco'"
)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Model:
  """A pre-trained model, ready for inference; `blip_jax.load` returns one.

  Which methods work depends on the model's family (`model.card.family`):

    caption         `caption`: generates captions of images
    itm, retrieval  `match`: scores image-text pairs; `embed_images` and
                    `embed_texts`: unit vectors in a space shared by both;
                    `explain`: which patches a match rests on
    pretrain        all of these
    vqa             `answer`: answers questions about images
    nlvr            `compare`: whether statements about two images are true
    dialog          `choose`: ranks answers in a dialog about an image
    any             `features`: hidden states, where the family has the encoder

  A method that the family lacks raises `ValueError`. Images are given as paths,
  encoded bytes, uint8 arrays or PIL images; resizing and normalisation are done
  here. Methods that take `num_frames` take videos, too.

    model = blip_jax.load("Salesforce/blip-image-captioning-base")
    print(model.caption("dog.jpg")[0].text)

    model = blip_jax.load("Salesforce/blip-itm-base-coco")
    match = model.match(["dog.jpg", "cat.jpg"], ["a dog", "a cat"])
    print(match.itm_prob)  # [2, 2]: a row for each image

  Attributes:
    card: the model's family, sizes, dtype, prompt and generation defaults.
    module: the Flax module; `apply` calls its methods.
    params: the parameters, on the mesh.
    tokenizer: None if no vocabulary was found (`load` warns then).
    mesh: the devices that hold the parameters.
  """

  card: card_lib.Card
  module: nn.Module
  params: med.Params
  tokenizer: tokenizer_lib.Tokenizer | None
  mesh: jax.sharding.Mesh

  def __repr__(self) -> str:
    vit, med_config = self.card.config.vit, self.card.config.med
    height, width = vit.image_size
    # Tied parameters are there twice, and count once.
    arrays = {id(x): x.size for x in jax.tree.leaves(self.params)}
    axes = ", ".join(f"{axis}={n}" for axis, n in self.mesh.shape.items())
    return (
      f"{self.card.family} model from {self.card.source or 'a training run'}\n"
      f"  image tower: {vit.depth} layers of width {vit.width}; images of "
      f"{height} x {width} pixels in patches of {vit.patch_size}\n"
      f"  text tower: {med_config.depth} layers of width {med_config.width}; "
      f"{med_config.vocab_size} tokens\n"
      f"  {sum(arrays.values()):,} parameters; activations {vit.dtype}; mesh "
      f"{axes}"
    )

  def apply(self, *args, method: str | None = None, **kwargs) -> Any:
    """Calls a method of the Flax module with these parameters, no dropout.

    Args:
      args: arguments of the method, as JAX or NumPy arrays.
      method: its name, such as "image_features"; `__call__` by default.
      kwargs: keyword arguments of the method.
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
    images: Images,
    *,
    prompt: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    explain: bool = False,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    progress: bool = False,
    **options: Any,
  ) -> list[captioning.Caption | None]:
    """Generates captions of images, or of videos.

    `caption_stream` yields them one after the other instead.

    Args:
      images: one image or any number of them, each a path, encoded bytes, a
        uint8 array [H, W, 3], or a PIL image; with `num_frames`, videos.
      prompt: the text that captions continue; the model's own by default.
      batch_size: images per batch; by default as many as suit the devices
        (`runtime.devices.images_per_batch`). The last batch is padded to the
        same size, so that nothing is compiled twice; a few images make a
        smaller batch.
      seed: of sampling. Samples depend on the seed and on the image, not on
        the other images of the batch.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      num_frames: frames taken of each video, at equal steps, if `images` are
        videos: paths (extra [video]), or all frames as uint8 [F, H, W, 3] or as
        a list of images. The text attends to the frames' tokens together
        (section 5.6; the paper takes 8, and 16 for questions). 0: they are
        images.
      on_error: what to do about an image that cannot be read: "raise", or
        "skip", which warns, naming these images, and gives None in their place.
      explain: whether captions come with an `explanation`: which patches of the
        image each word rests on. Of images only.
      layer: of the decoder, whose attention explains; by default the middle
        one.
      heads: of that layer, whose maps are averaged; all by default.
      progress: whether to show a progress bar.
      options: num_beams, max_length, min_length, max_new_tokens,
        repetition_penalty, no_repeat_ngram_size, length_norm,
        num_return_sequences, sample, temperature, top_k, top_p: see
        `blip_jax.models.decoding.Decoding`. Lengths are in tokens and include
        the prompt. By default, the model's own.

    Returns:
      One caption per image, in order. With `num_return_sequences`, it is the
      best one, and the rest are its `others`.

    Raises:
      ValueError: the model does not generate captions, an option is unknown or
        out of range, or an image cannot be read; says which.
    """
    return [
      *self.caption_stream(
        images,
        prompt=prompt,
        batch_size=batch_size,
        seed=seed,
        urls=urls,
        allow_private=allow_private,
        num_frames=num_frames,
        on_error=on_error,
        explain=explain,
        layer=layer,
        heads=heads,
        progress=progress,
        **options,
      )
    ]

  def caption_stream(
    self,
    images: Images,
    *,
    prompt: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    explain: bool = False,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    progress: bool = False,
    **options: Any,
  ) -> Iterator[captioning.Caption | None]:
    """Generates captions of any number of images, in little memory.

    At most two batches of images are read ahead, so that `images` may be an
    iterator over millions. A caption is yielded once its batch is full.

    Args:
      images: as for `caption`, and so are the other arguments.

    Returns:
      An iterator of one caption per image, in order; None for an image that was
      skipped. If an image cannot be read and is not skipped, the captions of
      all earlier batches come before the error.

    Raises:
      ValueError: as `caption`; before the first image is read, unless it is
        about an image.
    """
    if explain and num_frames:
      raise ValueError("explain: of images; leave out num_frames=")
    generate = self.captioner(
      prompt, explain=explain, layer=layer, heads=heads, **options
    )
    read = images_lib.ImageReader(self.image, urls, num_frames, allow_private)
    size = self._batch_size(batch_size, num_frames)
    batches = images_lib.batches(
      images, read, size, self.mesh, on_error, progress
    )

    def captions() -> Iterator[captioning.Caption | None]:
      with contextlib.closing(batches):
        for pixels, errors in batches:
          for error, one in zip(errors, generate(pixels, seed), strict=False):
            yield one if error is None else None

    return captions()

  def captioner(
    self,
    prompt: str | None = None,
    *,
    explain: bool = False,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    **options: Any,
  ) -> captioning.Captioner:
    """Returns a function that generates captions of batches of pixels.

    Use it to load images by other means than `caption` does. Each batch size
    is compiled once.

    Args:
      prompt: as for `caption`.
      explain: as for `caption`.
      layer: as for `caption`.
      heads: as for `caption`.
      options: as for `caption`.

    Returns:
      `generate(pixels, seed=0, image_seeds=None)`, where

        pixels: uint8 [I, H, W, 3], or [I, F, H, W, 3] of videos, in the model's
          image size (`model.image` resizes to it).
        seed: of sampling.
        image_seeds: an integer below 2**32 for each image, which is combined
          with `seed`, so that an image gets the same samples in any batch. By
          default, a checksum of its pixels.

      Its method `start` takes the same arguments and does not wait: it returns
      a function that does, and then returns the captions.

    Raises:
      ValueError: the model does not generate captions, or an option is unknown
        or out of range.
    """
    if self.card.family not in ("caption", "pretrain"):
      raise self._lacks(
        "has no decoder that generates captions",
        "Load a captioner, such as 'model_base_caption_capfilt_large' or "
        "'Salesforce/blip-image-captioning-base'",
      )
    if not explain and (layer, heads) != (None, None):
      raise ValueError("layer and heads are of explanations; set explain=True")
    chosen = saliency.where(self.card.config.med, layer, heads)
    return captioning.Captioner(
      self.card,
      self.module,
      self._decoding_params,
      self.tokenizer,
      self.mesh,
      prompt,
      functools.partial(self._explainer.captions, where=chosen)
      if explain
      else None,
      **options,
    )

  def answer(
    self,
    images: Images,
    questions: str | Iterable[str],
    answers: Sequence[str] | str | os.PathLike | None = None,
    *,
    num_answers: int | None = None,
    k_test: int = 128,
    rank_score: Literal["blip", "albef"] = "blip",
    abstain_below: float = 0.0,
    legacy_cls: bool = False,
    legacy_mask: bool = False,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
    **options: Any,
  ) -> list[answering.Answer | None]:
    """Answers questions about images (section 5.3), or videos (section 5.6).

    `answer_stream` yields the answers one after the other instead.

    Args:
      images: as for `caption`.
      questions: one about each image, one about all of them, or any number
        about a single image, which is then encoded once for a batch of them.
        They are read as in training: lower case, most punctuation removed, at
        most 50 words and 35 tokens.
      answers: a list of possible answers, or the path of one (JSON, or a text
        file with one on each line): the model ranks these and gives no other.
        By default, it generates any text.
      num_answers: how many answers to give, the best one included; by default
        5 of a list, or all beams.
      k_test: answers of the list, by their first tokens, that are scored in
        full.
      rank_score: how answers of a list are compared; see
        `blip_jax.tasks.answers.Ranked.scores`.
      abstain_below: the least probability of an answer; below it, the model
        abstains.
      legacy_cls: starts questions with [CLS], as Hugging Face does, instead of
        [ENC], which training uses.
      legacy_mask: attends to the padding of questions when it generates, as the
        original does.
      batch_size: questions per batch.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      num_frames: frames taken of each video, as for `caption`; 0: `images` are
        images.
      on_error: what to do about an image that cannot be read: "raise", or
        "skip", which warns, naming these images, and gives None in their place.
      progress: whether to show a progress bar.
      options: of generation, as for `caption`, but for sampling; the model's
        own by default.

    Returns:
      One answer per question, in order; the rest are its `others`.

    Raises:
      ValueError: the model does not answer questions, an option is unknown or
        out of range, the list of answers is empty, there are not as many
        questions as images, a question has no words, or an image cannot be
        read; says which.
    """
    return [
      *self.answer_stream(
        images,
        questions,
        answers,
        num_answers=num_answers,
        k_test=k_test,
        rank_score=rank_score,
        abstain_below=abstain_below,
        legacy_cls=legacy_cls,
        legacy_mask=legacy_mask,
        batch_size=batch_size,
        urls=urls,
        allow_private=allow_private,
        num_frames=num_frames,
        on_error=on_error,
        progress=progress,
        **options,
      )
    ]

  def answer_stream(
    self,
    images: Images,
    questions: str | Iterable[str],
    answers: Sequence[str] | str | os.PathLike | None = None,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
    **options: Any,
  ) -> Iterator[answering.Answer | None]:
    """Answers any number of questions, in little memory.

    Images are read at most two batches ahead, so that `images` and `questions`
    may be iterators over millions. An answer is yielded once its batch is full.

    Args:
      images: as for `answer`, and so are the other arguments.

    Returns:
      An iterator of one answer per question, in order; None for an image that
      was skipped.

    Raises:
      ValueError: as `answer`; before the first image is read, unless it is
        about an image or a question.
    """
    answerer = self.answerer(answers, **options)
    asked = texts_lib.asked(
      images_lib.as_iterable(images, num_frames),
      questions,
      answering.NAMES,
      self._batch_size(batch_size, num_frames),
      self._batch_size(batch_size),
      sharding.num_data_shards(self.mesh),
    )
    read = images_lib.ImageReader(self.image, urls, num_frames, allow_private)
    batches = images_lib.batches(
      asked.images, read, asked.batch_size, self.mesh, on_error, progress
    )

    return texts_lib.results(batches, asked, answerer)

  def answerer(
    self,
    answers: Sequence[str] | str | os.PathLike | None = None,
    **options: Any,
  ) -> answering.Answerer:
    """Returns an object that answers batches of pixels and tokens.

    Use it to load images by other means than `answer` does. Each size of a
    batch is compiled once.

    Args:
      answers: as for `answer`.
      options: `num_answers` to `legacy_mask` and `options`, as for `answer`.

    Raises:
      ValueError: the model does not answer questions, or an option is unknown
        or out of range.
    """
    if self.card.family != "vqa":
      raise self._lacks(
        "has no decoder that answers questions",
        "Load a model for VQA, such as 'model_base_vqa_capfilt_large' or "
        "'Salesforce/blip-vqa-base'",
      )
    return answering.Answerer(
      self.card,
      self.module,
      self._decoding_params,
      self.tokenizer,
      self.mesh,
      answers,
      **options,
    )

  def compare(
    self,
    image_pairs: comparing.Pair | Iterable[comparing.Pair],
    statements: str | Iterable[str],
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> list[comparing.Comparison | None]:
    """Says whether statements about two images each are true (section 5.4).

    `compare_stream` yields the results one after the other instead.

    Args:
      image_pairs: a pair of images, the left one first, or any number of them;
        images as for `caption`.
      statements: one about each pair, one about all of them, or any number
        about a single pair. They are read as in training: lower case, most
        punctuation removed, at most 40 words.
      batch_size: pairs per batch; by default half as many as images that suit
        the devices.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      on_error: what to do about a pair one of whose images cannot be read:
        "raise", or "skip", which warns, naming these pairs, and gives None in
        their place.
      progress: whether to show a progress bar.

    Returns:
      One result per statement, in order.

    Raises:
      ValueError: the model does not compare images, there are not as many
        statements as pairs, a statement has no words, or an image cannot be
        read; says which.
    """
    return [
      *self.compare_stream(
        image_pairs,
        statements,
        batch_size=batch_size,
        urls=urls,
        allow_private=allow_private,
        on_error=on_error,
        progress=progress,
      )
    ]

  def compare_stream(
    self,
    image_pairs: comparing.Pair | Iterable[comparing.Pair],
    statements: str | Iterable[str],
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> Iterator[comparing.Comparison | None]:
    """Compares any number of pairs of images, in little memory.

    Images are read at most two batches ahead, so that `image_pairs` and
    `statements` may be iterators over millions.

    Args:
      image_pairs: as for `compare`, and so are the other arguments.

    Returns:
      An iterator of one result per statement, in order; None for a pair that
      was skipped.

    Raises:
      ValueError: as `compare`; before the first image is read, unless it is
        about an image or a statement.
    """
    comparer = self.comparer()
    size = self._batch_size(batch_size, of_image=2)
    pairs = comparing.as_pairs(image_pairs)
    asked = texts_lib.Asked(
      *texts_lib.paired(pairs, statements, comparing.NAMES),
      comparing.NAMES,
      size,
    )
    read = comparing.PairReader(self.image, urls, allow_private=allow_private)
    batches = images_lib.batches(
      asked.images, read, size, self.mesh, on_error, progress
    )
    return texts_lib.results(batches, asked, comparer)

  def comparer(self) -> comparing.Comparer:
    """Returns an object that compares batches of pixels and tokens.

    Use it to load images by other means than `compare` does. Each size of a
    batch is compiled once.

    Raises:
      ValueError: the model does not compare images.
    """
    if not isinstance(self.module, nlvr.Nlvr):
      raise self._lacks(
        "cannot compare two images",
        "Load a model for NLVR2, such as 'model_base_nlvr'",
      )
    return comparing.Comparer(
      self.module, self.params, self.tokenizer, self.mesh
    )

  def choose(
    self,
    dialogs: choosing.Dialog | Iterable[choosing.Dialog],
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> list[choosing.Choice | None]:
    """Ranks the candidate answers in dialogs about images (section 5.5).

    `choose_stream` yields the results one after the other instead.

    Args:
      dialogs: one or any number of them, each a `blip_jax.Dialog`: an image, a
        question and candidates, and the caption and the history if there are
        any. Texts are read as in training: lower case, most punctuation
        removed; if they are too long, the oldest rounds are left out.
      batch_size: dialogs per batch; by default an eighth of the images that
        suit the devices, for there are many candidates.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      on_error: what to do about a dialog whose image cannot be read: "raise",
        or "skip", which warns, naming these dialogs, and gives None in their
        place.
      progress: whether to show a progress bar.

    Returns:
      The best candidate of each dialog, in order; the rest are its `others`.

    Raises:
      ValueError: the model does not choose answers, a dialog has no question or
        no candidates, or an image cannot be read; says which.
    """
    return [
      *self.choose_stream(
        dialogs,
        batch_size=batch_size,
        urls=urls,
        allow_private=allow_private,
        on_error=on_error,
        progress=progress,
      )
    ]

  def choose_stream(
    self,
    dialogs: choosing.Dialog | Iterable[choosing.Dialog],
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> Iterator[choosing.Choice | None]:
    """Chooses answers in any number of dialogs, in little memory.

    Images are read at most two batches ahead, so that `dialogs` may be an
    iterator over millions.

    Args:
      dialogs: as for `choose`, and so are the other arguments.

    Returns:
      An iterator of one result per dialog, in order; None for a dialog that was
      skipped.

    Raises:
      ValueError: as `choose`; before the first image is read, unless it is
        about a dialog.
    """
    chooser = self.chooser()
    read_ahead, following = itertools.tee(choosing.checked(dialogs))
    read = choosing.DialogReader(self.image, urls, allow_private=allow_private)
    size = self._batch_size(batch_size, of_image=8)
    batches = images_lib.batches(
      read_ahead, read, size, self.mesh, on_error, progress
    )

    def found() -> Iterator[choosing.Choice | None]:
      with contextlib.closing(batches):
        for pixels, errors in batches:
          given = [*itertools.islice(following, len(errors))]
          filling = given[-1:] * (len(pixels) - len(given))
          chosen = chooser(pixels, [*given, *filling])
          for error, one in zip(errors, chosen, strict=False):
            yield one if error is None else None

    return found()

  def chooser(self) -> choosing.Chooser:
    """Returns an object that chooses answers in batches of dialogs.

    Use it to load images by other means than `choose` does. Each size of a
    batch is compiled once.

    Raises:
      ValueError: the model does not choose answers.
    """
    if self.card.family != "dialog" or not isinstance(self.module, blip.Blip):
      raise self._lacks(
        "cannot choose answers in dialogs",
        "None was released: train one with --config dialog_custom or visdial, "
        "and load its workdir",
      )
    return choosing.Chooser(self.module, self.params, self.tokenizer, self.mesh)

  @overload
  def match(
    self,
    images: Images,
    texts: str | Sequence[str],
    *,
    pairwise: bool = False,
    legacy_cls: bool = False,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise"] = "raise",
    progress: bool = False,
  ) -> matching.Match: ...

  @overload
  def match(
    self,
    images: Images,
    texts: str | Sequence[str],
    *,
    pairwise: bool = False,
    legacy_cls: bool = False,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["skip"],
    progress: bool = False,
  ) -> tuple[matching.Match, Kept]: ...

  def match(
    self,
    images: Images,
    texts: str | Sequence[str],
    *,
    pairwise: bool = False,
    legacy_cls: bool = False,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> matching.Match | tuple[matching.Match, Kept]:
    """Scores how well images and texts match, by ITC and ITM (section 3.2).

    Args:
      images: as for `caption`.
      texts: one text or any number of them. They are read as in training:
        lower case, most punctuation removed, at most 30 words and 35 tokens.
      pairwise: whether text i is compared with image i only; by default every
        text is compared with every image.
      legacy_cls: reproduces the numbers of the original demo and of Hugging
        Face: texts are not cleaned, and start with [CLS] where training had
        [ENC].
      batch_size: images per batch. Each image is encoded and projected once,
        however many texts are compared with it.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      num_frames: frames taken of each video, as for `caption`; 0: `images` are
        images.
      on_error: what to do about an image that cannot be read: "raise", or
        "skip", which warns and leaves its scores out.
      progress: whether to show a progress bar.

    Returns:
      Scores [I, M] for I images and M texts; [I] with `pairwise`. With
      `on_error="skip"`, a pair: the scores of the k images that could be read,
      [k, M] or [k], and the numbers of these images, from 0 on.

    Raises:
      ValueError: the model has no ITM head, there are no images or no texts, a
        text has no words, `pairwise` got unequal numbers, or an image cannot
        be read.
    """
    self._require("itm_head", "match images with texts")
    tokens = self.matcher.tokens(texts, clean=not legacy_cls)
    if pairwise:
      images = matching.paired(images, tokens, num_frames)
    read = images_lib.ImageReader(self.image, urls, num_frames, allow_private)
    size = self._batch_size(batch_size, num_frames)
    batches = images_lib.batches(
      images, read, size, self.mesh, on_error, progress
    )
    match, kept = self.matcher.match(
      batches, tokens, pairwise, legacy_cls, self._batch_size(batch_size)
    )
    return match if on_error == "raise" else (match, kept)

  @overload
  def embed_images(
    self,
    images: Images,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise"] = "raise",
    progress: bool = False,
  ) -> Float[np.ndarray, "I C"]: ...

  @overload
  def embed_images(
    self,
    images: Images,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["skip"],
    progress: bool = False,
  ) -> tuple[Float[np.ndarray, "k C"], Kept]: ...

  def embed_images(
    self,
    images: Images,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> Float[np.ndarray, "I C"] | tuple[Float[np.ndarray, "k C"], Kept]:
    """Embeds images, or videos, in the space that they share with texts.

    Args:
      images: as for `caption`.
      batch_size: images per batch.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      num_frames: frames taken of each video, as for `caption`; 0: `images` are
        images.
      on_error: what to do about an image that cannot be read: "raise", or
        "skip", which warns and leaves its vector out.
      progress: whether to show a progress bar.

    Returns:
      Unit vectors, so that dot products with those of `embed_texts` are
      cosines. With `on_error="skip"`, a pair: the vectors of the k images that
      could be read, and the numbers of these images, from 0 on.

    Raises:
      ValueError: the model has no such space, there are no images, or one
        cannot be read.
    """
    self._require("vision_proj", "embed images in a space shared with texts")
    read = images_lib.ImageReader(self.image, urls, num_frames, allow_private)
    size = self._batch_size(batch_size, num_frames)
    batches = images_lib.batches(
      images, read, size, self.mesh, on_error, progress
    )
    vectors, kept = self.matcher.embed_images(batches)
    return vectors if on_error == "raise" else (vectors, kept)

  def embed_texts(
    self, texts: str | Sequence[str], *, batch_size: int = 64
  ) -> Float[np.ndarray, "M C"]:
    """Embeds texts in the space that they share with images.

    Args:
      texts: as for `match`.
      batch_size: texts per batch.

    Returns:
      Unit vectors, so that dot products with those of `embed_images` are
      cosines.

    Raises:
      ValueError: the model has no such space, there are no texts, or one has
        no words.
    """
    self._require("text_proj", "embed texts in a space shared with images")
    return self.matcher.embed_texts(texts, batch_size)

  def explain(
    self,
    image: Image,
    text: str,
    *,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    urls: bool = False,
    allow_private: bool = False,
  ) -> explanation.Explanation:
    """Says on which patches of an image its match with each word rests.

    By Grad-CAM of the ITM logit; see `inference.saliency`. What the words of a
    generated caption rest on is told by `caption(..., explain=True)`.

    Args:
      image: one, as for `caption`.
      text: one, read as for `match`.
      layer: of the text encoder, from 0 on, whose attention to the image
        explains; by default the middle one, and the last one for the whole
        text. In the last one, words have no maps: they are zero.
      heads: whose maps are averaged; all by default.
      urls: whether the image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.

    Raises:
      ValueError: the model has no ITM head, there is no such layer or head, the
        text has no words, or the image cannot be read.
    """
    self._require("itm_head", "explain a match")
    chosen = saliency.where(self.card.config.med, layer, heads)
    tokens = self.matcher.tokens(text)
    if len(tokens.input_ids) != 1:
      raise ValueError(f"explain: expected one text, found {text!r:.200}")
    read = images_lib.ImageReader(self.image, urls, allow_private=allow_private)
    try:
      pixels = read(image)
    except transforms.BadSample as error:
      why = images_lib.where(read.what, 0, image, error)
      raise ValueError(why) from error
    return self._explainer.match(pixels, tokens, chosen)

  def features(
    self,
    images: Images | None = None,
    texts: str | Sequence[str] | None = None,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
  ) -> matching.HiddenStates:
    """Returns hidden states: the original's feature extractor.

    Of images if only those are given, of texts if only those are given; with
    both, of text i fused with image i by cross-attention. The first token
    stands for the whole input.

    The three kinds live in different spaces: a cosine between them means
    nothing. `embed_images` and `embed_texts` share one space.

    Args:
      images: as for `caption`.
      texts: as for `match`.
      batch_size: images, texts or pairs per batch.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.

    Raises:
      ValueError: neither is given, the model lacks the encoder, there are not
        as many images as texts, or an input cannot be read.
    """
    if images is None and texts is None:
      raise ValueError("features: give images=, texts= or both")
    if texts is not None:
      self._require("text_encoder", "encode texts")
    tokens = None if texts is None else self.matcher.tokens(texts)
    if images is None:
      return self.matcher.features(None, tokens, self._batch_size(batch_size))
    if tokens is not None:
      images = matching.paired(images, tokens)
    read = images_lib.ImageReader(self.image, urls, allow_private=allow_private)
    size = self._batch_size(batch_size)
    batches = images_lib.batches(images, read, size, self.mesh)
    return self.matcher.features(batches, tokens, size)

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
    prepare = jax.jit(functools.partial(generation.prepare, self.module))
    decoder = {"text_decoder": self.params["text_decoder"]}
    return {**self.params, **prepare(decoder)}

  @functools.cached_property
  def image(self) -> transforms.EvalImage:
    """Resizes a decoded image to the model's image size."""
    return transforms.EvalImage(self.card.config.vit.image_size)

  def lacks(self, ability: str) -> str | None:
    """Says why the model cannot do something; None if it can.

    Args:
      ability: "caption", "answer", "compare", "match" or "embed".
    """
    checks = {
      "caption": self.captioner,
      "answer": self.answerer,
      "compare": self.comparer,
      "match": functools.partial(self._require, "itm_head", "match texts"),
      "embed": functools.partial(self._require, "vision_proj", "search images"),
    }
    try:
      checks[ability]()
    except ValueError as error:
      return str(error)
    return None

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
      f"{_ABILITIES[self.card.family]}. {advice}"
    )
