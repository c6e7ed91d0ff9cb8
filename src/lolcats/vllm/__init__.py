"""Linearized models on vLLM, as a plugin that vLLM finds by itself. No other part of the library imports it."""
