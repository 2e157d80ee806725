"""Token shards: PREFIX.bin + PREFIX.idx as Megatron writes them, PREFIX.json beside them.

The parts: ``shard_index`` (byte layout), ``shard_sidecar`` (PREFIX.json), ``shard_writer``, ``shard_reader``,
``shard_verify``. Torch-free.
"""

from trainer.data.shard_reader import TokenShards
from trainer.data.shard_verify import verify
from trainer.data.shard_writer import ShardWriter

__all__ = ["ShardWriter", "TokenShards", "verify"]
