from .shard_vmap import shard_vmap as shard_vmap
