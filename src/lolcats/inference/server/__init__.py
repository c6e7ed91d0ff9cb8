"""An HTTP server in the shape of OpenAI's API over the engine."""

from lolcats.inference.server.access import Access, access_for, is_loopback
from lolcats.inference.server.app import create_app
from lolcats.inference.server.http import Server, listen, serve
from lolcats.inference.server.limits import Limits

__all__ = ["Access", "Limits", "Server", "access_for", "create_app", "is_loopback", "listen", "serve"]
