"""Anything a user has -> checked images with a split, in Parquet shards."""
