"""Adapts the parameters of one model family to another, by named rules.

The original's loaders do the same silently (`strict=False`). Here the report
lists what each rule did. A parameter that is neither in the checkpoint nor
created by a rule is an error, and so is one that the model does not have.

Paths are those of native leaves: `params/...` and `momentum/...`.
"""

import math
import re
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from blip_jax.convert import weights
from blip_jax.convert.weights import Leaf, Leaves, Report
from blip_jax.models import config as model_config
from blip_jax.models import families, initial, tying, vit
from blip_jax.runtime import saved_arrays
from blip_jax.tasks import momentum

# Rules, as the report names them.
STORED_ONCE = "tied: text encoder and decoder share it"
DECODER_WINS = (
  "differs between text encoder and decoder, which share it: the decoder's is "
  "used, as in the original, which loads it last"
)
NO_PART = "{} models have no such part"
NO_MOMENTUM = "momentum encoders and queues were not requested"
TWICE = "cross-attention to one image, copied for each of two images"
RESIZED = "position embeddings, {0[0]} x {0[1]} to {1[0]} x {1[1]} patches"
OTHER_WIDTH = "attends to image tokens; question states have another width"
EMPTY_QUEUE = "image ids of the queue: unknown, pre-training stores none"
WIDENED = "{} to float32"
FRESH = "initialised at random, from seed 0: no {} checkpoint has it"

# Parameters that a target family may initialise, whatever the source.
_FRESH = {
  "nlvr": r"params/cls_head/.*|params/.*/crossattention/merge/.*",
  "vqa": r"params/text_decoder/layers/crossattention/(key|value)/kernel",
  "retrieval": r"params/temp",
}


def family_of(paths: Collection[str]) -> str:
  """The model family that has these parameters.

  Args:
    paths: of native leaves.

  Raises:
    ValueError: no family consists of these parts.
  """
  parts = _parts(paths)
  has_momentum = any(path.startswith("momentum/") for path in paths)
  if "cls_head" in parts:
    return "nlvr"
  if "text_decoder" in parts:
    if "itm_head" in parts:
      return "pretrain"
    return "vqa" if "text_encoder" in parts else "caption"
  if "itm_head" in parts:
    if "temp" in parts or has_momentum:
      return "retrieval"
    return "itm" if {"vision_proj", "text_proj"} & parts else "dialog"
  if "text_encoder" in parts:
    return "feature"
  raise ValueError(
    f"no BLIP model consists of {sorted(parts)} only; a complete checkpoint "
    "has visual_encoder and text_encoder or text_decoder"
  )


def tie(leaves: Leaves) -> Leaves:
  """Adds the text decoder's paths of the weights it shares with the encoder.

  Native pre-training checkpoints store shared weights once.
  """
  shared = {
    path.replace("text_encoder", "text_decoder", 1): leaf
    for path, leaf in leaves.items()
    if is_shared(path)
  }
  return {**shared, **leaves}


def to_family(
  leaves: Leaves,
  source: str,
  target: str,
  config: model_config.BlipConfig,
  report: Report,
  keep_momentum: bool = True,
) -> Leaves:
  """Converts leaves of one family to another.

  Parameters that neither the source nor a rule provides are missing from the
  result; `check` finds them.

  Args:
    leaves: of the source, tied weights in both text towers.
    source: family of the leaves.
    target: family of the result.
    config: sizes of the result; they differ from the source's in the image
      size at most.
    report: records what each rule did.
    keep_momentum: whether to keep momentum encoders and queues, if any.
  """
  leaves = dict(leaves)
  if target == "pretrain":
    _untie(leaves, report)
  if target == "nlvr" and source != "nlvr":
    _copy_for_two_images(leaves, report)
    leaves = weights.split_merging(leaves)
  if target == "vqa" and source != "vqa":
    _drop_other_width(leaves, config, report)
  expected = _expected(target, config)
  _drop_parts(leaves, target, expected, keep_momentum, report)
  if target == "retrieval" and source == "pretrain":
    _add_queue_ids(leaves, report)
  _widen(leaves, report)
  _resize(leaves, config.vit.grid, report)
  # These come from the checkpoint; the rest is initialised.
  report.matched = len(leaves)
  _add_fresh(leaves, source, target, config, expected, report)
  return leaves


def is_shared(path: str) -> bool:
  """Whether pre-training's text decoder shares this text encoder parameter."""
  item, tower, *rest = path.split("/")
  return (item, tower) == ("params", "text_encoder") and tying.is_shared(
    tuple(rest)
  )


def _untie(leaves: Leaves, report: Report) -> None:
  for path in [p for p in leaves if is_shared(p)]:
    decoder_path = path.replace("text_encoder", "text_decoder", 1)
    if decoder_path not in leaves:
      continue
    encoder_leaf, decoder_leaf = leaves[path], leaves.pop(decoder_path)
    if encoder_leaf.is_same(decoder_leaf):
      report.drop(STORED_ONCE, decoder_path)
    else:
      leaves[path] = decoder_leaf
      report.change(DECODER_WINS, path)
  if DECODER_WINS in report.changed:
    paths = weights.first_few(report.changed[DECODER_WINS])
    report.warnings.append(f"{paths}: {DECODER_WINS}")


def _copy_for_two_images(leaves: Leaves, report: Report) -> None:
  pattern = re.compile(
    r"(params/text_encoder/layers/crossattention)/((?:query|key|value|out)/.*)"
  )
  for path in list(leaves):
    if match := pattern.fullmatch(path):
      leaf = leaves.pop(path)
      for image in ("image_0", "image_1"):
        copy = f"{match[1]}/{image}/{match[2]}"
        leaves[copy] = leaf
        report.change(TWICE, copy)


def _drop_other_width(
  leaves: Leaves, config: model_config.BlipConfig, report: Report
) -> None:
  for path in list(leaves):
    if (
      re.fullmatch(_FRESH["vqa"], path)
      and leaves[path].shape[1] != config.med.width
    ):
      del leaves[path]
      report.drop(OTHER_WIDTH, path)


def _drop_parts(
  leaves: Leaves,
  target: str,
  expected: Mapping[str, jax.ShapeDtypeStruct],
  keep_momentum: bool,
  report: Report,
) -> None:
  parts = {path.split("/")[1] for path in expected}
  has_momentum = target in families.WITH_MOMENTUM
  for path in list(leaves):
    item, part = path.split("/")[:2]
    belongs = part in parts if item == "params" else has_momentum
    if belongs and (item == "params" or keep_momentum):
      continue
    del leaves[path]
    report.drop(NO_MOMENTUM if belongs else NO_PART.format(target), path)


def _add_queue_ids(leaves: Leaves, report: Report) -> None:
  if "momentum/image_queue" not in leaves:
    return
  size = leaves["momentum/image_queue"].shape[0]
  ids = np.full(size, momentum.NO_IMAGE, np.int32)
  leaves["momentum/idx_queue"] = Leaf.from_array(ids)
  leaves["momentum/queue_ptr"] = Leaf.from_array(np.int32(0))
  report.change(EMPTY_QUEUE, "momentum/idx_queue", "momentum/queue_ptr")


def _widen(leaves: Leaves, report: Report) -> None:
  """Casts to float32, in which all parameters are kept."""
  for path, leaf in leaves.items():
    if leaf.dtype in (np.float32, np.int32):
      continue
    leaves[path] = leaf.map(lambda x: x.astype(np.float32))
    report.change(WIDENED.format(leaf.dtype.name), path)


def _resize(leaves: Leaves, grid: tuple[int, int], report: Report) -> None:
  for path, leaf in leaves.items():
    if not path.endswith("/pos_embed"):
      continue
    side = math.isqrt(leaf.shape[1] - 1)
    if side * side + 1 != leaf.shape[1] or (side, side) == grid:
      continue
    leaves[path] = Leaf(
      (1, 1 + math.prod(grid), leaf.shape[2]),
      leaf.dtype,
      lambda leaf=leaf, side=side: np.asarray(
        vit.resize_pos_embed(jnp.asarray(leaf.read()), (side, side), grid)
      ),
    )
    report.change(RESIZED.format((side, side), grid), path)


def _add_fresh(
  leaves: Leaves,
  source: str,
  target: str,
  config: model_config.BlipConfig,
  expected: Mapping[str, jax.ShapeDtypeStruct],
  report: Report,
) -> None:
  allowed = _FRESH.get(target)
  fresh = [
    path
    for path in expected
    if path not in leaves and allowed and re.fullmatch(allowed, path)
  ]
  if not fresh:
    return

  starts = traverse_util.flatten_dict(
    {"params": families.starts(target, config)}, sep="/"
  )
  sampled = initial.sample(
    {path: starts[path] for path in fresh}, jax.random.key(0)
  )
  for path, array in sampled.items():
    leaves[path] = Leaf.from_array(np.asarray(array))
  rule = FRESH.format(source)
  report.change(rule, *fresh)
  # The temperature starts at a constant, and serves training only.
  random = [path for path in fresh if path != "params/temp"]
  if random:
    report.warnings.append(
      f"{weights.first_few(random)}: {rule}. Train the {target} model before "
      "you use it"
    )


def _expected(
  family: str, config: model_config.BlipConfig
) -> dict[str, jax.ShapeDtypeStruct]:
  return saved_arrays.by_path({"params": families.abstract(family, config)})


def check(leaves: Leaves, family: str, config: model_config.BlipConfig) -> None:
  """Checks that leaves are exactly the parameters of a family.

  Raises:
    ValueError: names missing parts, or lists missing and unexpected parameters
      and other shapes.
  """
  expected = _expected(family, config)
  missing = _parts(expected) - _parts(leaves) - {"temp"}
  if missing:
    raise ValueError(
      f"the checkpoint cannot be used as a model of the family {family!r}: it "
      f"has no {', '.join(sorted(missing))}"
    )
  if any(path.startswith("momentum/") for path in leaves):
    expected = {**expected, **_expected_momentum(leaves, expected)}
  lines = saved_arrays.differences(leaves, expected)
  if lines:
    raise ValueError(
      "the checkpoint does not fit the model ( - missing in the checkpoint, + "
      f"not in the model):\n{saved_arrays.first_lines(lines)}"
    )


def _parts(paths: Collection[str]) -> set[str]:
  """Towers and heads among parameters."""
  return {path.split("/")[1] for path in paths if path.startswith("params/")}


def _expected_momentum(
  leaves: Leaves, params: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Momentum encoders like the online model's, and two queues of equal size."""
  encoders = {
    path.replace("params", "momentum/params_m", 1): leaf
    for path, leaf in params.items()
    if path.split("/")[1] in momentum.MOMENTUM_PARTS
  }
  queue = leaves.get("momentum/image_queue")
  size = queue.shape[0] if queue else 0
  rows = jax.ShapeDtypeStruct(
    (size, params["params/vision_proj/kernel"].shape[1]), np.float32
  )
  expected = {
    **encoders,
    "momentum/image_queue": rows,
    "momentum/text_queue": rows,
    "momentum/queue_ptr": jax.ShapeDtypeStruct((), np.int32),
  }
  if "params/text_decoder/lm_head/bias" not in params:
    ids = jax.ShapeDtypeStruct((size,), np.int32)
    expected["momentum/idx_queue"] = ids
  return expected
