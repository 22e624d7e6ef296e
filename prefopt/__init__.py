"""prefopt: offline preference optimization from a recipe, from Python, or as a fair comparison."""

__version__ = "0.1.0"
