"""Cases of models with a momentum twin, which take steps."""

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

# `alpha` comes to a task as a ramp; so many steps that any is one of them.
_ALPHA_STEPS = 10**6
_HEADS = ("vision_proj", "text_proj", "itm_head", "text_decoder/lm_head")


class _Start(NamedTuple):
  """Where a case starts from; `inputs(step)` is what `_step` takes then."""

  opened: replay.Opened
  task: align.Align
  momentum: momentum_lib.Momentum
  inputs: Callable


def blip_pretrain(golden: Golden) -> None:
  start = _take_steps(golden, pretrain_lib.Pretrain)
  opened, momentum, found = start.opened, start.momentum, []
  for step in range(_number_of_steps(golden)):
    (_, (momentum, metrics, _)), _ = _step(
      start.task, opened.params, momentum, *start.inputs(step)
    )
    found.append(_losses(metrics))
  golden.compare(
    {"losses_no_optimizer": np.array(found)}, replay.MODEL, scale=np.abs
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
  for name, twin in opened.ties.items():
    groups[twin] |= {twin, name}
  golden.compare_fact("tied", {frozenset(group) for group in groups.values()})


def pretrain_2rank(golden: Golden) -> None:
  _take_steps(golden, pretrain_lib.Pretrain)


def blip_retrieval(golden: Golden) -> None:
  _take_steps(golden, retrieval_lib.Retrieval)


def _start(golden: Golden, kind: type[align.Align]) -> _Start:
  """As many processes as the case had are as many groups of rows here."""
  opened = replay.open_case(golden)
  ranks, fields = _ranks(golden, 0), {}
  drawn_from = f"{ranks[0]}.weights_t2i"
  if kind is retrieval_lib.Retrieval and drawn_from in golden:
    rows, columns = golden.shape(drawn_from)
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
  """Losses, gradients, negatives, twin, queues, and what AdamW makes of it."""
  start = _start(golden, kind)
  opened, momentum = start.opened, start.momentum
  params, family = opened.params, opened.family
  compare_state = functools.partial(_compare_state, golden, opened)
  compare_state("before", params, momentum)
  # One long vector compiles in a moment.
  tx = optax.flatten(_optimizer(golden))
  opt_state, update = tx.init(params), replay.jit(tx.update)
  found = []
  for step in range(_number_of_steps(golden)):
    params = start.task.clamp(params)
    (_, (momentum, metrics, seen)), grads = _step(
      start.task, params, momentum, *start.inputs(step)
    )
    found.append(_losses(metrics))
    _compare_step(golden, step, seen, replay.state_of(family, {}, momentum))
    if step == 0:
      compare_state("after_forward0", params, momentum)
      replay.compare_gradients(golden, replay.state_of(family, grads))
    updates, opt_state = update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    golden.compare({f"step{step}.temp": params["temp"]}, replay.MODEL)
    compare_state(f"after_step{step}", params, momentum, step + 1)
  compare_state("after_last", params, momentum, step + 1)
  _compare_losses(golden, np.array(found))
  twin = {
    name
    for name in replay.state_of(family, {}, momentum)
    if "_m." in name and not name.endswith("position_ids")
  }
  golden.compare_fact("grad_frozen", twin)
  return start


@functools.partial(replay.jit, static_argnums=0)
def _step(task: align.Align, params, momentum, batch, drawn, alpha):
  """((loss, (momentum, metrics, what was replay.recorded)), gradients)."""
  weigh = []

  def draw(key, weights):
    # The original draws each text's image first, then each image's text.
    weigh.append(weights)
    return drawn[len(weigh) - 1].reshape(weights.shape[:2])

  injected = dataclasses.replace(task, sample=draw)
  number = jnp.int32(jnp.round(alpha * _ALPHA_STEPS))

  def loss(params):
    with replay.recorded(*_HEADS) as seen:
      value, (after, metrics) = injected.loss(
        params, momentum, batch, rng=jax.random.key(0), step=number
      )
    return value, (after, metrics, {**seen, "weights": weigh})

  return jax.value_and_grad(loss, has_aux=True)(params)


def _ranks(golden: Golden, step: int) -> list[str]:
  """What the names of a step's arrays begin with: one for each process."""
  ranks = {int(m[1]) for m in golden.matches(rf"step{step}\.rank(\d+)\.image")}
  return [f"step{step}.rank{r}" for r in sorted(ranks)] or [f"step{step}"]


def _number_of_steps(golden: Golden) -> int:
  images = golden.matches(r"step(\d+)(\.rank\d+)?\.image")
  return 1 + max(int(match[1]) for match in images)


def _inputs(golden: Golden, step: int) -> tuple[dict, list, np.float32]:
  """Batch, drawn negatives and `alpha`."""
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
  drawn = [rows("neg_image_idx"), rows("neg_text_idx")]
  if "alpha" not in golden:
    return batch, drawn, np.float32(_said(golden, "alpha"))
  alpha = golden.input("alpha")
  return batch, drawn, alpha[step] if alpha.ndim else alpha[()]


def _length(golden: Golden) -> int | None:
  """Of texts: the case's own, or that of another with its checkpoint."""
  others = [
    case["config"]["max_length"]
    for case in golden.folder.cases.values()
    if case.get("checkpoints") == golden.checkpoints
    and "max_length" in case.get("config", {})
  ]
  return golden.config.get("max_length", *others[:1])


def _said(golden: Golden, word: str) -> float:
  """A number that only the description of the case has."""
  number = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
  match = re.search(rf"\b{word} {number}", golden.description)
  if match is None:
    raise ValueError(f"the case does not say its {word}")
  return float(match[1])


def _optimizer(golden: Golden) -> optax.GradientTransformation:
  """What is not said is PyTorch's default."""
  said = golden.optimizer
  b1, b2 = said.get("betas", (0.9, 0.999))
  decay = said["weight_decay"] if said else _said(golden, "wd")
  eps = said.get("eps", 1e-8)
  return optax.adamw(_lr(golden), b1, b2, eps, weight_decay=decay)


def _lr(golden: Golden) -> float:
  return golden.optimizer["lr"] if golden.optimizer else _said(golden, "lr")


def _losses(metrics: base.Metrics) -> np.ndarray:
  names = ("loss_itc", "loss_itm", "loss_lm")
  return np.array([metrics[name] for name in names if name in metrics])


def _compare_losses(golden: Golden, found: np.ndarray) -> None:
  ours = {"losses": found, "losses0__f64": found[0]}
  golden.compare(ours, replay.MODEL, scale=np.abs)
  errors = {}
  for step, mean in enumerate(found):
    names = [f"{rank}.losses" for rank in _ranks(golden, step)]
    if names[0] in golden:
      # A process counts its own rows only.
      theirs = np.mean([golden.input(name) for name in names], axis=0)
      errors[f"step{step}"] = verdicts.difference(mean, theirs, np.abs)
  golden.judge("losses, mean of the ranks", errors, replay.MODEL)


def _compare_step(
  golden: Golden, step: int, seen: dict, momentum: dict[str, np.ndarray]
) -> None:
  """Weights of the negatives, queues, and outputs of the heads."""
  ranks, weigh = _ranks(golden, step), {}
  names = ("weights_t2i", "weights_i2t")
  for name, groups in zip(names, seen["weights"], strict=True):
    parts = np.split(np.concatenate(list(groups)), len(ranks))
    for rank, part in zip(ranks, parts, strict=True):
      weigh[f"{rank}.{name}"] = part
  golden.compare(weigh, replay.MODEL, f"step{step} weights of negatives")
  queues = {f"step{step}.{name}": x for name, x in momentum.items()}
  golden.compare(queues, replay.MODEL, f"step{step} queues")
  own, other = seen["itm_head"]
  ours = {"itm_head": jnp.concatenate([own[0::2], other, own[1::2]])}
  for name in ("vision_proj", "text_proj"):
    ours[name], ours[f"{name}_m"] = seen[name]
  if "text_decoder/lm_head" in seen:
    (ours["lm_logits"],) = seen["text_decoder/lm_head"]
  golden.compare(
    {f"step{step}.{name}": x for name, x in ours.items()}, replay.MODEL
  )


def _compare_state(
  golden: Golden,
  opened: replay.Opened,
  prefix: str,
  params: dict,
  momentum: momentum_lib.Momentum,
  steps: int = 0,
) -> None:
  """All that the original saves, after some steps of the optimizer."""
  if f"{prefix}_norm" not in golden:
    return
  ours = replay.state_of(opened.family, params, momentum)
  # What has no gradient gets rounding errors, of which Adam makes whole steps:
  # key biases, also of a twin, and where they are a third of another bias.
  zero = golden.fact("zero_grad_params", []) if steps else []
  ties = opened.ties
  noise_of = {
    name: ties.get(name, name).replace("_m.", ".") in zero
    or (steps > 0 and name.endswith("qkv.bias"))
    for name in ours
  }
  size = lambda x: np.sqrt(x.size)
  for noise, tolerance, label in (
    (False, replay.STEPPED if steps else replay.ROUNDING, ""),
    (True, 2 * _lr(golden) * steps, " (no gradient)"),
  ):
    keep = lambda name, noise=noise: noise_of.get(name, False) == noise
    names = [n if keep(n) else None for n in golden.fact(f"{prefix}_names")]
    if any(names):
      golden.compare_fingerprints(prefix, names, ours, tolerance, size, label)
    errors = {
      f"{prefix}.{name}": _mean_error(x, golden.input(f"{prefix}.{name}"))
      for name, x in ours.items()
      if keep(name) and f"{prefix}.{name}" in golden
    }
    golden.judge(f"{prefix}.*{label}", errors, tolerance)


def _mean_error(ours: np.ndarray, theirs: np.ndarray) -> verdicts.Error:
  """Root mean square: Adam may turn a rare element around, where a gradient is
  as small as rounding errors."""
  error = verdicts.difference(ours, theirs, 1.0)
  if np.isinf(error.absolute):
    return error
  square = np.mean((ours.astype(np.float64) - theirs) ** 2)
  return error._replace(relative=np.sqrt(square))
