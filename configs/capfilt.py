"""CapFilt: a captioner adds captions to a noisy collection, a filter cleans it.

  python -m blip_jax.main --config configs/capfilt.py \
    --config.source='shards/*.tar' --config.out=cleaned

captions every image and scores every text, once: OUT gets a .parquet per shard
with a row per text.  Start it on any number of hosts that share the folder; the
same command resumes a job that was stopped.  Then, in seconds and as often as
you like,

  python -m blip_jax.main --config configs/capfilt.py --config.job=merge \
    --config.out=cleaned --config.merge.out=clean --config.merge.threshold=0.5

writes a new training set for `--config.data.train='clean/*.tar'`, and
`--config.job=report` shows what is kept and why.  `--config.job=status` says
how far a job is, and `verify` whether all of its files are intact.
"""

from blip_jax import defaults


def get_config():
  return defaults.capfilt()
