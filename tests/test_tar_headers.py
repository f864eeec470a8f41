"""Members of a tar file, of any program and with any damage."""

import io
import random
import tarfile
import time

import pytest

from blip_jax.data import tar_headers
from tests.hostile import tars


def read(path):
  damage = tar_headers.Damage(str(path))
  members = [*tar_headers.members(str(path), damage)]
  return members, damage.lines


@pytest.mark.parametrize("style", tars.FORMATS)
def test_members_are_those_of_tarfile(tmp_path, style):
  names = ["a.jpg", "f/" * 60 + "b.jpg", "ü" * 40 + ".jpg", "f/c.jpg"]
  if style != tarfile.USTAR_FORMAT:
    names += ["n" * 300 + ".jpg", "\udce9.jpg"]
  path = tmp_path / "a.tar"
  with tarfile.open(path, "w", format=style) as tar:
    for number, name in enumerate(names):
      member = tarfile.TarInfo(name)
      member.size = number * 300
      tar.addfile(member, io.BytesIO(b"x" * member.size))
    for type in (b"1", b"2", b"3", b"5", b"6"):
      member = tarfile.TarInfo(f"type {type.decode()}")
      member.type, member.linkname = type, "a.jpg"
      tar.addfile(member)
  with tarfile.open(path) as tar:
    expected = [
      (m.name, m.offset_data, m.size, m.isreg(), m.isdir()) for m in tar
    ]
  members, damage = read(path)
  assert damage == []
  assert [m._replace(name=m.name.rstrip("/")) for m in members] == expected
  assert [m.name for m in members[: len(names)]] == names


def test_a_size_beyond_eight_gigabytes_is_read(tmp_path):
  path = tmp_path / "a.tar"
  size = 9 << 30
  for front in (
    tars.header(size=tars.base_256(size)),
    tars.member(b"pax", b"19 size=%d\n" % size, type=b"x") + tars.header(),
  ):
    with open(path, "wb") as file:
      file.write(front)
      file.truncate(len(front) + size)
      file.seek(0, 2)
      file.write(tars.header(b"b.jpg") + tars.ending())
    members, damage = read(path)
    assert ([m.size for m in members], damage) == ([size, 0], [])


def test_whatever_is_in_front_of_a_cut_survives(tmp_path):
  samples = tars.good_samples(random.Random(0), 0, 4)
  whole = tars.members(samples) + tars.ending()
  path = tmp_path / "a.tar"
  path.write_bytes(whole)
  expected, _ = read(path)
  for cut in range(0, len(whole), 256):
    path.write_bytes(whole[:cut])
    members, damage = read(path)
    assert members == [m for m in expected if m.offset + m.size <= cut]
    ends = [m.offset + -(-m.size // 512) * 512 for m in members]
    lost = any(whole[max([0, *ends]) : cut])
    assert bool(damage) == lost


@pytest.mark.parametrize("length", [1, 100, 512, 700, 2000])
@pytest.mark.parametrize("style", tars.FORMATS)
def test_bytes_that_were_lost_or_added_cost_one_member(tmp_path, length, style):
  samples = tars.good_samples(random.Random(0), 0, 4)
  whole = tars.members(samples, style) + tars.ending()
  path = tmp_path / "a.tar"
  path.write_bytes(whole)
  expected, _ = read(path)
  at = expected[2].offset  # the content of the second image
  for damaged in (
    whole[:at] + b"\xff" * length + whole[at:],
    whole[:at] + whole[at + length :],
  ):
    path.write_bytes(damaged)
    members, damage = read(path)
    names = {m.name for m in members}
    assert {m.name for m in expected} - names <= {"good001.jpg", "good001.txt"}
    assert damage


def test_damage_of_any_extent_is_listed_in_bounded_memory(tmp_path):
  path = tmp_path / "a.tar"
  path.write_bytes(tars.header(size=tars.base_256(-1)) * 5000)
  members, damage = read(path)
  assert members == []
  assert len(damage) == tar_headers.MAX_LINES + 1
  assert f"{5000 - tar_headers.MAX_LINES} more" in damage[-1]
  assert all(line.startswith(f"{path}: ") for line in damage)


def test_zeros_are_no_damage_and_anything_else_is(tmp_path):
  path = tmp_path / "a.tar"
  member = tars.member()
  for gap, is_damage in (
    (bytes(512), False),
    (bytes(512 * 3000), False),
    (bytes(512) + b"x" + bytes(511), True),
    (bytes(1023) + b"x", True),
  ):
    path.write_bytes(member + gap + member + tars.ending())
    members, damage = read(path)
    assert len(members) == 2
    assert bool(damage) == is_damage
    path.write_bytes(member + gap)
    assert bool(read(path)[1]) == is_damage


@pytest.mark.parametrize(
  "block",
  [
    b"ustar" + bytes(11),
    b"0000000\0" * 13 + bytes(5) + b"ustar",
    tars.header(checksum=b"000001\0 "),
    tars.header(size=tars.base_256(-1)),
    tars.header(size=tars.base_256(2**62)),
    tars.header(type=b"S", magic=b"ustar  \0", rest=b"\1" * 160),
    tars.header(size=19, type=b"x") + tars.padded(b"19 path=renamed.jp\n"),
    bytes(512),
    b"\xff" * 512,
  ],
)
def test_the_time_of_a_scan_is_linear(tmp_path, block):
  path = tmp_path / "a.tar"
  seconds = []
  for size in (1 << 18, 1 << 20):
    path.write_bytes(block * (size // len(block)))
    start = time.process_time()
    read(path)
    seconds.append(time.process_time() - start)
  assert seconds[1] < 8 * seconds[0] + 0.1  # four times the bytes
