"""From one family to another: what the original's loaders do without a word.

Each rule has a name, and the report lists what it did.  A parameter that is
neither in the checkpoint nor made by a rule is an error, and so is one that the
model has no place for.

Paths are of leaves: `params/...` and `momentum/...`.
"""

import math
import re
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.convert import weights
from blip_jax.convert.weights import Leaf, Leaves, Report
from blip_jax.models import config as model_config
from blip_jax.models import families, med, vit
from blip_jax.runtime import snapshot
from blip_jax.tasks import momentum

STORED_ONCE = "tied: text encoder and decoder share it"
DECODER_WINS = (
  "differs between text encoder and decoder, which share it: the decoder's "
  "wins, as in the original, where the later of the two is what is loaded"
)
NO_PART = "{} models have no such part"
NO_MOMENTUM = "momentum is not wanted"
TWICE = "one image's cross-attention, copied for two"
RESIZED = "position embeddings, {0[0]} x {0[1]} to {1[0]} x {1[1]} patches"
OTHER_WIDTH = "made for image tokens; a question is another width"
EMPTY_QUEUE = "queue of unknown images, for pre-training kept no ids"
WIDENED = "{} to float32"
FRESH = "new, drawn from the seed: no {} checkpoint has it"

# What a target may start without, whatever its source.
_FRESH = {
  "nlvr": r"params/cls_head/.*|params/.*/crossattention/merge/.*",
  "vqa": r"params/text_decoder/layer_\d+/crossattention/(key|value)/kernel",
  "retrieval": r"params/temp",
}


def family_of(paths: Collection[str]) -> str:
  """Whose parts these are.

  Raises:
    ValueError: nobody's.
  """
  parts = {path.split("/")[1] for path in paths if path.startswith("params/")}
  has_twin = any(path.startswith("momentum/") for path in paths)
  if "cls_head" in parts:
    return "nlvr"
  if "text_decoder" in parts:
    if "itm_head" in parts:
      return "pretrain"
    return "vqa" if "text_encoder" in parts else "caption"
  if "itm_head" in parts:
    return "retrieval" if "temp" in parts or has_twin else "itm"
  if "text_encoder" in parts:
    return "feature"
  raise ValueError(
    f"no BLIP model consists of {sorted(parts)} only; a whole checkpoint has "
    "visual_encoder and text_encoder or text_decoder"
  )


def tie(leaves: Leaves) -> Leaves:
  """Leaves of our own pre-training, with what its text towers share twice."""
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
  """Leaves of the target, as far as source and rules have them; see `check`.

  Args:
    leaves: of the source, both text towers whole.
    source: its family.
    target: the wanted one.
    config: the wanted sizes; only the image size may be another than the
      source's.
    report: takes note of every rule.
    keep_momentum: whether twin and queues are wanted, where there are any.
  """
  leaves = dict(leaves)
  if target == "pretrain":
    _untie(leaves, report)
  if target == "nlvr" and source != "nlvr":
    _double(leaves, report)
  if target == "vqa" and source != "vqa":
    _leave_out_other_width(leaves, config, report)
  expected = _expected(target, config)
  _drop_parts(leaves, target, expected, keep_momentum, report)
  if target == "retrieval" and source == "pretrain":
    _number_queue(leaves, report)
  _widen(leaves, report)
  _resize(leaves, config.vit.grid, report)
  # What comes before was theirs; the rest is made here.
  report.matched = len(leaves)
  _add_fresh(leaves, source, target, config, expected, report)
  return leaves


def is_shared(path: str) -> bool:
  """Whether it is the text encoder's, and pre-training's decoder has it too."""
  item, tower, *rest = path.split("/")
  return (item, tower) == ("params", "text_encoder") and med.is_shared(
    tuple(rest)
  )


def _untie(leaves: Leaves, report: Report) -> None:
  for path in [p for p in leaves if is_shared(p)]:
    twin = path.replace("text_encoder", "text_decoder", 1)
    if twin not in leaves:
      continue
    encoders, decoders = leaves[path], leaves.pop(twin)
    if encoders.is_same(decoders):
      report.drop(STORED_ONCE, twin)
    else:
      leaves[path] = decoders
      report.change(DECODER_WINS, path)
  if DECODER_WINS in report.changed:
    which = weights.first_few(report.changed[DECODER_WINS])
    report.warnings.append(f"{which}: {DECODER_WINS}")


def _double(leaves: Leaves, report: Report) -> None:
  pattern = re.compile(
    r"(params/text_encoder/layer_\d+/crossattention)/((?:query|key|value|out)/.*)"
  )
  for path in list(leaves):
    if match := pattern.fullmatch(path):
      leaf = leaves.pop(path)
      for image in ("image_0", "image_1"):
        twin = f"{match[1]}/{image}/{match[2]}"
        leaves[twin] = leaf
        report.change(TWICE, twin)


def _leave_out_other_width(leaves, config, report) -> None:
  for path in list(leaves):
    if (
      re.fullmatch(_FRESH["vqa"], path)
      and leaves[path].shape[0] != config.med.width
    ):
      del leaves[path]
      report.drop(OTHER_WIDTH, path)


def _drop_parts(leaves, target, expected, keep_momentum, report) -> None:
  parts = {path.split("/")[1] for path in expected}
  has_momentum = target in families.WITH_MOMENTUM
  for path in list(leaves):
    item, part = path.split("/")[:2]
    belongs = part in parts if item == "params" else has_momentum
    if belongs and (item == "params" or keep_momentum):
      continue
    del leaves[path]
    report.drop(NO_MOMENTUM if belongs else NO_PART.format(target), path)


def _number_queue(leaves: Leaves, report: Report) -> None:
  if "momentum/image_queue" not in leaves:
    return
  size = leaves["momentum/image_queue"].shape[0]
  ids = np.full(size, momentum.NO_IMAGE, np.int32)
  leaves["momentum/idx_queue"] = Leaf.from_array(ids)
  leaves["momentum/queue_ptr"] = Leaf.from_array(np.int32(0))
  report.change(EMPTY_QUEUE, "momentum/idx_queue", "momentum/queue_ptr")


def _widen(leaves: Leaves, report: Report) -> None:
  """Parameters are float32 whatever they were saved as."""
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


def _add_fresh(leaves, source, target, config, expected, report) -> None:
  allowed = _FRESH.get(target)
  fresh = [
    path
    for path in expected
    if path not in leaves and allowed and re.fullmatch(allowed, path)
  ]
  if not fresh:
    return

  @jax.jit
  def init():
    params = families.init(target, config, jax.random.key(0))
    flat = snapshot.by_path({"params": params})
    # The compiler leaves out all others.
    return {path: flat[path] for path in fresh}

  for path, array in init().items():
    leaves[path] = Leaf.from_array(np.asarray(array))
  report.change(FRESH.format(source), *fresh)


def _expected(family: str, config: model_config.BlipConfig) -> dict:
  return snapshot.by_path({"params": families.abstract(family, config)})


def check(leaves: Leaves, family: str, config: model_config.BlipConfig) -> None:
  """Insists on a family's parameters, all of them and nothing else.

  Raises:
    ValueError: lists what is missing, unexpected, or of another shape.
  """
  expected = _expected(family, config)
  if any(path.startswith("momentum/") for path in leaves):
    expected = {**expected, **_expected_momentum(leaves, expected)}
  lines = snapshot.differences(leaves, expected)
  if lines:
    raise ValueError(
      "the checkpoint does not fit the model ( - missing in the checkpoint, + "
      f"the model has no such parameter):\n{snapshot.first_lines(lines)}"
    )


def _expected_momentum(leaves: Leaves, params: dict) -> dict:
  """A twin like its student, and two queues of one size with their ids."""
  twin = {
    path.replace("params", "momentum/params_m", 1): leaf
    for path, leaf in params.items()
    if path.split("/")[1] in momentum.TWIN_PARTS
  }
  queue = leaves.get("momentum/image_queue")
  size = queue.shape[0] if queue else 0
  rows = jax.ShapeDtypeStruct(
    (size, params["params/vision_proj/kernel"].shape[1]), np.float32
  )
  expected = {
    **twin,
    "momentum/image_queue": rows,
    "momentum/text_queue": rows,
    "momentum/queue_ptr": jax.ShapeDtypeStruct((), np.int32),
  }
  if "params/text_decoder/lm_head/bias" not in params:
    ids = jax.ShapeDtypeStruct((size,), np.int32)
    expected["momentum/idx_queue"] = ids
  return expected
