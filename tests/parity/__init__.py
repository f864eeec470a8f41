"""Every case of the goldens, computed by this package.

A case is a function that gives this package the inputs that the original had,
and compares the outputs.  Sizes, texts, settings and the number of steps are
those of the manifest.
"""

import traceback
from collections.abc import Callable
from typing import Any

from tests.parity import (
  formulas,
  goldens,
  loading,
  models,
  momentum,
  towers,
  verdicts,
)
from tests.parity.goldens import Golden

CASES: dict[str, Callable[[Golden], Any]] = {
  "lr_schedules": formulas.lr_schedules,
  "tokenizer_tiny": formulas.tokenizer_tiny,
  goldens.BERT: formulas.bert_tokenizer,
  "image_preprocess": formulas.image_preprocess,
  "randaugment": formulas.randaugment_ops,
  "vit": towers.image_tower,
  "med": towers.text_tower,
  "blip_base": models.blip_base,
  "blip_itm": models.blip_itm,
  "blip_decoder": models.blip_decoder,
  "blip_vqa": models.blip_vqa,
  "blip_nlvr": models.blip_nlvr,
  "blip_nlvr_deep": models.blip_nlvr,
  "blip_pretrain": momentum.blip_pretrain,
  "pretrain_2rank": momentum.pretrain_2rank,
  "blip_retrieval": momentum.blip_retrieval,
  "blip_retrieval_allrank": momentum.blip_retrieval,
  "retrieval_2rank": momentum.blip_retrieval,
  "retrieval_eval": models.retrieval_eval,
  "loading": loading.loading,
  "hf_caption": models.hf_caption,
  "hf_retrieval": models.hf_retrieval,
  "hf_vqa": models.hf_vqa,
}


def run(
  folder: goldens.Folder, case: str | None = None
) -> list[verdicts.Check]:
  """Runs one case of a folder, or all of them."""
  if case is not None:
    return _run_case(folder, case)
  checks = [check for name in folder.cases for check in _run_case(folder, name)]
  unused = [
    verdicts.Check("folder", file, verdicts.MISSING, note="no case uses it")
    for file in folder.unopened()
  ]
  return checks + unused


def _run_case(folder: goldens.Folder, name: str) -> list[verdicts.Check]:
  if name not in folder.cases or name not in CASES:
    where = "the manifest" if name not in folder.cases else "tests/parity"
    why = f"{where} has no such case"
    return [verdicts.Check(name, "case", verdicts.FAIL, note=why)]
  golden = folder.golden(name)
  try:
    CASES[name](golden)
  # Any exception fails this case; the other cases still run.
  except Exception as error:
    traceback.print_exc()
    golden.fail(f"{type(error).__name__}: {error}")
  return [*golden.checks, *golden.missing()]
