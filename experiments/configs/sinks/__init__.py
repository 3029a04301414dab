"""StreamingLLM experiments."""
