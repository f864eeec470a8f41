"""Cases of models with momentum encoders, which take training steps."""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blip_jax.tasks import align, base
from blip_jax.tasks import momentum as momentum_lib
from blip_jax.tasks import pretrain as pretrain_lib
from blip_jax.tasks import retrieval as retrieval_lib
from tests.parity import replay, verdicts
from tests.parity.goldens import Golden

# A task has a ramp for `alpha`; this many steps reach any value of it.
_ALPHA_STEPS = 10**6
_HEADS = ("vision_proj", "text_proj", "itm_head", "text_decoder/lm_head")


class _Start(NamedTuple):
  """The initial state of a case; `inputs(step)` are arguments of `_step`."""

  opened: replay.Opened
  task: align.Align
  momentum: momentum_lib.Momentum
  inputs: Callable


def blip_pretrain(golden: Golden) -> None:
  start = _take_steps(golden, pretrain_lib.Pretrain)
  opened, momentum, losses = start.opened, start.momentum, []
  for step in range(_number_of_steps(golden)):
    (_, (momentum, metrics, _)), _ = _step(
      start.task, opened.params, momentum, *start.inputs(step)
    )
    losses.append(_losses(metrics))
  golden.compare(
    {"losses_no_optimizer": np.array(losses)}, replay.LOSS, scale=np.abs
  )
  for match in golden.matches(r"(clamp(.+))\.losses"):
    params = {**opened.params, "temp": jnp.float32(match[2])}
    params = start.task.clamp(params)
    (_, (_, metrics, _)), _ = _step(
      start.task, params, start.momentum, *start.inputs(0)
    )
    golden.compare({match[0]: _losses(metrics)}, replay.MODEL, scale=np.abs)
    golden.compare({f"{match[1]}.temp": metrics["temp"]}, replay.ROUNDING)
  groups = collections.defaultdict(set)
  for name, other in opened.ties.items():
    groups[other] |= {other, name}
  golden.compare_fact("tied", {frozenset(group) for group in groups.values()})


def pretrain_2rank(golden: Golden) -> None:
  _take_steps(golden, pretrain_lib.Pretrain)


def blip_retrieval(golden: Golden) -> None:
  _take_steps(golden, retrieval_lib.Retrieval)


def _start(golden: Golden, kind: type[align.Align]) -> _Start:
  """Each process of the original becomes a group of examples."""
  opened = replay.open_case(golden)
  ranks, fields = _ranks(golden, 0), {}
  weights_name = f"{ranks[0]}.weights_t2i"
  if kind is retrieval_lib.Retrieval and weights_name in golden:
    rows, columns = golden.shape(weights_name)
    fields["negative_groups"] = len(ranks) * rows // columns
  task = kind(
    opened.model,
    queue_size=golden.config["queue_size"],
    ema_decay=golden.config["momentum"],
    alpha=1.0,
    alpha_ramp_steps=_ALPHA_STEPS,
    groups=len(ranks),
    num_shards=len(ranks),
    **fields,
  )
  momentum = replay.tree(opened.checkpoint.leaves, "momentum")
  inputs = functools.cache(functools.partial(_inputs, golden))
  return _Start(opened, task, momentum_lib.Momentum(**momentum), inputs)


def _take_steps(golden: Golden, kind: type[align.Align]) -> _Start:
  """Compares losses, gradients, negatives, momentum state, AdamW steps."""
  start = _start(golden, kind)
  opened, momentum = start.opened, start.momentum
  params, family = opened.params, opened.family
  compare_state = functools.partial(_compare_state, golden, opened)
  compare_state("before", params, momentum)
  # One flat vector compiles faster.
  tx = optax.flatten(_optimizer(golden))
  opt_state, update = replay.jit(tx.init)(params), replay.jit(tx.update)
  apply_updates, losses = replay.jit(optax.apply_updates), []
  for step in range(_number_of_steps(golden)):
    params = start.task.clamp(params)
    (_, (momentum, metrics, seen)), grads = _step(
      start.task, params, momentum, *start.inputs(step)
    )
    losses.append(_losses(metrics))
    _compare_step(golden, step, seen, replay.state_of(family, {}, momentum))
    if step == 0:
      compare_state("after_forward0", params, momentum)
      replay.compare_gradients(golden, replay.state_of(family, grads))
    updates, opt_state = update(grads, opt_state, params)
    params = apply_updates(params, updates)
    golden.compare({f"step{step}.temp": params["temp"]}, replay.MODEL)
    compare_state(f"after_step{step}", params, momentum, step + 1)
  compare_state("after_last", params, momentum, step + 1)
  _compare_losses(golden, np.array(losses))
  frozen = {
    name
    for name in replay.state_of(family, {}, momentum)
    if "_m." in name and not name.endswith("position_ids")
  }
  golden.compare_fact("grad_frozen", frozen)
  return start


@functools.partial(replay.jit, static_argnums=0)
def _step(task: align.Align, params, momentum, batch, sampled, alpha):
  """Returns ((loss, (momentum, metrics, recorded outputs)), gradients)."""
  weights_of = []

  def sample(key, weights):
    # The original samples each text's image first, then each image's text.
    weights_of.append(weights)
    return sampled[len(weights_of) - 1].reshape(weights.shape[:2])

  injected = dataclasses.replace(task, sample=sample)
  number = jnp.int32(jnp.round(alpha * _ALPHA_STEPS))

  def loss(params):
    with replay.recorded(*_HEADS) as seen:
      value, (after, metrics) = injected.loss(
        params, momentum, batch, rng=jax.random.key(0), step=number
      )
    return value, (after, metrics, {**seen, "weights": weights_of})

  return jax.value_and_grad(loss, has_aux=True)(params)


def _ranks(golden: Golden, step: int) -> list[str]:
  """Prefixes of the names of a step's arrays, one for each process."""
  ranks = {int(m[1]) for m in golden.matches(rf"step{step}\.rank(\d+)\.image")}
  return [f"step{step}.rank{r}" for r in sorted(ranks)] or [f"step{step}"]


def _number_of_steps(golden: Golden) -> int:
  images = golden.matches(r"step(\d+)(\.rank\d+)?\.image")
  return 1 + max(int(match[1]) for match in images)


def _inputs(golden: Golden, step: int) -> tuple[dict, list, np.float32]:
  """Batch, sampled negatives and `alpha`."""
  ranks = _ranks(golden, step)
  rows = lambda name, read=golden.input: np.concatenate(
    [read(f"{rank}.{name}") for rank in ranks]
  )
  texts = []
  for rank in ranks:
    captions = golden.fact(f"{rank}.captions")
    texts.append(golden.tokens(f"{rank}.caption", captions, _length(golden)))
  ids, mask = map(np.concatenate, zip(*texts, strict=True))
  image = rows("image", golden.image)
  batch = {"image": image, "input_ids": ids, "attention_mask": mask}
  if f"{ranks[0]}.idx" in golden:
    batch["image_id"] = rows("idx")
  sampled = [rows("neg_image_idx"), rows("neg_text_idx")]
  if "alpha" not in golden:
    return batch, sampled, np.float32(_described(golden, "alpha"))
  alpha = golden.input("alpha")
  return batch, sampled, alpha[step] if alpha.ndim else alpha[()]


def _length(golden: Golden) -> int | None:
  """Length of texts: the case's, or that of a case with the same checkpoint."""
  others = [
    case["config"]["max_length"]
    for case in golden.folder.cases.values()
    if case.get("checkpoints") == golden.checkpoints
    and "max_length" in case.get("config", {})
  ]
  return golden.config.get("max_length", *others[:1])


def _described(golden: Golden, word: str) -> float:
  """Parses a number in the description of the case.

  Raises:
    ValueError: the description does not have it.
  """
  number = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
  match = re.search(rf"\b{word} {number}", golden.description)
  if match is None:
    raise ValueError(f"the description of the case has no {word}")
  return float(match[1])


def _optimizer(golden: Golden) -> optax.GradientTransformation:
  """AdamW, with PyTorch's defaults for what the manifest does not say."""
  settings = golden.optimizer
  b1, b2 = settings.get("betas", (0.9, 0.999))
  decay = settings["weight_decay"] if settings else _described(golden, "wd")
  eps = settings.get("eps", 1e-8)
  return optax.adamw(_lr(golden), b1, b2, eps, weight_decay=decay)


def _lr(golden: Golden) -> float:
  return (
    golden.optimizer["lr"] if golden.optimizer else _described(golden, "lr")
  )


def _losses(metrics: base.Metrics) -> np.ndarray:
  names = ("loss_itc", "loss_itm", "loss_lm")
  return np.array([metrics[name] for name in names if name in metrics])


def _compare_losses(golden: Golden, actual: np.ndarray) -> None:
  golden.compare({"losses": actual}, replay.MODEL, scale=np.abs)
  golden.compare({"losses0__f64": actual[0]}, replay.LOSS, scale=np.abs)
  errors = {}
  for step, mean in enumerate(actual):
    names = [f"{rank}.losses" for rank in _ranks(golden, step)]
    if names[0] in golden:
      # The loss of a process is that of its own examples.
      expected = np.mean([golden.input(name) for name in names], axis=0)
      errors[f"step{step}"] = verdicts.difference(mean, expected, np.abs)
  golden.add_check("losses, mean of the ranks", errors, replay.MODEL)


def _compare_step(
  golden: Golden, step: int, seen: dict, momentum: dict[str, np.ndarray]
) -> None:
  """Compares weights of the negatives, queues, and outputs of the heads."""
  ranks, weights = _ranks(golden, step), {}
  names = ("weights_t2i", "weights_i2t")
  for name, groups in zip(names, seen["weights"], strict=True):
    parts = np.split(np.concatenate(list(groups)), len(ranks))
    for rank, part in zip(ranks, parts, strict=True):
      weights[f"{rank}.{name}"] = part
  golden.compare(weights, replay.MODEL, f"step{step} weights of negatives")
  queues = {f"step{step}.{name}": x for name, x in momentum.items()}
  golden.compare(queues, replay.MODULE, f"step{step} queues")
  own, other = seen["itm_head"]
  actual = {"itm_head": jnp.concatenate([own[0::2], other, own[1::2]])}
  for name in ("vision_proj", "text_proj"):
    actual[name], actual[f"{name}_m"] = seen[name]
  if "text_decoder/lm_head" in seen:
    (predicted,) = seen["text_decoder/lm_head"]
    actual["lm_logits"] = predicted.logits()
  golden.compare(
    {f"step{step}.{name}": x for name, x in actual.items()}, replay.MODEL
  )


def _compare_state(
  golden: Golden,
  opened: replay.Opened,
  prefix: str,
  params: dict,
  momentum: momentum_lib.Momentum,
  steps: int = 0,
) -> None:
  """Compares all that the original saves, after `steps` optimiser steps."""
  if f"{prefix}_norm" not in golden:
    return
  actual = replay.state_of(opened.family, params, momentum)
  # Adam turns rounding errors into full steps where the true gradient is zero:
  # key biases, also those in momentum encoders and in fused qkv biases.
  zero = golden.fact("zero_grad_params", []) if steps else []
  ties = opened.ties
  noise_of = {
    name: ties.get(name, name).replace("_m.", ".") in zero
    or (steps > 0 and name.endswith("qkv.bias"))
    for name in actual
  }
  size = lambda x: np.sqrt(x.size)
  for noise, tolerance, label in (
    (False, replay.STEPPED if steps else replay.ROUNDING, ""),
    (True, 2 * _lr(golden) * steps, " (no gradient)"),
  ):
    keep = lambda name, noise=noise: noise_of.get(name, False) == noise
    names = [n if keep(n) else None for n in golden.fact(f"{prefix}_names")]
    if any(names):
      golden.compare_fingerprints(prefix, names, actual, tolerance, size, label)
    errors = {
      f"{prefix}.{name}": _mean_error(x, golden.input(f"{prefix}.{name}"))
      for name, x in actual.items()
      if keep(name) and f"{prefix}.{name}" in golden
    }
    golden.add_check(f"{prefix}.*{label}", errors, tolerance)


def _mean_error(actual: np.ndarray, expected: np.ndarray) -> verdicts.Error:
  """Root mean square, because Adam may flip the sign of single steps where a
  gradient is as small as rounding errors."""
  error = verdicts.difference(actual, expected, 1.0)
  if np.isinf(error.absolute):
    return error
  square = np.mean((actual.astype(np.float64) - expected) ** 2)
  return error._replace(relative=np.sqrt(square))
