"""What measuring needs beyond `lookahead_fused.bench`: a compiled ceiling, processes, the cores' state, reports."""
