"""The reference: which model it is, what it said, and the cache that remembers it.

identity.py   what makes two references the same
cache.py      log-probs by content, in Parquet shards
build.py      scoring what the cache does not hold
source.py     what the loop asks: reference log-probs of a batch, cached or online
"""
