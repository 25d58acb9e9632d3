"""The distribution of a model over devices: process groups, the mesh, and one file per dimension of parallelism."""
