"""Lets AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) find the installed lolcats package."""

from lolcats.modeling.auto import TrustedConfig as LolcatsConfig  # noqa: F401


class LolcatsForCausalLM:
    """Never used: reading the configuration has registered the right class with AutoModelForCausalLM."""
