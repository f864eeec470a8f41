"""Answers to the questions of a split: saved for a server, and scored."""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.data import (
  question_examples,
  question_groups,
  questions,
  sources,
)
from blip_jax.evaluators import base, held_out_loss, result_file
from blip_jax.evaluators.scores import vqa_accuracy, vqa_files
from blip_jax.models import decoding
from blip_jax.runtime import config as run_config
from blip_jax.runtime import files, sharding, train_state
from blip_jax.runtime.config import Config
from blip_jax.tasks import answers
from blip_jax.tasks import base as tasks

log = logging.getLogger(__name__)


def build(context: base.Context) -> list[base.Evaluator]:
  """Returns evaluators of the held-out loss and of the answers.

  Raises:
    ValueError: the format of the results is unknown, or the list of answers
      cannot be used.
  """
  settings, config = context.settings, context.config
  key = f"config.evals.{context.name}.format"
  run_config.one_of(key, settings.format, vqa_files.FORMATS)
  example: Any = context.example
  example = dataclasses.replace(
    example,
    question=dataclasses.replace(
      example.question, num_frames=settings.num_frames
    ),
  )
  split = base.Split(
    example.open_source(settings.source, settings.image_root),
    example,
    config.evals.batch_size,
    context.mesh,
    context.bad_samples,
  )
  log.info("Split %s: %s questions", context.name, f"{len(split.source):,}")
  if settings.source in config.data.train:
    log.warning(
      "Split %s: the model is trained on these questions; its accuracy here "
      "says little about others",
      context.name,
    )
  answers = Answers(
    split,
    context.task,
    config,
    context.file(f"{context.name}_answers.json"),
    settings.format,
  )
  # No model is trained on videos, so that their loss says nothing.
  if settings.num_frames or not _has_answers(split.source):
    return [answers]
  return [held_out_loss.HeldOutLoss(split, context.task), answers]


def _has_answers(source: Any) -> bool:
  """Whether the first usable row has answers; those of test splits are
  secret."""
  for row in range(len(source)):
    try:
      return "answers" in source[row]
    except sources.BadRow:
      continue
  return False


class _Best(NamedTuple):
  """The best answer to each question.

  Attributes:
    answer: ids of its tokens, or its number in the list.
    prob: its probability; of a list, among the answers that are scored.
  """

  answer: Any
  prob: Any


class Answers:
  """Answers every question of a split.

  `accuracy` is VQA's, in percent, and where a question has one annotator the
  share of answers that are right; `accuracy/...` is that of a type of answers
  or, if answers have no type, of questions. `calibration_error` compares the
  probabilities of answers with their accuracy, in percent. Questions about one
  image or video are answered together.

  Args:
    split: questions; those without answers are not scored.
    task: with the predict functions `read`, `rank` and `generate`.
    config: of the run; `config.vqa` says how to answer.
    results: JSON file for the answers.
    format: of that file, one of `vqa_files.FORMATS`.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    config: Config,
    results: result_file.ResultFile,
    format: str,
  ):
    self._split = split
    self._results = results
    self._format = format
    example = split.example.question
    self._tokenizer = example.tokenizer
    self._list: list[str] = []
    answer = _generator(task, config)
    if config.vqa.inference == "rank":
      self._list, ids, lengths = question_examples.answer_tokens(
        example.tokenizer,
        questions.read_answer_list(config.vqa.answer_list),
        task.model.config.med.max_positions,
      )
      answer = _ranker(task, config, ids, lengths)

    @jax.jit
    def program(params, batch):
      """Best answers [I, m] to m questions about each of I images."""
      ids = batch["question_ids"]
      ids, mask = (
        x.reshape(-1, ids.shape[-1]) for x in (ids, batch["question_mask"])
      )
      states = task.predict_fns["read"](params, batch["image"], ids, mask)
      best = answer(params, states, mask)
      grouped = lambda x: x.reshape(len(batch["image"]), -1, *x.shape[1:])
      return jax.tree.map(grouped, best)

    self._program = program

  @functools.cached_property
  def _grouped(self) -> base.Split:
    """The split with a row for several questions about one image."""
    split, question = self._split, self._split.example.question
    groups = question_groups.Groups(
      split.source,
      question.max_words,
      question.num_frames,
      split.batch_size // sharding.num_data_shards(split.mesh),
    )
    return dataclasses.replace(
      split,
      source=groups,
      example=question_examples.GroupExample(question, groups.size),
      batch_size=max(split.batch_size // groups.size, 1),
    )

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    grouped = self._grouped
    best, valid = grouped.map(lambda batch: self._program(state.params, batch))
    best = jax.tree.map(grouped.source.by_row, best)
    valid = grouped.source.by_row(
      np.broadcast_to(valid[:, None], grouped.source.rows.shape)
    )
    answers = (
      [self._list[n] for n in best.answer]
      if self._list
      else self._tokenizer.decode(best.answer)
    )
    rows = self._split.distinct(valid, "question_id")
    answered = {
      id: (record, answers[row]) for id, (row, record) in rows.items()
    }
    probs = np.array([float(best.prob[row]) for row, _ in rows.values()])
    if jax.process_index() == 0:
      content = vqa_files.formatted([*answered.values()], self._format)
      with self._results.writing() as path:
        files.write_json(path, content)
    yield from self._scores(answered, probs)

  def _scores(
    self, answered: dict[Any, tuple[sources.Record, str]], probs: np.ndarray
  ) -> Iterator[tuple[str, float]]:
    truth = {
      id: vqa_accuracy.Question(
        record["answers"],
        record.get("answer_type", ""),
        questions.question_type(record),
      )
      for id, (record, _) in answered.items()
      if "answers" in record
    }
    if not truth:
      return
    texts = {id: answer for id, (_, answer) in answered.items()}
    accuracy = vqa_accuracy.score(texts, truth)
    yield "accuracy", accuracy.overall
    by_type = accuracy.per_answer_type or accuracy.per_question_type
    for name, value in sorted(by_type.items()):
      yield f"accuracy/{name}", value
    scored = np.array([id in truth for id in answered])
    correct = [
      vqa_accuracy.of_answer(texts[id], truth[id].answers)
      for id in answered
      if id in truth
    ]
    error = vqa_accuracy.calibration_error(probs[scored], np.array(correct))
    yield "calibration_error", 100 * error


def _ranker(task: tasks.Task, config: Config, ids, lengths):
  """Returns (params, states, mask) -> the best answers of a list."""
  c = config.vqa
  k = min(c.k_test, len(ids))
  listed = jnp.asarray(ids), jnp.asarray(lengths)

  def answer(params, states, mask) -> _Best:
    ranked = task.predict_fns["rank"](params, states, mask, *listed, k)
    scores = ranked.scores(c.rank_score, c.label_smoothing)
    best = jnp.argmax(scores, axis=1)[:, None]
    pick = lambda x: jnp.take_along_axis(x, best, axis=1)[:, 0]
    return _Best(pick(ranked.index), pick(ranked.probs))

  return answer


def _generator(task: tasks.Task, config: Config):
  """Returns (params, states, mask) -> generated answers."""
  max_positions = task.model.config.med.max_positions
  settings = answers.settings(config.generation.to_dict(), max_positions)
  num_positions = decoding.num_positions_for(settings.max_length, max_positions)

  def answer(params, states, mask) -> _Best:
    generated = task.predict_fns["generate"](
      params, states, mask, settings, num_positions, config.vqa.legacy_mask
    )
    log_prob = generated.token_log_probs[:, 0].sum(axis=-1)
    return _Best(generated.ids[:, 0], jnp.exp(log_prob))

  return answer
