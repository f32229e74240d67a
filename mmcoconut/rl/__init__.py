"""Reinforcement learning with rewards on sampled answers, and training of the stop head."""
