"""From the record of a statement to arrays; the exchange of images."""

import numpy as np
import pytest

from blip_jax.data import statement_examples, transforms
from tests import helpers

TEXT = "The LEFT image has a red circle!"


def make(**options):
  return statement_examples.StatementExample(
    helpers.scenes_tokenizer(),
    transforms.EvalImage(16),
    max_length=12,
    **options,
  )


def record(**fields):
  grey = [np.full((8, 8, 3), value, np.uint8) for value in (10, 200)]
  return {
    "images": tuple(grey),
    "statement": TEXT,
    "label": True,
    "id": "x",
    **fields,
  }


def text(example):
  return helpers.scenes_tokenizer().decode(example["input_ids"][None])[0]


def test_a_statement_and_its_images():
  example = make()(record(), np.random.default_rng(0))
  assert text(example) == "the left image has a red circle"
  assert example["attention_mask"].tolist() == [1] * 9 + [0] * 3
  assert (example["image_0"] == 10).all() and (example["image_1"] == 200).all()
  assert example["image_0"].shape == (16, 16, 3) and example["label"] == 1
  assert make()(record(label=False), np.random.default_rng(0))["label"] == 0


def test_half_of_the_pairs_are_exchanged_and_the_words_with_them():
  swapped = 0
  for seed in range(400):
    example = make(swap=True)(record(), np.random.default_rng(seed))
    is_swapped = bool((example["image_0"] == 200).all())
    assert (example["image_1"] == (10 if is_swapped else 200)).all()
    side = "right" if is_swapped else "left"
    assert text(example) == f"the {side} image has a red circle"
    assert example["label"] == 1
    swapped += is_swapped
  assert 160 < swapped < 240


def test_without_a_label_a_statement_can_be_evaluated_but_not_trained_on():
  row = record()
  del row["label"]
  rng = np.random.default_rng(0)
  assert "label" not in make(with_label=False)(row, rng)
  with pytest.raises(transforms.BadSample) as error:
    make()(row, rng)
  assert error.value.reason == "no_label"


def test_a_missing_image_costs_the_pair():
  images = (np.zeros((8, 8, 3), np.uint8), "nowhere.png")
  with pytest.raises(transforms.BadSample) as error:
    make()(record(images=images), np.random.default_rng(0))
  assert error.value.reason == "missing"


@pytest.mark.parametrize("with_label", [True, False])
def test_a_batch_has_the_same_shapes_whatever_is_in_it(with_label):
  example = make(with_label=with_label)
  good = example(record(), np.random.default_rng(0))
  for batch in ([good, good], [good, example.blank()], [example.blank()] * 2):
    arrays = example.collate(batch)
    assert {key: (x.shape, x.dtype) for key, x in arrays.items()} == {
      "image_0": ((2, 16, 16, 3), np.uint8),
      "image_1": ((2, 16, 16, 3), np.uint8),
      "input_ids": ((2, 12), np.int32),
      "attention_mask": ((2, 12), np.int32),
      **({"label": ((2,), np.int32)} if with_label else {}),
    }
