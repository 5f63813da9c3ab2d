"""A model from the small checkpoint of a run, where the run's own model did not come along.

    SMOPE_DATA=... python tools/model_of_run.py RECIPE RUN OUT

RUN is the folder with `small.safetensors` or its parts, OUT the model's, for `SMOPE.from_pretrained`. RECIPE
names the meshes, the network and the camera; it is the one that the run was made with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from smope.architectures import build_network
from smope.config import from_json
from smope.model import SMOPE
from smope.scenes.config import SceneConfig
from smope.scenes.street_config import StreetConfig
from smope.train.checkpoint import load_small
from smope.train.choice import network_config
from smope.train.fit import objects_of, trained_model
from smope.train.loop import SMALL
from smope.train.recipe import load_recipe


def model_of_run(recipe: Path, run: Path) -> SMOPE:
    plan = load_recipe(recipe)
    network = build_network(network_config(plan, None))
    network.load_state_dict(load_small(run / SMALL)[0])
    camera = (
        from_json(StreetConfig, plan.street, "street")
        if plan.street
        else from_json(SceneConfig, plan.scenes, "scenes")
    )
    rows = [[camera.fx, 0.0, camera.cx], [0.0, camera.fy, camera.cy], [0.0, 0.0, 1.0]]
    objects = objects_of(None, None, None, plan.data)
    return trained_model(
        network, objects, (camera.width, camera.height), torch.tensor(rows, dtype=torch.float64)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    model_of_run(options.recipe, options.run).save_pretrained(options.out, dtype=torch.float16)
    print(f"{options.out}: the model of {options.run}")


if __name__ == "__main__":
    main()
