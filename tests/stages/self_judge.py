"""The quickstart's DPO with the policy as its own judge."""

from configs import quickstart
from configs.parts import self_judge


def get_config():
    """The config."""
    config = quickstart.get_config("dpo")
    self_judge(config)
    return config
