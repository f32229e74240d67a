"""Learning from a model's own answers: rewards on sampled ones, and when to stop thinking."""
