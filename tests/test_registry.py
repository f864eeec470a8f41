"""The table of released checkpoints."""

import re

import pytest

from blip_jax.convert import registry
from blip_jax.models import card, families
from blip_jax.models import config as models_config

FILES = {
  "model_base_14M.pth": ("pretrain", "base", 224),
  "model_base.pth": ("pretrain", "base", 224),
  "model_base_capfilt_large.pth": ("pretrain", "base", 224),
  "model_large.pth": ("pretrain", "large", 224),
  "model_base_retrieval_coco.pth": ("retrieval", "base", 384),
  "model_large_retrieval_coco.pth": ("retrieval", "large", 384),
  "model_base_retrieval_flickr.pth": ("retrieval", "base", 384),
  "model_large_retrieval_flickr.pth": ("retrieval", "large", 384),
  "model_base_caption_capfilt_large.pth": ("caption", "base", 384),
  "model_large_caption.pth": ("caption", "large", 384),
  "model_vqa.pth": ("vqa", "base", 480),
  "model_base_vqa_capfilt_large.pth": ("vqa", "base", 480),
  "model_base_nlvr.pth": ("nlvr", "base", 384),
}
REPOSITORIES = {
  "Salesforce/blip-image-captioning-base": ("caption", "base", 384),
  "Salesforce/blip-image-captioning-large": ("caption", "large", 384),
  "Salesforce/blip-vqa-base": ("vqa", "base", 384),
  "Salesforce/blip-vqa-capfilt-large": ("vqa", "base", 384),
  "Salesforce/blip-itm-base-coco": ("itm", "base", 384),
  "Salesforce/blip-itm-large-coco": ("itm", "large", 384),
  "Salesforce/blip-itm-base-flickr": ("itm", "base", 384),
  "Salesforce/blip-itm-large-flickr": ("itm", "large", 384),
}
URL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"


def test_the_table_lists_all_released_checkpoints():
  files = {
    row.source: (row.task, row.variant, row.image_size)
    for row in registry.RELEASED.values()
  }
  assert files == {URL + name: row for name, row in FILES.items()} | (
    REPOSITORIES
  )


@pytest.mark.parametrize(
  "row", registry.RELEASED.values(), ids=lambda r: r.name
)
def test_a_row_is_consistent(row):
  assert registry.RELEASED[row.name] is row
  assert row.task in families.FAMILIES
  assert row.variant in models_config.VARIANTS
  assert row.image_size % 16 == 0
  assert row.source in (row.name, f"{URL}{row.name}.pth")
  assert (row.variant == "large") == ("large" in row.name.split("capfilt")[0])


def sizes(variant, image_size):
  return models_config.variant(
    variant,
    image_size=image_size,
    vocab_size=30524,
    tokens=models_config.SpecialTokens(),
  )


@pytest.mark.parametrize(
  "row", registry.RELEASED.values(), ids=lambda r: r.name
)
def test_the_released_model_matches_its_row(row):
  assert not row.mismatch(row.task, sizes(row.variant, row.image_size))


def test_a_retrieval_file_may_hold_the_parameters_of_itm_only():
  row = registry.find("model_base_retrieval_coco")
  assert not row.mismatch("itm", sizes("base", 384))
  assert registry.find("Salesforce/blip-itm-base-coco").mismatch(
    "retrieval", sizes("base", 384)
  )


@pytest.mark.parametrize(
  ("family", "variant", "image_size", "description"),
  [
    ("caption", "base", 480, "a caption model, ViT with 12 layers"),
    ("vqa", "large", 480, "a vqa model, ViT with 24 layers of width 1024"),
    ("vqa", "base", 384, "a vqa model, .* images of 384 x 384 pixels"),
  ],
)
def test_a_mismatch_says_what_was_expected_and_found(
  family, variant, image_size, description
):
  warning = registry.find("model_vqa").mismatch(
    family, sizes(variant, image_size)
  )
  expected = (
    "model_vqa: expected a vqa model, ViT with 12 layers of width 768, images "
    "of 480 x 480 pixels; found "
  )
  assert re.match(expected + description, warning)


def test_decoding_is_the_originals():
  assert {
    "caption": dict(
      num_beams=3, max_length=20, min_length=5, repetition_penalty=1.0
    ),
    "vqa": dict(num_beams=3, max_length=10, min_length=1),
  } == card.GENERATION


@pytest.mark.parametrize(
  "name", ["model_vqa", "model_vqa.pth", URL + "model_vqa.pth"]
)
def test_a_file_is_found_by_name_and_by_url(name):
  assert registry.find(name).name == "model_vqa"


@pytest.mark.parametrize(
  "name",
  ["Model_VQA", "model*_vqa.pth", "blip-vqa-base", "https://a.b/model_vqa", ""],
)
def test_similar_names_are_not_found(name):
  assert registry.find(name) is None


@pytest.mark.parametrize(
  "name, expected",
  [
    ("Model_VQA.pth", "model_vqa"),
    ("model_large_captoin", "model_large_caption"),
    ("blip-vqa-base", "Salesforce/blip-vqa-base"),
    ("salesforce/blip-itm-base-coc", "Salesforce/blip-itm-base-coco"),
    ("/data/models/of/blip/model_vqq.pth", "model_vqa"),
  ],
)
def test_the_most_similar_name_comes_first(name, expected):
  assert registry.nearest(name)[0] == expected
  assert len(registry.nearest(name)) <= 3


def test_unrelated_names_get_no_suggestion():
  assert registry.nearest("runs/42") == []


def test_surprising_checkpoints_have_notes():
  notes = {name: row.note for name, row in registry.RELEASED.items()}
  for name, row in registry.RELEASED.items():
    if row.task == "pretrain":
      assert "only pre-trained" in notes[name]
  captioning = notes["Salesforce/blip-image-captioning-base"]
  assert "model_base_capfilt_large" in captioning
  for name in ("Salesforce/blip-vqa-base", "Salesforce/blip-vqa-capfilt-large"):
    assert name in notes[name] and "384" in notes[name] and "480" in notes[name]
  # Checkpoints that a note recommends must exist.
  for note in notes.values():
    for word in note.replace(",", "").split():
      if word.startswith("model_"):
        assert registry.find(word), word


def test_the_known_digits_of_a_digest_are_compared():
  known = registry.find("model_base_capfilt_large")
  assert known.has_digest("8f518745" + "0" * 49 + "a0b235f")
  assert not known.has_digest("8f518745" + "0" * 56)
  assert not known.has_digest("0" * 57 + "a0b235f")
  assert registry.find("model_base").has_digest("0" * 64)
