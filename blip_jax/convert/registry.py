"""The released checkpoints: where they are, and what they hold.

A file of weights does not say what it was trained for. Loaded as another task
or at another image size it fails without an error (captions become "dai dai
dai"), so each row says what its checkpoint should hold, which is compared with
the file when it is opened, and has a note where the checkpoint surprises.
"""

import dataclasses
import difflib

from blip_jax.models import config as model_config

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
    task: the family of its parameters, one of `models.families.FAMILIES`.
    variant: "base" or "large", a key of `models.config.VARIANTS`.
    image_size: side of the (square) images in pixels, for which the position
      embeddings were trained.
    sha256: of the file: its first and last hexadecimal digits, as many as are
      known.
    note: what a user should know before loading it; "" if nothing surprises.
  """

  name: str
  source: str
  task: str
  variant: str
  image_size: int
  sha256: tuple[str, str] = ("", "")
  note: str = ""

  def has_digest(self, digest: str) -> bool:
    """Whether a hexadecimal SHA-256 agrees with the known digits."""
    first, last = self.sha256
    return digest.startswith(first) and digest.endswith(last)

  def mismatch(self, family: str, config: model_config.BlipConfig) -> str:
    """Compares this row with what a file of this name holds.

    Args:
      family: of the parameters in the file.
      config: of the model in the file.

    Returns:
      A warning that says what was expected and found; "" if both agree.
    """
    tower, side = model_config.VARIANTS[self.variant]["vit"], self.image_size
    expected = (
      f"{self.task} model, ViT with {tower['depth']} layers of width "
      f"{tower['width']}, images of {side} x {side} pixels"
    )
    vit = config.vit
    # What a retrieval checkpoint holds beyond ITM serves training only.
    if (self.task, family) == ("retrieval", "itm"):
      family = "retrieval"
    found = (
      f"{family} model, ViT with {vit.depth} layers of width {vit.width}, "
      f"images of {vit.image_size[0]} x {vit.image_size[1]} pixels"
    )
    if found == expected:
      return ""
    return (
      f"{self.name}: expected a {expected}; found a {found}. If this is not "
      "the released file, give it another name; if it is, fetch it again"
    )


def find(name: str) -> Released | None:
  """Finds a released checkpoint by its name, with or without .pth, or URL."""
  return RELEASED.get(name.removeprefix(_ORIGINAL).removesuffix(".pth"))


def nearest(name: str) -> list[str]:
  """Up to three released names similar to `name`, the most similar first."""
  names = {_last_part(known): known for known in RELEASED}
  close = difflib.get_close_matches(_last_part(name), names)
  return [names[part] for part in close]


def _last_part(name: str) -> str:
  return name.rsplit("/", 1)[-1].removesuffix(".pth").lower()


def _pretrained(
  name: str,
  variant: str,
  captioner: str,
  sha256: tuple[str, str] = ("", ""),
) -> Released:
  # 74.3 and 109.6: NoCaps, overall CIDEr, of model_base_capfilt_large and of
  # the captioner fine-tuned from it.
  note = (
    f"{name} is only pre-trained. To fine-tune, start from it; as a captioner "
    f"it is poor (CIDEr 74 on NoCaps instead of 110): use {captioner}"
  )
  source = f"{_ORIGINAL}{name}.pth"
  return Released(name, source, "pretrain", variant, 224, sha256, note)


def _finetuned(
  name: str, task: str, variant: str, image_size: int = 384
) -> Released:
  return Released(name, f"{_ORIGINAL}{name}.pth", task, variant, image_size)


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
    # Abridged, from salesforce/BLIP issue 99; the others are not known.
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
