"""Finds a checkpoint's files: on disk, on the Hugging Face hub, or by URL.

An interrupted download resumes where it stopped, in the same run or a later
one. A file gets its name once it is complete and its checksum, if known, is
right: every file in the cache is complete.
"""

import fnmatch
import hashlib
import http.client
import logging
import os
import pathlib
import re
import time
import urllib.error
import urllib.parse
import urllib.request

import filelock
import tqdm

from blip_jax.convert import registry
from blip_jax.data import vocabulary
from blip_jax.runtime import copies, files, snapshot

log = logging.getLogger(__name__)

# Seconds to wait before each retry. Progress starts them over.
_WAITS = (1, 2, 4)
_TIMEOUT = 30  # seconds without any data
_CHUNK = 1 << 18  # bytes

# Responses after which a retry may succeed.
_TRANSIENT = (408, 429, 500, 502, 503, 504)

_HUB_FILES = (
  "config.json",
  "generation_config.json",
  "preprocessor_config.json",
  "processor_config.json",
  *vocabulary.FILES,
)
# In order of preference: many repositories have the same weights in both.
_HUB_WEIGHTS = (
  ("model.safetensors*", "model-*.safetensors"),
  ("pytorch_model.bin*", "pytorch_model-*.bin"),
)

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WEIGHT_FILE = re.compile(r".*\.(pth?|bin|ckpt|safetensors)")


class _TransferError(Exception):
  """The response did not arrive, or not completely; a retry may help."""


def fetch(name_or_path: str | os.PathLike) -> pathlib.Path:
  """Finds a checkpoint, and downloads it if it is not local.

  Args:
    name_or_path: the first of these that applies:
      a file or folder, which is returned as it is; one in an object store is
      copied to this machine;
      a name in `registry.RELEASED` or an http(s) URL, which is downloaded to
      `cache_dir()` once;
      a repository on the Hugging Face hub ("Owner/name"): configs, vocabulary
      and one format of the weights are downloaded to the hub's own cache.

  Returns:
    The path of a file, or of a folder for a repository.

  Raises:
    ValueError: there is no such checkpoint, it cannot be downloaded, or its
      SHA-256 is not the registry's; says what to do without a network.
  """
  name = os.fspath(name_or_path)
  if files.is_remote(name):
    return _from_store(name)
  if "://" not in name and files.exists(name):
    return pathlib.Path(name)
  released = registry.find(name)
  source = released.source if released else name
  if source.startswith(("http://", "https://")):
    return _from_url(source, released)
  if _HUB_NAME.fullmatch(source) and not _WEIGHT_FILE.fullmatch(source):
    return _from_hub(source)
  raise ValueError(
    f"{name!r} is neither a local file or folder, nor the name of a released "
    "checkpoint (blip_jax/convert/registry.py lists them), nor an http(s) URL, "
    "nor a repository on the Hugging Face hub (Owner/name)"
    + _suggestion(source)
  )


def _from_store(name: str) -> pathlib.Path:
  """The copy of a file, or of a folder that is a model or a run."""
  if files.is_file(name):
    return pathlib.Path(copies.local_copy(name))
  if snapshot.holds_one(name):
    return pathlib.Path(snapshot.find(name))
  if not files.is_folder(name):
    raise ValueError(f"{name}: there is no such file or folder")
  return copies.local_folder(name)


def cache_dir() -> pathlib.Path:
  """The folder of downloaded files.

  `$BLIP_JAX_CACHE`, else `$XDG_CACHE_HOME/blip_jax`, else `~/.cache/blip_jax`.
  """
  if folder := os.environ.get("BLIP_JAX_CACHE"):
    return pathlib.Path(folder).expanduser()
  return copies.cache_folder()


def _suggestion(name: str) -> str:
  names = [] if registry.find(name) else registry.nearest(name)
  return f". Did you mean {' or '.join(names)}?" if names else ""


def _from_hub(name: str) -> pathlib.Path:
  # The import takes a second, and local files do not need it.
  import huggingface_hub
  from huggingface_hub import errors

  try:
    for weights in _HUB_WEIGHTS:
      folder = huggingface_hub.snapshot_download(
        name, allow_patterns=[*_HUB_FILES, *weights]
      )
      folder = pathlib.Path(folder)
      names = files.list_folder(folder)
      if any(fnmatch.filter(names, pattern) for pattern in weights):
        return folder
  except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
    raise ValueError(
      f"{name!r} is neither a local file or folder nor a visible repository on "
      f"the Hugging Face hub ({_reason(error)})" + _suggestion(name)
    ) from error
  # The hub's and its HTTP client's errors have no narrower common class.
  except Exception as error:
    cache = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE)
    cache /= f"models--{name.replace('/', '--')}"
    raise ValueError(
      f"{name!r} is not a local file or folder, and cannot be fetched from the "
      f"Hugging Face hub ({_reason(error)}). Without a network: run `hf "
      f"download {name} --local-dir FOLDER` on another machine, copy FOLDER "
      f"here and pass its path; or copy that machine's {cache.name} to {cache}"
      + _suggestion(name)
    ) from error
  patterns = ", ".join(pattern for row in _HUB_WEIGHTS for pattern in row)
  raise ValueError(
    f"{name}: no weights in this repository: expected one of {patterns}, found "
    f"only {files.list_folder(folder)}"
  )


def _from_url(url: str, released: registry.Released | None) -> pathlib.Path:
  target = cache_dir() / _file_name(url, released)
  if files.exists(target):
    return target
  _make_writable(target.parent)
  with filelock.FileLock(f"{target}.lock"):
    # Another process may have downloaded it while this one waited.
    if not files.exists(target):
      _download(url, released, target)
  return target


def _file_name(url: str, released: registry.Released | None) -> str:
  """A file name that stays in the cache and replaces no other URL's file."""
  path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
  name = re.sub(r"[^\w.-]", "_", path.rsplit("/", 1)[-1], flags=re.ASCII)[-100:]
  if released:
    return name
  return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def _make_writable(folder: pathlib.Path) -> None:
  try:
    files.make_folder(folder)
    writable = files.is_writable(folder)
  except OSError:
    writable = False
  if not writable:
    raise ValueError(
      f"{folder}, the folder of downloads, cannot be written; set "
      "BLIP_JAX_CACHE to one that can"
    )


def _download(
  url: str, released: registry.Released | None, target: pathlib.Path
) -> None:
  part = target.with_name(f"{target.name}.part")
  log.info("Downloading %s to %s", url, target)
  progress, waits = _size(part), iter(_WAITS)
  while True:
    try:
      _transfer(url, part)
      break
    except _TransferError as error:
      if _size(part) > progress:
        progress, waits = _size(part), iter(_WAITS)
      wait = next(waits, None)
      if wait is None:
        raise ValueError(
          f"{url} cannot be downloaded: {error}. Without a network: download "
          f"it on another machine and put it at {target}, or pass the path of "
          f"the copy." + _kept(part)
        ) from error
      log.warning("%s: %s. Retrying in %s s.", url, error, wait)
      time.sleep(wait)
  digest = files.sha256(part)
  if released and not released.has_digest(digest):
    files.remove(part)
    expected = "...".join(filter(None, released.sha256))
    raise ValueError(
      f"{url}: expected SHA-256 {expected}, found {digest}. The download was "
      "deleted; try again or, if you trust the file, download it yourself and "
      "pass its path"
    )
  log.info("%s: %d bytes, SHA-256 %s", target, _size(part), digest)
  files.rename(part, target)
  files.remove(_tag_file(part))


def _kept(part: pathlib.Path) -> str:
  if not _size(part) or not _size(_tag_file(part)):
    return ""
  return (
    f" The {_size(part)} bytes received so far are kept in {part}; the next "
    "attempt resumes there."
  )


def _transfer(url: str, part: pathlib.Path) -> None:
  """Downloads the rest of `part`, or all of it if the file has changed."""
  tag = _tag_file(part)
  etag = files.read_text(tag) if files.exists(tag) else ""
  start = _size(part) if etag else 0
  response = _request(url, start, etag) or _request(url, 0, "")
  assert response is not None, "only a range can be refused"
  with response:
    _receive(response, part)


def _request(
  url: str, start: int, etag: str
) -> http.client.HTTPResponse | None:
  """Requests the bytes from `start`, or all if the file is not `etag`'s.

  Returns:
    The response; None if it does not continue at `start`.
  """
  headers = {"Range": f"bytes={start}-", "If-Range": etag} if start else {}
  request = urllib.request.Request(url, headers=headers)
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    with error:
      if error.code == 416 and start:
        return None
      status = f"the server answered {error.code} {error.reason}"
      if error.code in _TRANSIENT:
        raise _TransferError(status) from error
      raise ValueError(
        f"{url}: {status}; check the address, or pass the path of a copy"
      ) from error
  except (OSError, http.client.HTTPException) as error:
    raise _TransferError(f"no connection ({_reason(error)})") from error
  if response.status == 200:
    return response
  # Some servers ignore If-Range, and may send the rest of a changed file.
  content_range = response.headers.get("Content-Range", "")
  if (
    response.status == 206
    and _etag(response) == etag
    and content_range.startswith(f"bytes {start}-")
  ):
    return response
  response.close()
  if start:
    return None
  raise _TransferError(f"the server answered {response.status}, expected 200")


def _receive(response: http.client.HTTPResponse, part: pathlib.Path) -> None:
  start = _size(part) if response.status == 206 else 0
  total = None if response.length is None else start + response.length
  chunk = _read(response)
  # Before anything is written: a login page must not replace received bytes.
  _refuse_web_page(response, chunk)
  if total is not None:
    _check_space(part, total)
  if not start:
    files.remove(part)
  with files.open_append_bytes(part) as file:
    # Only once the old bytes are gone, or they would get the new tag.
    files.write_text(_tag_file(part), _etag(response))
    with tqdm.tqdm(
      desc=part.stem,
      total=total,
      initial=start,
      unit="B",
      unit_scale=True,
      disable=None,  # shown on a terminal only
    ) as bar:
      while chunk:
        file.write(chunk)
        bar.update(len(chunk))
        chunk = _read(response)
  if total is not None and _size(part) != total:
    raise _TransferError(f"interrupted after {_size(part)} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
  try:
    return response.read(_CHUNK)
  except (OSError, http.client.HTTPException) as error:
    raise _TransferError(f"connection lost ({_reason(error)})") from error


def _refuse_web_page(response: http.client.HTTPResponse, head: bytes) -> None:
  tags = (b"<!doctype", b"<html", b"<?xml")
  if response.headers.get_content_type() == "text/html" or (
    head[:1024].lstrip().lower().startswith(tags)
  ):
    raise ValueError(
      f"{response.url}: expected a file of weights, found a web page. Open the "
      "address in a browser: the network may require a login, or the page may "
      "link to the file"
    )


def _check_space(part: pathlib.Path, total: int) -> None:
  missing = total - _size(part)
  free = files.free_bytes(part.parent)
  if missing > free:
    raise ValueError(
      f"{part.parent} has {free / 1e9:.1f} GB free, and {part.stem} needs "
      f"{missing / 1e9:.1f} GB; set BLIP_JAX_CACHE to a folder on a larger disk"
    )


def _etag(response: http.client.HTTPResponse) -> str:
  """A value that changes with the bytes of the file; "" if there is none.

  A weak entity tag may stay the same when bytes change, so it is not used.
  """
  etag = response.headers.get("ETag", "W/")
  if not etag.startswith("W/"):
    return etag
  return response.headers.get("Last-Modified", "")


def _tag_file(part: pathlib.Path) -> pathlib.Path:
  return part.with_name(f"{part.name}.etag")


def _size(path: pathlib.Path) -> int:
  return files.size(path) if files.exists(path) else 0


def _reason(error: Exception) -> str:
  reason = getattr(error, "reason", None) or error
  return (str(reason).strip() or type(error).__name__).splitlines()[0]
