"""Training: python -m train.run and its siblings."""
