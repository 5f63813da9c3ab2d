"""Training: `fit` turns meshes into a model. Nothing here is imported by `import smope`."""

# The function takes the name of its module, so that both `smope.train.fit(...)` and `from smope.train.fit
# import fit` mean it; that needs the module to be loaded here.
from smope.train.fit import fit
from smope.train.recipe import Recipe, load_recipe

__all__ = ["Recipe", "fit", "load_recipe"]
