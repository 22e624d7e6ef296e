"""Ablation sweeps: many runs on equal terms, each in a process of its own, and what came of every one."""
