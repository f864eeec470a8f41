"""VizWiz: questions of blind people, from a model for VQA v2.

  python -m blip_jax.main --config configs/vizwiz.py --workdir W

Data: the official `{train,val,test}.json` and the images, all in one folder,
`data/vizwiz/images`.  `test_answers.json` is what the server reads.  Answers
are generated.  "unanswerable" is one of the answers that it is trained on.  Not
run here; the rates are ours, not the paper's, which has no such experiment.
"""

from blip_jax.tasks import vqa


def get_config():
  config = vqa.continued()
  config.data.train = ("data/vizwiz/train.json",)
  config.data.image_root = "data/vizwiz/images"
  for name in ("val", "test"):
    split = config.evals[name]
    split.source = f"data/vizwiz/{name}.json"
    split.image_root = "data/vizwiz/images"
    split.format = "vizwiz"
  return config
