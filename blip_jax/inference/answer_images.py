"""Answer questions about images or videos (job `answer`); see `line_job`."""

import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from blip_jax.data import (
  datasets,
  question_examples,
  question_groups,
  questions,
  sources,
)
from blip_jax.inference import answering, line_job, loading
from blip_jax.runtime import config as run_config
from blip_jax.runtime import devices, files, lock, sharding
from blip_jax.runtime.config import Config

# Of a config, what changes the lines.
_SETTINGS = (
  "tokenizer",
  "question",
  "num_answers",
  "k_test",
  "rank_score",
  "abstain_below",
  "num_frames",
  "images",
  "image_root",
)


def answer_images(config: Config, workdir: str) -> dict[str, int]:
  """Answers every question of `config.images` into `config.out`.

  A line is {row, id, question_id, question, image_id?, image?, answer, prob,
  log_prob, score, abstains?, others?}, or has an `error` instead of the answer
  if the image cannot be read; rows are in order. See
  `caption_images.caption_images` about locks, processes and resuming.

  Args:
    config: from `defaults.answer_images`.
    workdir: where `answers.jsonl` goes by default.

  Returns:
    The number of questions, and of those whose image could not be read.

  Raises:
    ValueError: there are no questions, none can be answered, the model does
      not answer questions, an option is out of range, another job writes into
      `config.out`, the job was started with other settings, or `config.out`
      has something else than the answers to these questions; says which.
  """
  run_config.at_least(0, config, "batch_size", "num_frames")
  run_config.at_least(1, config, "num_threads", "num_answers", "k_test")
  source = _source(config)
  out = files.as_path(config.out or os.path.join(workdir, "answers.jsonl"))
  with lock.hold(lock.path_for(out)) as held:
    return _job(config, source, out).run(held)


def _job(
  config: Config, source: Any, out: pathlib.PurePath
) -> line_job.LineJob:
  mesh = sharding.make_mesh(config.mesh)
  dtype = config.dtype or loading.quick_dtype()
  model = loading.load(
    config.model,
    dtype=dtype,
    mesh=mesh,
    tokenizer=config.tokenizer or None,
  )
  listed = None
  if config.answer_list:
    listed = questions.read_answer_list(config.answer_list)
  answerer = model.answerer(
    listed,
    num_answers=config.num_answers,
    k_test=config.k_test,
    rank_score=config.rank_score,
    abstain_below=config.abstain_below,
  )
  assert model.tokenizer is not None, config.model

  def respond(arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    ids, mask = arrays["question_ids"], arrays["question_mask"]
    length = ids.shape[-1]  # groups have several questions about an image
    question = ids.reshape(-1, length), mask.reshape(-1, length)
    return [_as_json(one) for one in answerer(arrays["image"], *question)]

  example = question_examples.QuestionExample(
    model.tokenizer,
    model.image,
    answering.MAX_WORDS,
    min(answering.MAX_TOKENS, model.card.config.med.max_positions),
    num_frames=config.num_frames,
  )
  return line_job.LineJob(
    source=source,
    name=config.images,
    out=out,
    settings={
      **line_job.model_settings(model, dtype),
      **{key: config[key] for key in _SETTINGS},
      "answers": listed,
      "num_images": len(source),
    },
    work=functools.partial(_work, config, example, mesh),
    respond=respond,
    mesh=mesh,
    num_threads=config.num_threads,
  )


def _work(
  config: Config,
  example: question_examples.QuestionExample,
  mesh: jax.sharding.Mesh,
  left: sources.Rows,
) -> line_job.Work:
  """How rows are read: questions about one image together, unless each image
  has the same one."""
  size = functools.partial(devices.images_per_batch, mesh.devices)
  num_images = config.batch_size or size(config.num_frames)
  if config.question:
    return line_job.Work(left, example, num_images)
  num_questions = config.batch_size or size()
  groups = question_groups.Groups(
    left,
    example.max_words,
    config.num_frames,
    max(num_questions // sharding.num_data_shards(mesh), 1),
  )
  return line_job.Work(
    groups,
    question_examples.GroupExample(example, groups.size),
    min(num_images, max(num_questions // groups.size, 1)),
  )


def _source(config: Config) -> Any:
  if not config.images:
    raise ValueError(
      "config.images: no questions; for example --config.images=questions.csv, "
      'or --config.images=FOLDER --config.question="what is this?"'
    )
  if not config.question:
    return datasets.open_questions(config.images, config.image_root)
  try:
    answering.clean(config.question)
  except ValueError as error:
    raise ValueError(f"config.question: {error}") from error
  open_all = datasets.open_videos if config.num_frames else datasets.open_images
  images = open_all(config.images, config.image_root)
  return _Asked(images, config.question)


class _Asked(sources.Source):
  """Images with the same question about each."""

  def __init__(self, images: Any, question: str):
    self._images, self._question = images, question
    self.paths = getattr(images, "paths", ())

  def __len__(self) -> int:
    return len(self._images)

  def _id(self, index: int) -> str:
    return sources.row_id(self._images, index) or ""

  def _record(self, index: int, id: str) -> sources.Record:
    return {**self._images[index], "question": self._question}


def _as_json(answer: answering.Answer) -> dict[str, Any]:
  line: dict[str, Any] = {
    "answer": answer.text,
    "prob": round(answer.prob, 4),
    "log_prob": round(answer.log_prob, 4),
    "score": round(answer.score, 4),
  }
  if answer.abstains:
    line["abstains"] = True
  if answer.others:
    line["others"] = [_as_json(other) for other in answer.others]
  return line
