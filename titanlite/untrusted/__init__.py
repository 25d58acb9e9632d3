"""Files that somebody else may have made: none of them runs code, leads out of its folder, or takes memory without
bound. Every error names the file."""
