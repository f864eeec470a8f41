"""Which evaluators a held-out split gets."""

import json

import numpy as np
import pytest
from PIL import Image

from blip_jax import defaults
from blip_jax.evaluators import (
  base,
  held_out_loss,
  itm_accuracy,
  ranking,
  retrieval_suite,
  samples,
)
from blip_jax.tasks import retrieval
from tests.colour_task import (
  COLOURS,
  ColourImages,
  ColourTask,
  colour_split,
  evaluate,
)


def context(tmp_path, **changes):
  split = colour_split(ColourImages())
  for colour, record in zip(COLOURS, split.source, strict=True):
    Image.fromarray(np.asarray(record["image"])).save(
      tmp_path / f"{colour}.png"
    )
  rows = [{"image": f"{c}.png", "caption": c} for c in COLOURS]
  (tmp_path / "val.json").write_text(json.dumps(rows))
  settings = defaults.ranked_split(str(tmp_path / "val.json"))
  settings.image_root = str(tmp_path)
  settings.update(changes)
  config = retrieval.defaults()
  config.evals.batch_size = 8
  return base.Context(
    "val",
    settings,
    config,
    ColourTask(),
    split.example,
    split.mesh,
    split.bad_samples,
    str(tmp_path),
  )


RANKED = [ranking.Ranking, itm_accuracy.ItmAccuracy]


@pytest.mark.parametrize(
  "changes, expected",
  [
    ({}, RANKED),
    ({"samples": 2}, [*RANKED, samples.Samples]),
    ({"num_frames": 4}, RANKED[:1]),
    ({"num_frames": 4, "samples": 2}, RANKED[:1]),
  ],
)
def test_evaluators_of_a_split(tmp_path, changes, expected):
  made = retrieval_suite.build(context(tmp_path, **changes))
  assert [*map(type, made)] == expected
  made = retrieval_suite.build_with_losses(context(tmp_path, **changes))
  assert [*map(type, made)] == [held_out_loss.HeldOutLoss, *expected]


def test_evaluators_measure_their_split(tmp_path):
  ranker, itm, sheet = retrieval_suite.build(context(tmp_path, samples=2))
  metrics = evaluate(ranker)
  assert metrics["txt_r1"] == metrics["r_mean"] == 100
  assert evaluate(itm) == {"itm_acc": 100.0}
  assert evaluate(sheet) == {"caption_exact": 100.0}
  assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("k_test", [0, 3])
def test_the_number_to_re_rank_is_that_of_the_split(tmp_path, k_test):
  ranker, *_ = retrieval_suite.build(context(tmp_path, k_test=k_test))
  assert ranker._k_test == k_test
