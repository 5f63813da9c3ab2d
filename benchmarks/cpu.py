"""On a CPU: the kernel, one image, memory and an exported file, each beside what it is to be measured by.

    smope build && python benchmarks/cpu.py --threads 2 --out benchmarks/cpu.md

Deformable attention on the tensors that the default network gives it for one image, by the C++ kernel and by
PyTorch's grid_sample. One image through `SMOPE.predict` with the bundled weights, and through `transformers`'
Deformable DETR (ResNet-50, its default settings, random weights), both from pixels in memory at one size. The
network by onnxruntime, from what `smope export` writes, beside itself. What is compared takes turns in one
process, so that a busy machine is busy for both: of the pairs' ratios the median is told, and the least and
the largest. Resident memory is that of a fresh process after import and one prediction.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[1] / "smope" / "assets" / "demo.png"
FOV = 58.41  # degrees, of the bundled picture's camera


def main() -> None:
    options = parse()
    if options.part:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(PARTS[options.part](options)))
        return
    rows = [run_apart(part, options) for part in options.parts]
    text = page([row for part in rows for row in part["rows"]], rows, options)
    print(text)
    if options.out:
        options.out.write_text(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lmo", help="a bundled name, a folder or a Hugging Face id")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(part: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", part, "--model", options.model]
    command += ["--repeats", str(options.repeats), "--threads", str(options.threads)]
    environment = {**os.environ, "SMOPE_MSDA": "auto"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def in_turns(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds of each, and of the pairs' ratios the median, the least and the largest."""
    pairs = []
    for number in range(repeats + 1):
        seconds = []
        for function in (ours, theirs):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        if number:  # the first warms up
            pairs.append(seconds)
    ratios = [a / b for a, b in pairs]
    return {
        "name": name,
        "ours": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Of the encoder's and the decoder's first layers, forward, and with the backward pass."""
    import torch
    from PIL import Image

    from smope import SMOPE
    from smope.architectures import find
    from smope.images import load_image
    from smope.networks import deformable
    from smope.ops import build
    from smope.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_torch

    if not build.cpu_kernel_ready():
        raise SystemExit("the C++ kernel is not compiled: run smope build first")
    model = SMOPE.from_pretrained(options.model, device="cpu")
    calls: list[tuple[Any, ...]] = []

    def noted(*given: Any) -> Any:
        calls.append(given)
        return ms_deform_attn(*given)

    deformable.ms_deform_attn = noted  # type: ignore[assignment]
    # Not by `predict`, whose decoder asks otherwise on a CPU: smope/ops/cpu_forms.py.
    with Image.open(DEMO) as opened, torch.no_grad():
        pixels = load_image(opened.convert("RGB"), model.device)[None] / 255
        find(model.network, pixels, torch.tensor([model.config.K]), model._tokens, 32)
    by_queries = {given[4].shape[1]: given for given in calls}
    rows = []
    for layer, given in (("encoder", by_queries[max(by_queries)]), ("decoder", by_queries[min(by_queries)])):
        value, shapes, *others = given

        def run(
            function: Callable[..., Any], backward: bool, value=value, shapes=shapes, others=others
        ) -> None:
            leaves = [t.detach().clone().requires_grad_(backward) for t in (value, *others)]
            with torch.set_grad_enabled(backward):
                output = function(leaves[0], shapes, *leaves[1:])
            if backward:
                output.sum().backward()

        for backward in (False, True):
            kind = "forward and backward" if backward else "forward"
            queries = others[2].shape[1]
            name = f"C++ kernel beside grid_sample, a layer of the {layer} ({queries} queries), {kind}"
            rows.append(
                in_turns(
                    name,
                    lambda run=run, backward=backward: run(ms_deform_attn, backward),
                    lambda run=run, backward=backward: run(ms_deform_attn_torch, backward),
                    options.repeats,
                )
            )
    return {"rows": rows, **here()}


def image(options: argparse.Namespace) -> dict[str, Any]:
    """`predict` beside Deformable DETR: each from a picture in memory to boxes."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    from smope import SMOPE

    model = SMOPE.from_pretrained(options.model, device="cpu")
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone
    )
    detr = transformers.DeformableDetrForObjectDetection(config).eval()
    with Image.open(DEMO) as opened:
        picture = np.array(opened.convert("RGB"))

    def theirs() -> None:
        with torch.inference_mode():
            detr(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)

    size = f"{picture.shape[1]}x{picture.shape[0]}"
    row = in_turns(
        f"`predict`, one image of {size}, beside Deformable DETR ResNet-50 of transformers",
        lambda: model.predict(picture, fov=FOV),
        theirs,
        options.repeats,
    )
    return {"rows": [row], "transformers": transformers.__version__, **here()}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """MiB of this process after import and one prediction, and the most it had."""
    from smope import SMOPE

    found = SMOPE.from_pretrained(options.model, device="cpu").predict(DEMO, fov=FOV)
    assert len(found) > 0
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, most = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return {"rows": [], "resident": resident, "most": most, **here()}


def exported(options: argparse.Namespace) -> dict[str, Any]:
    """The network alone, one image and four, by onnxruntime and by PyTorch, without and with the kernel."""
    import numpy as np
    import onnxruntime
    import torch
    from PIL import Image

    from smope import SMOPE
    from smope.architectures import find
    from smope.export import export_model
    from smope.ops.cpu_forms import cpu_forms

    model = SMOPE.from_pretrained(options.model, device="cpu")
    with Image.open(DEMO) as opened:
        picture = np.asarray(opened.convert("RGB").resize(model.config.image_size))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        start = time.perf_counter()
        meshes = dict(np.load(export_model(model, file, "onnx")))
        seconds = time.perf_counter() - start
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        mebibytes = file.stat().st_size / 2**20
    known = {name: meshes[name] for name in meshes if name not in ("names", "size")}
    for count in (1, 4):
        batch = np.stack([picture] * count)
        K = np.tile(np.array(model.config.K, np.float32), (count, 1, 1))

        def eager(batch=batch, K=K) -> None:
            with torch.no_grad(), cpu_forms():
                images = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255  # channels last
                find(model.network, images, torch.from_numpy(K), model._tokens, 32)

        def onnx(batch=batch, K=K) -> None:
            session.run(None, {"images": batch, "K": K, **known})

        for way in ("torch", "auto"):
            os.environ["SMOPE_MSDA"] = way
            beside = "PyTorch's operators" if way == "torch" else "the C++ kernel"
            name = f"exported ONNX, {count} image{'s' if count > 1 else ''}, beside PyTorch with {beside}"
            rows.append(in_turns(name, onnx, eager, options.repeats))
    return {
        "rows": rows,
        "export": seconds,
        "MiB": mebibytes,
        "onnxruntime": onnxruntime.__version__,
        **here(),
    }


def here() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "name": f"{name}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


PARTS = {"attention": attention, "image": image, "exported": exported, "memory": memory}


def page(rows: list[dict[str, Any]], parts: list[dict[str, Any]], options: argparse.Namespace) -> str:
    first = parts[0]
    facts = {key: value for part in parts for key, value in part.items()}
    versions = ", ".join(f"{n} {facts[n]}" for n in ("torch", "transformers", "onnxruntime") if n in facts)
    loads = ", ".join(f"{part['load_average']:.1f}" for part in parts)
    lines = [
        f"# On {first['name']}",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {versions}, {first['threads']} threads, weights "
        f"`{options.model}`, float32, {options.repeats} pairs of runs in turns. Load average at the end of "
        f"each part: {loads}. `python benchmarks/cpu.py` makes this page.",
    ]
    if rows:
        lines += [
            "",
            "| what, beside what | ms | beside, ms | ratio: median (least, largest) |",
            "| --- | ---: | ---: | ---: |",
        ]
    for row in rows:
        low, high = row["range"]
        ratio = f"{row['ratio']:.3f} ({low:.3f}, {high:.3f})"
        lines.append(f"| {row['name']} | {1e3 * row['ours']:.1f} | {1e3 * row['theirs']:.1f} | {ratio} |")
    if "resident" in facts:
        lines += [
            "",
            f"Resident after import and one prediction: {facts['resident']:.0f} MiB "
            f"(at the most {facts['most']:.0f} MiB).",
        ]
    if "export" in facts:
        lines += [
            "",
            f"`smope export` took {facts['export']:.0f} s and wrote {facts['MiB']:.1f} MiB of ONNX.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
