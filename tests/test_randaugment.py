"""RandAugment against the original's arrays, bit for bit."""

import collections
import dataclasses

import numpy as np
import pytest

from blip_jax.data import randaugment


@pytest.fixture(scope="module")
def golden(golden_dir):
  return np.load(golden_dir / "data" / "randaugment.npz")


@pytest.fixture(scope="module")
def facts(golden_facts):
  return golden_facts("randaugment")


def apply(image, name, *strength):
  return randaugment.OPS[name].apply(image, *strength)


@pytest.mark.parametrize("name", randaugment.OPS)
def test_op_equals_the_original(name, golden, facts):
  entries = [entry for entry in facts["ops"] if entry["op"] == name]
  assert entries, f"no golden case for {name}"
  for entry in entries:
    result = apply(golden["image"], name, *entry["args"])
    np.testing.assert_array_equal(result, golden[entry["key"]], entry["key"])


def test_every_golden_op_is_implemented(facts):
  assert {entry["op"] for entry in facts["ops"]} == set(randaugment.OPS)


def test_strength_equals_the_original(facts):
  entries = facts["ops"]
  negated = {e["op"] for e in entries if np.signbit(e["args"]).any()}
  assert negated == {n for n, op in randaugment.OPS.items() if op.signed}
  for entry in entries:
    op = randaugment.OPS[entry["op"]]
    strength = np.abs(entry["args"]).tolist()
    assert list(op.strength(entry["level"])) == strength, entry["key"]
    if op.signed:
      # Below 0.5 the angle of a rotation is negative; other strengths are
      # negative above it.
      below = entry["random"] < 0.5
      negative = below if entry["op"] == "Rotate" else not below
      assert np.signbit(entry["args"][0]) == negative, entry["key"]


def test_flat_image_equals_the_original(golden):
  for key in (key for key in golden.files if key.startswith("flat.")):
    op = randaugment.OPS[key.removeprefix("flat.")]
    result = op.apply(golden["flat"], *op.strength(5))
    np.testing.assert_array_equal(result, golden[key], key)


def test_pipeline_equals_the_original(golden, facts):
  for i, case in enumerate(facts["pipeline"]):
    image = golden["image"]
    for name, *strength in case["applied"]:
      image = apply(image, name, *strength)
    np.testing.assert_array_equal(image, golden[f"pipeline{i}"], str(case))


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_some_ops_change_nothing_at_the_magnitude_of_blip(name, golden):
  strength = randaugment.OPS[name].strength(5)
  image = golden["image"]
  np.testing.assert_array_equal(apply(image, name, *strength), image)


def test_auto_contrast_stretches_only_channels_that_reach_black():
  image = np.full((2, 2, 3), 40, np.uint8)
  image[0, 0] = [0, 20, 40]
  image[1, 1] = 51
  result = randaugment.auto_contrast(image)
  # Red ranges from 0 to 51 (times 5); the minimum of the others is above 0.
  np.testing.assert_array_equal(result[..., 0], [[0, 200], [200, 255]])
  assert (result[..., 1:] == 255).all()


def test_translation_moves_pixels_and_fills_with_grey(golden):
  """As in PIL, a positive shift moves the content to the left or upwards."""
  image = golden["image"]
  result = randaugment.translate_x(image, 5.0)
  np.testing.assert_array_equal(result[:, :-5], image[:, 5:])
  assert (result[:, -5:] == randaugment.FILL).all()
  result = randaugment.translate_y(image, -5.0)
  np.testing.assert_array_equal(result[5:], image[:-5])
  assert (result[:5] == randaugment.FILL).all()


def test_ops_and_signs_are_sampled_uniformly():
  augment = randaugment.RandAugment()
  rng = np.random.default_rng(0)
  samples = [augment.sample(rng) for _ in range(8000)]
  lengths = np.bincount([len(sample) for sample in samples]) / len(samples)
  np.testing.assert_allclose(lengths, [0.25, 0.5, 0.25], atol=0.02)
  counts = collections.Counter(name for sample in samples for name, _ in sample)
  assert set(counts) == set(randaugment.BLIP_OPS)
  shares = np.array(list(counts.values())) / counts.total()
  np.testing.assert_allclose(shares, 0.1, atol=0.02)
  angles = [s for sample in samples for name, s in sample if name == "Rotate"]
  assert set(angles) == {(15.0,), (-15.0,)}
  assert abs(np.mean(angles)) < 2


@pytest.mark.parametrize("prob, number", [(0.0, 0), (1.0, 3)])
def test_the_probability_is_that_of_applying_an_op(prob, number):
  augment = randaugment.RandAugment(num_ops=3, prob=prob)
  rng = np.random.default_rng(0)
  assert {len(augment.sample(rng)) for _ in range(100)} == {number}


def test_the_image_depends_only_on_the_generator(golden):
  augment = randaugment.RandAugment(num_ops=4, prob=1.0)
  first = augment(golden["image"], np.random.default_rng(3))
  again = augment(golden["image"], np.random.default_rng(3))
  np.testing.assert_array_equal(first, again)
  assert first.dtype == np.uint8 and first.shape == golden["image"].shape


def test_ops_do_not_modify_their_input(golden):
  image = golden["image"].copy()
  image.setflags(write=False)
  for op in randaugment.OPS.values():
    op.apply(image, *op.strength(8))
  np.testing.assert_array_equal(image, golden["image"])


@pytest.mark.parametrize(
  "changes",
  [
    {"ops": ("Rotat",)},
    {"ops": ()},
    {"magnitude": 11},
    {"prob": 1.5},
  ],
)
def test_impossible_settings_are_refused(changes):
  (name,) = changes
  with pytest.raises(ValueError, match=f"RandAugment.{name}: expected"):
    dataclasses.replace(randaugment.RandAugment(), **changes)
