"""What `benchmarks/predict.py` has measured, as a Markdown page and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TARGETS = {  # of issue 7, on an H200: ms for one image at most, images/s at batch 32 at least
    "smope-s": (2.5, 1500.0),
    "smope-paper": (4.0, 900.0),
}
WAYS = {"eager": "eager, float32", "fast": "fast"}


def page(record: dict[str, Any]) -> str:
    lines = [
        f"# predict on {record['device']}",
        "",
        f"{record['date']}, torch {record['torch']}, images {record['size']}, medians of {record['repeats']} "
        "calls (peer and sweeps: 10). `python benchmarks/predict.py` makes this page and says what is timed.",
        "",
        "| network | way | images a call | meshes | first call, s | ms a call: median (least) | images/s "
        "| GPU memory, MiB | asked for |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in record["main"]:
        lines.append(
            f"| {row['network']} | {WAYS.get(row['way'], row['way'])} | {row['batch']} "
            f"| {row.get('meshes', '')} | {row['first']:.2f} "
            f"| {1e3 * row['median']:.2f} ({1e3 * row['least']:.2f}) "
            f"| {row['batch'] / row['median']:.0f} | {row['MiB']:.0f} | {_asked(row)} |"
        )
    if "scores" in record:
        s = record["scores"]
        keys = [key for key in s["change"] if key.startswith("AR")]
        lines += ["", f"Scores on the photos of `{s['dataset']}`:", ""]
        lines += ["| way | " + " | ".join(keys) + " |", "| --- |" + " ---: |" * len(keys)]
        for way in (*WAYS, "change"):
            lines.append(f"| {WAYS.get(way, way)} | " + " | ".join(f"{s[way][k]:.4f}" for k in keys) + " |")
    if record["sweep"]:
        lines += [
            "",
            "The fast path of the default network against one quantity at a time (the rest: 640x480, 8 ",
        ]
        lines[-1] += "meshes, the weights' own queries):"
        lines += [
            "",
            "| what | value | images a call | ms a call | images/s | first call, s | GPU memory, MiB |",
        ]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for row in record["sweep"]:
            lines.append(
                f"| {row['what']} | {row['value']} | {row['batch']} | {1e3 * row['median']:.2f} "
                f"| {row['batch'] / row['median']:.0f} | {row['first']:.2f} | {row['MiB']:.0f} |"
            )
    for name, entry in record.get("kernels", {}).items():
        if "kernels" not in entry:
            continue
        lines += [
            "",
            f"{name}: a replay takes {entry['replay_ms']:.3f} ms, {entry['kernels']} kernels that are ",
        ]
        lines[-1] += f"busy for {entry['busy_ms']:.3f} ms. The longest:"
        lines += ["", "| kernel | times | ms |", "| --- | ---: | ---: |"]
        lines += [
            f"| `{key.replace('|', '/')}` | {count} | {ms:.3f} |" for key, count, ms in entry["longest"][:12]
        ]
    for name, error in record.get("failed", {}).items():
        lines += ["", f"{name} failed: {error}"]
    return "\n".join(lines) + "\n"


def _asked(row: dict[str, Any]) -> str:
    if row["network"] not in TARGETS or row["way"] != "fast" or row["batch"] not in (1, 32):
        return ""
    milliseconds, rate = TARGETS[row["network"]]
    if row["batch"] == 1:
        return f"at most {milliseconds} ms: {'met' if 1e3 * row['median'] <= milliseconds else 'missed'}"
    return f"at least {rate:.0f}/s: {'met' if row['batch'] / row['median'] >= rate else 'missed'}"


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(14, 6), layout="constrained")
    for column, what in enumerate(("image", "queries", "meshes", "batch")):
        for line, (scale, label) in enumerate((("median", "ms an image"), ("MiB", "GPU memory, MiB"))):
            axis = axes[line][column]
            rows = [row for row in record["sweep"] if row["what"] == what]
            for batch in sorted({row["batch"] for row in rows}) if what != "batch" else [0]:
                own = [row for row in rows if what == "batch" or row["batch"] == batch]
                values = [1e3 * r["median"] / r["batch"] if scale == "median" else r["MiB"] for r in own]
                name = f"batch {batch}" if batch else None
                axis.plot([str(r["value"]) for r in own], values, "o-", label=name)
            axis.set(xlabel=what, ylabel=label if column == 0 else "", ylim=(0, None))
            if what != "batch":
                axis.legend(frameon=False)
    figure.suptitle(f"predict, fast path, default network, {record['device']}, {record['date']}")
    figure.savefig(path, dpi=110)
