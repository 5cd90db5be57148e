"""Recipes: the schema, its loader with errors that name file and line, and the words about every key. No torch."""

from ossia.config.check import DATA_SUFFIXES, RECIPE_IN_RUN, check_recipe, checked_recipe, is_hub_name
from ossia.config.explain import explain, recipe_page
from ossia.config.findings import Places
from ossia.config.load import load_recipe, read_recipe, recipe_from_dict
from ossia.config.schema import (
    AdapterConfig,
    DataSourceConfig,
    EvalConfig,
    HarmonyConfig,
    LogConfig,
    LoraShape,
    Recipe,
    TargetConfig,
    TrainConfig,
    TrainOnConfig,
)

__all__ = [
    "DATA_SUFFIXES",
    "RECIPE_IN_RUN",
    "AdapterConfig",
    "DataSourceConfig",
    "EvalConfig",
    "HarmonyConfig",
    "LogConfig",
    "LoraShape",
    "Places",
    "Recipe",
    "TargetConfig",
    "TrainConfig",
    "TrainOnConfig",
    "check_recipe",
    "checked_recipe",
    "explain",
    "is_hub_name",
    "load_recipe",
    "read_recipe",
    "recipe_from_dict",
    "recipe_page",
]
