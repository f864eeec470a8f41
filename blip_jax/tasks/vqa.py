"""VQA as answer generation (paper, section 5.3).

An encoder fuses question and image; a decoder that attends to its output
generates the answer.

Dimensions: B questions, I images or videos (B is a multiple of I, see
`models/med.py`), F frames, H and W image height and width, A answers of a
question, Lq and La lengths of questions and answers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from blip_jax import defaults as default_keys
from blip_jax.data import examples, question_examples, tokenizer
from blip_jax.models import blip, families
from blip_jax.runtime import config as run_config
from blip_jax.runtime.config import Config
from blip_jax.tasks import answers, base, losses

FAMILY = "vqa"
INFERENCE = ("rank", "generate")


def defaults() -> Config:
  """Defaults of VQA (section 5.3): VQA v2, from a pre-trained model."""
  config = default_keys.fine_tuning("vqa")
  config.num_epochs = 10.0
  config.optim.lr = 2e-5
  config.model.drop_path = 0.1
  config.vqa = dict(
    label_smoothing=0.1,
    max_answers=10,  # of a question; those of the least weight are dropped
    max_answer_length=10,  # tokens, [DEC] and [SEP] included
    inference="rank",  # the answers of a list, or generate: any text
    # The list: JSON, or a text file with an answer on each line.
    answer_list="",
    k_test=128,  # answers, by their first tokens, that are scored in full
    rank_score="blip",  # blip | albef; see `tasks.answers.Ranked.scores`
    # Whether generated answers attend to the padding of questions, as in the
    # original; neither training nor ranking does.
    legacy_mask=False,
  )
  # For evaluation; fields of `models.decoding.Decoding`.
  config.generation = default_keys.generation("vqa")
  config.data.max_words = 50
  config.data.max_length = 35
  config.evals.batch_size = 32
  config.evals.best = ("val/accuracy",)
  config.evals.val = default_keys.question_split("")
  config.evals.test = default_keys.question_split("")
  return config


def continued() -> Config:
  """Defaults of data sets that start from a model for VQA v2.

  The paper has no such experiment: the rates are ours.
  """
  config = defaults()
  config.batch_size = 64
  config.num_epochs = 7.0
  config.init.weights = "model_base_vqa_capfilt_large"
  config.optim.lr = 1e-5
  config.model.variant = "base"
  config.model.image_size = 480
  config.data.num_workers = 8
  config.vqa.inference = "generate"
  return config


def check(config: Config) -> None:
  """Checks the keys of `config.vqa`; see `base.TaskFile`."""
  run_config.at_least(1, config, "vqa.max_answers", "vqa.k_test")
  run_config.at_least(3, config, "vqa.max_answer_length")
  c, key = config.vqa, "config.vqa"
  run_config.one_of(f"{key}.inference", c.inference, INFERENCE)
  run_config.one_of(f"{key}.rank_score", c.rank_score, answers.SCORES)
  if c.inference == "rank" and run_config.splits(config) and not c.answer_list:
    raise ValueError(
      f"{key}.answer_list: there is nothing to rank; name a list of answers, "
      f"or set {key}.inference=generate"
    )


def example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
) -> question_examples.AnsweredExample:
  """Images with a question and its answers."""
  return question_examples.AnsweredExample(
    question_examples.QuestionExample(
      tokenizer, image, config.data.max_words, config.data.max_length
    ),
    config.vqa.max_answers,
    config.vqa.max_answer_length,
  )


def make(
  config: Config, model: blip.Blip, *, prompt_length: int, num_shards: int
) -> "Vqa":
  """The task of a config; see `base.TaskFile`."""
  return Vqa(model, config.vqa.label_smoothing)


def read(
  model: blip.Blip,
  params: base.Params,
  image: UInt8[Array, "I *F H W 3"],
  question_ids: Int[Array, "B Lq"],
  question_mask: Int[Array, "B Lq"],
  legacy_cls: bool = False,
) -> Float[Array, "B Lq D"]:
  """Hidden states of questions that have seen their images.

  An image is encoded, and its keys and values are computed, once for all
  questions about it.

  Args:
    legacy_cls: see `blip.Blip.fuse`.
  """
  apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
  image_embeds = apply(base.normalise(image), method="encode_image")
  image_kv = apply(image_embeds, method="image_kv")
  question = question_ids, question_mask, image_kv
  states: Any = apply(*question, legacy_cls=legacy_cls, method="fuse")
  return states


@dataclasses.dataclass(frozen=True)
class Vqa(base.WithoutMomentum):
  """The VQA task.

  Attributes:
    model: a module with an image tower and both text towers, not tied.
    label_smoothing: of LM.
  """

  model: blip.Blip
  label_smoothing: float = 0.1

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return families.init("vqa", self.model.config, rng)

  def loss(
    self,
    params: base.Params,
    momentum: None,
    batch: base.Batch,
    *,
    rng: PRNGKeyArray,
    step: Int[Array, ""],
    train: bool = True,
    num_terms: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, ""], tuple[None, base.Metrics]]:
    """The weighted sum of the answers' losses, divided by B.

    The batch contains image, uint8 [B, H, W, 3], or float32 if already
    normalised; question_ids and question_mask, int32 [B, Lq]; answer_ids and
    answer_mask, int32 [B, A, La]; answer_weight, float32 [B, A], 0 for padding.
    """
    run = base.passes(self.model, rng, train)
    question_mask = batch["question_mask"]
    image_embeds = run(params, "encode_image", base.pixels(batch))
    image_kv = self._key_value(params, image_embeds, "image_kv")
    question = run(
      params, "fuse", batch["question_ids"], question_mask, image_kv
    )
    # Keys and values of a question are computed once for all of its answers.
    question_kv = self._key_value(params, question, "decoder_kv")
    ids, mask = (
      x.reshape(-1, x.shape[-1])
      for x in (batch["answer_ids"], batch["answer_mask"])
    )
    predicted = run(
      params, "decode", ids, mask, question_kv, encoder_mask=question_mask
    )
    weights = batch["answer_weight"].reshape(-1, 1) * mask[:, 1:]
    if num_terms is None:
      num_terms = self.num_terms(batch)
    loss, nll = losses.weighted_lm_loss(
      predicted,
      jnp.where(mask == 1, ids, losses.IGNORE),
      weights / num_terms,
      self.label_smoothing,
    )
    return loss, (None, {"loss": loss, "loss_lm": loss, "nll_lm": nll})

  def num_terms(self, batch: base.Batch) -> Int[Array, ""]:
    """The number of questions; see `base.SummedTask`."""
    return jnp.int32(len(batch["question_ids"]))

  def _key_value(self, params: base.Params, states: Any, method: str) -> Any:
    return self.model.apply({"params": params}, states, method=method)

  @property
  def predict_fns(self) -> dict[str, Callable]:
    bind = lambda function: functools.partial(function, self.model)
    return {
      "read": bind(read),
      "rank": bind(answers.rank),
      "generate": bind(answers.generate),
    }
