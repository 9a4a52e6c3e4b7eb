"""A trained model at work: translating and completing."""
