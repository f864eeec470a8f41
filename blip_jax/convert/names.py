"""One table of parameter names: external to native and back.

External names and layouts are PyTorch's, as in the original's checkpoints or
Hugging Face's: linear weights [out, in], convolutions OIHW, one matrix for
query, key and value of the image tower, and a name for each layer. Native
arrays are [in, out], HWIO, three matrices, and one array for all layers of a
stack; native names are paths in a checkpoint: `params/...`, `momentum/...`.
"""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

LAYOUTS = ("original", "hf")


class Rule(NamedTuple):
  """One row of the table: an external name and its native paths.

  Attributes:
    external: name with `{i}` for the index of the layer, if it is of a layer.
    native: paths; if there are several, the external array is split along its
      first axis.
    to_native: converts (a part of) the external array, of one layer.
    to_external: its inverse.
  """

  external: str
  native: tuple[str, ...]
  to_native: Callable[[np.ndarray], np.ndarray]
  to_external: Callable[[np.ndarray], np.ndarray]

  @property
  def has_layers(self) -> bool:
    return "{i}" in self.external


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


def _copy(external: str, native: str) -> tuple[Rule, ...]:
  return (Rule(external, (native,), _same, _same),)


def _dense(external: str, *native: str) -> tuple[Rule, ...]:
  kernels = tuple(f"{name}/kernel" for name in native)
  biases = tuple(f"{name}/bias" for name in native)
  return (
    Rule(f"{external}.weight", kernels, np.transpose, np.transpose),
    Rule(f"{external}.bias", biases, _same, _same),
  )


def _norm(external: str, native: str) -> tuple[Rule, ...]:
  return _copy(f"{external}.weight", f"{native}/scale") + _copy(
    f"{external}.bias", f"{native}/bias"
  )


# Parts of the image tower: native name -> external name, for each layout.
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


def _vit(layout: str, suffix: str, native: str) -> tuple[Rule, ...]:
  n = _VIT[layout]
  tower = n["tower"] + suffix
  block, native_block = f"{tower}.{n['block']}", f"{native}/blocks"
  attention = f"{native_block}/attention"
  patch_embed = f"{tower}.{n['patch_embed']}"
  return (
    *_copy(f"{tower}.{n['cls_token']}", f"{native}/cls_token"),
    *_copy(f"{tower}.{n['pos_embed']}", f"{native}/pos_embed"),
    Rule(
      f"{patch_embed}.weight",
      (f"{native}/patch_embed/kernel",),
      _oihw_to_hwio,
      _hwio_to_oihw,
    ),
    *_copy(f"{patch_embed}.bias", f"{native}/patch_embed/bias"),
    *_norm(f"{block}.{n['ln_1']}", f"{native_block}/ln_1"),
    *_dense(
      f"{block}.{n['qkv']}",
      f"{attention}/query",
      f"{attention}/key",
      f"{attention}/value",
    ),
    *_dense(f"{block}.{n['out']}", f"{attention}/out"),
    *_norm(f"{block}.{n['ln_2']}", f"{native_block}/ln_2"),
    *_dense(f"{block}.{n['fc_in']}", f"{native_block}/fc_in"),
    *_dense(f"{block}.{n['fc_out']}", f"{native_block}/fc_out"),
    *_norm(f"{tower}.{n['ln_post']}", f"{native}/ln_post"),
  )


def _med(external: str, native: str) -> tuple[Rule, ...]:
  embeddings, positions = f"{external}.embeddings", "position_embeddings"
  layer = f"{external}.encoder.layer.{{i}}"
  native_layer = f"{native}/layers"
  rules = [
    *_copy(f"{embeddings}.word_embeddings.weight", f"{native}/word_embeddings"),
    *_copy(f"{embeddings}.{positions}.weight", f"{native}/{positions}"),
    *_norm(f"{embeddings}.LayerNorm", f"{native}/ln_embed"),
    *_dense(f"{layer}.intermediate.dense", f"{native_layer}/fc_in"),
    *_dense(f"{layer}.output.dense", f"{native_layer}/fc_out"),
    *_norm(f"{layer}.output.LayerNorm", f"{native_layer}/ln"),
  ]
  for attention in ("attention", "crossattention"):
    block, native_block = f"{layer}.{attention}", f"{native_layer}/{attention}"
    rules += _attention(f"{block}.self", f"{block}.output.dense", native_block)
    rules += _norm(f"{block}.output.LayerNorm", f"{native_block}/ln")
  return tuple(rules)


def _attention(projections: str, out: str, native: str) -> tuple[Rule, ...]:
  return (
    *_dense(f"{projections}.query", f"{native}/query"),
    *_dense(f"{projections}.key", f"{native}/key"),
    *_dense(f"{projections}.value", f"{native}/value"),
    *_dense(out, f"{native}/out"),
  )


def _nlvr() -> tuple[Rule, ...]:
  """What only the NLVR model, which reads two images, has."""
  block = "text_encoder.encoder.layer.{i}.crossattention"
  native = "params/text_encoder/layers/crossattention"
  images = [
    _attention(
      f"{block}.self{n}", f"{block}.output.dense{n}", f"{native}/image_{n}"
    )
    for n in (0, 1)
  ]
  return (
    *images[0],
    *images[1],
    *_dense(f"{block}.output.merge_layer", f"{native}/merge"),
    *_dense("cls_head.0", "params/cls_head/fc_in"),
    *_dense("cls_head.2", "params/cls_head/fc_out"),
  )


def _params(layout: str) -> tuple[Rule, ...]:
  head = "text_decoder.cls.predictions"
  native = "params/text_decoder/lm_head"
  return (
    *_vit(layout, "", "params/visual_encoder"),
    *_med("text_encoder", "params/text_encoder"),
    *_med("text_decoder.bert", "params/text_decoder"),
    *_dense(f"{head}.transform.dense", f"{native}/transform"),
    *_norm(f"{head}.transform.LayerNorm", f"{native}/ln"),
    *_copy(f"{head}.bias", f"{native}/bias"),
    *_dense("vision_proj", "params/vision_proj"),
    *_dense("text_proj", "params/text_proj"),
    *_dense("itm_head", "params/itm_head"),
  )


def _momentum() -> tuple[Rule, ...]:
  """Temperature, momentum encoders and queues; only the original saves them."""
  encoders = "momentum/params_m"
  queue = lambda name: Rule(
    name, (f"momentum/{name}",), np.transpose, np.transpose
  )
  return (
    *_copy("temp", "params/temp"),
    *_vit("original", "_m", f"{encoders}/visual_encoder"),
    *_med("text_encoder_m", f"{encoders}/text_encoder"),
    *_dense("vision_proj_m", f"{encoders}/vision_proj"),
    *_dense("text_proj_m", f"{encoders}/text_proj"),
    queue("image_queue"),
    queue("text_queue"),
    Rule("idx_queue", ("momentum/idx_queue",), _to_vector, _from_vector),
    # Retrieval and pre-training name it differently; `write.original_state`
    # picks the name.
    Rule("ptr_queue", ("momentum/queue_ptr",), _to_scalar, _from_scalar),
    Rule("queue_ptr", ("momentum/queue_ptr",), _to_scalar, _from_scalar),
  )


RULES = {
  "original": (*_params("original"), *_nlvr(), *_momentum()),
  "hf": _params("hf"),
}

# Names without information of their own: 0, 1, 2, ...
POSITION_IDS = re.compile(
  r"text_(encoder|encoder_m|decoder\.bert)\.embeddings\.position_ids"
)
# The LM matrix and its bias are saved a second time: second name -> name.
TIED = {
  "text_decoder.cls.predictions.decoder.weight": (
    "text_decoder.bert.embeddings.word_embeddings.weight"
  ),
  "text_decoder.cls.predictions.decoder.bias": (
    "text_decoder.cls.predictions.bias"
  ),
}

# Wrappers of PyTorch modules (DistributedDataParallel, `torch.compile`, FSDP,
# activation checkpoints, Lightning Fabric) add a part to names: some to their
# beginning, like the attribute of a Lightning module that holds the model, some
# anywhere.
_INNER_WRAPPERS = (
  "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
)
_WRAPPERS = re.compile(
  rf"^(?:(?:module|model|net|network|{_INNER_WRAPPERS})\.)+"
  rf"|(?<=\.)(?:(?:{_INNER_WRAPPERS})\.)+"
)
# What PyTorch's `AveragedModel` counts next to the weights.
AVERAGED = re.compile(r"n_averaged")


def unwrap(name: str) -> tuple[str, str]:
  """Splits a name into what wrappers added to it, and the rest.

  Returns:
    The parts of wrappers, such as "module._orig_mod.", "" if there are none;
    and the name of the original or of Hugging Face.
  """
  return "".join(_WRAPPERS.findall(name)), _WRAPPERS.sub("", name)


_BY_EXTERNAL = {
  layout: {rule.external: rule for rule in rules}
  for layout, rules in RULES.items()
}
_BY_NATIVE = {
  layout: {path: rule for rule in rules for path in rule.native}
  for layout, rules in RULES.items()
}


def layout_of(names: Collection[str]) -> str | None:
  """Which of LAYOUTS these names follow; None if they follow neither."""
  for layout in LAYOUTS:
    tower = _VIT[layout]["tower"] + "."
    if any(name.startswith(tower) for name in names):
      return layout
  return None


def match_external(name: str, layout: str) -> tuple[Rule, int | None] | None:
  """Finds the rule for an external name, and the index of the layer, if any.

  Returns:
    None if the table has no such name.
  """
  rules = _BY_EXTERNAL[layout]
  if name in rules:
    return rules[name], None
  # The first number is the layer's index.
  number = re.search(r"(?<=[._])\d+(?=[./])", name)
  if number is None:
    return None
  template = name[: number.start()] + "{i}" + name[number.end() :]
  rule = rules.get(template)
  return None if rule is None else (rule, int(number.group()))


def match_native(path: str, layout: str) -> Rule | None:
  """Finds the rule for a native path; None if the layout has no name for it."""
  return _BY_NATIVE[layout].get(path)
