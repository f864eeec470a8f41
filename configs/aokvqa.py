"""A-OKVQA: questions that need knowledge, from a model for VQA v2.

  python -m blip_jax.main --config configs/aokvqa.py --workdir W

Data: `aokvqa_v1p0_{train,val,test}.json` as published, and COCO's images of
2017.  `test_answers.json` has the direct answers as the leaderboard reads them;
the choices of its other setting are not ranked.  Answers are generated.  Not
run here; the rates are ours, not the paper's, which has no such experiment.
"""

from blip_jax.tasks import vqa


def get_config():
  config = vqa.continued()
  source = "data/aokvqa_v1p0_{0}.json?image_file={0}2017/{{image_id:012}}.jpg"
  config.data.train = (source.format("train"),)
  config.data.image_root = "data/images"
  for name in ("val", "test"):
    split = config.evals[name]
    split.source = source.format(name)
    split.image_root = "data/images"
    split.format = "aokvqa"
  return config
