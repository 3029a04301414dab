"""Benchmarks, each one command; none is a test."""
