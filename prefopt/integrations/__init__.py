"""Adapters for other people's trainers."""
