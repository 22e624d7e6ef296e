"""Adapters for other people's trainers: one module per trainer, imported only by whoever uses it."""
