"""An endpoint like OpenAI's: captions, answers and embeddings over HTTP.

  python -m blip_jax.main --config configs/serve.py --config.model=NAME_OR_PATH

Needs the extra [serve]. It compiles its programs first, then listens at
http://127.0.0.1:8000/v1. Without a model it takes that of the quick start, from
runs/quickstart, and trains it first if it is not there. Ctrl-C or SIGTERM ends
it, after what it has taken.

Useful: several models, as in `--config.model="('model_base_vqa_capfilt_large',
'model_base_retrieval_coco')"`; `BLIP_JAX_SERVE_TOKEN=SECRET` in the
environment, which clients then have to show.
"""

from blip_jax import defaults


def get_config():
  return defaults.serve()
