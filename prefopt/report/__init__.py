"""What runs amount to: read, compared on the same held-out prompts and seeds, and written as a report."""
