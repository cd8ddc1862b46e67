"""A picture of a saved record, beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _decode(axes: Any, record: dict[str, Any]) -> None:
    """Bars of milliseconds a step by batch; what limits a step as lines."""
    rows = [row for row in record["rows"] if "error" not in row]
    batches = sorted({row["batch"] for row in rows})
    ours = {row["batch"]: row["a_ms"] for row in rows}
    series: dict[str, dict[int, float]] = {"hybrid_fx": ours}
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        into = lines if row["key"] in ("linear", "read", "matrix") else series
        into.setdefault(row["peer"], {})[row["batch"]] = row["b_ms"]
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [batches.index(batch) + (index + 0.5) * width - 0.4 for batch in values]
        axes.bar(places, list(values.values()), width, label=name)
    for style, (name, values) in zip(("k_--", "k_:", "k_-."), lines.items(), strict=False):
        axes.plot([batches.index(b) for b in values], list(values.values()), style, label=name)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("rows")
    axes.set_ylabel("milliseconds a step")
    axes.legend()


def _bars(axes: Any, record: dict[str, Any]) -> None:
    """One bar for each row, least to greatest as a whisker where it is known."""
    rows = [row for row in record["rows"] if "error" not in row]
    key = "ms" if rows and "ms" in rows[0] else "ratio"
    values = [row[key] for row in rows]
    low = [value - row[f"{key}_min"] for value, row in zip(values, rows, strict=True)]
    high = [row[f"{key}_max"] - value for value, row in zip(values, rows, strict=True)]
    axes.barh(range(len(rows)), values, xerr=(low, high), capsize=3)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds" if key == "ms" else "times as fast")


def _soak(axes: Any, record: dict[str, Any]) -> None:
    """Resident memory by rollouts."""
    rows = [row for row in record["rows"] if "error" not in row]
    axes.plot([row["turns"] for row in rows], [row["resident_mib"] for row in rows], "o-")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rollouts")
    axes.set_ylabel("resident, MiB")


#: Workload to its picture; bars where there is none.
_PICTURES = {"decode": _decode, "soak": _soak}


def draw(path: Path) -> Path:
    """Draw the record at ``path``; returns the path of the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    record = json.loads(path.read_text())
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    name = record["name"]
    _PICTURES.get(name.partition("-")[0], _bars)(axes, record)
    machine = record["machine"]
    threads = f"{machine['threads']} threads"
    axes.set_title(f"{name}\n{machine['processor']}, {threads}, {record['date']}", fontsize=9)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    print(f"written: {picture}")
    return picture
