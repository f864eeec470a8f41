"""Data of every form in an object store: the records are those of a disk."""

import datetime
import io
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from blip_jax.data import datasets, examples, loader, sources, transforms
from blip_jax.runtime import buckets, copies, files
from tests import helpers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Data of all forms, on a disk."""
  folder = tmp_path_factory.mktemp("data")
  helpers.write_pairs(folder)
  pairs = files.read_json(folder / "train.json")
  lines = [f"{pair['image']}\t{pair['caption']}" for pair in pairs]
  files.write_text(folder / "x.tsv", "\n".join(["image\tcaption", *lines]))
  lines = [f"{pair['image']}#0\t{pair['caption']}" for pair in pairs]
  files.write_text(folder / "x.token", "\n".join(lines) + "\n")
  rows = [files.json.dumps(pair) for pair in pairs]
  files.write_text(folder / "x.jsonl", "\n".join(rows) + "\n")
  files.write_text(folder / "images" / "metadata.jsonl", _as_metadata(pairs))
  _write_coco(folder, pairs)
  _write_parquet(folder, pairs)
  _write_shards(folder, pairs)
  return folder


def _as_metadata(pairs):
  rows = [{"file_name": p["image"], "caption": p["caption"]} for p in pairs]
  return "\n".join(map(files.json.dumps, rows)) + "\n"


def _write_coco(folder, pairs):
  images = [{"id": n, "file_name": p["image"]} for n, p in enumerate(pairs)]
  texts = [
    {"image_id": n, "caption": p["caption"]} for n, p in enumerate(pairs)
  ]
  files.write_json(
    folder / "coco.json", {"images": images, "annotations": texts}
  )


def _write_parquet(folder, pairs):
  rows = [
    {
      "image": {"bytes": (folder / "images" / p["image"]).read_bytes()},
      "caption": p["caption"],
    }
    for p in pairs
  ]
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=5)


def _write_shards(folder, pairs):
  for number in range(2):
    with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
      for pair in pairs[number::2]:
        image = (folder / "images" / pair["image"]).read_bytes()
        stem = pair["image"].removesuffix(".png").zfill(4)
        for name, content in (
          (f"{stem}.png", image),
          (f"{stem}.txt", pair["caption"].encode()),
        ):
          member = tarfile.TarInfo(name)
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def remote(server, folder):
  """The same data in a bucket."""
  url = f"{server.bucket()}/data"
  copies.copy_folder(folder, url)
  return url


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


FORMS = (
  "train.json",
  "x.jsonl",
  "train.csv?caption=question",
  "x.tsv",
  "x.token",
  "coco.json",
  "x.parquet",
  "{00000..00001}.tar",
  "*.tar",
  "images",
  "FOLDER",
)


def _records(source):
  records = []
  for number in range(len(source)):
    record = source[number] | {
      "image": helpers.decode(source[number]["image"], 1 << 20)
    }
    records.append(record)
  return records


@pytest.mark.parametrize("form", FORMS)
def test_records_are_those_of_a_disk(folder, remote, form):
  opened = [
    datasets.open_source(f"{root}/{form}", f"{root}/images")
    for root in (folder, remote)
  ]
  there, here = (_records(source) for source in opened)
  assert len(here) == 16
  for one, other in zip(there, here, strict=True):
    np.testing.assert_array_equal(one.pop("image"), other.pop("image"))
    assert one == other


def test_images_without_captions(folder, remote):
  opened = [datasets.open_images(str(r) + "/FOLDER") for r in (folder, remote)]
  ids = [[source[n]["id"] for n in range(16)] for source in opened]
  assert ids[0] == ids[1]


# A worker process takes eight seconds to start.
@pytest.mark.parametrize(
  "num_workers", [0, pytest.param(1, marks=pytest.mark.slow)]
)
def test_a_loader_yields_the_same_batches(folder, remote, num_workers):
  def batches(root):
    source = datasets.open_source(f"{root}/*.tar")
    example = examples.ImageExample(transforms.EvalImage(16))
    loading = loader.train_loader(
      [source], example, batch_size=4, seed=0, num_workers=num_workers
    )
    found = [next(loading) for _ in range(6)]
    loading.close()
    return found

  for one, other in zip(batches(folder), batches(remote), strict=True):
    assert one[1] == other[1]
    np.testing.assert_array_equal(one[0]["image"], other[0]["image"])


def test_the_index_of_a_shard_is_cached(server, remote):
  server.requests.clear()
  first = datasets.open_source(f"{remote}/00000.tar")
  read = [path for _, path in server.requests if path.endswith(".tar")]
  server.requests.clear()
  second = datasets.open_source(f"{remote}/00000.tar")
  again = [m for m, path in server.requests if path.endswith(".tar")]
  assert len(first) == len(second) == 8 and read
  assert set(again) == {"HEAD"}


def test_a_shard_that_is_replaced_costs_its_rows(server, folder):
  url = server.bucket()
  copies._copy(folder / "00000.tar", f"{url}/x.tar")
  source = datasets.open_source(f"{url}/x.tar")
  source[0]
  content = (folder / "00001.tar").read_bytes()
  server.put(url, "x.tar", content)
  with pytest.raises(sources.BadRow, match="changed since reading it began"):
    source[7]


def test_an_outage_ends_a_job_and_costs_no_rows(server, folder, monkeypatch):
  url = server.bucket()
  copies.copy_folder(folder, url)
  source = datasets.open_source(f"{url}/00000.tar")
  retries = {
    "max_retries": 1,
    "backoff": {"init_backoff": datetime.timedelta(milliseconds=1)},
  }
  monkeypatch.setattr(buckets, "RETRIES", retries)
  buckets._bucket.cache_clear()
  with server.fails(times=99), pytest.raises(files.Unavailable):
    source[0]
  with server.fails(times=99), pytest.raises(files.Unavailable):
    helpers.decode(f"{url}/images/0.png", 1 << 20)
  buckets._bucket.cache_clear()
