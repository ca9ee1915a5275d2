"""Starts a kernel as Colab does: with what it has imported before the first cell."""

import sys

import google.colab  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import numpy  # noqa: F401
import pandas  # noqa: F401
import PIL.Image  # noqa: F401
from ipykernel.kernelapp import IPKernelApp

sys.path[0] = ""  # the working directory in place of this file's, as `python -m` has it
IPKernelApp.launch_instance()
