"""Everything distributed that is created: process groups, meshes, sharding, recompute, gradients across ranks."""
