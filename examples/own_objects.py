"""Train on meshes of your own: own_objects.py MESHES UNITS WIDTH HEIGHT FOV MINUTES [BACKGROUNDS [CLUTTER]]

MESHES is a folder of STL, OBJ, PLY or GLB files, named as the objects are to be called, and UNITS theirs: m,
cm, mm or in. WIDTH, HEIGHT (pixels) and FOV (horizontal, degrees) are the camera's. BACKGROUNDS is a folder
of any photos, CLUTTER one of PLY meshes of other things, in metres. docs/own_objects.md says what to expect.
"""

import math
import sys
from pathlib import Path

from smope import SMOPE, ObjectModel
from smope.scenes import SceneConfig, build_assets
from smope.train import fit


def main(meshes: str, units: str, width: str, height: str, fov: str, minutes: str, *folders: str) -> None:
    backgrounds = Path(folders[0]) if folders else None
    clutter = sorted(Path(folders[1]).rglob("*.ply")) if len(folders) > 1 else []
    files = [
        f for f in sorted(Path(meshes).iterdir()) if f.suffix.lower() in {".stl", ".obj", ".ply", ".glb"}
    ]
    objects = [ObjectModel.from_mesh(file.stem, file, units, symmetries="auto") for file in files]

    focal = 0.5 * int(width) / math.tan(math.radians(float(fov)) / 2)
    camera = SceneConfig(
        width=int(width),
        height=int(height),
        fx=focal,
        fy=focal,
        cx=(int(width) - 1) / 2,
        cy=(int(height) - 1) / 2,
        distance=(0.35, 1.6),  # metres from the camera, and all that SceneConfig says: make it yours
    )
    folder = fit(
        objects,
        scenes=camera,
        assets=build_assets(objects, clutter, backgrounds),
        init="lmo",  # what it has learned of photos and shapes; its eight objects are forgotten
        out="runs/own",
        max_minutes=float(minutes),
        resume=True,  # goes on where an interrupted run of this folder stopped
    )
    print(SMOPE.from_pretrained(folder))


if __name__ == "__main__":  # the rendering processes import this file
    main(*sys.argv[1:])
