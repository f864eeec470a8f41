"""Answers to questions about images or videos: a table, or a folder.

  python -m blip_jax.main --config configs/answer_images.py \
    --config.images=questions.csv --config.image_root=images \
    --config.out=answers.jsonl

The table has the columns `image` and `question`: CSV, JSON or JSON lines, or
the official files of VQA and GQA (docs/vqa.md).  Each question is a line of the
result: {"row", "id", "question", "answer", "prob", ...}, or {"row", "id",
"error"} if its image cannot be read.  The same command resumes a job that was
stopped; other settings are refused.

Useful: `--config.images=FOLDER --config.question="what is this?"` for the same
question about every image, `--config.answer_list=answers.txt` to choose from a
list, `--config.num_answers=5` for the runners-up, `--config.num_frames=8` for
videos (a column `video`), `--config.model=WORKDIR` for your own model.
"""

from blip_jax import defaults


def get_config():
  return defaults.answer_images()
