"""Population-scale synthesis of medical images: the steps behind the Snakemake workflow."""

__version__ = "0.2.0"
