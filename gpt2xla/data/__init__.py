"""Token shards: written by `writer`, read by `shards`, cut into the windows that a step trains on by `windows`."""
