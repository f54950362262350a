"""Filters for training data (InternVL2.5, arXiv:2412.05271, section 4): named stages, each with a verdict and a reason."""
