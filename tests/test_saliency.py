"""Maps of words: against finite differences, and what users may ask for."""

import jax
import numpy as np
import PIL.Image
import pytest

from blip_jax.data import scenes
from blip_jax.inference import saliency
from blip_jax.runtime import sharding
from tests import helpers, plain_text_tower

TEXT = "a red circle left of a green star"
STEP = 1e-5
# Parts of a layer's attention at which the gradient of a match is taken.
SHARES = (1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16)


@pytest.fixture(scope="module")
def matcher():
  return helpers.make_model("retrieval", text_depth=3)


@pytest.fixture(scope="module")
def captioner():
  return helpers.make_model("caption", text_depth=3)


@pytest.fixture(scope="module")
def images():
  return [scenes.Scenes("val", 16)[i]["image"] for i in range(3)]


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def image_tokens(model, image):
  pixels = np.asarray(image, np.float32)[None] / 255
  mean = [0.48145466, 0.4578275, 0.40821073]
  std = [0.26862954, 0.26130258, 0.27577711]
  pixels = ((pixels - mean) / std).astype(np.float32)
  return float64(model.apply(pixels, method="encode_image"))[0]


def differences(score, attention, row, share):
  """dy/dA of the attention [H, L, N] of one token, by central differences,
  where all attention is a part of itself."""
  gradient = np.zeros_like(attention[:, row])
  for head, patch in np.ndindex(*gradient.shape):
    ends = []
    for step in (STEP, -STEP):
      moved = share * attention
      moved[head, row, patch] += step
      ends.append(score(moved))
    gradient[head, patch] = (ends[0] - ends[1]) / (2 * STEP)
  return gradient


def expected_map(score, attention, row, heads, shares=(1,)):
  """mean over heads of max(0, A * mean over shares of dy/dA), without [CLS]."""
  gradients = [differences(score, attention, row, share) for share in shares]
  product = attention[:, row] * np.mean(gradients, axis=0)
  return np.maximum(product, 0)[heads].mean(axis=0)[1:]


@pytest.mark.parametrize(
  "layer, heads, grad_cam, shares",
  [
    (1, [1], False, SHARES),
    (1, [0, 1], True, (1,)),
    (2, [0, 1], False, SHARES),
  ],
)
def test_maps_of_a_match_are_finite_differences(
  matcher, images, layer, heads, grad_cam, shares
):
  found = matcher.explain(
    images[0], TEXT, layer=layer, heads=heads, grad_cam=grad_cam
  )
  params = float64(matcher.params)
  config = matcher.card.config.med
  ids, mask = matcher.tokenizer.encode([TEXT], 20)
  ids = ids[0, : mask.sum()]
  ids[0] = config.tokens.enc
  tokens = image_tokens(matcher, images[0])
  arguments = params["text_encoder"], config.num_heads, ids, tokens
  _, attention = plain_text_tower.hidden_states(*arguments)

  def score(given):
    hidden, _ = plain_text_tower.hidden_states(*arguments, given={layer: given})
    return plain_text_tower.dense(params["itm_head"], hidden[0])[1]

  assert found.words == tuple(TEXT.split())
  assert found.maps.shape == (8, 2, 2) and found.whole.shape == (2, 2)
  expected = [
    expected_map(score, attention[layer], row, heads, shares).reshape(2, 2)
    for row in range(9)
  ]
  assert expected[0].max() > 1e-4
  assert (np.max(expected[1:]) > 1e-4) == (layer < 2)
  close = dict(rtol=2e-3, atol=1e-6)
  np.testing.assert_allclose(found.whole, expected[0], **close)
  np.testing.assert_allclose(found.maps, expected[1:], **close)


def test_maps_of_a_caption_are_finite_differences(captioner, images):
  layer = 1
  (caption,) = captioner.caption(
    images[0], explain=True, layer=layer, sample=True, seed=1
  )
  found, config = caption.explanation, captioner.card.config.med
  prompt = captioner.tokenizer.prompt_ids("a picture of ")
  generated, _ = captioner.tokenizer.encode([caption.text], 20)
  ids = np.array([*prompt, *generated[0, 1:]])
  ids = ids[: len(prompt) + len(caption.tokens)]
  assert captioner.tokenizer.pieces(ids[len(prompt) :].tolist()) == [
    *caption.tokens
  ]
  params = float64(captioner.params)["text_decoder"]
  tokens = image_tokens(captioner, images[0])
  arguments = params, config.num_heads, ids, tokens, True
  _, attention = plain_text_tower.hidden_states(*arguments)
  words = [token for token in caption.tokens if token != "[SEP]"]
  expected = []
  for position in range(len(prompt), len(prompt) + len(words)):

    def score(given, position=position):
      hidden, _ = plain_text_tower.hidden_states(
        *arguments, given={layer: given}
      )
      log_probs = plain_text_tower.log_probs(params, hidden[position - 1])
      return log_probs[ids[position]]

    expected.append(expected_map(score, attention[layer], position - 1, [0, 1]))
  expected = np.array(expected).reshape(-1, 2, 2)
  assert expected.max() > 1e-3
  assert found.words == tuple(words)
  np.testing.assert_allclose(found.maps, expected, rtol=2e-3, atol=1e-6)
  np.testing.assert_allclose(
    found.whole, found.maps.mean(axis=0), rtol=1e-5, atol=1e-7
  )


def test_every_caption_has_an_explanation(captioner, images):
  """Also further ones, in any batch, and without changing the captions."""
  options = dict(num_return_sequences=2, num_beams=3)
  plain = captioner.caption(images, **options)
  explained = captioner.caption(images, explain=True, batch_size=2, **options)
  texts = lambda found: [(c.text, c.others[0].text) for c in found]
  assert texts(plain) == texts(explained)
  assert plain[0].explanation is None
  (alone,) = captioner.caption(images[1], explain=True, **options)
  for one, other in zip(
    (alone, *alone.others), (explained[1], *explained[1].others), strict=True
  ):
    assert one.explanation.words == other.explanation.words
    np.testing.assert_allclose(
      one.explanation.maps, other.explanation.maps, rtol=1e-3, atol=1e-6
    )
    assert " ".join(one.explanation.words).split() == one.text.split()


def test_a_mesh_gives_the_same_maps(images):
  alone = helpers.make_model("retrieval", text_depth=3)
  mesh = jax.make_mesh((4, 2), ("data", "tensor"))
  shared = helpers.make_model("retrieval", sharding.as_mesh(mesh), text_depth=3)
  one, other = (m.explain(images[0], TEXT) for m in (alone, shared))
  np.testing.assert_allclose(one.maps, other.maps, rtol=1e-3, atol=1e-6)


def test_pieces_of_a_word_are_joined(matcher, images):
  """Letters that no word of the vocabulary has become one word."""
  found = matcher.explain(images[0], "Red!! xyz Circle")
  assert found.words == ("red", "xyz", "circle")
  assert len(matcher.tokenizer.encode(["xyz"], 9)[0][0].nonzero()[0]) > 3


def test_words_are_found_wherever_they_occur(matcher, images):
  found = matcher.explain(images[0], TEXT)
  red, circle = found.maps[1], found.maps[2]
  np.testing.assert_allclose(found.map("Red circle"), (red + circle) / 2)
  np.testing.assert_allclose(
    found.map("a"), (found.maps[0] + found.maps[5]) / 2
  )
  assert found.map() is found.whole
  for words in ("red star", "", "circle red"):
    with pytest.raises(ValueError, match="expected some of 'a red circle left"):
      found.map(words)
  assert repr(found) == f"Explanation({TEXT!r}, maps=[8, 2, 2])"


def test_a_special_token_that_a_model_generated_is_a_word(matcher, images):
  found = matcher.explain(images[0], TEXT)
  words = ("[MASK]", *found.words[1:])
  found = saliency.Explanation(words, found.maps, found.whole, found.pixels)
  np.testing.assert_array_equal(found.map("[MASK]"), found.maps[0])


def test_overlays_colour_where_the_map_is(matcher, images, tmp_path):
  found = matcher.explain(images[0], TEXT)
  maps = np.zeros((8, 2, 2), np.float32)
  maps[1, 0, 1] = 3.0
  found = saliency.Explanation(found.words, maps, maps[0], found.pixels)
  drawn = found.overlay("red", side=64)
  assert drawn.shape == (64, 64, 3) and drawn.dtype == np.uint8
  plain = found.overlay("circle", side=64)  # a map of zeros
  changed = np.abs(drawn.astype(int) - plain).sum(axis=-1)
  assert changed[8:24, 40:56].min() > 50 and changed[48:, :16].max() < 10
  np.testing.assert_array_equal(plain[::4, ::4], found.pixels)
  wide = np.zeros((30, 90, 3), np.uint8)
  assert found.overlay("red", wide, 180).shape == (60, 180, 3)
  found.save(tmp_path / "one.png", "red circle")
  found.save(tmp_path / "deeper" / "sheet.png", image=PIL.Image.fromarray(wide))
  assert PIL.Image.open(tmp_path / "one.png").size == (384, 384)
  assert PIL.Image.open(tmp_path / "deeper" / "sheet.png").width > 1000


def test_what_cannot_be_explained(matcher, captioner, images, tmp_path):
  (tmp_path / "a.png").write_bytes(b"nothing")
  refused = [
    (dict(layer=3), "layer: expected one of 0 to 2, found 3"),
    (dict(layer=-1), "layer: expected one of 0 to 2, found -1"),
    (dict(heads=[0, 2]), r"heads: expected some of 0 to 1, found \[0, 2\]"),
    (dict(heads=[]), r"heads: expected some of 0 to 1, found \[\]"),
  ]
  for options, message in refused:
    with pytest.raises(ValueError, match=message):
      matcher.explain(images[0], TEXT, **options)
    with pytest.raises(ValueError, match=message):
      captioner.caption(images[0], explain=True, **options)
  for image, text, message in [
    (images[0], "!!!", "text 0: "),
    (tmp_path / "a.png", TEXT, "image 0, .*a.png: not_an_image"),
    (tmp_path / "gone.png", TEXT, "image 0: .*gone.png"),
    ("http://127.0.0.1/a.png", TEXT, "set urls=True"),
  ]:
    with pytest.raises(ValueError, match=message):
      matcher.explain(image, text)
  with pytest.raises(ValueError, match=r"cannot explain a match.*Load"):
    captioner.explain(images[0], TEXT)
  with pytest.raises(ValueError, match="explain: of images; leave out"):
    captioner.caption([images], explain=True, num_frames=2)
  with pytest.raises(ValueError, match="set explain=True"):
    captioner.caption(images[0], layer=1)


def test_the_middle_layer_is_the_default():
  """The seventh of twelve, and never the last, where words have no maps."""
  base = helpers.MED.__class__(10, width=4, depth=12, num_heads=2, mlp_dim=4)
  chosen = saliency.where(base)
  assert (chosen.layer, chosen.whole) == (6, 11)
  two = helpers.MED.__class__(10, width=4, depth=2, num_heads=2, mlp_dim=4)
  chosen = saliency.where(two, heads=[1])
  assert (chosen.layer, chosen.whole) == (0, 1)
  assert chosen.heads.tolist() == [0, 1]
