"""schedlab: a reinforcement-learning laboratory for schedulers inside ML systems."""
