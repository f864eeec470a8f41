"""A web page to try models: captions, questions, matches, search.

  python -m blip_jax.main --config configs/demo.py

Needs the extra [demo]. Then open http://127.0.0.1:7860. Without a model it
takes that of the quick start, from runs/quickstart, and trains it first if it
is not there, which takes some minutes. Ctrl-C ends it.

Useful: `--config.model=WORKDIR` or the name of a released checkpoint, also
several, as in `--config.model="('model_base_caption_capfilt_large',
'model_base_vqa_capfilt_large')"`; `--config.images=FOLDER` for your own images
to search; `--config.port=7861`; `--config.mcp` for tools by MCP.
"""

from blip_jax import defaults


def get_config():
  return defaults.demo()
