"""Axolotl's YAML as a recipe of Ossia's, with a word about every key of it. No torch."""

from ossia.axolotl.read import Imported, import_axolotl
from ossia.axolotl.text import as_text

__all__ = ["Imported", "as_text", "import_axolotl"]
