"""Poses from an exported file, without torch or smope: onnx_only.py MODEL.onnx PHOTO FX FY CX CY

`smope export lmo` writes lmo_640x480.onnx and, beside it, lmo_640x480.meshes.npz. Needs onnxruntime, numpy
and Pillow. FX FY CX CY are the photo's intrinsics in pixels. Prints a line an object: score, name, box, pose.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

THRESHOLD = 0.5
OVERLAP_OF_ONE, OF_TWO_NAMES = 0.7, 0.9  # boxes that overlap more show one object


def fit(photo, K, width, height):
    """The photo scaled to fit into width x height, black beside it; its K; and the scale."""
    scale = min(width / photo.width, height / photo.height)
    small = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(small)
    moved = np.array(K, np.float32)
    for row, factor in enumerate((small.width / photo.width, small.height / photo.height)):
        moved[row] *= factor
        moved[row, 2] += 0.5 * factor - 0.5  # whole coordinates are pixels' centres
    return np.asarray(canvas), moved, scale


def overlap(a, b):
    """Intersection over union of two boxes."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = np.prod(np.maximum(high - low, 0))
    return both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


def main(model, photo, fx, fy, cx, cy):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    meshes = dict(np.load(Path(model).with_suffix(".meshes.npz")))
    names, (width, height) = meshes.pop("names"), meshes.pop("size").tolist()
    K = [[float(fx), 0, float(cx)], [0, float(fy), float(cy)], [0, 0, 1]]
    image, K, scale = fit(Image.open(photo).convert("RGB"), K, width, height)

    outputs = session.run(None, {"images": image[None], "K": K[None], **meshes})
    found = {output.name: value[0] for output, value in zip(session.get_outputs(), outputs, strict=True)}
    kept = []
    for i in np.flatnonzero(found["scores"] >= THRESHOLD):  # best first
        most = np.where(found["labels"][kept] == found["labels"][i], OVERLAP_OF_ONE, OF_TWO_NAMES)
        if all(overlap(found["boxes"][i], found["boxes"][j]) <= m for j, m in zip(kept, most, strict=True)):
            kept.append(i)
    for i in kept:
        box = ((found["boxes"][i] + 0.5) / scale - 0.5).round(1).tolist()
        pose = (
            found["T_CO"][i][:3].round(4).tolist()
        )  # rotation and position in metres, of the mesh's own frame
        print(f"{found['scores'][i]:.3f} {names[found['labels'][i]]} box {box} pose {pose}")


main(*sys.argv[1:])
