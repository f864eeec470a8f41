"""Answers to questions about images and videos."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from blip_jax.inference import answering
from blip_jax.inference import images as images_lib
from blip_jax.inference import texts as texts_lib
from blip_jax.inference.abilities import base
from blip_jax.runtime import sharding


class AnswerMethods(base.Loaded):
  """How `Model` answers questions."""

  def answer(
    self,
    images: base.Images,
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
    images: base.Images,
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
