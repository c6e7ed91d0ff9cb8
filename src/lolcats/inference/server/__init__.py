"""An HTTP server in the shape of OpenAI's API over the engine."""

from lolcats.inference.server.app import Limits, create_app, listen, serve

__all__ = ["Limits", "create_app", "listen", "serve"]
