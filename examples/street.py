"""Read a street: street.py [MODEL] [PHOTO FOV]

Without a photo the frame that smope brings along is read; FOV is the camera's horizontal field of view in
degrees. Cars differ in size, so each comes with its own: the mesh's, times `scale`.
"""

import json
import sys
from pathlib import Path

import smope

model = smope.SMOPE.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "kitti3d")
if len(sys.argv) > 3:
    photo, camera = sys.argv[2], {"fov": float(sys.argv[3])}
else:
    assets = Path(smope.__file__).parent / "assets"
    photo, camera = str(assets / "street.png"), {"K": json.loads((assets / "street.json").read_text())["K"]}

poses = model.predict(photo, **camera)
for found in poses:
    width, length, height = (found.scale[0] * found.objects[found.names[0]].extents).tolist()
    x, _, z = found.T_CO[0, :3, 3].tolist()
    print(
        f"{found.names[0]:<10}  score {float(found.scores[0]):.2f}  {z:5.1f} m ahead, {x:+5.1f} m to "
        f"the right  {width:.1f} x {length:.1f} x {height:.1f} m"
    )
poses.draw(photo, surfaces=False, boxes=False, boxes_3d=True).save("street.png")
