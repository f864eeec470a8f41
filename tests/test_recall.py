"""Recall@k: by hand, by sorting, with ties, and refusals."""

import itertools

import numpy as np
import pytest

from blip_jax.evaluators.scores import recall as recall_lib


def argsort_recall(sim_i2t, sim_t2i, text_to_image):
  """Ranks by sorting, as one would explain it: slow, and blind to ties."""

  def ranks(sim, right):
    for row, own in zip(sim, right, strict=True):
      order = list(np.argsort(-row, kind="stable"))
      yield min(order.index(candidate) for candidate in own)

  texts_of = [np.flatnonzero(text_to_image == i) for i in range(len(sim_i2t))]
  i2t = np.array(list(ranks(sim_i2t, texts_of)))
  t2i = np.array(list(ranks(sim_t2i, [[i] for i in text_to_image])))
  scores = {}
  for name, rank in (("txt", i2t), ("img", t2i)):
    values = [100 * np.mean(rank < k) for k in (1, 5, 10)]
    scores |= zip([f"{name}_r{k}" for k in (1, 5, 10)], values, strict=True)
    scores[f"{name}_r_mean"] = np.mean(values)
  scores["r_mean"] = (scores["txt_r_mean"] + scores["img_r_mean"]) / 2
  return scores


def test_worked_example_with_several_texts_per_image():
  # Texts:      a0  a1  b0  b1  b2  c0  c1
  sim_i2t = np.array(
    [
      [0.2, 0.9, 0.1, 0.3, 0.0, 0.5, 0.4],  # a1 first
      [0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.0],  # b0 third
      [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],  # c0 sixth
    ]
  )
  sim_t2i = np.array(
    [
      [0.9, 0.1, 0.2],  # right
      [0.3, 0.8, 0.1],
      [0.1, 0.5, 0.3],  # right
      [0.1, 0.5, 0.3],  # right
      [0.6, 0.5, 0.3],
      [0.0, 0.1, 0.2],  # right
      [0.3, 0.2, 0.1],
    ]
  )
  scores = recall_lib.recall(sim_i2t, sim_t2i, np.array([0, 0, 1, 1, 1, 2, 2]))
  assert scores == pytest.approx(
    {
      "txt_r1": 100 / 3,
      "txt_r5": 200 / 3,
      "txt_r10": 100.0,
      "txt_r_mean": 200 / 3,
      "img_r1": 400 / 7,
      "img_r5": 100.0,
      "img_r10": 100.0,
      "img_r_mean": (400 / 7 + 200) / 3,
      "r_mean": (200 / 3 + (400 / 7 + 200) / 3) / 2,
    }
  )
  assert all(type(value) is float for value in scores.values())


@pytest.mark.parametrize("seed", range(5))
def test_recall_equals_sorting_on_random_matrices(seed):
  rng = np.random.default_rng(seed)
  images = int(rng.integers(1, 40))
  extra = rng.integers(0, images, int(rng.integers(0, 80)))
  text_to_image = rng.permutation(np.concatenate([np.arange(images), extra]))
  shape = (images, len(text_to_image))
  sim_i2t = rng.normal(size=shape).astype(np.float32)
  sim_t2i = rng.normal(size=shape[::-1]).astype(np.float32)
  assert recall_lib.recall(sim_i2t, sim_t2i, text_to_image) == pytest.approx(
    argsort_recall(sim_i2t, sim_t2i, text_to_image)
  )


def test_ties_score_the_mean_over_all_their_orders():
  rng = np.random.default_rng(0)
  text_to_image = np.array([0, 1, 0, 2, 1, 2, 0])
  sim_i2t = rng.integers(0, 3, (3, 7)).astype(float)
  sim_t2i = rng.integers(0, 2, (7, 3)).astype(float)
  found = []
  for order in itertools.permutations(range(7)):
    # Adding less than any gap puts tied texts, and tied images, in an order.
    nudge = np.array(order) * 1e-3
    found.append(
      argsort_recall(sim_i2t + nudge, sim_t2i + nudge[:3], text_to_image)
    )
  mean = {key: np.mean([f[key] for f in found]) for key in found[0]}
  assert recall_lib.recall(sim_i2t, sim_t2i, text_to_image) == pytest.approx(
    mean
  )


def test_constant_scores_give_chance_wherever_the_answers_are():
  for text_to_image in (np.arange(50), np.arange(50)[::-1].copy()):
    constant = np.full((50, 50), 0.25, np.float32)
    scores = recall_lib.recall(constant, constant, text_to_image)
    for direction in ("txt", "img"):
      for k in (1, 5, 10):
        assert scores[f"{direction}_r{k}"] == pytest.approx(100 * k / 50)


def test_answers_outside_a_short_list_are_not_found():
  # Re-ranking leaves everything outside the shortlist at one low score.
  sim = np.full((30, 30), -100.0)
  for i in range(30):
    sim[i, [(i + j) % 30 for j in range(1, 13)]] = np.linspace(0, 1, 12)
  scores = recall_lib.recall(sim, sim, np.arange(30))
  assert scores["r_mean"] == 0


def test_nan_is_refused():
  sim = np.eye(3)
  broken = sim.copy()
  broken[1] = np.nan
  with pytest.raises(ValueError, match=r"sim_t2i has NaN in 1 of 3.* row 1"):
    recall_lib.recall(sim, broken, np.arange(3))


def test_image_without_text_is_refused():
  with pytest.raises(ValueError, match="Image 1 has no text among the 3"):
    recall_lib.recall(np.eye(3), np.eye(3), np.array([0, 2, 2]))


def test_video_recall_has_both_names_of_a_direction():
  """Three videos: text 1 ranks its video last; text 2 ties with another."""
  sim_t2v = np.array([[3, 1, 2], [3, 1, 2], [0, 1, 1]], np.float32)
  scores = recall_lib.video_recall(sim_t2v.T, sim_t2v, np.arange(3))
  assert scores["vid_r1"] == scores["t2v_r1"] == pytest.approx(50)
  assert scores["txt_r1"] == scores["v2t_r1"]
  # Ranks 1, 3 and 1.5.
  assert scores["vid_mdR"] == scores["t2v_mdR"] == 1.5
  image_scores = recall_lib.recall(sim_t2v.T, sim_t2v, np.arange(3))
  assert scores["vid_r_mean"] == image_scores["img_r_mean"]
  assert scores["r_mean"] == image_scores["r_mean"]
  assert not any(name.startswith("img") for name in scores)
