"""Names: every name of every released kind of checkpoint has a rule."""

import json

import numpy as np
import pytest
from flax import traverse_util

from blip_jax.convert import (
  adapt,
  model_configs,
  names,
  weights,
  write,
)
from blip_jax.models import families
from tests import helpers

CASES = [
  f"{family}_{size}"
  for size in ("base", "large")
  for family in (
    "feature",
    "decoder",
    "itm",
    "vqa",
    "nlvr",
    "retrieval",
    "pretrain",
  )
]


def virtual_array(shape, dtype=np.float32):
  """An array that takes no memory: one element and strides of zero."""
  return np.broadcast_to(np.zeros((), dtype), shape)


@pytest.fixture(scope="module")
def keys(shared_dir):
  return json.loads((shared_dir / "spec" / "state_dict_keys.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_full_size_names_and_shapes(keys, case):
  """Both directions, and every name has a rule or a reason to be dropped."""
  shapes = {name: tuple(s) for name, s in keys[case]["shapes"].items()}
  integer = ("position_ids", "idx_queue", "queue_ptr", "ptr_queue")
  tensors = {
    name: virtual_array(
      shape, np.int64 if name.endswith(integer) else np.float32
    )
    for name, shape in shapes.items()
  }
  report = weights.Report()
  leaves = weights.from_external(tensors, "original", report)
  family = adapt.family_of(leaves)
  assert case.startswith({"caption": "decoder"}.get(family, family))
  config = model_configs.from_shapes(leaves, family, model_configs.Hints())
  assert config.vit.num_heads == (12 if "base" in case else 16)
  assert config.med.num_heads == 12
  native = adapt.to_family(leaves, family, family, config, report)
  adapt.check(native, family, config)
  assert not report.warnings
  assert set(report.dropped) <= {
    weights.POSITION_IDS,
    weights.TIED,
    adapt.STORED_ONCE,
  }
  back, ties = write.original_state(native, family)
  assert {**back, **{n: back[t] for n, t in ties.items()}}.keys() == (
    shapes.keys()
  )
  for name, leaf in back.items():
    assert leaf.shape == shapes[name], name
    assert leaf.dtype == tensors[name].dtype, name
  tied = [set(group) for group in keys[case]["shared_groups"]]
  assert all(any({n, t} <= group for group in tied) for n, t in ties.items())


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_names_of_a_layer_map_in_both_directions(layout):
  block = {
    "original": "visual_encoder.blocks.7.attn.qkv.weight",
    "hf": "vision_model.encoder.layers.7.self_attn.qkv.weight",
  }[layout]
  rule, layer = names.match_external(block, layout)
  assert layer == 7
  assert rule.native == tuple(
    f"params/visual_encoder/blocks/attention/{name}/kernel"
    for name in ("query", "key", "value")
  )
  for path in rule.native:
    assert names.match_native(path, layout).external.format(i=7) == block
  assert names.match_external(block.replace("qkv", "kqv"), layout) is None


def test_the_first_number_is_the_index_of_the_layer():
  """Other numbers are part of the name."""
  external = "text_encoder.encoder.layer.11.crossattention.self1.key.bias"
  native = "params/text_encoder/layers/crossattention/image_1/key/bias"
  rule, layer = names.match_external(external, "original")
  assert (rule.native, layer) == ((native,), 11)
  rule = names.match_native(native, "original")
  assert rule.external.format(i=11) == external
  head, layer = names.match_external("cls_head.2.weight", "original")
  assert (head.native, layer) == (("params/cls_head/fc_out/kernel",), None)


def test_no_two_names_map_to_the_same_path():
  for layout, rules in names.RULES.items():
    native = [path for rule in rules for path in rule.native]
    # Pre-training and retrieval name the pointer differently.
    duplicates = {path for path in native if native.count(path) > 1}
    assert duplicates <= {"momentum/queue_ptr"}, layout
    external = [rule.external for rule in rules]
    assert len(external) == len(set(external)), layout


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_recognised_by_its_parts(family):
  params = families.abstract(family, helpers.BLIP)
  paths = traverse_util.flatten_dict({"params": params}, sep="/")
  assert adapt.family_of(paths) == family
