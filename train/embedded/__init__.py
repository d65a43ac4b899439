"""How the embedded model is trained from scratch: python -m train.embedded."""
