"""Entries in other packages' registries. Neither `import lookahead_fused` nor this package imports any of them."""
