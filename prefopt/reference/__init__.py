"""The reference: which model it is, what it said, and the cache that remembers it.

identity      what makes two references the same      keys          what makes two texts the same
shards        the file format of log-probs            publishing    a file is there whole or not at all
index         where each text's numbers are           cache         a folder of shards, read and written
merging       many small shards become few large ones compaction    when, and what is kept
note          whose cache a folder is                 folders       all caches of this user
transfer      to one file and back                    remote, hub   to a URL, to a hub repository
build_plan    every batch of a build, known before it claims        who computes which
build         scoring what the cache lacks            build_progress  what is said meanwhile
opening       the cache of a run, filled              source        reference log-probs of a batch
running       the reference while a run trains        moving        one that follows the policy (TR-DPO)
certificate   how far a quantized reference is off    certified_sample, full_precision, error_statistics,
verify        whether the cache still says so         loss_effect, certificate_table: its parts
commands, storage_commands   `prefopt cache ...`
"""
