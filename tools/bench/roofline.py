"""The results as a plot: what the device can do, and what programs do.

Dimensions: none; the axes are FLOPs per byte and TFLOP/s, both logarithmic.
"""

import os
from collections.abc import Sequence
from typing import Any

from blip_jax.runtime import files


def draw(rows: Sequence[dict[str, Any]], path: str | os.PathLike) -> int:
  """Draws the rows of one device and dtype, those of the last row, as PNG.

  Returns:
    The number of points. A row without a number of FLOPs has none.

  Raises:
    ValueError: no row can be drawn.
    ImportError: matplotlib, of the extra [bench], is not installed.
  """
  try:
    from matplotlib import figure
  except ImportError as error:
    raise ImportError(
      "--plot needs matplotlib: pip install 'blip_jax[bench]'"
    ) from error
  points = [
    row
    for row in rows
    if "intensity" in row.get("native", {}) and "gflop" in row
  ]
  if not points:
    raise ValueError("--plot: there is no row of a model to draw")
  last = points[-1]
  same = lambda row: all(row[k] == last[k] for k in ("device", "dtype"))
  points = [row for row in points if same(row)]
  peaks = last["peaks"]
  canvas = figure.Figure((9, 5.5), dpi=120, layout="constrained")
  axes = canvas.subplots()
  axes.set(xscale="log", yscale="log")
  axes.set_xlabel("FLOPs per byte")
  axes.set_ylabel("TFLOP/s on the reference count")
  axes.set_title(f"{last['device']}, {last['dtype']}", fontsize=11)
  low, high = _range(points, peaks)
  _draw_roof(axes, peaks, low, high, "measured", "-")
  if last["datasheet"]:
    _draw_roof(axes, last["datasheet"], low, high, "data sheet", "--")
  for number, row in enumerate(points):
    native = row["native"]
    axes.plot(
      native["intensity"],
      native["tflops"],
      "osD^vP*X"[number % 8],
      color=f"C{number % 10}",
      markersize=9,
      linestyle="",
      label=f"{row['kind']} {row['size']}: {native['tflops']:.3g} TFLOP/s, "
      f"{native['mfu']:.0%}",
    )
  axes.set_xlim(low, high)
  axes.grid(which="major", alpha=0.3)
  canvas.legend(loc="outside right upper", fontsize=8, frameon=False)
  files.make_folder(os.path.dirname(os.path.abspath(path)))
  with files.open_atomic(path) as file:
    canvas.savefig(file, format="png")
  return len(points)


def _range(
  points: Sequence[dict[str, Any]], peaks: dict[str, float]
) -> tuple[float, float]:
  """From half of the least intensity to twice the largest, with the ridge."""
  ridge = peaks["tflops"] * 1e3 / peaks["gigabytes_per_second"]
  shown = [row["native"]["intensity"] for row in points] + [ridge]
  return min(shown) / 2, max(shown) * 2


def _draw_roof(
  axes: Any,
  peaks: dict[str, float],
  low: float,
  high: float,
  name: str,
  style: str,
) -> None:
  top, gigabytes = peaks["tflops"], peaks["gigabytes_per_second"]
  ridge = min(max(top * 1e3 / gigabytes, low), high)
  axes.plot(
    [low, ridge, high],
    [low * gigabytes / 1e3, min(top, ridge * gigabytes / 1e3), top],
    style,
    color="black",
    linewidth=1,
    label=f"{name}: {top:.3g} TFLOP/s, {gigabytes:,.0f} GB/s",
  )
