"""Numbers that are a promise: limits, parts in memory, formats, metrics.

Each row says what depends on the number. Code that reads it by name would agree
with any other value, so the values are here a second time.
"""

import zipfile

import pytest

from blip_jax.capfilt import (
  audit,
  findings,
  html,
  label,
  pair_files,
  text_table,
  worker,
)
from blip_jax.cli import config_help
from blip_jax.convert import (
  hub,
  model_configs,
  pickles,
  reader,
  tensor_files,
)
from blip_jax.data import (
  cells,
  folders,
  image_headers,
  image_limits,
  image_readers,
  json_index,
  loader,
  offsets,
  order,
  parquet,
  randaugment,
  rejects,
  schema,
  sources,
  tables,
  tar_headers,
  transforms,
)
from blip_jax.evaluators import ranking
from blip_jax.evaluators.scores import bleu, cider, ngrams, recall, rouge
from blip_jax.inference import (
  choosing,
  comparing,
  images,
  index,
  matching,
  scoring,
  search,
  urls,
)
from blip_jax.models import decoding, nlvr
from blip_jax.runtime import (
  contact_sheet,
  host,
  overrides,
  paths,
  progress,
  saved_arrays,
)
from blip_jax.tasks import losses, momentum

LIMITS = [
  # What users meet: input that is refused or cut off.
  (transforms, "MAX_PIXELS", 80_000_000),
  (transforms, "MAX_TEXT_BYTES", 100_000),
  (urls, "MAX_BYTES", 67_108_864),
  (urls, "MAX_SECONDS", 30.0),
  (urls, "MAX_REDIRECTS", 10),
  (image_limits, "MAX_BYTES", 536_870_912),
  (image_limits, "MAX_SIDE", 65_535),
  (image_limits, "MAX_SECONDS", 20.0),
  (image_limits, "MAX_MEMORY", 2_147_483_648),
  (image_headers, "MAX_SCANS", 64),
  (image_headers, "MAX_TIFF_VALUES", 262_144),
  (image_headers, "MAX_JPEG2000_BLOCKS", 131_072),
  (images, "MAX_NAMED", 20),
  (hub, "_TIMEOUT", 30),
  (reader, "_MAX_PICKLE_BYTES", 4_194_304),
  (
    reader,
    "_MAX_INFLATION",
    {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 100},
  ),
  (pickles, "_MAX_DIMS", 64),
  (pickles, "_MAX_ELEMENTS", 281_474_976_710_656),
  (tables, "_MAX_JOINED_BYTES", 262_144),
  (json_index, "_MAX_KEY_BYTES", 1000),
  (schema, "_SCHEMA_ROWS", 10_000),
  (cells, "_MAX_EXACT_FLOAT", 9_007_199_254_740_992),
  (order, "_MAX_TURNS", 10_000),
  (paths, "_MAX_STEM_BYTES", 190),
  (label, "_MAX_BAD_TEXT", 200),
  (text_table, "MAX_ROWS", 1_000_000),
  (findings, "_MAX_COUNTED_TEXTS", 2_000_000),
  # How much is listed in reports, and drawn.
  (rejects, "_MAX_LISTED", 1_000_000),
  (rejects, "_MAX_LOGGED", 20),
  (audit, "_MAX_LISTED", 50),
  (folders, "_MAX_ENDINGS", 10),
  (findings, "NUM_BINS", 20),
  (findings, "GALLERY_SIZE", 12),
  (findings, "NUM_FREQUENT", 20),
  (findings, "NUM_BAD_EXAMPLES", 5),
  (findings, "_NUM_CANDIDATES", 48),
  (findings, "_LOGIT_STEP", 0.0001),
  (findings, "_SMALLEST", 0.000000029802322387695312),
  (html, "THUMBNAIL", 160),
  (html, "_MAX_TEXT", 300),
  (html, "_MAX_DAMAGE", 20),
  (search, "SHEET_ROWS", 12),
  (search, "SHEET_COLUMNS", 6),
  (contact_sheet, "IMAGE", 192),
  (contact_sheet, "GAP", 16),
  (contact_sheet, "PADDING", 12),
  (contact_sheet, "FONT_SIZE", 15),
  (contact_sheet, "LINE_HEIGHT", 20),
  (contact_sheet, "MAX_LINES", 4),
  (contact_sheet, "INK", (32, 33, 36)),
  (contact_sheet, "FAINT", (110, 115, 122)),
  (contact_sheet, "GREEN", (18, 122, 58)),
  (contact_sheet, "RED", (196, 38, 38)),
  (contact_sheet, "PAGE", (238, 240, 243)),
  (contact_sheet, "CARD", (255, 255, 255)),
  (config_help, "_WIDTH", 96),
  (config_help, "_MAX_VALUE", 24),
  (progress, "_SECONDS_PER_LINE", 10.0),
  (overrides, "_MIN_SIMILARITY", 0.6),
  # What is in memory, or read, at a time: 16 MiB, 128 MiB, and so on.
  (offsets, "_CHUNK", 16_777_216),
  (offsets, "MIN_CACHED_BYTES", 67_108_864),
  (json_index, "_CHUNK", 16_777_216),
  (tar_headers, "_CHUNK", 1_048_576),
  (tar_headers, "MAX_NAME_BYTES", 65_536),
  (tar_headers, "MAX_PAX_BYTES", 1_048_576),
  (hub, "_CHUNK", 262_144),
  (saved_arrays, "PART_BYTES", 134_217_728),
  (parquet, "_LARGE_GROUP_BYTES", 134_217_728),
  (parquet, "_GROUPS_KEPT", 2),
  (host, "_PORTION", 134_217_728),
  (scoring, "BLOCK_BYTES", 1_073_741_824),
  (scoring, "TEXTS_AT_ONCE", 16),
  (scoring, "TOKENS", 8),
  (index, "PART", 4096),
  (loader, "_BATCHES_AHEAD", 2),
  (loader, "_MIN_SHARED_BYTES", 16_384),
  (sources, "INDEX_THREADS", 16),
  (label, "_BATCHES_AHEAD", 2),
  (label, "_OPENED_AHEAD", 8),
  (image_readers, "_TRIES", 2),
  (tensor_files, "_AHEAD", 4),
  (worker, "_BATCH_SIZE_CPU", 8),
  (worker, "_BATCH_SIZE", 64),
  (decoding, "POSITIONS_MULTIPLE", 8),
  # Formats: glibc's mallopt, zip, PyTorch's files, webdataset's shards.
  (host, "_M_TRIM_THRESHOLD", -1),
  (host, "_M_MMAP_THRESHOLD", -3),
  (host, "_LARGEST", 2_147_483_647),
  (tensor_files, "_ALIGNMENT", 64),
  (tensor_files, "_LOCAL_HEADER", 30),
  (tensor_files, "_ZIP64_FIELD", 20),
  (pair_files, "PAIRS_PER_SHARD", 10_000),
  (index, "NONE", -1),
  # The original's models and training.
  (model_configs, "HEAD_WIDTH", 64),
  (model_configs, "PUBLISHED_WIDTHS", (768, 1024)),
  (model_configs, "BERT_VOCAB", 30524),
  (nlvr, "FIRST_MERGING_LAYER", 6),
  (momentum, "NO_IMAGE", -100),
  (losses, "IGNORE", -100),
  (choosing, "MAX_WORDS", 30),
  (choosing, "CONTEXT_TOKENS", 40),
  (choosing, "MAX_TOKENS", 192),
  (choosing, "CANDIDATES_AT_ONCE", 64),
  (comparing, "MAX_WORDS", 40),
  (matching, "MAX_WORDS", 30),
  (matching, "MAX_TOKENS", 35),
  (ranking, "NOT_LISTED", -100.0),
  (randaugment, "MAX_MAGNITUDE", 10),
  (randaugment, "FILL", (128, 128, 128)),
  # Metrics as pycocoevalcap and the original compute them.
  (ngrams, "MAX_N", 4),
  (cider, "_SIGMA", 6.0),
  (rouge, "_BETA", 1.2),
  (bleu, "_TINY", 1e-15),
  (bleu, "_SMALL", 1e-9),
  (recall, "KS", (1, 5, 10)),
]


@pytest.mark.parametrize(
  "module, name, value",
  LIMITS,
  ids=[f"{m.__name__.removeprefix('blip_jax.')}.{n}" for m, n, _ in LIMITS],
)
def test_a_promised_number_stays(module, name, value):
  assert getattr(module, name) == value
