"""What users do to an optimizer, its parameters and its state between two steps, drawn at random and done to every
backend and to an oracle alike.

`worlds` is one backend's parameters and optimizer, `steps` and `moves` are the operations, `follower` is the oracle,
`sequences` draws, runs, compares and shrinks.
"""
