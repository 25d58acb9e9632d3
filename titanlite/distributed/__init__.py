"""Everything that makes one model run on many devices: groups, the mesh, and one file per dimension."""
