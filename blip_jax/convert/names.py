"""One table between the original's names, Hugging Face's and ours, both ways.

Theirs are PyTorch's weights: linear [out, in], convolutions OIHW, and one
matrix for query, key and value of the image tower.  Ours are [in, out], HWIO
and three.  Our names are paths of a checkpoint's items: `params/...`,
`momentum/...`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LAYOUTS = ("original", "hf")


class Rule(NamedTuple):
  """`theirs` and `ours` are names with `{i}` for the layer's index.

  A rule with several of ours splits theirs along its first axis.
  """

  theirs: str
  ours: tuple[str, ...]
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_external: Callable[[np.ndarray], np.ndarray]


class Match(NamedTuple):
  """A rule, and the names of one layer that it is about."""

  rule: Rule
  theirs: str
  ours: tuple[str, ...]


def _same(x):
  return x


def _oihw_to_hwio(x):
  return x.transpose(2, 3, 1, 0)


def _hwio_to_oihw(x):
  return x.transpose(3, 2, 0, 1)


# Counts are int64 in PyTorch, and int32 in JAX.
def _to_scalar(x):
  return x.reshape(()).astype(np.int32)


def _from_scalar(x):
  return x.reshape(1).astype(np.int64)


def _to_vector(x):
  return x.reshape(-1).astype(np.int32)


def _from_vector(x):
  return x.reshape(1, -1).astype(np.int64)


def _copy(theirs: str, ours: str) -> tuple[Rule, ...]:
  return (Rule(theirs, (ours,), _same, _same),)


def _dense(theirs: str, *ours: str) -> tuple[Rule, ...]:
  kernels = tuple(f"{name}/kernel" for name in ours)
  biases = tuple(f"{name}/bias" for name in ours)
  return (
    Rule(f"{theirs}.weight", kernels, np.transpose, np.transpose),
    Rule(f"{theirs}.bias", biases, _same, _same),
  )


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
  return _copy(f"{theirs}.weight", f"{ours}/scale") + _copy(
    f"{theirs}.bias", f"{ours}/bias"
  )


# Our name of a part of the image tower, and theirs in each layout.
_VIT = {
  "original": dict(
    tower="visual_encoder",
    cls_token="cls_token",
    pos_embed="pos_embed",
    patch_embed="patch_embed.proj",
    block="blocks.{i}",
    ln_1="norm1",
    qkv="attn.qkv",
    out="attn.proj",
    ln_2="norm2",
    fc_in="mlp.fc1",
    fc_out="mlp.fc2",
    ln_post="norm",
  ),
  "hf": dict(
    tower="vision_model",
    cls_token="embeddings.class_embedding",
    pos_embed="embeddings.position_embedding",
    patch_embed="embeddings.patch_embedding",
    block="encoder.layers.{i}",
    ln_1="layer_norm1",
    qkv="self_attn.qkv",
    out="self_attn.projection",
    ln_2="layer_norm2",
    fc_in="mlp.fc1",
    fc_out="mlp.fc2",
    ln_post="post_layernorm",
  ),
}


def _vit(layout: str, suffix: str, ours: str) -> tuple[Rule, ...]:
  n = _VIT[layout]
  tower = n["tower"] + suffix
  block, our_block = f"{tower}.{n['block']}", f"{ours}/block_{{i}}"
  attention = f"{our_block}/attention"
  patch_embed = f"{tower}.{n['patch_embed']}"
  return (
    *_copy(f"{tower}.{n['cls_token']}", f"{ours}/cls_token"),
    *_copy(f"{tower}.{n['pos_embed']}", f"{ours}/pos_embed"),
    Rule(
      f"{patch_embed}.weight",
      (f"{ours}/patch_embed/kernel",),
      _oihw_to_hwio,
      _hwio_to_oihw,
    ),
    *_copy(f"{patch_embed}.bias", f"{ours}/patch_embed/bias"),
    *_norm(f"{block}.{n['ln_1']}", f"{our_block}/ln_1"),
    *_dense(
      f"{block}.{n['qkv']}",
      f"{attention}/query",
      f"{attention}/key",
      f"{attention}/value",
    ),
    *_dense(f"{block}.{n['out']}", f"{attention}/out"),
    *_norm(f"{block}.{n['ln_2']}", f"{our_block}/ln_2"),
    *_dense(f"{block}.{n['fc_in']}", f"{our_block}/fc_in"),
    *_dense(f"{block}.{n['fc_out']}", f"{our_block}/fc_out"),
    *_norm(f"{tower}.{n['ln_post']}", f"{ours}/ln_post"),
  )


def _med(theirs: str, ours: str) -> tuple[Rule, ...]:
  embeddings = f"{theirs}.embeddings"
  layer, our_layer = f"{theirs}.encoder.layer.{{i}}", f"{ours}/layer_{{i}}"
  rules = [
    *_copy(f"{embeddings}.word_embeddings.weight", f"{ours}/word_embeddings"),
    *_copy(
      f"{embeddings}.position_embeddings.weight", f"{ours}/position_embeddings"
    ),
    *_norm(f"{embeddings}.LayerNorm", f"{ours}/ln_embed"),
    *_dense(f"{layer}.intermediate.dense", f"{our_layer}/fc_in"),
    *_dense(f"{layer}.output.dense", f"{our_layer}/fc_out"),
    *_norm(f"{layer}.output.LayerNorm", f"{our_layer}/ln"),
  ]
  for attention in ("attention", "crossattention"):
    block, our = f"{layer}.{attention}", f"{our_layer}/{attention}"
    rules += _attention(f"{block}.self", f"{block}.output.dense", our)
    rules += _norm(f"{block}.output.LayerNorm", f"{our}/ln")
  return tuple(rules)


def _attention(projections: str, out: str, ours: str) -> tuple[Rule, ...]:
  return (
    *_dense(f"{projections}.query", f"{ours}/query"),
    *_dense(f"{projections}.key", f"{ours}/key"),
    *_dense(f"{projections}.value", f"{ours}/value"),
    *_dense(out, f"{ours}/out"),
  )


def _nlvr() -> tuple[Rule, ...]:
  """What only the model of two images has."""
  block = "text_encoder.encoder.layer.{i}.crossattention"
  ours = "params/text_encoder/layer_{i}/crossattention"
  twins = [
    _attention(
      f"{block}.self{n}", f"{block}.output.dense{n}", f"{ours}/image_{n}"
    )
    for n in (0, 1)
  ]
  return (
    *twins[0],
    *twins[1],
    *_dense(f"{block}.output.merge_layer", f"{ours}/merge"),
    *_dense("cls_head.0", "params/cls_head/fc_in"),
    *_dense("cls_head.2", "params/cls_head/fc_out"),
  )


def _params(layout: str) -> tuple[Rule, ...]:
  head = "text_decoder.cls.predictions"
  ours = "params/text_decoder/lm_head"
  return (
    *_vit(layout, "", "params/visual_encoder"),
    *_med("text_encoder", "params/text_encoder"),
    *_med("text_decoder.bert", "params/text_decoder"),
    *_dense(f"{head}.transform.dense", f"{ours}/transform"),
    *_norm(f"{head}.transform.LayerNorm", f"{ours}/ln"),
    *_copy(f"{head}.bias", f"{ours}/bias"),
    *_dense("vision_proj", "params/vision_proj"),
    *_dense("text_proj", "params/text_proj"),
    *_dense("itm_head", "params/itm_head"),
  )


def _momentum() -> tuple[Rule, ...]:
  """The temperature, the twin and the queues, which only the original keeps."""
  twin = "momentum/params_m"
  queue = lambda name: Rule(
    name, (f"momentum/{name}",), np.transpose, np.transpose
  )
  return (
    *_copy("temp", "params/temp"),
    *_vit("original", "_m", f"{twin}/visual_encoder"),
    *_med("text_encoder_m", f"{twin}/text_encoder"),
    *_dense("vision_proj_m", f"{twin}/vision_proj"),
    *_dense("text_proj_m", f"{twin}/text_proj"),
    queue("image_queue"),
    queue("text_queue"),
    Rule("idx_queue", ("momentum/idx_queue",), _to_vector, _from_vector),
    # Retrieval's name for it; the writer says which of the two it wants.
    Rule("ptr_queue", ("momentum/queue_ptr",), _to_scalar, _from_scalar),
    Rule("queue_ptr", ("momentum/queue_ptr",), _to_scalar, _from_scalar),
  )


RULES = {
  "original": (*_params("original"), *_nlvr(), *_momentum()),
  "hf": _params("hf"),
}

# Names that carry nothing of their own, and why.
POSITION_IDS = re.compile(
  r"text_(encoder|encoder_m|decoder\.bert)\.embeddings\.position_ids"
)
# The LM matrix and its bias, each one tensor under a second name.
TIED = {
  "text_decoder.cls.predictions.decoder.weight": (
    "text_decoder.bert.embeddings.word_embeddings.weight"
  ),
  "text_decoder.cls.predictions.decoder.bias": (
    "text_decoder.cls.predictions.bias"
  ),
}

_BY_THEIRS = {
  layout: {rule.theirs: rule for rule in rules}
  for layout, rules in RULES.items()
}
_BY_OURS = {
  layout: {path: rule for rule in rules for path in rule.ours}
  for layout, rules in RULES.items()
}


def layout_of(names) -> str | None:
  """Whose names these are; None if nobody's that the table knows."""
  for layout in LAYOUTS:
    tower = _VIT[layout]["tower"] + "."
    if any(name.startswith(tower) for name in names):
      return layout
  return None


def of_theirs(name: str, layout: str) -> Match | None:
  """What a name of theirs is; None if the table does not know it."""
  return _match(name, _BY_THEIRS[layout])


def of_ours(path: str, layout: str) -> Match | None:
  """What a path of ours is to them; None if they have no such thing."""
  return _match(path, _BY_OURS[layout])


def _match(name: str, rules: dict[str, Rule]) -> Match | None:
  # The first number is the layer's; of names without layers it is another.
  number = re.search(r"(?<=[._])\d+(?=[./])", name)
  index, template = "", name
  if number and name not in rules:
    index = number.group()
    template = name[: number.start()] + "{i}" + name[number.end() :]
  rule = rules.get(template)
  if rule is None:
    return None
  fill = lambda template: template.replace("{i}", index)
  return Match(rule, fill(rule.theirs), tuple(map(fill, rule.ours)))
