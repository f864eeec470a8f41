"""The case of a pre-training checkpoint that is loaded as other families."""

import ast
import dataclasses
import functools
import re

import numpy as np

from blip_jax.convert import adapt, opening, weights
from blip_jax.models import families
from blip_jax.tasks import vqa as vqa_lib
from tests.parity import generated, models, replay
from tests.parity.goldens import Golden

DEEP_CONFIG = "configs/med_config_nlvr_deep.json"


def loading(golden: Golden) -> None:
  trained, *deep = golden.checkpoints
  image, texts = golden.image("image"), golden.fact("captions")
  pairs = image[: len(texts)]
  load = functools.partial(_load, golden, trained)

  opened = load("decoder", "caption")
  prompt = opened.checkpoint.card.prompt
  prompted = [prompt + text for text in texts]
  loss = models.caption_loss(
    opened, pairs, prompted, len(opened.checkpoint.tokenizer.prompt_ids(prompt))
  )
  golden.compare({"decoder.loss": loss}, replay.MODEL)
  states = functools.partial(models.encode_image, opened.model, opened.params)
  generated.compare_generated(golden, opened, states, image, {"": prompt})

  opened = load("itm", "itm")
  ids, mask = opened.checkpoint.tokenizer.encode(texts, models.TEXT_LENGTH)
  outputs = models.match(opened.model, opened.params, pairs, ids, mask)
  golden.compare(
    {f"itm.{name}": outputs[name] for name in ("itm", "itc")}, replay.MODEL
  )

  _compare_loaded_vqa(golden, load("vqa", "vqa"), image)
  load("retrieval", "retrieval")

  opened = load("nlvr", "nlvr")
  predict = replay.jit(
    replay.bound(opened.model, opened.params), static_argnums=0
  )
  golden.compare(
    {"nlvr.prediction": predict(None, image, ids, mask)}, replay.MODEL
  )
  for file in deep:
    _load(golden, file, "nlvr_deep", "nlvr", DEEP_CONFIG)


def _compare_loaded_vqa(golden: Golden, opened: replay.Opened, image) -> None:
  """The question is in the manifest's description of the loss."""
  pattern = r"question '(.+?)' twice, answers (\[.+?\]), n=(\[.+?\])"
  if words := re.search(pattern, golden.meaning("vqa.loss")):
    answers, numbers = map(ast.literal_eval, words.groups()[1:])
    encode = lambda texts: opened.checkpoint.tokenizer.encode(
      texts, models.TEXT_LENGTH
    )
    question = encode([words[1]] * len(numbers))
    weight = np.ones(len(answers), np.float32)
    batch = models.answers(question, encode(answers), numbers, weight)
    batch["image"] = image[: len(numbers)]
    loss = replay.loss_fn(vqa_lib.Vqa(opened.model))
    golden.compare(
      {"vqa.loss": replay.jit(loss)(opened.params, batch)[0]}, replay.MODEL
    )


def _load(
  golden: Golden,
  file: str,
  name: str,
  family: str,
  model_config: str | None = None,
) -> replay.Opened:
  """Compares a checkpoint that is loaded as another family.

  Parameters that the original initialises at random are the goldens'
  `<name>.init.*`.
  """
  checkpoint = golden.open(
    file,
    model_config,
    task=family,
    image_size=golden.config["image_size"],
    keep_momentum=family in families.WITH_MOMENTUM,
  )
  _compare_names(golden, file, name, checkpoint)
  given = {
    match[1]: golden.input(match[0])
    for match in golden.matches(rf"{name}\.init\.(.+)")
  }
  given = weights.from_external(given, "original", weights.Report())
  leaves = {**checkpoint.leaves, **given}
  state = replay.state(leaves, family)
  loaded = {f"{name}.loaded.{key}": x for key, x in state.items()}
  golden.compare(loaded, replay.MODULE, f"{name}.loaded.*")
  for suffix in ("", "_m"):
    key = f"visual_encoder{suffix}.pos_embed"
    if key in state:
      actual = {f"{name}.pos_embed{suffix}": state[key]}
      golden.compare(actual, replay.MODULE)
  layer = "text_encoder.encoder.layer.{}.crossattention.{}"
  layers = {
    match[0]: state[layer.format(match[1], match[2])]
    for match in golden.matches(rf"{name}\.layer(\d+)\.(.+)")
  }
  golden.compare(layers, replay.EXACT, f"{name}.layer*")
  if f"{name}.loaded_norm" in golden:
    names, size = golden.fact(f"{name}.loaded_names"), lambda x: np.sqrt(x.size)
    golden.compare_fingerprints(
      f"{name}.loaded", names, state, replay.ROUNDING, size
    )
  return replay.Opened.of(dataclasses.replace(checkpoint, leaves=leaves))


def _compare_names(
  golden: Golden, file: str, name: str, checkpoint: opening.Checkpoint
) -> None:
  """Compares the original's missing and unexpected keys with the report."""
  rules = (adapt.FRESH.format("pretrain"), adapt.FRESH.format("feature"))
  made = [
    path
    for rule in (*rules, adapt.EMPTY_QUEUE)
    for path in checkpoint.report.changed.get(rule, ())
  ]
  state = set(replay.state(checkpoint.leaves, checkpoint.card.family))
  missing = set(
    weights.to_external({p: checkpoint.leaves[p] for p in made}, "original")
  )
  # The original names it differently, and its queues have another size.
  if "queue_ptr" in missing:
    missing = missing - {"queue_ptr"} | {"ptr_queue"}
    missing |= {"image_queue", "text_queue"}
  golden.compare_fact(f"{name}.missing", missing)
  saved = set(golden.tensors(file))
  expected = set(golden.fact(f"{name}.unexpected"))
  # The original copies weights under names that it then does not expect.
  golden.compare_fact(f"{name}.unexpected", saved - state | expected - saved)
