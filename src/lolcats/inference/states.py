"""The old place of lolcats.inference.engine.states; kept for one release."""

from lolcats.inference.engine.states import Snapshot

__all__ = ["Snapshot"]
