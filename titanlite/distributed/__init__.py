"""What makes one model run on many devices: process groups, the mesh, and one file per dimension of parallelism."""
