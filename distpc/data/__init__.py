"""Data: sources, shards, their index, and who reads which sample when."""
