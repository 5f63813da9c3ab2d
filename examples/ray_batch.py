"""Poses of a disk of images on a Ray cluster: ray_batch.py IMAGES OUT [ACTORS [MODEL [FOV]]]

IMAGES is a folder that every machine sees under this path, OUT one for JSON lines: path, poses (what
Poses.save writes, as text; empty where there is an error), error. ACTORS models work at once, each on a GPU
where the cluster has any. An actor that dies is started again, and its images are done again. FOV is the
horizontal field of view in degrees. Needs `pip install ".[ray]"` in the clone.
"""

import json
import sys

import ray

from smope import SMOPE
from smope.many_images import image_files


class FindObjects:
    def __init__(self, model: str, fov: float | None) -> None:
        self.model, self.fov = SMOPE.from_pretrained(model), fov

    def __call__(self, batch: dict) -> dict:
        found = list(self.model.stream(batch["path"].tolist(), fov=self.fov))
        return {
            "path": batch["path"],
            "poses": ["" if one.poses is None else json.dumps(one.poses.to_dict()) for one in found],
            "error": [str(one.error or "") for one in found],
        }


def main(images: str, out: str, actors: str = "1", model: str = "lmo", fov: str = "") -> None:
    ray.init(ignore_reinit_error=True)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    paths = ray.data.from_items([{"path": path} for path in image_files([images])])
    paths.map_batches(
        FindObjects,
        fn_constructor_args=(model, float(fov) if fov else None),
        compute=ray.data.ActorPoolStrategy(size=int(actors)),
        num_gpus=gpus,
        batch_size=64,
    ).write_json(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
