"""The version of w1train. It is in a module of its own, because ``w1train/__init__.py`` does not run where Python takes another directory
for the package (in the parent directory of a checkout that is named w1train)."""

__version__ = "0.1.0"
