"""The recipe: one YAML file is one run; every key can be overridden and is checked before anything loads."""

from prefopt.recipe.allowed import recipe_schema
from prefopt.recipe.load import find_recipe, load_recipe, recipe_from_mapping, shipped_recipes
from prefopt.recipe.schema import (
    AdapterRecipe,
    CheckpointRecipe,
    DataRecipe,
    EvalRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    ReferenceRecipe,
    Source,
    TrackingRecipe,
    TrainRecipe,
)

__all__ = [
    "AdapterRecipe",
    "CheckpointRecipe",
    "DataRecipe",
    "EvalRecipe",
    "ModelRecipe",
    "OptimizerRecipe",
    "Recipe",
    "ReferenceRecipe",
    "Source",
    "TrackingRecipe",
    "TrainRecipe",
    "find_recipe",
    "load_recipe",
    "recipe_from_mapping",
    "recipe_schema",
    "shipped_recipes",
]
