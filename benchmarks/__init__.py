"""Measurements: run by hand, on the machine that is measured. Nothing here is installed with the package."""
