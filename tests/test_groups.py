"""The devices of a collective."""

import pytest

from blip_jax.plan import groups


@pytest.mark.parametrize(
  "text, expected",
  [
    ("{{0,1},{2,3}}", (0, 1)),
    ("[4,2]<=[8]", (0, 1)),
    ("[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("mesh['data'=2,'tensor'=2] {'data'}", (0, 2)),
    ("mesh['data'=2,'tensor'=2] {'data','tensor'}", (0, 1, 2, 3)),
    # Their devices may be in another order.
    ("mesh['a'=8,'b'=1,'c'=4], device_ids=([4,8]T(1,0)) {'a'}", (*range(8),)),
    ("mesh['a'=8,'b'=1,'c'=4], device_ids=([4,8]T(1,0)) {'c'}", (0, 8, 16, 24)),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]) {'b'}", (0, 1)),
    ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", (3, 1)),
    # A part of an axis: of eight, the factor four after two.
    ("mesh['a'=8,'b'=2] {'a':(2)4}", (0, 2, 4, 6)),
    ("mesh['a'=8,'b'=2] {'a':(1)2,'b'}", (0, 1, 8, 9)),
  ],
)
def test_groups_of_devices(text, expected):
  assert groups.first(f"(%x), replica_groups={text}, dims") == expected


def test_groups_that_are_not_understood_are_no_silent_zero():
  with pytest.raises(ValueError, match=r"groups of devices.*<other>"):
    groups.first("(%x), replica_groups=<other>, dimensions={0}")
