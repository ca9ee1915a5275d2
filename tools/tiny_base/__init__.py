"""How the embedded base is made and measured: `python -m tools.tiny_base.make_base`."""
