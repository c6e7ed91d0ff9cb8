"""The version. No other module of the library imports the package itself, which stands on all of them."""

__version__ = "0.1.0"
