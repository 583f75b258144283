"""Neighborhood attention that is split over processes: along an axis (context parallelism), or by heads.

Context parallelism: the first spatial axis (the length of a sequence, the height of an image, the frames of a video) is
cut into shards, one for each rank of a process group, in order, as `tensor.tensor_split(world_size, dim=1)[rank]` cuts
it. Linear layers, norms, and all else that treats tokens alone work on shards as they are. Attention alone sees across,
and fetches no more than the halo of rows that its windows reach.
"""

from natten2.distributed.functional import na1d, na2d, na3d
from natten2.distributed.heads import HeadwiseParallel
from natten2.distributed.modules import context_parallel

__all__ = ["HeadwiseParallel", "context_parallel", "na1d", "na2d", "na3d"]
