"""What CapFilt gains: the paper's Table 1 in miniature, on Scenes.

  python -m blip_jax.main --config configs/bootstrap.py

A tiny model is pre-trained on rendered scenes, two in five of which have a text
as it occurs on the web: nearly right, vague, boilerplate, a file name, or the
text of another image.  It is fine-tuned to a captioner and, separately, to a
filter on a few clean pairs.  These label the noisy pairs, and four models are
pre-trained from scratch: on the noisy pairs, on filtered ones, on captioned
ones, and on both.  As the true captions of every image are known, each step is
measured.

Needs no download.  See WORKDIR/table.md and WORKDIR/results.json.
"""

from blip_jax import defaults
from blip_jax.runtime.config import Config
from blip_jax.tasks import caption, pretrain, retrieval

WIDTH = 32  # pixels a side
STEPS = 2000


def get_config():
  config = Config(
    dict(
      job="bootstrap",
      seeds=(0, 1, 2),
      # Noisy pairs; {seed} is replaced by the seed.
      web="scenes:train?num=3000&noise=0.4&junk=web&seed={seed}",
      # Clean pairs, on which captioner and filter are fine-tuned.
      clean="scenes:train?num=1000&seed=1{seed:03d}",
      pretrain=pretrain.defaults(),
      captioner=caption.defaults(),
      filter=retrieval.defaults(),
      capfilt=defaults.capfilt(),
    )
  )
  test = "scenes:test?num=500"

  _tiny(config.pretrain)
  stage = config.pretrain
  stage.num_steps = STEPS
  stage.optim.steps_per_epoch = STEPS
  stage.pretrain.queue_size = 512
  stage.pretrain.ema_decay = 0.98
  stage.pretrain.alpha = 0.1
  stage.pretrain.alpha_ramp_epochs = 1.0
  stage.pretrain.loss_weights = (0.5, 1.0, 4.0)
  stage.evals.test = defaults.ranked_split(test)
  stage.evals.test.samples = 24

  _tiny(config.captioner)
  stage = config.captioner
  stage.num_steps = 1000
  stage.optim.lr = 3e-4
  stage.caption.prompt = ""
  stage.generation.min_length = 0
  stage.evals.test.source = test

  _tiny(config.filter)
  stage = config.filter
  stage.num_steps = 1000
  stage.optim.lr = 3e-4
  stage.retrieval.queue_size = 512
  stage.retrieval.ema_decay = 0.98
  stage.retrieval.alpha = 0.1
  stage.evals.test.source = test

  capfilt = config.capfilt
  capfilt.dtype = "float32"
  capfilt.per_device_batch_size = 32
  capfilt.generation.min_length = 0
  capfilt.generation.max_length = 18
  capfilt.generation.repetition_penalty = 1.0
  return config


def _tiny(config):
  """Settings shared by all stages, as in `quickstart.py`."""
  config.batch_size = 16
  config.tokenizer = "scenes"
  config.log_every_steps = 200
  config.model.variant = "tiny"
  config.model.image_size = WIDTH
  config.model.dropout = 0.0
  config.model.dtype = "float32"
  config.data.augment = False  # a flip would make "left" untrue
  config.data.max_words = 20
  config.data.max_length = 18
  config.optim.schedule = "cosine"
  config.optim.lr = 1e-3
  config.optim.min_lr = 2e-5
  config.optim.warmup_lr = 0.0
  config.optim.warmup_steps = 100
  config.optim.betas = (0.9, 0.98)
  config.evals.batch_size = 500
