"""One table between the original's names and ours, read in both directions.

The original's weights are PyTorch's: linear [out, in], convolutions OIHW, and
one matrix for query, key and value.  Ours are [in, out], HWIO and three.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Rule(NamedTuple):
  """`original` and `ours` are names with `{i}` for the layer's index.

  A rule with several of ours splits the original along its first axis.
  """

  original: str
  ours: tuple[str, ...]
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_original: Callable[[np.ndarray], np.ndarray]


def _same(x):
  return x


def _oihw_to_hwio(x):
  return x.transpose(2, 3, 1, 0)


def _hwio_to_oihw(x):
  return x.transpose(3, 2, 0, 1)


def _copy(original: str, ours: str) -> tuple[Rule, ...]:
  return (Rule(original, (ours,), _same, _same),)


def _dense(original: str, *ours: str) -> tuple[Rule, ...]:
  kernels = tuple(f"{name}/kernel" for name in ours)
  biases = tuple(f"{name}/bias" for name in ours)
  return (
    Rule(f"{original}.weight", kernels, np.transpose, np.transpose),
    Rule(f"{original}.bias", biases, _same, _same),
  )


def _norm(original: str, ours: str) -> tuple[Rule, ...]:
  return _copy(f"{original}.weight", f"{ours}/scale") + _copy(
    f"{original}.bias", f"{ours}/bias"
  )


def _vit(original: str, ours: str) -> tuple[Rule, ...]:
  block, our_block = f"{original}.blocks.{{i}}", f"{ours}/block_{{i}}"
  attention = f"{our_block}/attention"
  return (
    *_copy(f"{original}.cls_token", f"{ours}/cls_token"),
    *_copy(f"{original}.pos_embed", f"{ours}/pos_embed"),
    Rule(
      f"{original}.patch_embed.proj.weight",
      (f"{ours}/patch_embed/kernel",),
      _oihw_to_hwio,
      _hwio_to_oihw,
    ),
    *_copy(f"{original}.patch_embed.proj.bias", f"{ours}/patch_embed/bias"),
    *_norm(f"{block}.norm1", f"{our_block}/ln_1"),
    *_dense(
      f"{block}.attn.qkv",
      f"{attention}/query",
      f"{attention}/key",
      f"{attention}/value",
    ),
    *_dense(f"{block}.attn.proj", f"{attention}/out"),
    *_norm(f"{block}.norm2", f"{our_block}/ln_2"),
    *_dense(f"{block}.mlp.fc1", f"{our_block}/fc_in"),
    *_dense(f"{block}.mlp.fc2", f"{our_block}/fc_out"),
    *_norm(f"{original}.norm", f"{ours}/ln_post"),
  )


def _med(original: str, ours: str) -> tuple[Rule, ...]:
  embeddings = f"{original}.embeddings"
  layer, our_layer = f"{original}.encoder.layer.{{i}}", f"{ours}/layer_{{i}}"
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
    theirs, our = f"{layer}.{attention}", f"{our_layer}/{attention}"
    for name in ("query", "key", "value"):
      rules += _dense(f"{theirs}.self.{name}", f"{our}/{name}")
    rules += _dense(f"{theirs}.output.dense", f"{our}/out")
    rules += _norm(f"{theirs}.output.LayerNorm", f"{our}/ln")
  return tuple(rules)


RULES = (
  *_vit("visual_encoder", "visual_encoder"),
  *_med("text_encoder", "text_encoder"),
  *_med("text_decoder.bert", "text_decoder"),
  *_dense(
    "text_decoder.cls.predictions.transform.dense",
    "text_decoder/lm_head/transform",
  ),
  *_norm(
    "text_decoder.cls.predictions.transform.LayerNorm",
    "text_decoder/lm_head/ln",
  ),
  *_copy("text_decoder.cls.predictions.bias", "text_decoder/lm_head/bias"),
  *_dense("vision_proj", "vision_proj"),
  *_dense("text_proj", "text_proj"),
  *_dense("itm_head", "itm_head"),
  *_copy("temp", "temp"),
)


def from_original(state: Mapping[str, np.ndarray]) -> Arrays:
  """Our flat paths and arrays of the original's names that the table knows."""
  ours = {}
  for name, array in state.items():
    rule, index = _find(name, lambda rule: (rule.original,))
    if rule is None:
      continue
    parts = (
      np.split(np.asarray(array), len(rule.ours))
      if array.ndim
      else [np.asarray(array)]
    )
    for path, part in zip(rule.ours, parts, strict=True):
      ours[path.format(i=index)] = rule.to_ours(part)
  return ours


def to_original(flat: Mapping[str, np.ndarray]) -> Arrays:
  """The original's names and arrays of our flat paths."""
  state = {}
  for path in flat:
    rule, index = _find(path, lambda rule: rule.ours)
    if rule is None:
      raise ValueError(f"no original name for {path}")
    parts = [
      rule.to_original(np.asarray(flat[part.format(i=index)]))
      for part in rule.ours
    ]
    name = rule.original.format(i=index)
    state[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
  return state


def _find(name: str, templates: Callable[[Rule], tuple[str, ...]]):
  """The rule whose template fits `name`, and the layer's index in it."""
  index = re.search(r"(?<=[._])\d+(?=[./])", name)
  template = name
  if index:
    template = name[: index.start()] + "{i}" + name[index.end() :]
  for rule in RULES:
    if template in templates(rule):
      return rule, index and index.group()
  return None, None
