"""What CapFilt is worth: the paper's Table 1 in miniature, on Scenes.

  python -m blip_jax.main --config configs/bootstrap.py

A tiny model learns from rendered scenes of which two in five have a text as the
web has them: a near miss, one that says little, boilerplate, a file's name, or
one of another picture.  It becomes a captioner and a filter, apart from each
other, on a few clean pairs.  They clean the noisy ones, and four models learn
from scratch: on them as they were, filtered, captioned, and both.  As the truth
of every picture is known, every step is measured.

Needs no download.  See WORKDIR/table.md and WORKDIR/results.json.
"""

from blip_jax import defaults
from blip_jax.capfilt import bootstrap

WIDTH = 32  # pixels a side
STEPS = 2000


def get_config():
  config = bootstrap.defaults()
  config.web = "scenes:train?num=3000&noise=0.4&junk=web&seed={seed}"
  config.clean = "scenes:train?num=1000&seed=1{seed:03d}"
  test = "scenes:test?num=500"

  _tiny(config.pretrain)
  own = config.pretrain
  own.num_steps = STEPS
  own.optim.steps_per_epoch = STEPS
  own.pretrain.queue_size = 512
  own.pretrain.ema_decay = 0.98
  own.pretrain.alpha = 0.1
  own.pretrain.alpha_ramp_epochs = 1.0
  own.pretrain.loss_weights = (0.5, 1.0, 4.0)
  own.evals.test = defaults.ranked_split(test)
  own.evals.test.samples = 24

  _tiny(config.captioner)
  own = config.captioner
  own.num_steps = 1000
  own.optim.lr = 3e-4
  own.caption.prompt = ""
  own.generation.min_length = 0
  own.evals.test.source = test

  _tiny(config.filter)
  own = config.filter
  own.num_steps = 1000
  own.optim.lr = 3e-4
  own.retrieval.queue_size = 512
  own.retrieval.ema_decay = 0.98
  own.retrieval.alpha = 0.1
  own.evals.test.source = test

  own = config.capfilt
  own.dtype = "float32"
  own.per_device_batch_size = 32
  own.generation.min_length = 0
  own.generation.max_length = 18
  own.generation.repetition_penalty = 1.0
  return config


def _tiny(own):
  """What all stages have in common, as in `quickstart.py`."""
  own.batch_size = 16
  own.tokenizer = "scenes"
  own.log_every_steps = 200
  own.model.variant = "tiny"
  own.model.image_size = WIDTH
  own.model.dropout = 0.0
  own.model.dtype = "float32"
  own.data.augment = False  # a flip would make "left" untrue
  own.data.max_words = 20
  own.data.max_length = 18
  own.optim.schedule = "cosine"
  own.optim.lr = 1e-3
  own.optim.min_lr = 2e-5
  own.optim.warmup_lr = 0.0
  own.optim.warmup_steps = 100
  own.optim.betas = (0.9, 0.98)
  own.evals.batch_size = 500  # as many captions are judged
