"""Every name of every released kind of checkpoint has its place."""

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


def without_memory(shape, dtype=np.float32):
  """An array of one element and no strides."""
  return np.broadcast_to(np.zeros((), dtype), shape)


@pytest.fixture(scope="module")
def keys(shared_dir):
  return json.loads((shared_dir / "spec" / "state_dict_keys.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_full_size_names_and_shapes(keys, case):
  """Both ways, without a name that nothing explains."""
  shapes = {name: tuple(s) for name, s in keys[case]["shapes"].items()}
  integer = ("position_ids", "idx_queue", "queue_ptr", "ptr_queue")
  tensors = {
    name: without_memory(
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
  ours = adapt.to_family(leaves, family, family, config, report)
  adapt.check(ours, family, config)
  assert not report.warnings
  assert set(report.dropped) <= {
    weights.POSITION_IDS,
    weights.TIED,
    adapt.STORED_ONCE,
  }
  back, ties = write.original_state(ours, family)
  assert {**back, **{n: back[t] for n, t in ties.items()}}.keys() == (
    shapes.keys()
  )
  for name, leaf in back.items():
    assert leaf.shape == shapes[name], name
    assert leaf.dtype == tensors[name].dtype, name
  tied = [set(group) for group in keys[case]["shared_groups"]]
  assert all(any({n, t} <= group for group in tied) for n, t in ties.items())


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_names_of_a_layer_go_both_ways(layout):
  block = {
    "original": "visual_encoder.blocks.7.attn.qkv.weight",
    "hf": "vision_model.encoder.layers.7.self_attn.qkv.weight",
  }[layout]
  match = names.of_theirs(block, layout)
  assert match.ours == tuple(
    f"params/visual_encoder/block_7/attention/{name}/kernel"
    for name in ("query", "key", "value")
  )
  for path in match.ours:
    assert names.of_ours(path, layout).theirs == block
  assert names.of_theirs(block.replace("qkv", "kqv"), layout) is None


def test_the_first_number_is_the_layer():
  """The other numbers of a name are parts of it."""
  theirs = "text_encoder.encoder.layer.11.crossattention.self1.key.bias"
  ours = "params/text_encoder/layer_11/crossattention/image_1/key/bias"
  assert names.of_theirs(theirs, "original").ours == (ours,)
  assert names.of_ours(ours, "original").theirs == theirs
  head = names.of_theirs("cls_head.2.weight", "original")
  assert head.ours == ("params/cls_head/fc_out/kernel",)


def test_no_two_names_go_to_one_path():
  for layout, rules in names.RULES.items():
    ours = [path for rule in rules for path in rule.ours]
    # Pre-training and retrieval call the pointer by other names.
    twice = {path for path in ours if ours.count(path) > 1}
    assert twice <= {"momentum/queue_ptr"}, layout
    theirs = [rule.theirs for rule in rules]
    assert len(theirs) == len(set(theirs)), layout


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_told_by_its_parts(family):
  params = families.abstract(family, helpers.BLIP)
  paths = traverse_util.flatten_dict({"params": params}, sep="/")
  assert adapt.family_of(paths) == family
