"""Conversion between external and native names."""

import numpy as np
import pytest

from blip_jax.convert import opening, reader, tensor_files, weights
from tests import helpers


def test_an_untied_lm_matrix_is_used_with_a_warning(tmp_path):
  """Released pre-training files may have one: the original's loader takes the
  later of the two tied names."""
  matrix = "text_decoder.cls.predictions.decoder.weight"

  def untie(state):
    state[matrix] = state[matrix] + 1

  checkpoint = opening.open_checkpoint(
    helpers.save_changed(tmp_path, untie), **helpers.OPEN_GOLDEN
  )
  assert any(matrix in text for text in checkpoint.report.warnings)
  np.testing.assert_array_equal(
    checkpoint.leaves["params/text_decoder/word_embeddings"].read(),
    helpers.state_dict("blip_decoder")[matrix] + 1,
  )


def add(state):
  state["text_decoder.bert.pooler.dense.weight"] = np.zeros(2, np.float32)


def test_unknown_names_may_be_dropped_by_pattern(tmp_path):
  path = helpers.save_changed(tmp_path, add)
  drop = [r"text_decoder\.bert\.pooler\..*"]
  checkpoint = opening.open_checkpoint(path, drop=drop, **helpers.OPEN_GOLDEN)
  assert checkpoint.report.dropped[weights.ON_REQUEST] == [
    "text_decoder.bert.pooler.dense.weight"
  ]
  # Dropping a name that the model needs is an error.
  with pytest.raises(
    ValueError, match=r" - params/visual_encoder/ln_post/bias"
  ):
    opening.open_checkpoint(
      path, drop=[*drop, r".*encoder\.norm\.bias"], **helpers.OPEN_GOLDEN
    )


def prefixed(prefix):
  return lambda state: {f"{prefix}{key}": x for key, x in state.items()}


def save(tmp_path, change, name="blip_decoder"):
  """A golden checkpoint of which `change` makes what is saved."""
  state = dict(reader.read(helpers.golden_checkpoint(name)))
  tensor_files.save_torch(tmp_path / "wrapped.pth", change(state))
  return tmp_path / "wrapped.pth"


@pytest.mark.parametrize(
  "prefix",
  [
    "module.",
    "_orig_mod.",
    "_forward_module.",
    "_forward_module.module.",
    "network.",
    "model.",
    "net.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module.",
    "_fsdp_wrapped_module.",
  ],
)
def test_wrappers_of_names_are_stripped_and_reported(tmp_path, prefix):
  path = save(tmp_path, prefixed(prefix))
  opened = opening.open_checkpoint(path, **helpers.OPEN_GOLDEN)
  expected = helpers.open_golden("blip_decoder")
  assert opened.report.matched == expected.report.matched
  assert opened.leaves.keys() == expected.leaves.keys()
  leaf = "params/visual_encoder/pos_embed"
  np.testing.assert_array_equal(
    opened.leaves[leaf].read(), expected.leaves[leaf].read()
  )
  assert f"wrapper {prefix!r} stripped from names" in str(opened.report)


def test_wrappers_inside_names_are_stripped(tmp_path):
  """Parts of a model may be compiled, or split, on their own."""

  def wrap(state):
    for tower, wrapper in (
      ("visual_encoder.", "_orig_mod."),
      ("text_decoder.bert.", "_checkpoint_wrapped_module."),
    ):
      state = {k.replace(tower, tower + wrapper): x for k, x in state.items()}
    return {**state, "n_averaged": np.int64(3).reshape(())}

  opened = opening.open_checkpoint(save(tmp_path, wrap), **helpers.OPEN_GOLDEN)
  expected = helpers.open_golden("blip_decoder")
  assert opened.leaves.keys() == expected.leaves.keys()
  assert opened.report.dropped[weights.AVERAGED] == ["n_averaged"]


def test_names_of_two_models_are_refused_unless_one_is_dropped(tmp_path):
  def twice(state):
    other = {f"module.{key}": x + 1 for key, x in state.items()}
    return {**{f"model.{key}": x for key, x in state.items()}, **other}

  path = save(tmp_path, twice)
  with pytest.raises(
    ValueError,
    match=r"model\.\S* and module\.\S* .*drop=",
  ):
    opening.open_checkpoint(path, **helpers.OPEN_GOLDEN)
  opened = opening.open_checkpoint(
    path, drop=[r"module\..*"], **helpers.OPEN_GOLDEN
  )
  expected = helpers.open_golden("blip_decoder")
  leaf = "params/visual_encoder/pos_embed"
  np.testing.assert_array_equal(
    opened.leaves[leaf].read(), expected.leaves[leaf].read()
  )


def test_another_prefix_is_named(tmp_path):
  path = save(tmp_path, prefixed("teacher."))
  with pytest.raises(ValueError, match=r"first names are teacher\."):
    opening.open_checkpoint(path, **helpers.OPEN_GOLDEN)


def test_more_names_than_a_few_are_counted():
  names = ["a", "b", "c", "d", "e"]
  assert weights.first_few([]) == ""
  assert weights.first_few(names[:3]) == "a, b, c"
  assert weights.first_few(names[:4]) == "a, b, c, ... and 1 more"
  assert weights.first_few(names, 5) == "a, b, c, d, e"
  assert weights.first_few(names, 1) == "a, ... and 4 more"


def test_a_matrix_of_three_parts_is_split_and_joined():
  name = "visual_encoder.blocks.0.attn.qkv.weight"
  external = np.arange(12, dtype=np.float32).reshape(6, 2)
  leaves = weights.from_external({name: external}, "original", weights.Report())
  block = "params/visual_encoder/blocks/attention"
  assert list(leaves) == [
    f"{block}/{n}/kernel" for n in ("query", "key", "value")
  ]
  for i, leaf in enumerate(leaves.values()):
    assert leaf.shape == (1, 2, 2)
    np.testing.assert_array_equal(leaf.read()[0], external[2 * i : 2 * i + 2].T)
  (joined,) = weights.to_external(leaves, "original").values()
  assert joined.shape == (6, 2) and joined.dtype == np.float32
  np.testing.assert_array_equal(joined.read(), external)
  with pytest.raises(ValueError, match="3 equal parts"):
    weights.from_external({name: external[:5]}, "original", weights.Report())


def test_layers_with_a_name_each_are_stacked():
  """As in checkpoints from before 0.1.0; of NLVR there are two stacks."""
  values = {i: np.full((2, 3), i, np.float32) for i in range(12)}
  tower, momentum = "params/text_encoder", "momentum/params_m/visual_encoder"
  arrays = {
    **{f"{tower}/layer_{i}/fc_in/kernel": x for i, x in values.items()},
    **{f"{momentum}/block_{i}/ln_1/scale": values[i] for i in range(11)},
    f"{tower}/ln_embed/scale": values[0],
  }
  merge = {f"{tower}/layer_6/crossattention/merge/kernel": values[6]}

  def stacked(arrays):
    leaves = {path: weights.Leaf.from_array(x) for path, x in arrays.items()}
    found = weights.stack_layers(leaves)
    return {
      path: leaf.read()[..., 0, 0].tolist() for path, leaf in found.items()
    }

  others = {
    f"{momentum}/blocks/ln_1/scale": list(range(11)),
    f"{tower}/ln_embed/scale": 0,
  }
  layers = f"{tower}/layers/fc_in/kernel"
  assert stacked(arrays) == {layers: list(range(12)), **others}
  merging = f"{tower}/merging_layers"
  assert stacked(arrays | merge) == {
    layers: list(range(6)),
    f"{merging}/fc_in/kernel": list(range(6, 12)),
    f"{merging}/crossattention/merge/kernel": [6],
    **others,
  }
  del arrays[f"{tower}/layer_3/fc_in/kernel"]
  with pytest.raises(ValueError, match=r"layers 0 to 11, found none of .* 3"):
    stacked(arrays)


def test_unknown_names_are_refused_in_both_directions():
  with pytest.raises(ValueError, match="2 names that no BLIP model has: a, b"):
    weights.from_external(
      {"a": np.zeros(1), "b": np.zeros(1)}, "original", weights.Report()
    )
  leaf = weights.Leaf.from_array(np.zeros(1))
  with pytest.raises(ValueError, match="no name for params/a"):
    weights.to_external({"params/a": leaf}, "hf")


def test_leaves_with_the_same_memory_are_the_same_unread():
  def refuse():
    raise AssertionError("read")

  leaf = weights.Leaf((2,), np.dtype("f4"), refuse, memory="a")
  same = weights.Leaf((2,), np.dtype("f4"), refuse, memory="a")
  assert leaf.is_same(same) and leaf.map(np.negative).is_same(
    same.map(np.negative)
  )
  one, two, other = (
    weights.Leaf.from_array(np.array(x)) for x in ([1, 2], [1, 2], [1, 3])
  )
  assert one.is_same(two) and not one.is_same(other)
  changed = weights.Leaf((2,), np.dtype("f4"), lambda: np.ones(2), memory="b")
  assert not changed.is_same(
    weights.Leaf((2,), np.dtype("f4"), lambda: np.zeros(2), memory="c")
  )


def test_a_report_counts_what_happened():
  report = weights.Report()
  assert (report.matched, report.dropped, report.changed) == (0, {}, {})
  report.drop("rule", "a")
  report.drop("rule", "b", "c")
  report.change("other", "d")
  assert report.dropped == {"rule": ["a", "b", "c"]}
  assert report.changed == {"other": ["d"]}
  lines = str(report).splitlines()
  assert lines == [
    "matched: 0",
    "dropped: 3 (rule): a, b, c",
    "changed: 1 (other): d",
    "missing: 0",
    "unexpected: 0",
  ]
