"""The released checkpoints: where they are, and what they are.

A file of weights does not say what it was trained for. Loaded as another task
or at another size it fails without an error ("dai dai dai"), so each row has
what its checkpoint was made with, and a note where that surprises.
"""

import dataclasses
import difflib
from typing import Any

TASKS = ("pretrain", "caption", "vqa", "retrieval", "itm", "nlvr")

# How the original decodes: configs/caption_coco.yaml and models/blip_vqa.py.
# The lengths are in tokens and count the prompt, [DEC] and [SEP].
GENERATION = {
  "caption": dict(
    num_beams=3, max_length=20, min_length=5, repetition_penalty=1.0
  ),
  "vqa": dict(num_beams=3, max_length=10, min_length=1),
}

# The original's captioners never saw a caption without it.
PROMPT = "a picture of "

_ORIGINAL = (
  "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
)


@dataclasses.dataclass(frozen=True)
class Released:
  """One released checkpoint.

  Attributes:
    name: of the original's file without .pth, or of the repository on the
      Hugging Face hub.
    source: URL of the file, or again the repository.
    task: one of TASKS.
    variant: "base" or "large", a key of `models.config.VARIANTS`.
    image_size: pixels a side that the position embeddings are made for.
    prompt: what a caption starts with; "" starts from [DEC] alone.
    sha256: of the file, the first and the last digits as far as they are known.
    note: what whoever loads it should be told; "" if nothing surprises.
  """

  name: str
  source: str
  task: str
  variant: str
  image_size: int
  prompt: str = ""
  sha256: tuple[str, str] | None = None
  note: str = ""

  @property
  def generation(self) -> dict[str, Any]:
    """What to decode with by default; empty if it was not made to decode."""
    return dict(GENERATION.get(self.task, {}))

  def has_digest(self, digest: str) -> bool:
    """Whether a SHA-256 in hexadecimal is what is known of the file's."""
    first, last = self.sha256 or ("", "")
    return digest.startswith(first) and digest.endswith(last)


def find(name: str) -> Released | None:
  """The checkpoint of a name (with or without .pth) or URL, if it is one."""
  return RELEASED.get(name.removeprefix(_ORIGINAL).removesuffix(".pth"))


def nearest(name: str) -> list[str]:
  """Up to three names that could have been meant, the likeliest first."""
  names = {_last_part(known): known for known in RELEASED}
  close = difflib.get_close_matches(_last_part(name), names)
  return [names[part] for part in close]


def _last_part(name: str) -> str:
  return name.rsplit("/", 1)[-1].removesuffix(".pth").lower()


def _pretrained(name: str, variant: str, captioner: str, **known) -> Released:
  # 74.3 and 109.6: NoCaps, overall CIDEr, of model_base_capfilt_large and of
  # the captioner fine-tuned from it.
  note = (
    f"{name} is only pre-trained. To fine-tune, start from it; as a captioner "
    f"it is poor (CIDEr 74 on NoCaps instead of 110): use {captioner}"
  )
  return Released(
    name, f"{_ORIGINAL}{name}.pth", "pretrain", variant, 224, note=note, **known
  )


def _finetuned(
  name: str, task: str, variant: str, image_size: int = 384
) -> Released:
  prompt = PROMPT if task == "caption" else ""
  source = f"{_ORIGINAL}{name}.pth"
  return Released(name, source, task, variant, image_size, prompt)


def _on_hub(name: str, task: str, variant: str, note: str = "") -> Released:
  name = f"Salesforce/{name}"
  return Released(name, name, task, variant, 384, note=note)


_HUB_CAPTION_NOTE = (
  "Salesforce/blip-image-captioning-base was converted from "
  "model_base_capfilt_large, which is only pre-trained. For the paper's "
  "captions use model_base_caption_capfilt_large"
)
_HUB_VQA_NOTE = (
  "Salesforce/{} was converted at 384 pixels; the original answers at 480, "
  "and the position embeddings cannot be scaled back. For the paper's "
  "answers use model_vqa or model_base_vqa_capfilt_large"
)

_ROWS = (
  _pretrained("model_base_14M", "base", "model_base_caption_capfilt_large"),
  _pretrained("model_base", "base", "model_base_caption_capfilt_large"),
  _pretrained(
    "model_base_capfilt_large",
    "base",
    "model_base_caption_capfilt_large",
    # As a user saw it (salesforce/BLIP issue 99), abridged; no other is known.
    sha256=("8f518745", "a0b235f"),
  ),
  _pretrained("model_large", "large", "model_large_caption"),
  _finetuned("model_base_retrieval_coco", "retrieval", "base"),
  _finetuned("model_large_retrieval_coco", "retrieval", "large"),
  _finetuned("model_base_retrieval_flickr", "retrieval", "base"),
  _finetuned("model_large_retrieval_flickr", "retrieval", "large"),
  _finetuned("model_base_caption_capfilt_large", "caption", "base"),
  _finetuned("model_large_caption", "caption", "large"),
  _finetuned("model_vqa", "vqa", "base", 480),
  _finetuned("model_base_vqa_capfilt_large", "vqa", "base", 480),
  _finetuned("model_base_nlvr", "nlvr", "base"),
  _on_hub("blip-image-captioning-base", "caption", "base", _HUB_CAPTION_NOTE),
  _on_hub("blip-image-captioning-large", "caption", "large"),
  _on_hub(
    "blip-vqa-base", "vqa", "base", _HUB_VQA_NOTE.format("blip-vqa-base")
  ),
  _on_hub(
    "blip-vqa-capfilt-large",
    "vqa",
    "base",
    _HUB_VQA_NOTE.format("blip-vqa-capfilt-large"),
  ),
  _on_hub("blip-itm-base-coco", "itm", "base"),
  _on_hub("blip-itm-large-coco", "itm", "large"),
  _on_hub("blip-itm-base-flickr", "itm", "base"),
  _on_hub("blip-itm-large-flickr", "itm", "large"),
)

RELEASED: dict[str, Released] = {row.name: row for row in _ROWS}
