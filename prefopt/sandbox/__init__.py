"""A small complete world: readable reviews, a policy that writes them, and a known gold reward that judges them."""

from prefopt.sandbox.reward import gold_reward
from prefopt.sandbox.world import World, WorldSettings, build_world

__all__ = ["World", "WorldSettings", "build_world", "gold_reward"]
