"""The old place of lolcats.lab.data_stats; kept for one release."""

from lolcats.lab.data_stats import Statistics, data_statistics

__all__ = ["Statistics", "data_statistics"]
