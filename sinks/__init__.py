"""StreamingLLM (Xiao et al., ICLR 2024) as a jitted key-value cache. Not built yet: see README's status table."""
