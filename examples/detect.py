"""Find objects that the weights know: detect.py PHOTO FOV [MODEL]

FOV is the camera's horizontal field of view in degrees; MODEL a bundled name (lmo), a folder, or a hub id.
"""

import sys

from smope import SMOPE

photo, fov = sys.argv[1], float(sys.argv[2])
model = SMOPE.from_pretrained(sys.argv[3] if len(sys.argv) > 3 else "lmo")
poses = model.predict(photo, fov=fov)
print(poses)
poses.draw(photo).save("detected.png")
