"""The version, in a module: where Python takes a directory beside the command for the package (`cd` to the parent of a checkout that is
named w1train), ``w1train/__init__.py`` does not run."""

__version__ = "0.1.0"
