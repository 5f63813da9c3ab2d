"""Find an object of your own: own_mesh.py PHOTO FOV MESH UNITS [MODEL]

MESH is an OBJ, PLY, STL or GLB file and UNITS the unit of its coordinates: m, cm, mm or in. Poses come back
in the frame of that file. Weights that were not trained on the mesh warn; `smope fit` trains on it.
"""

import sys
from pathlib import Path

from smope import SMOPE

photo, fov, mesh, units = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
model = SMOPE.from_pretrained(sys.argv[5] if len(sys.argv) > 5 else "lmo")
model.register_meshes(
    {mesh.stem: mesh}, units=units, symmetries="auto"
)  # add=True keeps the trained ones too

best = model.predict(photo, fov=fov, threshold=0.0, top_k=1)  # the surest, however unsure
position = best.T_CO[0, :3, 3]  # metres: right, down, forward of the camera
rotation = best.T_CO[0, :3, :3]  # mesh to camera
print(f"{best.names[0]} {best.scores[0]:.2f} at {position.tolist()}, turned by\n{rotation.numpy()}")
best.draw(photo, boxes_3d=True).save(f"{mesh.stem}.png")
best.save(f"{mesh.stem}.json")  # Poses.load reads it back
