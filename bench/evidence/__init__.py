"""What slow weights do for training: experiments, and for each claim of the literature a verdict computed from them."""
